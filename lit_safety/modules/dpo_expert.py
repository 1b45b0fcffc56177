"""DPOExpert: one LoRA for each category of harm, trained in one fit and merged afterwards (SafetyDPO, arXiv
2412.10493)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL.Image import Image

from lit_safety.adapters.expert_bank import ExpertBank
from lit_safety.adapters.gathered import replaced
from lit_safety.adapters.start_from import read_experts
from lit_safety.core.categories import CATEGORIES, canonical_category
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import Consecutive, PairData, datamodule_of
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules.for_merging import KEY as FOR_MERGING
from lit_safety.modules.for_merging import ForMerging
from lit_safety.modules.preference import POLICY, PreferenceModule
from lit_safety.modules.strategies import check_weights
from lit_safety.objectives.dpo import DiffusionDPO
from lit_safety.objectives.objective import Objective, ObjectiveOutput, PairErrors

#: What is logged for each expert separately, as `loss/<category>` and so on.
BY_CATEGORY = ("rewards/margins", "rewards/accuracies")


class DPOExpert(PreferenceModule):
    """Trains one expert for each category: a LoRA on this category's pairs. The reference is the base without LoRA.

    The experts take turns: every step uses pairs of one category (`data.init_args.one_category`), the same on all
    ranks, and changes that category's expert only. The others are kept outside the network and the optimizer
    (`ExpertBank`). All experts share the fit's learning rate schedule: turns are spread evenly over it, so that every
    expert gets its warm-up and its decay. With `data.init_args.consecutive` one expert is trained after the other, each
    with a fresh optimizer and the whole schedule.

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        objective: the loss on a batch of pairs; Diffusion-DPO by default, as in the paper.
        categories: all: an expert for every category of the training pairs; or a list of categories, which must be that
            of `data.init_args.categories`.
        for_merging: how experts are initialised, and whether they are merged during training, so that they merge better
            at the end (`ForMerging`); null: experts are trained independently.
    """

    bank: ExpertBank

    def __init__(
        self,
        pretrained: str,
        objective: Objective | None = None,
        categories: Literal["all"] | list[str] = "all",
        for_merging: ForMerging | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, objective or DiffusionDPO(), **settings)
        self.for_merging = for_merging
        self._not_evaluated: set[str] = set()
        self.categories: list[str] | None = None
        if categories != "all":
            try:
                self.categories = [canonical_category(name) for name in categories]
            except UserError as error:
                raise UserError(f"`model.init_args.categories`: {error}") from error
            if not self.categories or len(set(self.categories)) < len(self.categories):
                raise UserError(f"`model.init_args.categories` {list(categories)}: name every category once, or all")

    # ---- the experts -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_experts(self.trainer, self.objective, self._experts(), self._consecutive)
        super().setup(stage)

    def _experts(self) -> list[str]:
        """The experts' names. Without training data, all categories; a checkpoint then says which of them exist."""
        data = datamodule_of(self._trainer)
        if not self._fitting or not isinstance(data, PairData):
            return self.categories or list(CATEGORIES)
        found = data.training_categories()
        if not found:
            raise UserError(
                "DPOExpert needs pairs of one category in each step: set `data.init_args.one_category: true`"
            )
        asked = self.categories or found
        if missing := sorted(set(asked) - set(found)):
            raise UserError(
                f"`model.init_args.categories`: there are too few training pairs for a step of {', '.join(missing)}; "
                f"there are enough for {', '.join(found)}"
            )
        if set(found) - set(asked):
            raise UserError(
                f"`model.init_args.categories` is {asked}, but the data would also give steps of "
                f"{', '.join(sorted(set(found) - set(asked)))}: set `data.init_args.categories` to {asked} too"
            )
        return found

    @property
    def _fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    @property
    def _consecutive(self) -> bool:
        data = datamodule_of(self.trainer)
        return isinstance(data, Consecutive) and data.consecutive

    def configure_policy(self) -> None:
        super().configure_policy()
        seed = torch.initial_seed()
        if self._trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)
        self.bank = ExpertBank(self._experts(), self._adapter_parameters(), self.lora, seed)

    def begin_from(self, path: Path) -> None:
        """Here `start_from` is another run's folder `experts`, with a folder for each category, or a checkpoint."""
        held = read_experts(path, self.lora, POLICY, self.bank.names, self.adaptable_layers())
        for name, weights in held.items():
            check_weights(self.bank.parameters, weights, f"`model.init_args.start_from` {path}: expert {name}")
        self.bank.begin_with(held)

    def configure_model(self) -> None:
        super().configure_model()
        self.bank.parameters = self._adapter_parameters()  # FSDP2 replaces the parameters when it shards them

    def _adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters by their names in the denoiser, which wrappers do not change."""
        return {n: p for n, p in self.backbone.denoiser.named_parameters() if f".{POLICY}." in n}

    def category_of(self, batch: PairBatch) -> str:
        """The expert that a batch trains.

        Raises:
            UserError: the batch has no category, or no expert belongs to it.
        """
        if batch.category is None and len(self.bank.names) == 1:
            return self.bank.names[0]
        if batch.category not in self.bank.names:
            raise UserError(
                f"a batch is of category {batch.category}, but the experts are {', '.join(self.bank.names)}: set "
                "`data.init_args.one_category: true`, and the same categories for model and data"
            )
        return batch.category

    # ---- steps -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        names = self.bank.names
        how = "one after the other" if self._consecutive else "in turns"
        rank_zero_info(f"experts {', '.join(names)}" + (f" ({how})" if len(names) > 1 else ""))
        if self.for_merging is not None:
            self.for_merging.check(self, self.trainer, self._consecutive)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.for_merging is not None:
            self.for_merging.begin(self, self.trainer)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        if self.for_merging is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.for_merging.before_step(self, self.trainer)
        category = self.category_of(batch)
        if category != self.bank.active:
            if batch_idx % self.trainer.accumulate_grad_batches:
                raise UserError(
                    f"a step would mix {self.bank.active} and {category}: the number of micro-batches a step has "
                    "changed since the data were ordered; set `trainer.accumulate_grad_batches` and leave "
                    "GradientAccumulationScheduler out"
                )
            if self._consecutive:
                begin_expert(self.trainer, self, self.bank, category)
            else:
                self.bank.activate(category, self.trainer.optimizers[0])
        self.bank.batches[category] += 1

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        # With consecutive experts each one gets the whole schedule too, as it does when experts take turns.
        for _ in range(len(self.bank.names) if self._consecutive else 1):
            super().lr_scheduler_step(scheduler, metric)

    def loss(self, errors: PairErrors, batch: PairBatch) -> ObjectiveOutput:
        output = super().loss(errors, batch)
        category = self.category_of(batch)
        own = {f"{name}/{category}": output.logs[name] for name in BY_CATEGORY if name in output.logs}
        output.logs |= own | {f"loss/{category}": output.loss.detach()}
        return output

    def _evaluation_step(self, batch: PairBatch, stage: str) -> None:
        if batch.category is not None and batch.category not in self.bank.names:
            # For example because its category has too few training pairs. All ranks are at the same category.
            if batch.category not in self._not_evaluated:
                self._not_evaluated.add(batch.category)
                rank_zero_warn(f"there is no expert of {batch.category}: its {stage} pairs are left out")
            return
        category = self.category_of(batch)
        if self._fitting and under_deepspeed(self.trainer) and category != self.bank.active:
            return  # DeepSpeed's engine does not hold its weights
        with self.bank.shown(category):
            super()._evaluation_step(batch, stage)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[Image]:
        with self.bank.shown(self.category_of(batch)):
            return super().predict_step(batch, batch_idx)

    def draw_rows(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Image]]:
        """One row for each expert, in the config's order; under DeepSpeed only the expert that is trained."""
        names = [self.bank.active] if under_deepspeed(self.trainer) else self.bank.names
        rows = []
        for name in names:
            with self.bank.shown(name):
                rows.append(self.draw(prompts, seeds))
        return rows

    # ---- files -----------------------------------------------------------------------------------------------

    def exports(self) -> list[str]:
        """`adapter` for a single expert, else `experts/<category>` for each."""
        if len(self.bank.names) == 1:
            return ["adapter"]
        return [f"experts/{name}" for name in self.bank.names]

    def _exported(self, export: str) -> str:
        return self.bank.names[0] if export == "adapter" else export.rsplit("/", 1)[-1]

    @contextmanager
    def exporting(self, export: str) -> Iterator[None]:
        with replaced(self, self.bank.parameters, self.bank.weights(self._exported(export))):
            yield

    def export_settings(self, export: str) -> dict[str, Any]:
        category = self._exported(export)
        steps = self.bank.batches[category] // self.trainer.accumulate_grad_batches
        told = {} if self.for_merging is None else self.for_merging.settings()
        return super().export_settings(export) | {"category": category, "steps": steps} | told

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["experts"] = self.bank.state_dict()
        if self.for_merging is not None:
            checkpoint["for_merging"] = self.for_merging.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "experts" not in checkpoint:
            raise UserError("the checkpoint holds no experts: it was not written by DPOExpert")
        if self.categories is None and not self._fitting:
            self.bank.names = list(checkpoint["experts"]["names"])
        self.bank.load_state_dict(checkpoint["experts"])
        if self.for_merging is not None and "for_merging" in checkpoint:
            self.for_merging.load_state_dict(checkpoint["for_merging"])
        elif self.for_merging is not None and self._fitting:
            raise UserError(
                f"the checkpoint was written without `{FOR_MERGING}`: resume with the config.yaml of its run"
            )


