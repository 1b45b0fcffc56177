"""The manifest next to a folder of shards: what is there, how many, and where it comes from.

`manifest.json` lists the shards in the style of webdataset's `wids` (`shardlist` of `url` and `nsamples`)
with sizes and hashes, and says of every sample which *class* it belongs to: the distinct (kind, order,
categories, user, label) are listed once and each shard holds one small number a sample. So filters and orders are
computed from the manifest alone, without opening a shard; a million pairs cost about 3 MB of JSON. A class also has the
label of its samples, and a sample that is read is compared with all of it.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.core.hashes import check_regular
from lit_safety.core.text import NotUtf8, load_json, read_text
from lit_safety.data.format.sample import PairMetadata

FILE_NAME = "manifest.json"
#: What is finished so far, in the manifest's format; gone once the manifest itself is written.
JOURNAL = ".manifest.partial.json"
FORMAT = "lit_safety preference shards"
VERSION = 1

MAX_BYTES = 1 << 30
"""Of the file: 300 million samples."""
MAX_SAMPLES = 10_000_000
"""In one shard; memory is taken for so many before it is opened."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*\Z")


@dataclass(frozen=True)
class SampleClass:
    """What a filter can ask of a sample."""

    kind: str
    order: str
    categories: tuple[str, ...] = ()
    user: str | None = None
    label: str | None = field(default=None, repr=False)
    """`PairMetadata.label`: no filter asks for it, but a sample that is read is compared with it. None: not stated, as
    in manifests of earlier versions."""

    @classmethod
    def of(cls, metadata: PairMetadata) -> SampleClass:
        return cls(metadata.prompt_kind, metadata.order, metadata.categories, metadata.user_id, metadata.label)

    def difference(self, found: SampleClass) -> str | None:
        """In words, what of a sample is not as it is listed here; None: all is."""
        for name in ("kind", "order", "categories", "user", "label"):
            listed, own = getattr(self, name), getattr(found, name)
            if name == "categories":
                listed, own = sorted(listed), sorted(own)
            if listed != own and not (name == "label" and listed is None):
                return f"its {name} is {own!r}, and the manifest says {listed!r}"
        return None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"kind": self.kind, "order": self.order, "categories": list(self.categories)}
        rest = {"user": self.user, "label": self.label}
        return out | {name: value for name, value in rest.items() if value is not None}


