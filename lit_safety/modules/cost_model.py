"""The safety cost model: how harmful an image is, as one number, trained from labelled preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_safety.core.chance import integers
from lit_safety.core.errors import UserError
from lit_safety.cost_model.degrade import Degradation
from lit_safety.cost_model.feature_cache import FeatureCache, cached_features, doubled, images_of
from lit_safety.cost_model.losses import CostLoss, PairwiseCostLoss
from lit_safety.cost_model.metrics import CollectedCosts, cost_figures, fit_calibration, not_calibrated
from lit_safety.cost_model.network import ClipTower, CostAdapter, CostScorer, Features
from lit_safety.data.datamodule import PreferenceDataModule
from lit_safety.data.protocols import PairData, WithVal, datamodule_of, shards_of
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules.monitoring import FiniteLossGuard
from lit_safety.modules.schedule import ScheduledModule


class CostModel(ScheduledModule):
    """C(x) = adapter(CLIP(x)): above 0 harmful, below 0 safe; the form of SC-DPO's cost model (arXiv 2504.14290),
    reconstructed, since its code and weights are not public.

    The CLIP vision tower is frozen, the adapter is trained on pairs whose images are labelled harmful or safe. After
    every validation a temperature and a bias are fitted to its images, so that sigmoid(C) is a probability.

    Args:
        clip: the frozen CLIP: a folder in transformers' layout, or a hub id.
        features: the adapter's input: `embedding`, the projected image embedding; `pooled`, the class token before the
            projection; `patches`, the class token and the mean of the patch tokens.
        width: hidden units of the adapter.
        dropout: share of hidden units that are set to 0 in training, in [0, 1).
        loss: the loss on a batch of costs.
        degradation: how training images are degraded, so that costs are also right for generated images.
        feature_cache: folder for CLIP features, computed once before the first step and reused while nothing that they
            depend on changes; null: computed in every step.
        optimizer: made from the adapter's parameters.
        lr_scheduler: made from the optimizer, stepped once an optimizer step; null: constant learning rate.
    """

    def __init__(
        self,
        clip: str,
        features: Features = "pooled",
        width: int = 256,
        dropout: float = 0.0,
        loss: CostLoss | None = None,
        degradation: Degradation | None = None,
        feature_cache: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(f"width must be at least 1 and dropout lie in [0, 1), got {width} and {dropout}")
        self.clip = clip
        self.features: Features = features
        self.width = width
        self.dropout = dropout
        self.loss = loss or PairwiseCostLoss()
        self.degradation = degradation or Degradation()
        self.feature_cache = feature_cache
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.collected = CollectedCosts()
        self.finite_loss = FiniteLossGuard()
        self.figures: dict[str, float] = {}
        """The metrics of the last validation or test; after a fit, those of its final weights."""
        self.calibration: dict[str, Any] | None = None
        """What the calibration was fitted on, as `save_cost_model` writes it; None: no validation was run."""
        self._caches: list[FeatureCache] = []
        self._calibrated_at: int | None = None
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    temperature: Tensor
    bias: Tensor
    adapter: CostAdapter
    tower: ClipTower

    # ---- the model -------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if "adapter" in self._modules:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy):
            raise UserError(
                f"`trainer.strategy` is {type(strategy).__name__}: a cost model trains a small adapter, which is never "
                "sharded; use ddp"
            )
        self.tower = ClipTower(self.clip, self.features)
        self.adapter = CostAdapter(self.tower.width, self.width, self.dropout)

    def configure_optimizers(self) -> Any:
        return self.scheduled(self.adapter.parameters())

    def on_fit_start(self) -> None:
        data = datamodule_of(self.trainer)
        if isinstance(data, PairData):
            check_both_labels(data)
        if self.feature_cache is None:
            return
        if not isinstance(data, PreferenceDataModule):
            raise UserError("model.init_args.feature_cache needs `data` to be lit_safety.data.PreferenceDataModule")
        self.tower.to(self.device)
        whole, clean = self.degradation, Degradation(views=0)
        wanted = [("train", whole)] if data.val is None else [("train", whole), ("val", clean)]
        self._caches = [
            cached_features(Path(self.feature_cache), data, part, self.tower, views, self.trainer)
            for part, views in wanted
        ]
        data.skip_images(part for part, _ in wanted)  # from now on no image is decoded

    def scorer(self) -> CostScorer:
        """The current model with its calibration; the adapter is a copy, the tower is shared."""
        adapter = CostAdapter(self.tower.width, self.width)
        adapter.load_state_dict({name: value.detach().cpu() for name, value in self.adapter.state_dict().items()})
        return CostScorer(self.tower, adapter, float(self.temperature), float(self.bias)).to(self.tower.device)

    # ---- the parts of a step ---------------------------------------------------------------------------------

    def clip_features(self, batch: PairBatch, views: Sequence[int], cache: FeatureCache | None) -> Tensor:
        """CLIP features (B, 2, D) of both images, each in the view that ``views`` names for the pair."""
        if cache is not None:
            return cache.get(batch.keys, views).to(self.device, non_blocking=True)
        self.tower.to(self.device)
        images = images_of(batch).flatten(0, 1)
        worn = self.degradation(images, doubled(batch.keys), doubled(views)) if any(views) else images
        return self.tower(worn).unflatten(0, (len(batch), 2))

    def raw_costs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2, D) -> costs (B, 2), not calibrated, and adapted features (B, 2, D), both fp32."""
        adapted = self.adapter.adapted(features.flatten(0, 1))
        costs = self.adapter.cost(adapted)
        return costs.float().unflatten(0, features.shape[:2]), adapted.float().unflatten(0, features.shape[:2])

    def calibrated(self, costs: Tensor) -> Tensor:
        """C = (raw + bias) / temperature, of any shape."""
        return (costs + self.bias) / self.temperature

    # ---- Lightning's hooks -----------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        if self._trainer is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.finite_loss.advance()  # here, after ranks have shared a gradient, so that all of them stop
        views = integers(batch.seeds, "view", len(self.degradation.all)).tolist()
        features = self.clip_features(batch, views, self._caches[0] if self._caches else None)
        losses, parts = self.loss(*self.raw_costs(features), batch.harmful)
        loss = losses.mean()
        self.finite_loss.watch(loss, batch.keys)
        logs = {f"train/{name}": value.detach().mean() for name, value in parts.items()}
        self.log_dict(logs | {"train/loss": loss.detach()}, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.adapter.parameters() if p.grad is not None])
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler skips such a step by itself
            self.finite_loss.watch_gradient(norm)
        self.log("train/grad_norm", norm)

    def on_train_end(self) -> None:
        self.finite_loss.check()
        if self._calibrated_at == self.trainer.global_step:
            self._warn_if_not_calibrated()
            return
        data = datamodule_of(self.trainer)
        if not isinstance(data, WithVal) or data.val is None:
            rank_zero_warn("no validation pairs are given: costs are not calibrated, use only their sign and order")
            return
        self.eval()
        with torch.no_grad():  # the last steps came after the last validation
            for batch in data.val_dataloader():
                self._collect(batch.to(self.device), self._caches[1] if self._caches else None)
        self._calibrate()
        self._measure()
        self._warn_if_not_calibrated()

    def _warn_if_not_calibrated(self) -> None:
        if self.calibration is not None and (reason := self.calibration["not_calibrated"]) is not None:
            rank_zero_warn(f"costs are not calibrated ({reason} in data.init_args.val): use only their order")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._collect(batch, self._caches[1] if len(self._caches) > 1 else None)

    def on_validation_epoch_end(self) -> None:
        self._calibrate()
        self._report("val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._collect(batch, None)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Calibrated costs (B, 2) of chosen and rejected."""
        return self.calibrated(self._costs(batch, None))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check()
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        mine = {name: value.shape for name, value in self.state_dict().items()}
        theirs = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if mine != theirs:
            raise UserError(
                "the checkpoint's weights are not those of this cost model: it was written by a run with another CLIP, "
                "features or width; use that run's config.yaml"
            )

    # ---- evaluation ------------------------------------------------------------------------------------------

    def _costs(self, batch: PairBatch, cache: FeatureCache | None) -> Tensor:
        """Raw costs (B, 2) of the images without degradation.

        Raises:
            UserError: a cost is not finite; names the sample.
        """
        costs, _ = self.raw_costs(self.clip_features(batch, [0] * len(batch), cache))
        finite = costs.isfinite().all(1)
        if not finite.all():
            key = batch.keys[int((~finite).nonzero()[0])]
            raise UserError(f"sample {key}: its cost is not finite; look at it with `shards inspect`")
        return costs

    def _collect(self, batch: PairBatch, cache: FeatureCache | None) -> None:
        self.collected.update(self._costs(batch, cache), batch.harmful, batch.categories)

    def _calibrate(self) -> None:
        costs, harmful, _ = self.collected.compute()
        raw, labels = costs.flatten(), harmful.flatten()
        temperature, bias = fit_calibration(raw, labels)
        known = labels[~labels.isnan()]
        reason = not_calibrated(raw, labels)
        self.calibration = {"images": len(known), "harmful": int(known.sum()), "not_calibrated": reason}
        self.temperature.fill_(temperature)
        self.bias.fill_(bias)
        if reason is None:
            costs = self.calibrated(raw)
            for label, name in ((1, "middle_harmful"), (0, "middle_safe")):
                self.calibration[name] = round(float(costs[labels == label].median()), 6)
        self._calibrated_at = self.trainer.global_step

    def _measure(self) -> dict[str, Tensor]:
        """The metrics of the collected costs, which are then deleted."""
        costs, harmful, about = self.collected.compute()
        self.collected.reset()
        found = cost_figures(self.calibrated(costs), harmful, about)
        self.figures = {name: float(value) for name, value in found.items()} | {"pairs": float(len(costs))}
        return found

    def _report(self, stage: str) -> None:
        figures = {f"{stage}/{name}": value.float() for name, value in self._measure().items()}
        self.log_dict(figures, sync_dist=True)


def check_both_labels(data: PairData) -> None:
    """Refuse training pairs from which a cost model learns nothing, as far as their manifest says it.

    Raises:
        UserError: no image is labelled harmful, or no image is labelled safe; names the folder.
    """
    labels = data.labels("train")
    given = ", ".join(shards_of(data).get("train", []))
    for label, other in (("harmful", "safe"), ("safe", "harmful")):
        if labels and not any(count and label in name.split(">") for name, count in labels.items()):
            only = f"its known labels are all {other}" if any(other in name for name in labels) else "no label is known"
            raise UserError(
                f"data.init_args.train {given}: no image is labelled {label} ({only}), so a cost model learns nothing "
                "from it; give pairs with images of both labels"
            )
