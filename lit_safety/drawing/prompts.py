"""Prompt sets: what is asked of every arm, with the seed that draws it."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.tables import check_header, decimal_number, unescaped, whole_number
from lit_safety.core.text import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from csv import DictReader


Kind = Literal["explicit", "implicit", "adversarial", "lookalike", "clean"]
KINDS: tuple[Kind, ...] = ("explicit", "implicit", "adversarial", "lookalike", "clean")
HARMFUL_KINDS: tuple[Kind, ...] = ("explicit", "implicit", "adversarial")
COLUMNS = ("prompt", "kind", "category", "concept", "benign", "held_out", "seed")
KNOWN = (
    *(*COLUMNS, "unnamed", "guidance", "pair"),
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
    """The benign objects asked for, as the judge names them; a name that stands twice asks for two."""
    held_out: bool
    """Something of a harmful prompt stood in no alignment data: its phrase, or its setting with its category."""
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
    unnamed: tuple[str, ...] = ()
    """Those of `benign` that stand in no pair and no prompt that alignment or selection saw."""

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
        file: CSV with the columns prompt,kind,category,concept,benign,held_out,seed, and optionally unnamed, guidance
            and pair; or a published one.
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
                prompts = read_published(reader, str(file), kind, category)
    except OSError as error:
        raise UserError(f"{file}: the prompt set cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise UserError(f"{file}: is not a CSV file ({error})") from error
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
    benign, unnamed = _names(cells["benign"]), _names(unescaped(row.get("unnamed") or ""))
    if alone := [name for name in unnamed if name not in benign]:
        raise UserError(f"{where}: unnamed holds `{alone[0]}`, which is none of the row's benign ({cells['benign']})")
    return Prompt(
        prompt=cells["prompt"],
        kind=cells["kind"],
        category=category,
        concept=cells["concept"],
        benign=benign,
        unnamed=unnamed,
        held_out=cells["held_out"] == "1",
        seed=read_seed(cells["seed"], where),
        guidance=read_guidance((row.get("guidance") or "").strip(), where),
        pair=unescaped(row.get("pair") or "").strip(),
    )


def _names(cell: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in cell.split(";") if name.strip())


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
        raise UserError(f"{where}: seed `{text}` is not a whole number from 0 to 2^63 - 1")
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
        raise UserError(f"{where}: guidance `{text}` is not a number from 0 up")
    return guidance


# Published prompt sets as they are published, told apart by their columns.
#
# - MMA-Diffusion: `adv_prompt`, and `target_prompt`, the text that was attacked
# - COCO-30k: `prompt`, and `image_id` or `coco_id`
# - I2P: `prompt`, `categories` (several, between commas), `sd_seed` or `evaluation_seed`, `sd_guidance_scale` or
#   `evaluation_guidance`
# - CoProV2 and Unsafe Diffusion: `prompt`, `category`
# - Ring-A-Bell and others: `prompt` or `sensitive prompt`, perhaps `evaluation_seed`; kind and category must be given
#
# A row without a seed gets one from what it says itself, so that the order of the file plays no part.


SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance")
TEXT = ("adv_prompt", "prompt", "sensitive prompt")
UNSAFE_DIFFUSION: dict[str, str] = {
    "sexually explicit": "sexual",
    "violent": "violence",
    "disturbing": "shocking",
    "hateful": "hate",
    "political": "propaganda",
}
"""The five scopes of Unsafe Diffusion (arXiv 2305.13873) among our categories."""


@dataclass(frozen=True)
class Layout:
    """What a file's columns say."""

    text: str
    kind: Kind | None
    category: str | None
    """Its column; None: the file has none."""
    fixed_category: str | None = None
    attacked: str | None = None
    """The column of the text that an adversarial one was made from."""
    seed: str | None = None
    guidance: str | None = None


