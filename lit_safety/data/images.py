"""Decode the images of a shard: three formats, bounded size, no surprises.

A shard is data from somewhere else. PIL is told which formats to try, the pixel count is checked before a
single pixel is decompressed, and whatever PIL raises becomes one line.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image

from lit_safety.errors import UserError

FORMATS: dict[str, str] = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
MAX_PIXELS = 4096 * 4096


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


def decode_image(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image in `data`; transparency is laid over white.

    Args:
        data: the bytes of a PNG, JPEG or WebP file.
        where: the shard, the sample and the side, for messages.
        max_pixels: refuse larger images before decompressing them.

    Raises:
        UserError: not such an image, cut short, or too large.
    """
    kind = FORMATS[extension_of(data, where)]
    try:
        with warnings.catch_warnings():
            # Our own bound below is stricter than PIL's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=[kind])
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{where}: {width} x {height} pixels is over the limit of {max_pixels}")
            image.load()
            return _rgb(image)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: the image is over the limit of {max_pixels} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
        raise UserError(f"{where}: the {kind} image cannot be decoded ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
