"""The README.md that lies beside exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What stands on every card: who loads an adapter must know it.
WARNING = """\
**Do not negate it.** With a negative adapter scale the same weights push the model towards harmful pictures, and a
scale between 0 and 1 protects only in part. A LoRA can be unloaded: it makes a model safer for those who want that,
and is no lock against those who hold the weights."""

_ADAPTER = f"""\
A LoRA that makes `{{base}}` draw less of what it was trained to refuse. Load it with

    pipe.load_lora_weights("THIS_FOLDER")

{WARNING}"""
_PIPELINE = """\
`{base}` with a denoiser trained to draw less of what it should refuse. It is a whole pipeline:

    pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")

It is no lock: who holds the weights can train the harm back."""


@dataclass(frozen=True)
class CardFacts:
    """What a model card states; ``metrics`` are of the run's last validation."""

    base_model: str
    data: str
    method: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    adapter: bool = True
    """Whether a LoRA lies there, or a whole pipeline."""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with the hub's front matter."""
    settings = "\n".join(f"| {name} | {value} |" for name, value in facts.settings.items())
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in facts.metrics.items())
    measured = f"| metric | value |\n|---|---|\n{metrics}" if metrics else "No validation was run."
    return f"""---
library_name: diffusers
base_model: {facts.base_model}
tags: [{"lora, " if facts.adapter else ""}text-to-image, safety, preference-optimisation]
---

# {"Safety adapter" if facts.adapter else "Aligned pipeline"}

{(_ADAPTER if facts.adapter else _PIPELINE).format(base=facts.base_model)}

- Base model: `{facts.base_model}`
- Data: `{facts.data}`
- Method: {facts.method}

## Settings

| setting | value |
|---|---|
{settings}

The whole resolved configuration is in `config.yaml`.

## Last validation

{measured}

Pictures judged before and after are made by `python -m lit_safety evaluate
--{"adapter" if facts.adapter else "arms.aligned.pipeline"} THIS_FOLDER`.
"""
