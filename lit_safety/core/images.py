"""All images are read here: three formats, bounded size, and the same RGB image for every reader.

An image is data from somewhere else. PIL is told which formats to try, the number of pixels is checked before
any pixel is decompressed, and every error of PIL becomes one line.

What a file shows is what a browser would show: turned as its EXIF says, with transparency laid over white, the first
frame of an animation, and 16-bit numbers scaled to 8 bits.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import files_below

FORMATS: dict[str, str] = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
OTHER_FORMATS = frozenset(
    (
        *("apng", "avif", "bmp", "cr2", "dng", "exr", "gif", "heic", "heif", "jfif", "jp2", "jxl", "nef", "pbm"),
        *("pgm", "ppm", "psd", "svg", "tga", "tif", "tiff"),
    )
)
"""Endings of image formats that are not read: such a file is an error, so that it is not left out unnoticed."""
MAX_PIXELS = 4096 * 4096
MAX_FILE_BYTES = 128 << 20
MAX_CHUNKS = 1 << 17
"""How many parts of a PNG are read at most; programs write 8 KiB or more in each."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What PIL raises for a file that is missing, cut short, damaged or hostile. EXIF is parsed with `struct`.
_RAISED = (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError, struct.error, KeyError, TypeError)


def extension_of(data: bytes, where: str) -> str:
    """`png`, `jpg` or `webp`, by the file's first bytes.

    Raises:
        UserError: it is none of them.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise UserError(f"{where}: is not a PNG, JPEG or WebP image")


def decode_image(
    data: bytes, where: str, max_pixels: int = MAX_PIXELS, cover: tuple[int, int] | None = None
) -> Image.Image:
    """The RGB image in `data`, as `rgb` shows it.

    Args:
        data: the bytes of a PNG, JPEG or WebP file.
        where: the shard, the sample and the side, for messages.
        max_pixels: refuse larger images before decompressing them.
        cover: height and width that the caller scales the image to; a JPEG may then be decoded at a half, a quarter or
            an eighth of its size, where that still covers them: less work, and other pixels than a whole decode and a
            resize give. Its `info` then has `stored_size`, its true height and width. None: at its size.

    Raises:
        UserError: not such an image, cut short, or too large.
    """
    kind = FORMATS[extension_of(data, where)]
    try:
        with warnings.catch_warnings():
            # Our own bound below is stricter than PIL's warning; damaged EXIF is ignored.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=[kind])
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{where}: {width} x {height} pixels is over the limit of {max_pixels}")
            turned = False
            if kind == "JPEG" and cover is not None:
                turned = _orientation(image) >= 5
                image.draft(None, cover if turned else cover[::-1])
            smaller = image.size != (width, height)
            image.load()
            if kind == "PNG":
                _check_pixels(data)
            shown = rgb(image, where)
            if smaller:
                shown.info["stored_size"] = (width, height) if turned else (height, width)
            return shown
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: the image is over the limit of {max_pixels} pixels") from error
    except _RAISED as error:
        raise UserError(f"{where}: the {kind} image cannot be decoded ({_line(error)})") from error


def _check_pixels(data: bytes) -> None:
    """Compare the pixels of a PNG with their checksums. PIL does not, and damaged data may still decompress.

    Raises:
        ValueError: they differ, or the file ends within them.
    """
    place, seen = 8, False
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(data):
            return
        length, name = struct.unpack_from(">I4s", data, place)
        # the parts with pixels follow each other; later frames of an animation are not shown
        if name != b"IDAT" and seen:
            return
        if name == b"IDAT":
            end = place + 8 + length
            if data[end : end + 4] != zlib.crc32(memoryview(data)[place + 4 : end]).to_bytes(4, "big"):
                raise ValueError("its pixels do not match their checksum")
            seen = True
        place += length + 12


def open_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image in a file, as `rgb` shows it.

    Raises:
        UserError: it cannot be read, or is not a PNG, JPEG or WebP image, is cut short or too large.
    """
    return decode_image(read_bytes(path), str(path), max_pixels)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        UserError: it cannot be read, is not an ordinary file (reading a pipe might never end), or is too large.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: is not a file")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{path}: is over the limit of {MAX_FILE_BYTES} bytes")
    return data


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder and its subfolders, also those behind links, in order.

    Names that begin with a dot, such as the `._` files of macOS, are ignored, and so are files that are not images.

    Raises:
        UserError: a file is an image of a format that is not read, or a folder cannot be read.
    """
    top, found = Path(folder), []
    try:
        files = sorted(files_below(top))
    except OSError as error:
        raise UserError(f"{error.filename or top}: cannot be read ({error.strerror})") from error
    for path in files:
        ending = path.suffix.lower().lstrip(".")
        if "__MACOSX" in path.relative_to(top).parts:
            continue
        if ending in OTHER_FORMATS:
            raise UserError(f"{path}: {ending} images are not read; convert it to PNG, JPEG or WebP, or remove it")
        if ending in FORMATS:
            found.append(path)
    return found


def rgb(image: Image.Image, where: str = "the image") -> Image.Image:
    """The 8-bit RGB image that an image shows; the same for files and for PIL images from other code.

    It is turned as its EXIF says. Transparent parts become white. 16-bit grey (`I;16`) is divided by 257. The 32-bit
    modes of PIL have no fixed range: `I` is read as 8 bits if its values are at most 255, and as 16 bits up to 65535;
    `F` must lie in 0 to 255.

    Raises:
        UserError: PIL cannot convert it, or the numbers of a 32-bit image are out of range.
    """
    try:
        image.load()  # before its EXIF is read: PIL turns TIFF by itself, and then removes the EXIF key
        turn = _TURNS.get(_orientation(image))
        if image.mode.startswith("I;16"):
            shown = _from_16_bits(np.asarray(image), image.info.get("transparency"))
        elif image.mode in ("I", "F"):
            shown = _from_32_bits(np.asarray(image), where)
        elif image.has_transparency_data:
            shown = _over_white(image)
        else:
            shown = image.convert("RGB")
    except _RAISED as error:
        raise UserError(f"{where}: the image, of mode {image.mode}, cannot be read ({_line(error)})") from error
    if turn is not None:
        shown = shown.transpose(turn)
    # A later reader must not turn it twice, nor treat a colour as transparent.
    shown.info = {}
    return shown


def same_image(one: Image.Image, other: Image.Image) -> bool:
    """Whether two RGB images hold the same pixels."""
    return one.size == other.size and one.tobytes() == other.tobytes()


def shown_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height of the image that `rgb` makes of a file, from its first bytes where they are enough.

    Args:
        file: at its beginning; PIL reads what it needs of it.

    Raises:
        UserError: the file cannot be read.
    """
    kind = FORMATS[extension_of(file.read(16), "the image")]  # not by its name: browsers save WebP as .jpg
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=[kind]) as image:
                width, height = image.size
                # PIL would decode a PNG to look for EXIF behind its pixels.
                if kind != "PNG" or (width * height <= MAX_PIXELS and _says_more_after_pixels(file)):
                    orientation = _orientation(image)
                else:
                    orientation = _orientation(image, Image.Image.getexif)
    except (*_RAISED, Image.DecompressionBombError) as error:
        raise UserError(f"the {kind} image cannot be read ({_line(error)})") from error
    return (height, width) if orientation >= 5 else (width, height)


