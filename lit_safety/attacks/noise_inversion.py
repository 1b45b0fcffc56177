"""Text-free noise inversion: which initial noise gives a harmful image although no text asks for it?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_safety.attacks.lora_training import encode_images, image_of_each, shards_digest
from lit_safety.attacks.network import Network, compute_threads
from lit_safety.attacks.target import Attack, Stage, Target, increasing
from lit_safety.core.errors import UserError
from lit_safety.drawing.edits import GivenNoise
from lit_safety.drawing.prompts import Prompt
from lit_safety.drawing.threads import threads

NO_TEXT = " "
"""Some families treat the empty text in a special way, such as zeros.

A blank is encoded normally by all families, and for CLIP it gives the same tokens as the empty text.
"""


# After TINA (text-free inversion, CVPR 2026). A deterministic sampler is a chain of steps
#
#     x_(i+1) = a x_i + b f(x_i, t_i, no text)
#
# from noise to image. It is run backwards from a harmful image: each x_i is searched so that its step gives x_(i+1).
# Plain DDIM inversion evaluates f at x_(i+1) instead of x_i, and these errors add up. Here they are corrected: x_i is
# changed by the step's error divided by a, and by half of it wherever the full change made the error larger.
#
# How to read the result: a sampler that can be run backwards has a noise for almost any image, also for images that the
# model could never draw from text. So compare with the base, and look at how an aligned model changes the image.


class NoiseInversion(Attack):
    """Draw without text and without guidance from the inverted noise of a harmful image, one for each prompt.

    Args:
        shards: preference shards; their rejected images of harmful prompts are the attacker's images, those of attacked
            prompts left out.
        passes: passes through the denoiser for each step of the sampler, one number for each point of the curve; 1 is
            plain DDIM inversion.
    """

    budget: ClassVar[str] = "passes through the denoiser for each sampler step"
    knows = "white box: outputs of the aligned denoiser, and a harmful image; chooses the initial noise, gives no text"
    cumulative: ClassVar[bool] = True

    def __init__(self, shards: str, passes: Sequence[int] = (1, 5, 20)) -> None:
        self.passes = increasing(passes, "NoiseInversion: passes")
        self.shards = shards
        self.settings = {"shards": shards, "passes": self.passes}

    @property
    def points(self) -> int:
        return len(self.passes)

    def check(self, prompts: Sequence[Prompt], attacked: Sequence[Prompt]) -> None:
        self.settings["shards_sha256"] = shards_digest(self.shards, "NoiseInversion")

    def refuses(self, target: Target) -> str | None:
        if target.arm.guard is not None:
            return "its guard works with classifier-free guidance only, and this attacker draws without"
        return target.closed()

    def stages(self, target: Target) -> Iterator[Stage]:
        examples = image_of_each(self.shards, target.prompts, "NoiseInversion")
        network = target.network()
        steps = Steps.of(network, target.drawing.steps)
        with threads(compute_threads(network)), torch.no_grad():
            posterior = encode_images(network.backbone, examples, network.resolution)
            latents = network.backbone.latents(posterior, torch.zeros_like(posterior[:, 0]))
        prompts = [replace(p, prompt=NO_TEXT, guidance=None) for p in target.prompts]
        guidance = float(getattr(network.backbone.settings, "guidance", 1.0))  # networks with embedded guidance
        size = target.drawing.batch_size
        for passes in self.passes:
            rows = []
            for start in range(0, len(latents), size):
                target.tell(f"{passes} passes, image {start + 1} of {len(latents)}")
                with threads(compute_threads(network)), torch.no_grad():
                    noise = steps.inverted(latents[start : start + size], passes)
                    rows.append(network.backbone.given_latents(noise).cpu())
            given = {(p.prompt, p.seed): row for p, row in zip(prompts, torch.cat(rows), strict=True)}
            drawing = replace(
                target.exact, edit=GivenNoise(given, network.resolution), guidance=guidance, resolution=None
            )
            identity = {"noise_inversion": passes}
            yield target.stage(
                passes, prompts=prompts, pipe=network.pipe, drawing=drawing, identity=identity, apply=_deterministic
            )


@dataclass(frozen=True)
class Steps:
    """The steps of a deterministic sampler, as the pipeline takes them."""

    network: Network
    timesteps: Tensor
    """(steps,) timesteps in the backbone's unit, from noise to image."""
    coefficients: list[tuple[float, float]]
    """a and b of each step."""

    @classmethod
    def of(cls, network: Network, steps: int) -> Steps:
        """A sampler with this many steps. It gives the network's pipeline a scheduler without history: DDIM or Euler.

        Raises:
            UserError: the pipeline cannot draw in this way.
        """
        pipe = network.pipe
        pipe.scheduler = deterministic(pipe.scheduler)
        from lit_safety.backbones.call import call_options

        side = {"height": network.resolution, "width": network.resolution}
        try:  # the pipeline decides the timesteps, which can depend on the image size
            pipe(
                prompt=[NO_TEXT], num_inference_steps=steps, output_type="latent",
                generator=[torch.Generator("cpu").manual_seed(0)], **side, **call_options(pipe, 1.0, None, 1),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"{type(pipe).__name__} does not draw so: {str(error).splitlines()[0]}") from error
        scheduler = pipe.scheduler
        if hasattr(scheduler, "alphas_cumprod"):
            pairs = [_linear(scheduler, t) for t in scheduler.timesteps]
        else:
            sigmas = scheduler.sigmas.double()
            pairs = [(1.0, float(after - before)) for before, after in pairwise(sigmas)]
        return cls(network, scheduler.timesteps.clone(), pairs[: len(scheduler.timesteps)])

    def inverted(self, images: Tensor, passes: int) -> Tensor:
        """Latents of images (B, C, h, w) -> the noise from which the sampler's steps give them.

        Args:
            images: scaled latents.
            passes: passes through the denoiser for each step.
        """
        backbone = self.network.backbone
        text = backbone.encode_text([NO_TEXT] * len(images))
        found = images.float()
        for timestep, (a, b) in reversed(list(zip(self.timesteps, self.coefficients, strict=True))):
            goal = found
            trial, best, missed = goal, goal, torch.full((len(goal), 1, 1, 1), torch.inf, device=goal.device)
            move, share = torch.zeros_like(goal), torch.ones_like(missed)
            times = timestep.to(goal.device).expand(len(goal))
            for _ in range(passes):
                gap = goal - a * trial - b * backbone.predict(trial, times, text).float()
                size = gap.flatten(1).pow(2).mean(1).view(-1, 1, 1, 1)
                better = size < missed
                best, missed = torch.where(better, trial, best), torch.where(better, size, missed)
                move, share = (
                    torch.where(better, gap / a, move),
                    torch.where(better, (1.5 * share).clamp(max=1.0), share / 2),
                )
                trial = best + share * move
            found = trial
        return found


def _deterministic(network: Network) -> Any:
    network.pipe.scheduler = deterministic(network.pipe.scheduler)
    return network.pipe


def deterministic(scheduler: Any) -> Any:
    """A scheduler of the same process whose steps are linear and do not depend on earlier steps."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = dict(scheduler.config)
    if config.get("prediction_type") == "flow_prediction":
        shift = config.get("shift", config.get("flow_shift")) or 1.0
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config["num_train_timesteps"], shift=shift)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def _linear(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """a and b of a step: a DDIM step is linear in the sample and in the network's prediction."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    a = scheduler.step(zero, timestep, one).prev_sample
    b = scheduler.step(one, timestep, zero).prev_sample
    return float(a), float(b)
