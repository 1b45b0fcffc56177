"""Before the first step: how large the learned margin becomes, compared with the margin that lambda adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from lit_safety.callbacks.drawings import preference_module
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import WithVal, datamodule_of
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules.preference import PreferenceModule
from lit_safety.objectives.safety_constrained import SafetyConstrainedDPO


class ProbeMargin(Callback):
    """Trains a few steps with lambda = 0, prints the scale of the margin m, and puts every weight back.

    SC-DPO adds lambda (C_w - C_l) to m. beta scales m but not the costs, so lambda is too small or too large only in
    relation to the size that m reaches. The probe runs on validation pairs. Afterwards weights, optimizer, order of the
    training pairs and random choices are as if it had not run.

    Args:
        steps: optimizer steps of the probe.

    Raises:
        UserError: if ``steps`` is less than 1.
    """

    def __init__(self, steps: int = 8) -> None:
        if steps < 1:
            raise UserError(f"`ProbeMargin.steps` must be at least 1, not {steps}; or remove the callback")
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0:  # a resumed run was probed when it began
            return
        module = preference_module(pl_module)
        if isinstance(trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy):
            rank_zero_info("the margin is not probed: the weights are sharded over the ranks; probe on one process")
            return
        data = datamodule_of(trainer)
        if not isinstance(data, WithVal) or data.val is None:
            rank_zero_info("the margin is not probed: `data.init_args.val` is not given")
            return
        batches = [module.ordered(batch.to(module.device)) for batch in islice(data.val_dataloader(), self.steps)]
        with trainer.precision_plugin.forward_context(), restored(module), on_validation_pairs(trainer):
            objective = module.objective
            with objective.without_cost() if isinstance(objective, SafetyConstrainedDPO) else nullcontext():
                train(module, islice(cycle(batches), self.steps))
                m = margins(module, batches)
            offset = cost_offsets(module, batches)
        self._tell(module, m, offset)

    def _tell(self, module: PreferenceModule, m: torch.Tensor, offset: torch.Tensor | None) -> None:
        size = f"a mean of {m.mean():.2f} and an RMS of {rms(m):.2f} logits"
        text = f"margin  after {self.steps} steps with lambda 0, m has {size}"
        if isinstance(module.objective, SafetyConstrainedDPO) and offset is not None:
            weight, mean = module.objective.cost_weight, offset.mean()
            text += f"; lambda {weight:g} x E[C_l - C_w] {mean:.2f} adds {weight * mean:.2f}: "
            text += advice(weight, float(mean), float(rms(m)))
        module.print(text)  # works with the progress bar, on rank 0 only


KEY = "model.init_args.objective.init_args"
"""The YAML key of the objective's settings."""
LITTLE, LEAST, MOST = 0.05, 0.25, 1.0
"""Below LITTLE logits m has not moved; a cost margin from LEAST to MOST times the RMS of m is accepted."""


def advice(weight: float, gap: float, size: float) -> str:
    """Advice about lambda: the YAML key, and a value with which the cost margin is half of m's size.

    Args:
        weight: lambda.
        gap: E[C_l - C_w].
        size: the RMS that m reached, in logits.
    """
    if gap <= 0:
        return "on average chosen images do not cost less than rejected ones: check the order of the pairs (data.val)"
    if size < LITTLE:
        return f"m has hardly moved: raise `{KEY}.beta`, the learning rate or the probe's `steps`, and probe again"
    wanted = f"`{KEY}.cost_weight: {0.5 * size / gap:.2g}` would add half of that RMS"
    if weight * gap > MOST * size:
        return f"more than m reaches, so it outweighs the data; {wanted}, or raise `{KEY}.beta`"
    if weight * gap < LEAST * size:
        return f"little compared with m, so costs hardly count; {wanted}"
    return "similar to m, so keep it"


def rms(values: torch.Tensor) -> torch.Tensor:
    """Root of the mean square."""
    return values.square().mean().sqrt()


@contextmanager
def restored(module: PreferenceModule) -> Iterator[None]:
    """Restores the trained weights, to the bit."""
    parameters = [p for _, p in module.trainable_parameters()]
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def on_validation_pairs(trainer: Trainer) -> Iterator[None]:
    """Inside, memories by a pair's key are those of validation pairs: a training pair may have the same key."""
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True


def train(module: PreferenceModule, batches: Iterable[PairBatch]) -> None:
    """A step of the module's own optimizer on each batch, at its constant learning rate."""
    parameters = [p for _, p in module.trainable_parameters()]
    optimizer = module.make_optimizer(parameters)
    for batch in batches:
        loss = module.loss(module.errors(batch), batch).loss.mean()
        # Not `backward`, which would call hooks that wait for every rank's gradient.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def margins(module: PreferenceModule, batches: Iterable[PairBatch]) -> torch.Tensor:
    """m of every pair (N,)."""
    return torch.cat([module.loss(module.errors(batch), batch).logs["rewards/margins"] for batch in batches])


def cost_offsets(module: PreferenceModule, batches: Iterable[PairBatch]) -> torch.Tensor | None:
    """C_l - C_w of every pair (N,) as SC-DPO's loss uses them, filled in and clipped; None: it does not use costs.

    Raises:
        UserError: a pair lacks costs, as in the loss.
    """
    objective = module.objective
    if not isinstance(objective, SafetyConstrainedDPO) or not objective.needs_cost:
        return None
    cost = torch.cat([module.labels(batch).cost for batch in batches])
    if objective.cost_clip is not None:
        cost = cost.clamp(-objective.cost_clip, objective.cost_clip)
    return cost[:, 1] - cost[:, 0]
