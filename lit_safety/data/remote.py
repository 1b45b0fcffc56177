"""Shards that lie elsewhere: over http(s) or in an object store, by way of fsspec, each fetched once into a cache.

A shard is read by position, so it is fetched whole when the stream first needs it, and kept. Only folders with a
manifest are read this way: it says what there is without a look at every shard, and what a shard must hash to. Of what
has no hash the store is asked once a process whether the copy is still what lies there.

A store may be busy, slow, or never end: it is asked a few times, and given up after a bounded time.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from filelock import FileLock

from lit_safety.data.atomic import write_atomic
from lit_safety.data.manifest import file_sha256
from lit_safety.errors import UserError
from lit_safety.user_cache import VARIABLE, user_cache

log = logging.getLogger(__name__)

ATTEMPTS = 5
#: Seconds before the second attempt, doubled before each further one.
WAIT = 0.5
#: The most seconds that a server's `Retry-After` is honoured.
MOST_WAIT = 30.0
#: Answers that mean "later"; other errors are told at once.
BUSY = (408, 425, 429)
#: Seconds in which an answer must begin, and in each of which spells `SPELL_BYTES` must arrive.
SPELL = 30.0
SPELL_BYTES = 64 << 10
CHUNK = 1 << 20
#: What is asked for at once of stores that are read in blocks: small, so that slow ones are seen to go on.
BLOCK = 4 << 20
#: The most bytes of a shard that the manifest does not state, and of a manifest: a store could send for ever.
MOST_BYTES, MOST_MANIFEST = 1 << 40, 1 << 30
#: What a store tells of a file by which a change shows: http's headers, object stores' and file systems' fields.
MARKS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "created", "generation", "size")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def is_remote(name: str) -> bool:
    """Whether a path is a URL of a store that fsspec reads; `pipe:` and other commands are not."""
    return "://" in name


def default_cache() -> Path:
    """Where shards are kept: in `user_cache()`."""
    return user_cache() / "shards"


def fetch(
    url: str,
    folder: Path,
    sha256: str | None = None,
    fresh: bool = False,
    size: int | None = None,
    most: int = MOST_BYTES,
) -> Path:
    """A local copy of `url`, fetched unless `folder` holds it already.

    Several processes may ask at once: one fetches, the others wait. Without a hash a copy is kept only while the store
    says that it is the newest.

    Args:
        url: what to fetch.
        folder: the cache.
        sha256: what it must hash to; None: not checked.
        fresh: fetch it even if it is there.
        size: how many bytes it must have; None: not known.
        most: how many it may have where that is not known.

    Raises:
        UserError: it cannot be fetched, or is not what it should be.
    """
    name = url.rsplit("/", 1)[-1]
    path = folder / hashlib.blake2b(f"{url} {sha256}".encode(), digest_size=12).hexdigest() / name
    asked = url, str(path), os.getpid()
    if path.exists() and not fresh:
        if sha256 is None and asked not in _NEWEST:
            _NEWEST[asked] = _newest(url, path)
        if sha256 is not None or _NEWEST[asked]:
            return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            # Whoever held the lock may have fetched it.
            if fresh or not path.exists() or (sha256 is None and not _newest(url, path)):
                _download(url, path, sha256, size, most)
            _NEWEST[asked] = True
    except OSError as error:
        raise UserError(
            f"{folder}: cannot keep a copy of {url} ({error.strerror or error}); make room, or set {VARIABLE} to "
            "another folder"
        ) from error
    return path


# ---- what has no hash


def _marks_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.marks")


#: (URL, copy, process) -> whether a copy without a hash is what lies there: asked once, so that a run keeps to one.
_NEWEST: dict[tuple[str, str, int], bool] = {}


def _newest(url: str, path: Path) -> bool:
    """Whether a copy without a hash is still what lies at `url`."""
    marks = _asked(url)
    if marks is None:
        log.warning("%s: the store does not answer and the manifest states no SHA-256: an earlier copy is used", url)
        return True
    if "size" in marks and marks["size"] != str(path.stat().st_size):
        return False
    if not set(marks) - {"size"}:
        log.warning("%s: neither the manifest (SHA-256) nor the store says whether it changed: the copy is used", url)
        return True
    try:
        return bool(json.loads(_marks_file(path).read_text(encoding="utf-8")) == marks)
    except (OSError, ValueError, RecursionError):  # fetched by an earlier version, or damaged
        return False


def _asked(url: str) -> dict[str, str] | None:
    """By which marks a store tells a file from later ones; None: it does not answer."""
    answer: list[dict[str, Any]] = []

    def ask() -> None:
        with suppress(Exception), _store(url) as (store, name):  # every store has its own errors: all mean no answer
            answer.append(store.info(name))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SPELL)
    return _marks(answer[0]) if answer else None


def _marks(info: dict[str, Any]) -> dict[str, str]:
    stated = {name: info[name] for name in MARKS if info.get(name) is not None}
    return {name: one.isoformat() if isinstance(one, datetime) else str(one) for name, one in stated.items()}


# ---- fetching


@contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """The store behind a URL and the file's name there."""
    options: dict[str, Any] = {}
    if _web(url):
        import aiohttp

        # A whole shard may take longer than aiohttp's 5 minutes. These end what `_Pull.wait` has given up before.
        patience = aiohttp.ClientTimeout(total=None, connect=2 * SPELL, sock_read=2 * SPELL)
        options = {"client_kwargs": {"timeout": patience}, "skip_instance_cache": True}
    yield fsspec.core.url_to_fs(url, **options)


