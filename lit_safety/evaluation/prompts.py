"""Prompt sets: what is asked of every arm, with the seed that draws it."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.data.categories import canonical_category
from lit_safety.data.converters.table import check_header, decimal_number, unescaped, whole_number
from lit_safety.errors import UserError
from lit_safety.text_files import read_text

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["explicit", "implicit", "adversarial", "lookalike", "clean"]
KINDS: tuple[Kind, ...] = ("explicit", "implicit", "adversarial", "lookalike", "clean")
HARMFUL_KINDS: tuple[Kind, ...] = ("explicit", "implicit", "adversarial")
COLUMNS = ("prompt", "kind", "category", "concept", "benign", "held_out", "seed")
KNOWN = (
    *(*COLUMNS, "guidance", "pair"),
    *("adv_prompt", "target_prompt", "sensitive prompt", "categories", "image_id", "coco_id"),
    *("evaluation_seed", "sd_seed", "evaluation_guidance", "sd_guidance_scale"),
)
"""Columns that are read, of our own files and of published ones, whatever their case and the blanks around them."""


@dataclass(frozen=True)
class Prompt:
    """One row: a prompt and the seed of its drawing."""

    prompt: str
    kind: Kind
    """explicit names the harm, implicit means it without naming it, adversarial was searched for to draw it;
    lookalike and clean ask for nothing harmful."""
    category: str
    """Canonical category of a harmful prompt, else empty."""
    concept: str
    """The harm asked for, as the judge names it; empty where the prompt set names none."""
    benign: tuple[str, ...]
    """The benign objects asked for, as the judge names them."""
    held_out: bool
    """The phrase stood in no alignment data."""
    seed: int
    """Seed of the drawing's initial noise."""
    guidance: float | None = None
    """The row's own guidance scale; None: that of the run."""
    also: tuple[str, ...] = ()
    """Further categories of a harmful prompt."""
    pair: str = ""
    """The same for an attacked prompt and its adversarial text; empty: no such pair."""
    user: str | None = None
    """Whom a pipeline with a user adapter draws it for; None: the null user."""

    def identity(self) -> dict[str, Any]:
        """All that the row says, without what it leaves open."""
        return {key: value for key, value in asdict(self).items() if key in COLUMNS or value not in (None, (), "")}

    @property
    def harmful(self) -> bool:
        """Whether the prompt asks for something harmful."""
        return self.kind in HARMFUL_KINDS


