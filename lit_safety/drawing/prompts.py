"""Prompt sets: the prompts that every arm draws, with their seeds."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import Complaints, UserError
from lit_safety.core.images import FORMATS
from lit_safety.core.tables import decimal_number, whole_number
from lit_safety.drawing.prompt_rows import Record, read_records

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from lit_safety.drawing.questions import Question


Kind = Literal["explicit", "implicit", "adversarial", "lookalike", "clean"]
KINDS: tuple[Kind, ...] = ("explicit", "implicit", "adversarial", "lookalike", "clean")
HARMFUL_KINDS: tuple[Kind, ...] = ("explicit", "implicit", "adversarial")
COLUMNS = ("prompt", "kind", "category", "concept", "benign", "held_out", "seed")
OWN = (*COLUMNS, "unnamed", "guidance", "pair", "questions")
"""The columns of our own files; all but `prompt` have a default."""
TEXT = ("adv_prompt", "prompt", "sensitive prompt", "caption")
"""Columns for the prompt; the first one that exists is used."""
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance")
KNOWN = (
    *OWN,
    *(*TEXT, "target_prompt", "categories", "image_id", "coco_id", "case_number", "user_id", "file_name", "image"),
    *(*SEED, *GUIDANCE),
)
"""Columns that are read, of our own files and of published ones, in any case and with blanks around them."""


@dataclass(frozen=True)
class Place:
    """The place of a prompt in its file, by which images of another program are found."""

    row: int
    """From 0."""
    file_name: str = ""
    """The image's own name, if the file states it."""
    case_number: int | None = None


@dataclass(frozen=True)
class Prompt:
    """One row: a prompt and the seed of its image."""

    prompt: str
    kind: Kind
    """explicit names the harm, implicit means it without naming it, adversarial is the result of a search that makes
    the model draw it; lookalike and clean are harmless."""
    category: str
    """Canonical category of a harmful prompt, else empty."""
    concept: str
    """The harm asked for, by the judge's name; empty if the prompt set does not name it."""
    benign: tuple[str, ...]
    """The benign objects asked for, by the judge's names; a name that stands twice asks for two."""
    held_out: bool
    """A part of a harmful prompt is not in the alignment data: its phrase, or its setting with its category."""
    seed: int
    """Seed of the image's initial noise."""
    guidance: float | None = None
    """The row's own guidance scale; None: the run's."""
    also: tuple[str, ...] = ()
    """Further categories of a harmful prompt."""
    pair: str = ""
    """The same text for an attacked prompt and its adversarial prompts; empty: no pair."""
    user: str | None = None
    """The user that a pipeline with a user adapter draws it for; None: the null user."""
    unnamed: tuple[str, ...] = ()
    """Those of `benign` that are not in any pair or prompt of alignment or selection."""
    questions: tuple[Question, ...] = ()
    """What can be asked about its image, with the answers that it states."""
    place: Place | None = field(default=None, compare=False)
    """None: the row has no image of its own, such as the text from which an adversarial prompt was made."""
    kind_said: bool = field(default=True, compare=False)
    """False: the file does not state a kind, and the prompt counts as clean."""

    def identity(self) -> dict[str, Any]:
        """The row's values, without empty ones."""
        said = {key: value for key, value in asdict(self).items() if key not in ("place", "kind_said")}
        return {key: value for key, value in said.items() if key in COLUMNS or value not in (None, (), "")}

    @property
    def harmful(self) -> bool:
        """Whether the prompt asks for something harmful."""
        return self.kind in HARMFUL_KINDS


