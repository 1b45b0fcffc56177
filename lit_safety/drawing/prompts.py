"""Prompt sets: what is asked of every arm, with the seed that draws it."""

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
"""Where the prompt stands, the first that is there."""
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance")
KNOWN = (
    *OWN,
    *(*TEXT, "target_prompt", "categories", "image_id", "coco_id", "case_number", "user_id", "file_name", "image"),
    *(*SEED, *GUIDANCE),
)
"""Columns that are read, of our own files and of published ones, whatever their case and the blanks around them."""


@dataclass(frozen=True)
class Place:
    """Where a prompt stands in its file: by this, images that another program drew are found."""

    row: int
    """From 0."""
    file_name: str = ""
    """The image's own name, where the file says one."""
    case_number: int | None = None


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
    questions: tuple[Question, ...] = ()
    """What can be asked about its image, with the answers that it states."""
    place: Place | None = field(default=None, compare=False)
    """None: the row has no image of its own, as the text that an adversarial prompt of the same row was made from."""
    kind_said: bool = field(default=True, compare=False)
    """False: the file says no kind, and the prompt counts as clean."""

    def identity(self) -> dict[str, Any]:
        """All that the row says, without what it leaves open."""
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
        without_prompt: the places of rows that hold no prompt and are left out.
        own_seeds: whether every seed stands in the file; else some were made from what the rows say.
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
        """What a report must say of the file: rows that were left out, and prompts of which it says no kind."""
        unsaid = sum(not prompt.kind_said for prompt in self)
        counts = {"rows_without_prompt": len(self.without_prompt), "prompts_without_kind": unsaid}
        return {key: count for key, count in counts.items() if count}


def read_prompts(file: str | Path, kind: Kind | None = None, category: str | None = None) -> PromptSet:
    """All rows of a prompt set of our own, or of a published one as it is published.

    Rows without a prompt are left out and counted, prompts of which nothing says the kind count as clean; both are told
    on stderr. All that is wrong with a file's rows is said at once, in one line.

    Args:
        file: CSV, JSON, JSON lines, parquet or a text with a prompt a line; `prompt` is the one column that is needed.
        kind: what the prompts are, of a file that does not say so.
        category: the harm that they ask for, of a file that does not say so.

    Raises:
        UserError: the file is unreadable or has no rows, or a row holds what its column cannot.
    """
    where = str(file)
    records = read_records(file, KNOWN, ("prompt", *(name for name in TEXT if name != "prompt")))
    if not records.columns:
        raise UserError(f"{file}: misses the column `prompt`; needed is a header with it")
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
        raise UserError(f"{file}: holds a header and no rows; nothing to draw")
    if not rows:
        raise UserError(f"{first}: the prompt is empty, as in every row of the file; nothing to draw")
    prompts = PromptSet((prompt for prompt, _ in rows), without, own_seeds, records.columns)
    _tell(prompts, where, total)
    return prompts


def _tell(prompts: PromptSet, file: str, total: int) -> None:
    counts = prompts.not_said()
    if count := counts.get("rows_without_prompt"):
        print(f"note    {file}: {count} of {total} rows hold no prompt and are left out", file=sys.stderr)
    if count := counts.get("prompts_without_kind"):
        print(f"note    {file}: says of {count} prompts no kind, so they count as clean; if they ask for harm, add the "
              "columns kind and category, or give --prompt_kind and --prompt_category", file=sys.stderr)  # fmt: skip


