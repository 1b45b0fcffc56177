"""Experts and their merge through `main`, the function behind `python -m lit_safety`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.adapters.lora import WEIGHTS_NAME
from lit_safety.adapters.lora_file import read_lora
from tests.helpers.small_fits import small_fit

CATEGORIES = ("hate", "violence")
Arguments = Callable[..., list[str]]
Weights = dict[str, torch.Tensor]

#: Every step's checkpoint is kept.
EVERY_STEP = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    *("--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_top_k", "-1"),
    *("--trainer.callbacks.filename", "{step}", "--trainer.callbacks.dirpath"),
]
#: A constant rate and an update that is linear in the gradient, with a momentum that would move what idles.
SGD = [
    *("--model.init_args.optimizer.class_path", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "0.1"),
    *("--model.init_args.optimizer.init_args.momentum", "0.9", "--model.init_args.lr_scheduler", "null"),
    *("--trainer.gradient_clip_val", "null", "--trainer.limit_val_batches", "0"),
]
CONSECUTIVE = ["--data.init_args.consecutive", "true"]


@pytest.fixture
def command_line(tiny_pipeline: Path, category_shards: Path, tmp_path: Path) -> Arguments:
    """Arguments of a trainer command on tiny data of two categories, writing under ``tmp_path``."""

    def arguments(command: str, *more: str) -> list[str]:
        settings = {
            "model.init_args.pretrained": tiny_pipeline,
            "model.init_args.lora.init_args.rank": 4,
            "model.init_args.drawing.steps": 1,
        }
        return small_fit(command, ["dpo_expert.yaml"], tmp_path / "runs", category_shards, settings, more)

    return arguments


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "dpo_expert" / "latest"


def experts_of(run: Path) -> dict[str, Weights]:
    return {name: load_file(run / "experts" / name / WEIGHTS_NAME) for name in CATEGORIES}


def largest(weights: Weights) -> float:
    return max(value.abs().max().item() for name, value in weights.items() if "lora_B" in name)


def difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def zero(stage: int) -> list[str]:
    strategy = {"class_path": "tests.helpers.strategies_cpu.DeepSpeedCPU", "init_args": {"stage": stage}}
    return ["--trainer.strategy", json.dumps(strategy)]


def run_apart(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what starts further ranks, or leaves a process group behind."""
    command = [sys.executable, "-m", "lit_safety", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_merged(run: Path) -> None:
    """The merged adapter is one LoRA whose columns lie in the span of the experts'."""
    experts = [read_lora(run / "experts" / name) for name in CATEGORIES]
    assert json.loads((run / "adapter" / "report.json").read_text())["recipe"]["method"] == "regmean"
    for name, layer in read_lora(run / "adapter").items():
        spanned = torch.cat([expert[name].b.double() for expert in experts], dim=1)
        merged = layer.delta()
        assert float(merged.abs().max()) > 0
        inside = spanned @ torch.linalg.lstsq(spanned, merged, driver="gelsd").solution
        assert float((inside - merged).abs().max()) < 1e-4 * float(merged.abs().max())


def check_comerged(run: Path) -> None:
    """Every row of the merged adapter is that of one expert, scaled."""
    experts = [read_lora(run / "experts" / name) for name in CATEGORIES]
    scale = json.loads((run / "adapter" / "report.json").read_text())["recipe"]["scale"]
    for name, layer in read_lora(run / "adapter").items():
        whole = [scale * expert[name].delta() for expert in experts]
        rows = torch.stack([(layer.delta() - delta).abs().amax(dim=1) for delta in whole])
        assert float(rows.min(dim=0).values.max()) < 1e-6 * max(1.0, float(layer.delta().abs().max()))
        assert float(layer.delta().abs().max()) > 0


def test_a_fit_merges_by_the_method_that_its_yaml_names(command_line: Arguments, latest: Path, tmp_path: Path):
    overlay = tmp_path / "comerge.yaml"
    overlay.write_text(
        "trainer: {callbacks: [{class_path: lit_safety.callbacks.MergeExperts, init_args: {method: comerge, "
        "calibration: {steps: 1, timesteps: 1}}}]}\n"
    )
    assert main(command_line("fit", "--config", str(overlay))) == 0
    check_comerged(latest)
    report = json.loads((latest / "adapter" / "report.json").read_text())
    assert report["recipe"]["scale"] == pytest.approx(1.06 * 2**0.5)
    assert report["calibration"]["categories"] == list(CATEGORIES)


def test_a_fit_trains_for_the_merge_and_keeps_its_statistics(command_line: Arguments, latest: Path, tmp_path: Path):
    """By a YAML: OSRM, two rounds of regmean, and what an expert is added from later; the cards say it."""
    from lit_safety.merging.kept import read_kept

    small = "calibration: {steps: 1, each: 1, clean: 1}"
    overlay = tmp_path / "for_merging.yaml"
    overlay.write_text(
        "model: {init_args: {for_merging: {class_path: lit_safety.modules.ForMerging, init_args: {init: osrm, "
        f"rounds: 2, {small}}}}}}}}}\n"
        "trainer: {callbacks: [{class_path: lit_safety.callbacks.MergeExperts, init_args: {keep_statistics: true, "
        f"{small}}}}}]}}\n"
    )
    assert main(command_line("fit", "--config", str(overlay))) == 0
    check_merged(latest)
    assert [one.expert.name for one in read_kept(latest / "adapter").experts] == list(CATEGORIES)
    card = (latest / "experts" / CATEGORIES[0] / "README.md").read_text()
    assert "osrm" in card
    assert "| rounds | 2 |" in card


def test_a_fit_leaves_experts_and_their_merge(command_line: Arguments, latest: Path, tiny_pipeline: Path):
    assert main(command_line("fit")) == 0
    check_merged(latest)
    report = json.loads((latest / "adapter" / "report.json").read_text())
    assert report["calibration"]["prompts by expert"] == dict.fromkeys(CATEGORIES, 1)
    assert report["calibration"]["clean prompts"] == 1
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(latest / "adapter")
    assert list(report["experts"]) == list(CATEGORIES)
    steps = 0
    for name in CATEGORIES:
        card = (latest / "experts" / name / "README.md").read_text()
        assert f"| category | {name} |" in card
        assert f"| val/rewards/margins/{name} |" in card
        steps += int(card.split("| steps | ")[1].split(" ")[0])
    assert steps == 4
    assert (latest / "adapter" / "config.yaml").read_text() == (latest / "config.yaml").read_text()


def test_a_single_category_gives_a_normal_adapter(command_line: Arguments, latest: Path):
    one = ["--data.init_args.categories", "[violence]", "--model.init_args.categories", "[Violence]"]
    assert main(command_line("fit", *one, "--trainer.max_steps", "2")) == 0
    assert largest(load_file(latest / "adapter" / WEIGHTS_NAME)) > 0
    assert not (latest / "experts").exists()
    assert main(command_line("validate", *one, "--ckpt_path", "last")) == 0


def test_resumed_is_uninterrupted_to_the_bit(command_line: Arguments, latest: Path):
    """8 steps in one run, or 3 and then 5: the resting experts' optimizers go on where they were, too."""
    common = ["--trainer.limit_val_batches", "0", "--model.init_args.lr_scheduler.init_args.total_steps", "8"]
    assert main(command_line("fit", *common, "--trainer.max_steps", "8")) == 0
    whole = experts_of(latest)
    last = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    last += ["--trainer.callbacks.every_n_train_steps", "3", "--trainer.callbacks.save_last", "true"]
    assert main(command_line("fit", *common, *last, "--trainer.max_steps", "3")) == 0
    assert main(command_line("fit", *common, "--trainer.max_steps", "8", "--ckpt_path", "last")) == 0
    resumed = experts_of(latest)
    for name in CATEGORIES:
        assert difference(whole[name], resumed[name]) == 0.0
        assert largest(whole[name]) > 0


def everything_of(checkpoint: dict[str, Any], expert: str) -> list[torch.Tensor]:
    """An expert's weights and optimizer state, at any place in a checkpoint."""
    bank = checkpoint["experts"]
    if bank["active"] == expert:
        states = checkpoint["optimizer_states"][0]["state"]
        return [*checkpoint["state_dict"].values(), *(v for one in states.values() for v in one.values())]
    rests = bank["resting"].get(expert)
    if rests is None:
        return []
    return [*rests["weights"].values(), *(v for one in rests["optimizer"].values() for v in one.values())]


def test_on_two_ranks_idle_experts_do_not_move_by_a_bit(command_line: Arguments, latest: Path, tmp_path: Path):
    """And two ranks of 4 are one of 8. An expert is compared over the steps that were not its own."""
    kept = [*EVERY_STEP, str(tmp_path / "kept")]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = run_apart(command_line("fit", *SGD, *kept, *two, "--trainer.max_steps", "5"))
    assert done.returncode == 0, done.stderr
    steps = [torch.load(tmp_path / "kept" / f"step={n}.ckpt", weights_only=False) for n in range(1, 6)]
    turns = [one["experts"]["active"] for one in steps]
    assert set(turns) == set(CATEGORIES)
    idle = 0
    for before, after, turn in zip(steps, steps[1:], turns[1:], strict=False):
        for name in CATEGORIES:
            old, new = everything_of(before, name), everything_of(after, name)
            if name == turn:
                assert not old or any(not torch.equal(a, b) for a, b in zip(old, new, strict=False))
            elif old:
                assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
                idle += 1
    assert idle >= 2
    check_merged(latest)
    ranks = experts_of(latest)
    assert main(command_line("fit", *SGD, "--trainer.max_steps", "5", "--data.init_args.batch_size", "8")) == 0
    for name, whole in experts_of(latest).items():
        assert largest(whole) > 1e-4
        assert difference(whole, ranks[name]) < 1e-2 * largest(whole)


def test_under_deepspeed_one_expert_after_the_other(command_line: Arguments, latest: Path):
    """ZeRO 2 on one process, next to the same phases without it."""
    assert main(command_line("fit", *SGD, *CONSECUTIVE)) == 0
    plain = experts_of(latest)
    done = run_apart(command_line("fit", *SGD, *CONSECUTIVE, *zero(2)))
    assert done.returncode == 0, done.stderr
    check_merged(latest)
    for name, weights in experts_of(latest).items():
        assert largest(plain[name]) > 1e-4
        assert difference(weights, plain[name]) < 1e-2 * largest(plain[name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_phases_on_two_ranks_of_deepspeed_and_their_resume(command_line: Arguments, latest: Path, stage: int):
    """With validation, and stopped in the second phase; the merge at the end is that of what was trained."""
    two = [*CONSECUTIVE, *zero(stage), "--trainer.devices", "2", "--trainer.max_steps", "8"]
    two += ["--data.init_args.batch_size", "2"]
    done = run_apart(command_line("fit", *two))
    assert done.returncode == 0, done.stderr
    whole = experts_of(latest)
    assert (latest / "adapter" / "report.json").is_file()
    stop = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    stop += ["--trainer.callbacks.every_n_train_steps", "6", "--trainer.callbacks.save_last", "true"]
    stop += ["--trainer.callbacks+=tests.helpers.stop_at.StopAt", "--trainer.callbacks.step", "6"]
    done = run_apart(command_line("fit", *two, *stop))
    assert done.returncode == 0, done.stderr
    done = run_apart(command_line("fit", *two, "--ckpt_path", "last"))
    assert done.returncode == 0, done.stderr
    for name, weights in experts_of(latest).items():
        assert difference(weights, whole[name]) == 0.0
        assert all(value.numel() > 0 for value in weights.values())
