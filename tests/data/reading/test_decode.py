from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.images import decode_image, extension_of
from lit_safety.data.format.sample import PairMetadata, Sides
from lit_safety.data.format.tar_index import BadSample
from lit_safety.data.reading.decode import PairDecoder, to_tensor
from tests.helpers.pair_shards import make_image


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of side x side one-bit pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1000), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_the_three_formats(kind: str, suffix: str) -> None:
    data = encoded(make_image(80, 16), kind)
    assert extension_of(data, "") == suffix
    image = decode_image(data, "here")
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.abs(np.asarray(image, int) - np.asarray(make_image(80, 16), int)).mean() < 12


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(image, kind), "here").mode == "RGB"


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert list(decode_image(encoded(image), "").getdata()) == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (bomb(30_000), "over the limit of"),
        (bomb(5_000), "5000 x 5000 pixels is over the limit"),
        (bomb(4_000), "cannot be decoded"),  # small enough, but its pixels are not there
        (encoded(make_image(1, 64), "JPEG")[:-40], "JPEG image cannot be decoded"),
        (encoded(make_image(1, 64))[:60], "PNG image cannot be decoded"),
        (encoded(make_image(1, 64), "WEBP")[:30], "WEBP image cannot be decoded"),
        (encoded(make_image(1), "GIF"), "is not a PNG, JPEG or WebP"),
        (b"", "is not a PNG, JPEG or WebP"),
    ],
    ids=["gigapixels", "large", "hollow", "jpeg-cut", "png-cut", "webp-cut", "gif", "empty"],
)
def test_broken_images_are_one_line(data: bytes, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        decode_image(data, "s.tar: sample 'k': chosen")
    assert str(caught.value).startswith("s.tar: sample 'k': chosen: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pixels_become_minus_one_to_one() -> None:
    image = Image.new("RGB", (2, 1), (0, 255, 51))
    assert to_tensor(image).tolist() == [[[-1.0, -1.0]], [[1.0, 1.0]], [[pytest.approx(-0.6)] * 2]]


def members(chosen: Image.Image, rejected: Image.Image) -> dict[str, bytes]:
    metadata = PairMetadata("p", "clean", harmful=Sides(False, None))
    return {"json": metadata.to_json(), "chosen.png": encoded(chosen), "rejected.png": encoded(rejected)}


def test_chosen_and_rejected_are_mirrored_together() -> None:
    decoder = PairDecoder(seed=0, flip=True)
    plain = PairDecoder(seed=0)
    mirrored = 0
    for number in range(40):
        pair = decoder(str(number), members(make_image(1), make_image(2)), 0, "")
        straight = plain(str(number), members(make_image(1), make_image(2)), 0, "")
        flips = [
            torch.equal(a, b.flip(-1)) for a, b in ((pair.chosen, straight.chosen), (pair.rejected, straight.rejected))
        ]
        assert flips[0] == flips[1]
        mirrored += flips[0]
    assert 8 < mirrored < 32


def test_resolution_scales_and_cuts_from_the_middle(tmp_path: Path) -> None:
    """A 24 x 8 image of three colours: the middle third is left, both images alike."""
    wide = Image.new("RGB", (24, 8), "red")
    wide.paste("lime", (8, 0, 16, 8))
    pair = PairDecoder(seed=0, resolution=4)("k", members(wide, make_image(5)), 0, "")
    assert pair.chosen.shape == pair.rejected.shape == (3, 4, 4)
    assert pair.chosen[1, 1:-1, 1:-1].min() > 242
    assert pair.chosen[0, 1:-1, 1:-1].max() < 13


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rejected.png": None}, "lacks its rejected image"),
        ({"json": None}, "lacks its json"),
        ({"chosen.jpg": encoded(make_image(1), "JPEG")}, "has 2 chosen images"),
        ({"chosen.png": b"\x89PNG\r\n\x1a\n"}, "chosen: the PNG image cannot be decoded"),
    ],
)
def test_an_incomplete_sample_is_a_bad_sample(change: dict[str, bytes | None], complaint: str) -> None:
    found = {
        name: data for name, data in {**members(make_image(1), make_image(2)), **change}.items() if data is not None
    }
    with pytest.raises(BadSample, match=f"where: .*{complaint}|where: {complaint}"):
        PairDecoder(seed=0)("k", found, 0, "where")
