"""Measure how active each expert is in each output unit, on what the base model itself feeds into its layers.

The base draws the calibration prompts; its drawings are noised to a few levels, and in one forward of the base a batch
and level, with all adapters off, every adapted layer's inputs are passed through every expert's factors. One forward
serves all experts, and no input is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lit_safety.adapters.lora import adapter_layers, adapters_off
from lit_safety.adapters.lora_file import LowRank
from lit_safety.backbones import Backbone
from lit_safety.data.chance import generator, normal, sample_seed
from lit_safety.data.progress import counter
from lit_safety.errors import UserError
from lit_safety.merging.calibration_options import CalibrationOptions
from lit_safety.merging.calibration_prompts import calibration_prompts
from lit_safety.merging.comerge import Activity
from lit_safety.merging.expert import Expert, parts_of, united_layers


def calibrate(
    backbone: Backbone, experts: Sequence[Expert], source: str | Sequence[str], options: CalibrationOptions
) -> tuple[dict[str, Activity], dict[str, Any]]:
    """The experts' activity on prompts of ``source``, with a progress bar, and what a report says of it.

    Raises:
        UserError: there are no prompts, or the experts were made for another backbone.
    """
    prompts = calibration_prompts(source, options.count, options.categories)
    with counter("looking at the base model", forwards(prompts, options)) as tick:
        activity = measure_activity(backbone, experts, prompts, options, tick)
    return activity, {**asdict(options), "prompts": source, "count": len(prompts)}


def forwards(prompts: Sequence[str], options: CalibrationOptions) -> int:
    """How often `measure_activity` ticks."""
    return -(-len(prompts) // options.batch_size) * options.timesteps


@torch.no_grad()
def measure_activity(
    backbone: Backbone,
    experts: Sequence[Expert],
    prompts: Sequence[str],
    options: CalibrationOptions,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Activity]:
    """The activity of each expert (in the order of their names) by layer.

    A prompt's part in it depends on the prompt and ``options.seed`` only, not on its batch.

    Args:
        backbone: the base, on the device to compute on; adapters that are on it are switched off.
        experts: what is compared.
        prompts: each counts once.
        options: noise levels, drawing, batch size, seed.
        tick: called after every forward.

    Raises:
        UserError: an expert adapts a layer that is not the denoiser's, or is sized differently there.
    """
    experts = sorted(experts, key=lambda expert: expert.name)
    device = next(backbone.denoiser.parameters()).device
    probes = {
        name: Probe(_module(backbone.denoiser, name, parts), [_moved(part, device) for part in parts])
        for name, parts in ((name, parts_of(experts, name)) for name in united_layers(experts))
    }
    activity = {name: Activity.empty(len(experts), *probe.parts[0].shape) for name, probe in probes.items()}
    # Blocks that were compiled for the training do not see hooks that come after: nothing would be measured.
    with adapters_off(adapter_layers(backbone.denoiser)), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(prompts), options.batch_size):
            batch = list(prompts[start : start + options.batch_size])
            seeds = [sample_seed(options.seed, 0, prompt) for prompt in batch]
            latents = draw_latents(backbone, batch, seeds, options)
            conditioning = backbone.encode_text(batch)
            for level in range(options.timesteps):
                place = torch.full((len(batch),), (level + 0.5) / options.timesteps, device=device)
                timesteps = backbone.timesteps(place)
                noise = normal(seeds, f"calibration noise {level}", latents.shape[1:]).to(latents)
                with _watched(probes.values()):
                    backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, conditioning)
                tick()
            for name, probe in probes.items():
                seen = probe.take()
                if seen is not None:  # else no forward passes through the layer: whatever it holds changes nothing
                    activity[name].add(*seen)
    return activity


def draw_latents(backbone: Backbone, prompts: list[str], seeds: list[int], options: CalibrationOptions) -> Tensor:
    """The base's drawings of the prompts as latents (B, C, h, w), by the stock pipeline."""
    return backbone.pipeline()(
        prompts,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=[generator(seed, "calibration drawing") for seed in seeds],
        output_type="latent",
    ).images


class Probe:
    """Passes one layer's inputs through every expert's factors and keeps the mean magnitude a unit.

    Args:
        module: the base model's linear or convolution layer.
        parts: every expert's update of it, on the layer's device.
    """

    def __init__(self, module: nn.Module, parts: Sequence[LowRank]) -> None:
        self.module = module
        self.parts = parts
        self.out = parts[0].shape[0]
        self._sum: Tensor | None = None
        self._inputs: Tensor | None = None
        self._calls = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        with torch.autocast(x.device.type, enabled=False):  # in which a network trained in bf16-mixed always computes
            seen = torch.stack([self._magnitude(part, x) for part in self.parts])
        size = self._size(x)
        self._sum = seen if self._sum is None else self._sum + seen
        self._inputs = size if self._inputs is None else self._inputs + size
        self._calls += 1

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Means over tokens and all forwards since the last call: a[k, i, j] (K, B, out) and |x| (B, in).

        None: there was no forward.
        """
        if self._sum is None or self._inputs is None:
            return None
        means = self._sum / self._calls, self._inputs / self._calls
        self._sum, self._inputs, self._calls = None, None, 0
        return means

    def _size(self, x: Tensor) -> Tensor:
        """|x| (B, in), the mean over tokens or places; of a convolution the channel's for each place of its kernel."""
        if self.parts[0].kernel:
            return x.abs().mean(dim=(2, 3)).repeat_interleave(math.prod(self.parts[0].kernel), dim=1)
        return x.abs().reshape(len(x), -1, x.shape[-1]).mean(dim=1)

    def _magnitude(self, part: LowRank, x: Tensor) -> Tensor:
        """|scale * b a x| (B, out), the mean over tokens or places of x, (B, ..., in) or (B, C, H, W)."""
        if part.rank == 0:
            return x.new_zeros(len(x), self.out)
        if part.kernel:
            conv: nn.Conv2d = self.module  # type: ignore[assignment]
            weight = part.a.reshape(part.rank, -1, *part.kernel)
            hidden = nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)
            hidden = hidden.flatten(2).transpose(1, 2)
        else:
            hidden = x.reshape(len(x), -1, x.shape[-1]) @ part.a.T
        return (hidden @ part.b.T).abs().mean(dim=1) * abs(part.scale)


@contextmanager
def _watched(probes: Iterable[Probe]) -> Iterator[None]:
    handles = [probe.module.register_forward_pre_hook(probe) for probe in probes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module(denoiser: nn.Module, name: str, parts: Sequence[LowRank]) -> nn.Module:
    """The base layer that a LoRA layer belongs to, checked for its size."""
    component, layer = name.split(".", 1)
    if component.startswith("text_encoder"):
        raise UserError(f"comerge measures the denoiser, and an expert adapts {name}; use another --method")
    try:
        module = denoiser.get_submodule(layer)
    except AttributeError:
        raise UserError(f"{name} is no layer of the base model: the experts were made for another backbone") from None
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    found = None if weight is None else (tuple(weight.flatten(1).shape), tuple(weight.shape[2:]))
    if found != (parts[0].shape, parts[0].kernel):
        size = "no layer with a weight" if weight is None else tuple(weight.shape)
        raise UserError(
            f"{name} is {parts[0].shape[1]} -> {parts[0].shape[0]} in the experts and {size} in the base model: the "
            "experts were made for another backbone"
        )
    return module


def _moved(part: LowRank, device: torch.device) -> LowRank:
    return LowRank(part.a.to(device, torch.float32), part.b.to(device, torch.float32), part.scale, part.kernel)
