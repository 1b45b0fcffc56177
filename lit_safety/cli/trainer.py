"""`fit`, `validate`, `test`, `predict`, and their progress bar, which counts batches even if a step has several."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_safety.callbacks.checkpoint import StopOnSignal
from lit_safety.cli.run_files import (
    ENVIRONMENT,
    KeepConfig,
    RunOptions,
    damage,
    find_checkpoint,
    incomplete,
    keep_rows,
    last_checkpoint,
    new_folder,
    point_latest,
    remove_if_untrained,
)
from lit_safety.core.errors import UserError
from lit_safety.core.files import FULL, Lock, lock_of
from lit_safety.core.hardware import check_trainer
from lit_safety.core.parsing import SingleLineErrors
from lit_safety.core.processes import end_with, is_launched, is_main_process
from lit_safety.core.shipped import check_worlds
from lit_safety.modules.strategies import cannot_offload, lost_rank, prepare_strategy


def count_batches(bar: Any) -> None:
    """Correct the total of Lightning's bars, which counts the remaining steps as if each were one batch."""
    if isinstance(bar, ProgressBar):
        bar.__class__ = type(type(bar).__name__, (_WholeBatches, type(bar)), {"__module__": type(bar).__module__})


class _WholeBatches(ProgressBar):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._begun:  # when a run is resumed within an epoch, the epoch's start, which sets the total, is not called
            self.on_train_epoch_start(trainer, pl_module)

    @property
    def _begun(self) -> int:
        """Batches of this epoch that were done before the run was resumed."""
        # Not `completed`: a checkpoint at a batch's end is written before it is increased.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        done: int = progress.processed
        return done if done < self.trainer.num_training_batches else 0  # else they belong to the epoch before

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, including those before the run was resumed; fewer if the run ends within it."""
        trainer = self.trainer
        held, every = trainer.num_training_batches, trainer.accumulate_grad_batches
        if trainer.max_epochs not in (-1, None) or trainer.max_steps is None or trainer.max_steps < 0:
            return held
        left = max(0, trainer.max_steps - trainer.global_step) * every - self._begun % every
        return min(held, self._begun + left)


# `fit`, `validate`, `test`, `predict`: LightningCLI with run folders and one-line errors.


#: `--ckpt_path auto` of `fit`: as `last`, or a new run if there is none; for scripts that start a job again.
AUTO = "auto"
#: Seconds that launched ranks have to end by themselves after this one, and again after each stronger signal.
RANKS_END = 10.0
_MODEL = tuple(f"model.init_args.{name}" for name in ("pretrained", "clip", "prompts", "cost_model"))
#: Command -> the keys whose files it reads. The YAML of a fit also holds the settings that `test` judges with.
READ = {
    "fit": [*_MODEL, "data.init_args.train", "data.init_args.val"],
    "validate": [*_MODEL, "data.init_args.val"],
    "test": [*_MODEL, "data.init_args.test", "trainer.callbacks"],
    "predict": [*_MODEL, "data.init_args.test"],
}


class Parser(SingleLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""

    # `model: {class_path: my.SCDPO}` over configs/scdpo.yaml changes a part of the method and keeps the settings.
    inherits = (LightningModule, LightningDataModule, Strategy)


class PointLatest(Callback):
    """Move the `latest` link when a run has trained its first batch; from then on its folder is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.begun and trainer.is_global_zero:
            point_latest(self.folder)
        self.begun = True