# One expert after the other, each with a fresh optimizer and schedule. DeepSpeed needs this; other strategies can use
# it.
#
# When ZeRO makes its engine, it flattens the trained weights into its own partitions, and it gives a gradient of 0 to
# weights without one. So under DeepSpeed each expert gets a new engine: at the end of a phase the fp32 weights are
# gathered, the engine is destroyed, the next expert's weights are put in, and a new engine is made for them.


def under_deepspeed(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def begin_expert(trainer: Trainer, module: LightningModule, bank: ExpertBank, name: str) -> None:
    """End the phase of the current expert and begin that of ``name``. Called on all ranks, between steps."""
    strategy: Any = trainer.strategy
    if not under_deepspeed(trainer):
        bank.activate(name)
        strategy.setup_optimizers(trainer)
        return
    # Before the engine is destroyed: the weights to keep are the fp32 ones of its optimizer.
    bank.activate(name)
    strategy.deepspeed_engine.destroy()
    strategy.model = module
    strategy.init_deepspeed()


# Settings that are refused when one fit trains several experts.


def check_experts(trainer: Trainer, objective: Objective, names: Sequence[str], consecutive: bool) -> None:
    """Refuse settings with which the experts ``names`` would be trained wrongly; a single expert has no such limits.

    Raises:
        UserError: experts would change outside of their turns, share an objective's learned state, or be averaged with
            each other.
    """
    if len(names) == 1:
        return
    if under_deepspeed(trainer) and not consecutive:
        raise UserError(
            f"DPOExpert: {len(names)} experts cannot take turns under DeepSpeed, which also changes idle weights: set "
            "`data.init_args.consecutive: true`, or train with ddp"
        )
    if state := objective.state_dict():
        raise UserError(
            f"DPOExpert: {type(objective).__name__} learns while it trains ({', '.join(sorted(state))}), and "
            f"{len(names)} experts would share what it learns: take another objective, or train one category at a "
            "time and `merge` them"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UserError(
                f"{type(callback).__name__} would average {len(names)} experts with each other: leave it out, or "
                "train one category at a time"
            )
