"""Where each sample lies in a tar file, and its bytes.

Shards are read by position: one pass over the tar's headers (the images are skipped, not read) says where
everything is, and then a sample costs one read of exactly its bytes. So a worker reads its own samples and
nobody else's, memory is one batch, and what a resumed run skips is neither read nor decoded. Keys and
suffixes are webdataset's. Links, devices and folders in a tar are ignored, and members other than those named
here are never read at all.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from webdataset.tariterators import base_plus_ext

from lit_safety.errors import UserError
from lit_safety.hashes import check_regular

MAX_MEMBER_BYTES = 128 << 20
MAX_PADDING = 1 << 20
"""Zeros behind the last member. Programs fill up 10 KiB."""
# What tarfile raises for headers that nobody wrote in good faith.
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError, MemoryError)
# Images, or what a cache has instead of them.
_WANTED = re.compile(
    r"json|(chosen|rejected)\.(png|jpg|jpeg|webp|latent\.npy|latent\.flip\.npy)|crops\.npy"
    r"|reference(\.prediction)?(\.flip)?\.npy"
)


class BadSample(UserError):
    """One sample cannot be used; `on_bad_sample` decides what that means."""


@dataclass(frozen=True)
class StoredSample:
    """One sample of a shard and where its members lie."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Suffix (`json`, `chosen.png`) to (offset, size) in bytes."""
    problem: str | None = None
    """Why it cannot be used, if so."""


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar file, in the order in which they stand."""

    samples: list[StoredSample]
    problem: str | None = None
    """Set when the tar ends too early or a header is damaged: the samples listed are those before that point."""


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
        hint = "; unpack it: shards are plain tar files" if str(path).endswith((".gz", ".bz2", ".xz")) else ""
        raise UserError(f"{path}: is not a readable tar file ({error}){hint}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _members(tar: tarfile.TarFile, problem: list[str]) -> Iterator[tuple[str, str, int, int]]:
    try:
        for member in tar:
            key, suffix = base_plus_ext(member.name)
            if member.isreg() and not member.issparse() and key is not None:
                yield key, suffix.lower(), member.offset_data, member.size
            if member.size < 0:  # tarfile would go back, and round for ever
                problem.append(f"the tar file is damaged ({member.name!r} has a size below 0)")
                return
    except tarfile.ReadError as error:
        problem.append(f"the tar file is cut short ({error})")
    except _DAMAGED as error:
        problem.append(f"the tar file is damaged ({type(error).__name__}: {error})")


def _ending(path: str | os.PathLike[str], offset: int) -> str | None:
    """Why the tar does not end where tarfile stopped reading; None: it does.

    tarfile takes a damaged header, or the end of the file, for the end of the tar: what follows would be lost in
    silence.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        rest = file.read(MAX_PADDING + 1)
    if len(rest) < tarfile.BLOCKSIZE:
        return "the tar file is cut short (its end is missing)"
    if any(rest[: tarfile.BLOCKSIZE]):
        return f"the tar file is damaged (no header at byte {offset})"
    if any(rest) or len(rest) > MAX_PADDING:
        return "more follows the end of the tar file: is it two of them in one?"
    return None


def _group(members: Iterator[tuple[str, str, int, int]]) -> list[StoredSample]:
    samples: list[StoredSample] = []
    seen: set[str] = set()
    for key, suffix, offset, size in members:
        if not _WANTED.fullmatch(suffix):
            continue
        if samples and samples[-1].key == key:
            current = samples[-1]
        else:
            current = StoredSample(key, {}, "its key stands twice in the shard" if key in seen else None)
            seen.add(key)
            samples.append(current)
        if suffix in current.members:
            samples[-1] = StoredSample(key, current.members, f"holds {suffix} twice")
        elif size > MAX_MEMBER_BYTES:
            samples[-1] = StoredSample(key, current.members, f"{suffix} is {size} bytes, over the limit")
        else:
            current.members[suffix] = (offset, size)
    return samples


class OpenShard:
    """A tar file whose samples can be read by number.

    Args:
        path: the tar file.
        expected: how many samples the manifest says it holds; None: not known.
    """

    def __init__(self, path: str, expected: int | None = None) -> None:
        self.path = path
        self.index = index_tar(path)
        found = len(self.index.samples)
        self.problem = self.index.problem
        self._usable = found
        if self.problem is None and expected is not None and found != expected:
            self.problem = f"holds {found} samples but the manifest says {expected}"
            self._usable = 0  # not the shard that was listed; one that is cut short is, as far as it goes
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)

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
            wanted: which suffixes to read; None: all that are known.

        Raises:
            BadSample: the shard ends before it, its key is taken, or it cannot be read.
        """
        sample = self._sample(number)
        spots = [(name, spot) for name, spot in sample.members.items() if wanted is None or wanted(name)]
        return sample.key, {name: self._bytes(number, *spot) for name, spot in spots}

    def read_member(self, number: int, suffix: str) -> bytes:
        """One member of a sample.

        Raises:
            BadSample: as `read`, or the sample has no such member.
        """
        sample = self._sample(number)
        if suffix not in sample.members:
            raise BadSample(f"{self.where(number)}: has no {suffix}")
        return self._bytes(number, *sample.members[suffix])

    def _sample(self, number: int) -> StoredSample:
        samples = self.index.samples
        if number >= self._usable:
            raise BadSample(f"{self.path}: sample {number}: {self.problem}")
        if samples[number].problem is not None:
            raise BadSample(f"{self.where(number)}: {samples[number].problem}")
        return samples[number]

    def _bytes(self, number: int, offset: int, size: int) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(size)
        except OSError as error:
            raise BadSample(f"{self.where(number)}: cannot be read ({error.strerror or error})") from error
        if len(data) != size:
            raise BadSample(f"{self.where(number)}: the tar file is cut short")
        return data


def refuse_twice(seen: dict[str, str], key: str, shard: OpenShard) -> None:
    """Note in which shard a key stands.

    Raises:
        UserError: it stands in another one too: the second pair would be lost, or share its random choices.
    """
    if (other := seen.setdefault(key, shard.path)) != shard.path:
        raise UserError(f"{shard.path}: sample {key!r} stands in {other} too; keys must differ: do one set after the "
                        "other")  # fmt: skip
