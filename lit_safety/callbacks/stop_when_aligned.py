"""Ends a fit when its images are safe, or when harmless content begins to suffer, and keeps the best weights."""

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
    """Draws validation prompts every few steps, and ends the fit depending on the images.

    Two numbers decide. **harm**: the share of images of harmful prompts whose cost is above 0. **kept**: the share of
    harmless prompts whose image is more like the reference's image of the same prompt than like the reference's image
    of any other prompt, by the features of the cost model's CLIP; it needs no judge and does not measure harm. The best
    step has the lowest harm + (1 - kept); of equal steps the first. The fit ends when there was no better step for
    `patience` checks, and harm is within `limit` or kept is below `kept`: more steps would not improve harm, or would
    reduce kept further. The weights of the best step are exported.

    All ranks use the same numbers. The checkpoint holds them and the best weights, so that a resumed run ends as an
    uninterrupted one.

    Args:
        cost_model: folder of the cost model. It must not be a judge of the report.
        prompts: file of validation prompts, harmful and harmless ones. It must not hold subjects that the report lists
            as unnamed.
        harmful: how many harmful prompts are drawn, from all kinds and categories.
        harmless: how many harmless ones, first those with unnamed subjects of the file.
        every_n_steps: optimizer steps between two checks.
        limit: the highest acceptable harm, in [0, 1].
        kept: the lowest acceptable share that is kept, in [0, 1].
        patience: how many checks without a better step end the fit.

    Raises:
        UserError: a number is outside its range; at the start of a fit, if harmful or harmless prompts are missing or
            the weights are sharded over ranks.
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
        from lit_safety.cost_model.files import check_border, load_cost_model

        preference_module(pl_module)
        check_border(self.cost_model, "`StopWhenAligned.cost_model`")
        self._scorer = load_cost_model(self.cost_model)
        self._rows = self._choose()

    def _choose(self) -> tuple[list[Prompt], list[Prompt]]:
        """The harmful and the harmless prompts to draw, the same every time."""
        from lit_safety.drawing.prompts import deal, read_prompts

        rows = read_prompts(self.prompts)
        harmful = deal([row for row in rows if row.harmful], self.harmful, lambda row: (row.kind, row.concept))
        # images are compared, so each once
        harmless = list({row.prompt: row for row in rows if not row.harmful}.values())
        unnamed = deal([row for row in harmless if row.unnamed], self.harmless, lambda row: row.unnamed)
        named = deal([row for row in harmless if not row.unnamed], self.harmless - len(unnamed), lambda row: row.benign)
        if not harmful or not harmless:
            lacking = "harmful" if not harmful else "harmless"
            raise UserError(f"`StopWhenAligned.prompts` {self.prompts}: holds 0 {lacking} prompts (column kind)")
        return harmful, [*unnamed, *named]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if weights_are_sharded(trainer):
            raise UserError(
                "`StopWhenAligned` restores the best weights, but here they are sharded over ranks: remove it, or "
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
        # While gradients are accumulated the step number does not change: check only once.
        if step == 0 or step % self.every_n_steps or step == self._checked_at:
            return
        self._checked_at = step
        module = preference_module(pl_module)
        found = self._check(module) if trainer.is_global_zero else (0.0, 0.0)
        harm, kept = trainer.strategy.broadcast(found)  # the numbers of rank 0
        module.log_dict({"drawn/harm": torch.tensor(harm), "drawn/kept": torch.tensor(kept)})
        if not self._checks or harm - kept < min(one[1] - one[2] for one in self._checks):
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in module.trainable_parameters()}
        self._checks.append((step, harm, kept))
        best = min(self._checks, key=lambda one: one[1] - one[2])
        late = len(self._checks) - 1 - self._checks.index(best) >= self.patience
        if late and (best[1] <= self.limit or kept < self.kept):
            trainer.should_stop = True

    def _check(self, module: PreferenceModule) -> tuple[float, float]:
        """harm and kept of the current policy."""
        assert self._scorer is not None
        assert self._reference is not None
        costs = self._scorer.to(module.device).costs(self._draw(module, self._rows[0]))
        if not bool(costs.isfinite().all()):
            raise UserError(f"the cost model {self.cost_model} cannot score the policy's images: a cost is not finite")
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
