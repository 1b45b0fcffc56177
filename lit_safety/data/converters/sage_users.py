"""Sage's users: what each bans, and their embeddings.

Both come from somewhere else: lists are parsed as literals, never evaluated, and arrays are never unpickled.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_safety.data.atomic import write_atomic
from lit_safety.data.categories import canonical_category
from lit_safety.data.converters.table import read_csv
from lit_safety.errors import UserError

USERS_FILE = "users.safetensors"


def banned_by_user(table: str) -> dict[str, frozenset[str]]:
    """User id (the row's number, seven digits) to the categories the user bans.

    Raises:
        UserError: the table cannot be read, or a list in it is not a list of categories.
    """
    rows = read_csv(table, ("Banned_Categories", "Allowed_Categories"))
    return {
        f"{number:07d}": _categories(row["Banned_Categories"], f"{table}: row {number + 1}")
        for number, row in enumerate(rows, start=1)
    }


def _categories(text: str, where: str) -> frozenset[str]:
    try:
        found = ast.literal_eval(text) if len(text) < 1000 else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: {text[:60]!r} is not a list of categories") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{where}: {text[:60]!r} is not a list of categories")
    try:
        return frozenset(canonical_category(name) for name in found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def save_embeddings(folder: Path, users: Sequence[str], out: Path) -> Path:
    """Write the users' embeddings to `out/users.safetensors`, a float32 vector (D,) by user id.

    Raises:
        UserError: an embedding is missing, not a finite vector, or of another length than the others.
    """
    from safetensors.numpy import save

    found: dict[str, NDArray[np.float32]] = {}
    for user in users:
        path = folder / f"user_embedding_{user}.npy"
        found[user] = _vector(path)
        if len(found[user]) != len(found[users[0]]):
            raise UserError(f"{path}: has {len(found[user])} numbers, the first user's {len(found[users[0]])}")
    return write_atomic(out / USERS_FILE, save(found))


def _vector(path: Path) -> NDArray[np.float32]:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; every user of the split needs an embedding") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is not a plain array ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(f"{path}: is not a vector of finite numbers")
    return array.astype(np.float32)
