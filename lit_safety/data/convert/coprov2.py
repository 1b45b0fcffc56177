"""`lit_safety shards from-coprov2`: CoProV2 in both published forms.

Source: SafetyDPO / AlignGuard (arXiv 2412.10493). Either a CSV and a folder of images, or the hub's
data set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.tables import image_path, read_csv
from lit_safety.data.convert.pickapic import NO_LABEL
from lit_safety.data.convert.published import Row, StoredImage, Table, no_image, open_table
from lit_safety.data.format.sample import PairMetadata, Sides

if TYPE_CHECKING:
    from lit_safety.data.convert.convert import FoundPair

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
    safe prompt (clean). In both the safe image is chosen, and the labels say that the rejected one is harmful. A pair
    in several categories keeps all of them. A stopped run continues when it is started again.

    Args:
        source: The CSV file with the columns prompt, image and category; or the hub's data set: a folder of parquet
            files, a pattern of them, or a folder with images and metadata.jsonl (image, jpg_0, jpg_1, label_0,
            caption).
        out: The folder to write the shards to.
        images: The folder of the images. Needed with a CSV.
        table: With the hub's data set, which lacks categories: the CSV that has them.
        test_table: A test set's CSV with a column prompt. How many of its prompts are in the training data is counted
            and printed.
        drop_leaks: Leave out the pairs that share a prompt with `test_table`.
        samples_per_shard: How many pairs a shard holds.
        overwrite: Delete what an earlier run left in the folder.
    """
    from pathlib import Path

    from lit_safety.core.hashes import file_sha256
    from lit_safety.core.tables import read_csv
    from lit_safety.data.convert.convert import convert

    if drop_leaks and test_table is None:
        raise UserError("--drop_leaks needs --test_table: the test set whose prompts are left out")
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

    found = whole_pairs(read_halves(source), left_out)
    leaking = _leaks({name: {half.prompt for half in halves.values()} for name, halves in found.items()}, asked, drop)
    if drop:
        left_out[LEAKS] += 2 * len(leaking)
        found = {name: halves for name, halves in found.items() if name not in leaking}
    return list(_table_pairs(found, images, source))


def _table_pairs(found: dict[str, dict[str, Half]], images: Path, table: str) -> Iterator[FoundPair]:
    from lit_safety.core.tables import image_path
    from lit_safety.data.convert.convert import FoundPair
    from lit_safety.data.format.sample import Kind, PairMetadata, Sides

    kinds: dict[str, Kind] = {"u": "harmful", "s": "clean"}
    for name, halves in found.items():
        chosen, rejected = (image_path(images, halves[side].image, table) for side in ("s", "u"))
        for side, kind in kinds.items():
            metadata = PairMetadata(
                halves[side].prompt, kind, "safety", categories_of(halves), Sides(False, True), source=f"CoProV2 {name}"
            )
            yield FoundPair(f"{name}_{side}", metadata, chosen, rejected)


def _from_hub(
    source: str, images: str | None, table: str | None, asked: set[str] | None, drop: bool, left_out: Counter[str]
) -> tuple[list[FoundPair], Any]:
    from pathlib import Path

    from lit_safety.core.hashes import file_sha256

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
        print("the hub's data set lacks categories; give the CSV that has them with --table")
    elif unknown := len({row.id for row in rows} - set(halves)):
        print(f"{unknown} pairs are not in {table}, so their category is not known")
    exceptions: Counter[str] = Counter()
    folder = None if images is None else Path(images)
    pairs = list(find_pairs(rows, halves, images_by_name(published), folder, exceptions))
    for what, times in exceptions.items():
        print(f"{what} in {times} of {len(pairs)} rows, kept as published with these labels")
    return pairs, [*published.identity, None if table is None else file_sha256(table)]


def _leaks(prompts: dict[str, set[str]], asked: set[str] | None, drop: bool) -> set[str]:
    """The pairs that share a prompt with the test set; prints how many."""
    if asked is None:
        return set()
    leaking = {name for name, own in prompts.items() if own & asked}
    found = {prompt for name in leaking for prompt in prompts[name]} & asked
    print(
        f"{len(found)} prompts of the test set are in {len(leaking)} of {len(prompts)} training pairs"
        + (", which are left out" if drop else "; --drop_leaks true leaves them out")
    )
    return leaking


# CoProV2's CSV: a row for each image and category, images named `u_idx_ID.jpg` (unsafe) and `s_idx_ID.jpg` (safe).


REQUIRED = ("prompt", "image", "category")
NAME = re.compile(r"(?P<side>[us])_idx_(?P<id>[A-Za-z0-9_-]+)\.(jpg|jpeg|png|webp)")


@dataclass
class Half:
    """One image of a pair, collected from several rows."""

    prompt: str
    image: str
    categories: dict[str, None] = field(default_factory=dict)


def read_halves(table: str) -> dict[str, dict[str, Half]]:
    """Pair id -> its unsafe ("u") and safe ("s") half, as far as the table has them.

    Raises:
        UserError: names the row that does not have the published form.
    """
    found: dict[str, dict[str, Half]] = {}
    for number, row in enumerate(read_csv(table, REQUIRED), start=2):
        match = NAME.fullmatch(row["image"])
        if match is None:
            raise UserError(f"{table}: row {number}: {row['image']!r} is not named u_idx_ID.jpg or s_idx_ID.jpg")
        half = found.setdefault(match["id"], {}).setdefault(match["side"], Half(row["prompt"].strip(), row["image"]))
        if not half.prompt or half.prompt != row["prompt"].strip():
            raise UserError(f"{table}: row {number}: {row['image']} has an empty prompt or two different ones")
        try:
            half.categories[canonical_category(row["category"])] = None
        except UserError as error:
            raise UserError(f"{table}: row {number}: {error}") from error
    return found


