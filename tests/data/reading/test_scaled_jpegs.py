"""JPEGs that are decoded at a part of their size: only where that covers the target, and with the true crop."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.images import decode_image
from lit_safety.data.reading.decode import PairDecoder


def photo(width: int, height: int, kind: str = "JPEG", orientation: int | None = None) -> bytes:
    """Smooth colours, as most of a photograph is."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    values = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * y)], axis=-1)
    image = Image.fromarray((127.5 + 127.5 * values).astype(np.uint8))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("stored", "cover", "decoded"),
    [
        ((256, 256), (128, 128), (128, 128)),
        ((256, 256), (129, 129), (256, 256)),
        ((256, 512), (64, 64), (64, 128)),
        ((250, 250), (120, 120), (125, 125)),
        ((256, 128), (128, 128), (256, 128)),
        ((100, 100), (200, 200), (100, 100)),
    ],
)
def test_it_is_never_smaller_than_the_target(stored: tuple[int, int], cover: tuple[int, int], decoded: tuple[int, int]):
    """Sizes as width, height; the target as height, width, here square."""
    image = decode_image(photo(*stored), "x", cover=cover)
    assert image.size == decoded
    assert min(image.size) >= min(*cover, *stored)


def test_other_formats_are_decoded_whole():
    assert decode_image(photo(256, 256, "PNG"), "x", cover=(64, 64)).size == (256, 256)


def test_a_turned_image_covers_the_target_as_it_is_shown():
    """Stored 512 x 256 and turned, it is 256 wide and 512 high: a target 128 wide and 256 high takes a half."""
    image = decode_image(photo(512, 256, orientation=6), "x", cover=(256, 128))
    assert image.size == (128, 256)
    assert image.info["stored_size"] == (512, 256)
    whole = decode_image(photo(512, 256, orientation=6), "x")
    difference = np.asarray(image, float) - np.asarray(whole.resize((128, 256), Image.Resampling.LANCZOS), float)
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_pixels_are_near_those_of_a_whole_decode_and_crops_are_equal(size: tuple[int, int]):
    pair: dict[str, object] = {"prompt": "a hill", "prompt_kind": "clean", "categories": [], "order": "quality"}
    pair["harmful"] = {"chosen": False, "rejected": None}
    members = {"json": json.dumps(pair).encode(), "chosen.jpg": photo(400, 300), "rejected.jpg": photo(256, 256)}
    whole, scaled = (PairDecoder(0, 64, scaled=on)("a", members, 0, "x", size) for on in (False, True))
    assert torch.equal(whole.crops, scaled.crops)
    for one, other in ((whole.chosen, scaled.chosen), (whole.rejected, scaled.rejected)):
        assert one is not None
        assert other is not None
        assert one.shape == other.shape == (3, *size)
        assert (one.float() - other.float()).abs().mean() < 2.5
        assert not torch.equal(one, other)


def test_it_is_off_by_default():
    from lit_safety.data.datamodule import PreferenceDataModule

    assert PreferenceDataModule("x").scaled_jpegs is False
    assert PairDecoder(0).scaled is False