def check_pairs(rows: Sequence[tuple[Prompt, str]], complaints: Complaints) -> None:
    """Complain about rows with a `pair` that would not be drawn, or not be counted with their partner.

    A pair is one explicit row, the attacked prompt, and the adversarial rows that were made from it. Adversarial rows
    without the other are drawn and counted by themselves, which is said on stderr.

    Args:
        rows: each with its place in the file, for messages.
        complaints: takes a row whose partner is absent, or of a kind or category that its pair cannot hold, and a pair
            with two attacked prompts.
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
                raise UserError(f"{where}: the pair `{row.pair}` has an explicit prompt already, in "
                                f"{attacked[row.pair][1]}; give each its own")  # fmt: skip
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
                raise UserError(f"{where}: is of the category {row.category}, and its pair `{row.pair}` in "
                                f"{attacked[row.pair][1]} is of {attacked[row.pair][0].category}")  # fmt: skip
    if lonely:
        print(f"note    {lonely[0]}: its pair has no explicit prompt, so no figure compares it with that one "
              f"({len(lonely)} such rows)", file=sys.stderr)  # fmt: skip
    for pair, (_, where) in attacked.items():
        with complaints.gather():
            if pair not in met:
                raise UserError(f"{where}: its pair has no adversarial prompt, so it would never be drawn; add its "
                                "row, or leave `pair` empty")  # fmt: skip


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


# What the columns say. Published sets are told apart by theirs.
#
# - our own: `prompt`, and perhaps any of `OWN`
# - MMA-Diffusion: `adv_prompt`, and `target_prompt`, the text that was attacked
# - COCO: `prompt` or `caption`, and `image_id` or `coco_id`
# - I2P, and what was made of it (P4D, UnlearnDiffAtk): `prompt`, `categories` (several, between commas), `sd_seed` or
#   `evaluation_seed`, `sd_guidance_scale` or `evaluation_guidance`
# - CoProV2 and Unsafe Diffusion: `prompt`, `category`
# - Sage, PSA's evaluation files: `caption`, `file_name`, which may tell category and side, and who is asked: `user_id`
# - Ring-A-Bell and others: `prompt` or `sensitive prompt`, perhaps `evaluation_seed`; kind and category must be given
#
# A row without a seed gets one from what it says itself, so that the order of the file plays no part.


UNSAFE_DIFFUSION: dict[str, str] = {
    "sexually explicit": "sexual",
    "violent": "violence",
    "disturbing": "shocking",
    "hateful": "hate",
    "political": "propaganda",
}
"""The five scopes of Unsafe Diffusion (arXiv 2305.13873) among our categories."""
BENCHMARK = ("sensitive prompt", "case_number", "evaluation_seed", "sd_seed")
"""Where one of these stands, and nothing says what is asked for, the set was published to be attacked with."""
_COPROV2 = re.compile(r"(?P<side>[us])_idx_[A-Za-z0-9_-]+\.(?:jpg|jpeg|png|webp)")
_SAGE = re.compile(
    r"user_(?P<user>\d{1,12})_(?P<about>[^/\\]+)_\d+(?:\.[A-Za-z]{3,4})?_(?P<side>[su])\.(?:jpg|jpeg|png|webp)"
)


@dataclass(frozen=True)
class Layout:
    """What a file's columns say."""

    file: str
    """For messages."""
    text: str
    kind: Kind | None = None
    """Of all rows; None: a column says it, or nothing does."""
    category: str | None = None
    """Its column; None: the file has none."""
    fixed_category: str | None = None
    attacked: str | None = None
    """The column of the text that an adversarial one was made from."""
    seed: str | None = None
    guidance: str | None = None
    own: bool = False
    """The file is of our own columns, each of which means what it says there."""
    says_kind: bool = False
    """It has the column `kind`."""
    benchmark: bool = False


def find_layout(columns: Sequence[str], file: str) -> Layout:
    """Tell the sets apart.

    Raises:
        UserError: there is no column of prompts.
    """
    text, seed, guidance = (next((name for name in names if name in columns), None) for names in (TEXT, SEED, GUIDANCE))
    if text is None:
        raise UserError(
            f"{file}: has no column {', '.join(TEXT[:-1])} or `{TEXT[-1]}` (it has {', '.join(columns[:12])}); give a "
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
    """The row's prompt; empty where it holds none.

    Raises:
        UserError: the row cannot be read.
    """
    if record.problem:
        raise UserError(f"{record.where}: {record.problem}")
    if layout.text not in record.cells:
        raise UserError(f"{record.where}: has no `{layout.text}`")
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
    """Kind and categories of a row: by its own column, by what was given for all, by its image's name, by the set."""
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
            f"{layout.file}: has no column `kind` or `category` that says what its prompts ask for; give --prompt_kind "
            "(Ring-A-Bell: adversarial) and, for harmful ones, --prompt_category"
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
        raise UserError(f"{layout.file}: has no column `category`; give --prompt_category, such as sexual or violence")
    return _Asked(decided, _categories("", where))


def _own(cells: dict[str, str], where: str, category: str | None, said: bool = True) -> _Asked:
    """The same of a row that says its kind, or a category: the prompt is explicit then."""
    given = cells.get("kind") or "explicit"
    kind = next((kind for kind in KINDS if kind == given.casefold()), None)
    if kind is None:
        raise UserError(f"{where}: kind `{given}` is none of {', '.join(KINDS)}")
    if kind in HARMFUL_KINDS:
        if not (named := cells.get("category") or category):
            raise UserError(f"{where}: an {kind} prompt needs a category")
        return _Asked(kind, _categories(named, where))
    if cells.get("category") or cells.get("concept"):
        raise UserError(f"{where}: a {kind} prompt must have no category and no concept")
    return _Asked(kind, [], said)


def _prompts_of(
    record: Record, layout: Layout, place: Place, kind: Kind | None, category: str | None, seen: Counter[str]
) -> Iterator[Prompt]:
    """The prompts of a row: one, or an adversarial one behind the text that it was made from."""
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
        raise UserError(f"{where}: unnamed holds `{alone[0]}`, which is none of the row's benign ({own['benign']})")
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
