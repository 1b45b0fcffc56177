"""`lit_safety shards from-pickapic`: Pick-a-Pic as it is published, and any table with its columns.

Source: Pick-a-Pic (arXiv 2305.01569). People wrote a prompt, saw two images and chose one or neither: `label_0` is 1 if
they chose the first, 0 if they chose the second, and 0.5 if neither was better.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lit_safety.data.convert.convert import FoundPair
    from lit_safety.data.convert.published import Row


NEEDED = ("label_0", "caption")
IMAGES = ("jpg_0", "jpg_1")
NO_LABEL = "with labels that are not 1 and 0, 0 and 1, or 0.5 and 0.5"
OPTIONAL = ("label_1", "has_label", "are_different", "ranking_id")


def from_pickapic(
    source: str,
    out: str,
    images: str | None = None,
    ties: Literal["drop", "keep"] = "drop",
    prompt_kind: Literal["clean", "harmful"] = "clean",
    limit: int | None = None,
    samples_per_shard: int = 256,
    overwrite: bool = False,
) -> None:
    """Write shards from Pick-a-Pic: pairs ordered by quality, without harm labels.

    Columns: caption, jpg_0, jpg_1 (images, or the names of image files) and label_0; label_1, has_label,
    are_different and ranking_id are read if the table has them. The published labels become the images' scores: 1 for
    the chosen one, 0 for the other, 0.5 for both in a tie. The set has no labels of harm, so `harmful` is unknown for
    every image. A stopped run continues when it is started again.

    Args:
        source: A parquet file, a folder of them (of one split), a pattern such as 'data/train-*.parquet', or a folder
            with images and metadata.jsonl.
        out: The folder to write the shards to.
        images: The folder of the image files, if the table holds their names; null: the table's own folder.
        ties: Pairs in which neither image was better: `drop` leaves them out and counts them; `keep` writes them with
            equal scores and the first image as chosen.
        prompt_kind: The kind of all prompts; the set does not state it.
        limit: How many rows to read; null: all.
        samples_per_shard: How many pairs a shard holds.
        overwrite: Delete what an earlier run left in the folder.
    """
    from itertools import islice
    from pathlib import Path

    from lit_safety.core.errors import UserError
    from lit_safety.data.convert.convert import convert
    from lit_safety.data.convert.published import open_table

    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    table = open_table(source, NEEDED, IMAGES, OPTIONAL)
    left_out: Counter[str] = Counter()
    folder = table.folder if images is None else Path(images)
    provenance = {
        "converter": "from-pickapic",
        "table": table.identity,
        "ties": ties,
        "prompt_kind": prompt_kind,
        "limit": limit,
        "samples_per_shard": samples_per_shard,
    }
    rows = islice(table.rows(), limit)
    pairs = (
        pair for n, row in enumerate(rows) for pair in _pair(row, n, folder, ties == "keep", prompt_kind, left_out)
    )
    total = table.total if limit is None else min(limit, table.total)
    convert(pairs, out, provenance, samples_per_shard, overwrite, total, left_out)


def _pair(
    row: Row, number: int, folder: Path, keep_ties: bool, kind: str, left_out: Counter[str]
) -> Iterator[FoundPair]:
    """The row's pair; None, and a reason counted, if it cannot be used: one bad row must not stop a million others."""
    from lit_safety.core.errors import UserError
    from lit_safety.data.convert.convert import FoundPair
    from lit_safety.data.format.sample import parse_metadata

    preferred = _preferred(row.values)
    if isinstance(preferred, str):
        left_out[preferred] += 1
        return
    if preferred == 0.5 and not keep_ties:
        left_out["that are ties (--ties keep writes them)"] += 1
        return
    first_wins = preferred >= 0.5
    named = row.values.get("ranking_id")
    key = f"{named}" if isinstance(named, int) else f"{number:08d}"
    data = {
        "prompt": row.values["caption"],
        "prompt_kind": kind,
        "order": "quality",
        "harmful": {"chosen": None, "rejected": None},
        "score": {"chosen": max(preferred, 1 - preferred), "rejected": min(preferred, 1 - preferred)},
        "source": f"Pick-a-Pic {key}",
    }
    try:
        metadata = parse_metadata(data, row.where)
        first, second = (image_of(row, column, folder) for column in IMAGES)
    except UserError as error:
        print(f"left out {key}: {error}")
        left_out["with a caption or an image's name that cannot be used"] += 1
        return
    yield FoundPair(key, metadata, *((first, second) if first_wins else (second, first)))


def _preferred(values: dict[str, Any]) -> float | str:
    """The published label of the first image (1, 0.5 or 0), or why it has none."""
    from lit_safety.data.convert.convert import SAME

    if values.get("has_label") is False:
        return "without a label"
    if values.get("are_different") is False:
        return SAME
    labels = [values["label_0"], *([values["label_1"]] if "label_1" in values else [])]
    if not all(type(label) in (int, float) and label in (0, 0.5, 1) for label in labels):
        return NO_LABEL
    return float(labels[0]) if len(labels) == 1 or sum(labels) == 1 else NO_LABEL


def image_of(row: Row, column: str, folder: Path) -> Any:
    """The image in a cell: stored in the table itself, or a file with that name.

    Raises:
        UserError: the cell holds neither, or the name leads out of the folder.
    """
    from lit_safety.core.errors import UserError
    from lit_safety.core.tables import image_path
    from lit_safety.data.convert.published import StoredImage

    cell = row.values[column]
    if isinstance(cell, StoredImage):
        return cell
    if not isinstance(cell, str):
        raise UserError(f"{row.where}: {column} must be an image or the name of one")
    return image_path(folder, cell, f"{row.where}: {column}")
