"""Shards that lie elsewhere: over http(s) or in an object store, by way of fsspec, each fetched once into a cache.

A shard is read by position, so it is fetched whole when the stream first needs it, and kept. Only folders with a
manifest are read this way: it says what there is without a look at every shard, and what a shard must hash to.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
from filelock import FileLock

from lit_safety.data.manifest import file_sha256
from lit_safety.errors import UserError

ATTEMPTS = 3
CHUNK = 1 << 20


def is_remote(name: str) -> bool:
    """Whether a path is a URL of a store that fsspec reads; `pipe:` and other commands are not."""
    return "://" in name


def default_cache() -> Path:
    """Where shards are kept: `$LIT_SAFETY_CACHE`, else `~/.cache/lit_safety`."""
    return Path(os.environ.get("LIT_SAFETY_CACHE") or Path.home() / ".cache" / "lit_safety") / "shards"


def fetch(url: str, folder: Path, sha256: str | None = None, fresh: bool = False) -> Path:
    """A local copy of `url`, fetched unless `folder` holds it already.

    Several processes may ask at once: one fetches, the others wait.

    Args:
        url: what to fetch.
        folder: the cache.
        sha256: what it must hash to; None: not checked.
        fresh: fetch it even if it is there.

    Raises:
        UserError: it cannot be fetched, or is not what it should be.
    """
    name = url.rsplit("/", 1)[-1]
    path = folder / hashlib.blake2b(f"{url} {sha256}".encode(), digest_size=12).hexdigest() / name
    if path.exists() and not fresh:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            if fresh or not path.exists():
                _download(url, path, sha256)
    except OSError as error:
        raise UserError(f"{folder}: cannot keep a copy of {url} ({error.strerror or error})") from error
    return path


def _download(url: str, path: Path, sha256: str | None) -> None:
    arrived = path.with_name(f"{path.name}.arrived")
    try:
        for attempt in range(ATTEMPTS):
            try:
                with fsspec.open(url, "rb") as source, open(arrived, "wb") as out:
                    shutil.copyfileobj(source, out, CHUNK)
                    out.flush()
                    os.fsync(out.fileno())
                break
            except FileNotFoundError as error:
                raise UserError(f"{url}: is not there") from error
            except ImportError as error:
                raise UserError(f"{url}: this kind of store needs another package: {error}") from error
            except ValueError as error:
                raise UserError(f"{url}: cannot be read ({error})") from error
            except Exception as error:  # every store has its own; what is left is the network's
                if isinstance(error, OSError) and error.errno in (
                    errno.ENOSPC,
                    errno.EDQUOT,
                    errno.EROFS,
                    errno.EACCES,
                ):
                    raise  # this machine's disk
                if attempt == ATTEMPTS - 1:
                    raise UserError(f"{url}: cannot be fetched, tried {ATTEMPTS} times ({error})") from error
                time.sleep(0.2 * 4**attempt)
        if sha256 is not None and file_sha256(arrived) != sha256:
            raise UserError(f"{url}: is not what its manifest says (its SHA-256 differs)")
        os.replace(arrived, path)
    finally:
        arrived.unlink(missing_ok=True)
