"""How a stock pipeline's call is given guidance and a negative prompt: families name and count them differently."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lit_safety.core.errors import UserError

#: What Qwen-Image's makers draw with where nothing is to be avoided: without any it draws without guidance.
NOTHING = " "


def call_options(pipe: Any, guidance: float, negatives: Sequence[str] | None = None, count: int = 1) -> dict[str, Any]:
    """Arguments of ``pipe``'s call for a guidance, 1 being none; of embedded guidance the scale that is told.

    Args:
        pipe: a stock pipeline.
        guidance: the scale.
        negatives: what is to be avoided, one text an image; None: nothing.
        count: images that are drawn.

    Raises:
        UserError: there are negative prompts, and the pipeline takes none, or would pass over them.
    """
    kind = type(pipe).__name__
    options: dict[str, Any] = {}
    if negatives is not None:
        options["negative_prompt"] = list(negatives)
        taken = inspect.signature(type(pipe).__call__).parameters
        silent = kind.startswith("Flux") or "negative_prompt" not in taken  # FLUX.1's is read by true guidance alone
        if silent and not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
            raise UserError(
                f"{kind} draws without negative prompts: leave them out (of `shards generate`: --counterpart same_seed)"
            )
    if kind.startswith("QwenImage"):
        options["true_cfg_scale"] = guidance
        if guidance > 1:
            options.setdefault("negative_prompt", [NOTHING] * count)
        return options
    if kind.startswith("ZImage"):  # pos + g (pos - neg)
        return options | {"guidance_scale": max(guidance - 1, 0.0)}
    if kind.startswith("Sana"):  # else it draws the nearest of its own sizes and scales that
        options["use_resolution_binning"] = False
    return options | {"guidance_scale": guidance}


def passes_of(pipeline: str, guidance: float) -> list[tuple[bool, ...]]:
    """What the denoiser is called with at each step of a stock pipeline, by its class: for every call, of what its rows
    are made in their order, whether with the prompt. One call of one kind where guidance takes no second half."""
    if pipeline.startswith(("QwenImage", "Flux2Klein")):
        return [(True,), (False,)] if guidance > 1 else [(True,)]
    if pipeline.startswith("ZImage"):
        return [(True, False)]
    return [(True,)] if pipeline.startswith("Flux") else [(False, True)]
