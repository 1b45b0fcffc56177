"""What cameras, scanners and image editors write is shown as a browser shows it, by everyone who looks at an image."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lit_safety.core.errors import UserError
from lit_safety.core.images import decode_image, image_files, open_image, rgb, shown_size
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.format.sample import PairMetadata
from lit_safety.data.format.tar_index import OpenShard
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.buckets import chosen_sizes
from lit_safety.data.reading.decode import PairDecoder
from lit_safety.data.reading.source import open_source
from tests.helpers.pair_shards import metadata

WIDE, HIGH = 48, 32
BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How the pixels of an upright image are stored under each orientation."""


def scene() -> Image.Image:
    """Four corners of four colours, 48 wide and 32 high: no turn or mirroring leaves it as it is."""
    image = Image.new("RGB", (WIDE, HIGH), (220, 30, 30))
    image.paste((30, 220, 30), (WIDE // 2, 0, WIDE, HIGH // 2))
    image.paste((30, 30, 220), (0, HIGH // 2, WIDE // 2, HIGH))
    image.paste((240, 240, 240), (WIDE // 2, HIGH // 2, WIDE, HIGH))
    return image


def as_stored(orientation: int, kind: str = "PNG") -> bytes:
    """The scene as a camera held in some way stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = scene().transpose(BACK[orientation]) if orientation in BACK else scene()
    how = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **how)
    return buffer.getvalue()


def exif_behind_pixels(orientation: int) -> bytes:
    """A PNG whose EXIF data comes after its pixels, which PNG allows."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    buffer = io.BytesIO()
    scene().transpose(BACK[orientation]).save(buffer, "PNG")
    return buffer.getvalue()[:-12] + chunk + buffer.getvalue()[-12:]


def array(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(int)


def png(image: Image.Image, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **how)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_as_its_exif_says(orientation: int, kind: str) -> None:
    """0 and 9 are none of the eight: the pixels are upright then."""
    data = as_stored(orientation, kind)
    image = decode_image(data, "here")
    assert np.abs(array(image) - array(scene())).max() <= (8 if kind == "JPEG" else 0)
    assert shown_size(io.BytesIO(data)) == image.size == (WIDE, HIGH)
    assert np.array_equal(array(rgb(image)), array(image)), "what is upright is not turned again"


def test_exif_behind_the_pixels_of_a_png_counts_too() -> None:
    data = exif_behind_pixels(6)
    assert np.array_equal(array(decode_image(data, "")), array(scene()))
    assert shown_size(io.BytesIO(data)) == (WIDE, HIGH)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_an_image_that_somebody_opened_is_turned_too(orientation: int, kind: str) -> None:
    opened = Image.open(io.BytesIO(as_stored(orientation, kind)))
    assert np.abs(array(rgb(opened)) - array(scene())).max() <= 8


def test_damaged_exif_is_not_listened_to() -> None:
    data = png(scene(), exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff")
    assert np.array_equal(array(decode_image(data, "")), array(scene()))
    assert shown_size(io.BytesIO(data)) == (WIDE, HIGH)


def ramp() -> NDArray[np.uint16]:
    return np.tile(np.linspace(0, 65535, WIDE).round().astype(np.uint16), (HIGH, 1))


def test_16_bit_grey_is_scaled() -> None:
    """0 is black, 65535 is white, and 257 steps of 16 bits are one of 8."""
    wanted = np.round(ramp() / 257).astype(int)
    for image in (Image.fromarray(ramp()), Image.fromarray(ramp().astype(">u2")), Image.fromarray(ramp().astype("i4"))):
        assert np.array_equal(array(rgb(image)), np.dstack([wanted] * 3)), image.mode
    assert np.array_equal(array(decode_image(png(Image.fromarray(ramp())), "")), np.dstack([wanted] * 3))


def test_16_bit_colours_are_scaled() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = struct.pack(">B6H", 0, 65535, 0, 0x8080, 0x1234, 0x1234, 0x1234)
    header, see_through = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), struct.pack(">3H", 0x1234, 0x1234, 0x1234)
    start, end = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header),
        chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""),
    )
    assert array(decode_image(start + end, "")).tolist() == [[[255, 0, 128], [18, 18, 18]]]
    assert array(decode_image(start + chunk(b"tRNS", see_through) + end, ""))[0, 1].tolist() == [255, 255, 255]


def test_32_bit_numbers_are_scaled_or_refused_but_never_cut() -> None:
    eight = np.arange(256).reshape(16, 16)
    for mode in ("I", "F"):
        image = Image.fromarray(eight.astype(np.uint8)).convert(mode)
        assert np.array_equal(array(rgb(image))[..., 0], eight), mode
    for numbers in (eight.astype("f4") / 255, np.full((2, 2), np.nan, "f4"), np.full((2, 2), 300, "f4")):
        with pytest.raises(UserError, match=r"slide\.tif"):
            rgb(Image.fromarray(numbers), "slide.tif")
    for whole in (eight - 1, eight * 1000):
        with pytest.raises(UserError, match=r"slide\.tif"):
            rgb(Image.fromarray(whole.astype("i4")), "slide.tif")


def hidden() -> Image.Image:
    """Opaque red on the left; on the right fully transparent red."""
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (16, 0, 32, 32))
    return image


def shown(mode: str = "RGBA") -> Image.Image:
    """What everyone sees of it."""
    image = Image.new("RGB", (32, 32), (255, 0, 0) if mode == "RGBA" else (76, 76, 76))
    image.paste("white", (16, 0, 32, 32))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white_for_files_and_pil_images_alike(mode: str, tmp_path: Path) -> None:
    image = hidden().convert(mode)
    assert np.array_equal(array(rgb(image)), array(shown(mode)))
    assert np.array_equal(array(decode_image(png(image), "")), array(shown(mode)))
    with ShardWriter(tmp_path) as writer:
        writer.write("0", metadata(0), image, png(Image.new("RGB", (32, 32))))
    pair = PairDecoder(seed=0)("0", OpenShard(str(tmp_path / "shard-000000.tar")).read(0)[1], 0, "")
    assert torch.equal(pair.chosen, torch.from_numpy(array(shown(mode)).astype(np.uint8)).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "RGBa", "PA", "HSV"])
def test_other_modes_are_seen_as_their_colours(mode: str) -> None:
    black = Image.new("RGB", (4, 4)).convert("RGBA").convert("RGBa") if mode == "RGBa" else None
    image = black or (Image.new("L", (4, 4)).convert("PA") if mode == "PA" else Image.new("RGB", (4, 4)).convert(mode))
    assert array(rgb(image)).max() == 0


def test_the_first_frame_of_an_animation_is_read() -> None:
    for kind in ("WEBP", "PNG"):
        buffer = io.BytesIO()
        scene().save(buffer, kind, save_all=True, append_images=[Image.new("RGB", (WIDE, HIGH))], lossless=True)
        assert np.array_equal(array(decode_image(buffer.getvalue(), "")), array(scene())), kind


def test_buckets_sizes_and_crops_are_those_of_the_upright_image(tmp_path: Path) -> None:
    """Wide images that cameras stored upright as tall pixels, one of them under the name of another format."""
    with ShardWriter(tmp_path) as writer:
        for number, data in enumerate(
            [as_stored(6, "JPEG"), as_stored(8), exif_behind_pixels(5), as_stored(7, "WEBP")]
        ):
            writer.write(str(number), metadata(number), data, png(scene()))
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"3.chosen.webp", b"3.chosen.jpg\0"))
    (tmp_path / "manifest.json").unlink()  # the bytes are others now, the header's checksum too
    source = open_source(_with_checksums(shard), "train")
    assert chosen_sizes(source, "aspect_buckets")[0].tolist() == [[HIGH, WIDE]] * 4
    data = PreferenceDataModule(train=str(shard), resolution=32, aspect_buckets=True, batch_size=4, num_workers=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.chosen.shape == (4, 3, 24, 40), "wider than high, as they are seen"
    assert batch.crops[:, 0, :2].tolist() == [[HIGH, WIDE]] * 4, "SDXL hears the sizes that are seen"
    wanted = ImageOps.fit(scene(), (40, 24), Image.Resampling.LANCZOS)
    for own in batch.chosen:
        assert (own.permute(1, 2, 0).numpy().astype(float) - array(wanted)).max() < 9


def _with_checksums(path: Path) -> str:
    """The tar with the checksums of its headers made again."""
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    return str(path)


def test_kept_bytes_keep_their_exif(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("0", metadata(0), as_stored(6, "JPEG"), png(scene()))
    members = OpenShard(str(tmp_path / "shard-000000.tar")).read(0)[1]
    assert members["chosen.jpg"] == as_stored(6, "JPEG")
    pair = PairDecoder(seed=0)("0", members, 0, "")
    assert pair.chosen.shape == (3, HIGH, WIDE)
    assert isinstance(pair.metadata, PairMetadata)


def test_what_a_folder_of_images_holds(tmp_path: Path) -> None:
    (tmp_path / "more" / "__MACOSX").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "more/c.webp", "._b.PNG", ".hidden.png", "more/__MACOSX/d.png", "notes.txt"):
        (tmp_path / name).write_bytes(png(scene()))
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]
    (tmp_path / "more" / "e.TIFF").touch()
    with pytest.raises(UserError, match=r"e\.TIFF"):
        image_files(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png(scene())[:90])
    for name in ("cut.png", "none.png", "."):
        with pytest.raises(UserError, match=name):
            open_image(tmp_path / name)