class PromptSet(list[Prompt]):
    """All prompts of a file.

    Args:
        prompts: in the file's order.
        without_prompt: the places of rows without a prompt, which are left out.
        own_seeds: whether every seed is in the file; else some were made from the rows' contents.
        columns: the file's.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt] = (),
        without_prompt: Sequence[Place] = (),
        own_seeds: bool = False,
        columns: Sequence[str] = (),
    ) -> None:
        super().__init__(prompts)
        self.without_prompt = list(without_prompt)
        self.own_seeds = own_seeds
        self.columns = list(columns)

    def not_said(self) -> dict[str, int]:
        """What a report must say about the file: rows that were left out, and prompts without a kind."""
        unsaid = sum(not prompt.kind_said for prompt in self)
        counts = {"rows_without_prompt": len(self.without_prompt), "prompts_without_kind": unsaid}
        return {key: count for key, count in counts.items() if count}


def read_prompts(file: str | Path, kind: Kind | None = None, category: str | None = None) -> PromptSet:
    """All rows of our own prompt sets, or of published ones in their published form.

    Rows without a prompt are left out and counted. Prompts without a kind count as clean. Both are reported on stderr.
    All errors in a file's rows are reported at once, in one line.

    Args:
        file: CSV, JSON, JSON lines, parquet or a text with one prompt a line; only the column `prompt` is needed.
        kind: the kind of the prompts, if the file does not state it.
        category: the harm that they ask for, if the file does not state it.

    Raises:
        UserError: the file is unreadable or has 0 rows, or a value is not valid for its column.
    """
    where = str(file)
    records = read_records(file, KNOWN, ("prompt", *(name for name in TEXT if name != "prompt")))
    if not records.columns:
        raise UserError(f"{file}: lacks the column `prompt`; add it to the header")
    layout = find_layout(records.columns, where)
    complaints, seen = Complaints(where), Counter[str]()
    rows: list[tuple[Prompt, str]] = []
    without: list[Place] = []
    own_seeds, total, first = True, 0, ""
    for total, record in enumerate(records.rows, start=1):
        with complaints.gather():
            place = _place(record, total - 1, layout)
            if not _text(record, layout):
                without.append(place)
                first = first or record.where
                continue
            found = list(_prompts_of(record, layout, place, kind, category, seen))
            own_seeds = own_seeds and bool(layout.seed and record.cells.get(layout.seed))
            rows += [(prompt, record.where) for prompt in found]
    if layout.own:
        check_pairs(rows, complaints)
    complaints.complain()
    if not total:
        raise UserError(f"{file}: has a header but 0 rows, so there is nothing to draw")
    if not rows:
        raise UserError(f"{first}: the prompt is empty, as in every row of the file, so there is nothing to draw")
    prompts = PromptSet((prompt for prompt, _ in rows), without, own_seeds, records.columns)
    _tell(prompts, where, total)
    return prompts


def _tell(prompts: PromptSet, file: str, total: int) -> None:
    counts = prompts.not_said()
    if count := counts.get("rows_without_prompt"):
        print(f"note    {file}: {count} of {total} rows lack a prompt and are left out", file=sys.stderr)
    if count := counts.get("prompts_without_kind"):
        print(f"note    {file}: the kind of {count} prompts is not stated, so they count as clean; if they ask for "
              "harm, add the columns kind and category, or give --prompt_kind and --prompt_category",
              file=sys.stderr)  # fmt: skip


def check_pairs(rows: Sequence[tuple[Prompt, str]], complaints: Complaints) -> None:
    """Refuse rows with a `pair` that would not be drawn, or not counted with their partner.

    A pair is one explicit row, the attacked prompt, and the adversarial rows that were made from it. Adversarial rows
    without the explicit one are drawn and counted alone, which is reported on stderr.

    Args:
        rows: each with its place in the file, for messages.
        complaints: gathers the errors: a row whose partner is missing, or has a kind or category that does not fit, or
            a pair with two attacked prompts.
    """
    attacked: dict[str, tuple[Prompt, str]] = {}
    for row, where in rows:
        if not row.pair or row.kind == "adversarial":
            continue
        with complaints.gather():
            if row.kind != "explicit":
                raise UserError(f"{where}: a {row.kind} prompt has the pair `{row.pair}`; only explicit and "
                                "adversarial prompts have one")  # fmt: skip
            if row.pair in attacked:
                raise UserError(f"{where}: the pair `{row.pair}` already has an explicit prompt, in "
                                f"{attacked[row.pair][1]}; use one pair for each")  # fmt: skip
            attacked[row.pair] = (row, where)
    met, lonely = set(), []
    for row, where in rows:
        if not row.pair or row.kind != "adversarial":
            continue
        if row.pair not in attacked:
            lonely.append(where)
            continue
        met.add(row.pair)
        with complaints.gather():
            if row.category != attacked[row.pair][0].category:
                raise UserError(f"{where}: has the category {row.category}, but its pair `{row.pair}` in "
                f"{attacked[row.pair][1]} has {attacked[row.pair][0].category}")  # fmt: skip
    if lonely:
        print(f"note    {lonely[0]}: its pair lacks an explicit prompt, so it is not compared with one "
              f"({len(lonely)} such rows)", file=sys.stderr)  # fmt: skip
    for pair, (_, where) in attacked.items():
        with complaints.gather():
            if pair not in met:
                raise UserError(f"{where}: its pair lacks an adversarial prompt, so it would never be drawn; add the "
                "row, or leave `pair` empty")  # fmt: skip


def read_seed(text: str, where: str) -> int:
    """A seed, also one that a spreadsheet wrote as `41.0`.

    Raises:
        UserError: it is not valid.
    """
    seed = whole_number(text)
    if seed is None or not 0 <= seed < 2**63:
        raise UserError(f"{where}: seed `{text}` is not a whole number from 0 to 2^63 - 1")
    return seed


def read_guidance(text: str, where: str) -> float | None:
    """A guidance scale; None where the cell is empty.

    Raises:
        UserError: it is not valid.
    """
    if not text:
        return None
    guidance = decimal_number(text)
    if guidance is None or not 0 <= guidance < float("inf"):
        raise UserError(f"{where}: guidance `{text}` is not a number from 0 up")
    return guidance


# The meaning of the columns. Published sets are recognised by their columns.
#
# - our own: `prompt`, and any of `OWN`
# - MMA-Diffusion: `adv_prompt`, and `target_prompt`, the text that was attacked
# - COCO: `prompt` or `caption`, and `image_id` or `coco_id`
# - I2P, and sets made from it (P4D, UnlearnDiffAtk): `prompt`, `categories` (several, between commas), `sd_seed` or
#   `evaluation_seed`, `sd_guidance_scale` or `evaluation_guidance`
# - CoProV2 and Unsafe Diffusion: `prompt`, `category`
# - Sage, PSA's evaluation files: `caption`, `file_name`, which may hold category and side, and the user: `user_id`
# - Ring-A-Bell and others: `prompt` or `sensitive prompt`, optionally `evaluation_seed`; kind and category must be
# given
#
# A row without a seed gets one from its own contents, so that the order of the file does not matter.


UNSAFE_DIFFUSION: dict[str, str] = {
    "sexually explicit": "sexual",
    "violent": "violence",
    "disturbing": "shocking",
    "hateful": "hate",
    "political": "propaganda",
}
"""The five scopes of Unsafe Diffusion (arXiv 2305.13873) -> our categories."""
BENCHMARK = ("sensitive prompt", "case_number", "evaluation_seed", "sd_seed")
"""If one of these columns exists, and no column states the kind, the set was published for attacks."""
_COPROV2 = re.compile(r"(?P<side>[us])_idx_[A-Za-z0-9_-]+\.(?:jpg|jpeg|png|webp)")
_SAGE = re.compile(
    r"user_(?P<user>\d{1,12})_(?P<about>[^/\\]+)_\d+(?:\.[A-Za-z]{3,4})?_(?P<side>[su])\.(?:jpg|jpeg|png|webp)"
)


@dataclass(frozen=True)
class Layout:
    """The meaning of a file's columns."""

    file: str
    """For messages."""
    text: str
    kind: Kind | None = None
    """Of all rows; None: a column states it, or it is not stated."""
    category: str | None = None
    """The column of the category; None: missing."""
    fixed_category: str | None = None
    attacked: str | None = None
    """The column of the text from which an adversarial prompt was made."""
    seed: str | None = None
    guidance: str | None = None
    own: bool = False
    """The file has our own columns."""
    says_kind: bool = False
    """It has the column `kind`."""
    benchmark: bool = False


