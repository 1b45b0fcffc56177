"""CoProV2 as it lies on the Hugging Face hub: `image`, `jpg_0`, `jpg_1`, `label_0`, `caption`.

A row holds one image (`image`) and the names of both images of its pair (`jpg_0`, `jpg_1`), of which the other one is
the `image` of another row; `label_0` is 1 where the first is preferred. Both prompts of a pair stand there as rows.
Categories stand in the CSV only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lit_safety.data.converters.coprov2_table import NAME, Half, categories_of
from lit_safety.data.converters.from_pickapic import NO_LABEL
from lit_safety.data.converters.published import Row, StoredImage, Table, no_image, open_table
from lit_safety.data.converters.run import FoundPair
from lit_safety.data.converters.table import image_path
from lit_safety.data.sample import PairMetadata, Sides
from lit_safety.errors import UserError

SIDES = ("jpg_0", "jpg_1")


@dataclass(frozen=True)
class HubPair:
    """One row: an image pair under one of its two prompts."""

    id: str
    side: str
    """Whose prompt it is: `u` the unsafe one's, `s` the safe one's."""
    prompt: str
    chosen: str
    rejected: str
    where: str


def open_hub(source: str) -> Table:
    """The table behind `source`; its `image` column is there, its `jpg_0` and `jpg_1` hold names."""
    return open_table(source, ("label_0", "caption"), ("image", *SIDES))


def hub_pairs(table: Table, halves: dict[str, dict[str, Half]], left_out: Counter[str]) -> Iterator[HubPair]:
    """The rows as pairs. Whether a prompt is the unsafe one is told by the row's image, else by the CSV (`halves`).

    Raises:
        UserError: names the row that is not as published.
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
        f"{row.where}: whether {prompt[:60]!r} is the unsafe or the safe prompt of pair {name} is told neither by the "
        "row's image nor by the CSV; give the set's own CSV with --table"
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
    """The pairs with their images: of the table, else files in `folder`."""
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