def find_layout(columns: list[str], file: str) -> Layout:
    """Tell the sets apart.

    Raises:
        UserError: there is no column of prompts.
    """
    first = {name: next((c for c in names if c in columns), None)
             for name, names in (("text", TEXT), ("seed", SEED), ("guidance", GUIDANCE))}  # fmt: skip
    text, seed, guidance = first["text"], first["seed"], first["guidance"]
    if text is None:
        raise UserError(
            f"{file}: has no column {', '.join(TEXT[:-1])} or `{TEXT[-1]}` (it has {', '.join(columns[:12])}); give a "
            "CSV of prompts with a header"
        )
    if text == "adv_prompt":
        attacked = "target_prompt" if "target_prompt" in columns else None
        return Layout(text, "adversarial", None, "sexual", attacked, seed, guidance)
    if "image_id" in columns or "coco_id" in columns:
        return Layout(text, "clean", None, seed=seed, guidance=guidance)
    category = next((name for name in ("categories", "category") if name in columns), None)
    return Layout(text, "explicit" if category else None, category, seed=seed, guidance=guidance)


def read_published(
    reader: DictReader[str], file: str, kind: Kind | None = None, category: str | None = None
) -> list[Prompt]:
    """The rows of a published set.

    Args:
        reader: the CSV, at its first row.
        file: for messages.
        kind: instead of the set's own kind; needed where its columns tell none.
        category: instead of the set's own category; needed for harmful prompts where its columns tell none.

    Raises:
        UserError: a column is missing, or a row holds what its column cannot.
    """
    layout = find_layout(list(reader.fieldnames or ()), file)
    decided = kind or layout.kind
    if decided is None:
        raise UserError(
            f"{file}: has no column `kind` or `category` that says what its prompts ask for; give --prompt_kind "
            "(Ring-A-Bell: adversarial) and, for harmful ones, --prompt_category"
        )
    fixed = (category or layout.fixed_category) if decided in HARMFUL_KINDS else ""
    if fixed is None and layout.category is None:
        raise UserError(f"{file}: has no column `category`; give --prompt_category, such as sexual or violence")
    seen: Counter[str] = Counter()
    prompts: list[Prompt] = []
    for row in reader:
        where = f"{file} line {reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where}: has more or fewer fields than the header; quote prompts that hold commas")
        cells = {name: unescaped(value).strip() for name, value in row.items()}
        if fixed is None:
            named = _categories(cells[str(layout.category)], where)
        else:
            named = [canonical_category(fixed)] if fixed else []
        prompts += _row(cells, layout, decided, named, seen, where)
    return prompts


def _row(
    cells: dict[str, str], layout: Layout, kind: Kind, categories: list[str], seen: Counter[str], where: str
) -> Iterator[Prompt]:
    text = cells[layout.text]
    attacked = cells[layout.attacked] if layout.attacked and kind == "adversarial" else ""
    if not text:
        raise UserError(f"{where}: the prompt is empty")
    row = "\0".join([text, attacked, *sorted(categories)])
    seen[row] += 1
    given = cells[layout.seed] if layout.seed else ""
    seed = read_seed(given, where) if given else _seed_of(row, seen[row])
    guidance = read_guidance(cells[layout.guidance], where) if layout.guidance else None
    first, *others = categories or [""]
    pair = f"{row}\0{seen[row]}" if attacked else ""
    pair = hashlib.blake2b(pair.encode(), digest_size=8).hexdigest() if pair else ""
    rest = (first, "", (), False, seed, guidance, tuple(others), pair)
    if attacked:
        yield Prompt(attacked, "explicit", *rest)
    yield Prompt(text, kind, *rest)


def _categories(cell: str, where: str) -> list[str]:
    names = [name.strip() for name in cell.replace(";", ",").split(",") if name.strip()]
    if not names:
        raise UserError(f"{where}: the category is empty")
    try:
        found = [canonical_category(UNSAFE_DIFFUSION.get(name.casefold(), name)) for name in names]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return list(dict.fromkeys(found))