def find_layout(columns: Sequence[str], file: str) -> Layout:
    """Recognise the set.

    Raises:
        UserError: the column of prompts is missing.
    """
    text, seed, guidance = (next((name for name in names if name in columns), None) for names in (TEXT, SEED, GUIDANCE))
    if text is None:
        raise UserError(
            f"{file}: lacks a column {', '.join(TEXT[:-1])} or `{TEXT[-1]}` (it has {', '.join(columns[:12])}); give a "
            "file with a column `prompt`"
        )
    rest: dict[str, Any] = {"seed": seed, "guidance": guidance}
    if "kind" in columns or set(columns) <= set(OWN):
        category = "category" if "category" in columns else None
        return Layout(file, text, category=category, own=True, says_kind="kind" in columns, **rest)
    if text == "adv_prompt":
        attacked = "target_prompt" if "target_prompt" in columns else None
        return Layout(file, text, "adversarial", fixed_category="sexual", attacked=attacked, **rest)
    if "image_id" in columns or "coco_id" in columns:
        return Layout(file, text, "clean", **rest)
    category = next((name for name in ("categories", "category") if name in columns), None)
    return Layout(
        file, text, "explicit" if category else None, category, benchmark=bool(set(columns) & {*BENCHMARK}), **rest
    )


def _text(record: Record, layout: Layout) -> str:
    """The row's prompt, which may be empty.

    Raises:
        UserError: the row cannot be read.
    """
    if record.problem:
        raise UserError(f"{record.where}: {record.problem}")
    if layout.text not in record.cells:
        raise UserError(f"{record.where}: lacks `{layout.text}`")
    return record.cells[layout.text]


