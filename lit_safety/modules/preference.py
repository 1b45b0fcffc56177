"""The LightningModule that every preference method subclasses.

A step is: conditioning -> errors of policy and reference -> loss. Override one of `conditioning`, `errors`, `loss`
and `configure_policy` (in `policy.py`, as all that is about the network itself); the rest (shared chance, fp32 errors,
logging, checkpoints of trainable weights) stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from PIL.Image import Image
from torch import Tensor

from lit_safety.adapters.lora import LoRA
from lit_safety.backbones import Conditioning
from lit_safety.backbones.pipeline_index import pipeline_class_name
from lit_safety.backbones.text import TruncatedPrompts, encode_alike
from lit_safety.data.batch import PairBatch
from lit_safety.data.chance import LATENT, NOISE, TIMESTEP, normal, uniform
from lit_safety.errors import UserError
from lit_safety.modules.cache_check import check_caches, check_references
from lit_safety.modules.label_checks import check_labels, check_orders
from lit_safety.modules.monitoring import TimestepBins
from lit_safety.modules.outer_step import warn_without_outer_step
from lit_safety.modules.policy import POLICY, Drawing, Policy
from lit_safety.modules.reference import ReferencePass, cached_pass
from lit_safety.modules.speed import Speed
from lit_safety.modules.start_margin import check_start
from lit_safety.modules.strategy_checks import check_resume, check_weights, family
from lit_safety.modules.watched_gradient import WatchedGradient
from lit_safety.objectives import (
    Objective,
    ObjectiveOutput,
    PairErrors,
    PairLabels,
    prediction_error,
    residual_overlap,
)

__all__ = ["POLICY", "Drawing", "PreferenceModule"]


class PreferenceModule(Policy, WatchedGradient):
    """Preference optimisation of a text-to-image model against its own frozen self.

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        objective: the loss on a batch of pairs.
        lora: the adapter that is trained.
        optimizer: made from the trainable parameters.
        lr_scheduler: made from the optimizer, stepped once an optimizer step; null: constant learning rate.
        prompt_dropout: probability with which a pair is trained on the empty prompt, in [0, 1).
        timestep_bins: into how many equal bins of the noise schedule validation errors are sorted.
        drawing: how pictures are drawn at validation and by `predict`.
        speed: how a step is computed: compiled, with less memory, or on a part of the pairs.
        start_from: an export of another run of the same method (its adapter's folder), or a checkpoint, also one of
            another strategy or number of GPUs: training begins with its weights, as step 0, against the same reference.
    """

    def __init__(
        self,
        pretrained: str,
        objective: Objective,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        prompt_dropout: float = 0.0,
        timestep_bins: int = 4,
        drawing: Drawing | None = None,
        speed: Speed | None = None,
        start_from: str | None = None,
    ) -> None:
        super().__init__(pretrained, lora, optimizer, lr_scheduler, drawing, speed, start_from)
        if not 0.0 <= prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout must lie in [0, 1), got {prompt_dropout}")
        self.objective = objective
        self.prompt_dropout = prompt_dropout
        self.validation_errors = TimestepBins(timestep_bins)
        self.truncated = TruncatedPrompts()
        # A checkpoint holds what is trained; the frozen model comes from `pretrained`.
        self.strict_loading = False

    # ---- before anything is loaded ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        # Reads a few hundred bytes: a wrong path is reported before any weight is loaded.
        pipeline_class_name(self.pretrained)
        data = getattr(self.trainer, "datamodule", None)
        check_caches(data, self.pretrained, stage)
        check_references(data, self.pretrained, stage, self.objective, self.drops_prompts)
        check_orders(self.objective, data, stage)
        if stage == "fit":
            warn_without_outer_step(self.objective, self.trainer)
        check_resume(self.trainer)
        if str(self.trainer.precision) in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise UserError(
                f"`trainer.precision: {self.trainer.precision}` would round what is trained, and small updates with "
                "it: use bf16-mixed, or 32-true"
            )

    # ---- what a researcher overrides -------------------------------------------------------------------------

    def conditioning(self, batch: PairBatch) -> Conditioning:
        """The text encoders' outputs for the batch's prompts, B rows, some prompts dropped in training.

        They come with the batch where a cache holds them; else they are encoded here.
        """
        dropped = self.dropped_prompts(batch)
        if batch.conditioning is None or batch.empty is None:
            return self.encode_text(["" if no else prompt for no, prompt in zip(dropped, batch.prompts, strict=True)])
        if not any(dropped):
            return batch.conditioning
        without = torch.tensor(dropped).to(self.device, non_blocking=True)
        return {
            name: torch.where(without.view(-1, *[1] * (rows.ndim - 1)), batch.empty[name], rows)
            for name, rows in batch.conditioning.items()
        }

    def errors(self, batch: PairBatch) -> PairErrors:
        """Denoising errors of policy and reference on chosen and rejected, at a shared timestep and noise.

        Chosen and rejected go through the network in one pass of 2B. The reference is the same network with its
        adapters off, run first so that its activations are gone when the policy's are kept for the backward pass; or
        its errors come with the batch out of a reference cache.
        """
        batch = self.ordered(batch)
        noisy, timesteps, target, conditioning = self.noised(batch)
        reference = self.reference_pass(batch, noisy, timesteps, target, conditioning)
        policy = self.backbone.predict(noisy, timesteps, conditioning)
        policy_chosen, policy_rejected = prediction_error(policy, target).chunk(2)
        drift = None
        if self.objective.needs_drift and reference.prediction is not None:
            drift = prediction_error(policy[: len(batch)], reference.prediction)
            drift = drift if batch.reference is None else drift * batch.clean  # of others a cache holds nothing
        overlap = residual_overlap(policy, target) if self.objective.needs_overlap else None
        return PairErrors(policy_chosen, policy_rejected, reference.chosen, reference.rejected, drift, overlap)

    def loss(self, errors: PairErrors, batch: PairBatch) -> ObjectiveOutput:
        """Loss of each pair (B,) and what to log."""
        return self.objective(errors, self.labels(batch))

    # ---- the parts of a step ---------------------------------------------------------------------------------

    def ordered(self, batch: PairBatch) -> PairBatch:
        """The batch with its pairs in the order they are trained in; doing it twice changes nothing more."""
        return batch

    def reference_pass(
        self, batch: PairBatch, noisy: Tensor, timesteps: Tensor, target: Tensor, conditioning: Conditioning
    ) -> ReferencePass:
        """The reference's errors on the batch, out of its cache or by a pass of what `noised` gave."""
        if batch.reference is not None:
            return cached_pass(batch, self.dropped_prompts(batch))
        with torch.no_grad(), self.reference():
            prediction = self.backbone.predict(noisy, timesteps, conditioning)
        chosen, rejected = prediction_error(prediction, target).chunk(2)
        return ReferencePass(chosen, rejected, prediction[: len(batch)])

    @property
    def drops_prompts(self) -> bool:
        """Whether `dropped_prompts` may name any in training."""
        return self.prompt_dropout > 0

    def dropped_prompts(self, batch: PairBatch) -> list[bool]:
        """Which pairs are trained on the empty prompt, a pure function of the samples' seeds."""
        if not self.training or self.prompt_dropout == 0:
            return [False] * len(batch)
        return [uniform(seed, "prompt-dropout") < self.prompt_dropout for seed in batch.seeds]

    def labels(self, batch: PairBatch) -> PairLabels:
        """Clean prompt or not (B,), harmful labels (B, 2), costs (B, 2), scores (B, 2), on the batch's device.

        Raises:
            UserError: if a pair lacks what the objective needs.
        """
        check_labels(self.objective, batch)
        return PairLabels(clean=batch.clean, harmful=batch.harmful, cost=batch.cost, score=batch.score)

    def timesteps(self, batch: PairBatch) -> Tensor:
        """One training timestep a pair (B,), a pure function of the samples' seeds."""
        # In double precision: rounded to single, a number just below 1 would be 1 and lie outside the schedule.
        fractions = torch.tensor([uniform(seed, TIMESTEP) for seed in batch.noise_seeds], dtype=torch.float64)
        return self.backbone.timesteps(fractions).to(self.device, non_blocking=True)

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """x_t (2B, C, h, w), timesteps (2B,), targets (2B, C, h, w), conditioning (2B rows): chosen, then rejected."""
        with torch.no_grad():
            posterior = self.posterior(batch)
            shape = tuple(posterior.shape[2:])
            noise = self.gaussian(batch, NOISE, shape).repeat(2, 1, 1, 1)
            latents = self.backbone.latents(posterior, self.gaussian(batch, LATENT, shape).repeat(2, 1, 1, 1))
            timesteps = self.timesteps(batch).repeat(2)
            noisy = self.backbone.add_noise(latents, noise, timesteps)
            target = self.backbone.target(latents, noise, timesteps)
        conditioning = {name: torch.cat([rows, rows]) for name, rows in self.conditioning(batch).items()}
        if batch.crops is not None:
            conditioning |= self.backbone.crop_conditioning(batch.crops.transpose(0, 1).flatten(0, 1))
        return noisy, timesteps, target, conditioning

    def posterior(self, batch: PairBatch) -> Tensor:
        """Mean and standard deviation of the images' latents (2B, 2, C, h, w), chosen, then rejected."""
        if batch.latents is not None:
            return batch.latents.transpose(0, 1).flatten(0, 1)
        if batch.chosen is None or batch.rejected is None:
            raise ValueError(f"samples {', '.join(batch.keys)} have neither images nor latents")
        return self.backbone.posterior(torch.cat([batch.chosen, batch.rejected]))

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """The text encoders' outputs for B prompts, B rows; those that are too long are counted."""
        self.truncated.look(self.backbone, prompts)
        with torch.no_grad():
            return encode_alike(self.backbone, prompts)

    def gaussian(self, batch: PairBatch, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape), each row a pure function of its noise seed and ``purpose``."""
        drawn = batch.draws.get(purpose)
        if drawn is not None and tuple(drawn.shape[1:]) == shape:
            return drawn
        return normal(batch.noise_seeds, purpose, shape).to(self.device, non_blocking=True)

    # ---- Lightning's hooks -----------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        if self._trainer is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.finite_loss.advance()  # where ranks have shared a gradient since, so that all of them stop
        if self.speed.selective is not None:
            loss, output, errors = self.speed.selective.step(self, batch)
        else:
            errors = self.errors(batch)
            output = self.loss(errors, batch)
            loss = output.loss.mean()
        if self._trainer is not None and self.global_step == 0 and batch_idx == 0:
            check_start(self, batch, errors)
        self.finite_loss.watch(loss, batch.keys)
        logs = {name: values.mean() for name, values in output.logs.items()}
        self.log_dict(logs, batch_size=len(batch))
        self.log("loss", output.loss.detach().mean(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[Image]:
        return self.draw(batch.prompts, batch.seeds)

    def _evaluation_step(self, batch: PairBatch, stage: str) -> None:
        # Seeds of evaluation batches do not change with the epoch: same pairs, timesteps and noise every time.
        errors = self.errors(batch)
        output = self.loss(errors, batch)
        logs = {f"{stage}/{name}": values.mean() for name, values in output.logs.items()}
        logs[f"{stage}/loss"] = output.loss.mean()
        self.log_dict(logs, batch_size=len(batch), sync_dist=True, on_epoch=True)
        fractions = self.backbone.timestep_fraction(self.timesteps(batch))
        self.validation_errors.update(fractions, errors.policy_chosen, errors.policy_rejected)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{k}": v for k, v in self.validation_errors.compute().items()}, sync_dist=True)
        self.validation_errors.reset()

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{k}": v for k, v in self.validation_errors.compute().items()}, sync_dist=True)
        self.validation_errors.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check()
        trained = {name for name, _ in self.trainable_parameters()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["objective"] = self.objective.state_dict()
        if self._trainer is not None:
            checkpoint["strategy"] = family(self.trainer.strategy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        try:
            self.objective.load_state_dict(checkpoint.get("objective", {}))
        except ValueError as error:
            raise UserError(f"{error}: resume with the config.yaml of the run that wrote it") from error
        if "state_dict" not in checkpoint:  # DeepSpeed has put the weights into its engine by itself
            return
        check_weights(dict(self.trainable_parameters()), checkpoint["state_dict"], "the checkpoint")
