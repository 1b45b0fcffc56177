"""The manifest in a folder of shards: which shards and samples it holds, and where they come from.

`manifest.json` lists the shards in the style of webdataset's `wids` (`shardlist` of `url` and `nsamples`) with sizes
and hashes. It also states the *class* of every sample: the distinct (kind, order, categories, user, label) are listed
once, and each shard holds one small number a sample. So filters and orders are computed from the manifest alone,
without opening a shard; a million pairs need about 3 MB of JSON. When a sample is read, it is compared with its class.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, StrictInt, StrictStr, TypeAdapter, ValidationError

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.hashes import check_regular
from lit_safety.core.records import Text, checked
from lit_safety.core.text import NotUtf8, load_json, read_text
from lit_safety.data.format.sample import Categories, PairMetadata

FILE_NAME = "manifest.json"
#: The finished shards, in the manifest's format; removed when the manifest itself is written.
JOURNAL = ".manifest.partial.json"
FORMAT = "lit_safety preference shards"
#: 1: pairs alone. 2: groups too; written where there are any, so that other shards stay readable by earlier programs.
VERSIONS = (1, 2)

MAX_BYTES = 1 << 30
"""Of the file: enough for 300 million samples."""
MAX_SAMPLES = 10_000_000
"""In one shard: memory for so many may be allocated before the shard is opened."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*\Z")


def _plain(url: str) -> str:
    if not _SAFE_NAME.match(url):
        raise ValueError("is refused: a manifest may name shards only by plain relative names")
    return url


def _class_numbers(value: Any) -> list[int] | None:
    try:
        return _NUMBERS.validate_python(value)
    except ValidationError as error:
        raise ValueError("must be a list of whole numbers from 0 up") from error


_NUMBERS = TypeAdapter(list[Annotated[int, Field(strict=True, ge=0)]] | None)


@dataclass(frozen=True)
class SampleClass:
    """The properties of a sample that a filter can use."""

    kind: Text
    order: Text
    categories: Categories = ()
    user: Text | None = None
    label: Text | None = field(default=None, repr=False)
    """`PairMetadata.label`: filters do not use it, but a sample that is read is compared with it. None: not stated, as
    manifests of earlier versions."""
    images: Annotated[int, Field(strict=True, ge=2)] | None = field(default=None, repr=False)
    """How many images a group has; None: it is a pair."""

    @classmethod
    def of(cls, metadata: PairMetadata) -> SampleClass:
        images = len(metadata.images) or None
        return cls(metadata.prompt_kind, metadata.order, metadata.categories, metadata.user_id, metadata.label, images)

    def difference(self, found: SampleClass) -> str | None:
        """In words, what in a sample differs from this class; None: nothing differs."""
        for name in ("kind", "order", "categories", "user", "label", "images"):
            listed, own = getattr(self, name), getattr(found, name)
            if name == "categories":
                listed, own = sorted(listed), sorted(own)
            if listed != own and not (name == "label" and listed is None):
                return f"its {name} is {own!r}, and the manifest says {listed!r}"
        return None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"kind": self.kind, "order": self.order, "categories": list(self.categories)}
        rest = {"user": self.user, "label": self.label, "images": self.images}
        return out | {name: value for name, value in rest.items() if value is not None}


@dataclass(frozen=True)
class Shard:
    """One tar file of the manifest."""

    url: Annotated[StrictStr, AfterValidator(_plain)]
    """Relative to the manifest's folder when it comes from a manifest."""
    nsamples: Annotated[int, Field(strict=True, ge=0, le=MAX_SAMPLES)]
    bytes: StrictInt | None = None
    sha256: StrictStr | None = None
    classes: Annotated[Sequence[int] | None, PlainValidator(_class_numbers)] = None
    """For each sample in the tar's order, an index into `Manifest.classes`. Stored in two bytes each (in eight if there
    are too many classes for two), because there may be many millions."""

    def __post_init__(self) -> None:
        if self.classes is not None:
            small = max(self.classes, default=0) < 1 << 16
            object.__setattr__(self, "classes", array("H" if small else "Q", self.classes))

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"url": self.url, "nsamples": self.nsamples}
        out |= {"bytes": self.bytes, "sha256": self.sha256}
        out["classes"] = None if self.classes is None else list(self.classes)
        return {name: value for name, value in out.items() if value is not None}


