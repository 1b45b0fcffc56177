"""Published prompt sets as they are published, told apart by their columns.

- MMA-Diffusion: `adv_prompt`, and `target_prompt`, the text that was attacked
- COCO-30k: `prompt`, and `image_id` or `coco_id`
- I2P: `prompt`, `categories` (several, between commas), `sd_seed` or `evaluation_seed`, `sd_guidance_scale` or
  `evaluation_guidance`
- CoProV2 and Unsafe Diffusion: `prompt`, `category`
- Ring-A-Bell and others: `prompt` or `sensitive prompt`, perhaps `evaluation_seed`; kind and category must be given

A row without a seed gets one from what it says itself, so that the order of the file plays no part.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_safety.data.categories import canonical_category
from lit_safety.data.converters.table import unescaped
from lit_safety.errors import UserError
from lit_safety.evaluation.prompts import HARMFUL_KINDS, Kind, Prompt, read_guidance, read_seed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from csv import DictReader

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
