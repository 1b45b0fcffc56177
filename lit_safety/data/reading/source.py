"""Find shards: on this machine, or over http(s) and in object stores (by fsspec), fetched once into a cache.

A remote shard is fetched whole when the stream first needs it, because shards are read by position, and is kept. Only
folders with a manifest are read this way: it lists the shards and their hashes. For a file without a hash, the store is
asked once a process whether the copy is still current.

A store may be busy or slow, or an answer may never end: there are a few attempts, each with a time limit.
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import braceexpand
import fsspec
from filelock import FileLock

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.hashes import VARIABLE, file_sha256, user_cache
from lit_safety.data.format.manifest import FILE_NAME, JOURNAL, Manifest, SampleClass, Shard, load_manifest
from lit_safety.data.format.sample import PairMetadata, parse_metadata
from lit_safety.data.format.tar_index import BadSample, OpenShard, is_mac_file

log = logging.getLogger(__name__)

ATTEMPTS = 5
#: Seconds before the second attempt, doubled before each further one.
WAIT = 0.5
#: The longest `Retry-After` of a server that is obeyed, in seconds.
MOST_WAIT = 30.0
#: Statuses that mean "try later"; other errors are reported at once.
BUSY = (408, 425, 429)
#: An answer must begin within so many seconds, and then bring at least `SPELL_BYTES` in each such time.
SPELL = 30.0
SPELL_BYTES = 64 << 10
CHUNK = 1 << 20
#: The block size for stores that are read in blocks: small, so that progress of slow ones is seen.
BLOCK = 4 << 20
#: The most bytes of a manifest, and of a shard whose size is not stated: a store could send forever.
MOST_BYTES, MOST_MANIFEST = 1 << 40, 1 << 30
#: Fields that change when a file changes: headers of http, fields of object stores and file systems.
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
    """A local copy of `url`, fetched if `folder` does not hold it yet.

    Several processes may ask at once: one fetches, the others wait. Without a hash a copy is used only while the store
    says that it is current.

    Args:
        url: the file.
        folder: the cache.
        sha256: its hash; None: not checked.
        fresh: fetch it even if there is a copy.
        size: how many bytes it must have; None: not known.
        most: how many it may have if ``size`` is not known.

    Raises:
        UserError: it cannot be fetched, or has another hash or size.
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
            # The process that held the lock may have fetched it.
            if fresh or not path.exists() or (sha256 is None and not _newest(url, path)):
                _download(url, path, sha256, size, most)
            _NEWEST[asked] = True
    except OSError as error:
        raise UserError(
            f"{folder}: cannot keep a copy of {url} ({error.strerror or error}); make room, or set {VARIABLE} to "
            "another folder"
        ) from error
    return path


# ---- files without a hash


def _marks_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.marks")


#: (URL, copy, process) -> whether a copy without a hash is current: asked once, so that a run uses one version.
_NEWEST: dict[tuple[str, str, int], bool] = {}


def _newest(url: str, path: Path) -> bool:
    """Whether a copy without a hash is still the file at `url`."""
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
    except (OSError, ValueError, RecursionError):  # an earlier version fetched it, or it is damaged
        return False


def _asked(url: str) -> dict[str, str] | None:
    """The fields by which a store shows that a file has changed; None: it does not answer."""
    answer: list[dict[str, Any]] = []

    def ask() -> None:
        with suppress(Exception), _store(url) as (store, name):  # each store has its own errors, and all mean no answer
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

        # A whole shard may take longer than aiohttp's 5 minutes. `_Pull.wait` ends an attempt earlier than this.
        patience = aiohttp.ClientTimeout(total=None, connect=2 * SPELL, sock_read=2 * SPELL)
        options = {"client_kwargs": {"timeout": patience}, "skip_instance_cache": True}
    yield fsspec.core.url_to_fs(url, **options)


def _web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


class _Slow(Exception):
    """Too few bytes arrived."""


