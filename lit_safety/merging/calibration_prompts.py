"""Choose the prompts that experts are compared on: as many of each category, the same ones every time."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path

from lit_safety.data.categories import canonical_category
from lit_safety.data.sample import parse_metadata
from lit_safety.data.source import open_source
from lit_safety.data.tarindex import OpenShard
from lit_safety.errors import UserError


def calibration_prompts(source: str | Sequence[str], count: int, categories: Sequence[str] | None = None) -> list[str]:
    """Up to ``count`` different prompts of a CSV file, or of shards in any form that a datamodule takes.

    A prompt about several categories stands among those of each of them, and is taken once.

    Raises:
        UserError: the source cannot be read, does not say the categories that are asked for, or no prompt is left.
    """
    wanted = None if categories is None else {canonical_category(name) for name in categories}
    if wanted is not None and not has_categories(source):
        raise UserError(f"--calibration.categories: {source} has no column `category`; leave them out, or add it")
    by_category: dict[str, set[str]] = {}
    for prompt, found in _of_csv(Path(str(source))) if _is_csv(source) else _of_shards(source):
        for category in found or ("",):
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


def has_categories(source: str | Sequence[str]) -> bool:
    """Whether ``source`` says what its prompts are about: any but a CSV file without the column `category`.

    Raises:
        UserError: it is a CSV file that cannot be read, or has no prompts.
    """
    if not _is_csv(source):
        return True
    with _opened(Path(str(source))) as reader:
        return "category" in (reader.fieldnames or [])


def _is_csv(source: str | Sequence[str]) -> bool:
    return isinstance(source, str) and source.endswith(".csv")


def _of_csv(file: Path) -> Iterator[tuple[str, Sequence[str]]]:
    with _opened(file) as reader:
        categorised = "category" in (reader.fieldnames or [])
        for row in reader:
            named = [name for name in (row.get("category") or "").split(",") if name.strip()]  # "hate, violence" is two
            if named or not categorised:
                yield (row["prompt"] or "").strip(), [canonical_category(name) for name in named]


@contextmanager
def _opened(file: Path) -> Iterator[csv.DictReader[str]]:
    """The rows of a CSV file with a column `prompt`; what goes wrong while they are read names the file."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            if "prompt" not in (reader.fieldnames or []):
                raise UserError(f"--calibration.prompts {file}: has no column `prompt`")
            yield reader
    except OSError as error:
        raise UserError(f"--calibration.prompts {file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--calibration.prompts {file}: is no UTF-8 CSV file ({error})") from error


def _of_shards(given: str | Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    source = open_source(given, "--calibration.prompts")
    for path, entry in zip(source.paths, source.manifest.shardlist, strict=True):
        shard = OpenShard(path, entry.nsamples)
        try:
            for number in range(entry.nsamples):
                metadata = parse_metadata(shard.read_member(number, "json"), shard.where(number))
                if metadata.prompt_kind == "harmful":
                    yield metadata.prompt, metadata.categories
        finally:
            shard.close()


def _rank(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
