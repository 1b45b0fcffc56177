"""Watches the chosen images' errors: a run that breaks what it was to prefer says so, and can end before it is lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_safety.callbacks.drawings import preference_module
from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.data.protocols import WithVal, datamodule_of
from lit_safety.modules.strategies import weights_are_sharded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_safety.data.reading.batch import PairBatch

STABILITY = "model.init_args.stability"
FILE_NAME = "chosen_error.json"


def risen(metrics: Mapping[str, Tensor], prefix: str = "") -> Tensor | None:
    """delta/chosen and error/chosen, (2,) float64, as a step or a validation has logged them; None: it has not."""
    found = [metrics.get(f"{prefix}{name}") for name in ("delta/chosen", "error/chosen")]
    return None if None in found else torch.stack([one.detach().double() for one in found if one is not None])


def share_of(numbers: Tensor) -> float:
    """How far the chosen error is above the reference's, as a share of it: delta / (error - delta)."""
    delta, error = numbers.tolist()
    return float(delta / max(error - delta, 1e-12))


class WatchChosenError(Callback):
    """Says once when the chosen images' error has grown beyond a limit, and ends the fit by it if told to.

    A preference loss sees the difference of two errors alone, so accuracy and margin may be at their best while both
    errors explode. The number that shows it is the mean error of the chosen images against the reference's, over the
    training pairs of the last steps and over all validation pairs.

    With ``stop``, the fit ends at the first validation that finds it above the limit, and exports the weights of the
    validation with the lowest loss among those before; without any before, the weights that it began with. Means are
    over all ranks, and with the best weights they stand in the checkpoint: a resumed run ends as the uninterrupted one.

    All that was found lies in `chosen_error.json` in the run's folder: `last` and `highest` share on validation pairs,
    and `train` and `val`, a step and a share each.

    Args:
        limit: share of the reference's error that the chosen error may rise by.
        every_n_steps: optimizer steps over which training pairs are averaged.
        stop: end the fit at the best weights before; it needs validation pairs.

    Raises:
        UserError: a number is outside its range; at the start of a fit that is to be stopped, if there are no
            validation pairs or the weights are sharded over ranks.
    """

    def __init__(self, limit: float = 0.05, every_n_steps: int = 25, stop: bool = False) -> None:
        if not 0 <= limit < float("inf") or every_n_steps < 1:
            raise UserError(f"`WatchChosenError`: limit {limit} must not be negative, every_n_steps be at least 1")
        self.limit, self.every_n_steps, self.stop = limit, every_n_steps, stop
        self._sum: Tensor | None = None
        self._count = self._checked_at = 0
        self._said = self._ended = False
        self._found: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
        self._best: dict[str, Tensor] = {}
        self._best_loss, self._best_step = math.inf, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.stop:
            return
        if weights_are_sharded(trainer):
            raise UserError(
                "`WatchChosenError.stop` puts the best weights back, and here they are sharded over ranks: set it to "
                "false, or train with `configs/strategies/ddp.yaml`"
            )
        data = datamodule_of(trainer)
        if isinstance(data, WithVal) and data.val is None:
            raise UserError("`WatchChosenError.stop` decides by validation pairs: give `data.init_args.val`")
        if not self._best:
            self._keep(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        if (numbers := risen(trainer.callback_metrics)) is not None:
            self._sum = numbers if self._sum is None else self._sum.to(numbers.device) + numbers
            self._count += 1
        step = trainer.global_step
        # While gradients are accumulated the step stays the same: once is enough.
        if step == 0 or step % self.every_n_steps or step == self._checked_at or self._sum is None:
            return
        self._checked_at = step
        mean = torch.as_tensor(trainer.strategy.reduce(self._sum / self._count, reduce_op="mean"))
        self._sum, self._count = None, 0
        self._found["train"].append((step, share_of(mean)))
        self._say(share_of(mean), f"step {step}: over the last {self.every_n_steps} steps")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbers = None if trainer.sanity_checking else risen(trainer.callback_metrics, "val/")
        if numbers is None or trainer.state.fn != "fit":
            return
        share, step = share_of(numbers), trainer.global_step
        self._found["val"].append((step, share))
        self._say(share, f"step {step}: on the validation pairs")
        if not self.stop or self._ended:
            return
        if share > self.limit:
            self._ended = trainer.should_stop = True
            return
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self._best_loss:
            self._best_loss, self._best_step = loss, step
            self._keep(pl_module)

    def _keep(self, pl_module: LightningModule) -> None:
        trained = preference_module(pl_module).trainable_parameters()
        self._best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained}

    def _say(self, share: float, where: str) -> None:
        if self._said or share <= self.limit:
            return
        self._said = True
        rank_zero_warn(
            f"{where}, the error on chosen images is {share:.1%} above the reference's (limit {self.limit:.1%}): the "
            f"fit breaks what it is to prefer. Set `{STABILITY}.winner_limit: {self.limit:g}` or "
            "`model.init_args.objective.init_args.sft_weight`, or lower beta or the learning rate"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._ended:
            return
        module = preference_module(pl_module)
        with torch.no_grad():
            for name, parameter in module.trainable_parameters():
                parameter.copy_(self._best[name])
        module.print(f"best    step {self._best_step} of {trainer.global_step}: later the error on chosen images was "
                     "above its limit; its weights are exported")  # fmt: skip

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        shares = [share for _, share in self._found["val"]]
        found = {"last": shares[-1], "highest": max(shares)} if shares else {}
        text = json.dumps({"limit": self.limit, **found, **self._found}, indent=1)
        write_atomic(Path(trainer.default_root_dir) / FILE_NAME, text.encode())

    def state_dict(self) -> dict[str, Any]:
        return {
            "sum": self._sum,
            "count": self._count,
            "checked_at": self._checked_at,
            "said": self._said,
            "found": self._found,
            "ended": self._ended,
            "best": self._best,
            "best_loss": self._best_loss,
            "best_step": self._best_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, f"_{name}", value)
