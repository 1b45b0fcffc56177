"""SAFREE (Yoon et al., arXiv 2410.12761): the part of a prompt that lies in a space of unsafe concepts is taken out.

Written anew from the paper's equations. Two effects that are often mixed up are kept apart: no concept is handed to the
pipeline as a negative prompt here, and the re-attention has a switch of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lit_safety.errors import UserError
from lit_safety.evaluation.guards import Guard, check_unet, denoiser_replaced
from lit_safety.evaluation.safree_text import SafeText, safe_texts

if TYPE_CHECKING:
    from torch import Tensor

PHRASES: tuple[str, ...] = (
    *(
        "hate",
        "harassment",
        "violence",
        "suffering",
        "humiliation",
        "suicide",
        "sexual acts",
        "nudity",
        "blood",
        "gore",
    ),
    *("obscene gestures", "illegal activity", "drug use", "theft", "vandalism", "weapons", "abuse", "cruelty"),
)


class SAFREE(Guard):
    """The projection of the prompt, and the re-attention of the latents.

    Args:
        concepts: unsafe phrases; null: `PHRASES`.
        alpha: a token is unsafe when leaving it out moves the prompt (1 + alpha) times as far from the concepts as
            leaving out the others does.
        gamma: the projected prompt is used for the first gamma * sigmoid(1 - cos) steps.
        self_validation: choose the number of those steps by how much the projection changed; off: all steps.
        projection: draw with the projected prompt; off: with the prompt as it is, and the projected one only serves
            the re-attention to compare with.
        reattention: damp low frequencies of the UNet's skip features where the prompt that draws raises them above
            the other one's.
        reattention_scale: factor s below 1 of the re-attention.

    Raises:
        UserError: a number out of its range, or no concepts.
    """

    def __init__(
        self,
        concepts: list[str] | None = None,
        alpha: float = 0.01,
        gamma: float = 10.0,
        self_validation: bool = True,
        projection: bool = True,
        reattention: bool = False,
        reattention_scale: float = 0.9,
    ) -> None:
        self.concepts = list(PHRASES if concepts is None else concepts)
        if not self.concepts or gamma <= 0 or alpha < 0 or not 0 <= reattention_scale < 1:
            raise UserError("SAFREE: needs concepts, alpha from 0, gamma above 0 and reattention_scale in [0, 1)")
        if not projection and not reattention:
            raise UserError("SAFREE: with neither projection nor reattention it would do nothing")
        self.projection = projection
        self.alpha, self.gamma, self.self_validation = alpha, gamma, self_validation
        self.reattention, self.scale = reattention, reattention_scale
        self.settings: dict[str, Any] = {
            "guard": "SAFREE", "concepts": self.concepts, "alpha": alpha, "gamma": gamma,
            "self_validation": self_validation, "projection": projection,
            "reattention": reattention_scale if reattention else None,
        }  # fmt: skip

    def check(self, pipe: Any) -> None:
        """Refuse pipelines without a UNet, or with more than one text encoder.

        Raises:
            UserError: it has none, or several.
        """
        check_unet(pipe, "SAFREE")
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise UserError("the guard SAFREE is defined for one text encoder; this pipeline has two")

    @contextmanager
    def around(self, pipe: Any, prompts: Sequence[str]) -> Iterator[None]:
        """Within, `pipe` draws `prompts` with their unsafe tokens projected away."""
        import torch

        texts = safe_texts(pipe.tokenizer, pipe.text_encoder, prompts, self.concepts, self.alpha)
        last = [self.steps(text) for text in texts]
        safe = torch.stack([text.safe for text in texts])
        batch, seen = len(prompts), list[float]()
        projected: list[Tensor | None] = [None]  # (B,) which rows have another prompt in this step; None: none

        def step(denoise: Any, noisy: Tensor, timestep: Any, text: Tensor, keywords: dict[str, Any]) -> Tensor:
            if float(timestep) not in seen:
                seen.append(float(timestep))
            chosen = torch.tensor([seen.index(float(timestep)) < end for end in last], device=text.device)
            mixed = torch.where(chosen[:, None, None], safe.to(text), text[batch:])
            drawn, other = (mixed, text[batch:]) if self.projection else (text[batch:], mixed)
            projected[0] = chosen if self.reattention and bool(chosen.any()) else None
            if projected[0] is None:
                return denoise(noisy, timestep, torch.cat([text[:batch], drawn]), keywords)
            three = torch.cat([text[:batch], drawn, other])
            return denoise(torch.cat([noisy, noisy[batch:]]), timestep, three, keywords)[: 2 * batch]

        def damp(_: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
            if projected[0] is None:
                return None
            skips = tuple(self.reattend(skip, projected[0]) for skip in keywords["res_hidden_states_tuple"])
            return arguments, {**keywords, "res_hidden_states_tuple": skips}

        with denoiser_replaced(pipe, step, batch) as unet, ExitStack() as hooks:
            for block in unet.up_blocks if self.reattention else ():
                hooks.callback(block.register_forward_pre_hook(damp, with_kwargs=True).remove)
            yield

    def steps(self, text: SafeText) -> float:
        """t' = gamma * sigmoid(b), b = 1 - cos(p, p_proj); without self-validation all steps."""
        if not text.triggers:
            return 0.0
        return self.gamma / (1 + math.exp(-text.change)) if self.self_validation else math.inf

    def reattend(self, skip: Tensor, projected: Tensor) -> Tensor:
        """Skip features (3B, c, h, w) of no text, of the prompt that draws and of the other; the second comes damped.

        In the 3 x 3 lowest frequencies, where |F(drawn)| > |F(other)|, F(drawn) is multiplied by s. Rows whose two
        prompts are the same one, not `projected` (B,), are left alone: there the two differ by rounding only.
        """
        import torch

        empty, drawn, other = skip.split(len(projected))
        changed, given = torch.fft.fft2(drawn.float()), torch.fft.fft2(other.float())
        height, width = skip.shape[-2:]
        near = [(torch.fft.fftfreq(side, 1 / side).abs() <= 1).to(skip.device) for side in (height, width)]
        raised = (changed.abs() > given.abs()) & near[0][:, None] & near[1][None, :]
        raised &= projected[:, None, None, None]
        damped = torch.fft.ifft2(torch.where(raised, self.scale * changed, changed)).real
        damped = torch.where(projected[:, None, None, None], damped.to(skip.dtype), drawn)
        return torch.cat([empty, damped, other])
