"""Adjusts beta, and lambda in units of the margin, during a fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_safety.callbacks.drawings import preference_module
from lit_safety.core.errors import UserError
from lit_safety.objectives.objective import Objective
from lit_safety.objectives.safety_constrained import SafetyConstrainedDPO

if TYPE_CHECKING:
    from lit_safety.data.reading.batch import PairBatch

FACTOR, SIZE, GAP = "rewards/undecided", "rewards/sizes", "costs/gaps"
"""Names of an objective's logs: the means of sigmoid(-|m|), of |m|, and of C_l - C_w if it reads costs."""


class FindStrength(Callback):
    """Adjusts beta so that pairs are learned at a suitable speed, and lambda to the margins that they reach.

    How large errors differ between two images depends on the model, on the resolution and on how much of an image a
    harm fills, so a beta that is right for one set of pairs is wrong for another. The same target can be used for all:
    the factor sigmoid(-|m|), which scales DPO's gradient for a correctly ordered pair. It is 1/2 before the first step
    and near 0 when the pair is learned. We use |m| and not m, so that wrongly ordered pairs do not raise beta without
    limit. Every few optimizer steps

        beta <- beta exp(rate (E[sigmoid(-|m|)] - factor))

    so that beta grows while the factor is above its target and falls while it is below. SC-DPO's lambda follows in
    units of the margin: lambda = margin E[|m|] / E[C_l - C_w]. Means are over all pairs since the last adjustment, on
    all ranks, so that accumulation and the number of ranks do not matter. The checkpoint holds beta and lambda.

    Args:
        factor: target of the mean gradient factor, in (0, 1/2).
        margin: the mean cost margin in units of the mean |m|; null: lambda is not changed.
        rate: change of log(beta) in one adjustment, for each unit of the factor's difference.
        most: beta stays within this factor above and below its set value.
        every_n_steps: optimizer steps between two adjustments.

    Raises:
        UserError: a number is outside its range; or, at the start of a fit, `margin` is set but the objective has no
            lambda.
    """

    def __init__(
        self,
        factor: float = 0.3,
        margin: float | None = None,
        rate: float = 1.0,
        most: float = 100.0,
        every_n_steps: int = 5,
    ) -> None:
        if not 0 < factor < 0.5:
            raise UserError(f"`FindStrength.factor` {factor} must be above 0 and below 0.5, where every fit begins")
        if margin is not None and not 0 <= margin < math.inf:
            raise UserError(f"`FindStrength.margin` {margin} must not be negative; null does not change lambda")
        if not 0 < rate < math.inf or not 1 <= most < math.inf or every_n_steps < 1:
            raise UserError(
                f"`FindStrength`: rate {rate} must be above 0, most {most} and every_n_steps {every_n_steps} at least 1"
            )
        self.factor, self.margin, self.rate, self.most = factor, margin, rate, most
        self.every_n_steps = every_n_steps
        self._set: float | None = None
        self._counted = 0
        self._window: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None
        self._found: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        objective = preference_module(pl_module).objective
        if self.margin is not None and not isinstance(objective, SafetyConstrainedDPO):
            raise UserError(
                "`FindStrength.margin` changes lambda of SafetyConstrainedDPO, but the objective is "
                f"{type(objective).__name__}: set it to null"
            )
        objective.tells_sizes = True
        if self._set is None:
            self._set = objective.beta
        for name, value in self._found.items():  # the values of the resumed run
            setattr(objective, name, value)
        if self._sums is not None:
            self._sums = self._sums.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        module = preference_module(pl_module)
        means = module.last_means
        gap = means.get(GAP, torch.ones_like(means[FACTOR]))
        now = torch.stack([means[FACTOR], means[SIZE], gap, torch.ones_like(gap)])
        self._window = now if self._window is None else self._window + now
        step = trainer.global_step
        if step == self._counted:  # the step is not complete: gradients are accumulated
            return
        self._counted = step
        # Reduced at every step, so that a checkpoint of rank 0 holds the values of all ranks; the host does not wait.
        window = trainer.strategy.reduce(self._window, reduce_op="mean")
        self._sums = window if self._sums is None else self._sums + window
        self._window = None
        if step % self.every_n_steps:
            return
        factor, size, mean_gap = (self._sums[:3] / self._sums[3]).tolist()
        self._sums = None
        self._move(module.objective, factor, size, mean_gap)
        module.log_dict({f"strength/{name}": value for name, value in self._found.items()})

    def _move(self, objective: Objective, factor: float, size: float, gap: float) -> None:
        assert self._set is not None
        before = objective.beta
        wanted = before * math.exp(self.rate * (factor - self.factor))
        objective.beta = min(max(wanted, self._set / self.most), self._set * self.most)
        self._found = {"beta": objective.beta}
        if self.margin is not None and isinstance(objective, SafetyConstrainedDPO):
            # If chosen images cost more on average, no cost margin is right, so lambda is not changed.
            if gap > 0:
                objective.cost_weight = self.margin * size * (objective.beta / before) / gap
            self._found["cost_weight"] = objective.cost_weight

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = preference_module(pl_module)
        found = ", ".join(f"{name} {value:.3g}" for name, value in self._found.items())
        module.print(f"strength: {found or 'nothing was changed'}")

    def state_dict(self) -> dict[str, Any]:
        sums = None if self._sums is None else self._sums.cpu()
        return {"set": self._set, "counted": self._counted, "found": self._found, "sums": sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._set, self._counted = state_dict["set"], int(state_dict["counted"])
        self._found, self._sums = dict(state_dict["found"]), state_dict["sums"]
