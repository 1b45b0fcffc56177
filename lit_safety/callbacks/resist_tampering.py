"""Training against fine-tuning after release: the update includes the loss after a simulated fine-tuning.

A fine-tuning moves the weights theta to theta + d. We lower the loss at theta + d in addition to the loss at theta. d
is treated as a constant, as in first-order MAML: the gradient at theta + d is added to that of the step. In ResAlign
(NeurIPS 2025) the variety of fine-tunings mattered more than the second-order term.

The released network is fine-tuned: the denoiser with its adapter. Changing the frozen base by d below the adapter is
the same as changing the fused weights by d, and a second LoRA in addition to the adapter is the same as one on the
fused weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_safety.callbacks.drawings import preference_module
from lit_safety.core.chance import (
    LATENT,
    NOISE,
    TIMESTEP,
    derive,
    generator,
    integers,
    normal,
    sample_seed,
    uniform,
)
from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules.preference import PreferenceModule
from lit_safety.objectives.objective import prediction_error


@dataclass
class Tampering:
    """One kind of fine-tuning.

    Args:
        images: harmful: rejected images of harmful prompts; harmless: chosen images of clean ones.
        weights: lora: a LoRA in addition to the adapter; full: every weight of the denoiser.
        optimizer: sgd or adam.
        rate: its learning rate.
        steps: number of steps, each on all pairs of the current optimizer step.
        rank: rank of the LoRA.

    Raises:
        ValueError: a number is not positive.
    """

    images: Literal["harmful", "harmless"] = "harmful"
    weights: Literal["lora", "full"] = "lora"
    optimizer: Literal["sgd", "adam"] = "adam"
    rate: float = 1e-3
    steps: int = 3
    rank: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf") or min(self.steps, self.rank) < 1:
            raise ValueError(f"rate, steps and rank must be above 0, got {self.rate}, {self.steps} and {self.rank}")


def usual() -> list[Tampering]:
    """The default kinds, which differ in images, weights, optimizer, rate and length."""
    return [
        Tampering(),
        Tampering(rate=3e-3, steps=5, rank=4),
        Tampering(optimizer="sgd", rate=0.3, steps=4),
        Tampering(weights="full", rate=1e-4, steps=2),
        Tampering(weights="full", optimizer="sgd", rate=0.03, steps=3),
        Tampering(images="harmless", rate=1e-3, steps=4),
        Tampering(images="harmless", weights="full", rate=1e-4, steps=2),
    ]


class ResistTampering(Callback):
    """Adds to every n-th update the gradient of the pairs' loss after a fine-tuning.

    The kind is random, as a function of the seed and the step, so that all ranks use the same one and a resumed run
    continues with the same ones. Every step of a fine-tuning uses all pairs of the optimizer step, from all ranks and
    micro-batches, so it does not matter how a batch is split. The loss afterwards is the objective's, on harmful pairs,
    against the unchanged reference.

    Each time it costs a forward and a backward pass of one image of each pair for every step of the fine-tuning, and
    one of both images. `full` needs memory for a copy of every weight during the simulation.

    Args:
        every_n_steps: optimizer steps between two simulations.
        weight: weight of the added gradient.
        kinds: kinds of fine-tunings; null: seven that differ in images, weights, optimizer, rate and length.
        warm_up: optimizer steps before the first simulation, so that there is an alignment to undo.
        seed: seed for choosing the kind, and for its LoRA.

    Raises:
        ValueError: a number is outside its range, or ``kinds`` is empty.
    """

    def __init__(
        self,
        every_n_steps: int = 5,
        weight: float = 1.0,
        kinds: list[Tampering] | None = None,
        warm_up: int = 0,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1 or warm_up < 0 or not 0 < weight < float("inf"):
            raise ValueError(
                "every_n_steps must be at least 1, warm_up not negative and weight above 0, got "
                f"{every_n_steps}, {warm_up} and {weight}"
            )
        self.kinds = usual() if kinds is None else kinds
        if not self.kinds:
            raise ValueError("kinds is empty: give fine-tunings, or leave the callback out")
        self.every_n_steps, self.weight, self.warm_up, self.seed = every_n_steps, weight, warm_up, seed
        self._batches: list[PairBatch] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = preference_module(pl_module)
        if isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
            raise UserError(
                f"`ResistTampering` needs whole weights and gradients, which {type(trainer.strategy).__name__} spreads "
                "over the ranks: leave it out, or train with DDP"
            )
        if trainer.precision == "16-mixed":
            raise UserError("`ResistTampering`: 16-mixed scales gradients: set `trainer.precision` to bf16-mixed")
        if module.objective.reads_drift:
            raise UserError(
                f"`ResistTampering`: the loss of {type(module.objective).__name__} reads the reference's predictions "
                "of every pair, which are not stored: leave it out"
            )
        if module.objective.needs_groups:
            raise UserError(
                f"`ResistTampering` reads pairs, but {type(module.objective).__name__} reads groups: leave it out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = preference_module(pl_module)
        half = [p for p in module.backbone.denoiser.parameters() if p.dtype != torch.float32]
        if half and any(kind.weights == "full" for kind in self.kinds):
            raise UserError(
                f"`ResistTampering`: a fine-tuning of all weights is lost in {half[0].dtype}: set `trainer.precision: "
                "32-true`, or use only kinds with `weights: lora`"
            )

    def due(self, step: int) -> bool:
        """Whether a fine-tuning is simulated in the optimizer step of this number, counted from 0."""
        return step >= self.warm_up and (step - self.warm_up) % self.every_n_steps == 0

    def kind(self, step: int) -> Tampering:
        """Which one."""
        return self.kinds[int(integers([sample_seed(self.seed, step, "tampering")], "kind", len(self.kinds)))]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        if self.due(trainer.global_step):
            self._batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        batches, self._batches = self._batches, []
        if not batches:
            return
        module, step = preference_module(pl_module), trainer.global_step
        kind = self.kind(step)
        with trainer.precision_plugin.forward_context():
            found = Fight(module, batches, kind, sample_seed(self.seed, step, "tampering"), _mean_over(trainer)).play()
        for (_, parameter), extra in zip(module.trainable_parameters(), found.gradient, strict=True):
            part = self.weight * extra
            parameter.grad = part if parameter.grad is None else parameter.grad + part
        pl_module.log_dict({"tampering/loss_before": found.before, "tampering/loss_after": found.after})


def _mean_over(trainer: Trainer) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Tensors of this rank -> their means over all ranks, sent as one tensor."""

    def mean(values: Sequence[Tensor]) -> list[Tensor]:
        if trainer.world_size == 1:
            return list(values)
        flat = torch.cat([one.flatten().float() for one in values])
        reduced: Any = trainer.strategy.reduce(flat, reduce_op="mean")
        parts = reduced.split([one.numel() for one in values])
        return [part.view_as(one) for part, one in zip(parts, values, strict=True)]

    return mean


