"""Training a repair for a fixed aligned adapter, and measuring where both matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_safety.adapters.lora import LoRA, adapter_layers, adapters_off
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones.backbone import Backbone
from lit_safety.core.chance import NOISE, normal, sample_seed, uniform
from lit_safety.core.errors import UserError
from lit_safety.merging.calibration import base_layer, draw_latents
from lit_safety.merging.experts import Expert
from lit_safety.merging.grams import acting
from lit_safety.merging.options import CalibrationOptions, RepairOptions
from lit_safety.merging.patching import Sizes, Watch

NAME = "repair"


@dataclass(frozen=True)
class Examples:
    """Prompts with latents of the base's images, both on the CPU."""

    prompts: list[str]
    latents: Tensor
    """(N, C, h, w)"""
    keys: list[str]
    """A unique key for each; keys decide noise and timesteps."""


class Repair:
    """The base with an aligned adapter that is not trained.

    Args:
        backbone: the base, on the device to compute on; a LoRA is attached to it.
        aligned: the aligned adapter.
        drawing: how images are drawn.
        options: how the repair is trained.
        resolution: side of the images in pixels; None: the pipeline's own.

    Raises:
        UserError: the adapter was made for another backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        aligned: Expert,
        drawing: CalibrationOptions,
        options: RepairOptions,
        resolution: int | None = None,
    ) -> None:
        self.resolution = resolution
        self.backbone, self.aligned, self.drawing, self.options = backbone, aligned, drawing, options
        backbone.denoiser.requires_grad_(False)
        backbone.denoiser.eval()
        self.modules: dict[str, nn.Module] = {
            name: base_layer(backbone.denoiser, name, [part], "patch") for name, part in aligned.layers.items()
        }
        self._parameters: list[nn.Parameter] = []

    def examples(self, prompts: Sequence[str], count: int) -> Examples:
        """``count`` images of the base for each prompt."""
        asked = [(prompt, number) for prompt in prompts for number in range(count)]
        drawn = []
        with torch.no_grad(), self._base():
            for start in range(0, len(asked), self.drawing.batch_size):
                some = asked[start : start + self.drawing.batch_size]
                seeds = [sample_seed(self.options.seed, number, prompt) for prompt, number in some]
                prompts_of = [prompt for prompt, _ in some]
                latents = draw_latents(self.backbone, prompts_of, seeds, self.drawing, self.resolution)
                drawn.append(latents.float().cpu())
        return Examples([p for p, _ in asked], torch.cat(drawn), [f"{number}/{prompt}" for prompt, number in asked])

    def train(self, examples: Examples) -> Iterator[float]:
        """Train the repair so that the aligned model predicts on the examples what the base predicts; yields each loss.

        Raises:
            UserError: the loss is not finite.
        """
        options = self.options
        layers = [name.split(".", 1)[1] for name in self.aligned.layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)  # because PEFT draws the initial A from the global generator
            self._parameters = LoRA(rank=options.rank, target_modules=layers).attach(self.backbone.denoiser, NAME)
        for parameter in self._parameters:
            parameter.data = parameter.data.to(self.backbone.device)
        optimizer = torch.optim.AdamW(self._parameters, lr=options.lr)
        order = torch.Generator().manual_seed(options.seed)
        waiting: list[int] = []
        size = min(options.batch_size, len(examples.prompts))
        for step in range(options.steps):
            while len(waiting) < size:
                waiting += torch.randperm(len(examples.prompts), generator=order).tolist()
            rows, waiting = waiting[:size], waiting[size:]
            with torch.enable_grad():
                loss = self._distance(examples, rows, step).mean()
                if not bool(torch.isfinite(loss)):
                    raise UserError(f"--repair.lr {options.lr}: the loss is not finite at step {step + 1}; give less")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            yield float(loss)

    def updates(self) -> dict[str, LowRank]:
        """The trained updates, by layer."""
        named = self.backbone.denoiser.named_parameters()
        weights = {name: one.detach().float().cpu() for name, one in named if f".{NAME}." in name}
        found = {}
        for name, part in self.aligned.layers.items():
            inner = name.split(".", 1)[1]
            a, b = (weights[f"{inner}.lora_{side}.{NAME}.weight"].flatten(1) for side in "AB")
            found[name] = LowRank(a, b, 1.0, part.kernel)
        return found

    def sizes(self, examples: Examples, tick: Callable[[], None] = lambda: None) -> dict[str, Sizes]:
        """E|x| and E|g| of the aligned model without the repair, by layer."""
        watch = Watch(self.modules)
        size = self.options.batch_size
        for start in range(0, len(examples.prompts), size):
            rows = list(range(start, min(start + size, len(examples.prompts))))
            for level in range(self.options.levels):
                with torch.enable_grad():
                    loss = self._distance(examples, rows, level, watch, (level + 0.5) / self.options.levels).sum()
                    loss.backward()  # type: ignore[no-untyped-call]
            tick()
        for parameter in self._parameters:
            parameter.grad = None
        return watch.sizes()

    def _distance(
        self, examples: Examples, rows: list[int], step: int, watch: Watch | None = None, level: float | None = None
    ) -> Tensor:
        """|aligned - base|^2 of the predictions (B,), the mean over their numbers, in fp32.

        Args:
            examples: the examples.
            rows: which of them.
            step: number of the step; with seed and example it decides noise and timestep.
            watch: measures inputs and gradients; the repair is then off.
            level: noise level in [0, 1]; None: drawn at random.
        """
        backbone = self.backbone
        seeds = [sample_seed(self.options.seed, step, examples.keys[row]) for row in rows]
        latents = examples.latents[rows].to(backbone.device)
        noise = normal(seeds, NOISE, latents.shape[1:]).to(latents)
        levels = [uniform(seed, "timestep") if level is None else level for seed in seeds]
        timesteps = backbone.timesteps(
            torch.tensor(levels, dtype=torch.float64), (latents.shape[-2], latents.shape[-1])
        ).to(backbone.device)
        noisy = backbone.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            conditioning = backbone.encode_text([examples.prompts[row] for row in rows])
            with self._base():
                wanted = backbone.predict(noisy, timesteps, conditioning).float()
        with acting(self.aligned, self.modules):
            if watch is None:
                found = backbone.predict(noisy, timesteps, conditioning)
            else:
                with self._base(), watch.watching():
                    found = backbone.predict(noisy, timesteps, conditioning)
        return (found.float() - wanted).pow(2).flatten(1).mean(1)

    @contextmanager
    def _base(self) -> Iterator[None]:
        with adapters_off(adapter_layers(self.backbone.denoiser)):
            yield


def lost_prompts(
    prompts: Sequence[str], before: Sequence[Mapping[str, object]], after: Sequence[Mapping[str, object]]
) -> list[str]:
    """The different prompts for which the base shows every asked benign thing but the aligned model does not.

    Args:
        prompts: the prompt of each image.
        before: the answers for the base's images.
        after: the answers for the aligned model's images.
    """
    figures = ("benign_recall", "benign_recall_lookalike")
    found = [
        prompt
        for prompt, one, other in zip(prompts, before, after, strict=True)
        if any(one.get(figure) is True and other.get(figure) is False for figure in figures)
    ]
    return list(dict.fromkeys(found))
