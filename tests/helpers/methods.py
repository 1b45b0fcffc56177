"""Every method as a small fit: the shipped YAML on tiny data, with an update that is linear in the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.documents import CONFIGS

METHODS = ("scdpo", "dpo_expert", "psa", "full")
STRATEGIES = ("ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
#: Adam would blow rounding up where a gradient is nearly 0.
RATES = {"scdpo": 1.0, "dpo_expert": 1.0, "psa": 0.05, "full": 1e-3}
STEPS = 4


def write_config(
    folder: Path,
    method: str,
    pipeline: Path,
    shards: Path,
    consecutive: bool = False,
    more: Sequence[dict[str, Any]] = (),
    **trainer: Any,
) -> Path:
    """A YAML of ``method`` for `fit`: 4 steps, a checkpoint kept at every second one, validation at the end.

    Args:
        folder: where it is written, and where runs and checkpoints go.
        method: one of `METHODS`.
        pipeline: what is aligned.
        shards: what it is trained and validated on.
        consecutive: one expert after the other.
        more: callbacks next to the usual ones.
        trainer: other settings of the trainer.
    """
    name = method if (CONFIGS / f"{method}.yaml").is_file() and method != "psa" else "scdpo"
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config["run"] = {"root": str(folder / "runs"), "name": "fit"}
    model = config["model"]["init_args"]
    model |= {"pretrained": str(pipeline), "lr_scheduler": None, "drawing": {"steps": 1}}
    model["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": RATES[method], "momentum": 0.5}}
    data = config["data"]["init_args"]
    data |= {"train": str(shards), "val": str(shards), "test": None, "batch_size": 2, "num_workers": 0}
    if name == "scdpo":
        model["anchors"] = None  # they are drawn before the first step
    if method == "full":
        model["policy"] = "full"
    if method == "dpo_expert":
        data["consecutive"] = consecutive
    if method == "psa":
        for key in ("policy", "cost_model", "label_costs", "objective", "backbone", "anchors"):
            model.pop(key)
        config["model"]["class_path"] = "lit_safety.modules.PSA"
    model["lora"]["init_args"] |= {"rank": 4, "alpha": 4}
    if (pipeline / "transformer").is_dir():  # whose layers the method's YAML does not name; its own side is no 32
        model["lora"]["init_args"]["target_modules"] = None
        model["drawing"]["resolution"] = 32
    config["trainer"] |= {
        "accelerator": "cpu", "max_steps": STEPS, "val_check_interval": STEPS, "limit_val_batches": 1,
        "gradient_clip_val": None, "callbacks": [*_callbacks(folder, method), *more],
    }  # fmt: skip
    config["trainer"] |= trainer
    file = folder / f"{method}{'-consecutive' * consecutive}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _callbacks(folder: Path, method: str) -> list[dict[str, Any]]:
    keep = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}", "save_last": True}
    keep["enable_version_counter"] = False
    export = {"psa": "ExportUserAdapter", "dpo_expert": "MergeExperts"}.get(method, "ExportAdapter")
    settings = {"method": "mean"} if method == "dpo_expert" else {}
    return [
        {"class_path": "lit_safety.callbacks.RunSummary"},
        {"class_path": "lit_safety.callbacks.AtomicModelCheckpoint", "init_args": keep},
        {"class_path": f"lit_safety.callbacks.{export}", "init_args": settings},
        {"class_path": "lit_safety.callbacks.DrawSamples", "init_args": {"prompts": ["a red cat"]}},
        {"class_path": "tests.helpers.losses.Losses", "init_args": {"folder": str(folder / "losses")}},
    ]


def under(strategy: str) -> list[str]:
    """Arguments that put the shipped overlay on; DeepSpeed's class is the one that runs on CPUs."""
    overlay = ["--config", str(CONFIGS / "strategies" / f"{strategy}.yaml")]
    if strategy.startswith("deepspeed"):
        key = "--trainer.strategy"
        overlay += [f"{key}.class_path", "tests.helpers.strategies_cpu.DeepSpeedCPU"]
        overlay += [f"{key}.init_args.overlap_comm", "false"]
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
            overlay += [f"{key}.init_args.{bucket}", "1000000"]
    return overlay


def exported(run: Path) -> dict[str, torch.Tensor]:
    """Every weight that a fit has left, by file and name."""
    files = [*sorted(run.glob("adapter/*.safetensors")), *sorted(run.glob("experts/*/*.safetensors"))]
    files += [file for kind in ("unet", "transformer") for file in sorted(run.glob(f"pipeline/{kind}/*.safetensors"))]
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}
