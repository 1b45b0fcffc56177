"""Users' files go along when shards are written anew. Importing this needs no torch."""

from __future__ import annotations

from pathlib import Path

from lit_safety.data.atomic import write_atomic

#: Embeddings, and who the users are.
BESIDE = ("users.safetensors", "users.csv")


def copy_users(source: str, target: Path) -> None:
    """Copy the users' files that stand beside the shards of `source`, a folder, into `target`."""
    for name in BESIDE:
        beside = Path(source) / name
        if beside.is_file():
            write_atomic(target / name, beside.read_bytes())