@dataclass
class _Pull:
    """One attempt, in its own thread: a call that never returns must not stop the run."""

    url: str
    path: Path
    """The target file; removed if the attempt fails."""
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
                    # One request, read as a stream, so that progress is seen. fsspec asks for the size first, and
                    # reports every error there as "not found", unless it is given a size.
                    options = {"block_size": 0, "size": 1, "headers": {"Accept-Encoding": "identity"}}
                with store.open(name, "rb", **options) as source, open(self.path, "wb") as out:
                    if (answer := getattr(source, "r", None)) is not None:
                        if answer.status != 200:  # no content, or only a part
                            raise UserError(f"{self.url}: the server answers {answer.status}, not the whole file")
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
        """Wait until the thread has ended.

        Raises:
            TimeoutError: no byte arrives.
            _Slow: too few bytes arrive.
        """
        while thread.is_alive():
            before = self.bytes
            end = time.monotonic() + SPELL
            while thread.is_alive() and time.monotonic() < end:
                thread.join(min(1.0, max(0.01, end - time.monotonic())))
            if thread.is_alive() and (came := self.bytes - before) < SPELL_BYTES:
                self.give_up()
                if not came:
                    raise TimeoutError(f"0 bytes arrived within {SPELL:g} seconds")
                raise _Slow(f"{came} bytes arrived within {SPELL:g} seconds")


def _download(url: str, path: Path, sha256: str | None, size: int | None, most: int) -> None:
    """Fetch `url` to `path`, whole or not at all; called under the file's lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.arrived"):  # from a process that was killed
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
        # Each attempt has its own name: a call that was given up may still return and write.
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
            raise UserError(f"{url}: is too slow: {slow}; try again, or copy the shards to this machine") from slow
        reason = _reason(url, error)
        if attempt == ATTEMPTS - 1:
            raise UserError(f"{url}: cannot be fetched, tried {ATTEMPTS} times ({reason})") from error
        wait = max(_asked_wait(error), WAIT * 2**attempt)
        log.warning("%s: %s; asking again in %g seconds", url, reason, wait)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _reason(url: str, error: BaseException) -> str:
    """Why an attempt failed, if another attempt may help.

    Raises:
        UserError: another attempt will not help.
        OSError: the error is of this machine's disk.
    """
    status = _first(error, lambda one: getattr(one, "status", None))
    if isinstance(status, int):
        if status in (404, 410):
            raise UserError(f"{url}: is not there") from error
        if not status:
            raise UserError(f"{url}: the server redirects without end") from error
        said = f"the server answers {status}{_words(error)}"
        if status not in BUSY and status < 500:
            raise UserError(f"{url}: cannot be fetched: {said}") from error
        return said
    if isinstance(error, UserError):
        raise error
    # fsspec's http also says "not found" if it cannot reach the server.
    unreached = _web(url) and error.__cause__ is not None
    if isinstance(error, FileNotFoundError) and not unreached:
        raise UserError(f"{url}: is not there") from error
    if isinstance(error, ImportError):
        raise UserError(f"{url}: this kind of store needs one more package: {error}") from error
    if isinstance(error, ValueError):
        raise UserError(f"{url}: cannot be read ({error})") from error
    if isinstance(error, OSError) and error.errno in _DISK:
        raise error
    if isinstance(error, PermissionError):
        raise UserError(f"{url}: cannot be fetched: the store denies access ({error})") from error
    if not isinstance(error, Exception):
        raise error
    deepest = error.__cause__ or error
    return " ".join(str(deepest).split()) or type(deepest).__name__


def _words(error: BaseException) -> str:
    said = _first(error, lambda one: getattr(one, "message", None))
    return f" ({said})" if isinstance(said, str) and said else ""


def _asked_wait(error: BaseException) -> float:
    """Seconds that a server asks to wait; 0: it does not ask, or for too long."""
    headers = _first(error, lambda one: getattr(one, "headers", None))
    stated = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    try:
        seconds = float(stated)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(stated) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # not stated, or not a date
            return 0.0
    return min(seconds, MOST_WAIT) if seconds > 0 else 0.0


def _first(error: BaseException | None, find: Callable[[BaseException], Any]) -> Any:
    """The first result of `find` in an error and its causes; None: no result."""
    for _ in range(10):
        if error is None:
            return None
        if (found := find(error)) is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


# Find the shards that a YAML key names, and check what is known before they are read.
#
# A source is a folder (or a URL) with `manifest.json` next to its shards, a folder of tar files, one tar file, a
# pattern (`shard-{000000..000031}.tar`, `*.tar`) or a list of these. Without a manifest the headers and the small JSON
# members are read once, but not the images.


NOTHING = "the list of shards is empty; give a folder of shards or a pattern of tar files"
#: The most shards that a pattern may name.
MAX_NAMES = 1_000_000
#: Names are counted up to this number.
MANY = 10**100
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_LETTERS = re.compile(r"\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\}")
# The class of a sample whose metadata cannot be read. Filters do not match it; it is reported when it is read.
UNREADABLE = SampleClass("unreadable", "unreadable")

_PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|Z))$", re.IGNORECASE)


@dataclass(frozen=True)
class FolderCache:
    """What one folder's manifest states about a cache."""

    given: str
    """The folder or URL."""
    cache: dict[str, Any] | None
    """`cache` of its manifest, not checked yet; None: its samples are not cached."""

    @property
    def prompts(self) -> str:
        """The file or URL of the text encoders' outputs."""
        from lit_safety.data.cache.cache import PROMPTS

        return f"{self.given}/{PROMPTS}"


