"""Guidance and negative prompts in a stock pipeline's call: families name and count them differently."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lit_safety.core.errors import UserError

#: The negative prompt that Qwen-Image's authors use for none: with no negative prompt it draws without guidance.
NOTHING = " "


def call_options(pipe: Any, guidance: float, negatives: Sequence[str] | None = None, count: int = 1) -> dict[str, Any]:
    """Arguments of ``pipe``'s call for a guidance scale; 1 is none. For embedded guidance it is the network's input.

    Args:
        pipe: a stock pipeline.
        guidance: the scale.
        negatives: negative prompts, one for each image; None: none.
        count: number of images.

    Raises:
        UserError: negative prompts are given, but the pipeline does not take them or would ignore them.
    """
    kind = type(pipe).__name__
    options: dict[str, Any] = {}
    if negatives is not None:
        options["negative_prompt"] = list(negatives)
        taken = inspect.signature(type(pipe).__call__).parameters
        silent = kind.startswith("Flux") or "negative_prompt" not in taken  # FLUX.1 reads them only with true guidance
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
    if kind.startswith("Sana"):  # else it draws in the nearest of its own sizes and rescales
        options["use_resolution_binning"] = False
    return options | {"guidance_scale": guidance}


def passes_of(pipeline: str, guidance: float) -> list[tuple[bool, ...]]:
    """The denoiser's calls in each step of a stock pipeline, by its class.

    For every call: for each part of its rows, whether it is computed with the prompt. Without a second half for
    guidance there is one call with one part.
    """
    if pipeline.startswith(("QwenImage", "Flux2Klein")):
        return [(True,), (False,)] if guidance > 1 else [(True,)]
    if pipeline.startswith("ZImage"):
        return [(True, False)]
    return [(True,)] if pipeline.startswith("Flux") else [(False, True)]
