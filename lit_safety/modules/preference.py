"""The LightningModule that every preference method subclasses.

A step is: conditioning -> errors of policy and reference -> loss. Override one of `conditioning`, `errors`, `loss`
and `configure_policy`; the rest (shared chance, fp32 errors, logging, checkpoints of trainable weights) stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from PIL.Image import Image
from torch import Tensor
from torch.optim import Optimizer

from lit_safety.adapters.lora import LoRA, adapter_layers, adapters_off
from lit_safety.backbones import Backbone, Conditioning, load_backbone
from lit_safety.backbones.load import pipeline_class_name
from lit_safety.data.batch import PairBatch
from lit_safety.data.chance import normal, uniform
from lit_safety.errors import UserError
from lit_safety.modules.label_checks import check_labels
from lit_safety.modules.monitoring import FiniteLossGuard, TimestepBins
from lit_safety.objectives import (
    Objective,
    ObjectiveOutput,
    PairErrors,
    PairLabels,
    prediction_error,
    residual_overlap,
)

#: The name the policy's adapter carries inside PEFT.
POLICY = "policy"


@dataclass
class Drawing:
    """How a module draws: DDIM-style sampling by the pipeline's own scheduler.

    Args:
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
    """

    steps: int = 20
    guidance: float = 3.0


class PreferenceModule(LightningModule):
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
    ) -> None:
        super().__init__()
        if not 0.0 <= prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout must lie in [0, 1), got {prompt_dropout}")
        self.pretrained = pretrained
        self.objective = objective
        self.lora = lora or LoRA()
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.prompt_dropout = prompt_dropout
        self.drawing = drawing or Drawing()
        self.validation_errors = TimestepBins(timestep_bins)
        self.finite_loss = FiniteLossGuard()
        # A checkpoint holds what is trained; the frozen model comes from `pretrained`.
        self.strict_loading = False

    # ---- the model -------------------------------------------------------------------------------------------

    backbone: Backbone

    def setup(self, stage: str) -> None:
        # Reads a few hundred bytes: a wrong path is reported before any weight is loaded.
        pipeline_class_name(self.pretrained)
        if str(self.trainer.precision) in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise UserError(
                f"`trainer.precision: {self.trainer.precision}` would round what is trained, and small updates with "
                "it: use bf16-mixed, or 32-true"
            )

    def configure_model(self) -> None:
        if "backbone" in self._modules:
            return
        self.backbone = load_backbone(self.pretrained)
        self.configure_policy()

    def configure_policy(self) -> None:
        """Make something of ``self.backbone.denoiser`` trainable; override to train something else than a LoRA."""
        self.lora.attach(self.backbone.denoiser, POLICY)
        self._layers = adapter_layers(self.backbone.denoiser)

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and parameters of what is trained."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for _, p in self.trainable_parameters()])
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ---- what a researcher overrides -------------------------------------------------------------------------

    def conditioning(self, batch: PairBatch) -> Conditioning:
        """The text encoders' outputs for the batch's prompts, B rows, some prompts dropped in training."""
        prompts: Sequence[str] = batch.prompts
        if self.training and self.prompt_dropout > 0:
            prompts = [
                "" if uniform(seed, "prompt-dropout") < self.prompt_dropout else prompt
                for seed, prompt in zip(batch.seeds, batch.prompts, strict=True)
            ]
        with torch.no_grad():
            return self.backbone.encode_text(prompts)

    def errors(self, batch: PairBatch) -> PairErrors:
        """Denoising errors of policy and reference on chosen and rejected, at a shared timestep and noise.

        Chosen and rejected go through the network in one pass of 2B. The reference is the same network with its
        adapters off, run first so that its activations are gone when the policy's are kept for the backward pass.
        """
        noisy, timesteps, target, conditioning = self.noised(batch)
        with torch.no_grad(), adapters_off(self._layers):
            reference = self.backbone.predict(noisy, timesteps, conditioning)
        policy = self.backbone.predict(noisy, timesteps, conditioning)
        policy_chosen, policy_rejected = prediction_error(policy, target).chunk(2)
        reference_chosen, reference_rejected = prediction_error(reference, target).chunk(2)
        size = len(batch)
        drift = prediction_error(policy[:size], reference[:size]) if self.objective.needs_drift else None
        overlap = residual_overlap(policy, target) if self.objective.needs_overlap else None
        return PairErrors(policy_chosen, policy_rejected, reference_chosen, reference_rejected, drift, overlap)

    def loss(self, errors: PairErrors, batch: PairBatch) -> ObjectiveOutput:
        """Loss of each pair (B,) and what to log."""
        return self.objective(errors, self.labels(batch))

    # ---- the parts of a step ---------------------------------------------------------------------------------

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
        fractions = torch.tensor([uniform(seed, "timestep") for seed in batch.seeds], dtype=torch.float64)
        return self.backbone.timesteps(fractions).to(self.device)

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """x_t (2B, C, h, w), timesteps (2B,), targets (2B, C, h, w), conditioning (2B rows): chosen, then rejected."""
        shape = self.backbone.latent_shape(batch.chosen)
        noise = self.gaussian(batch, "noise", shape).repeat(2, 1, 1, 1)
        with torch.no_grad():
            latents = self.backbone.encode_images(
                torch.cat([batch.chosen, batch.rejected]),
                self.gaussian(batch, "latent", shape).repeat(2, 1, 1, 1),
            )
            timesteps = self.timesteps(batch).repeat(2)
            noisy = self.backbone.add_noise(latents, noise, timesteps)
            target = self.backbone.target(latents, noise, timesteps)
        conditioning = {name: torch.cat([rows, rows]) for name, rows in self.conditioning(batch).items()}
        return noisy, timesteps, target, conditioning

    def gaussian(self, batch: PairBatch, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape), each row a pure function of its sample's seed and ``purpose``."""
        return normal(batch.seeds, purpose, shape).to(self.device)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """One picture a prompt by the policy, each from the initial noise of its own seed."""
        drawn = self.backbone.pipeline()(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=self.drawing.steps,
            guidance_scale=self.drawing.guidance,
        )
        return list(drawn.images)

    # ---- Lightning's hooks -----------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        self.finite_loss.check()
        output = self.loss(self.errors(batch), batch)
        loss = output.loss.mean()
        self.finite_loss.watch(loss, batch.keys)
        logs = {name: values.mean() for name, values in output.logs.items()}
        self.log_dict(logs, batch_size=len(batch))
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch))
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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradients = [p.grad for _, p in self.trainable_parameters() if p.grad is not None]
        if gradients:  # DeepSpeed keeps gradients to itself
            norm = torch.nn.utils.get_total_norm(gradients)
            self.finite_loss.watch_gradient(norm)
            self.log("grad_norm", norm)

    def on_train_end(self) -> None:
        self.finite_loss.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check()
        trained = {name for name, _ in self.trainable_parameters()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["objective"] = self.objective.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        try:
            self.objective.load_state_dict(checkpoint.get("objective", {}))
        except ValueError as error:
            raise UserError(f"{error}: resume with the config.yaml of the run that wrote it") from error
        trained = {name: parameter.shape for name, parameter in self.trainable_parameters()}
        loaded = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        differing = sorted(name for name in trained.keys() | loaded.keys() if trained.get(name) != loaded.get(name))
        if differing:
            raise UserError(
                f"the checkpoint's weights are not those trained here: {len(differing)} differ (first: "
                f"{differing[0]}); it was written by a run with another model, rank or target_modules: resume with "
                "that run's config.yaml"
            )
