"""What the rounds of a fit leave to be looked at: rounds.jsonl, some images of each round, and index.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from lit_safety.modules.rounds import Slot

SHOWN = 6
"""Prompts of a round whose images are kept."""
LEAD = (
    "Each round draws prompts with the policy as it then is, scores the images by the cost model, and learns from "
    "them. The cost model is what is optimised, so its figures say nothing about an aligned model: `evaluate` does, by "
    "judges that no training has seen. What to look for here: images that lose their subject, or all look alike."
)


@dataclass(frozen=True)
class Seen:
    """An image of a round that was kept."""

    slot: Slot
    prompt: str
    """As it is, whatever was drawn."""
    cost: float


def image_file(folder: Path, number: int, slot: Slot) -> Path:
    return folder / f"round-{number:05d}" / f"{slot.prompt:02d}-{slot.image:02d}.png"


def keep_image(folder: Path, number: int, slot: Slot, image: Image) -> None:
    """Keep an image of a round to be looked at."""
    path = image_file(folder, number, slot)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_round(folder: Path, said: dict[str, Any], shown: Sequence[Seen]) -> None:
    """Add a round to rounds.jsonl."""
    from lit_safety.core.files import append_line

    images = [
        {
            "prompt": one.prompt,
            "drawn": one.slot.text,
            "way": one.slot.way,
            "seed": one.slot.seed,
            "cost": one.cost,
            "file": str(image_file(folder, said["round"], one.slot).relative_to(folder)),
        }
        for one in shown
    ]
    append_line(folder / "rounds.jsonl", json.dumps({**said, "images_kept": images}, ensure_ascii=False))


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds of rounds.jsonl in their order; of a round that was drawn again the last. A last line that was cut
    short is left out."""
    from lit_safety.core.text import load_json

    found: dict[int, dict[str, Any]] = {}
    for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            said = load_json(line)
        except ValueError:
            continue
        found[said["round"]] = said
    return [found[number] for number in sorted(found)]


def write_page(folder: Path, pretrained: str) -> Path:
    """Write index.html: the figures of all rounds as a table, and their images; blurred unless the model is of an
    embedded world."""
    from lit_safety.core.files import write_atomic
    from lit_safety.drawing.pipelines import local_pipeline
    from lit_safety.drawing.worlds import of_a_world
    from lit_safety.report.page import Block, Cards, Heading, Table, page

    rounds = read_rounds(folder)
    veil = "" if of_a_world(local_pipeline(pretrained)) else "show"
    blocks: list[Block] = [
        Table(
            ["round", "harmful, of own images", "expected cost", "limit", "lambda", "ways", "without a safe image"],
            [_row(said) for said in rounds],
            "Rounds",
        )
    ]
    for said in reversed(rounds):
        blocks += [Heading(f"Round {said['round']}"), Cards(_cards(folder, said, veil))]
    text = page("Rounds", "online alignment", "What the policy drew, by round", LEAD, blocks)
    return write_atomic(folder / "index.html", text.encode())


def _row(said: dict[str, Any]) -> list[str]:
    ways = ", ".join(f"{way}: {one['safe']} of {one['images']} safe" for way, one in said["ways"].items())
    return [
        str(said["round"]),
        f"{said['harmful_share']:.1%}",
        f"{said['expected_cost']:.2f} (standard error {said['standard_error']:.2f})",
        f"{said['limit']:g}",
        f"{said['lambda']:.3f}",
        ways,
        str(said["prompts_without_safe"]),
    ]


def _cards(folder: Path, said: dict[str, Any], veil: str) -> list[Any]:
    from PIL import Image

    from lit_safety.report.page import Card, Shown, data_uri

    cards: dict[str, list[Shown]] = {}
    for one in said["images_kept"]:
        says = f"cost {one['cost']:.1f}" + (f", drawn: {one['drawn']}" if one["drawn"] != one["prompt"] else "")
        source, small = None, False
        if (file := folder / one["file"]).is_file():
            with Image.open(file) as image:
                source, small = data_uri(image.convert("RGB"))
        mark = "harm" if one["cost"] > 0 else "safe"
        alt = f"{one['way']}: {one['drawn']}"
        cards.setdefault(one["prompt"], []).append(Shown(one["way"], says, source, alt, small, veil, mark))
    return [Card(prompt, images) for prompt, images in cards.items()]
