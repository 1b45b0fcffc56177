"""Measures the margin at the start of a fit, if it is not exactly 0 by construction.

At the start policy and reference are the same function, so the margin m must be 0; any other value is rounding or a
mistake. In eager mode without a cache it is exactly 0. A cached reference was computed in another batch and perhaps in
another precision, and compiled kernels round the two passes differently. In these two cases m is measured before the
first update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.objectives.objective import PairErrors, margin, prediction_error

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lightning.pytorch import Trainer

    from lit_safety.backbones.backbone import Backbone, Conditioning
    from lit_safety.data.reading.batch import PairBatch
    from lit_safety.modules.attacked_prediction import Attack
    from lit_safety.modules.speed import Speed
    from lit_safety.objectives.objective import Objective


class Beginning(Protocol):
    """What the check needs from the module; `PreferenceModule` provides it."""

    backbone: Backbone
    objective: Objective
    speed: Speed
    start_from: str | None
    attack: Attack | None

    def dropped_prompts(self, batch: PairBatch) -> list[bool]: ...

    def errors(self, batch: PairBatch) -> PairErrors: ...

    @property
    def has_reference(self) -> bool: ...

    @property
    def trainer(self) -> Trainer: ...

    def print(self, *args: object) -> None: ...

    def timesteps(self, batch: PairBatch) -> Tensor: ...

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Conditioning]: ...

    def reference(self) -> AbstractContextManager[None]: ...


def check_start(module: Beginning, batch: PairBatch, errors: PairErrors) -> None:
    """Measure |m| on the first batch of a fit, print it, and stop if it is too large. All ranks must call it.

    Args:
        module: the module before its first update.
        batch: the first batch, as `ordered` returns it.
        errors: the module's errors on this batch.

    Raises:
        UserError: |m| is above `speed.margin_limit`, or the cache was made with other timesteps.
    """
    found = []
    groups = batch.groups
    cached = batch.reference is not None or (groups is not None and groups.reference is not None)
    if cached:
        _check_timesteps(module, batch)
        if module.has_reference and groups is None:
            found.append(cached_margin(module, batch, errors))
        elif module.has_reference and groups is not None:
            from lit_safety.modules.groups import cached_rewards

            found.append(cached_rewards(module, batch, groups).flatten())
    if module.speed.compile is not None and module.start_from is None:
        if module.attack is not None:
            with torch.no_grad(), module.attack.off():
                errors = module.errors(batch)
        found.append(margin(errors, module.objective.beta).detach())
    if not found:
        return
    largest = torch.cat(found).abs().max()
    largest = torch.as_tensor(module.trainer.strategy.reduce(largest, reduce_op="max"))
    limit = module.speed.margin_limit
    module.print(f"start   |m| is at most {float(largest):.2g} before the first update (limit {limit:g})")
    if not float(largest) <= limit:  # nan too
        how = "read from the reference cache" if cached else "compiled"
        raise UserError(
            f"before the first update |m| reaches {float(largest):.3g}, above `model.init_args.speed.margin_limit` "
            f"{limit:g}: the reference that was {how} differs from what this run would compute. Make the cache with "
            f"this run's precision (`shards precompute --reference_precision {module.trainer.precision}`), with "
            "`--dtype float32`, or run without compile"
        )


@torch.no_grad()
def cached_margin(module: Beginning, batch: PairBatch, errors: PairErrors) -> Tensor:
    """m (B,) of the current reference against the cached one; one forward pass."""
    noisy, timesteps, target, conditioning = module.noised(batch)
    with module.reference():
        prediction = module.backbone.predict(noisy, timesteps, conditioning)
    chosen, rejected = prediction_error(prediction, target).chunk(2)
    return margin(
        PairErrors(chosen, rejected, errors.reference_chosen, errors.reference_rejected), module.objective.beta
    )


def _check_timesteps(module: Beginning, batch: PairBatch) -> None:
    now, stored = module.timesteps(batch).double().tolist(), batch.fixed_timesteps
    for key, one, other in zip(batch.keys, now, stored or now, strict=True):
        if abs(one - other) > 1e-6 * max(1.0, abs(other)):
            raise UserError(
                f"sample {key}: the reference cache was made at timestep {other:g}, but {type(module).__name__} trains "
                f"it at {one:g}: make the cache again with this version, or set `data.init_args.use_reference` to false"
            )
