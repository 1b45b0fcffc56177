"""The learning rate's schedule: as long as the run, checked before the first step, and the config's after a resume."""

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
#: What an optimizer or a scheduler writes into a group, of which no negative number can be meant.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "eps")
#: A share of the warm-up that is not a step, yet more than nothing to divide by.
_SLIVER = 1e-9
#: Settings of schedulers that are kept under another name than their argument's.
_OWN_NAMES = ("_schedule_phases", "_anneal_func_type", "base_lrs")


def steps_of(trainer: Trainer | None) -> float:
    """Optimizer steps that a fit takes in all, those before a resume included; infinite where nothing ends it.

    Without a trainer nobody knows: nan.
    """
    if trainer is None:
        return math.nan
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps


def make_optimizer(factory: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    """Make the optimizer that a YAML describes.

    Raises:
        UserError: it refuses its settings, or one is not a number that can be meant: a step of a negative rate would
            teach what is to be unlearned.
    """
    try:
        optimizer = factory(parameters)
    except ValueError as error:
        raise UserError(f"`{OPTIMIZER_KEY}`: {' '.join(str(error).split())}") from error
    _check_rates(optimizer, OPTIMIZER_KEY)
    return optimizer


def kind_of(optimizer: Optimizer) -> str:
    """What a checkpoint says of who wrote its optimizer's state."""
    return type(optimizer).__name__


def check_same(before: str | None, optimizer: Optimizer) -> None:
    """Refuse to go on with another optimizer than a checkpoint's; None: it does not say.

    Raises:
        UserError: names the key. torch would fail in the first step, or go on with a state that means something else.
    """
    if before is not None and before != kind_of(optimizer):
        raise UserError(
            f"the checkpoint holds the state of {before}, and `model.init_args.optimizer` is {kind_of(optimizer)}: "
            "resume with the same, or start a new run"
        )


def _check_rates(optimizer: Optimizer, key: str) -> None:
    for group in optimizer.param_groups:
        for name, value in group.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and (not math.isfinite(value) or (name in _RATES and value < 0)):
                raise UserError(f"`{key}`: {name} is {value}, and must be a finite number, not below 0")


def make_scheduler(factory: Any, optimizer: Optimizer, steps: float) -> Any:
    """Make the scheduler that a YAML describes.

    Args:
        factory: makes it from the optimizer; jsonargparse's holds the YAML's arguments.
        optimizer: whose rate is scheduled.
        steps: how often it will be stepped; a `total_steps` that is null becomes this. Infinite: forever; nan: nobody
            knows.

    Raises:
        UserError: it ends before the run, its length is left open and so is the run's, it refuses its settings, or a
            rate would be negative or not finite.
    """
    given: dict[str, Any] = factory.keywords if isinstance(factory, functools.partial) else {}
    filled: dict[str, Any] = {}
    if "total_steps" in given and given["total_steps"] is None and given.get("epochs") is None:
        if not math.isfinite(steps):
            raise UserError(
                f"`{KEY}.total_steps` follows `trainer.max_steps` or `trainer.max_epochs`, and neither is given: set "
                "one of the three"
            )
        filled["total_steps"] = max(2, int(steps))  # a schedule of one step is only its end, a rate near 0
    total = filled.get("total_steps", given.get("total_steps"))
    if isinstance(share := given.get("pct_start"), int | float) and not 0 <= share <= 1:  # nan compares as false
        raise UserError(f"`{KEY}.pct_start` is {share}, and must lie from 0 to 1")
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
    """The share of `OneCycleLR` that warms up; torch divides by its length, and by that of what comes after."""
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
            f"`{KEY}.total_steps` is {total}, and neither `trainer.max_steps` nor `trainer.max_epochs` ends the run "
            "there: set `trainer.max_steps` to as many"
        )
    if total < steps:
        raise UserError(
            f"`{KEY}.total_steps` is {total} and the run takes {int(steps)} steps: set it to null, so that it follows "
            "`trainer.max_steps`, or to as many"
        )
    if total > max(2, steps):
        warm_up = math.ceil(scheduler._schedule_phases[0]["end_step"])
        where = "still rises at" if warm_up >= steps - 1 else "is not near 0 at"
        rank_zero_info(
            f"rate    `{KEY}.total_steps` is {total} and the run takes {int(steps)} steps: the rate {where} the last; "
            "null follows `trainer.max_steps`"
        )


class ScheduledModule(LightningModule):
    """A module whose optimizer and schedule follow its config, in a run that goes on too.

    A subclass that overrides `on_train_start`, `on_save_checkpoint` or `on_load_checkpoint` calls this one's.
    """

    make_optimizer: OptimizerCallable
    make_lr_scheduler: LRSchedulerCallable | None
    """None: the rate stays."""
    _resumed: str | None = None
    _optimizer_kind: str | None = None
    """The class of the optimizer, of the run that is resumed and of this one."""

    def scheduled(self, parameters: Any) -> Any:
        """What `configure_optimizers` returns for what is trained.

        Raises:
            UserError: the settings cannot be meant, or a checkpoint holds the state of another optimizer.
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
    """What a config says of optimizer and scheduler, kept from before a checkpoint's state is put into them.

    torch's state holds the settings too, so that a resumed run would go on with those of the run before, and end with
    an error where that one's schedule does. A run whose settings are as they were is not touched.
    """

    def __init__(self, optimizer: Any, scheduler: Any | None) -> None:
        self._groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        self._schedule = {} if scheduler is None else {name: vars(scheduler)[name] for name in _settings(scheduler)}

    def restore(self, optimizer: Any, scheduler: Any | None, step: int = 0) -> None:
        """Put the config's settings back; the rate goes on as its schedule says for the step that comes next.

        Args:
            optimizer: with the checkpoint's state.
            scheduler: likewise; or a new one, where the run before had none.
            step: how many steps that run took.
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
    """The rates at the scheduler's step, by what does not need the rate before; None: it has no such formula."""
    if isinstance(scheduler, OneCycleLR | LambdaLR | CosineAnnealingWarmRestarts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that `get_lr` is for `step`
            return list(scheduler.get_lr())
    closed = getattr(scheduler, "_get_closed_form_lr", None)
    return None if closed is None else list(closed())
