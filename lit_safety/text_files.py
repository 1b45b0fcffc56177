"""The one way in for text that people write: configs, tables, prompts, templates. UTF-8, with a mark or without.

Any other encoding is refused by the file's name instead of being guessed: a guess that is wrong changes prompts in
silence, and which one Python would take by itself depends on the machine.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from lit_safety.errors import UserError

_MARKS = {  # UTF-32 begins as UTF-16 does, so it is asked for first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class NotUtf8(UserError, ValueError):
    """A text in another encoding. Also a ValueError, for whoever tries several readers in turn."""


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, without the mark that may stand in front.

    Args:
        data: the whole file.
        where: its name, for messages.

    Raises:
        NotUtf8: it is in another encoding; the message names the file, says where that shows and how to convert it.
    """
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise NotUtf8(f"{where}: is {name}, and only UTF-8 is read; {_advice(name)}")
    if data[:4096].count(0) > len(data[:4096]) // 4:  # plain letters in UTF-16 are every other byte 0
        raise NotUtf8(
            f"{where}: looks like UTF-16 without a mark (every other byte is 0), and only UTF-8 is read; "
            f"{_advice('UTF-16LE')}"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotUtf8(
            f"{where}: is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}); {_advice('WINDOWS-1252')} if that "
            "is what it is"
        ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        NotUtf8: it is in another encoding.
    """
    return decode_text(Path(path).read_bytes(), str(path))


def _advice(encoding: str) -> str:
    return f"save it as UTF-8, as `iconv -f {encoding} -t UTF-8` does"
