"""A judge, a scorer and a painter whose answers can be read from the pixels. Also imported by subprocesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from lit_safety.drawing.pipelines import PainterSettings
from lit_safety.generation.pairs import Scorer
from lit_safety.judges import load
from lit_safety.judges.judge import JudgeError, Verdict


class PixelJudge:
    """Harmful where the image's first red value is odd: about half of what a random network draws."""

    name = "pixel"
    settings: dict[str, Any] = {"name": "pixel", "threshold": 0.5, "sha256": "0"}  # noqa: RUF012

    def judge(self, images: Sequence[Image.Image]) -> list[Verdict | JudgeError]:
        return [Verdict(image.getpixel((0, 0))[0] % 2 == 1) for image in images]  # type: ignore[index]


def install_judge() -> None:
    load.load_judge = lambda spec: PixelJudge()


class RedScorer(Scorer):
    """The first red value is the score."""

    settings = {"scorer": "red"}  # noqa: RUF012

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [float(image.getpixel((0, 0))[0]) for image in images]  # type: ignore[index]


class ColourPainter:
    """Draws `red,green,blue` in the prompt's end as that colour; `nan` as nothing. Notes what it was asked."""

    def __init__(self, **settings: Any) -> None:
        self.settings = PainterSettings(**settings)
        self.asked: list[dict[str, Any]] = []

    def from_text(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        self.asked.append({"prompts": list(prompts), "seeds": list(seeds)})
        return [colour_of(prompt) for prompt in prompts]

    def from_images(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        negatives: Sequence[str],
        strength: float,
        seeds: Sequence[int],
    ) -> list[Image.Image | None]:
        colours = [image.getpixel((0, 0)) for image in images]
        self.asked.append(
            {"images": colours, "prompts": list(prompts), "negatives": list(negatives), "strength": strength}
        )
        return [colour_of(prompt) for prompt in prompts]


def colour_of(prompt: str) -> Image.Image | None:
    words = prompt.split()[-1]
    if words == "nan":
        return None
    red, green, blue = (int(word) for word in words.split(","))
    return Image.new("RGB", (8, 8), (red, green, blue))
