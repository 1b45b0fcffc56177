"""A step on groups that are read whole: errors of all images of a prompt, at one timestep and noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lit_safety.core.chance import LATENT, NOISE
from lit_safety.core.errors import UserError
from lit_safety.data.reading.batch import PairBatch, to_floats
from lit_safety.modules.stability import PlainSteps, Stepping
from lit_safety.objectives.objective import GroupErrors, Objective, PairErrors, prediction_error

if TYPE_CHECKING:
    from lit_safety.backbones.backbone import Backbone, Conditioning
    from lit_safety.data.reading.groups import Groups


class CachedSteps(Protocol):
    """What is needed from a module to compare its reference with a cached one; `PreferenceModule` provides it."""

    backbone: Backbone
    objective: Objective

    def dropped_prompts(self, batch: PairBatch) -> list[bool]: ...

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Conditioning]: ...

    def reference(self) -> AbstractContextManager[None]: ...


class GroupSteps(CachedSteps, Stepping, Protocol):
    """What a step on groups needs from the module; `PreferenceModule` provides it."""

    steps: PlainSteps

    def conditioning(self, batch: PairBatch) -> Conditioning: ...

    def timesteps(self, batch: PairBatch) -> Tensor: ...


def check_groups(objective: Objective, pairs_alone: str | None, settings: Sequence[str]) -> None:
    """Check that the module can train on groups.

    Args:
        objective: an objective on groups.
        pairs_alone: a method that overrides a part of the step for pairs only; None: there is none.
        settings: keys of `model.init_args` that are set and act only on pairs.

    Raises:
        UserError: something works only with pairs.
    """
    name = type(objective).__name__
    if pairs_alone is not None:
        raise UserError(
            f"{pairs_alone} reads pairs, but {name} reads groups: choose another `model.init_args.objective`"
        )
    if settings:
        raise UserError(f"`model.init_args.{settings[0]}` acts only on pairs, but {name} reads groups: leave it out")


def noised_groups(module: GroupSteps, batch: PairBatch, groups: Groups) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    """x_t (N, C, h, w), timesteps (N,), targets (N, C, h, w), conditioning (N rows): prompt after prompt."""
    rows = torch.tensor(groups.owners).to(module.device, non_blocking=True)
    with torch.no_grad():
        if groups.latents is not None:
            posterior = groups.flat(groups.latents)
        elif groups.images is not None:
            posterior = module.backbone.posterior(to_floats(groups.flat(groups.images)))
        else:
            raise ValueError(f"samples {', '.join(batch.keys)} have neither images nor latents")
        shape = tuple(posterior.shape[2:])
        noise = module.gaussian(batch, NOISE, shape)[rows]
        latents = module.backbone.latents(posterior, module.gaussian(batch, LATENT, shape)[rows])
        timesteps = module.timesteps(batch)[rows]
        noisy = module.backbone.add_noise(latents, noise, timesteps)
        target = module.backbone.target(latents, noise, timesteps)
    conditioning = {name: values[rows] for name, values in module.conditioning(batch).items()}
    if groups.crops is not None:
        conditioning |= module.backbone.crop_conditioning(groups.flat(groups.crops))
    return noisy, timesteps, target, conditioning


def group_errors(module: GroupSteps, batch: PairBatch, groups: Groups) -> PairErrors:
    """Errors of all images of each prompt, and of the best and the worst as chosen and rejected."""
    noisy, timesteps, target, conditioning = module.noised(batch)
    kept = None
    if groups.reference is not None:
        reference, kept = _cached(module, batch, groups.reference)
    else:
        with torch.no_grad(), module.steps.reference(module):
            prediction = module.backbone.predict(noisy, timesteps, conditioning)
        reference = groups.padded(prediction_error(prediction, target))
        kept = of_best(prediction, groups)
    policy = module.backbone.predict(noisy, timesteps, conditioning)
    errors = groups.padded(prediction_error(policy, target))
    drift = None
    if module.objective.needs_drift and kept is not None:
        drift = prediction_error(of_best(policy, groups), kept)
        drift = drift if groups.reference is None else drift * batch.clean
    best, worst = errors.gather(1, groups.sides).unbind(1)
    reference_best, reference_worst = reference.gather(1, groups.sides).unbind(1)
    both = GroupErrors(errors, reference)
    return PairErrors(best, worst, reference_best, reference_worst, drift, groups=both)


def _cached(module: CachedSteps, batch: PairBatch, errors: Tensor) -> tuple[Tensor, Tensor | None]:
    """The reference's errors (B, K) and its predictions on the best images, from the batch's cache."""
    dropped = module.dropped_prompts(batch)
    predictions = batch.reference_prediction
    if not any(dropped):
        return errors[:, :, 0], None if predictions is None else predictions[:, 0]
    if errors.shape[2] < 2:
        raise UserError(
            f"sample {batch.keys[dropped.index(True)]}: its prompt is dropped, but the reference cache holds no errors "
            "without the prompt: make it again with `shards precompute --reference_dropout true`, or set every "
            "dropout of a prompt to 0"
        )
    without = torch.tensor(dropped).to(errors.device, non_blocking=True)
    found = torch.where(without.view(-1, 1), errors[:, :, 1], errors[:, :, 0])
    if predictions is None:
        return found, None
    return found, torch.where(without.view(-1, 1, 1, 1), predictions[:, 1], predictions[:, 0])


def first_rows(groups: Groups) -> Tensor:
    """The index of each prompt's first row among the N rows (B,)."""
    counts = torch.tensor([0, *groups.sizes[:-1]])
    return counts.cumsum(0)


def of_best(values: Tensor, groups: Groups) -> Tensor:
    """(N, ...) -> (B, ...): the values of each prompt's best image."""
    rows = first_rows(groups).to(values.device, non_blocking=True) + groups.sides[:, 0].to(values.device)
    return values[rows]


@torch.no_grad()
def cached_rewards(module: CachedSteps, batch: PairBatch, groups: Groups) -> Tensor:
    """Implicit rewards of the current reference against the cached one, best minus each (B, K): 0 up to rounding."""
    assert groups.reference is not None
    noisy, timesteps, target, conditioning = module.noised(batch)
    with module.reference():
        prediction = module.backbone.predict(noisy, timesteps, conditioning)
    stored = _cached(module, batch, groups.reference)[0]
    rewards = (groups.padded(prediction_error(prediction, target)) - stored) * (-0.5 * module.objective.beta)
    difference = rewards.gather(1, groups.sides[:, :1]) - rewards
    return difference.masked_fill(groups.ranks < 0, 0.0)
