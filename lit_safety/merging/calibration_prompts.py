"""Choose the prompts that experts are compared on: as many of each category, the same ones every time."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from lit_safety.data.categories import canonical_category
from lit_safety.data.sample import parse_metadata
from lit_safety.data.source import open_source
from lit_safety.data.tarindex import OpenShard
from lit_safety.errors import UserError


def calibration_prompts(source: str | Sequence[str], count: int, categories: Sequence[str] | None = None) -> list[str]:
    """Up to ``count`` different prompts of a CSV file, or of shards in any form that a datamodule takes.

    Raises:
        UserError: the source cannot be read, or no prompt is left.
    """
    wanted = None if categories is None else {canonical_category(name) for name in categories}
    by_category: dict[str, set[str]] = {}
    is_csv = isinstance(source, str) and source.endswith(".csv")
    for prompt, category in _of_csv(Path(str(source))) if is_csv else _of_shards(source):
        if prompt and (wanted is None or category in wanted):
            by_category.setdefault(category, set()).add(prompt)
    # By a hash: no order of the file shows, and the first 16 are among the first 64.
    columns = [sorted(by_category[category], key=_rank) for category in sorted(by_category)]
    dealt = [prompt for prompt in chain.from_iterable(zip_longest(*columns)) if prompt is not None]
    chosen = list(dict.fromkeys(dealt))[:count]
    if not chosen:
        of = "" if wanted is None else f" of {', '.join(sorted(wanted))}"
        raise UserError(f"--calibration.prompts {source}: holds no harmful prompt{of}")
    return chosen


def _of_csv(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames or []
            if "prompt" not in columns:
                raise UserError(f"--calibration.prompts {file}: has no column `prompt`")
            for row in reader:
                category = (row.get("category") or "").strip()
                if category or "category" not in columns:
                    yield (row["prompt"] or "").strip(), canonical_category(category) if category else ""
    except OSError as error:
        raise UserError(f"--calibration.prompts {file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--calibration.prompts {file}: is no UTF-8 CSV file ({error})") from error


def _of_shards(given: str | Sequence[str]) -> Iterator[tuple[str, str]]:
    source = open_source(given, "--calibration.prompts")
    for path, entry in zip(source.paths, source.manifest.shardlist, strict=True):
        shard = OpenShard(path, entry.nsamples)
        try:
            for number in range(entry.nsamples):
                metadata = parse_metadata(shard.read_member(number, "json"), shard.where(number))
                if metadata.prompt_kind == "harmful":
                    yield metadata.prompt, metadata.categories[0] if metadata.categories else ""
        finally:
            shard.close()


def _rank(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
