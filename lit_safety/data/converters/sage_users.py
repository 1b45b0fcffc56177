"""Sage's users: what each bans, and their embeddings.

Both come from somewhere else: arrays are never unpickled.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_safety.data.atomic import write_atomic
from lit_safety.errors import UserError
from lit_safety.users.profiles import read_profiles

USERS_FILE = "users.safetensors"
MAX_EMBEDDING_BYTES = 1 << 20


def banned_by_user(table: str) -> dict[str, frozenset[str]]:
    """User id (the row's number, seven digits) to the categories the user bans.

    Raises:
        UserError: the table cannot be read, or a list in it is not a list of categories.
    """
    return {user: frozenset(profile.banned) for user, profile in read_profiles(table).items()}


def read_embeddings(folder: Path, users: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """The users' embeddings, a float32 vector (D,) by user id.

    Raises:
        UserError: an embedding is missing, not a finite vector, or of another length than the others.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for user in users:
        path = folder / f"user_embedding_{user}.npy"
        found[user] = _vector(path)
        if len(found[user]) != len(found[users[0]]):
            raise UserError(f"{path}: has {len(found[user])} numbers, the first user's {len(found[users[0]])}")
    return found


def save_embeddings(found: dict[str, NDArray[np.float32]], out: Path) -> Path:
    """Write them to `out/users.safetensors`."""
    from safetensors.numpy import save

    return write_atomic(out / USERS_FILE, save(found))


def _vector(path: Path) -> NDArray[np.float32]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_EMBEDDING_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; every user of the split needs an embedding") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_EMBEDDING_BYTES:
        raise UserError(f"{path}: is over the limit of {MAX_EMBEDDING_BYTES} bytes; no embedding is that large")
    try:
        array = _plain_array(data)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}: is not a plain array ({' '.join(str(error).split())})") from error
    if array.ndim != 1 or not array.size or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(f"{path}: is not a vector of finite numbers")
    return array.astype(np.float32)


def _plain_array(data: bytes) -> NDArray[Any]:
    """The array in the bytes of an `.npy` file. Its size is checked before memory is taken for it.

    Raises:
        ValueError: no such file, one with pickled objects, or one that says another size than it has.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file, max_header_size=10_000)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never read")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"its header says {shape} of {dtype}, which is not what it holds")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