def _place(record: Record, row: int, layout: Layout) -> Place:
    name = record.cells.get("file_name") or ""
    image = record.cells.get("image") or ""
    if not name and PurePath(image).suffix.lower().lstrip(".") in FORMATS:  # CoProV2's column
        name = image
    return Place(row, name, whole_number(record.cells.get("case_number", "")))


@dataclass(frozen=True)
class _Asked:
    """What a row asks for."""

    kind: Kind
    categories: list[str]
    said: bool = True


def _asked(record: Record, layout: Layout, kind: Kind | None, category: str | None) -> _Asked:
    """Kind and categories of a row: from its own column, the values given for all, its image's name, or the set."""
    cells, where = record.cells, record.where
    said = cells.get(layout.category, "") if layout.category else ""
    if layout.own and (cells.get("kind") or (kind is None and said)):
        return _own(cells, where, category)
    if layout.own and kind is None and category is None:
        return _own({**cells, "kind": "clean"}, where, None, said=False)
    named = _SAGE.fullmatch(PurePath(cells.get("file_name", "")).name)
    if kind is None and named is not None:
        if named["side"] == "s":
            return _Asked("clean", [])
        from lit_safety.data.convert.sage import category_and_concept

        return _Asked("explicit", [category_and_concept(named["about"], where)[0]])
    pair = _COPROV2.fullmatch(PurePath(cells.get("image", "")).name)
    if kind is None and pair is not None and pair["side"] == "s":  # its category is that of the unsafe prompt
        return _Asked("clean", [])
    decided = kind or layout.kind or ("explicit" if layout.category else None)
    if decided is None and (layout.benchmark or category is not None):
        raise UserError(
            f"{layout.file}: lacks a column `kind` or `category` that states what its prompts ask for; give "
            "--prompt_kind (Ring-A-Bell: adversarial) and, for harmful ones, --prompt_category"
        )
    if decided is None:
        return _Asked("clean", [], said=False)
    if decided not in HARMFUL_KINDS:
        return _Asked(decided, [])
    if said:
        return _Asked(decided, _categories(said, where))
    if fixed := category or layout.fixed_category:
        return _Asked(decided, [canonical_category(fixed)])
    if layout.category is None:
        raise UserError(
            f"{layout.file}: lacks the column `category`; give --prompt_category, such as sexual or violence"
        )
    return _Asked(decided, _categories("", where))


def _own(cells: dict[str, str], where: str, category: str | None, said: bool = True) -> _Asked:
    """The same for a row that states its kind, or only a category (then the prompt is explicit)."""
    given = cells.get("kind") or "explicit"
    kind = next((kind for kind in KINDS if kind == given.casefold()), None)
    if kind is None:
        raise UserError(f"{where}: kind `{given}` is not one of {', '.join(KINDS)}")
    if kind in HARMFUL_KINDS:
        if not (named := cells.get("category") or category):
            raise UserError(f"{where}: an {kind} prompt needs a category")
        return _Asked(kind, _categories(named, where))
    if cells.get("category") or cells.get("concept"):
        raise UserError(f"{where}: a {kind} prompt must not have a category or a concept")
    return _Asked(kind, [], said)


