"""The README.md of a merged adapter, and of a pipeline it is fused into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_safety.adapters.model_card import WARNING


def merge_card(report: Mapping[str, Any], base: str, fused: bool = False) -> str:
    """The card as Markdown with the hub's front matter, out of what `report.json` says."""
    experts = "\n".join(
        f"| {name} | {report['recipe']['weights'][name]:g} | {', '.join(map(str, e['ranks']))} | {e['layers']} |"
        for name, e in report["experts"].items()
    )
    settings = "\n".join(f"| {key} | {value} |" for key, value in _settings(report).items())
    if fused:
        load = 'DiffusionPipeline.from_pretrained("THIS_FOLDER")'
        what = f"`{base}` with merged safety experts fused into its weights."
    else:
        load = 'pipe.load_lora_weights("THIS_FOLDER")'
        what = f"Safety experts for `{base}`, each trained on one category of harm, merged into one LoRA."
    tags = "[text-to-image, safety]" if fused else "[lora, text-to-image, safety, merge]"
    return f"""---
library_name: diffusers
base_model: {base}
tags: {tags}
---

# Merged safety experts

{what} Load it with

    {load}

{WARNING}

## Experts

| expert | weight | rank | layers |
|---|---|---|---|
{experts}

## Merge

| setting | value |
|---|---|
{settings}

Merged in delta space; relative Frobenius residual of the written update: {report["residual"]:.3g}. Every layer's
residual and the sha256 of every expert are in `report.json`. No picture was judged while merging: measure it with
`python -m lit_safety evaluate`.
"""


def _settings(report: Mapping[str, Any]) -> dict[str, Any]:
    recipe = report["recipe"]
    used = {"ties": ("density",), "dare": ("drop", "seed"), "comerge": ("unit", "statistic", "normalise")}.get(
        recipe["method"], ()
    )
    settings = {"method": recipe["method"], **{key: recipe[key] for key in used}, "scale": recipe["scale"]}
    settings["rank"] = recipe["rank"] or "as needed"
    for key, value in (report["calibration"] or {}).items():
        settings[f"calibration {key}"] = value
    return settings
