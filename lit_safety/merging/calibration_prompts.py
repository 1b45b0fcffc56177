"""Choose the prompts that experts are compared on: as many of each category, the same ones every time."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lit_safety.data.categories import canonical_category
from lit_safety.data.converters.table import check_header, unescaped
from lit_safety.data.progress import counter
from lit_safety.data.sample import parse_metadata
from lit_safety.data.select import Filter, Selection, take
from lit_safety.data.source import Source, open_source
from lit_safety.errors import UserError
from lit_safety.text_files import NotUtf8, read_text

KEY = "--calibration.prompts"


def calibration_prompts(source: str | Sequence[str], count: int, categories: Sequence[str] | None = None) -> list[str]:
    """Up to ``count`` different prompts of a CSV file, or of shards in any form that a datamodule takes.

    A prompt about several categories stands among those of each of them, and is taken once.

    Raises:
        UserError: the source cannot be read, does not say the categories that are asked for, or no prompt is left.
    """
    wanted = _wanted(source, categories)
    by_category: dict[str, set[str]] = {}
    for prompt, found in _of_csv(Path(str(source))) if _is_csv(source) else _of_shards(source, wanted):
        for category in found or ("",):
            if prompt and (wanted is None or category in wanted):
                by_category.setdefault(category, set()).add(prompt)
    # By a hash: no order of the file shows, and the first 16 are among the first 64.
    columns = [sorted(by_category[category], key=_rank) for category in sorted(by_category)]
    dealt = [prompt for prompt in chain.from_iterable(zip_longest(*columns)) if prompt is not None]
    chosen = list(dict.fromkeys(dealt))[:count]
    if not chosen:
        raise _none_found(source, wanted)
    return chosen


def check_prompts(source: str | Sequence[str], categories: Sequence[str] | None = None) -> None:
    """Complain where `calibration_prompts` would find none; of shards the manifest tells it, and nothing is fetched.

    Raises:
        UserError: as `calibration_prompts`.
    """
    if _is_csv(source):
        calibration_prompts(source, 1, categories)
    elif not _harmful(source, wanted := _wanted(source, categories))[1].total:
        raise _none_found(source, wanted)


def _wanted(source: str | Sequence[str], categories: Sequence[str] | None) -> set[str] | None:
    if categories is None:
        return None
    if not has_categories(source):
        raise UserError(f"--calibration.categories: {source} has no column `category`; leave them out, or add it")
    try:
        return {canonical_category(name) for name in categories}
    except UserError as error:
        raise UserError(f"--calibration.categories: {error}") from error


def _none_found(source: str | Sequence[str], wanted: set[str] | None) -> UserError:
    of = "" if wanted is None else f" of {', '.join(sorted(wanted))}"
    return UserError(f"{KEY} {source}: holds no harmful prompt{of}")


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
            if None in row or None in row.values():
                raise UserError(f"{KEY} {file}, line {reader.line_num}: has more or fewer fields than the header")
            named = [name for name in (row.get("category") or "").split(",") if name.strip()]  # "hate, violence" is two
            try:
                found = [canonical_category(name) for name in named]
            except UserError as error:
                raise UserError(f"{KEY} {file}, line {reader.line_num}: {error}") from error
            if found or not categorised:
                yield unescaped(row["prompt"]).strip(), found


@contextmanager
def _opened(file: Path) -> Iterator[csv.DictReader[str]]:
    """The rows of a CSV file with a column `prompt`; what goes wrong while they are read names the file."""
    try:
        with io.StringIO(read_text(file), newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            reader.fieldnames = check_header(reader.fieldnames or [], f"{KEY} {file}", ("prompt", "category"))
            if "prompt" not in (reader.fieldnames or []):
                raise UserError(f"{KEY} {file}: has no column `prompt`")
            yield reader
    except OSError as error:
        raise UserError(f"{KEY} {file}: cannot be read ({error.strerror})") from error
    except NotUtf8 as error:
        raise UserError(f"{KEY} {error}") from error
    except csv.Error as error:
        raise UserError(f"{KEY} {file}: is no CSV file ({error})") from error


def _harmful(given: str | Sequence[str], wanted: set[str] | None) -> tuple[Source, Selection]:
    source = open_source(given, KEY)
    categories = None if wanted is None else tuple(sorted(wanted))
    return source, take(source, Filter(categories=categories, kinds=("harmful",)))


def _of_shards(given: str | Sequence[str], wanted: set[str] | None) -> Iterator[tuple[str, Sequence[str]]]:
    """Only the metadata of what takes part is read; what cannot be read is no prompt, and is told."""
    source, selection = _harmful(given, wanted)
    bad: list[UserError] = []
    with counter("reading prompts, shards", sum(count > 0 for count in selection.counts)) as tick:
        for number, count in enumerate(selection.counts):
            if not count:
                continue
            shard = source.open_shard(number)
            try:
                for index in range(count):
                    place = selection.number(number, index)
                    try:
                        metadata = parse_metadata(shard.read_member(place, "json"), shard.where(place))
                    except UserError as error:
                        bad.append(error)
                        continue
                    yield metadata.prompt, metadata.categories
            finally:
                shard.close()
            tick()
    if bad:
        rank_zero_warn(f"{KEY}: {len(bad)} samples cannot be read and give no prompt; the first: {bad[0]}")


def _rank(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
