"""Cached arrays of a shard: `.npy` files, which may hold only plain numbers of a known shape.

The header is checked before an array is made: it could state any size, or a type that would be unpickled.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
from numpy.typing import NDArray

from lit_safety.core.errors import UserError

MAX_HEADER = 4096
# Format version -> bytes of the header's length and the reader of a header.
_LENGTHS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def write_npy(array: NDArray[np.generic]) -> bytes:
    """`array` as the bytes of an `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_npy(data: bytes, shape: tuple[int, ...], types: tuple[str, ...], where: str) -> NDArray[np.generic]:
    """The array in the bytes of an `.npy` file.

    Args:
        data: the file.
        shape: what it must hold.
        types: the number types it may hold, such as `float16`.
        where: the shard, the sample and the member, for messages.

    Raises:
        UserError: it is not an `.npy` file, has another type or shape, or is too long or too short.
    """
    try:
        found, fortran, dtype, begins = _header(_first_bytes(data))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: is not a plain .npy file ({str(error).splitlines()[0]})") from error
    if dtype.hasobject or dtype.str not in _names(types):
        raise UserError(f"{where}: holds {dtype}, not {' or '.join(types)}")
    if tuple(found) != shape or (fortran and len(shape) > 1):
        raise UserError(f"{where}: has the shape {tuple(found)}, not {shape}")
    rest = memoryview(data)[begins:]
    if len(rest) != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{where}: has {len(rest)} bytes of numbers, which does not fit its shape")
    return np.frombuffer(rest, dtype=dtype).reshape(shape)


def _first_bytes(data: bytes) -> bytes:
    """The bytes up to the numbers, as far as they are there; a header that is too long is cut, and refused later."""
    wide = _LENGTHS.get(data[:8], 0)
    return data[: 8 + wide + min(int.from_bytes(data[8 : 8 + wide], "little"), 2 * MAX_HEADER)]


@functools.lru_cache(256)  # the members of a set have a few different headers, and Python's own parser reads them
def _header(first: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether it is in Fortran's order, number type, and where the numbers begin."""
    file = io.BytesIO(first)
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"version {version} is not supported")
    found, fortran, dtype = _READERS[version](file, max_header_size=MAX_HEADER)
    return found, fortran, dtype, file.tell()


@functools.cache
def _names(types: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(np.dtype(name).newbyteorder("<").str for name in types)