class LitSafetyCLI(LightningCLI):
    """LightningCLI whose runs write into folders of their own (see `run_folder`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.lock: Lock | None = None
        try:
            super().__init__(*args, **kwargs)
        finally:
            if self.lock is not None:
                self.lock.release()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        # One seed for the order of the samples, all random choices and the initial weights.
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=one_seed)

    def _parse_ckpt_path(self) -> None:
        config = self.config[self.config.subcommand]
        check_checkpoint(str(self.config.subcommand), config.get("ckpt_path"))  # Lightning reads it here
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_worlds(config.as_dict(), READ[str(self.subcommand)])
        check_trainer(config.trainer)
        self.folder = self._choose_folder(config)
        if self.subcommand == "fit" and is_main_process():
            self.lock = Lock(
                lock_of(self.folder), f"{self.folder}: another process trains in this folder; wait for it, or end it"
            )
        # The settings before this run's folder is filled in: this config.yaml can repeat the run at another place.
        self.asked = copy.deepcopy(config)
        if self.subcommand == "fit":
            self.asked.ckpt_path = None
        write_into(config, self.folder)
        self.point_latest = PointLatest(self.folder)
        self.stop_on_signal = StopOnSignal()

    def _choose_folder(self, config: Namespace) -> Path:
        name = config.run.name or config.model.class_path.rsplit(".", 1)[-1].lower()
        parent = Path(config.run.root) / name
        resumed = None
        if (wanted := config.get("ckpt_path")) in ("last", AUTO):
            trains = self.subcommand == "fit"
            checkpoint = last_checkpoint(parent, trains) if wanted == "last" else find_checkpoint(parent, trains)
            config.ckpt_path = None if checkpoint is None else str(checkpoint)
            resumed = None if checkpoint is None else checkpoint.parents[1]
        self.is_new = False
        if self.subcommand == "fit" and resumed is not None:
            return resumed
        if ENVIRONMENT in os.environ:
            return Path(os.environ[ENVIRONMENT])
        if not is_main_process():
            return parent / "written-by-rank-0"
        self.is_new = True
        folder = new_folder(parent if self.subcommand == "fit" else parent / str(self.subcommand))
        os.environ[ENVIRONMENT] = str(folder)
        return folder

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BaseException as error:
            if self.is_new:
                remove_if_untrained(self.folder)
            # Settings that a class refuses, and SLURM's variables that do not fit.
            if isinstance(error, ValueError | MisconfigurationException) or "SLURM" in str(error):
                raise UserError(str(error)) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer: Any = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:
            if isinstance(callback, SaveConfigCallback):
                callback.config = self.asked
            count_batches(callback)
        if is_main_process():
            for logger in trainer.loggers:
                keep_rows(logger)
        check_world(trainer)
        prepare_strategy(trainer)
        if self.subcommand == "fit":
            trainer.callbacks.insert(0, self.point_latest)
            trainer.callbacks.append(self.stop_on_signal)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        quiet_loading()
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if self.is_new and not self.point_latest.begun:
                remove_if_untrained(self.folder)
            end_ranks(self.trainer, 0.0 if port_in_use(error) else RANKS_END)
            if isinstance(error, SIGTERMException):
                saved = self.stop_on_signal.saved
                if is_main_process():
                    print(f"stopped by SIGTERM; saved {saved or 'no checkpoint'}")
                sys.exit(0 if is_launched() else 128 + signal.SIGTERM)
            if isinstance(error, MisconfigurationException):
                raise UserError(str(error)) from error
            if (reason := cannot_offload(error)) is not None:
                raise UserError(reason) from error
            if port_in_use(error):
                raise UserError(
                    f"the port {os.environ.get('MASTER_PORT', 'of the ranks')} is in use by another process: set "
                    "MASTER_PORT to a free one, or unset it"
                ) from error
            if (full := full_disk(error)) is not None:
                again = "continue with `--ckpt_path last`" if subcommand == "fit" else "run the same command again"
                raise UserError(
                    f"{full.filename or self.folder}: cannot be written ({full.strerror}): make room, then {again}"
                ) from error
            if lost_rank(error):
                raise UserError(
                    "another rank has ended, or did not answer within `timeout` of the strategy; its messages, if "
                    f"any, are above: continue with `--ckpt_path last` ({str(error).strip().splitlines()[0]})"
                ) from error
            raise


def check_world(trainer: Trainer) -> None:
    """Refuse processes of a launcher that would each train alone.

    Raises:
        UserError: there are more, or fewer, than the trainer's ranks.
    """
    for environment, variable in ((SLURMEnvironment, "SLURM_NTASKS"), (TorchElasticEnvironment, "WORLD_SIZE")):
        started = os.environ.get(variable, "")
        if environment.detect() and started.isdigit() and int(started) not in (1, trainer.world_size):
            raise UserError(
                f"{variable} is {started}, and `trainer.devices` x `trainer.num_nodes` make {trainer.world_size} "
                f"ranks: set them to {started} in all and `trainer.strategy` to ddp, or start as many processes"
            )


def full_disk(error: BaseException | None) -> OSError | None:
    """The error about a full disk, in an error or its causes: loggers wrap it in their own errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def tell_of_threads(otherwise: Callable[[Any], Any], told: Any) -> None:
    """For `threading.excepthook`: if a logger's thread finds the disk full, print one line."""
    if (full := full_disk(told.exc_value)) is None:
        otherwise(told)
    else:
        print(f"note: {full.filename or 'a file'}: cannot be written ({full.strerror})", file=sys.stderr)


