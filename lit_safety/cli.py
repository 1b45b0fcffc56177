"""`fit`, `validate`, `test`, `predict`: LightningCLI with run folders and one-line errors."""

from __future__ import annotations

import copy
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_safety.callbacks.stop_on_signal import StopOnSignal
from lit_safety.errors import UserError
from lit_safety.hardware import check_trainer
from lit_safety.modules.strategy_checks import cannot_offload, lost_rank, prepare_strategy
from lit_safety.parsing import SingleLineErrors
from lit_safety.run_folder import (
    ENVIRONMENT,
    RunOptions,
    find_checkpoint,
    is_launched,
    is_main_process,
    last_checkpoint,
    new_folder,
    point_latest,
    remove_if_barren,
)

#: `--ckpt_path auto` of `fit`: as `last`, and a new run where there is none, for scripts that start a job again.
AUTO = "auto"


class Parser(SingleLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


class PointLatest(Callback):
    """Moves the `latest` link once a run has trained its first batch; its folder is kept from then on."""

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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        # One seed: the samples' order and chance come from the same number as the initial weights.
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=one_seed)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_trainer(config.trainer)
        self.folder = self._choose_folder(config)
        # What was asked for, before this run's folder is filled in: the config.yaml that repeats the run elsewhere.
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
        check_checkpoint(str(self.subcommand), config.get("ckpt_path"))
        if (wanted := config.get("ckpt_path")) in ("last", AUTO):
            checkpoint = last_checkpoint(parent) if wanted == "last" else find_checkpoint(parent)
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
                remove_if_barren(self.folder)
            if isinstance(error, ValueError | MisconfigurationException):  # settings that a class refuses
                raise UserError(str(error)) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer: Any = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:
            if isinstance(callback, SaveConfigCallback):
                callback.config = self.asked
        prepare_strategy(trainer)
        if self.subcommand == "fit":
            trainer.callbacks.insert(0, self.point_latest)
            trainer.callbacks.append(self.stop_on_signal)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if self.is_new and not self.point_latest.begun:
                remove_if_barren(self.folder)
            if isinstance(error, SIGTERMException):
                saved = self.stop_on_signal.saved
                if is_main_process():
                    print(f"stopped by SIGTERM; saved {saved}" if saved else "stopped by SIGTERM; nothing was saved")
                sys.exit(0 if is_launched() else 128 + signal.SIGTERM)
            if isinstance(error, MisconfigurationException):
                raise UserError(str(error)) from error
            if (reason := cannot_offload(error)) is not None:
                raise UserError(reason) from error
            if lost_rank(error):
                raise UserError(
                    "another rank is gone, or has not answered within `timeout` of the strategy; what it said, if "
                    f"anything, stands above: go on with `--ckpt_path last` ({str(error).strip().splitlines()[0]})"
                ) from error
            raise


def one_seed(seed_everything: bool | int) -> int:
    """The number that initial weights, order and chance share."""
    if isinstance(seed_everything, bool):
        raise ValueError("`seed_everything` must be a number: the order of the data and every random choice follow it")
    return seed_everything


def check_checkpoint(command: str, ckpt_path: str | None) -> None:
    """A path must be there; words such as `last` are looked up later, and remote places by Lightning.

    Raises:
        UserError: if there is no such file or folder, or none is given to a command that is about one.
    """
    if ckpt_path is None and command in ("test", "predict"):
        raise UserError(f"`{command}` needs --ckpt_path: `last`, or a path; `evaluate` draws with the base model alone")
    words = ("last", "best", "hpc", "registry")
    if (
        ckpt_path is None
        or (command, ckpt_path) == ("fit", AUTO)
        or ckpt_path.startswith(words)
        or "://" in ckpt_path
        or Path(ckpt_path).exists()
    ):
        return
    raise UserError(f"`--ckpt_path {ckpt_path}` does not exist; `--ckpt_path last` finds the newest one by itself")


def write_into(config: Namespace, folder: Path) -> None:
    """Fill in every place of a trainer's config that is left open (null) and says where to write."""
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
    """Leave out what libraries print at every start and nobody can act on."""
    import diffusers
    from transformers.utils import logging as transformers_logging

    diffusers.utils.logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # Frozen networks are in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    # A resumed run goes on in its folder, and another command writes into its own.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in ("litlogger", "Detected KeyboardInterrupt"))
    )


def run_trainer(arguments: Sequence[str]) -> None:
    """Parse and run one of the trainer's commands; ``arguments[0]`` is its name.

    Raises:
        UserError: for bad input, before data or weights are read where that can be known.
    """
    quiet()
    inherited = os.environ.get(ENVIRONMENT)
    # Launchers of further ranks start `sys.argv` again, so it must be this command also when Python code calls us.
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        LitSafetyCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m lit_safety"},
        )
    finally:
        sys.argv = argv
        if inherited is None:
            os.environ.pop(ENVIRONMENT, None)
