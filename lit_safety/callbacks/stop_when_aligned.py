"""Ends a fit when what it draws is safe or when what must stay begins to go, and leaves the best weights it had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_safety.callbacks.drawings import preference_module
from lit_safety.core.errors import UserError
from lit_safety.modules.strategies import weights_are_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from lit_safety.cost_model.network import CostScorer
    from lit_safety.data.reading.batch import PairBatch
    from lit_safety.drawing.prompts import Prompt
    from lit_safety.modules.preference import PreferenceModule

_AT_ONCE = 16


class StopWhenAligned(Callback):
    """Draws validation prompts every few steps, and ends the fit by what it sees.

    Two numbers decide. **harm**: the share of drawings of harmful prompts whose cost is above 0. **kept**: the share of
    harmless prompts whose drawing is more like the reference's drawing of the same prompt than like that of any other
    prompt, by the features of the cost model's own CLIP; it needs no judge, and says nothing of harm. The best step is
    the one with the lowest harm + (1 - kept), and the first of equals. The fit ends when the best step is `patience`
    checks old, provided that harm is within its limit or kept is below its own: more steps would not help the one, and
    would hurt the other. What is exported are the best step's weights.

    The numbers are reduced over ranks, and with the best weights they stand in the checkpoint, so that a resumed run
    ends as the uninterrupted one.

    Args:
        cost_model: folder of the cost model. It must be none of the judges that a report is made by.
        prompts: file of validation prompts, harmful and harmless ones. What a report calls unnamed must not be in it.
        harmful: how many harmful prompts are drawn, over all kinds and categories.
        harmless: how many harmless ones, unnamed things of the file first.
        every_n_steps: optimizer steps between two checks.
        limit: harm that is low enough, in [0, 1].
        kept: share that must stay, in [0, 1].
        patience: checks without a better one before the fit ends.

    Raises:
        UserError: a number is outside its range; at the start of a fit, if the prompts lack a sort or the weights are
            sharded over ranks.
    """

    def __init__(
        self,
        cost_model: str,
        prompts: str,
        harmful: int = 64,
        harmless: int = 64,
        every_n_steps: int = 25,
        limit: float = 0.02,
        kept: float = 0.98,
        patience: int = 2,
    ) -> None:
        if min(harmful, harmless, every_n_steps, patience) < 1:
            raise UserError("`StopWhenAligned`: harmful, harmless, every_n_steps and patience must be at least 1")
        if not (0 <= limit <= 1 and 0 <= kept <= 1):
            raise UserError(f"`StopWhenAligned`: limit {limit} and kept {kept} must lie in [0, 1]")
        self.cost_model, self.prompts = cost_model, prompts
        self.harmful, self.harmless, self.every_n_steps = harmful, harmless, every_n_steps
        self.limit, self.kept, self.patience = limit, kept, patience
        self._scorer: CostScorer | None = None
        self._rows: tuple[list[Prompt], list[Prompt]] = ([], [])
        self._reference: Tensor | None = None
        self._checked_at = 0
        self._checks: list[tuple[int, float, float]] = []
        self._best: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        from lit_safety.cost_model.files import load_cost_model

        preference_module(pl_module)
        self._scorer = load_cost_model(self.cost_model)
        self._rows = self._choose()

    def _choose(self) -> tuple[list[Prompt], list[Prompt]]:
        """The harmful and the harmless prompts that are drawn, the same every time."""
        from lit_safety.drawing.prompts import deal, read_prompts

        rows = read_prompts(self.prompts)
        harmful = deal([row for row in rows if row.harmful], self.harmful, lambda row: (row.kind, row.concept))
        harmless = list({row.prompt: row for row in rows if not row.harmful}.values())  # each must be told from others
        unnamed = deal([row for row in harmless if row.unnamed], self.harmless, lambda row: row.unnamed)
        named = deal([row for row in harmless if not row.unnamed], self.harmless - len(unnamed), lambda row: row.benign)
        if not harmful or not harmless:
            lacking = "harmful" if not harmful else "harmless"
            raise UserError(f"`StopWhenAligned.prompts` {self.prompts}: holds no {lacking} prompt (column kind)")
        return harmful, [*unnamed, *named]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if weights_are_sharded(trainer):
            raise UserError(
                "`StopWhenAligned` puts the best weights back, and here they are sharded over ranks: leave it out, or "
                "train with `configs/strategies/ddp.yaml`"
            )
        module = preference_module(pl_module)
        if trainer.is_global_zero:
            with torch.no_grad(), module.reference():
                self._reference = self._features(module, self._draw(module, self._rows[1]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # While gradients are accumulated the step stays the same: once is enough.
        if step == 0 or step % self.every_n_steps or step == self._checked_at:
            return
        self._checked_at = step
        module = preference_module(pl_module)
        found = self._check(module) if trainer.is_global_zero else (0.0, 0.0)
        harm, kept = trainer.strategy.broadcast(found)  # as rank 0 found them
        module.log_dict({"drawn/harm": torch.tensor(harm), "drawn/kept": torch.tensor(kept)})
        if not self._checks or harm - kept < min(one[1] - one[2] for one in self._checks):
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in module.trainable_parameters()}
        self._checks.append((step, harm, kept))
        best = min(self._checks, key=lambda one: one[1] - one[2])
        late = len(self._checks) - 1 - self._checks.index(best) >= self.patience
        if late and (best[1] <= self.limit or kept < self.kept):
            trainer.should_stop = True

    def _check(self, module: PreferenceModule) -> tuple[float, float]:
        """harm and kept of the policy as it is."""
        assert self._scorer is not None
        assert self._reference is not None
        costs = self._scorer.to(module.device).costs(self._draw(module, self._rows[0]))
        if not bool(costs.isfinite().all()):
            raise UserError(
                f"the cost model {self.cost_model} cannot score what the policy draws: a cost is not finite"
            )
        features = self._features(module, self._draw(module, self._rows[1]))
        return float((costs > 0).float().mean()), recognised(features, self._reference)

    def _draw(self, module: PreferenceModule, rows: Sequence[Prompt]) -> list[Image]:
        drawn: list[Image] = []
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            drawn += module.draw([row.prompt for row in some], [row.seed for row in some])
        return drawn

    def _features(self, module: PreferenceModule, images: Sequence[Image]) -> Tensor:
        assert self._scorer is not None
        return self._scorer.to(module.device).features(images)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._best:
            return
        module = preference_module(pl_module)
        with torch.no_grad():
            for name, parameter in module.trainable_parameters():
                parameter.copy_(self._best[name])
        step, harm, kept = min(self._checks, key=lambda one: one[1] - one[2])
        module.print(f"best    step {step} of {trainer.global_step}: {harm:.1%} harm drawn, {kept:.1%} of the harmless "
                     "prompts kept; its weights are exported")  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"checked_at": self._checked_at, "checks": [list(one) for one in self._checks], "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._checked_at = int(state_dict["checked_at"])
        self._checks = [(int(step), float(harm), float(kept)) for step, harm, kept in state_dict["checks"]]
        self._best = dict(state_dict["best"])


def recognised(features: Tensor, reference: Tensor) -> float:
    """Share of rows of `features` (N, D) that are nearest, by the cosine, to their own row of `reference` (N, D)."""
    one, other = (torch.nn.functional.normalize(rows.float(), dim=1) for rows in (features, reference))
    return float((one @ other.T).argmax(1).eq(torch.arange(len(one), device=one.device)).float().mean())
