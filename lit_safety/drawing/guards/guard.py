"""Guards: they change how a model draws, without training. They work together with any adapter.

A guard wraps the denoiser for one batch. It works with the stock pipeline: the pipeline calls the denoiser with the
unguided half and the prompted half of a batch, and the guard changes the inputs or outputs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Guard(ABC):
    """Changes drawing. `settings` holds everything that changes pixels; it is in the report and part of the images'
    names."""

    settings: dict[str, Any]

    @abstractmethod
    def check(self, pipe: Any) -> None:
        """Refuse a pipeline with which the guard cannot work.

        Raises:
            UserError: it cannot.
        """

    @abstractmethod
    def around(self, pipe: Any, prompts: Sequence[str]) -> AbstractContextManager[None]:
        """Inside, `pipe` draws `prompts`, one batch, with the guard."""


Step = Callable[[Callable[..., "Tensor"], "Tensor", Any, "Tensor", dict[str, Any]], "Tensor"]
"""step(denoise, noisy (2B, C, h, w), timestep, text (2B, L, d), keywords) -> prediction (2B, C, h, w), where
denoise(noisy, timestep, text, keywords) is the denoiser; the first half of each is unguided."""


def time_of(timestep: Any) -> float:
    """A timestep as a number: a UNet gets one number, a transformer a row of equal numbers."""
    import torch

    return float(torch.as_tensor(timestep).flatten()[0])


def check_unet(pipe: Any, guard: str) -> None:
    """Refuse a pipeline without a UNet conditioned on text.

    Raises:
        UserError: it does not have one.
    """
    if getattr(pipe, "unet", None) is None or not hasattr(pipe, "text_encoder"):
        raise UserError(f"the guard {guard} needs a pipeline with a UNet; {type(pipe).__name__} does not have one")


@contextmanager
def denoiser_replaced(pipe: Any, step: Step, batch: int) -> Iterator[Any]:
    """Inside, `pipe` calls `step` instead of its denoiser, a UNet or SD3's transformer.

    Yields the private copy of the denoiser that `step` gets: it shares the weights but not the hooks, because other
    threads draw with the same denoiser at the same time.

    Raises:
        UserError: guidance is off, so the unguided half is missing.
    """
    part, first = ("unet", "sample") if getattr(pipe, "unet", None) is not None else ("transformer", "hidden_states")
    original = getattr(pipe, part)
    private, shell = private_copy(original), copy.copy(original)

    def denoise(noisy: Tensor, timestep: Any, text: Tensor, keywords: dict[str, Any]) -> Tensor:
        given = {**_for_all_rows(keywords, len(noisy), batch), "return_dict": False}
        return private.forward(**{first: noisy}, timestep=timestep, encoder_hidden_states=text, **given)[0]

    def forward(*given: Any, **keywords: Any) -> tuple[Tensor]:
        keywords |= dict(zip((first, "timestep", "encoder_hidden_states"), given, strict=False))
        noisy, timestep, text = (keywords.pop(name) for name in (first, "timestep", "encoder_hidden_states"))
        if len(noisy) != 2 * batch:
            raise UserError("guards need classifier-free guidance: give a --guidance above 1")
        return (step(denoise, noisy, timestep, text, keywords),)

    shell.forward = forward
    setattr(pipe, part, shell)
    try:
        yield private
    finally:
        setattr(pipe, part, original)


def _for_all_rows(keywords: dict[str, Any], rows: int, batch: int) -> dict[str, Any]:
    """Inputs with one row for each (2B), for a guard's `rows`; additional rows repeat those of the prompts.

    These are the user tokens of an adapter for users, and SDXL's pooled text and sizes.
    """
    import torch

    def more(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != 2 * batch or rows == 2 * batch:
            return value
        return torch.cat([value, *[value[batch:]] * (rows // batch - 2)])

    found = dict(keywords)
    for name in ("cross_attention_kwargs", "added_cond_kwargs"):
        if isinstance(own := found.get(name), dict):
            found[name] = {key: more(value) for key, value in own.items()}
    return found


def private_copy(denoiser: Any) -> Any:
    """The same weights in a denoiser whose up blocks, if it has them, can be hooked without an effect on other
    threads."""
    import torch

    own = copy.copy(denoiser)
    own._modules = dict(denoiser._modules)
    if not hasattr(denoiser, "up_blocks"):
        return own
    blocks = []
    for block in denoiser.up_blocks:
        blocks.append(copy.copy(block))
        blocks[-1]._forward_pre_hooks = type(block._forward_pre_hooks)(block._forward_pre_hooks)
        blocks[-1]._forward_pre_hooks_with_kwargs = type(block._forward_pre_hooks_with_kwargs)()
    own._modules["up_blocks"] = torch.nn.ModuleList(blocks)
    return own
