"""`lit_safety shards from-folder`: a CSV with prompt, chosen and rejected image, and what else is known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from lit_safety.data.convert.convert import FoundPair


REQUIRED = ("prompt", "chosen", "rejected")
TEXTS = ("concept", "user_id", "source")
OPTIONAL = (
    *("key", "prompt_kind", "order", "categories", "chosen_harmful", "rejected_harmful", "seed"),
    *("chosen_cost", "rejected_cost", "chosen_score", "rejected_score", *TEXTS),
)
LABELS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "0.0"), False),
    **dict.fromkeys(("", "null", "none", "nan", "na", "n/a", "unknown"), None),
}
"""Spellings in any case. If some labels are missing, pandas writes the column as 1.0, 0.0 and empty."""


def from_folder(
    table: str,
    out: str,
    images: str | None = None,
    prompt_kind: Literal["harmful", "clean"] | None = None,
    order: Literal["safety", "quality", "composite"] = "safety",
    samples_per_shard: int = 256,
    overwrite: bool = False,
    val_share: float | None = None,
) -> None:
    """Write shards from a CSV of pairs and the images it names.

    Needed columns: prompt, chosen and rejected (image files). Optional columns: key, prompt_kind, order, categories
    (several joined by ";"), concept, chosen_harmful and rejected_harmful (true, false or empty), chosen_cost,
    rejected_cost, chosen_score, rejected_score, user_id, source and seed. An empty field means "not known"; of a cost
    or a score both sides must be known, or neither. Pairs with two equal images are left out and named. A stopped run
    continues when it is started again. All errors in the rows are reported at once.

    Args:
        table: The CSV file, UTF-8, with a header line.
        out: The folder to write the shards to.
        images: The folder of the image files; null: the CSV's own folder.
        prompt_kind: The kind of prompts for which the table does not state it.
        order: What decided which image is chosen, where the table does not state it.
        samples_per_shard: How many pairs a shard holds.
        overwrite: Delete what an earlier run left in the folder.
        val_share: Share of the prompts, above 0 and below 1, whose pairs become validation data: `out` then holds the
            folders train and val, which share no prompt. The choice depends only on the texts of the prompts. null: all
            pairs go to `out`.
    """
    from pathlib import Path

    from lit_safety.core.errors import Complaints
    from lit_safety.core.hashes import file_sha256
    from lit_safety.core.tables import read_csv
    from lit_safety.data.convert.convert import convert
    from lit_safety.data.format.manifest import FILE_NAME

    rows = read_csv(table, REQUIRED)
    if rows and (unknown := [name for name in rows[0] if name not in (*REQUIRED, *OPTIONAL)]):
        raise UserError(f"{table}: has an unknown column {unknown[0]!r}; known are {', '.join(REQUIRED + OPTIONAL)}")
    folder = Path(images) if images is not None else Path(table).parent
    complaints = Complaints(table)
    pairs: list[FoundPair] = []
    for number, row in enumerate(rows, 2):
        with complaints.gather():
            pairs.append(_pair(row, f"{table}: row {number}", number, folder, prompt_kind, order))
    complaints.complain()
    provenance = {
        "converter": "from-folder",
        "table": Path(table).name,
        "table_sha256": file_sha256(table),
        "prompt_kind": prompt_kind,
        "order": order,
        "samples_per_shard": samples_per_shard,
    }
    if val_share is None:
        convert(pairs, out, provenance, samples_per_shard, overwrite, len(pairs))
        return
    if (Path(out) / FILE_NAME).exists():
        raise UserError(f"{out}: already holds shards, and --val_share writes {out}/train and {out}/val; name another")
    held_out = validation_prompts([(_same(row["prompt"]), _kind(pair)) for row, pair in zip(rows, pairs, strict=True)],
                                  val_share, table)  # fmt: skip
    for name, is_val in (("train", False), ("val", True)):
        part = [pair for row, pair in zip(rows, pairs, strict=True) if (_same(row["prompt"]) in held_out) is is_val]
        split = {"val_share": val_share, "split": name}
        convert(part, str(Path(out) / name), provenance | split, samples_per_shard, overwrite, len(part))


def validation_prompts(prompts: Sequence[tuple[str, str]], share: float, table: str) -> set[str]:
    """Which prompts are held out: the same share of each kind. It does not depend on the order of the rows.

    Args:
        prompts: text and kind of every pair; a text may stand several times.
        share: of the different prompts, above 0 and below 1. At least one is held out, and at least one is not.
        table: for messages.

    Raises:
        UserError: the share is out of range, or there is only one prompt.
    """
    if not 0 < share < 1:
        raise UserError(f"--val_share {share}: must lie above 0 and below 1")
    kinds: dict[str, list[str]] = {}
    for text, kind in dict(reversed(prompts)).items():  # a prompt with two kinds counts for its first
        kinds.setdefault(kind, []).append(text)
    every = [text for texts in kinds.values() for text in texts]
    if len(every) < 2:
        raise UserError(f"--val_share: {table} has only one prompt, which cannot be on both sides; remove --val_share")
    ranked = {kind: sorted(texts, key=_rank) for kind, texts in kinds.items()}
    held_out = {text for texts in ranked.values() for text in texts[: round(share * len(texts))]}
    if not held_out:
        held_out = {min(every, key=_rank)}
    if len(held_out) == len(every):
        held_out.discard(max(every, key=_rank))
    return held_out


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _same(prompt: str) -> str:
    """Equal for prompts that differ only in case and blanks."""
    return " ".join(prompt.casefold().split())


def _kind(pair: FoundPair) -> str:
    return "" if isinstance(pair.metadata, dict) else str(pair.metadata.prompt_kind)


def _pair(row: dict[str, str], where: str, number: int, folder: Any, prompt_kind: str | None, order: str) -> FoundPair:
    from lit_safety.core.tables import image_path
    from lit_safety.data.convert.convert import FoundPair, plain_key
    from lit_safety.data.format.sample import parse_metadata

    kind = row.get("prompt_kind") or prompt_kind
    if kind is None:
        raise UserError(f"{where}: lacks prompt_kind; add the column, or give --prompt_kind harmful or clean")
    data: dict[str, Any] = {
        "prompt": row["prompt"],
        "prompt_kind": kind,
        "order": row.get("order") or order,
        "categories": [name.strip() for name in row.get("categories", "").split(";") if name.strip()],
        "harmful": {side: _label(row, f"{side}_harmful", where) for side in ("chosen", "rejected")},
        "seed": _seed(row, where),
        **{name: row.get(name) or None for name in TEXTS},
        **{name: _both(row, name, where) for name in ("cost", "score")},
    }
    key = row.get("key") or f"{number - 2:08d}"
    metadata = parse_metadata(data, where)
    chosen, rejected = (image_path(folder, row[side], f"{where}: {side}") for side in ("chosen", "rejected"))
    return FoundPair(plain_key(key), metadata, chosen, rejected)


def _label(row: dict[str, str], name: str, where: str) -> bool | None:
    value = row.get(name, "").strip().casefold()
    if value not in LABELS:
        raise UserError(f"{where}: {name} is {row[name]!r}; it may be true, false or empty (not known)")
    return LABELS[value]


def _both(row: dict[str, str], name: str, where: str) -> dict[str, Any] | None:
    from lit_safety.core.tables import decimal_number

    sides: dict[str, float] = {}
    for side in ("chosen", "rejected"):
        if value := row.get(f"{side}_{name}", "").strip():
            number = decimal_number(value)
            if number is None:
                raise UserError(f"{where}: {side}_{name} is {value!r}, not a number")
            sides[side] = number
    if len(sides) == 1:
        (there,) = sides
        missing = "rejected" if there == "chosen" else "chosen"
        raise UserError(f"{where}: has {there}_{name} but not {missing}_{name}; give both, or leave both empty")
    return sides or None


def _seed(row: dict[str, str], where: str) -> int | None:
    from lit_safety.core.tables import whole_number

    value = row.get("seed", "").strip()
    if not value:
        return None
    if (seed := whole_number(value)) is None:
        raise UserError(f"{where}: seed is {value!r}, not a whole number")
    return seed
