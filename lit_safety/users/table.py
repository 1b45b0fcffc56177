"""Users' embeddings: `users.safetensors`, one vector (D,) by user id, next to a manifest or an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.weights import not_readable

USERS_FILE = "users.safetensors"


class Users:
    """The embeddings of one file, read when they are needed.

    Args:
        path: the file, or the folder that holds `users.safetensors`.

    Raises:
        UserError: the file is missing or damaged, empty, or its vectors differ in length.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.file = path / USERS_FILE if path.is_dir() else path
        if not self.file.is_file():
            raise UserError(f"no users at {path}: expected a folder with {USERS_FILE}, or such a file")
        try:
            with safe_open(self.file, framework="pt") as handle:
                shapes = {user: tuple(handle.get_slice(user).get_shape()) for user in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(not_readable(self.file, error)) from error
        if not shapes:
            raise UserError(f"{self.file} holds 0 users")
        first = next(iter(shapes.items()))
        for user, shape in shapes.items():
            if len(shape) != 1 or shape != first[1]:
                raise UserError(
                    f"{self.file}: the embedding of user {user!r} has shape {shape}, that of user {first[0]!r} "
                    f"{first[1]}; every user needs one vector of the same length"
                )
        #: User ids, in the file's order.
        self.ids = tuple(shapes)
        #: D.
        self.dimension = first[1][0]

    def __contains__(self, user: str) -> bool:
        return user in set(self.ids)

    def embeddings(self, ids: Sequence[str]) -> Tensor:
        """The embeddings of `ids`, float32 (B, D).

        Raises:
            UserError: a user is not in the file, or the embedding holds numbers that are not finite; names the user.
        """
        known = set(self.ids)
        for user in ids:
            if user not in known:
                raise UserError(f"user {user!r} is not in {self.file} ({len(known)} users, such as {self.ids[0]!r})")
        with safe_open(self.file, framework="pt") as handle:
            found = {user: handle.get_tensor(user).float() for user in dict.fromkeys(ids)}
        for user, vector in found.items():
            if not torch.isfinite(vector).all():
                raise UserError(f"{self.file}: the embedding of user {user!r} holds numbers that are not finite")
        return torch.stack([found[user] for user in ids]) if ids else torch.empty(0, self.dimension)


class UserTable:
    """The users of several files in memory, for batch after batch.

    Args:
        files: if a user is in two of them, the first counts.

    Raises:
        UserError: embeddings have different lengths, or hold numbers that are not finite; names the file.
    """

    def __init__(self, files: Sequence[Users]) -> None:
        for file in files:
            if file.dimension != files[0].dimension:
                raise UserError(
                    f"{file.file} has embeddings of {file.dimension} numbers, {files[0].file} of "
                    f"{files[0].dimension}: embed all users by the same text model"
                )
        self.files = tuple(str(one.file) for one in files)
        self.dimension = files[0].dimension
        found = {user: file for file in reversed(files) for user in file.ids}
        rows = [file.embeddings(own) for file in files if (own := [u for u in file.ids if found[u] is file])]
        self.ids = tuple(user for file in files for user in file.ids if found[user] is file)
        self._rows = torch.cat(rows)
        self._places = {user: row for row, user in enumerate(self.ids)}

    def embeddings(self, ids: Sequence[str]) -> Tensor:
        """The embeddings of `ids`, float32 (B, D).

        Raises:
            UserError: a user is not in any file; names the user.
        """
        for user in ids:
            if user not in self._places:
                raise UserError(f"user {user!r} is not in {' or '.join(self.files)}: embed this user too")
        return self._rows[[self._places[user] for user in ids]]


def write_users(folder: Path, embeddings: Mapping[str, Tensor]) -> Path:
    """Write `folder/users.safetensors`; embeddings are vectors (D,) by user id.

    Raises:
        UserError: an embedding is not a finite vector, or has another length than the others; names the user.
    """
    vectors = {user: vector.detach().cpu().float().contiguous() for user, vector in embeddings.items()}
    first = next(iter(vectors.values()), torch.empty(0))
    for user, vector in vectors.items():
        if vector.ndim != 1 or not torch.isfinite(vector).all():
            raise UserError(f"the embedding of user {user!r} is not a vector of finite numbers")
        if len(vector) != len(first):
            raise UserError(f"the embedding of user {user!r} has {len(vector)} numbers, the first user's {len(first)}")
    return write_atomic(folder / USERS_FILE, save(vectors))


# Users' files are copied when shards are written again. Importing this needs no torch.


#: The embeddings and the profiles.
BESIDE = ("users.safetensors", "users.csv")


def copy_users(source: str, target: Path) -> None:
    """Copy the users' files next to the shards of `source`, a folder, into `target`."""
    for name in BESIDE:
        beside = Path(source) / name
        if beside.is_file():
            write_atomic(target / name, beside.read_bytes())
