"""docs/how-to/python.md and the tutorials' drawing: the blocks run unchanged, on a tiny pipeline and few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.documents import ROOT, blocks

PAGE = ROOT / "docs" / "how-to" / "python.md"
FEW = 'explicit=1, implicit=0, lookalike=0, clean=1, categories=["hate"], steps=1, device="cpu", other_world=True'
SMALLER = {
    "max_steps=150": "max_steps=1, limit_val_batches=1, accelerator='cpu', logger=False, enable_checkpointing=False",
    "batch_size=16": "batch_size=4",
    "num_inference_steps=20": "num_inference_steps=1",
    'out="my-report"': f'out="my-report", {FEW}',
}


def smaller(text: str, tiny_pipeline: Path) -> str:
    """The block with few steps and the tiny pipeline in the toy world's place."""
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return re.sub(
        r'f?"({world}/pipeline|data/toyworld/pipeline|stable-diffusion-v1-5/stable-diffusion-v1-5)"',
        f'"{tiny_pipeline}"',
        text,
    )


def test_the_page_trains_evaluates_draws_and_writes(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(PAGE, "python"):
        exec(smaller(block, tiny_pipeline), names)
    assert (tmp_path / "my-adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert set(names["metrics"]) >= {"base", "aligned", "differences"}
    assert json.loads((tmp_path / "my-report" / "metrics.json").read_text()) == json.loads(json.dumps(names["metrics"]))
    assert names["image"].size == (32, 32)
    assert (tmp_path / "my-shards" / "train" / "manifest.json").is_file()


def test_the_page_shows_all_that_is_made_smaller() -> None:
    """Else a changed page would train for its full length here."""
    text = "\n".join(blocks(PAGE, "python"))
    assert all(large in text for large in SMALLER)


def test_training_and_evaluating_take_ten_lines() -> None:
    """Imports, and the lines behind them: ten in all where each is one statement."""
    import ast

    body = ast.parse(blocks(PAGE, "python")[0]).body
    assert len(body) <= 10


def test_the_notebooks_cells_run_in_order(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without jupyter: its code cells, one after the other, with fewer steps; the file holds no outputs."""
    notebook = json.loads((ROOT / "examples" / "train_and_evaluate.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], {cell["cell_type"] for cell in notebook["cells"]}) == (4, {"markdown", "code"})
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            text = smaller("".join(cell["source"]), tiny_pipeline)
            assert "%" not in text.split()
            exec(text, names)
    assert names["metrics"]["aligned"]["n"] > 0
    assert names["sheet"].size[0] > 0
    assert (tmp_path / "my-report" / "index.html").is_file()
