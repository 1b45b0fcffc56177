"""The learning rate schedule: as long as the run, checked before the first step, and the config's after a resume."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR

from lit_safety.core.errors import UserError

KEY = "model.init_args.lr_scheduler.init_args"
OPTIMIZER_KEY = "model.init_args.optimizer.init_args"
#: Settings in an optimizer's parameter groups that must not be negative.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "eps")
#: A warm-up share that is shorter than a step but not 0, because torch divides by it.
_SLIVER = 1e-9
#: Settings that schedulers store under another name than their argument's.
_OWN_NAMES = ("_schedule_phases", "_anneal_func_type", "base_lrs")


def steps_of(trainer: Trainer | None) -> float:
    """The total number of optimizer steps of a fit, including those before a resume; infinite if nothing ends it.

    It is nan without a trainer.
    """
    if trainer is None:
        return math.nan
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def make_optimizer(factory: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    """Make the optimizer that the YAML describes.

    Raises:
        UserError: the optimizer refuses its settings, or one is not a valid number: a negative learning rate would
            teach what should be unlearned.
    """
    try:
        optimizer = factory(parameters)
    except ValueError as error:
        raise UserError(f"`{OPTIMIZER_KEY}`: {' '.join(str(error).split())}") from error
    _check_rates(optimizer, OPTIMIZER_KEY)
    return optimizer


def kind_of(optimizer: Optimizer) -> str:
    """The optimizer's class name, as a checkpoint stores it."""
    return type(optimizer).__name__


def check_same(before: str | None, optimizer: Optimizer) -> None:
    """Refuse to resume with another optimizer than the checkpoint's; None: the checkpoint does not name it.

    Raises:
        UserError: names the key. torch would fail in the first step, or continue with a state of another meaning.
    """
    if before is not None and before != kind_of(optimizer):
        raise UserError(
            f"the checkpoint holds the state of {before}, but `model.init_args.optimizer` is {kind_of(optimizer)}: "
            "resume with the same one, or start a new run"
        )


def _check_rates(optimizer: Optimizer, key: str) -> None:
    for group in optimizer.param_groups:
        for name, value in group.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and (not math.isfinite(value) or (name in _RATES and value < 0)):
                raise UserError(f"`{key}`: {name} is {value}, and must be a finite number, not below 0")


def make_scheduler(factory: Any, optimizer: Optimizer, steps: float) -> Any:
    """Make the scheduler that the YAML describes.

    Args:
        factory: makes the scheduler from the optimizer; jsonargparse's factory holds the YAML's arguments.
        optimizer: the optimizer whose rate is scheduled.
        steps: how often it will be stepped; a `total_steps` of null becomes this number. Infinite: forever; nan:
            unknown.

    Raises:
        UserError: it ends before the run, neither its length nor the run's is given, it refuses its settings, or a rate
            would be negative or not finite.
    """
    given: dict[str, Any] = factory.keywords if isinstance(factory, functools.partial) else {}
    filled: dict[str, Any] = {}
    if "total_steps" in given and given["total_steps"] is None and given.get("epochs") is None:
        if not math.isfinite(steps):
            raise UserError(
                f"`{KEY}.total_steps` is taken from `trainer.max_steps` or `trainer.max_epochs`, but neither is given: "
                "set one of the three"
            )
        filled["total_steps"] = max(2, int(steps))  # one step would be only the end, with a rate near 0
    total = filled.get("total_steps", given.get("total_steps"))
    if isinstance(share := given.get("pct_start"), int | float) and not 0 <= share <= 1:  # nan compares as false
        raise UserError(f"`{KEY}.pct_start` is {share}, but must be from 0 to 1")
    if total is not None and isinstance(given.get("pct_start"), float):
        filled["pct_start"] = _warm_up(given["pct_start"], total)
    try:
        scheduler = factory(optimizer, **filled)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"`{KEY}`: {' '.join(str(error).split())}") from error
    _check_rates(optimizer, KEY)
    for one in _within(scheduler):
        _check_length(one, steps)
    return scheduler


def _warm_up(share: float, total: int) -> float:
    """The warm-up share of `OneCycleLR`; torch divides by the length of the warm-up and of the rest."""
    if share * total - 1 == 0:
        return (1 + _SLIVER) / total
    return 1 - _SLIVER if share == 1 else share


