"""What every converter does with the pairs it finds: check them, write them, report the result."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lit_safety.core.errors import UserError
from lit_safety.core.images import decode_image, same_image
from lit_safety.core.progress import counter
from lit_safety.data.convert.published import StoredImage, read_file
from lit_safety.data.format.manifest import FILE_NAME, JOURNAL, load_manifest
from lit_safety.data.format.sample import PairMetadata
from lit_safety.data.format.writer import ShardWriter

SAME = "whose images are the same"


@dataclass(frozen=True)
class FoundPair:
    """A pair of a published data set, whose images are not read yet."""

    key: str
    metadata: PairMetadata | dict[str, Any]
    chosen: Path | StoredImage
    rejected: Path | StoredImage


def plain_key(text: str) -> str:
    """A sample's key that every tar and webdataset reader accepts. Different texts give different keys."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", text)
    if plain == text and len(text) <= 120 and not text.startswith("__"):
        return text
    return f"k-{plain[:120]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def convert(
    pairs: Iterable[FoundPair],
    out: str,
    provenance: dict[str, Any],
    samples_per_shard: int,
    overwrite: bool,
    total: int | None = None,
    left_out: Counter[str] | None = None,
) -> None:
    """Write the pairs into shards and print what was written and what was left out.

    A stopped run continues when it is started again. A complete one is not changed.

    Args:
        pairs: in the same order each time.
        out: the folder of the shards.
        provenance: where the pairs come from, and every setting that matters. A resumed run must have the same.
        samples_per_shard: how many pairs a shard holds.
        overwrite: delete what an earlier run left in `out`.
        total: how many pairs there are, for the progress line.
        left_out: reasons and counts by the converter itself, which may go on counting while `pairs` is read.

    Raises:
        UserError: `out` holds other data, not one pair could be converted, or the disk is full.
    """
    folder = Path(out)
    if (folder / FILE_NAME).exists() and not overwrite:
        if load_manifest(folder).provenance != provenance:
            raise UserError(f"{folder}: already holds other shards; name another folder or give --overwrite true")
        print(f"{folder}: is already complete; if images were changed since, give --overwrite true")
        return
    resumed = (folder / JOURNAL).exists() and not overwrite
    bad: Counter[str] = Counter()
    seen: set[str] = set()
    with ShardWriter(folder, samples_per_shard, provenance=provenance, overwrite=overwrite, resume=True) as writer:
        if resumed:
            print(f"{folder}: continuing after {len(writer)} pairs")
        with counter("convert", total) as count:
            for pair in pairs:
                count()
                if pair.key in seen:
                    bad["whose key stands there twice"] += 1
                    print(f"left out {pair.key}: an earlier pair has the same key")
                elif pair.key not in writer:
                    _write(writer, pair, bad)
                seen.add(pair.key)
    manifest = writer.close()
    print(f"{folder}: {manifest.nsamples} pairs in {len(manifest.shardlist)} shards")
    for name, held in manifest.counts().items():
        if isinstance(held, dict):
            words = ", ".join(f"{value} {number}" for value, number in held.items())
            print(f"  {name}: {words or 'not known'}")
    for reason, times in sorted((bad + (left_out or Counter())).items()):
        print(f"  left out: {times} {reason}")


def _write(writer: ShardWriter, pair: FoundPair, bad: Counter[str]) -> None:
    try:
        chosen, rejected = (_read(path) for path in (pair.chosen, pair.rejected))
    except FileNotFoundError as error:
        bad["without an image file"] += 1
        print(f"left out {pair.key}: {error.filename} does not exist")
    except UserError as error:
        bad["with an image that cannot be read"] += 1
        print(f"left out {pair.key}: {error}")
    else:
        if same_image(chosen[1], rejected[1]):
            bad[SAME] += 1
            print(f"left out {pair.key}: chosen and rejected are the same image")
        else:
            writer.write(pair.key, pair.metadata, chosen[0], rejected[0])


def _read(image: Path | StoredImage) -> tuple[bytes, Image]:
    data, name = (image.read(), image.name) if isinstance(image, StoredImage) else (read_file(image), str(image))
    return data, decode_image(data, name or "the image")
