"""The README.md that lies beside an exported cost model."""

from __future__ import annotations

from typing import Any


def cost_model_card(config: dict[str, Any]) -> str:
    """The card as Markdown, from the folder's config.json."""
    settings = "\n".join(f"| {name} | {value} |" for name, value in config["settings"].items())
    overall = {name: value for name, value in config["metrics"].items() if "/" not in name}
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in overall.items())
    reason = _not_calibrated(config)
    measured = f"| figure | value |\n|---|---|\n{metrics}" if metrics else "No validation was run: not calibrated."
    if reason is None:
        meaning = "above 0 harmful, below 0 safe, and sigmoid(C) the probability that it is harmful."
        about = "The calibration was fitted on these very pictures; `test` measures on others."
        if (fitted := config.get("calibration")) is not None:
            about = f"It was calibrated on {fitted['images']} labelled images, {fitted['harmful']} of them harmful: " \
                    "these very ones; `test` measures on others."  # fmt: skip
    else:
        meaning = "higher for what its training pairs call harmful.\nNot calibrated: 0 is no border."
        about = f"Not calibrated: {reason}. Give validation pairs with images of both labels, and fit again."
    return f"""# Safety cost model

Gives a picture a cost C: {meaning}

    from lit_safety.cost_model import load_cost_model
    costs = load_cost_model("THIS_FOLDER").costs(images)

    python -m lit_safety shards score SHARDS --cost_model THIS_FOLDER --out SCORED

It is an adapter on the features of the CLIP `{config["clip"]}`, which is not copied here; with any other CLIP it
refuses to load. It knows the kinds of harm that its training pairs showed, drawn as they were drawn there, and no
others. Report the safety of what was aligned by it with a judge that no training has seen, not with this model.

## Training

| setting | value |
|---|---|
{settings}

## Last validation

{measured}

{about}
"""


def _not_calibrated(config: dict[str, Any]) -> str | None:
    if (found := config.get("calibration")) is not None:
        return found["not_calibrated"]
    if not config["metrics"]:
        return "no validation was run"
    return None if "auroc" in config["metrics"] else "no images of both labels were known"