def _web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


class _Slow(Exception):
    """Too few bytes came."""


@dataclass
class _Pull:
    """One attempt, in a thread of its own: a call that never returns must not hold the run up."""

    url: str
    path: Path
    """Where to; removed when the attempt fails."""
    most: int
    bytes: int = 0
    stopped: bool = False
    marks: dict[str, str] | None = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            with _store(self.url) as (store, name):
                options: dict[str, Any] = {"block_size": BLOCK}
                if _web(self.url):
                    # One request, read as a stream in which every byte is seen to arrive. fsspec asks for the size
                    # before, and says "not found" of whatever goes wrong there, unless it is told one.
                    options = {"block_size": 0, "size": 1, "headers": {"Accept-Encoding": "identity"}}
                with store.open(name, "rb", **options) as source, open(self.path, "wb") as out:
                    if (answer := getattr(source, "r", None)) is not None:
                        headers = answer.headers
                        self.marks = _marks({"size": headers.get("Content-Length"), **headers})
                    else:
                        self.marks = _marks(store.info(name))
                    while not self.stopped and (part := source.read(CHUNK)):
                        out.write(part)
                        self.bytes += len(part)
                        if self.bytes > self.most:
                            raise UserError(f"{self.url}: is larger than {self.most} bytes")
                    out.flush()
                    os.fsync(out.fileno())
        except BaseException as error:
            self.error = error
        finally:
            if self.stopped or self.error is not None:
                self.path.unlink(missing_ok=True)

    def give_up(self) -> None:
        self.stopped = True
        self.path.unlink(missing_ok=True)

    def wait(self, thread: threading.Thread) -> None:
        """Until the thread has ended.

        Raises:
            TimeoutError: nothing comes.
            _Slow: too little comes.
        """
        while thread.is_alive():
            before = self.bytes
            end = time.monotonic() + SPELL
            while thread.is_alive() and time.monotonic() < end:
                thread.join(min(1.0, max(0.01, end - time.monotonic())))
            if thread.is_alive() and (came := self.bytes - before) < SPELL_BYTES:
                self.give_up()
                if not came:
                    raise TimeoutError(f"nothing came within {SPELL:g} seconds")
                raise _Slow(f"{came} bytes came within {SPELL:g} seconds")


