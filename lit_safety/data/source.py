"""Find the shards that a YAML key names, and check what can be known before anything is read.

A source is a folder (or a URL) with `manifest.json` beside its shards, a folder of tar files, one tar file, a pattern
(`shard-{000000..000031}.tar`, `*.tar`) or a list of these. Without a manifest the headers and the small JSON
members are read once; the images are not.
"""

from __future__ import annotations

import functools
import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import braceexpand

from lit_safety.data.cache import PROMPTS
from lit_safety.data.manifest import FILE_NAME, JOURNAL, Manifest, SampleClass, Shard, file_sha256, load_manifest
from lit_safety.data.remote import MOST_MANIFEST, default_cache, fetch, is_remote
from lit_safety.data.sample import PairMetadata, parse_metadata
from lit_safety.data.tarindex import BadSample, OpenShard, is_mac_file
from lit_safety.errors import UserError

NOTHING = "the list of shards is empty; give a folder of shards or a pattern of tar files"
#: The most shards that a pattern may name.
MAX_NAMES = 1_000_000
#: Where counting names ends.
MANY = 10**100
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_LETTERS = re.compile(r"\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\}")
# The class of a sample whose metadata cannot be read: no filter finds it, and the reader names it in its turn.
UNREADABLE = SampleClass("unreadable", "unreadable")

_PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|Z))$", re.IGNORECASE)


@dataclass(frozen=True)
class FolderCache:
    """What one folder's manifest says of a cache."""

    given: str
    """The folder or URL."""
    cache: dict[str, Any] | None
    """`cache` of its manifest, unchecked; None: its samples are not cached."""

    @property
    def prompts(self) -> str:
        """The file or URL of the text encoders' outputs."""
        return f"{self.given}/{PROMPTS}"


