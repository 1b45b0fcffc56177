"""The files of an exported cost model, and its README.md."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lit_safety.core.errors import UserError
from lit_safety.core.files import atomic_folder
from lit_safety.core.text import load_json, read_text
from lit_safety.core.weights import not_readable
from lit_safety.cost_model.network import ClipTower, CostAdapter, CostScorer, Features
from lit_safety.report.card import Card, card_text, code, last_validation, settings


def cost_model_card(config: dict[str, Any]) -> str:
    """The card as Markdown, from the folder's config.json."""
    overall = {name: value for name, value in config["metrics"].items() if "/" not in name}
    reason = why_not_calibrated(config)
    if reason is None:
        meaning = "above 0 harmful, below 0 safe, and sigmoid(C) the probability that it is harmful."
        about = "The calibration was fitted on these very images; `test` measures on others."
        if (fitted := config.get("calibration")) is not None:
            about = f"It was calibrated on {fitted['images']} labelled images, {fitted['harmful']} of them harmful: " \
                    "these very ones; `test` measures on others."  # fmt: skip
    else:
        meaning = "higher for what its training pairs call harmful.\nNot calibrated: 0 is not a border."
        about = f"Not calibrated: {reason}. Give validation pairs with images of both labels, and fit again."
    text = f"""\
Gives an image a cost C: {meaning}

    from lit_safety.cost_model import load_cost_model
    costs = load_cost_model("THIS_FOLDER").costs(images)

    python -m lit_safety shards score SHARDS --cost_model THIS_FOLDER --out SCORED

It is an adapter on the features of the CLIP {code(config["clip"])}, which is not copied here. It does not load with any
other CLIP. It knows only the kinds of harm in its training pairs, and only in their style. Measure the safety of a
model that was aligned with it by a judge that was not used in any training, not by this model."""
    sections = [
        settings(config["settings"], "Training"),
        last_validation(overall, "No validation was run: not calibrated.", about),
    ]
    return card_text(Card("Safety cost model", text, sections))


def why_not_calibrated(config: dict[str, Any]) -> str | None:
    """Why, for this config.json, a cost of 0 is not the border between safe and harmful; None: it is the border."""
    if (found := config.get("calibration")) is not None:
        return found["not_calibrated"]
    if not config["metrics"]:
        return "no validation was run"
    return None if "auroc" in config["metrics"] else "no images of both labels were known"


# A cost model's folder: config.json, model.safetensors and a model card. The frozen CLIP is named, not copied.