def _orientation(image: Image.Image, getexif: Callable[[Any], Image.Exif] | None = None) -> int:
    """1 to 8; 1 if none is stated or it cannot be read."""
    try:
        exif = image.getexif() if getexif is None else getexif(image)
        stated = exif.get(_ORIENTATION, 1)
    except _RAISED:
        return 1
    return stated if isinstance(stated, int) and stated in _TURNS else 1


def _says_more_after_pixels(file: BinaryIO) -> bool:
    """Whether texts or EXIF of a PNG come after its pixels; the file's position is restored."""
    place, pixels, more = file.tell(), False, False
    file.seek(8)
    for _ in range(MAX_CHUNKS):
        header = file.read(8)
        if more or len(header) < 8:
            break
        length, name = struct.unpack(">I4s", header)
        pixels = pixels or name == b"IDAT"
        more = pixels and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)
    return more


def _over_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of a 16-bit PNG: PIL keeps the upper 8 bits
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _from_16_bits(values: NDArray[np.uint16], transparent: object = None) -> Image.Image:
    small = np.round(values.astype(np.float32) / 257.0).astype(np.uint8)
    if isinstance(transparent, int):
        small[values == transparent] = 255
    return Image.fromarray(small).convert("RGB")


def _from_32_bits(values: NDArray[np.generic], where: str) -> Image.Image:
    numbers = values.astype(np.float64)
    least, most = float(numbers.min(initial=0)), float(numbers.max(initial=0))
    if values.dtype.kind != "f" and 255 < most <= 65535 and least >= 0:
        return _from_16_bits(values.astype(np.uint16))
    # Written so that nan is refused too.
    if not (0 <= least <= most <= 255) or (values.dtype.kind == "f" and 0 < most <= 1):
        raise UserError(
            f"{where}: is an image of 32-bit numbers from {least:g} to {most:g}; scale them to 0..255 and convert it "
            "to 8 bits"
        )
    return Image.fromarray(np.round(numbers).astype(np.uint8)).convert("RGB")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
