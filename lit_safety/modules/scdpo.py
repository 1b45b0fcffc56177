"""SC-DPO: preference optimisation whose margin and focus depend on the safety costs of the two images."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lit_safety.adapters.lora import adapter_layers
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import Mirroring, datamodule_of
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules.checks import check_labels, reference_cached
from lit_safety.modules.preference import PreferenceModule
from lit_safety.objectives.objective import Objective, PairLabels
from lit_safety.objectives.safety_constrained import SafetyConstrainedDPO

if TYPE_CHECKING:
    from lit_safety.cost_model.network import CostScorer
    from lit_safety.modules.frozen import FrozenCopy


class SCDPO(PreferenceModule):
    """SC-DPO, as reconstructed from the abstract of arXiv 2504.14290 (see `objectives/safety_constrained.py`).

    Costs come with the pairs (`cost` in a shard's metadata). Pairs without costs are scored once by `cost_model`.

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        objective: the loss on a batch of pairs; SC-DPO's own by default.
        policy: `lora` trains an adapter, and the reference is the network without it; `full` trains every weight of the
            denoiser and holds a frozen copy as the reference, or no copy if there is a reference cache. `full` writes a
            whole pipeline instead of an adapter.
        cost_model: folder of the cost model for pairs without costs; null: such pairs are refused.
        label_costs: pairs without costs get them from their labels: 1 for a harmful image, -1 for a safe one. If a
            label is unknown and `order` is safety, the chosen image counts as safe and the rejected one as harmful.

    Raises:
        ValueError: both `cost_model` and `label_costs` are given: their costs have different units.
    """

    def __init__(
        self,
        pretrained: str,
        objective: Objective | None = None,
        policy: Literal["lora", "full"] = "lora",
        cost_model: str | None = None,
        label_costs: bool = False,
        **settings: Any,
    ) -> None:
        if label_costs and cost_model is not None:
            raise ValueError("label_costs and cost_model both give costs to pairs without costs: set only one of them")
        super().__init__(pretrained, objective or SafetyConstrainedDPO(), **settings)
        backbone = self.backbone_settings
        if policy == "full" and backbone is not None and backbone.denoiser_quantization is not None:
            raise UserError(
                "`model.init_args.policy: full` trains the weights that `backbone.init_args.denoiser_quantization: "
                f"{backbone.denoiser_quantization}` would store in fewer bits: set policy to lora, or leave the "
                "quantization out"
            )
        self.policy = policy
        self.label_costs = label_costs
        self.fills_costs = label_costs or cost_model is not None
        self.cost_model = cost_model
        self._frozen: FrozenCopy | None = None
        self._reference_cached = False
        self._scorer: CostScorer | None = None
        # train, val, test -> key -> costs: a key can name different pairs in different sets.
        self._costs: defaultdict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._costs.clear()  # the same module can be used with another datamodule
        self._reference_cached = reference_cached(datamodule_of(self.trainer), stage)
        if self.policy == "full":
            from lit_safety.modules.frozen import check_strategy

            check_strategy(self.trainer, self._reference_cached)
        # Kept in a plain object and not as a submodule, so that checkpoints do not contain the frozen CLIP.
        if self.cost_model and self._scorer is None:
            from lit_safety.cost_model.files import load_cost_model

            self._scorer = load_cost_model(self.cost_model)

    # ---- the policy

    def configure_policy(self) -> None:
        if self.policy == "lora":
            super().configure_policy()
            return
        from lit_safety.modules.frozen import FrozenCopy, make_all_trainable

        self.backbone.check_files()  # because the whole pipeline is written at the end
        if not self._reference_cached:
            self._frozen = FrozenCopy(self.backbone)
        make_all_trainable(self.backbone.denoiser)
        self._layers = adapter_layers(self.backbone.denoiser)

    def read_export(self, path: Path) -> dict[str, Tensor]:
        if self.policy == "lora":
            return super().read_export(path)
        from lit_safety.adapters.start_from import read_denoiser

        weights = read_denoiser(path, self.backbone.DENOISER)
        return {f"backbone.denoiser.{name}": value for name, value in weights.items()}

    def networks(self) -> list[nn.Module]:
        return super().networks() + ([] if self._frozen is None else [self._frozen.denoiser])

    @property
    def has_reference(self) -> bool:
        """Without a frozen copy, the denoiser itself is the reference as long as no update has changed it."""
        fresh = self.global_step == 0 and self.start_from is None
        return self.policy == "lora" or self._frozen is not None or fresh

    def reference(self) -> AbstractContextManager[None]:
        if self._frozen is not None:
            return self._frozen.in_place()
        if not self.has_reference:
            raise UserError(
                "some pairs have no reference cache, and there is no frozen copy: make a reference cache of all shards"
            )
        return super().reference()

    def exports(self) -> list[str]:
        """`pipeline` if the whole denoiser is trained."""
        return super().exports() if self.policy == "lora" else ["pipeline"]

    def save_export(self, folder: Path) -> None:
        if self.policy == "lora":
            super().save_export(folder)
        else:
            self.backbone.pipeline().save_pretrained(folder)

    def export_settings(self, export: str) -> dict[str, Any]:
        return super().export_settings(export) if self.policy == "lora" else {"policy": "full"}

    # ---- costs

    def labels(self, batch: PairBatch) -> PairLabels:
        """The labels, with missing costs filled in.

        Raises:
            UserError: mirrored pairs lack costs: a cost would depend on whether a pair was mirrored when it was first
                scored.
            UserError: pairs have no costs, and neither `cost_model` nor `label_costs` gives them.
        """
        if self.label_costs and self.objective.needs_cost and not all(batch.has_cost):
            from lit_safety.cost_model.fill import costs_of_labels

            batch = costs_of_labels(batch)
        if self._scorer is None:
            check_labels(self.objective, batch, cost_model=True)
        elif self.objective.needs_cost and not all(batch.has_cost):
            data = datamodule_of(self._trainer)
            if isinstance(data, Mirroring) and data.flip:
                raise UserError(
                    f"sample {batch.keys[batch.has_cost.index(False)]} has no cost, but `data.init_args.flip` mirrors "
                    "pairs: write costs first with `shards score`"
                )
            from lit_safety.cost_model.fill import fill_costs

            batch = fill_costs(batch, self._scorer.to(self.device), self._costs[self._set])
        return super().labels(batch)

    @property
    def _set(self) -> str:
        """The set of shards that is being read: train, val or test."""
        stage = None if self._trainer is None else self._trainer.state.stage
        return "train" if stage is None else str(stage.dataloader_prefix)
