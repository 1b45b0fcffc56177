"""The command `merge`: experts trained apart become one LoRA, and with `fuse` a whole pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.merging.options import CalibrationOptions, Recipe

if TYPE_CHECKING:
    from lit_safety.merging.experts import Expert
    from lit_safety.merging.methods import Activity


DEFAULT_CALIBRATION = CalibrationOptions()


def merge(
    experts: list[str],
    out: str = "merged",
    pipeline: str | None = None,
    weights: list[float] | None = None,
    calibration: CalibrationOptions = DEFAULT_CALIBRATION,
    fuse: bool = False,
    device: str | None = None,
    **settings: Any,
) -> None:
    """Merge LoRA experts in delta space into one that stock diffusers loads.

    Writes into `out`: pytorch_lora_weights.safetensors, report.json, README.md, and with `fuse` the folder pipeline/.
    The order of the experts does not matter, and a single one of weight 1 comes out as it went in.

    Args:
        experts: Folders or files of LoRAs, each as PATH or NAME=PATH; diffusers', PEFT's or kohya's layout.
        out: Folder of the merged adapter; an earlier merge there is replaced.
        pipeline: Folder or hub id of the base model, for comerge and fuse, and to look the experts' layers up in where
            it is on this machine; null takes the one that the experts' model cards, or PEFT's configurations, name.
        weights: A weight for each expert, in the order given; null weighs all 1. Not for comerge.
        calibration: comerge: the prompts and how they are looked at.
        fuse: Also write the whole pipeline with the merged adapter in its weights, in fp32.
        device: Where comerge looks at the base model, such as cpu or cuda:1; null takes cuda where there is one.
        **settings: How they are merged, see `Recipe`.

    Raises:
        UserError: an expert cannot be read or merged, they were made for different backbones, or an option is missing.
    """
    from lit_safety.adapters.lora import WEIGHTS_NAME
    from lit_safety.core.progress import counter, quiet_libraries
    from lit_safety.merging.experts import read_experts, united_layers
    from lit_safety.merging.merge_experts import merge_experts, report, table
    from lit_safety.merging.output import REPORT_NAME, check_out, write_merge

    quiet_libraries()
    if weights is not None and len(weights) != len(experts):
        raise UserError(f"--weights: {len(weights)} numbers for {len(experts)} experts; give one for each")
    loaded = read_experts(experts, pipeline)
    named = {expert.name: weight for expert, weight in zip(loaded, weights or [], strict=bool(weights))}
    recipe = Recipe(weights=named, **settings)
    check_out(Path(out), [Path(str(expert.provenance["path"])) for expert in loaded])
    layers = united_layers(loaded)
    base = pipeline or base_of(loaded)
    must_calibrate = recipe.calibrated and len(loaded) > 1  # a single expert owns every row, whatever it does
    needs = [word for word, asked in (("comerge", must_calibrate), ("--fuse", fuse)) if asked]
    if needs and base is None:
        raise UserError(f"{needs[0]} needs the base model, and no expert's card names one: give --pipeline")

    activity = measured = None
    begun = time.monotonic()
    if base is not None and must_calibrate:
        activity, measured = _calibrate(base, loaded, calibration, device)
    calibrated = time.monotonic()
    with counter("merging layers", len(layers)) as tick:
        merged = merge_experts(loaded, recipe, activity, tick)
    seconds = {"calibration": calibrated - begun, "merging": time.monotonic() - calibrated}
    write_merge(Path(out), merged, report(merged, loaded, recipe, measured, seconds), base, fuse)
    print(f"{table(merged)}\n\nadapter   {Path(out) / WEIGHTS_NAME}\nreport    {Path(out) / REPORT_NAME}")
    if fuse:
        print(f"pipeline  {Path(out) / 'pipeline'}")


def base_of(experts: Sequence[Expert]) -> str | None:
    """The base model that the experts' cards or configurations name; None: none of them names one.

    Raises:
        UserError: they name different ones.
    """
    named = {str(e.provenance["base_model"]): e.name for e in experts if e.provenance.get("base_model") is not None}
    if len(named) > 1:
        told = "; ".join(f"{expert}: {base}" for base, expert in named.items())
        raise UserError(
            f"the experts were made for different base models by their cards or configurations ({told}); if it is one "
            "model under several names, give it as --pipeline"
        )
    return next(iter(named), None)


def _calibrate(
    base: str, experts: list[Expert], options: CalibrationOptions, device: str | None
) -> tuple[dict[str, Activity], dict[str, Any]]:
    """The experts' activity, and what the report says of how it was measured."""
    import torch

    from lit_safety.backbones.load import load_backbone
    from lit_safety.drawing.pipelines import local_pipeline
    from lit_safety.drawing.worlds import check_world
    from lit_safety.merging.calibration import calibrate

    if options.prompts is None:
        raise UserError(
            "comerge compares the experts on prompts: give --calibration.prompts (a CSV with a column `prompt`, or a "
            "folder of shards), or another --method, such as mean"
        )
    asked = "--calibration.other_world true"
    check_world(local_pipeline(base), {"--calibration.prompts": options.prompts}, options.other_world, asked)
    backbone = load_backbone(base, key="--pipeline")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        backbone = backbone.to(where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {where}: {str(error).strip().splitlines()[0]}") from error
    activity, measured = calibrate(backbone, experts, options.prompts, options)
    return activity, {**measured, "pipeline": base}