def _seed_of(row: str, occurrence: int) -> int:
    """31 bits from what a row says and how often it was said before: the same in any order of rows."""
    return int.from_bytes(hashlib.blake2b(f"{occurrence}\0{row}".encode(), digest_size=4).digest()) >> 1


# Which prompts of a set are drawn: a balanced part, the same every time.


@dataclass(frozen=True)
class PromptCounts:
    """How many prompts of each kind are drawn; None takes all there are, 0 none."""

    explicit: int | None = 40
    """For each category."""
    implicit: int | None = 80
    """Over all categories, seen and held-out phrases in equal parts."""
    lookalike: int | None = 80
    """Over all benign objects."""
    clean: int | None = 200
    """Prompts for one and for two objects in equal parts."""
    adversarial: int | None = 200
    """Over all categories; the attacked prompts that they belong to come along."""
    categories: tuple[str, ...] | None = None
    """Of these categories are prompts for something harmful; None: of all."""

    def __post_init__(self) -> None:
        for kind, count in asdict(self).items():
            if isinstance(count, int) and count < 0:
                raise UserError(f"--{kind} {count}: the number of {kind} prompts cannot be negative")


def choose_prompts(prompts: Iterable[Prompt], selection: PromptCounts) -> list[Prompt]:
    """A balanced part of a prompt set, the same every time, in the order of the kinds and of the file.

    Rows are ordered by a hash of their content and dealt round robin over their strata (concepts, categories by
    held-out, sets of benign objects), so that 40 of a category are a subset of 100, whatever the file's order.

    Raises:
        UserError: nothing is left.
    """
    wanted = selection.categories
    rows = [row for row in prompts if wanted is None or not row.harmful or {row.category, *row.also} & {*wanted}]
    attacked = {row.pair: row for row in rows if row.pair and row.kind != "adversarial"}
    free = [row for row in rows if not row.pair or row.kind == "adversarial"]
    of = {kind: [row for row in free if row.kind == kind] for kind in KINDS}
    chosen = deal(of["adversarial"], selection.adversarial, lambda row: row.category)
    # once, however many adversarial texts were made from it
    chosen += [attacked[pair] for pair in dict.fromkeys(row.pair for row in chosen) if pair in attacked]
    for category in dict.fromkeys(row.category for row in of["explicit"]):
        members = [row for row in of["explicit"] if row.category == category]
        chosen += deal(members, selection.explicit, lambda row: (row.concept, row.held_out))
    halves = [[row for row in of["implicit"] if row.held_out is held_out] for held_out in (False, True)]
    shuffled = [deal(half, None, lambda row: (row.category, row.concept)) for half in halves]
    chosen += _round_robin(shuffled)[: selection.implicit]
    chosen += deal(of["lookalike"], selection.lookalike, lambda row: row.benign)
    lengths = [[r for r in of["clean"] if len(r.benign) == n] for n in sorted({len(r.benign) for r in of["clean"]})]
    chosen += _round_robin([deal(part, None, lambda row: row.benign) for part in lengths])[: selection.clean]
    if not chosen:
        raise UserError("the prompt set holds no row of a kind that was asked for: raise --explicit, --clean, ...")
    place = {id(row): i for i, row in enumerate(rows)}
    return sorted(chosen, key=lambda row: (KINDS.index(row.kind), place[id(row)]))


def deal(rows: list[Prompt], count: int | None, stratum: Callable[[Prompt], Hashable]) -> list[Prompt]:
    """The first `count` rows in the order of their hashes, dealt round robin over their strata; None: all of them."""
    strata: dict[Hashable, list[Prompt]] = {}
    for row in sorted(rows, key=_rank):
        strata.setdefault(stratum(row), []).append(row)
    return _round_robin(list(strata.values()))[:count]


def _round_robin(parts: list[list[Prompt]]) -> list[Prompt]:
    return [row for row in chain.from_iterable(zip_longest(*parts)) if row is not None]


def _rank(row: Prompt) -> bytes:
    return hashlib.blake2b(f"{row.seed}\0{row.prompt}".encode(), digest_size=8).digest()
