"""`lit_safety shards from-coprov2`: CoProV2 in both forms in which it is published.

Source: SafetyDPO / AlignGuard (arXiv 2412.10493). Either a CSV and a folder of images (see `coprov2_table`), or the
hub's data set (see `coprov2_hub`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from lit_safety.errors import UserError

if TYPE_CHECKING:  # the command line asks for this module's signature and must not wait for torch
    from collections.abc import Iterator
    from pathlib import Path

    from lit_safety.data.converters.coprov2_table import Half
    from lit_safety.data.converters.run import FoundPair

LEAKS = "whose prompt stands in the test set (both prompts' pairs)"


def from_coprov2(
    source: str,
    out: str,
    images: str | None = None,
    table: str | None = None,
    test_table: str | None = None,
    drop_leaks: bool = False,
    samples_per_shard: int = 256,
    overwrite: bool = False,
) -> None:
    """Write shards from CoProV2: its CSV and a folder of images, or the hub's data set.

    Each unsafe image and its safe counterpart make two pairs, one with the unsafe prompt (harmful) and one with the
    safe prompt (clean); in both the safe image is chosen, and the labels say that the rejected one is harmful. A pair
    that stands under several categories keeps them all. A run that was stopped goes on when it is started again.

    Args:
        source: The CSV file with the columns prompt, image and category; or the hub's data set: a folder of parquet
            files, a pattern of them, or a folder with images and metadata.jsonl (image, jpg_0, jpg_1, label_0,
            caption).
        out: The folder to write the shards to.
        images: The folder of the images. Needed with a CSV.
        table: With the hub's data set, which holds no categories: the CSV that does.
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
    if images is not None and not Path(images).is_dir():
        raise UserError(f"--images: {images} is not a folder")
    asked = {row["prompt"].strip() for row in read_csv(test_table, ("prompt",))} if test_table is not None else None
    left_out: Counter[str] = Counter()
    if source.endswith(".csv"):
        if images is None:
            raise UserError("--images is needed with a CSV: the folder of its images")
        if table is not None:
            raise UserError("--table is for the hub's data set; a CSV has the categories itself")
        pairs = _from_table(source, Path(images), asked, drop_leaks, left_out)
        identity: Any = [Path(source).name, file_sha256(source)]
    else:
        pairs, identity = _from_hub(source, images, table, asked, drop_leaks, left_out)
    provenance = {
        "converter": "from-coprov2",
        "table": identity,
        "dropped_leaks_to_sha256": file_sha256(test_table) if test_table is not None and drop_leaks else None,
        "samples_per_shard": samples_per_shard,
    }
    convert(pairs, out, provenance, samples_per_shard, overwrite, len(pairs), left_out)


def _from_table(
    source: str, images: Path, asked: set[str] | None, drop: bool, left_out: Counter[str]
) -> list[FoundPair]:
    from lit_safety.data.converters.coprov2_table import read_halves, whole_pairs

    found = whole_pairs(read_halves(source), left_out)
    leaking = _leaks({name: {half.prompt for half in halves.values()} for name, halves in found.items()}, asked, drop)
    if drop:
        left_out[LEAKS] += 2 * len(leaking)
        found = {name: halves for name, halves in found.items() if name not in leaking}
    return list(_table_pairs(found, images, source))


def _table_pairs(found: dict[str, dict[str, Half]], images: Path, table: str) -> Iterator[FoundPair]:
    from lit_safety.data.converters.coprov2_table import categories_of
    from lit_safety.data.converters.run import FoundPair
    from lit_safety.data.converters.table import image_path
    from lit_safety.data.sample import PairMetadata, Sides

    for name, halves in found.items():
        chosen, rejected = (image_path(images, halves[side].image, table) for side in ("s", "u"))
        for side, kind in (("u", "harmful"), ("s", "clean")):
            metadata = PairMetadata(
                halves[side].prompt, kind, "safety", categories_of(halves), Sides(False, True), source=f"CoProV2 {name}"
            )
            yield FoundPair(f"{name}_{side}", metadata, chosen, rejected)


def _from_hub(
    source: str, images: str | None, table: str | None, asked: set[str] | None, drop: bool, left_out: Counter[str]
) -> tuple[list[FoundPair], Any]:
    from pathlib import Path

    from lit_safety.data.converters.coprov2_hub import find_pairs, hub_pairs, images_by_name, open_hub
    from lit_safety.data.converters.coprov2_table import read_halves
    from lit_safety.data.manifest import file_sha256

    published = open_hub(source)
    halves = {} if table is None else read_halves(table)
    rows = list(hub_pairs(published, halves, left_out))
    prompts: dict[str, set[str]] = {}
    for row in rows:
        prompts.setdefault(row.id, set()).add(row.prompt)
    leaking = _leaks(prompts, asked, drop)
    if drop:
        left_out[LEAKS] += sum(row.id in leaking for row in rows)
        rows = [row for row in rows if row.id not in leaking]
    if table is None:
        print("the hub's data set holds no categories; --table gives the CSV that does")
    elif unknown := len({row.id for row in rows} - set(halves)):
        print(f"{unknown} pairs do not stand in {table} and have no category")
    exceptions: Counter[str] = Counter()
    folder = None if images is None else Path(images)
    pairs = list(find_pairs(rows, halves, images_by_name(published), folder, exceptions))
    for what, times in exceptions.items():
        print(f"{what} in {times} of {len(pairs)} rows, kept as published; the labels say so")
    return pairs, [*published.identity, None if table is None else file_sha256(table)]


def _leaks(prompts: dict[str, set[str]], asked: set[str] | None, drop: bool) -> set[str]:
    """The pairs one of whose prompts is asked in the test set; says how many."""
    if asked is None:
        return set()
    leaking = {name for name, own in prompts.items() if own & asked}
    found = {prompt for name in leaking for prompt in prompts[name]} & asked
    print(
        f"{len(found)} prompts of the test set stand in {len(leaking)} of {len(prompts)} training pairs"
        + (", which are left out" if drop else "; --drop_leaks true leaves them out")
    )
    return leaking