@dataclass(frozen=True)
class Manifest:
    """The shards of one folder. `load_manifest` and `scan` make it; `ShardWriter` writes it."""

    shardlist: tuple[Shard, ...]
    classes: tuple[SampleClass, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)
    """Samples by `PairMetadata.label`, such as `{"safe>harmful": 120}`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the samples come from, as the writer of the shards states it."""
    seeds: dict[str, Any] = field(default_factory=dict)
    """The seeds that the samples were drawn with."""
    cache: dict[str, Any] | None = None
    """For cached latents: the fingerprint of the model and the resolution that made them."""

    @cached_property
    def nsamples(self) -> int:
        return sum(shard.nsamples for shard in self.shardlist)

    @property
    def version(self) -> int:
        """2 where it lists a group."""
        return VERSIONS[any(one.images is not None for one in self.classes)]

    def counts(self) -> dict[str, Any]:
        """Samples by category, kind, order and label; a sample with two categories counts for both."""
        per_class: Counter[int] = Counter()
        for shard in self.shardlist:
            per_class.update(shard.classes or ())
        by: dict[str, Counter[str]] = {"category": Counter(), "kind": Counter(), "order": Counter()}
        if self.version > 1:
            by["images"] = Counter()
        for index, number in sorted(per_class.items()):
            one = self.classes[index]
            by["kind"][one.kind] += number
            by["order"][one.order] += number
            if "images" in by:
                by["images"][str(one.images or 2)] += number
            for category in one.categories:
                by["category"][category] += number
        counts: dict[str, Any] = {name: dict(sorted(counter.items())) for name, counter in by.items()}
        return {"samples": self.nsamples, **counts, "label": dict(sorted(self.labels.items()))}

    @cached_property
    def states_labels(self) -> bool:
        """Whether it states the label of every sample."""
        return all(one.label is not None for one in self.classes) and all(
            shard.classes is not None for shard in self.shardlist
        )

    def difference(self, shard: Shard, number: int, found: SampleClass) -> str | None:
        """In words, how the ``number``-th sample of a ``shard`` differs from the manifest; None: it does not.

        If labels are counted but not listed, a sample's label must at least be one of those that were counted.
        """
        if shard.classes is not None and number < len(shard.classes):
            listed = self.classes[shard.classes[number]]
            if said := listed.difference(found):
                return said
            if listed.label is not None:
                return None
        counted = self.labels and sum(self.labels.values()) == self.nsamples
        if counted and not self.labels.get(found.label or ""):
            return f"its label is {found.label!r}, and the manifest counts {self.labels}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": self.version,
            "counts": self.counts(),
            "provenance": self.provenance,
            "seeds": self.seeds,
            "cache": self.cache,
            "classes": [one.to_dict() for one in self.classes],
            "shardlist": [shard.to_dict() for shard in self.shardlist],
        }


def save_manifest(manifest: Manifest, folder: str | os.PathLike[str], name: str = FILE_NAME) -> Path:
    """Write the manifest so that a reader sees the old one or the new one, never a part."""
    text = _compact(manifest.to_dict())
    return write_atomic(Path(folder) / name, text.encode("utf-8"))


