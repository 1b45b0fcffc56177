"""docs/tutorials/own-model.md, played through: its files are written, its commands run in order, on a tiny pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lit_safety.__main__ import main
from tests.helpers.documents import ROOT, blocks, commands, files

PAGE = ROOT / "docs" / "tutorials" / "own-model.md"

#: What a test makes smaller, by the command's first words.
SMALLER: dict[str, dict[str, object]] = {
    "fit --config configs/cost_model.yaml": {
        "model.init_args.width": 4,
        "model.init_args.lr_scheduler": "null",
        "data.init_args.batch_size": 4,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 1,
        "trainer.accelerator": "cpu",
    },
    "fit --config configs/scdpo.yaml": {
        "model.init_args.lora.init_args.rank": 2,
        "model.init_args.drawing.steps": 1,
        "data.init_args.resolution": 32,
        "data.init_args.num_workers": 0,
        "trainer.precision": "32-true",
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.accelerator": "cpu",
    },
    "shards precompute": {"resolution": 32, "device": "cpu"},
    "shards score": {"device": "cpu"},
    "evaluate": {"steps": 1, "device": "cpu", "other_world": "true"},  # the toy world's judge stands in
}


def tables() -> dict[str, str]:
    """The page's CSV files by their first columns."""
    text = re.sub(r"^    ", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = re.findall(r"^(prompt,.*\n(?:.+,.*\n)+)", text, re.MULTILINE)
    pairs, prompts = found
    return {"pairs": pairs, "prompts": prompts}


def write_pairs(folder: Path, name: str) -> None:
    """The page's two rows four times, with an image for each name."""
    header, *rows = tables()["pairs"].splitlines()
    more = [re.sub(r"\b(\d{4})-", rf"{name}\1-{copy}-", row) for copy in range(4) for row in rows]
    (folder / f"{name}.csv").write_text("\n".join([header, *more, ""]), encoding="utf-8")
    for number, file in enumerate(re.findall(r"[\w-]+\.png", "\n".join(more))):
        Image.new("RGB", (32, 32), (9 * number % 256, 40, 255 - 9 * number % 256)).save(folder / file)


def run(words: list[str], stand_ins: dict[str, str]) -> None:
    """One of the page's commands, smaller, with other models in place of those of the hub."""
    words = [stand_ins.get(word, word) for word in words]
    small = next((options for begin, options in SMALLER.items() if " ".join(words).startswith(begin)), {})
    if "configs/models/sd15.yaml" in words:  # which names the hub's model
        small = small | {"model.init_args.pretrained": stand_ins["stable-diffusion-v1-5/stable-diffusion-v1-5"]}
    assert main([*words, *(f"--{key}={value}" for key, value in small.items())]) == 0, " ".join(words)


def test_from_a_folder_of_pairs_to_a_report(
    tiny_pipeline: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("configs", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for name in ("train", "val"):
        write_pairs(tmp_path, name)
    (tmp_path / "my-prompts.csv").write_text(tables()["prompts"], encoding="utf-8")
    for name, text in files(PAGE).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    stand_ins = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(tiny_pipeline),
        "openai/clip-vit-large-patch14": str(tiny_clip),
        "configs/judges/nudenet_or_q16.yaml": "data/toyworld/judge",
    }
    for words in commands(PAGE):
        run(words, stand_ins)
    weights = load_file(tmp_path / "runs" / "scdpo" / "latest" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(torch.count_nonzero(value) for name, value in weights.items() if "lora_B" in name)
    metrics = json.loads((tmp_path / "runs" / "my-report" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["base"]["n"] == metrics["aligned"]["n"] == 2
    (loading,) = blocks(PAGE, "python")
    exec(loading.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(tiny_pipeline)), {})
