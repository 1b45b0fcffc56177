"""Watches the chosen images' errors: it warns if a run damages the chosen images, and can stop the run."""

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
    """delta/chosen and error/chosen, (2,) float64, as logged by a step or a validation; None: not logged."""
    found = [metrics.get(f"{prefix}{name}") for name in ("delta/chosen", "error/chosen")]
    return None if None in found else torch.stack([one.detach().double() for one in found if one is not None])


def share_of(numbers: Tensor) -> float:
    """How far the chosen error is above the reference's, as a share of the reference's: delta / (error - delta)."""
    delta, error = numbers.tolist()
    return float(delta / max(error - delta, 1e-12))


class WatchChosenError(Callback):
    """Warns once if the chosen images' error exceeds a limit, and optionally stops the fit.

    A preference loss depends only on the difference of two errors, so accuracy and margin can look best while both
    errors grow without limit. This is seen in the mean error of the chosen images compared with the reference's, over
    the training pairs of the last steps and over all validation pairs.

    With ``stop``, the fit ends at the first validation with an error above the limit, and exports the weights of the
    earlier validation with the lowest loss; if there is none, the initial weights. Means are over all ranks. The
    checkpoint holds them and the best weights, so that a resumed run ends like an uninterrupted one.

    `chosen_error.json` in the run's folder holds all measurements: the `last` and the `highest` share on validation
    pairs, and `train` and `val`, each a list of steps and shares.

    Args:
        limit: by which share of the reference's error the chosen error may rise.
        every_n_steps: optimizer steps over which training pairs are averaged.
        stop: end the fit with the best earlier weights; needs validation pairs.

    Raises:
        UserError: a number is outside its range; or, at the start of a fit with ``stop``, there are no validation pairs
            or the weights are sharded over ranks.
    """

    def __init__(self, limit: float = 0.05, every_n_steps: int = 25, stop: bool = False) -> None:
        if not 0 <= limit < float("inf") or every_n_steps < 1:
            raise UserError(
                f"`WatchChosenError`: limit {limit} must not be negative and every_n_steps must be at least 1"
            )
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
                "`WatchChosenError.stop` restores the best weights, but here they are sharded over ranks: set it to "
                "false, or train with `configs/strategies/ddp.yaml`"
            )
        data = datamodule_of(trainer)
        if isinstance(data, WithVal) and data.val is None:
            raise UserError("`WatchChosenError.stop` needs validation pairs: give `data.init_args.val`")
        if not self._best:
            self._keep(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        if (numbers := risen(trainer.callback_metrics)) is not None:
            self._sum = numbers if self._sum is None else self._sum.to(numbers.device) + numbers
            self._count += 1
        step = trainer.global_step
        # While gradients are accumulated the step number does not change: count it only once.
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
            f"fit damages the images that it should prefer. Set `{STABILITY}.winner_limit: {self.limit:g}` or "
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
