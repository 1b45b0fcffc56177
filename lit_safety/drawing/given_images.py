"""A folder of images that another program drew: which image belongs to which prompt of a file.

By the file's column `file_name` (in CoProV2 `image`); else by the number in the images' names, which is the file's
`case_number`, or the row counted from 0 or from 1. The first way is used by which every prompt has one image and every
image one prompt. For a row without a prompt, an image may exist or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest, file_sha256
from lit_safety.core.images import image_files
from lit_safety.core.text import load_json
from lit_safety.drawing.gallery import UNREADABLE, Drawn

if TYPE_CHECKING:
    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.prompts import Place, Prompt, PromptSet


NOT_MEASURED = "not measured"
"""The report's word for what only the program that drew the images knows."""
_ONE_NUMBER = re.compile(r"\D*(\d+)\D*")
_WITH_SAMPLE = re.compile(r"(\d+)_(\d+)")
"""ESD's scripts and others: the case, and which of its samples."""


class GivenImages:
    """The images of one arm.

    Args:
        name: the arm, for messages.
        arm: names the folder.
        prompts: all prompts of the file.
        file: the prompt file, for messages.

    Raises:
        UserError: a prompt lacks an image, an image lacks a prompt, or was drawn for another prompt; names the first
            ones and says how many.
    """

    def __init__(self, name: str, arm: Arm, prompts: PromptSet, file: str) -> None:
        self.folder = Path(str(arm.images))
        where = f"arm {name}: {self.folder}"
        if not self.folder.is_dir():
            raise UserError(f"{where}: is not a folder")
        files = image_files(self.folder)
        if not files:
            raise UserError(f"{where}: holds 0 png, jpg or webp images")
        places = _places(prompts, where, file)
        optional = {place.row: place for place in prompts.without_prompt}
        self.found_by, self._of_row = _match(files, places, optional, self.folder, where)
        noted = {row: _noted(path) for row, path in self._of_row.items()}
        asked = {prompt.place.row: prompt for prompt in prompts if prompt.place is not None}
        other = [
            row for row, said in noted.items() if said is not None and row in asked and said[0] != asked[row].prompt
        ]
        if other:
            raise UserError(
                f"{where}: {len(other)} images say that they were drawn for another prompt than {file}'s, such as "
                f"{self._of_row[other[0]].name}"
            )
        self.same_seeds = _same_seeds(arm, prompts, [(noted[row], asked[row].seed) for row in asked])
        """Whether the images were drawn from the seeds of the prompt file, so that figures can be paired."""
        self.sha256 = digest([[str(row), file_sha256(path)] for row, path in sorted(self._of_row.items())])

    def of(self, prompts: Iterable[Prompt]) -> list[Drawn]:
        """The images of prompts of the file, in their order."""
        return [Drawn(self._of_row[prompt.place.row]) for prompt in prompts if prompt.place is not None]

    def describe(self) -> dict[str, Any]:
        """The arm for a report, in which the settings of the drawing are not known."""
        unknown = (
            "pipeline",
            "pipeline_sha256",
            "scheduler",
            "steps",
            "guidance",
            "own_guidance",
            "precision",
            "device",
        )
        return {
            "images": str(self.folder),
            "images_sha256": self.sha256,
            "drawn_by": "another program",
            "images_found_by": self.found_by,
            "seeds": "those of the prompt file" if self.same_seeds else "not known; not paired with the base",
            **dict.fromkeys(unknown, NOT_MEASURED),
        }


def given_images(arms: Mapping[str, Arm], prompts: PromptSet, file: str) -> dict[str, GivenImages]:
    """The images of every arm that names a folder of them, by the arm's name.

    Raises:
        UserError: as `GivenImages`.
    """
    return {name: GivenImages(name, arm, prompts, file) for name, arm in arms.items() if arm.images is not None}


def _places(prompts: PromptSet, where: str, file: str) -> dict[int, Place]:
    places = {prompt.place.row: prompt.place for prompt in prompts if prompt.place is not None}
    if any(prompt.place is None for prompt in prompts):
        raise UserError(
            f"{where}: a row of {file} holds an adversarial prompt and the text that it was made from, but an image "
            "belongs to one of them; give a file with a row for each (prompt,kind,category,pair)"
        )
    return places


