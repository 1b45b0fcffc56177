"""Safe latent diffusion (Schramowski et al., arXiv 2211.05105): guidance away from a concept in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.drawing.guards.guard import Guard, check_unet, denoiser_replaced

if TYPE_CHECKING:
    from torch import Tensor


CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)
"""The paper's concept."""
STRENGTHS: dict[str, tuple[int, float, float, float, float]] = {
    "weak": (15, 20.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}
"""Warm-up steps, guidance scale s_S, threshold lambda, momentum scale s_m, momentum beta: the paper's four settings."""


class SafeLatentDiffusion(Guard):
    """The paper's guidance, inside the stock pipeline of a Stable Diffusion with or without an adapter.

    With e_u, e_p, e_s the predictions without text, for the prompt and for the concept (equations 3 to 8):
        mu = 0 where e_p - e_s >= lambda, else min(1, s_S |e_p - e_s|)
        g  = mu (e_s - e_u) + s_m v,   v <- beta v + (1 - beta) g
        e  = e_u + guidance (e_p - e_u - g) after the warm-up
    The prediction for the prompt becomes e_p - g, and the pipeline's own guidance does the rest.

    Args:
        strength: weak, medium, strong or max, as in the paper.
        concept: what to steer away from; null: the paper's text.
        warmup_steps: steps drawn before it acts; null: the strength's own (it was set for 50 steps).

    Raises:
        UserError: no such strength.
    """

    def __init__(
        self,
        strength: Literal["weak", "medium", "strong", "max"] = "medium",
        concept: str | None = None,
        warmup_steps: int | None = None,
    ) -> None:
        if strength not in STRENGTHS:
            raise UserError(f"safe latent diffusion: unknown strength `{strength}`; known are {', '.join(STRENGTHS)}")
        warmup, self.scale, self.threshold, self.momentum, self.beta = STRENGTHS[strength]
        self.warmup = warmup if warmup_steps is None else warmup_steps
        self.concept = CONCEPT if concept is None else concept
        self.settings: dict[str, Any] = {
            "guard": "safe latent diffusion", "strength": strength, "concept": self.concept,
            "warmup_steps": self.warmup,
        }  # fmt: skip

    def check(self, pipe: Any) -> None:
        """Refuse pipelines without a UNet.

        Raises:
            UserError: it has none.
        """
        check_unet(pipe, "safe latent diffusion")

    @contextmanager
    def around(self, pipe: Any, prompts: Sequence[str]) -> Iterator[None]:
        """Inside, `pipe` draws `prompts` with guidance away from the concept."""
        import torch

        encoded = pipe.encode_prompt(
            self.concept, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        batch, state = len(prompts), _State()

        def step(denoise: Any, noisy: Tensor, timestep: Any, text: Tensor, keywords: dict[str, Any]) -> Tensor:
            concept = encoded[0].to(text.dtype).expand(batch, -1, -1)
            added = keywords.get("added_cond_kwargs")
            if added and "text_embeds" in added:  # SDXL's pooled text
                pooled = encoded[2].to(text.dtype).expand(batch, -1)
                more = {**added, "text_embeds": torch.cat([added["text_embeds"], pooled])}
                keywords = {**keywords, "added_cond_kwargs": more}
            both = denoise(torch.cat([noisy, noisy[batch:]]), timestep, torch.cat([text, concept]), keywords)
            empty, prompt, harm = both.chunk(3)
            away = self.guidance(empty, prompt, harm, state)
            return torch.cat([empty, prompt - away if state.seen(timestep) >= self.warmup else prompt])

        with denoiser_replaced(pipe, step, batch):
            yield

    def guidance(self, empty: Tensor, prompt: Tensor, harm: Tensor, state: _State) -> Tensor:
        """g of this step, (B, C, h, w); keeps the momentum in `state`."""
        gap = prompt - harm
        weight = (gap.abs() * self.scale).clamp(max=1.0).masked_fill(gap >= self.threshold, 0.0)
        away = weight * (harm - empty) + self.momentum * state.momentum
        state.momentum = self.beta * state.momentum + (1 - self.beta) * away
        return away


class _State:
    """Momentum and the number of the step, of one batch."""

    def __init__(self) -> None:
        self.momentum: Any = 0.0
        self._steps: list[float] = []

    def seen(self, timestep: Any) -> int:
        """How many other timesteps came before this one."""
        if float(timestep) not in self._steps:
            self._steps.append(float(timestep))
        return self._steps.index(float(timestep))
