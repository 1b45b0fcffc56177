"""A small fit through the real command line: a shipped YAML on tiny data, the same way for every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.documents import CONFIGS

STAGES = ("train", "val", "test")


def small_fit(
    command: str,
    configs: Sequence[str],
    runs: Path,
    shards: Path | Mapping[str, str | Path],
    settings: Mapping[str, Any] | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """Arguments of a trainer command: 4 steps of 4 pairs on the CPU, validated after the last.

    Args:
        command: `fit`, `validate`, `test` or another one that takes the same YAML.
        configs: files in `configs/`, the later ones over the earlier.
        runs: where runs are written.
        shards: what is trained, validated and tested on; or one folder for each stage.
        settings: by key, next to those here or in their place.
        more: further words; of a key that stands twice the last counts.
    """
    # Anchors are drawn before the first step, which takes longer than the four steps; test_anchors.py has their fits.
    plain = {"model.init_args.anchors": "null"} if "scdpo.yaml" in configs else {}
    if any(key.startswith("model.init_args.anchors") for key in settings or {}):
        plain = {}
    folders = shards if isinstance(shards, Mapping) else dict.fromkeys(STAGES, shards)
    known = {
        "run.root": runs,
        **{f"data.init_args.{stage}": folders[stage] for stage in STAGES},
        "data.init_args.batch_size": 4,
        "data.init_args.num_workers": 0,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.accelerator": "cpu",
        **plain,
        **(settings or {}),
    }
    words = [word for config in configs for word in ("--config", str(CONFIGS / config))]
    words += [word for key, value in known.items() for word in (f"--{key}", str(value))]
    return [command, *words, *more]
