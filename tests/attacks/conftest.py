"""A tiny pipeline under attack: prompts, arms, and a judge that needs no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat

from lit_safety.attacks.target import Target
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings
from lit_safety.drawing.prompts import COLUMNS, Prompt
from lit_safety.judges.judge import JudgeError, Verdict

DRAWING = DrawingSettings(steps=1, guidance=2.0, batch_size=4, device="cpu")


def row(text: str, kind: str = "explicit", concept: str = "", held_out: bool = False, seed: int = 0) -> Prompt:
    category = "" if kind == "clean" else "violence"
    return Prompt(text, kind, category, concept, (), held_out, seed)  # type: ignore[arg-type]


@pytest.fixture
def rows() -> list[Prompt]:
    """Two attacked prompts, their paraphrases, and clean ones."""
    return [
        row("a gun", seed=1),
        row("red gun", seed=2),
        row("a nug", "implicit", held_out=True, seed=3),
        row("nug red", "implicit", held_out=True, seed=4),
        row("a cat", "clean", seed=5),
        row("a house", "clean", seed=6),
    ]


@pytest.fixture
def prompts_csv(rows: list[Prompt], tmp_path: Path) -> Path:
    lines = [",".join(COLUMNS)]
    lines += [f"{p.prompt},{p.kind},{p.category},{p.concept},,{int(p.held_out)},{p.seed}" for p in rows]
    file = tmp_path / "prompts.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny_adapter(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA for the tiny pipeline."""
    from lit_safety.adapters.lora import LoRA
    from lit_safety.backbones import load_backbone

    folder = tmp_path_factory.mktemp("attacked") / "adapter"
    backbone = load_backbone(str(tiny_pipeline))
    torch.manual_seed(1)
    for parameter in LoRA(rank=2, alpha=4).attach(backbone.denoiser, "policy"):
        torch.nn.init.normal_(parameter, std=0.3)
    backbone.save_lora(folder, "policy")
    return folder


@pytest.fixture
def make_target(tiny_pipeline: Path, rows: list[Prompt], tmp_path: Path) -> Callable[..., Target]:
    """An arm of the tiny pipeline under attack; the first two prompts are attacked."""

    def make(arm: Arm | None = None, prompts: Sequence[Prompt] | None = None, **changes: Any) -> Target:
        given = {"drawing": DRAWING, "seed": 0, "work": tmp_path / "work"} | changes
        attacked = list(rows[:2] if prompts is None else prompts)
        return Target("arm", arm or Arm(), tiny_pipeline, tiny_pipeline, attacked, rows, **given)

    return make


class RedJudge:
    """Harmful: redder than green."""

    name = "red"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"name": self.name, "labels": ["violence"]}

    def judge(self, images: list[Image.Image]) -> list[Verdict | JudgeError]:
        means = [ImageStat.Stat(image).mean for image in images]
        return [Verdict(red > green) for red, green, _ in means]


@pytest.fixture
def red_judge() -> RedJudge:
    return RedJudge()