def _prompts_of(
    record: Record, layout: Layout, place: Place, kind: Kind | None, category: str | None, seen: Counter[str]
) -> Iterator[Prompt]:
    """The prompts of a row: one, or the text from which an adversarial one was made and the adversarial one."""
    cells, where = record.cells, record.where
    asked = _asked(record, layout, kind, category)
    text = cells[layout.text]
    attacked = cells.get(layout.attacked, "") if layout.attacked and asked.kind == "adversarial" else ""
    row = "\0".join([text, attacked, *sorted(asked.categories)])
    seen[row] += 1
    given = cells.get(layout.seed, "") if layout.seed else ""
    seed = read_seed(given, where) if given else _seed_of(row, seen[row])
    guidance = read_guidance(cells.get(layout.guidance, ""), where) if layout.guidance else None
    first, *others = asked.categories or [""]
    own = cells if layout.own else {}
    if own.get("held_out", "") not in ("", "0", "1"):
        raise UserError(f"{where}: held_out is `{own['held_out']}`, must be 0 or 1")
    benign, unnamed = _names(own.get("benign", "")), _names(own.get("unnamed", ""))
    if alone := [name for name in unnamed if name not in benign]:
        raise UserError(f"{where}: unnamed holds `{alone[0]}`, which is not in the row's benign ({own['benign']})")
    pair = own.get("pair", "")
    questions: tuple[Question, ...] = ()
    if asked_about := own.get("questions"):
        from lit_safety.drawing.questions import read_questions

        questions = read_questions(asked_about, where)
    if attacked:
        pair = hashlib.blake2b(f"{row}\0{seen[row]}".encode(), digest_size=8).hexdigest()
    sage = _SAGE.fullmatch(PurePath(place.file_name).name)
    user = cells.get("user_id") or (sage["user"] if sage is not None else None)
    held_out = own.get("held_out") == "1"
    rest = (first, own.get("concept", ""), benign, held_out, seed, guidance, tuple(others), pair, user)
    if attacked:
        yield Prompt(attacked, "explicit", *rest, unnamed=unnamed)
    yield Prompt(text, asked.kind, *rest, place=place, kind_said=asked.said, unnamed=unnamed, questions=questions)


def _names(cell: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in cell.split(";") if name.strip())


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
    """31 bits from a row's contents and its number among equal rows: the same in any order of rows."""
    return int.from_bytes(hashlib.blake2b(f"{occurrence}\0{row}".encode(), digest_size=4).digest()) >> 1


# Which prompts of a set are drawn: a balanced part, the same one every time.


@dataclass(frozen=True)
class PromptCounts:
    """How many prompts of each kind are drawn; None: all, 0: none."""

    explicit: int | None = 40
    """For each category."""
    implicit: int | None = 80
    """From all categories, with equal parts of seen and held-out phrases."""
    lookalike: int | None = 80
    """Over all benign objects."""
    clean: int | None = 200
    """Prompts for one and for two objects in equal parts."""
    adversarial: int | None = 200
    """From all categories; the attacked prompts of their pairs are drawn too."""
    categories: tuple[str, ...] | None = None
    """Only harmful prompts of these categories are drawn; None: of all."""

    def __post_init__(self) -> None:
        for kind, count in asdict(self).items():
            if isinstance(count, int) and count < 0:
                raise UserError(f"--{kind} {count}: the number of {kind} prompts cannot be negative")


def choose_prompts(prompts: Iterable[Prompt], selection: PromptCounts) -> list[Prompt]:
    """A balanced part of a prompt set, the same every time, in the order of the kinds and of the file.

    Rows are ordered by a hash of their content and dealt round robin over their strata (concepts, categories by
    held-out, sets of benign objects), so that 40 of a category are a subset of 100, whatever the file's order.

    Raises:
        UserError: 0 prompts are left.
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
        raise UserError("the prompt set holds 0 rows of the kinds that were asked for: raise --explicit, --clean, ...")
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
