"""Guards: what changes how a model draws while it draws, without training. They work on top of any adapter.

A guard stands around the denoiser of one batch. It needs no pipeline of its own: the stock pipeline calls the denoiser
with the unguided half and the prompted half of a batch, and a guard changes what goes in or comes out.
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
    """Changes drawing. `settings` holds whatever changes pixels; it stands in the report and names the images."""

    settings: dict[str, Any]

    @abstractmethod
    def check(self, pipe: Any) -> None:
        """Complain when the guard cannot work with this pipeline.

        Raises:
            UserError: it cannot.
        """

    @abstractmethod
    def around(self, pipe: Any, prompts: Sequence[str]) -> AbstractContextManager[None]:
        """Within, `pipe` draws `prompts`, one batch, under the guard."""


Step = Callable[[Callable[..., "Tensor"], "Tensor", Any, "Tensor", dict[str, Any]], "Tensor"]
"""step(denoise, noisy (2B, C, h, w), timestep, text (2B, L, d), keywords) -> prediction (2B, C, h, w), where
denoise(noisy, timestep, text, keywords) is the denoiser; the first half of each is unguided."""


def check_unet(pipe: Any, guard: str) -> None:
    """Refuse a pipeline without a UNet conditioned on text.

    Raises:
        UserError: it has none.
    """
    if getattr(pipe, "unet", None) is None or not hasattr(pipe, "text_encoder"):
        raise UserError(f"the guard {guard} works on pipelines with a UNet; {type(pipe).__name__} has none")


@contextmanager
def denoiser_replaced(pipe: Any, step: Step, batch: int) -> Iterator[Any]:
    """Within, `pipe` calls `step` where it called its UNet; yields the private copy of the UNet that `step` is given.

    The copy shares all weights but not its hooks: other threads draw with the same UNet at the same time.

    Raises:
        UserError: guidance is off, so that there is no unguided half.
    """
    original = pipe.unet
    private, shell = private_copy(original), copy.copy(original)

    def denoise(noisy: Tensor, timestep: Any, text: Tensor, keywords: dict[str, Any]) -> Tensor:
        keywords = _users_of_all_rows(keywords, len(noisy), batch)
        return private.forward(noisy, timestep, encoder_hidden_states=text, **{**keywords, "return_dict": False})[0]

    def forward(noisy: Tensor, timestep: Any, encoder_hidden_states: Tensor, **keywords: Any) -> tuple[Tensor]:
        if len(noisy) != 2 * batch:
            raise UserError("guards need classifier-free guidance: give a --guidance above 1")
        return (step(denoise, noisy, timestep, encoder_hidden_states, keywords),)

    shell.forward = forward
    pipe.unet = shell
    try:
        yield private
    finally:
        pipe.unet = original


def _users_of_all_rows(keywords: dict[str, Any], rows: int, batch: int) -> dict[str, Any]:
    """User tokens (2B, N, d) of an adapter's users for a guard's `rows`; the further ones have the prompts' users."""
    own = keywords.get("cross_attention_kwargs") or {}
    tokens = own.get("user_tokens")
    if tokens is None or len(tokens) == rows:
        return keywords
    import torch

    tokens = torch.cat([tokens, *[tokens[batch : 2 * batch]] * (rows // batch - 2)])
    return {**keywords, "cross_attention_kwargs": {**own, "user_tokens": tokens}}


def private_copy(unet: Any) -> Any:
    """The same weights in a UNet whose up blocks can be hooked without anybody else noticing."""
    import torch

    own = copy.copy(unet)
    own._modules = dict(unet._modules)
    blocks = []
    for block in unet.up_blocks:
        blocks.append(copy.copy(block))
        blocks[-1]._forward_pre_hooks = type(block._forward_pre_hooks)(block._forward_pre_hooks)
        blocks[-1]._forward_pre_hooks_with_kwargs = type(block._forward_pre_hooks_with_kwargs)()
    own._modules["up_blocks"] = torch.nn.ModuleList(blocks)
    return own
