"""The dual variable of Constrained DPO: draw with the current policy, score the images, move lambda by their cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lit_safety.callbacks.drawings import preference_module
from lit_safety.core.chance import derive
from lit_safety.core.errors import UserError
from lit_safety.cost_model.files import load_cost_model
from lit_safety.cost_model.network import CostScorer
from lit_safety.data.reading.batch import PairBatch
from lit_safety.objectives.constrained import ConstrainedDPO, rectified_excess
from lit_safety.objectives.objective import Objective

if TYPE_CHECKING:
    from lit_safety.cost_model.ensemble import CostEnsemble

#: After so many windows of `patience` updates above the limit there is a warning, even if each of them seemed to fall.
PATIENCE_WINDOWS = 3


class UpdateDual(Callback):
    """Every few steps, estimates the policy's expected cost and updates lambda (Liu et al., arXiv 2403.02475).

    The estimate is the mean cost of images of the current batch's prompts, drawn with the current policy; a mean over
    the shards would not depend on the policy. All ranks change lambda by the same number.

    The estimate and the objective's ``limit`` are in calibrated logits of this cost model. The costs in the pairs may
    be ground truth or another model's. Let this cost model write them (`shards score --existing replace`), so that all
    costs have one unit.

    Args:
        cost_model: folder of the cost model that scores the images.
        every_n_steps: optimizer steps between two updates.
        images: prompts drawn for an update on each rank, at most one batch.
        per_prompt: images of each of these prompts, by seeds of their own; `constraint: rectified` of the objective
            holds the mean over a prompt's images below the limit.
        ensemble: folders of further cost models, such as fits with other seeds: the cost of an image is then
            the mean over all plus ``pessimism`` standard deviations.
        pessimism: how many.
        patience: warn if the expected cost was above the limit for so many updates in a row and is not falling, and
            after three times as many in any case.

    Raises:
        UserError: at the start of a fit, if the objective is not `ConstrainedDPO` or the cost model does not load.
    """

    #: The objectives whose state this callback changes while they are trained.
    moves: ClassVar[type[Objective]] = ConstrainedDPO

    def __init__(
        self,
        cost_model: str,
        every_n_steps: int = 25,
        images: int = 16,
        patience: int = 8,
        per_prompt: int = 1,
        ensemble: list[str] | None = None,
        pessimism: float = 1.0,
    ) -> None:
        if min(every_n_steps, images, patience, per_prompt) < 1:
            raise UserError("`UpdateDual`: every_n_steps, images, patience and per_prompt must be at least 1")
        if not 0 <= pessimism < float("inf"):
            raise UserError(f"`UpdateDual`: pessimism must not be negative, got {pessimism}")
        self.cost_model = cost_model
        self.every_n_steps = every_n_steps
        self.images = images
        self.patience = patience
        self.per_prompt = per_prompt
        self.ensemble = list(ensemble or ())
        self.pessimism = pessimism
        self._scorer: CostScorer | CostEnsemble | None = None
        self._above: list[float] = []
        self._updated_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        objective = preference_module(pl_module).objective
        if not isinstance(objective, self.moves):
            raise UserError(
                f"`UpdateDual` updates the dual variable of {self.moves.__name__}, but the objective is "
                f"{type(objective).__name__}: remove the callback"
            )
        if self.ensemble:
            from lit_safety.cost_model.ensemble import load_ensemble

            self._scorer = load_ensemble([self.cost_model, *self.ensemble], self.pessimism)
        else:
            self._scorer = load_cost_model(self.cost_model)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # While gradients are accumulated the step number does not change: update only once.
        if step == 0 or step % self.every_n_steps or step == self._updated_at:
            return
        self._updated_at = step
        module = preference_module(pl_module)
        objective = module.objective
        assert isinstance(objective, ConstrainedDPO)
        assert self._scorer is not None
        prompts, seeds = batch.prompts[: self.images], batch.seeds[: self.images]
        costs, of = [], []
        for number in range(self.per_prompt):
            own = seeds if number == 0 else [derive(seed, f"dual {number}") for seed in seeds]
            costs.append(self._scorer.to(module.device).costs(module.draw(prompts, own)))
            of += prompts
        found = torch.cat(costs)
        expected = float(trainer.strategy.reduce(found.mean(), reduce_op="mean"))
        over = found.new_tensor(rectified_excess(found.tolist(), of, objective.limit))
        excess = float(trainer.strategy.reduce(over, reduce_op="mean"))
        try:
            dual = objective.update(expected, excess)
        except ValueError as error:
            raise UserError(f"the cost model {self.cost_model} cannot score the policy's images: {error}") from error
        logged = {"expected_cost": expected, "excess": excess, "dual": dual}
        module.log_dict({f"constrained/{name}": torch.tensor(value) for name, value in logged.items()})
        self._watch(expected, objective)

    def _watch(self, expected: float, objective: ConstrainedDPO) -> None:
        """Warn if the limit seems out of reach: the cost is always above it and not lower than at first."""
        self._above = [*self._above, expected] if expected > objective.limit else []
        if not self._above or len(self._above) % self.patience:
            return
        window = self._above[-self.patience :]
        half = self.patience // 2
        before, after = (sum(part) / len(part) for part in (window[: max(1, half)], window[half:]))
        stalled = after >= before
        # A few images give a noisy estimate: by chance each window may end lower than it began although the cost does
        # not fall. A threshold could not separate this from slow progress, so the third window warns in any case.
        if not stalled and len(self._above) < PATIENCE_WINDOWS * self.patience:
            return
        how = "does not fall" if stalled else "falls too slowly, if it does"
        rank_zero_warn(
            f"the expected cost stayed above `objective.init_args.limit` {objective.limit:g} for {len(self._above)} "
            f"updates and {how} ({before:.2f}, then {after:.2f} in the last {self.patience}); lambda is "
            f"{objective.dual:.2f}: the limit may be out of reach; raise it or dual_rate, or train on more pairs"
        )
        self._above = []

    def state_dict(self) -> dict[str, Any]:
        return {"above": self._above, "updated_at": self._updated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._above, self._updated_at = list(state_dict["above"]), int(state_dict["updated_at"])