@dataclass(frozen=True)
class Source:
    """The shards behind one YAML key."""

    key: str
    """The YAML key (or argument) they come from, for messages."""
    given: str
    """What was given there, for messages."""
    manifest: Manifest
    paths: tuple[str, ...]
    """Each shard's file or URL, in the order of `manifest.shardlist`."""
    caches: tuple[FolderCache, ...] = ()
    """What each folder (or pattern) says of a cache."""
    parts: tuple[int, ...] = ()
    """Where a list was given: how many shards each entry has."""

    def identity(self) -> list[tuple[int, str]]:
        """Samples and SHA-256 of each shard: what tells these from others, wherever they lie.

        Shards without a stated hash are read for it; of those elsewhere their URL stands for it.
        """
        return [
            (listed.nsamples, listed.sha256 or (path if is_remote(path) else file_sha256(path, remember=True)))
            for path, listed in zip(self.paths, self.manifest.shardlist, strict=True)
        ]

    def open_shard(self, number: int) -> OpenShard:
        """Open a shard, fetching it if it lies elsewhere and was not fetched yet.

        Raises:
            UserError: it is missing, no tar file, or not what the manifest says.
        """
        path, listed = self.paths[number], self.manifest.shardlist[number]
        if is_remote(path):
            path = str(fetch(path, default_cache(), listed.sha256, size=listed.bytes))
        elif listed.sha256 is not None and not self.manifest.states_labels and len(self.manifest.labels) > 1:
            self._check_content(path, listed.sha256)
        return OpenShard(path, listed.nsamples)

    def _check_content(self, path: str, sha256: str) -> None:
        """Whether a shard is the one that was listed, where its manifest does not say which sample has which label.

        Such manifests are of earlier versions. The hash is remembered, so a shard is read for it once.
        """
        try:
            found = file_sha256(path, remember=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if found != sha256:
            raise UserError(
                f"{path}: is not what its manifest says (its SHA-256 differs); restore it or write the shards anew"
            )

    def check(self, number: int, sample: int, metadata: PairMetadata, where: str) -> None:
        """Compare a sample that was read with what the manifest says of it.

        Args:
            number: which shard.
            sample: which of its samples.
            metadata: the sample's.
            where: shard and key, for messages.

        Raises:
            BadSample: its kind, order, categories, user or label are others than those listed.
        """
        manifest = self.manifest
        if said := manifest.difference(manifest.shardlist[number], sample, SampleClass.of(metadata)):
            raise BadSample(f"{where}: {said}; restore shard and {FILE_NAME} together, or write the shards anew")


def open_source(given: str | Sequence[str], key: str) -> Source:
    """Find the shards named by `given`.

    Raises:
        UserError: nothing is there, a shard of the manifest is missing or of another size, or the list is
        empty.
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
    """Shards are fetched when their turn comes, so that a missing one is found then, not now."""
    if folder.endswith(".tar") or "{" in folder or "*" in folder:
        raise UserError(f"{key}: over the network give the folder that holds {FILE_NAME}, not {folder!r}")
    try:
        copy = fetch(f"{folder}/{FILE_NAME}", default_cache(), fresh=True, most=MOST_MANIFEST)
    except UserError as error:
        raise UserError(f"{key}: {error}; give a folder of shards with its {FILE_NAME}") from error
    manifest = load_manifest(copy.parent)
    if not manifest.shardlist:
        raise UserError(f"{key}: {folder}/{FILE_NAME} lists no shards; write the shards anew or give another folder")
    paths = tuple(f"{folder}/{shard.url}" for shard in manifest.shardlist)
    return Source(key, folder, manifest, paths, (FolderCache(folder, manifest.cache),))


def _together(sources: Sequence[Source], key: str) -> Source:
    """Several sources as one, one after another."""
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
    """Shards that somebody writes, or that a killed run left, would be read as all there is."""
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
        raise UserError(f"{key}: {folder / FILE_NAME} lists no shards; write the shards anew or give another folder")
    paths = []
    for shard in manifest.shardlist:
        path = folder / shard.url
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(
                f"{key}: the shard {path} is missing although {folder / FILE_NAME} lists it; restore "
                "it or write the shards anew"
            ) from error
        if shard.bytes is not None and size != shard.bytes:
            raise UserError(
                f"{key}: the shard {path} has {size} bytes but {folder / FILE_NAME} says {shard.bytes}; "
                "copy it again or write the shards anew"
            )
        paths.append(str(path))
    return Source(key, str(folder), manifest, tuple(paths), (FolderCache(str(folder), manifest.cache),))


def _expand(pattern: str, key: str) -> list[str]:
    if not pattern.strip():
        raise UserError(f"{key}: {NOTHING}")
    if pattern.startswith("pipe:"):
        raise UserError(f"{key}: {pattern!r} is refused: commands are not run; give a folder or a pattern of tar files")
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
            raise UserError(f"{key}: {pattern} does not exist; give a folder of shards or a pattern of tar files")
    if not found:
        raise UserError(f"{key}: no file matches {pattern!r}; give a folder of shards or a pattern of tar files")
    return found


def _names_at_most(pattern: str) -> int:
    """How many names a pattern with braces has at most, without making them."""
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
    """Make a manifest in memory from the tars' headers and JSON members; a tar is scanned once a process.

    Raises:
        UserError: a file is no tar, ends too early, or holds no sample.
    """
    classes: dict[SampleClass, int] = {}
    labels: Counter[str] = Counter()
    shards = []
    for path in paths:
        if is_remote(path):
            raise UserError(
                f"{path}: its manifest does not say what its samples are about (`classes`), so a filter cannot be "
                "applied over the network; copy the shards to this machine"
            )
        stat = os.stat(path)
        found, counted = _scan_one(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
        if not found:
            raise UserError(f"{path}: holds no sample; restore it or leave it out of the list")
        labels.update(dict(counted))
        numbers = tuple(classes.setdefault(one, len(classes)) for one in found)
        shards.append(Shard(path, len(found), stat.st_size, None, numbers))
    return Manifest(tuple(shards), tuple(classes), dict(labels))


@functools.cache
def _scan_one(path: str, size: int, mtime: int) -> tuple[tuple[SampleClass, ...], tuple[tuple[str, int], ...]]:
    shard = OpenShard(path)
    try:
        if shard.problem is not None:
            raise UserError(f"{path}: {shard.problem}; copy it again or leave it out of the list")
        found: list[SampleClass] = []
        labels: Counter[str] = Counter()
        for number in range(len(shard.index.samples)):
            try:
                metadata = parse_metadata(shard.read_member(number, "json"), shard.where(number))
            except UserError:  # named, counted and judged by on_bad_sample when the sample is read
                found.append(UNREADABLE)
                continue
            found.append(SampleClass.of(metadata))
            labels[metadata.label] += 1
        return tuple(found), tuple(sorted(labels.items()))
    finally:
        shard.close()