@dataclass
class After:
    """The result of a fine-tuning."""

    gradient: list[Tensor]
    """Gradients of the pairs' loss after it, one for each trained parameter."""
    before: Tensor
    """The fine-tuning's own loss at its first step, ()."""
    after: Tensor
    """The fine-tuning's own loss at its last step, ()."""


@dataclass
class Images:
    """The N images of a fine-tuning."""

    seeds: list[int]
    posterior: Tensor
    """Posteriors of their latents (N, 2, C, h, w)."""
    conditioning: dict[str, Tensor]


class Fight:
    """One fine-tuning, which is simulated and undone.

    Args:
        module: the trained module; afterwards its weights are exactly the same.
        batches: the micro-batches of the step.
        kind: the kind of fine-tuning.
        seed: seed of its LoRA, noise and timesteps.
        mean: tensors -> their means over all ranks.
    """

    def __init__(
        self,
        module: PreferenceModule,
        batches: Sequence[PairBatch],
        kind: Tampering,
        seed: int,
        mean: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> None:
        self.module, self.kind, self.seed, self.mean = module, kind, seed, mean
        # Read here, because a fine-tuning of all weights makes more weights trainable.
        self.trained = [parameter for _, parameter in module.trainable_parameters()]
        self.batches = [module.ordered(batch) for batch in batches]
        self._images = [self._of_its_kind(batch) for batch in self.batches]

    def play(self) -> After:
        """Run the fine-tuning and the loss after it."""
        pairs = [self._against_reference(batch) for batch in self.batches]
        with self._moved() as moved:
            make = torch.optim.AdamW if self.kind.optimizer == "adam" else torch.optim.SGD
            optimizer = make(moved, lr=self.kind.rate, weight_decay=0.0)
            losses = [self._step(moved, optimizer, number) for number in range(self.kind.steps)]
            for parameter in moved:
                parameter.grad = None
            gradient = self._outer(pairs)
        return After(gradient, losses[0], losses[-1])

    # ---- the fine-tuning

    def _step(self, moved: Sequence[nn.Parameter], optimizer: Optimizer, number: int) -> Tensor:
        """One step on all pairs of its kind; returns the loss ()."""
        sums = [torch.zeros_like(p) for p in moved]
        total, count = torch.zeros((), device=self.module.device), 0
        for images in self._images:
            if images is None:
                continue
            with torch.enable_grad():
                loss = self._denoising(images, number).sum()
                slopes = torch.autograd.grad(loss, list(moved), allow_unused=True)
            sums = [old if new is None else old + new for old, new in zip(sums, slopes, strict=True)]
            total, count = total + loss.detach(), count + len(images.seeds)
        counted = torch.tensor(float(count)).to(self.module.device, non_blocking=True)
        *means, total, counted = self.mean([*sums, total, counted])
        for parameter, mean in zip(moved, means, strict=True):
            parameter.grad = mean / counted.clamp(min=1e-30)
        optimizer.step()
        return total / counted.clamp(min=1e-30)

    def _of_its_kind(self, batch: PairBatch) -> Images | None:
        """The images of a batch for the fine-tuning; None: no image."""
        harmful = self.kind.images == "harmful"
        rows = [row for row, kind in enumerate(batch.prompt_kinds) if (kind == "harmful") == harmful]
        if not rows:
            return None
        part = batch.take(rows)
        half = slice(len(part), None) if harmful else slice(0, len(part))
        with torch.no_grad():
            conditioning = {name: values[half] for name, values in self.module.noised(part)[3].items()}
            return Images(part.seeds, self.module.posterior(part)[half], conditioning)

    def _denoising(self, images: Images, number: int) -> Tensor:
        """The plain denoising error of each image (N,), with the step's own noise and timestep."""
        backbone, device = self.module.backbone, self.module.device
        seeds = [derive(seed, f"tampering-{number}") for seed in images.seeds]
        with torch.no_grad():
            shape = tuple(images.posterior.shape[2:])
            noise, spread = (normal(seeds, name, shape).to(device, non_blocking=True) for name in (NOISE, LATENT))
            fractions = torch.tensor([uniform(seed, TIMESTEP) for seed in seeds], dtype=torch.float64)
            timesteps = backbone.timesteps(fractions, (shape[-2], shape[-1])).to(device, non_blocking=True)
            latents = backbone.latents(images.posterior, spread)
            noisy = backbone.add_noise(latents, noise, timesteps)
            target = backbone.target(latents, noise, timesteps)
        return prediction_error(backbone.predict(noisy, timesteps, images.conditioning), target)

    @contextmanager
    def _moved(self) -> Iterator[list[nn.Parameter]]:
        """A context in which a fine-tuning may change weights; it yields these and restores them."""
        denoiser = self.module.backbone.denoiser
        if self.kind.weights == "lora":
            layers = linear_layers(denoiser, self.module.backbone.lora_targets())
            with beside(denoiser, layers, self.kind.rank, self.seed) as found:
                yield found
            return
        trained = {id(p) for p in self.trained}
        # With an adapter the frozen base is changed; without one, the trained weights are all weights.
        weights = [p for p in denoiser.parameters() if id(p) not in trained] or list(denoiser.parameters())
        held = [(p.detach().clone(), p.requires_grad, p.grad) for p in weights]
        for parameter in weights:
            parameter.requires_grad_()
        try:
            yield weights
        finally:
            with torch.no_grad():
                for parameter, (value, asked, grad) in zip(weights, held, strict=True):
                    parameter.copy_(value)
                    parameter.requires_grad_(asked)
                    parameter.grad = grad

    # ---- the loss after it

    def _against_reference(self, batch: PairBatch) -> PairBatch | None:
        """The harmful pairs of a batch with the reference's errors, as from a cache: it is not fine-tuned."""
        rows = [row for row, kind in enumerate(batch.prompt_kinds) if kind == "harmful"]
        if not rows:
            return None
        part = batch.take(rows)
        module = self.module
        with torch.no_grad():
            noisy, timesteps, target, conditioning = module.noised(part)
            found = module.reference_pass(part, noisy, timesteps, target, conditioning)
        errors = torch.stack([found.chosen, found.rejected], dim=1).unsqueeze(2).expand(-1, -1, 2)
        # The anchor acts only on clean pairs, so these values have no effect.
        nothing = torch.zeros(len(part), 2, *noisy.shape[1:], device=noisy.device)
        return replace(part, reference=errors, reference_prediction=nothing)

    def _outer(self, pairs: Sequence[PairBatch | None]) -> list[Tensor]:
        """The gradient of the objective on harmful pairs, a mean over all pairs of the step."""
        parameters = self.trained
        share = 1.0 / len(self.batches)
        sums = [torch.zeros_like(p) for p in parameters]
        for part, batch in zip(pairs, self.batches, strict=True):
            if part is None:
                continue
            attack = self.module.attack
            with torch.enable_grad(), nullcontext() if attack is None else attack.off():
                loss = self.module.loss(self.module.errors(part), part).loss.sum() * (share / len(batch))
                slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
            sums = [old if new is None else old + new for old, new in zip(sums, slopes, strict=True)]
        return self.mean(sums)


def linear_layers(network: nn.Module, endings: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Names and layers of the linear layers whose names end with one of the endings, with or without adapters."""
    found = [(name, layer) for name, layer in network.named_modules()
             if any(name == one or name.endswith(f".{one}") for one in endings)]  # fmt: skip
    return [(name, layer) for name, layer in found if isinstance(getattr(layer, "base_layer", layer), nn.Linear)]


@contextmanager
def beside(
    network: nn.Module, layers: Sequence[tuple[str, nn.Module]], rank: int, seed: int
) -> Iterator[list[nn.Parameter]]:
    """A context in which linear layers have an additional LoRA; yields its A and B alternately.

    A is drawn from the seed and the layer's name, B is 0: at first nothing changes.

    Args:
        network: the network of the layers.
        layers: names and layers, with `in_features` and `out_features`.
        rank: rank of the LoRA, which is not scaled.
        seed: seed of A.
    """
    device = next(network.parameters()).device
    found, handles = [], []
    for name, layer in layers:
        wide: Any = layer
        drawn = torch.randn(rank, wide.in_features, generator=generator(seed, name)) / wide.in_features**0.5
        down = nn.Parameter(drawn.to(device))
        up = nn.Parameter(torch.zeros(wide.out_features, rank, device=device))
        handles.append(layer.register_forward_hook(_adding(down, up)))
        found += [down, up]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _adding(down: Tensor, up: Tensor) -> Any:
    def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        return found + (given[0].to(down.dtype) @ down.t() @ up.t()).to(found.dtype)

    return hook