def categories_of(halves: dict[str, Half]) -> tuple[str, ...]:
    """One list for both prompts: the clean prompt is the counterpart of the harmful one."""
    return tuple(dict.fromkeys(name for side in "us" if side in halves for name in halves[side].categories))


def whole_pairs(found: dict[str, dict[str, Half]], left_out: Counter[str]) -> dict[str, dict[str, Half]]:
    """The pairs with both halves; the others are counted."""
    whole = {name: halves for name, halves in found.items() if len(halves) == 2}
    if len(found) > len(whole):
        left_out["without a counterpart"] += len(found) - len(whole)
    return whole


# CoProV2 on the Hugging Face hub: `image`, `jpg_0`, `jpg_1`, `label_0`, `caption`.
#
# A row holds one image (`image`) and the names of both images of its pair (`jpg_0`, `jpg_1`). The other image is the
# `image` of another row. `label_0` is 1 if the first is preferred. Each prompt of a pair has its own row. Only the CSV
# has categories.


SIDES = ("jpg_0", "jpg_1")


@dataclass(frozen=True)
class HubPair:
    """One row: an image pair under one of its two prompts."""

    id: str
    side: str
    """Which image the prompt belongs to: `u` the unsafe one, `s` the safe one."""
    prompt: str
    chosen: str
    rejected: str
    where: str


def open_hub(source: str) -> Table:
    """The table of `source`, with the column `image` and names in `jpg_0` and `jpg_1`."""
    return open_table(source, ("label_0", "caption"), ("image", *SIDES))


def hub_pairs(table: Table, halves: dict[str, dict[str, Half]], left_out: Counter[str]) -> Iterator[HubPair]:
    """The rows as pairs. The row's image, else the CSV (`halves`), says whether a prompt is the unsafe one.

    Raises:
        UserError: names the row that does not have the published form.
    """
    for row in table.rows():
        values = row.values
        named = [NAME.fullmatch(_base(_text(row, column))) for column in SIDES]
        if any(match is None for match in named):
            raise UserError(f"{row.where}: jpg_0 and jpg_1 must be names such as u_idx_ID.jpg and s_idx_ID.jpg")
        first, second = (match for match in named if match is not None)
        if first["id"] != second["id"] or first["side"] == second["side"]:
            raise UserError(f"{row.where}: {first[0]} and {second[0]} are not the two images of one pair")
        prompt = _text(row, "caption").strip()
        if not prompt:
            raise UserError(f"{row.where}: the caption is empty")
        label = values["label_0"]
        if isinstance(label, bool) or label not in (0, 1):
            left_out[NO_LABEL] += 1
            continue
        chosen, rejected = (first[0], second[0]) if label == 1 else (second[0], first[0])
        yield HubPair(first["id"], _side(row, first["id"], prompt, halves), prompt, chosen, rejected, row.where)


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise UserError(f"{row.where}: {column} must be a text, not {type(value).__name__}")
    return value


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _side(row: Row, name: str, prompt: str, halves: dict[str, dict[str, Half]]) -> str:
    listed = [side for side, half in halves.get(name, {}).items() if half.prompt == prompt]
    if len(listed) == 1:
        return listed[0]
    match = NAME.fullmatch(_base(_image(row).name or ""))
    if match is not None and match["id"] == name:
        return match["side"]
    raise UserError(
        f"{row.where}: neither the row's image nor the CSV says whether {prompt[:60]!r} is the unsafe or the safe "
        f"prompt of pair {name}; give the set's own CSV with --table"
    )


def _image(row: Row) -> StoredImage:
    image = row.values.get("image")
    if not isinstance(image, StoredImage):
        raise UserError(f"{row.where}: image must be an image")
    return image


def images_by_name(table: Table) -> dict[str, StoredImage]:
    """Every image that the table holds, by its file name without folders."""
    return {_base(image.name): image for row in table.rows() if (image := _image(row)).name is not None}


def find_pairs(
    pairs: list[HubPair],
    halves: dict[str, dict[str, Half]],
    held: dict[str, StoredImage],
    folder: Path | None,
    exceptions: Counter[str],
) -> Iterator[FoundPair]:
    """The pairs with their images: from the table, else from files in `folder`."""
    from lit_safety.data.convert.convert import FoundPair

    for pair in pairs:
        unsafe = Sides(pair.chosen.startswith("u"), pair.rejected.startswith("u"))
        if unsafe.chosen:
            exceptions["the unsafe image is preferred"] += 1
        metadata = PairMetadata(
            pair.prompt,
            "harmful" if pair.side == "u" else "clean",
            "safety",
            categories_of(halves.get(pair.id, {})),
            Sides(unsafe.chosen, unsafe.rejected),
            source=f"CoProV2 {pair.id}",
        )
        chosen, rejected = (_find(name, held, folder, pair.where) for name in (pair.chosen, pair.rejected))
        yield FoundPair(f"{pair.id}_{pair.side}", metadata, chosen, rejected)


def _find(name: str, held: dict[str, StoredImage], folder: Path | None, where: str) -> Path | StoredImage:
    if name in held:
        return held[name]
    if folder is not None:
        return image_path(folder, name, where)

    def missing() -> bytes:
        raise no_image(name)

    return StoredImage(name, missing)
