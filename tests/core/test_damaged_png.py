"""A PNG whose pixels are not those of their checksums is refused, whatever it decompresses to."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.images import decode_image


def png() -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return pixels, out.getvalue()


def test_one_flipped_bit_never_gives_other_pixels() -> None:
    pixels, data = png()
    read = 0
    for place in range(len(data)):
        spoilt = bytearray(data)
        spoilt[place] ^= 0x10
        try:
            found = decode_image(bytes(spoilt), "a.png")
        except UserError as error:
            assert "a.png" in str(error)  # noqa: PT017
        else:
            assert np.array_equal(np.asarray(found), pixels)
            read += 1
    assert read < 20  # bits of what stands behind the pixels


def test_a_png_that_ends_within_its_pixels_is_refused() -> None:
    pixels, data = png()
    assert np.array_equal(np.asarray(decode_image(data[:-12], "a.png")), pixels)  # its end mark alone is missing
    with pytest.raises(UserError, match=r"a\.png"):
        decode_image(data[:-14], "a.png")