def read_prompts(file: str | Path, kind: Kind | None = None, category: str | None = None) -> list[Prompt]:
    """All rows of a prompt set: a CSV of our own columns, or one of the published sets (`prompt_sets`).

    Args:
        file: CSV with the columns prompt,kind,category,concept,benign,held_out,seed, and optionally guidance and pair;
            or a published one.
        kind: what prompts a published file holds that does not say so.
        category: the harm that its prompts ask for, where it does not say so.

    Raises:
        UserError: the file is unreadable or has no rows, a column is missing, or a row holds what its column cannot.
    """
    try:
        with io.StringIO(read_text(file), newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = reader.fieldnames = check_header(reader.fieldnames or (), str(file), KNOWN)
            if "kind" in header or not header:
                missing = [column for column in COLUMNS if column not in header]
                if missing:
                    raise UserError(f"{file}: misses the column(s) {', '.join(missing)}; needed: {','.join(COLUMNS)}")
                rows = [(_parse(row, where), where) for row, where in
                        ((row, f"{file} line {reader.line_num}") for row in reader)]  # fmt: skip
                check_pairs(rows)
                prompts = [row for row, _ in rows]
            else:
                from lit_safety.evaluation.prompt_sets import read_published

                prompts = read_published(reader, str(file), kind, category)
    except OSError as error:
        raise UserError(f"{file}: the prompt set cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise UserError(f"{file}: is no CSV file ({error})") from error
    if not prompts:
        raise UserError(f"{file}: holds a header and no rows; nothing to draw")
    return prompts


def _parse(row: dict[str, str | None], where: str) -> Prompt:
    if None in row or None in row.values():
        raise UserError(f"{where}: has more or fewer fields than the header; quote prompts that hold commas")
    cells = {column: unescaped(row[column] or "").strip() for column in COLUMNS}
    if not cells["prompt"]:
        raise UserError(f"{where}: the prompt is empty")
    if cells["kind"] not in KINDS:
        raise UserError(f"{where}: kind `{cells['kind']}` is none of {', '.join(KINDS)}")
    harmful = cells["kind"] in HARMFUL_KINDS
    if harmful and not cells["category"]:
        raise UserError(f"{where}: an {cells['kind']} prompt needs a category")
    if not harmful and (cells["category"] or cells["concept"]):
        raise UserError(f"{where}: a {cells['kind']} prompt must have no category and no concept")
    if cells["held_out"] not in ("", "0", "1"):
        raise UserError(f"{where}: held_out is `{cells['held_out']}`, must be 0 or 1")
    try:
        category = canonical_category(cells["category"]) if harmful else ""
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Prompt(
        prompt=cells["prompt"],
        kind=cells["kind"],
        category=category,
        concept=cells["concept"],
        benign=tuple(name.strip() for name in cells["benign"].split(";") if name.strip()),
        held_out=cells["held_out"] == "1",
        seed=read_seed(cells["seed"], where),
        guidance=read_guidance((row.get("guidance") or "").strip(), where),
        pair=unescaped(row.get("pair") or "").strip(),
    )


def check_pairs(rows: Sequence[tuple[Prompt, str]]) -> None:
    """Complain about rows with a `pair` that would not be drawn, or not be counted with their partner.

    A pair is one explicit row, the attacked prompt, and the adversarial rows that were made from it. Adversarial rows
    without the other are drawn and counted by themselves, which is said on stderr.

    Args:
        rows: each with its place in the file, for messages.

    Raises:
        UserError: an explicit row's partner is absent, a pair has two of them, or a row is of a kind or category that
            its pair cannot hold.
    """
    attacked: dict[str, tuple[Prompt, str]] = {}
    for row, where in rows:
        if not row.pair or row.kind == "adversarial":
            continue
        if row.kind != "explicit":
            raise UserError(f"{where}: a {row.kind} prompt has the pair `{row.pair}`; only explicit and adversarial "
                            "prompts have one")  # fmt: skip
        if row.pair in attacked:
            raise UserError(f"{where}: the pair `{row.pair}` has an explicit prompt already, in {attacked[row.pair][1]}"
                            "; give each its own")  # fmt: skip
        attacked[row.pair] = (row, where)
    met, lonely = set(), []
    for row, where in rows:
        if not row.pair or row.kind != "adversarial":
            continue
        if row.pair not in attacked:
            lonely.append(where)
            continue
        if row.category != attacked[row.pair][0].category:
            raise UserError(f"{where}: is of the category {row.category}, and its pair `{row.pair}` in "
                            f"{attacked[row.pair][1]} is of {attacked[row.pair][0].category}")  # fmt: skip
        met.add(row.pair)
    if lonely:
        print(f"note    {lonely[0]}: its pair has no explicit prompt, so no figure compares it with that one "
              f"({len(lonely)} such rows)", file=sys.stderr)  # fmt: skip
    if alone := next((where for pair, (_, where) in attacked.items() if pair not in met), None):
        raise UserError(f"{alone}: its pair has no adversarial prompt, so it would never be drawn; add its row, or "
                        "leave `pair` empty")  # fmt: skip


def read_seed(text: str, where: str) -> int:
    """A seed, also one that a spreadsheet wrote as `41.0`.

    Raises:
        UserError: it is none.
    """
    seed = whole_number(text)
    if seed is None or not 0 <= seed < 2**63:
        raise UserError(f"{where}: seed `{text}` is no whole number from 0 to 2^63 - 1")
    return seed


def read_guidance(text: str, where: str) -> float | None:
    """A guidance scale; None where the cell is empty.

    Raises:
        UserError: it is none.
    """
    if not text:
        return None
    guidance = decimal_number(text)
    if guidance is None or not 0 <= guidance < float("inf"):
        raise UserError(f"{where}: guidance `{text}` is no number from 0 up")
    return guidance
