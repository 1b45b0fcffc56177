"""Where each sample lies in a tar file, and its bytes.

Shards are read by position: one pass over the tar's headers (the images are skipped, not read) finds every
member, and then a sample costs one read of exactly its bytes. So a worker reads only its own samples, memory
is one batch, and what a resumed run skips is neither read nor decoded. Keys and suffixes are webdataset's: the
key is the part before the first dot of the file name.

The pass over the headers is done once, when a shard is written: what it finds is kept next to the shard
(`shard-000000.tar.index.json`), so that no reader does it again. It is a shortcut and no authority. The header in front
of each member that is read must say the same; where it does not, the shard's own headers are gone through.

Every member is read, is ignored by one of these rules, or makes an unusable sample whose error names it:

- Folders and the files that macOS adds (`._*`, `.DS_Store`, `__MACOSX/`) are ignored.
- Further members of a sample (`K.txt`) are not read, nor are files that are not images, JSON or arrays.
- A hard link is read as the member that it leads to. Any other link, and a device, is an error.
- A key with dots of its own (`a.b.chosen.png`), an image in a format that is not read, and an image, a JSON or an array
  that belongs to no sample, are errors.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.hashes import check_regular
from lit_safety.core.images import FORMATS, OTHER_FORMATS

Read = TypeVar("Read")

MAX_MEMBER_BYTES = 128 << 20
MAX_PADDING = 1 << 20
"""Zeros after the last member. Programs fill up to 10 KiB."""
# What tarfile raises for damaged or hostile headers.
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError, MemoryError)
# Images, or the latents that a cache has instead of them.
_NAMES = (
    r"json|(?:chosen|rejected)\.(?:png|jpg|jpeg|webp|latent\.npy|latent\.flip\.npy)|crops\.npy"
    r"|reference(?:\.prediction)?(?:\.flip)?\.npy"
)
# The same of a group: `K.0.png`, `K.1.png`, ...
_WANTED = re.compile(rf"{_NAMES}|\d{{1,4}}\.(?:png|jpg|jpeg|webp|latent\.npy|latent\.flip\.npy)|mask\.png")
_DOTTED = re.compile(rf"(.+?)\.(?:{_NAMES})")
_UNREAD_IMAGE = re.compile(rf"(?:chosen|rejected)\.(?:{'|'.join(sorted(OTHER_FORMATS))})")
# Endings of a sample's members (an image may lack one, as `K.chosen`): such a member without a sample is an error.
_MISSED = frozenset({*FORMATS, *OTHER_FORMATS, "json", "npy", "chosen", "rejected"})


class BadSample(UserError):
    """One sample cannot be used; `on_bad_sample` decides what happens then."""


@dataclass(frozen=True)
class StoredSample:
    """One sample of a shard and the positions of its members."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Suffix (`json`, `chosen.png`) -> (offset, size) in bytes."""
    problem: str | None = None
    """Why it cannot be used; None: it can."""


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar file, in their order in the file."""

    samples: Sequence[StoredSample]
    problem: str | None = None
    """Set if the tar ends too early or a header is damaged: only the samples before that point are listed."""


def index_tar(path: str | os.PathLike[str]) -> TarIndex:
    """List the samples of a tar file without reading them.

    Raises:
        UserError: the file is missing, or not a plain (uncompressed) tar.
    """
    try:
        check_regular(path)
        with tarfile.open(path, "r:") as tar:
            problem: list[str] = []
            samples = _group(_members(tar, problem))
            ending = None if problem else _ending(path, tar.offset)
            return TarIndex(samples, problem[0] if problem else ending)
    except _DAMAGED as error:
        hint = "; unpack it: shards are plain tar files" if _is_compressed(path) else ""
        raise UserError(f"{path}: is not a readable tar file ({error}){hint}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True)
class _Member:
    """A member that is not ignored."""

    name: str
    key: str
    suffix: str
    offset: int
    size: int
    problem: str | None = None


def is_mac_file(name: str) -> bool:
    """Whether a path is one of those that macOS adds to archives.

    >>> [is_mac_file(name) for name in ("a/._0.png", "a/.DS_Store", "__MACOSX/a/0.png", "a/0.png")]
    [True, True, True, False]
    """
    parts = name.replace("\\", "/").split("/")
    return parts[-1].startswith("._") or parts[-1] == ".DS_Store" or "__MACOSX" in parts


def _members(tar: tarfile.TarFile, problem: list[str]) -> Iterator[_Member]:
    from webdataset.tariterators import base_plus_ext  # brings torch, for which no help should wait

    spots: dict[str, tuple[int, int]] = {}
    try:
        for member in tar:
            if member.size < 0:  # tarfile would go back, and loop forever
                problem.append(f"the tar file is damaged ({member.name!r} has a negative size)")
                return
            if member.isdir() or is_mac_file(member.name):
                continue
            key, suffix = base_plus_ext(member.name)
            offset, size, wrong = member.offset_data, member.size, None
            if member.islnk():
                target = spots.get(posixpath.normpath(member.linkname))
                offset, size = target or (0, 0)
                if target is None:
                    wrong = f"is a hard link to {member.linkname!r}, which is not in the tar before it"
            elif member.issym():
                wrong = "is a symbolic link; pack the files themselves, as `tar --dereference` does"
            elif not member.isreg() or member.issparse():
                wrong = "is not an ordinary file (a device, or sparse); pack plain files"
            if wrong is None:
                spots[posixpath.normpath(member.name)] = offset, size
            if key is None:  # nothing before the first dot, or no dot: it does not belong to a sample
                key, _, suffix = member.name.rpartition(".")
                suffix = f".{suffix}" if key else ""
            yield _Member(member.name, key or member.name, suffix.lower(), offset, size, wrong)
    except tarfile.ReadError as error:
        problem.append(f"the tar file is cut short ({error})")
    except _DAMAGED as error:
        problem.append(f"the tar file is damaged ({type(error).__name__}: {error})")


def _is_compressed(path: str | os.PathLike[str]) -> bool:
    """gzip, bzip2, xz or zstd, by the first bytes and not by the file's name."""
    with open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def _ending(path: str | os.PathLike[str], offset: int) -> str | None:
    """Why the tar does not end where tarfile stopped reading; None: it ends there.

    tarfile treats a damaged header, or the end of the file, as the end of the tar: the rest would be lost without
    an error.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        rest = file.read(MAX_PADDING + 1)
    if len(rest) < tarfile.BLOCKSIZE:
        return "the tar file is cut short (its end is missing)"
    if any(rest[: tarfile.BLOCKSIZE]):
        return f"the tar file is damaged (byte {offset} should begin a header)"
    if any(rest) or len(rest) > MAX_PADDING:
        return "there is more data after the end of the tar file, perhaps a second tar file"
    return None


def _group(members: Iterator[_Member]) -> list[StoredSample]:
    samples: list[StoredSample] = []
    seen: set[str] = set()
    beside: dict[str, str] = {}
    """By key, the first member that does not belong to a sample."""
    for member in members:
        key, suffix, wrong = member.key, member.suffix, member.problem
        if _WANTED.fullmatch(suffix):
            if wrong is not None:
                wrong = f"{suffix} {wrong}"
        elif dotted := _DOTTED.fullmatch(suffix):
            key = f"{key}.{dotted[1]}"
            wrong = f"{member.name!r} has a dot in its key, but a key ends at the first dot; rename it"
        elif _UNREAD_IMAGE.fullmatch(suffix):
            wrong = f"{suffix} has a format that is not read; write PNG, JPEG or WebP"
        else:
            if suffix.rpartition(".")[2] in _MISSED:
                beside.setdefault(key, member.name)
            continue
        if samples and samples[-1].key == key:
            current = samples[-1]
        else:
            twice = "its key is in the shard twice, or its members do not follow each other"
            current = StoredSample(key, {}, twice if key in seen else None)
            seen.add(key)
            samples.append(current)
        if suffix in current.members:
            wrong = f"holds {suffix} twice"
        elif member.size > MAX_MEMBER_BYTES:
            wrong = f"{suffix} is {member.size} bytes, over the limit"
        if wrong is None:
            current.members[suffix] = (member.offset, member.size)
        else:
            samples[-1] = StoredSample(key, current.members, current.problem or wrong)
    for key, name in beside.items():
        if key not in seen:
            wrong = f"{name!r} does not belong to a pair: a sample is KEY.json, KEY.chosen.png and KEY.rejected.png"
            samples.append(StoredSample(key, {}, wrong))
    return samples


# What `index_tar` found, kept next to the shard.


#: Behind the shard's own file name.
INDEX = ".index.json"
INDEX_FORMAT = "lit_safety shard index 1"
MAX_INDEX_BYTES = 256 << 20


def save_index(path: str | os.PathLike[str]) -> None:
    """Keep where the members of a shard lie, if each has a plain header of its own in front of it."""
    index = index_tar(path)
    if index.problem is not None or any(one.problem is not None for one in index.samples):
        return
    with open(path, "rb") as file:
        for one in index.samples:
            for suffix, (offset, size) in one.members.items():
                if not _begins(file, offset, f"{one.key}.{suffix}", size):
                    return
    layouts: dict[tuple[str, ...], int] = {}
    held = {
        "format": INDEX_FORMAT,
        "bytes": os.stat(path).st_size,
        "keys": [one.key for one in index.samples],
        "layout": [layouts.setdefault(tuple(one.members), len(layouts)) for one in index.samples],
        "layouts": list(layouts),
        "spots": [number for one in index.samples for spot in one.members.values() for number in spot],
    }
    write_atomic(Path(f"{os.fspath(path)}{INDEX}"), json.dumps(held, separators=(",", ":")).encode())


def stored_index(path: str | os.PathLike[str], expected: int) -> TarIndex | None:
    """What was kept of a shard of ``expected`` samples; None: nothing that fits the file."""
    kept = f"{os.fspath(path)}{INDEX}"
    try:
        if check_regular(kept).st_size > MAX_INDEX_BYTES:
            return None
        with open(kept, "rb") as file:
            held = json.loads(file.read())
        whole = check_regular(path).st_size
        if held["format"] != INDEX_FORMAT or held["bytes"] != whole or len(held["keys"]) != expected:
            return None
        return TarIndex(_KeptSamples(held["keys"], held["layout"], held["layouts"], held["spots"], whole))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, UserError):
        return None  # the shard itself tells


class _KeptSamples(Sequence[StoredSample]):
    """Samples of a file of ``whole`` bytes, each made when it is asked for: a reader needs a few of many.

    Args:
        keys: of the samples.
        layout: of each sample, which of ``layouts`` it has.
        layouts: the suffixes of a sample's members.
        spots: offset and size of each member of each sample, one after the other.
        whole: bytes of the file.

    Raises:
        ValueError: what is listed cannot be there.
    """

    def __init__(self, keys: list[str], layout: list[int], layouts: list[list[str]], spots: list[int], whole: int):
        import numpy as np

        if not all(type(key) is str for key in keys) or len(set(keys)) < len(keys) or len(layout) != len(keys):
            raise ValueError("keys are texts, each there once")
        if not all(_WANTED.fullmatch(suffix) for one in layouts for suffix in one):
            raise ValueError("no member of a sample")
        sizes = np.array([len(one) for one in layouts], dtype=np.int64)
        numbers, of_each = np.array(spots), np.array(layout)
        if numbers.dtype.kind != "i" or of_each.dtype.kind != "i" or of_each.min() < 0:
            raise ValueError("places are whole numbers")
        self._ends = np.cumsum(sizes[of_each])
        if len(numbers) != 2 * self._ends[-1]:
            raise ValueError("places of another number of members")
        self._spots = numbers.astype(np.int64).reshape(-1, 2)
        offsets, lengths = self._spots[:, 0], self._spots[:, 1]
        if lengths.min() < 0 or lengths.max() > MAX_MEMBER_BYTES or offsets.min() < tarfile.BLOCKSIZE:
            raise ValueError("no place in a file")
        if (offsets > whole - lengths).any():
            raise ValueError("a place outside of the file")
        self._keys, self._layout, self._layouts = keys, layout, layouts

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        names = self._layouts[self._layout[number]]
        end = int(self._ends[number])
        spots = self._spots[end - len(names) : end].tolist()
        members = {name: (offset, size) for name, (offset, size) in zip(names, spots, strict=True)}
        return StoredSample(self._keys[number], members)


def _begins(file: BinaryIO, offset: int, name: str, size: int) -> bool:
    """Whether the header in front of ``offset`` is that of a plain member; the file is then at ``offset``."""
    file.seek(offset - tarfile.BLOCKSIZE)
    header = file.read(tarfile.BLOCKSIZE)
    # Name, size in octal digits, and type, as POSIX has them; tarfile reads the rest too, in ten times the time.
    stated = header[124:136].rstrip(b"\0 ")
    return (
        header[:100].rstrip(b"\0") == name.encode()
        and stated.isdigit()
        and stated == b"%011o" % size
        and header[156:157] == tarfile.REGTYPE
        and not any(header[345:500])
    )


class _Stale(Exception):
    """What was kept next to a shard is not what the shard holds."""


class OpenShard:
    """A tar file whose samples can be read by number.

    Args:
        path: the tar file.
        expected: its number of samples in the manifest; None: not known.
    """

    def __init__(self, path: str, expected: int | None = None) -> None:
        self.path = path
        self._expected = expected
        kept = None if expected is None else stored_index(path, expected)
        self._kept = kept is not None
        self._use(kept or index_tar(path))
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)

    def _use(self, index: TarIndex) -> None:
        self.index = index
        found, expected = len(index.samples), self._expected
        self.problem = index.problem
        self._usable = found
        if self.problem is None and expected is not None and found != expected:
            self.problem = f"holds {found} samples but the manifest says {expected}"
            self._usable = 0  # it is not the shard that was listed; a shard that is cut short can be used up to its end

    def close(self) -> None:
        self._file.close()

    def where(self, number: int) -> str:
        """The shard and the sample's key, for messages."""
        samples = self.index.samples
        return f"{self.path}: sample {samples[number].key!r}" if number < len(samples) else self.path

    def read(self, number: int, wanted: Callable[[str], bool] | None = None) -> tuple[str, dict[str, bytes]]:
        """The key and the members (suffix to bytes) of a sample.

        Args:
            number: which sample.
            wanted: which suffixes to read; None: all known ones.

        Raises:
            BadSample: the shard ends before it, its key is used twice, or it cannot be read.
        """
        return self._as_it_is(lambda: self._read(number, wanted))

    def _read(self, number: int, wanted: Callable[[str], bool] | None) -> tuple[str, dict[str, bytes]]:
        sample = self._sample(number)
        names = [name for name in sample.members if wanted is None or wanted(name)]
        return sample.key, {name: self._bytes(number, sample, name) for name in names}

    def read_member(self, number: int, suffix: str) -> bytes:
        """One member of a sample.

        Raises:
            BadSample: as `read`, or the sample does not have this member.
        """
        return self._as_it_is(lambda: self._read_member(number, suffix))

    def _read_member(self, number: int, suffix: str) -> bytes:
        sample = self._sample(number)
        if suffix not in sample.members:
            raise BadSample(f"{self.where(number)}: has no {suffix}")
        return self._bytes(number, sample, suffix)

    def _as_it_is(self, read: Callable[[], Read]) -> Read:
        """What ``read`` gives; by the shard's own headers if those that were kept are not the shard's."""
        try:
            return read()
        except _Stale:
            self._kept = False
            self._use(index_tar(self.path))
            return read()

    def _sample(self, number: int) -> StoredSample:
        samples = self.index.samples
        if number >= self._usable:
            raise BadSample(f"{self.path}: sample {number}: {self.problem}")
        sample = samples[number]
        if sample.problem is not None:
            raise BadSample(f"{self.where(number)}: {sample.problem}")
        return sample

    def _bytes(self, number: int, sample: StoredSample, suffix: str) -> bytes:
        offset, size = sample.members[suffix]
        try:
            if not self._kept:
                self._file.seek(offset)
            elif not _begins(self._file, offset, f"{sample.key}.{suffix}", size):
                raise _Stale
            data = self._file.read(size)
        except OSError as error:
            raise BadSample(f"{self.where(number)}: cannot be read ({error.strerror or error})") from error
        if len(data) != size:
            raise BadSample(f"{self.where(number)}: the tar file is cut short")
        return data


def refuse_twice(seen: dict[str, str], key: str, path: str) -> None:
    """Note in which shard a key is.

    Raises:
        UserError: another shard has it too: the second pair would be lost, or make the same random choices.
    """
    if (other := seen.setdefault(key, path)) != path:
        raise UserError(f"{path}: sample {key!r} is also in {other}; keys must differ: process one set after the "
                        "other")  # fmt: skip