def _within(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _within(inner)


def _check_length(scheduler: Any, steps: float) -> None:
    if not isinstance(scheduler, OneCycleLR) or math.isnan(steps):
        return
    total = scheduler.total_steps
    if math.isinf(steps):
        raise UserError(
            f"`{KEY}.total_steps` is {total}, but neither `trainer.max_steps` nor `trainer.max_epochs` ends the run "
            "there: set `trainer.max_steps` to the same number"
        )
    if total < steps:
        raise UserError(
            f"`{KEY}.total_steps` is {total} but the run takes {int(steps)} steps: set it to null, so that it follows "
            "`trainer.max_steps`, or to the same number"
        )
    if total > max(2, steps):
        warm_up = math.ceil(scheduler._schedule_phases[0]["end_step"])
        where = "still rises at" if warm_up >= steps - 1 else "is not near 0 at"
        rank_zero_info(
            f"rate    `{KEY}.total_steps` is {total} but the run takes {int(steps)} steps: the rate {where} the last "
            "step; null follows `trainer.max_steps`"
        )


class ScheduledModule(LightningModule):
    """A module whose optimizer and schedule follow its config, also in a resumed run.

    A subclass that overrides `on_train_start`, `on_save_checkpoint` or `on_load_checkpoint` must call the parent's
    method.
    """

    make_optimizer: OptimizerCallable
    make_lr_scheduler: LRSchedulerCallable | None
    """None: the learning rate is constant."""
    _resumed: str | None = None
    _optimizer_kind: str | None = None
    """The names of the optimizer's class: that of the resumed run, and that of this run."""

    def scheduled(self, parameters: Any) -> Any:
        """What `configure_optimizers` returns for these trained parameters.

        Raises:
            UserError: the settings are not valid, or a checkpoint holds the state of another optimizer.
        """
        optimizer = make_optimizer(self.make_optimizer, parameters)
        check_same(self._resumed, optimizer)
        self._optimizer_kind = kind_of(optimizer)
        if self.make_lr_scheduler is None:
            self._settings = ScheduleSettings(optimizer, None)
            return optimizer
        scheduler = make_scheduler(self.make_lr_scheduler, optimizer, steps_of(self._trainer))
        self._settings = ScheduleSettings(optimizer, scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is not None:
            schedulers = [one.scheduler for one in self.trainer.lr_scheduler_configs]
            scheduler = schedulers[0] if schedulers else None
            self._settings.restore(self.trainer.optimizers[0], scheduler, self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer"] = self._optimizer_kind

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint.get("optimizer")  # the optimizer is made after this


class ScheduleSettings:
    """The config's settings of optimizer and scheduler, stored before a checkpoint's state is loaded into them.

    torch's state also contains the settings. So a resumed run would use those of the run before, and would stop with an
    error where that run's schedule ends. Nothing changes if the settings are the same.
    """

    def __init__(self, optimizer: Any, scheduler: Any | None) -> None:
        self._groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        self._schedule = {} if scheduler is None else {name: vars(scheduler)[name] for name in _settings(scheduler)}

    def restore(self, optimizer: Any, scheduler: Any | None, step: int = 0) -> None:
        """Put the config's settings back; the rate is that of the schedule at the next step.

        Args:
            optimizer: the optimizer with the checkpoint's state.
            scheduler: the scheduler with the checkpoint's state; or a new one, if the run before had none.
            step: how many steps the run before took.
        """
        moving = {"lr"} if scheduler is not None else set()
        if getattr(scheduler, "cycle_momentum", False):
            moving |= {"betas", "momentum"}
        changed = False
        if scheduler is not None and scheduler.last_epoch == 0 and step > 0:
            scheduler.last_epoch, changed = step, True
        for group, mine in zip(optimizer.param_groups, self._groups, strict=False):
            for name, value in mine.items():
                if name not in moving and name in group and _differ(group[name], value):
                    group[name], changed = value, True
        for name, value in self._schedule.items():
            if _differ(vars(scheduler).get(name), value):
                vars(scheduler)[name], changed = value, True
        if changed and scheduler is not None and (rates := _rates(scheduler)) is not None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = list(rates)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return tuple(one) != tuple(other)
    same = one == other
    return not (same if isinstance(same, bool) else bool(same.all()))


def _settings(scheduler: Any) -> list[str]:
    names = [*inspect.signature(type(scheduler)).parameters, *_OWN_NAMES]
    return [name for name in names if name in vars(scheduler) and name not in ("optimizer", "last_epoch")]


def _rates(scheduler: Any) -> list[Any] | None:
    """The rates at the scheduler's step, from its closed formula; None: it has none."""
    if isinstance(scheduler, OneCycleLR | LambdaLR | CosineAnnealingWarmRestarts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that `get_lr` is for `step`
            return list(scheduler.get_lr())
    closed = getattr(scheduler, "_get_closed_form_lr", None)
    return None if closed is None else list(closed())