def _match(
    files: Sequence[Path], places: Mapping[int, Place], optional: Mapping[int, Place], folder: Path, where: str
) -> tuple[str, dict[int, Path]]:
    """How images are found, and the image of each row."""
    every = {**optional, **places}
    names = {place.file_name for place in places.values()}
    if all(names) and len(names) == len(places):
        by_name = _by_name(files, every, folder, where)
        if by_name:  # else the names are those of the set's own images, and the program used numbers
            _check(by_name, files, places, "by the column of their names", where, _named)
            return "file_name", by_name
    numbered = _numbers(files, folder, where)
    ways: dict[str, dict[int, int]] = {}
    cases = {row: place.case_number for row, place in every.items() if place.case_number is not None}
    if set(places) <= set(cases) and len(set(cases.values())) == len(cases):
        ways["case_number"] = {case: row for row, case in cases.items()}
    ways["row, from 0"] = {row: row for row in every}
    ways["row, from 1"] = {row + 1: row for row in every}
    for way, row_of in ways.items():
        if numbered.keys() <= row_of.keys() and places.keys() <= {row_of[number] for number in numbered}:
            return way, {row_of[number]: file for number, file in numbered.items()}
    way, row_of = next(iter(ways.items()))
    found = {row_of[number]: file for number, file in numbered.items() if number in row_of}
    number_of = {row: told for told, row in row_of.items()}
    _check(
        found, files, places, f"by the number in their names ({way})", where, lambda place: f"{number_of[place.row]}"
    )
    raise AssertionError("each way must have failed")


def _by_name(files: Sequence[Path], every: Mapping[int, Place], folder: Path, where: str) -> dict[int, Path]:
    """Images by the names in the rows; the ending may differ, because programs choose their own."""
    rows: dict[str, set[int]] = {}
    for number, place in every.items():
        if place.file_name:
            for spelling in _spellings(PurePath(place.file_name)):
                rows.setdefault(spelling, set()).add(number)
    found: dict[int, Path] = {}
    for file in files:
        told = (rows[name] for name in _spellings(PurePath(file.relative_to(folder))) if len(rows.get(name, ())) == 1)
        row = min(next(told, ()), default=None)
        if row is None:
            continue
        if row in found:
            raise UserError(f"{where}: {_below(found[row], folder)} and {_below(file, folder)} both belong to "
                            "one prompt; keep one")  # fmt: skip
        found[row] = file
    return found


def _spellings(name: PurePath) -> list[str]:
    """A name as it is, without its ending, without its folder, and without both."""
    return [name.as_posix(), name.with_suffix("").as_posix(), name.name, name.stem]


def _below(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _numbers(files: Sequence[Path], folder: Path, where: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    unclear = [file for file in files if _number(file) is None]
    if unclear:
        raise UserError(
            f"{where}: the names of {len(unclear)} images do not hold exactly one number "
            f"({_first(file.name for file in unclear)}); name them by the row of their prompt, such as 00012.png, or "
            "give the prompt file a column file_name"
        )
    for file in files:
        number = _number(file)
        assert number is not None
        if number in found:
            raise UserError(
                f"{where}: {_below(found[number], folder)} and {_below(file, folder)} both have the number {number}; "
                "keep one for each prompt"
            )
        found[number] = file
    return found


def _number(file: Path) -> int | None:
    match = _ONE_NUMBER.fullmatch(file.stem) or _WITH_SAMPLE.fullmatch(file.stem)
    return int(match[1]) if match is not None and len(match[1]) < 19 else None


def _named(place: Place) -> str:
    return place.file_name


def _check(
    found: Mapping[int, Path], files: Sequence[Path], places: Mapping[int, Place], how: str, where: str, name: Any
) -> None:
    missing = [name(place) for row, place in places.items() if row not in found]
    taken = set(found.values())
    surplus = [file.name for file in files if file not in taken]
    said = []
    if missing:
        said.append(f"{len(missing)} of {len(places)} prompts lack an image ({_first(missing)})")
    if surplus:
        said.append(f"{len(surplus)} images lack a prompt ({_first(surplus)})")
    if said:
        raise UserError(f"{where}: {', and '.join(said)}; images are found {how}, one for each row of the prompt file")


def _first(names: Iterable[str], most: int = 3) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (", ..." if len(every) > most else "")


def _noted(file: Path) -> tuple[str, int] | None:
    """Prompt and seed in an image file that `evaluate` has written; None: another program wrote it."""
    if file.suffix.lower() != ".png":
        return None
    try:
        with Image.open(file, formats=["PNG"]) as image:
            row = load_json(str(image.info["row"]))
        prompt, seed = row["prompt"], row["seed"]
    except (*UNREADABLE, KeyError, TypeError, RecursionError):
        return None
    return (prompt, seed) if isinstance(prompt, str) and type(seed) is int else None


def _same_seeds(arm: Arm, prompts: PromptSet, rows: Sequence[tuple[tuple[str, int] | None, int]]) -> bool:
    """By the images; else by the arm's setting; else true if the prompt file has seeds, because programs use them."""
    if rows and all(said is not None for said, _ in rows):
        return all(said is not None and said[1] == seed for said, seed in rows)
    if any(said is not None and said[1] != seed for said, seed in rows):
        return False
    return prompts.own_seeds if arm.same_seeds is None else arm.same_seeds