def _download(url: str, path: Path, sha256: str | None, size: int | None, most: int) -> None:
    """Fetch `url` to `path`, whole or not at all; called under the file's lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.arrived"):  # by a process that was killed
        left.unlink(missing_ok=True)
    arrived = _pulled(url, path, most if size is None else size)
    try:
        if size is not None and (found := arrived.path.stat().st_size) != size:
            raise UserError(f"{url}: has {found} bytes, but its manifest says {size}")
        if sha256 is not None and file_sha256(arrived.path) != sha256:
            raise UserError(f"{url}: is not what its manifest says (its SHA-256 differs)")
        os.replace(arrived.path, path)
        if sha256 is None:
            write_atomic(_marks_file(path), json.dumps(arrived.marks or {}).encode())
    finally:
        arrived.path.unlink(missing_ok=True)


def _pulled(url: str, path: Path, most: int) -> _Pull:
    for attempt in range(ATTEMPTS):
        # A name of its own: a call that was given up may come back and write.
        pull = _Pull(url, path.with_name(f".{path.name}.{uuid.uuid4().hex}.arrived"), most)
        thread = threading.Thread(target=pull.run, daemon=True)
        thread.start()
        try:
            pull.wait(thread)
            if pull.error is None:
                return pull
            error: BaseException = pull.error
        except TimeoutError as stalled:
            error = stalled
        except KeyboardInterrupt:
            pull.give_up()
            raise
        except _Slow as slow:
            raise UserError(f"{url}: comes too slowly: {slow}; try again, or copy the shards to this machine") from slow
        reason = _reason(url, error)
        if attempt == ATTEMPTS - 1:
            raise UserError(f"{url}: cannot be fetched, tried {ATTEMPTS} times ({reason})") from error
        wait = max(_asked_wait(error), WAIT * 2**attempt)
        log.warning("%s: %s; asking again in %g seconds", url, reason, wait)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _reason(url: str, error: BaseException) -> str:
    """Why an attempt failed, where another one may help.

    Raises:
        UserError: none will.
        OSError: it is this machine's disk.
    """
    status = _first(error, lambda one: getattr(one, "status", None))
    if isinstance(status, int):
        if status in (404, 410):
            raise UserError(f"{url}: is not there") from error
        said = f"the server answers {status}{_words(error)}"
        if status not in BUSY and status < 500:
            raise UserError(f"{url}: cannot be fetched: {said}") from error
        return said
    if isinstance(error, UserError):
        raise error
    # fsspec's http says "not found" of a server that it does not reach, too.
    unreached = _web(url) and error.__cause__ is not None
    if isinstance(error, FileNotFoundError) and not unreached:
        raise UserError(f"{url}: is not there") from error
    if isinstance(error, ImportError):
        raise UserError(f"{url}: this kind of store needs another package: {error}") from error
    if isinstance(error, ValueError):
        raise UserError(f"{url}: cannot be read ({error})") from error
    if isinstance(error, OSError) and error.errno in _DISK:
        raise error
    if isinstance(error, PermissionError):
        raise UserError(f"{url}: cannot be fetched: the store does not let you ({error})") from error
    if not isinstance(error, Exception):
        raise error
    deepest = error.__cause__ or error
    return str(deepest).strip() or type(deepest).__name__


def _words(error: BaseException) -> str:
    said = _first(error, lambda one: getattr(one, "message", None))
    return f" ({said})" if isinstance(said, str) and said else ""


def _asked_wait(error: BaseException) -> float:
    """Seconds that a server asks to wait for; 0: it asks for nothing that can be honoured."""
    headers = _first(error, lambda one: getattr(one, "headers", None))
    stated = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    try:
        seconds = float(stated)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(stated) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # not stated, or no date
            return 0.0
    return min(seconds, MOST_WAIT) if seconds > 0 else 0.0


def _first(error: BaseException | None, find: Callable[[BaseException], Any]) -> Any:
    """What `find` sees first in an error and those that led to it; None: nothing."""
    for _ in range(10):
        if error is None:
            return None
        if (found := find(error)) is not None:
            return found
        error = error.__cause__ or error.__context__
    return None
