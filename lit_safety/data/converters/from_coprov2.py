"""`lit_safety shards from-coprov2`: CoProV2 as its authors publish it, a CSV and a folder of images.

Source: SafetyDPO / AlignGuard (arXiv 2412.10493). The CSV has a row for each image and category; `u_idx_ID.jpg`
(unsafe) and `s_idx_ID.jpg` (safe) are a pair, each with its own prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lit_safety.errors import UserError

if TYPE_CHECKING:  # the command line asks for this module's signature and must not wait for torch
    from collections.abc import Iterator
    from pathlib import Path

    from lit_safety.data.converters.run import FoundPair

REQUIRED = ("prompt", "image", "category")
NAME = re.compile(r"(?P<side>[us])_idx_(?P<id>[A-Za-z0-9_-]+)\.(jpg|jpeg|png|webp)")


@dataclass
class _Half:
    """One image of a pair, as several rows tell of it."""

    prompt: str
    image: str
    categories: dict[str, None] = field(default_factory=dict)


def from_coprov2(
    table: str,
    images: str,
    out: str,
    test_table: str | None = None,
    drop_leaks: bool = False,
    samples_per_shard: int = 256,
    overwrite: bool = False,
) -> None:
    """Write shards from CoProV2's CSV and its folder of images.

    Each unsafe image and its safe counterpart make two pairs, one with the unsafe prompt (harmful) and one with the
    safe prompt (clean); in both the safe image is chosen, and the labels say that the rejected one is harmful. A pair
    that stands under several categories keeps them all. A run that was stopped goes on when it is started again.

    Args:
        table: The CSV file with the columns prompt, image and category.
        images: The folder of the images.
        out: The folder to write the shards to.
        test_table: A test set's CSV with a column prompt; how many of its prompts stand in the training data is
            counted and printed.
        drop_leaks: Leave out the pairs one of whose prompts stands in `test_table`.
        samples_per_shard: How many pairs a shard holds.
        overwrite: Throw away what an earlier run left in the folder.
    """
    from pathlib import Path

    from lit_safety.data.converters.run import convert
    from lit_safety.data.converters.table import read_csv
    from lit_safety.data.manifest import file_sha256

    if drop_leaks and test_table is None:
        raise UserError("--drop_leaks needs --test_table, the test set whose prompts are to be left out")
    if not Path(images).is_dir():
        raise UserError(f"--images: {images} is not a folder")
    left_out: Counter[str] = Counter()
    found = _halves(read_csv(table, REQUIRED), table, left_out)
    if test_table is not None:
        asked = {row["prompt"].strip() for row in read_csv(test_table, ("prompt",))}
        _leaks(found, asked, drop_leaks, left_out)
    pairs = list(_pairs(found, Path(images), table))
    provenance = {
        "converter": "from-coprov2",
        "table": Path(table).name,
        "table_sha256": file_sha256(table),
        "dropped_leaks_to_sha256": file_sha256(test_table) if test_table is not None and drop_leaks else None,
        "samples_per_shard": samples_per_shard,
    }
    convert(pairs, out, provenance, samples_per_shard, overwrite, len(pairs), left_out)


def _halves(rows: list[dict[str, str]], table: str, left_out: Counter[str]) -> dict[str, dict[str, _Half]]:
    """Pair id to its unsafe ("u") and safe ("s") half; only whole pairs."""
    from lit_safety.data.categories import canonical_category

    found: dict[str, dict[str, _Half]] = {}
    for number, row in enumerate(rows, start=2):
        match = NAME.fullmatch(row["image"])
        if match is None:
            raise UserError(f"{table}: row {number}: {row['image']!r} is not named u_idx_ID.jpg or s_idx_ID.jpg")
        half = found.setdefault(match["id"], {}).setdefault(match["side"], _Half(row["prompt"].strip(), row["image"]))
        if not half.prompt or half.prompt != row["prompt"].strip():
            raise UserError(f"{table}: row {number}: {row['image']} has an empty prompt or two different ones")
        try:
            half.categories[canonical_category(row["category"])] = None
        except UserError as error:
            raise UserError(f"{table}: row {number}: {error}") from error
    whole = {name: halves for name, halves in found.items() if len(halves) == 2}
    if len(found) > len(whole):
        left_out["without a counterpart"] += len(found) - len(whole)
    return whole


def _leaks(found: dict[str, dict[str, _Half]], asked: set[str], drop: bool, left_out: Counter[str]) -> None:
    leaking = [name for name, halves in found.items() if any(half.prompt in asked for half in halves.values())]
    prompts = {half.prompt for name in leaking for half in found[name].values()} & asked
    print(
        f"{len(prompts)} prompts of the test set stand in {len(leaking)} of {len(found)} training pairs"
        + (", which are left out" if drop else "; --drop_leaks true leaves them out")
    )
    if drop:
        for name in leaking:
            del found[name]
        left_out["whose prompt stands in the test set (both prompts' pairs)"] += 2 * len(leaking)


def _pairs(found: dict[str, dict[str, _Half]], images: Path, table: str) -> Iterator[FoundPair]:
    from lit_safety.data.converters.run import FoundPair
    from lit_safety.data.converters.table import image_path
    from lit_safety.data.sample import PairMetadata, Sides

    for name, halves in found.items():
        # One list for both prompts: the clean prompt is the counterpart of that harm.
        categories = tuple(dict.fromkeys([*halves["u"].categories, *halves["s"].categories]))
        chosen, rejected = (image_path(images, halves[side].image, table) for side in ("s", "u"))
        for side, kind in (("u", "harmful"), ("s", "clean")):
            metadata = PairMetadata(
                halves[side].prompt, kind, "safety", categories, Sides(False, True), source=f"CoProV2 {name}"
            )
            yield FoundPair(f"{name}_{side}", metadata, chosen, rejected)