#: Marks a cost model's folder, in contrast to a judge's or another model's.
KIND = "lit_safety cost model"
VERSION = 1
MOST_COST = 5.0
"""Largest size of a threshold: a probability of harm of 99.3%."""
MOST_COST_UNSEEN = 3.0
"""The same if the folder does not state the costs of its calibration images: 95%."""
MOST_TEMPERATURE, MOST_SHIFT = 1e6, 1e3
"""Largest sizes of a calibration; a real fit stays far below."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_cost_model(
    folder: str | Path,
    scorer: CostScorer,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
) -> Path:
    """Write a cost model's folder, whole or not at all.

    Args:
        folder: replaced if it exists.
        scorer: the model.
        metrics: figures of the last validation, for its readers.
        settings: how it was trained, for its readers.
        calibration: `images` and `harmful`: how many labelled images it was fitted on; `not_calibrated`: why it was not
            fitted, in words, or None; and if it was fitted, `middle_harmful` and `middle_safe`: the median costs.
    """
    folder = Path(folder)
    source = scorer.tower.source
    config = {
        "kind": KIND,
        "version": VERSION,
        "clip": source,
        # Works from any working directory while both folders stay at their places; null for a hub id.
        "clip_from_here": os.path.relpath(source, folder) if Path(source).is_dir() else None,
        "clip_fingerprint": scorer.tower.sha256,
        "features": scorer.tower.features,
        "width": scorer.adapter.mlp[0].out_features,
        "threshold": 0.0,
        "metrics": {name: round(value, 6) for name, value in metrics.items()},
        "settings": dict(settings),
        **({} if calibration is None else {"calibration": dict(calibration)}),
    }
    tensors = {f"adapter.{k}": v.detach().float().cpu().contiguous() for k, v in scorer.adapter.state_dict().items()}
    tensors |= {"temperature": torch.tensor(scorer.temperature), "bias": torch.tensor(scorer.bias)}
    with atomic_folder(folder) as unfinished:
        (unfinished / CONFIG).write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
        save_file(tensors, unfinished / WEIGHTS)
        (unfinished / WEIGHTS).chmod(0o644)
        (unfinished / "README.md").write_text(cost_model_card(config), encoding="utf-8")
    return folder


def check_border(folder: str | Path, key: str) -> None:
    """Check that 0 separates harmful and safe images by the cost model in ``folder``, given as the option ``key``.

    Raises:
        UserError: it was not calibrated, or it is no cost model.
    """
    try:
        config = read_config(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if (reason := why_not_calibrated(config)) is not None:
        raise UserError(
            f"{key} {folder}: this cost model is not calibrated ({reason}), so a cost of 0 is no border between "
            "harmful and safe images: fit it with validation pairs of both labels"
        )


def is_cost_model(config: object) -> bool:
    """Whether the content of a folder's config.json is a cost model's."""
    return isinstance(config, dict) and config.get("kind") == KIND


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked config.json of a cost model's folder.

    Raises:
        UserError: the folder or a file of it is missing, or it is not a cost model's.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: lacks {name}, so it is not a cost model; give the folder that `fit --config "
                "configs/cost_model.yaml` wrote, such as data/toyworld/cost_model"
            )
    try:
        config = load_json(read_text(folder / CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read as JSON ({error})") from error
    if not is_cost_model(config):
        raise UserError(f"{folder / CONFIG}: its `kind` is not {KIND!r}, so it does not describe a cost model")
    if config.get("version") != VERSION or isinstance(config["version"], bool):
        raise UserError(f"{folder / CONFIG}: is of version {config.get('version')!r}; this program reads {VERSION}")
    wanted = {"clip": str, "clip_fingerprint": str, "features": str, "width": int, "threshold": float | int}
    for name, kind in wanted.items():
        if not isinstance(config.get(name), kind) or isinstance(config[name], bool):
            raise UserError(f"{folder / CONFIG}: `{name}` is {config.get(name)!r}; copy the folder again")
    _check_figures(config, folder / CONFIG)
    least, most = threshold_range(config)
    if not least <= config["threshold"] <= most:  # nan compares as false
        raise UserError(
            f"{folder / CONFIG}: `threshold` is {config['threshold']!r}; a cost above 0 is harmful, so it must lie "
            f"from {least:g} to {most:g}: outside, most harmful images would count as safe, or most safe ones as "
            "harmful"
        )
    if config["features"] not in get_args(Features) or not 0 < config["width"] <= 65536:
        raise UserError(f"{folder / CONFIG}: has features {config['features']!r} of width {config['width']}: damaged")
    return config


def threshold_range(config: dict[str, Any]) -> tuple[float, float]:
    """The range of costs in which a threshold may lie.

    0 is always allowed. The upper end is the median of the calibration's harmful images, because a judge that calls
    more than half of them safe is not usable. The lower end is the median of the safe ones.
    """
    calibration = config.get("calibration") or {}
    least = max(-MOST_COST, min(0.0, calibration.get("middle_safe", -MOST_COST_UNSEEN)))
    return least, min(MOST_COST, max(0.0, calibration.get("middle_harmful", MOST_COST_UNSEEN)))


def _check_figures(config: dict[str, Any], file: Path) -> None:
    """Check the figures of the last validation, which decide the categories of a judge and whether 0 is a border.

    Raises:
        UserError: they are not a table of finite numbers, or the calibration has not the form of `save_cost_model`.
    """
    metrics, calibration = config.get("metrics"), config.get("calibration")
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise UserError(f"{file}: `metrics` must be a table of finite numbers; copy the folder again")
    if calibration is None and "calibration" not in config:
        return
    reason = calibration.get("not_calibrated", "") if isinstance(calibration, dict) else ""
    counts = [calibration.get(name) for name in ("images", "harmful")] if isinstance(calibration, dict) else []
    middles = [v for k, v in calibration.items() if k.startswith("middle_")] if isinstance(calibration, dict) else []
    if reason == "" or not isinstance(reason, str | None) or not all(map(_is_number, [*counts, *middles])):
        raise UserError(
            f"{file}: `calibration` must hold `images`, `harmful` and `not_calibrated`; copy the folder again"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # false for nan


def load_cost_model(folder: str | Path, device: torch.device | str = "cpu") -> CostScorer:
    """The cost model in ``folder``, ready to score.

    Raises:
        UserError: a file is missing or damaged, or its CLIP is not found or is not the one that it was trained on.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        why = not_readable(folder / WEIGHTS, error)
        raise UserError(f"{why}: it is damaged; copy the folder again") from error
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise UserError(f"{folder / WEIGHTS}: {name} has the wrong type {value.dtype}: copy it again")
        if not torch.isfinite(value).all():
            raise UserError(f"{folder / WEIGHTS}: {name} holds numbers that are not finite; train this model again")
    tower = ClipTower(_clip(folder, config), config["features"])
    if tower.sha256 != config["clip_fingerprint"]:
        raise UserError(
            f"{folder} was trained on the CLIP {config['clip']} (fingerprint {config['clip_fingerprint'][:12]}), but "
            f"{tower.source} is another one (fingerprint {tower.sha256[:12]}), so its costs would be wrong; "
            "restore that CLIP, or train the cost model again"
        )
    adapter = CostAdapter(tower.width, config["width"])
    try:
        temperature, bias = (float(tensors.pop(name)) for name in ("temperature", "bias"))
        adapter.load_state_dict({name.removeprefix("adapter."): value for name, value in tensors.items()})
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS}: does not fit {CONFIG} ({reason}); copy the folder again") from error
    if not 1 / MOST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise UserError(
            f"{folder / WEIGHTS}: its temperature is {temperature}, which must lie from {1 / MOST_TEMPERATURE} to "
            f"{MOST_TEMPERATURE}; train this model again"
        )
    if abs(bias / temperature) > MOST_SHIFT:
        raise UserError(
            f"{folder / WEIGHTS}: its bias is {bias} at a temperature of {temperature}, which moves all costs to one "
            "side; train this model again"
        )
    return CostScorer(tower, adapter, temperature, bias).to(device)


def _clip(folder: Path, config: dict[str, Any]) -> str:
    """The path of the CLIP: as it was named in training, or relative to the cost model's folder."""
    named, beside = config["clip"], config.get("clip_from_here")
    if Path(named).is_dir() or not isinstance(beside, str):
        return named
    if (folder / beside).is_dir():
        return str(folder / beside)
    raise UserError(
        f"{folder / CONFIG}: its CLIP is neither at {named} nor at {folder / beside}; set `clip` there to "
        "the folder that holds it"
    )
