"""Published training steps of Diffusion-DPO in our own words: what ours is compared with. Nothing here is lit_safety's.

Each encodes images and words at every step and waits for its figures, as its trainer does. `SafetyDPO` (arXiv
2412.10493) runs a second whole UNet as the reference; `Example` is the step of diffusers' example of Diffusion-DPO
(`train_diffusion_dpo.py`, arXiv 2311.12908), which runs the same UNet with its adapters off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

#: As published: rank 4 on the attention projections, AdamW, gradient clipped at 1.
RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BETA = 5000.0
#: Nothing is learned: on the same pairs over and over the loss would saturate, and gradients too small for normal
#: numbers make a CPU many times slower.
RATE = 1e-12


class Clock:
    """Seconds by part of a step, measured only while it is on: waiting for a device costs time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on = False
        self.seconds: dict[str, float] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as the part `name`."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call


def half_of(device: torch.device) -> torch.dtype | None:
    """Both sides in fp32 on a CPU, in bf16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else None


def autocast(device: torch.device) -> Any:
    half = half_of(device)
    return nullcontext() if half is None else torch.autocast(device.type, half)


def update(optimizer: torch.optim.Optimizer, parameters: list[Any]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Recipe:
    """A published step.

    Args:
        vae, texts, policy: the networks; the policy has its LoRA.
        scheduler: the noise schedule.
        parameters: the LoRA's.
        reference: a second UNet without LoRA; None: it is the policy with its adapters off.
    """

    #: Images that go through the VAE at once; None: all.
    encoded: ClassVar[int | None] = None

    def __init__(
        self, vae: Any, texts: list[Any], policy: Any, scheduler: Any, parameters: list[Any], reference: Any = None
    ) -> None:
        self.vae, self.texts, self.policy, self.scheduler = vae, texts, policy, scheduler
        self.reference, self.parameters = reference, parameters
        self.device = parameters[0].device
        self.clock = Clock(self.device)
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2)

    def latents(self, images: Tensor) -> Tensor:
        """Sampled and scaled latents of images in [-1, 1]."""
        parts = images.to(self.vae.dtype).split(self.encoded or len(images))
        drawn = [self.vae.encode(one).latent_dist.sample() for one in parts]
        return torch.cat(drawn) * self.vae.config.scaling_factor

    def condition(self, tokens: Tensor, size: int) -> dict[str, Any]:
        """Words through the text encoders, for chosen and rejected."""
        outputs = [text(tokens, output_hidden_states=True) for text in self.texts]
        if len(outputs) == 1:
            return {"encoder_hidden_states": outputs[0][0].repeat(2, 1, 1)}
        hidden = torch.cat([one.hidden_states[-2] for one in outputs], dim=-1).repeat(2, 1, 1)
        sides = [float(size), float(size)]
        ids = torch.tensor([[*sides, 0.0, 0.0, *sides]], device=self.device).repeat(len(hidden), 1)
        added = {"text_embeds": outputs[1][0].repeat(2, 1), "time_ids": ids.to(hidden.dtype)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    def train(self, images: Tensor, tokens: Tensor) -> float:
        """One optimizer step on B pairs; returns the loss.

        Args:
            images: (2B, 3, H, W) in [-1, 1]: chosen, then rejected.
            tokens: (B, L) of their prompts.
        """
        pairs = len(tokens)
        with autocast(self.device):
            with torch.no_grad():
                with self.clock.part("VAE"):
                    latents = self.latents(images)
                with self.clock.part("text"):
                    condition = self.condition(tokens, images.shape[-1])
                noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
                timesteps = torch.randint(0, 1000, (pairs,), device=self.device).repeat(2)
                noisy = self.scheduler.add_noise(latents, noise, timesteps)
            with self.clock.part("policy"):
                policy = error(self.policy(noisy, timesteps, **condition).sample, noise)
            with torch.no_grad(), self.clock.part("reference"):
                reference = error(self.refer(noisy, timesteps, condition), noise)
            differences = [one[:pairs] - one[pairs:] for one in (policy, reference)]
            logits = -0.5 * BETA * (differences[0] - differences[1])
            loss = self.loss(logits)
        found = self.say(loss, policy, reference, logits)
        with self.clock.part("backward"):
            loss.backward()
        with self.clock.part("optimizer"):
            update(self.optimizer, self.parameters)
        return found

    def refer(self, noisy: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
        """The reference's prediction."""
        raise NotImplementedError

    def loss(self, logits: Tensor) -> Tensor:
        """Of the pairs' logits (B,)."""
        raise NotImplementedError

    def say(self, loss: Tensor, policy: Tensor, reference: Tensor, logits: Tensor) -> float:
        """Fetch what the trainer logs at each step; returns the loss."""
        return float("nan") if loss.device.type == "meta" else loss.item()


class SafetyDPO(Recipe):
    """A second UNet, and the mean of the pairs' losses."""

    def refer(self, noisy: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
        return self.reference(noisy, timesteps, **condition).sample

    def loss(self, logits: Tensor) -> Tensor:
        return -logsigmoid(logits).mean()


class Example(Recipe):
    """The policy without its adapters, the loss of the pairs' mean logit, eight images at once through the VAE."""

    encoded = 8

    def refer(self, noisy: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
        self.policy.disable_adapters()
        predicted = self.policy(noisy, timesteps, **condition).sample
        self.policy.enable_adapters()
        return predicted

    def loss(self, logits: Tensor) -> Tensor:
        return -logsigmoid(logits.mean())

    def say(self, loss: Tensor, policy: Tensor, reference: Tensor, logits: Tensor) -> float:
        right = (logits > 0).float().mean() + 0.5 * (logits == 0).float().mean()
        for figure in (policy.mean(), reference.mean(), right):
            figure.item()
        return super().say(loss, policy, reference, logits)


def error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