@dataclass(frozen=True)
class Shard:
    """One tar file of the manifest."""

    url: str
    """Relative to the manifest's folder when it comes from a manifest."""
    nsamples: int
    bytes: int | None = None
    sha256: str | None = None
    classes: Sequence[int] | None = None
    """For each sample in the tar's order, an index into `Manifest.classes`; kept in two bytes each (eight where there
    are more classes than that holds), for there may be many millions."""

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
    """Where the samples come from, in the words of whoever wrote the shards."""
    seeds: dict[str, Any] = field(default_factory=dict)
    """The seeds the samples were drawn with."""
    cache: dict[str, Any] | None = None
    """For cached latents: the fingerprint of the model and the resolution that made them."""

    @cached_property
    def nsamples(self) -> int:
        return sum(shard.nsamples for shard in self.shardlist)

    def counts(self) -> dict[str, Any]:
        """Samples by category, kind, order and label; a sample of two categories counts under both."""
        per_class: Counter[int] = Counter()
        for shard in self.shardlist:
            per_class.update(shard.classes or ())
        by: dict[str, Counter[str]] = {"category": Counter(), "kind": Counter(), "order": Counter()}
        for index, number in sorted(per_class.items()):
            one = self.classes[index]
            by["kind"][one.kind] += number
            by["order"][one.order] += number
            for category in one.categories:
                by["category"][category] += number
        counts: dict[str, Any] = {name: dict(sorted(counter.items())) for name, counter in by.items()}
        return {"samples": self.nsamples, **counts, "label": dict(sorted(self.labels.items()))}

    @cached_property
    def states_labels(self) -> bool:
        """Whether it says of every sample which label it has."""
        return all(one.label is not None for one in self.classes) and all(
            shard.classes is not None for shard in self.shardlist
        )

    def difference(self, shard: Shard, number: int, found: SampleClass) -> str | None:
        """In words, what of the ``number``-th sample of a ``shard`` is not as it is listed; None: all is.

        Where labels are counted and not listed, a sample's label must at least be one of those that were counted.
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
            "version": VERSION,
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
    # One line a shard and a class: readable in a diff, yet a million class numbers do not take a million
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
        UserError: the file is missing, of another format or version, or an entry is not what it must be: only
            relative names below the folder are accepted (no `pipe:`, no URL, no `..`, no absolute path).
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
    if data.get("version") != VERSION:
        raise UserError(f"{path}: is of version {data.get('version')!r}; this program reads version {VERSION}")
    classes = tuple(
        _parse_class(entry, f"{path}: classes[{i}]") for i, entry in enumerate(_list(data, "classes", path))
    )
    shards = [
        _parse_shard(entry, len(classes), f"{path}: shardlist[{i}]")
        for i, entry in enumerate(_list(data, "shardlist", path))
    ]
    for url, times in Counter(shard.url for shard in shards).items():
        if times > 1:
            raise UserError(f"{path}: lists the shard {url!r} {times} times")
    labels = data.get("counts", {}).get("label", {}) if isinstance(data.get("counts"), dict) else {}
    manifest = Manifest(
        shardlist=tuple(shards),
        classes=classes,
        labels={n: c for n, c in labels.items() if type(c) is int} if isinstance(labels, dict) else {},
        provenance=_dict(data, "provenance", path),
        seeds=_dict(data, "seeds", path),
        cache=_dict(data, "cache", path) or None,
    )
    stated = data.get("counts", {}).get("samples") if isinstance(data.get("counts"), dict) else None
    if stated is not None and stated != manifest.nsamples:
        raise UserError(f"{path}: 'counts' says {stated} samples but its shards hold {manifest.nsamples}")
    if isinstance(data.get("counts"), dict):
        _check_counts(data["counts"], manifest, path)
    return manifest


def _check_counts(stated: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Compare what is counted with what is listed: people read the one, and training goes by the other.

    Raises:
        UserError: they differ.
    """
    if not manifest.shardlist or any(shard.classes is None for shard in manifest.shardlist):
        return
    found: dict[str, Any] = {name: held for name, held in manifest.counts().items() if name in stated}
    if manifest.states_labels and "label" in stated:
        classes = [manifest.classes[number] for shard in manifest.shardlist for number in shard.classes or ()]
        found["label"] = dict(sorted(Counter(str(one.label) for one in classes).items()))
    elif sum(manifest.labels.values()) not in (0, manifest.nsamples):  # they are counted and not listed
        found["label"] = f"{manifest.nsamples} samples"
    for name, held in found.items():
        if stated[name] != held:
            raise UserError(
                f"{path}: 'counts' says {name} {json.dumps(stated[name])[:200]}, and its shards hold {held}; write the "
                "shards again, or correct 'counts'"
            )


def _list(data: dict[str, Any], name: str, path: Path) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list):
        raise UserError(f"{path}: {name!r} must be a list")
    return value


def _dict(data: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {name!r} must be an object")
    return value or {}


def _parse_class(entry: Any, where: str) -> SampleClass:
    if not isinstance(entry, dict) or not isinstance(entry.get("categories"), list):
        raise UserError(f"{where}: must be an object with kind, order and categories")
    texts: Iterable[Any] = (
        entry.get("kind"),
        entry.get("order"),
        *entry["categories"],
        entry.get("user", ""),
        entry.get("label", ""),
    )
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: kind, order, categories, user and label must be texts")
    try:
        categories = tuple(canonical_category(name) for name in entry["categories"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return SampleClass(entry["kind"], entry["order"], categories, entry.get("user"), entry.get("label"))


def _parse_shard(entry: Any, nclasses: int, where: str) -> Shard:
    if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
        raise UserError(f"{where}: must be an object with 'url' and 'nsamples'")
    url, nsamples, classes = entry["url"], entry.get("nsamples"), entry.get("classes")
    if not _SAFE_NAME.match(url):
        raise UserError(f"{where}: {url!r} is refused: a manifest names shards by plain relative names only")
    if isinstance(nsamples, bool) or not isinstance(nsamples, int) or not 0 <= nsamples <= MAX_SAMPLES:
        raise UserError(f"{where}: 'nsamples' must be a count up to {MAX_SAMPLES}, not {repr(nsamples)[:40]}")
    if not isinstance(entry.get("bytes", 0), int) or not isinstance(entry.get("sha256", ""), str):
        raise UserError(f"{where}: 'bytes' must be a number and 'sha256' a text")
    if classes is not None:
        if not isinstance(classes, list) or len(classes) != nsamples or set(map(type, classes)) - {int}:
            raise UserError(f"{where}: 'classes' must hold {nsamples} numbers, one a sample")
        if classes and not 0 <= min(classes) <= max(classes) < nclasses:
            raise UserError(f"{where}: 'classes' names a class outside the {nclasses} listed")
    return Shard(url, nsamples, entry.get("bytes"), entry.get("sha256"), classes)