@dataclass(frozen=True)
class Source:
    """The shards of one YAML key."""

    key: str
    """The YAML key (or argument) they come from, for messages."""
    given: str
    """The value that was given, for messages."""
    manifest: Manifest
    paths: tuple[str, ...]
    """Each shard's file or URL, in the order of `manifest.shardlist`."""
    caches: tuple[FolderCache, ...] = ()
    """What each folder (or pattern) states about a cache."""
    parts: tuple[int, ...] = ()
    """If a list was given: how many shards each entry has."""

    def identity(self) -> list[tuple[int, str]]:
        """Samples and SHA-256 of each shard: they identify the shards, wherever they are stored.

        Shards without a stated hash are read and hashed; remote ones use their URL instead.
        """
        return [
            (listed.nsamples, listed.sha256 or (path if is_remote(path) else file_sha256(path, remember=True)))
            for path, listed in zip(self.paths, self.manifest.shardlist, strict=True)
        ]

    def open_shard(self, number: int) -> OpenShard:
        """Open a shard. A remote shard is fetched first, if it was not fetched yet.

        Raises:
            UserError: it is missing, not a tar file, or differs from the manifest.
        """
        path, listed = self.paths[number], self.manifest.shardlist[number]
        if is_remote(path):
            url, copy = path, fetch(path, default_cache(), listed.sha256, size=listed.bytes)
            try:
                return OpenShard(str(copy), listed.nsamples)
            except UserError as error:  # such as a login page; it must not stay in the cache
                copy.unlink(missing_ok=True)
                raise UserError(f"{url}: {error}") from error
        elif listed.sha256 is not None and not self.manifest.states_labels and len(self.manifest.labels) > 1:
            self._check_content(path, listed.sha256)
        return OpenShard(path, listed.nsamples)

    def _check_content(self, path: str, sha256: str) -> None:
        """Check the hash of a shard whose manifest does not state the label of each sample.

        Such manifests are of earlier versions. The hash is remembered, so a shard is hashed once.
        """
        try:
            found = file_sha256(path, remember=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if found != sha256:
            raise UserError(
                f"{path}: is not what its manifest says (its SHA-256 differs); restore it or write the shards again"
            )

    def check(self, number: int, sample: int, metadata: PairMetadata, where: str) -> None:
        """Compare a sample that was read with the manifest.

        Args:
            number: the shard.
            sample: the number of the sample in it.
            metadata: the sample's.
            where: shard and key, for messages.

        Raises:
            BadSample: its kind, order, categories, user or label differ from the manifest.
        """
        manifest = self.manifest
        if said := manifest.difference(manifest.shardlist[number], sample, SampleClass.of(metadata)):
            raise BadSample(f"{where}: {said}; restore shard and {FILE_NAME} together, or write the shards again")


def open_source(given: str | Sequence[str], key: str) -> Source:
    """Find the shards named by `given`.

    Raises:
        UserError: there are no shards, a shard of the manifest is missing or has another size, or the list is empty.
    """
    if isinstance(given, str):
        if is_remote(given):
            return _over_the_network(given.rstrip("/"), key)
        if os.path.isdir(given) and os.path.exists(os.path.join(given, FILE_NAME)):
            return _with_manifest(Path(given), key)
        paths = tars_named(given, key)
        return Source(key, given, scan(paths), tuple(paths), (FolderCache(given, None),))
    if not given:
        raise UserError(f"{key}: {NOTHING}")
    return _together([open_source(one, key) for one in given], key)


def _over_the_network(folder: str, key: str) -> Source:
    """A remote source. Shards are fetched when they are needed, so a missing one is found only then."""
    if folder.endswith(".tar") or "{" in folder or "*" in folder:
        raise UserError(f"{key}: for shards on a network, give the folder that holds {FILE_NAME}, not {folder!r}")
    try:
        copy = fetch(f"{folder}/{FILE_NAME}", default_cache(), fresh=True, most=MOST_MANIFEST)
    except UserError as error:
        raise UserError(f"{key}: {error}; give a folder of shards with its {FILE_NAME}") from error
    manifest = load_manifest(copy.parent)
    if not manifest.shardlist:
        raise UserError(f"{key}: {folder}/{FILE_NAME} lists no shards; write the shards again or give another folder")
    paths = tuple(f"{folder}/{shard.url}" for shard in manifest.shardlist)
    return Source(key, folder, manifest, paths, (FolderCache(folder, manifest.cache),))


def _together(sources: Sequence[Source], key: str) -> Source:
    """Several sources, one after another, as one."""
    given = ", ".join(source.given for source in sources)
    paths = [path for source in sources for path in source.paths]
    _refuse_twice(paths, given, key)
    classes: dict[SampleClass, int] = {}
    shards: list[Shard] = []
    labels: Counter[str] = Counter()
    for source in sources:
        held = source.manifest
        renumbered = [classes.setdefault(one, len(classes)) for one in held.classes]
        labels.update(held.labels)
        shards += [
            replace(one, classes=None if one.classes is None else tuple(renumbered[n] for n in one.classes))
            for one in held.shardlist
        ]
    provenance = {source.given: source.manifest.provenance for source in sources}
    manifest = Manifest(tuple(shards), tuple(classes), dict(labels), provenance)
    caches = tuple(one for source in sources for one in source.caches)
    return Source(key, given, manifest, tuple(paths), caches, tuple(len(source.paths) for source in sources))


def tars_named(given: str, key: str) -> list[str]:
    """The tar files that a folder or a pattern names.

    Raises:
        UserError: one is missing or named twice, or there is none.
    """
    paths = _expand(given, key)
    _refuse_twice(paths, given, key)
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        _refuse_incomplete(folder, key)
    return paths


def tars_in(folder: str | os.PathLike[str]) -> list[str]:
    """The tar files in a folder, in order, without those that begin with a dot (as the `._` files of macOS)."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(".tar") and not name.startswith(".")]
    return [os.path.join(folder, name) for name in sorted(names)]


def _refuse_incomplete(folder: str, key: str) -> None:
    """Refuse a folder that a process is still writing, or that a killed run left: shards could be missing."""
    if os.path.exists(os.path.join(folder, JOURNAL)) and not os.path.exists(os.path.join(folder, FILE_NAME)):
        raise UserError(
            f"{key}: {folder or '.'} is not complete: a process is writing its shards, or was stopped; wait for it, or "
            "start the command that writes them again"
        )


def _refuse_twice(paths: Sequence[str], given: str, key: str) -> None:
    for path, times in Counter(paths).items():
        if times > 1:
            raise UserError(f"{key}: {given!r} names the shard {path} {times} times")


def _with_manifest(folder: Path, key: str) -> Source:
    manifest = load_manifest(folder)
    if not manifest.shardlist:
        raise UserError(f"{key}: {folder / FILE_NAME} lists no shards; write the shards again or give another folder")
    paths = []
    for shard in manifest.shardlist:
        path = folder / shard.url
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(
                f"{key}: the shard {path} is missing although {folder / FILE_NAME} lists it; restore "
                "it or write the shards again"
            ) from error
        if shard.bytes is not None and size != shard.bytes:
            raise UserError(
                f"{key}: the shard {path} has {size} bytes but {folder / FILE_NAME} says {shard.bytes}; "
                "copy it again or write the shards again"
            )
        paths.append(str(path))
    return Source(key, str(folder), manifest, tuple(paths), (FolderCache(str(folder), manifest.cache),))


def _expand(pattern: str, key: str) -> list[str]:
    if not pattern.strip():
        raise UserError(f"{key}: {NOTHING}")
    if pattern.startswith("pipe:"):
        raise UserError(
            f"{key}: {pattern!r} is refused, because commands are not run; give a folder or a pattern of tar files"
        )
    if os.path.isdir(pattern):
        _refuse_incomplete(pattern, key)
        if packed := [name for name in sorted(os.listdir(pattern)) if _PACKED.search(name) and not is_mac_file(name)]:
            raise UserError(f"{key}: {os.path.join(pattern, packed[0])} is compressed; unpack it to a plain tar file")
        found = tars_in(pattern)
        if not found:
            raise UserError(f"{key}: the folder {pattern} holds neither {FILE_NAME} nor a tar file")
        return found
    told = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
    if (count := _names_at_most(pattern)) > MAX_NAMES:
        raise UserError(f"{key}: the pattern {told!r} names up to {count:.0e} shards, over the limit of {MAX_NAMES}")
    try:
        names = list(braceexpand.braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: the pattern {told!r} has unbalanced braces, or too many") from error
    found = []
    for name in names:
        if glob.has_magic(name) and not os.path.exists(name):
            found += sorted(glob.glob(name))
        elif os.path.exists(name):
            found.append(name)
        elif len(names) > 1:
            raise UserError(f"{key}: the shard {name} is missing; restore it or correct the pattern {pattern!r}")
        else:
            looked = "" if os.path.isabs(pattern) else f" in {os.getcwd()}, where the command runs"
            raise UserError(
                f"{key}: {pattern} does not exist{looked}; give a folder of shards or a pattern of tar files"
            )
    if not found:
        raise UserError(f"{key}: no file matches {pattern!r}; give a folder of shards or a pattern of tar files")
    return found


def _names_at_most(pattern: str) -> int:
    """An upper bound of how many names a pattern with braces has, without making them."""
    found, groups = 1, [0]
    for place, letter in enumerate(pattern):
        if letter == "{":
            groups.append(1)
            if numbers := _RANGE.match(pattern, place):
                if max(map(len, numbers.groups(""))) > 18:
                    return MANY
                first, last, step = (int(number) if number else 1 for number in numbers.groups())
                found *= abs(last - first) // max(step, 1) + 1
            elif _LETTERS.match(pattern, place):
                found *= 52
        elif letter == "," and len(groups) > 1:
            groups[-1] += 1
        elif letter == "}" and len(groups) > 1:
            found *= groups.pop()
        if found > MANY:
            return MANY
    return found


def scan(paths: Sequence[str]) -> Manifest:
    """Make a manifest in memory from the tars' headers and JSON members. A tar is scanned once a process.

    Raises:
        UserError: a file is not a tar, ends too early, or holds no sample.
    """
    classes: dict[SampleClass, int] = {}
    labels: Counter[str] = Counter()
    shards = []
    for path in paths:
        if is_remote(path):
            raise UserError(
                f"{path}: its manifest lacks the `classes` of its samples, so a filter cannot be "
                "applied over the network; copy the shards to this machine"
            )
        stat = os.stat(path)
        found, counted = _scan_one(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
        if not found:
            raise UserError(f"{path}: holds 0 samples; restore it or remove it from the list")
        labels.update(dict(counted))
        numbers = tuple(classes.setdefault(one, len(classes)) for one in found)
        shards.append(Shard(path, len(found), stat.st_size, None, numbers))
    return Manifest(tuple(shards), tuple(classes), dict(labels))


@functools.cache
def _scan_one(path: str, size: int, mtime: int) -> tuple[tuple[SampleClass, ...], tuple[tuple[str, int], ...]]:
    shard = OpenShard(path)
    try:
        if shard.problem is not None:
            raise UserError(f"{path}: {shard.problem}; copy it again or remove it from the list")
        found: list[SampleClass] = []
        labels: Counter[str] = Counter()
        for number in range(len(shard.index.samples)):
            try:
                metadata = parse_metadata(shard.read_member(number, "json"), shard.where(number))
            except UserError:  # on_bad_sample handles it when the sample is read
                found.append(UNREADABLE)
                continue
            found.append(SampleClass.of(metadata))
            labels[metadata.label] += 1
        return tuple(found), tuple(sorted(labels.items()))
    finally:
        shard.close()