def port_in_use(error: BaseException) -> bool:
    """Whether rank 0 could not listen for the others."""
    return isinstance(error, RuntimeError) and ("EADDRINUSE" in str(error) or "address already in use" in str(error))


def end_ranks(trainer: Trainer, patience: float, mercy: float = RANKS_END) -> None:
    """End the ranks that this process has launched: otherwise they would wait for it long after it has ended.

    Args:
        trainer: whose ranks.
        patience: seconds in which they may end by themselves.
        mercy: seconds between SIGTERM and SIGKILL.
    """
    processes = getattr(getattr(trainer.strategy, "launcher", None), "procs", None) or []
    _wait(processes, patience)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _wait(processes, mercy)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))


def one_seed(seed_everything: bool | int) -> int:
    """The seed of initial weights, order and random choices."""
    if isinstance(seed_everything, bool):
        raise ValueError("`seed_everything` must be a number: the data's order and random choices depend on it")
    return seed_everything


def check_checkpoint(command: str, ckpt_path: str | None) -> None:
    """Check that a path exists. Words such as `last` are looked up later, and remote paths by Lightning.

    Raises:
        UserError: there is no such file or folder, or the command needs one and none is given.
    """
    if ckpt_path is None and command in ("test", "predict"):
        raise UserError(f"`{command}` needs --ckpt_path: `last`, or a path; `evaluate` draws with the base model alone")
    words = ("last", "best", "hpc", "registry")
    if ckpt_path is None or (command, ckpt_path) == ("fit", AUTO) or ckpt_path.startswith(words) or "://" in ckpt_path:
        return
    if Path(ckpt_path).exists():
        if (reason := damage(Path(ckpt_path))) is not None:
            raise UserError(f"`--ckpt_path {ckpt_path}` {reason}; `--ckpt_path last` finds the newest whole one")
        if command == "fit" and (reason := incomplete(Path(ckpt_path))) is not None:
            raise UserError(
                f"`--ckpt_path {ckpt_path}` {reason}: start a new run from its weights, `--model.init_args.start_from`"
            )
        return
    raise UserError(f"`--ckpt_path {ckpt_path}` does not exist; `--ckpt_path last` finds the newest one")


def write_into(config: Namespace, folder: Path) -> None:
    """Fill in every output path of a trainer's config that is null."""
    trainer = config.trainer
    if trainer.default_root_dir is None:
        trainer.default_root_dir = str(folder)
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
        if arguments is not None and "save_dir" in arguments and arguments.save_dir in (None, "."):
            arguments.save_dir = str(folder)
    callbacks = trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback.class_path.endswith("ModelCheckpoint") and callback.init_args.dirpath is None:
            callback.init_args.dirpath = str(folder / "checkpoints")


def quiet() -> None:
    """Hide messages that libraries print at every start and that do not help the user."""
    # Frozen networks are in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    # A resumed run continues in its folder, and another command writes into its own.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in ("litlogger", "Detected KeyboardInterrupt"))
    )


def quiet_loading() -> None:
    """Hide the bars of what loads models. Importing them takes time that a command that only reads settings saves."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def run_trainer(arguments: Sequence[str]) -> None:
    """Parse and run one of the trainer's commands; ``arguments[0]`` is its name.

    Raises:
        UserError: for bad input, before data or weights are read if possible.
    """
    quiet()
    inherited = os.environ.get(ENVIRONMENT)
    if inherited is not None and is_launched():
        end_with(os.getppid())  # rank 0
    # Launchers of further ranks run `sys.argv` again, so it must be this command even if Python code calls this.
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    hook = threading.excepthook
    threading.excepthook = functools.partial(tell_of_threads, hook)
    try:
        LitSafetyCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=KeepConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m lit_safety"},
        )
    finally:
        sys.argv = argv
        threading.excepthook = hook
        if inherited is None:
            os.environ.pop(ENVIRONMENT, None)