def _compact(data: dict[str, Any]) -> str:
    # One line for each shard and class: readable in a diff, and a million class numbers do not need a million
    # lines.
    listed = {name: data[name] for name in ("classes", "shardlist")}
    text = json.dumps({k: v for k, v in data.items() if k not in listed}, ensure_ascii=False, indent=1)
    for name, entries in listed.items():
        lines = ",\n  ".join(json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in entries)
        text = text[:-2] + f',\n "{name}": [\n  {lines}\n ]\n}}' if entries else text[:-2] + f',\n "{name}": []\n}}'
    return text + "\n"


def load_manifest(folder: str | os.PathLike[str], name: str = FILE_NAME) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        UserError: the file is missing, has another format or version, or an entry is not valid: only relative names
            below the folder are accepted (no `pipe:`, no URL, no `..`, no absolute path).
    """
    path = Path(folder) / name
    try:
        if (size := check_regular(path).st_size) > MAX_BYTES:
            raise UserError(f"{path}: is {size} bytes, over the limit of {MAX_BYTES}")
        data = load_json(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except NotUtf8:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path}: is not a manifest of preference shards (its 'format' must be {FORMAT!r})")
    if data.get("version") not in VERSIONS:
        read = " and ".join(map(str, VERSIONS))
        raise UserError(f"{path}: is of version {data.get('version')!r}; this program reads versions {read}")
    stated = checked(_STATED, data, str(path))
    if data["version"] == 1 and any(one.images is not None for one in stated.classes):
        raise UserError(f"{path}: is of version 1 and lists groups (`images`), which version 2 has")
    for i, shard in enumerate(stated.shardlist):
        if shard.classes is not None and len(shard.classes) != shard.nsamples:
            raise UserError(f"{path}: 'shardlist.{i}.classes' must hold {shard.nsamples} numbers, one a sample")
        if max(shard.classes or (), default=-1) >= len(stated.classes):
            raise UserError(f"{path}: 'shardlist.{i}.classes' names a class outside the {len(stated.classes)} listed")
    for url, times in Counter(shard.url for shard in stated.shardlist).items():
        if times > 1:
            raise UserError(f"{path}: lists the shard {url!r} {times} times")
    counts = stated.counts if isinstance(stated.counts, dict) else {}
    labels = counts.get("label")
    manifest = Manifest(
        shardlist=tuple(stated.shardlist),
        classes=tuple(stated.classes),
        labels={n: c for n, c in labels.items() if type(c) is int} if isinstance(labels, dict) else {},
        provenance=stated.provenance or {},
        seeds=stated.seeds or {},
        cache=stated.cache or None,
    )
    samples = counts.get("samples")
    if samples is not None and samples != manifest.nsamples:
        raise UserError(f"{path}: 'counts' says {samples} samples but its shards hold {manifest.nsamples}")
    _check_counts(counts, manifest, path)
    return manifest


@dataclass
class _Stated:
    """The content of the file; unknown keys are ignored."""

    classes: list[SampleClass]
    shardlist: list[Shard]
    counts: Any = None
    provenance: dict[str, Any] | None = None
    seeds: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None


_STATED = TypeAdapter(_Stated)


def _check_counts(stated: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Compare the counts with the lists: people read the counts, and training uses the lists.

    Raises:
        UserError: they differ.
    """
    if not manifest.shardlist or any(shard.classes is None for shard in manifest.shardlist):
        return
    found: dict[str, Any] = {name: held for name, held in manifest.counts().items() if name in stated}
    if manifest.states_labels and "label" in stated:
        classes = [manifest.classes[number] for shard in manifest.shardlist for number in shard.classes or ()]
        found["label"] = dict(sorted(Counter(str(one.label) for one in classes).items()))
    elif sum(manifest.labels.values()) not in (0, manifest.nsamples):  # labels are counted and not listed
        found["label"] = f"{manifest.nsamples} samples"
    for name, held in found.items():
        if stated[name] != held:
            raise UserError(
                f"{path}: 'counts' says {name} {json.dumps(stated[name])[:200]}, and its shards hold {held}; write the "
                "shards again, or correct 'counts'"
            )
