"""What a world holds out of alignment, a check for files, and the prompt files that pass the check.

A figure for unnamed subjects is meaningful only if no file of the alignment names them. So code that writes pairs,
anchors, repair sets, masks or validation prompts of a world calls `check_held_out` on the files, and a test calls it on
the shipped files.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.tables import csv_lines
from lit_safety.core.text import load_json, read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

COLUMNS = ("prompt", "kind", "category", "concept", "benign", "unnamed", "held_out", "seed")
"""The columns of a world's prompt files."""


@dataclass(frozen=True)
class HeldOut:
    """Subjects and scenes that alignment must not see."""

    subjects: Mapping[str, Sequence[str]]
    """Name -> its synonyms, in upper or lower case; blanks, hyphens and underscores are the same.

    Plurals in -s and -es are found too.
    """
    scenes: Sequence[tuple[str, str]] = field(default=())
    """A category and words that must not appear together: a harm of this category in a prompt with these words."""

    @cached_property
    def _subject_of(self) -> dict[str, str]:
        return {_plain(word): name for name, words in self.subjects.items() for word in (name, *words)}

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        # the longest first, so that `red apple` is reported and not `apple`
        words = sorted(self._subject_of, key=len, reverse=True)
        if not words:
            return None
        return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?:e?s)?(?!\w)")

    def found_in(self, text: str, categories: Iterable[str] = ()) -> str | None:
        """The held-out thing that a text names; None: the text names none.

        Args:
            text: a prompt or any other text.
            categories: the canonical categories of the text's images.
        """
        plain = _plain(text)
        if self._pattern is not None and (found := self._pattern.search(plain)):
            name = self._subject_of[found[1]]
            return f"{name!r}" if _plain(name) == found[1] else f"{name!r} (as {found[1]!r})"
        about = set(categories)
        for category, words in self.scenes:
            if category in about and re.search(rf"(?<!\w){re.escape(_plain(words))}(?!\w)", plain):
                return f"{category} with {words!r}"
        return None


def check_held_out(held_out: HeldOut, files: Iterable[str | Path]) -> None:
    """Refuse files for alignment or selection that name something held out.

    Args:
        held_out: what the files must not name.
        files: folders of shards (every sample's prompt, concept and source are read), CSV files (every cell; a column
            `category` gives a row's category), and text files including JSON (every line).

    Raises:
        UserError: a held-out name was found (the message names the file, the sample or line, and the name), or a file
            cannot be read.
    """
    for file in files:
        for where, text, categories in _texts(Path(file)):
            if (found := held_out.found_in(text, categories)) is not None:
                raise UserError(
                    f"{where}: names {found}, which must not appear in files for alignment; remove it: `{text[:120]}`"
                )


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[-_]", " ", text.casefold()).split())


def _texts(file: Path) -> Iterator[tuple[str, str, list[str]]]:
    """For each text of a file: where it was found, the text, and its categories."""
    if file.is_dir():
        yield from _samples(file)
        return
    try:
        text = read_text(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if file.suffix.lower() != ".csv":
        yield from ((f"{file} line {number}", line, []) for number, line in enumerate(text.splitlines(), 1))
        return
    try:
        reader = csv.reader(text.splitlines(keepends=True), strict=True)
        columns: list[str] = []
        for cells in reader:
            where = f"{file} line {reader.line_num}"
            if reader.line_num == 1 and "prompt" in [cell.strip().casefold() for cell in cells]:
                columns = [cell.strip().casefold() for cell in cells]
                continue
            about = [
                cell for column, cell in zip(columns, cells, strict=False) if column == "category" and cell.strip()
            ]
            yield where, " ; ".join(cells), [canonical_category(cell) for cell in about]
    except csv.Error as error:
        raise UserError(f"{file}: is not a CSV file ({error})") from error


def _samples(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    from lit_safety.data.reading.source import open_source

    opened = open_source(str(folder), "shards")
    for number in range(len(opened.paths)):
        shard = opened.open_shard(number)
        try:
            for row in range(opened.manifest.shardlist[number].nsamples):
                _, members = shard.read(row)
                said: Any = load_json(members["json"])
                text = " ; ".join(str(said[name]) for name in ("prompt", "concept", "source") if said.get(name))
                yield shard.where(row), text, list(said.get("categories", ()))
        finally:
            shard.close()


def write_parts(
    folder: Path,
    rows: Callable[[str], Iterable[Mapping[str, str | int]]],
    u_val: HeldOut,
    u_test: HeldOut,
    trained: Sequence[str] = ("anchors",),
) -> None:
    """Writes the files of `trained`, val.csv and test.csv, in this order; each by one rename.

    Args:
        folder: the folder to write to.
        rows: gives the rows of each part, with the columns that `evaluate` reads.
        u_val: what no prompt of `trained` may name.
        u_test: what no prompt of `trained` or of validation may name.
        trained: the parts that training sees.

    Raises:
        UserError: a file would name something held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, forbidden in (*((one, (u_val, u_test)) for one in trained), ("val", (u_test,)), ("test", ())):
        unfinished, made = folder / f"{part}.part.csv", list(rows(part))
        columns = (*COLUMNS, "questions") if any("questions" in row for row in made) else COLUMNS
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            file.write(csv_lines([columns, *([row[name] for name in columns] for row in made)]))
        for held_out in forbidden:
            check_held_out(held_out, [unfinished])
        unfinished.rename(folder / f"{part}.csv")
