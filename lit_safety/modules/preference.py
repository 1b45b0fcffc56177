"""The LightningModule that every preference method subclasses.

A step is: conditioning -> errors of policy and reference -> loss. Override one of `conditioning`, `errors`, `loss` and
`configure_policy`; you keep the rest (shared random numbers, fp32 errors, logging, checkpoints of trainable weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from PIL.Image import Image
from torch import Tensor
from torch.optim import Optimizer

from lit_safety.adapters.gathered import master_weights, replaced, unpartitioned, whole
from lit_safety.adapters.lora import LoRA, adapter_layers, adapters_off
from lit_safety.backbones.settings import BackboneSettings
from lit_safety.core.chance import LATENT, TIMESTEP, normal, uniform
from lit_safety.core.errors import UserError
from lit_safety.data.protocols import GroupData, datamodule_of
from lit_safety.data.reading.batch import PairBatch, to_floats
from lit_safety.modules.checks import (
    check_caches,
    check_first_pairs,
    check_labels,
    check_orders,
    check_references,
    say_idle_anchor,
    warn_if_not_moved,
)
from lit_safety.modules.monitoring import FiniteLossGuard, TimestepBins, TruncatedPrompts
from lit_safety.modules.reference import ReferencePass, cached_pass
from lit_safety.modules.schedule import ScheduledModule
from lit_safety.modules.speed import Speed
from lit_safety.modules.stability import PlainSteps, Stability
from lit_safety.modules.step_parts import Adversary, Anchors, Retain
from lit_safety.modules.strategies import (
    as_on_rank_0,
    check_resume,
    check_weights,
    drop_frozen,
    family,
    shard,
    under_fsdp,
)
from lit_safety.objectives.objective import (
    GroupLabels,
    Objective,
    ObjectiveOutput,
    PairErrors,
    PairLabels,
    masked,
    prediction_error,
    residual_overlap,
)

# Code that reads models and adapters is imported when a run needs it, so that `--help` and a start are fast.
if TYPE_CHECKING:
    from lit_safety.adapters.layer_names import AdaptableLayer
    from lit_safety.backbones.backbone import Backbone, Conditioning
    from lit_safety.modules.attacked_prediction import Attack

__all__ = ["POLICY", "Drawing", "PreferenceModule"]

#: The name of the policy's adapter inside PEFT.
POLICY = "policy"


@dataclass
class Drawing:
    """How a module draws: deterministic sampling with the pipeline's own scheduler.

    Args:
        steps: denoising steps.
        guidance: scale of classifier-free guidance, 1 for none; for models with embedded guidance the scale that is
            given to them.
        resolution: side in pixels; null: the pipeline's own, which can be wrong for a tiny model.
    """

    steps: int = 20
    guidance: float = 3.0
    resolution: int | None = None


class PreferenceModule(ScheduledModule):
    """Preference optimisation of a text-to-image model against a frozen copy of itself.

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        objective: the loss on a batch of pairs.
        lora: the adapter that is trained.
        optimizer: made from the trainable parameters.
        lr_scheduler: made from the optimizer, stepped once an optimizer step; null: constant learning rate.
        prompt_dropout: probability that a pair is trained on the empty prompt, in [0, 1).
        timestep_bins: into how many equal bins of the noise schedule validation errors are sorted.
        drawing: how images are drawn at validation and by `predict`.
        speed: how a step is computed: compiled, with less memory, or on a part of the pairs.
        anchors: harmless prompts without images on which the policy is held to the reference; null: none.
        stability: settings that keep the chosen images' errors from rising, and that say what the reference is.
        backbone: settings of the model's family, such as its training timesteps: one of the settings classes in
            `lit_safety.backbones`; null: the family's defaults.
        start_from: an export of another run of the same method (its adapter's folder), or a checkpoint, also from
            another strategy or number of GPUs: training begins at step 0 with its weights, against the same reference.
        adversary: attacks harmful pairs during training; one, or a list of several that attack together: the classes
            `TextAdversary` and `HiddenAdversary` of `lit_safety.modules`; null: no attack.
        retain: `ProjectRetain`: where the gradient of the anchor terms conflicts with that of the rest, its conflicting
            part is removed; null: the two are added.
    """

    backbone: Backbone
    fills_costs: bool | None = None
    """Whether the module gives costs to pairs without costs; None: it has no such option."""

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
        anchors: Anchors | None = None,
        start_from: str | None = None,
        backbone: BackboneSettings | None = None,
        stability: Stability | None = None,
        adversary: Adversary | list[Adversary] | None = None,
        retain: Retain | None = None,
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
        self.speed = speed or Speed()
        self.anchors = anchors
        self.start_from = start_from
        self.backbone_settings = backbone
        self.steps = PlainSteps()
        if stability is not None and not stability.plain:
            from lit_safety.modules.steadied import SteadiedSteps

            self.steps = SteadiedSteps(stability)
        self.attack: Attack | None = None
        if adversary:
            from lit_safety.modules.attacked_prediction import Attack

            self.attack = Attack(adversary, self.speed.selective is not None)
        self.retain: Any = None
        if retain is not None:
            self.retain = retain
            anchored = objective.anchor_weight > 0 or anchors is not None
            self.retain.check_settings(anchored, self.speed.selective is not None)
        self.finite_loss = FiniteLossGuard()
        self._gradient_norm: Tensor | None = None
        self.last_means: dict[str, Tensor] = {}
        """The metrics of the last training batch: means over its pairs on this rank, still on the device."""
        self.validation_errors = TimestepBins(timestep_bins)
        self.truncated = TruncatedPrompts()
        # A checkpoint holds only the trained weights; the frozen model comes from `pretrained`.
        self.strict_loading = False

    # ---- before anything is loaded ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        from lit_safety.backbones.pipeline_index import pipeline_class_name

        # Reads a few hundred bytes: a wrong path is reported before any weight is loaded.
        pipeline_class_name(self.pretrained)
        data = datamodule_of(self.trainer)
        check_caches(data, self.pretrained, stage)
        check_references(data, self.pretrained, stage, self.objective, self.drops_prompts, self.backbone_settings)
        check_orders(self.objective, data, stage)
        if self.objective.needs_groups:
            from lit_safety.modules.groups import check_groups

            parts = ("errors", "noised", "ordered", "reference_pass")
            own = any(getattr(type(self), part) is not getattr(PreferenceModule, part) for part in parts)
            of_pairs = self.steps.of_pairs()
            if self.attack is not None:
                of_pairs.append("adversary")
            if self.speed.selective is not None:
                of_pairs.append("speed.selective")
            check_groups(self.objective, type(self).__name__ if own else None, of_pairs)
        if isinstance(data, GroupData):  # other datamodules give pairs, which count as groups of two
            data.read_groups(self.objective.needs_groups)
        check_first_pairs(self.objective, data, stage, self.fills_costs)
        if stage == "fit":
            self.steps.check(self, data)
            if self.anchors_clean_alone:
                say_idle_anchor(self.objective, data)
            warn_if_not_moved(self.objective, self.trainer.callbacks)  # type: ignore[attr-defined]
        self.check_trainer()

    def check_trainer(self) -> None:
        """Whether the trainer's checkpoint, strategy and precision can be trained with.

        Raises:
            UserError: they cannot.
        """
        check_resume(self.trainer)
        if str(self.trainer.precision) in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise UserError(
                f"`trainer.precision: {self.trainer.precision}` would round the trained weights and lose small "
                "updates: use bf16-mixed, or 32-true"
            )

    # ---- what a researcher overrides --------------------------------------------------------------------------

    def configure_policy(self) -> None:
        """Make a part of ``self.backbone.denoiser`` trainable; override it to train something else than a LoRA."""
        self.lora.attach(self.backbone.denoiser, POLICY)
        self._layers = adapter_layers(self.backbone.denoiser)

    def conditioning(self, batch: PairBatch) -> Conditioning:
        """The text encoders' outputs for the batch's prompts, B rows; in training some prompts are dropped.

        They come with the batch if a cache holds them. Otherwise they are encoded here.
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

        Chosen and rejected go through the network in one pass of 2B rows. The reference is the same network with its
        adapters off. It runs first, so that its activations are freed before the policy's are kept for the backward
        pass. With a reference cache its errors come with the batch.

        Args:
            batch: the batch as `ordered` returns it.
        """
        if batch.groups is not None:
            from lit_safety.modules.groups import group_errors

            return group_errors(self, batch, batch.groups)
        noisy, timesteps, target, conditioning = self.noised(batch)
        reference = self.reference_pass(batch, noisy, timesteps, target, conditioning)
        if self.attack is None:
            policy = self.backbone.predict(noisy, timesteps, conditioning)
        else:
            policy = self.attack.predict(self, batch, (noisy, timesteps, target, conditioning))
        policy_chosen, policy_rejected = self.image_errors(batch, policy, target).chunk(2)
        drift = None
        if self.objective.reads_drift and batch.reference is not None:  # a cache holds drift only for clean prompts
            raise UserError(f"{type(self.objective).__name__} cannot use a reference cache, but the batch has one")
        if self.objective.needs_drift and reference.prediction is not None:
            drift = prediction_error(policy[: len(batch)], reference.prediction)
            drift = drift if batch.reference is None else drift * batch.clean  # a cache holds nothing for other prompts
        overlap = None
        if self.objective.needs_overlap:
            overlap = residual_overlap(*self.compared(batch, policy, target))
        return PairErrors(policy_chosen, policy_rejected, reference.chosen, reference.rejected, drift, overlap)

    def loss(self, errors: PairErrors, batch: PairBatch) -> ObjectiveOutput:
        """Loss of each pair (B,) and what to log."""
        output = self.objective(self.steps.spared(errors), self.labels(batch))
        return self.steps.guarded(errors, output, self.objective.beta)

    # ---- the network: load it, add an adapter, shard it for the strategy --------------------------------------

    def configure_model(self) -> None:
        if "backbone" in self._modules:
            return
        if self._trainer is None or not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self._load()
            self.configure_policy()
            self._check_assistant()
            self._start()
            self.speed.apply(self.backbone.denoiser)
            dtype = self._frozen_dtype()
            if under_fsdp(self._trainer):  # it needs one precision in everything that it shards together
                self._shard()
            elif self._trainer is not None and self.trainer.precision == "bf16-mixed":
                dtype = torch.bfloat16
            quantized = self.backbone.settings.denoiser_quantization is not None
            if dtype != torch.float32 or quantized:
                from lit_safety.backbones.lowered import leave_quantized, lower_frozen

                for network in self.networks() if dtype != torch.float32 else ():
                    lower_frozen(network, dtype)
                if quantized:
                    leave_quantized(self)
            return
        with unpartitioned():  # diffusers can load only into whole parameters
            self._load()
            self._check_assistant()
            self._frozen_dtype()
            # DeepSpeed sends weights as bytes, which does not work with weights in channels-last.
            whole: Any = self.backbone
            whole.to(memory_format=torch.contiguous_format)
            self.configure_policy()
            self._start()
            self.speed.apply(self.backbone.denoiser)

    def _load(self) -> None:
        from lit_safety.backbones.load import load_backbone

        self.backbone = load_backbone(self.pretrained, settings=self.backbone_settings)
        if self.lora.target_modules is not None and self.lora.blocks is None:
            left, usual = self.backbone.left_out(self.lora.target_modules)
            if left:
                rank_zero_warn(
                    f"`lora.target_modules` leaves out {len(left)} of the {usual} layers that are adapted by default "
                    f"in a {type(self.backbone).__name__}, such as {left[0]}: harm may remain. null adapts all of them"
                )
        self.lora = self.lora.with_targets(self.backbone.lora_targets())

    def _frozen_dtype(self) -> torch.dtype:
        """The dtype of frozen weights.

        Raises:
            UserError: it is below fp32, but the strategy or a full fine-tune needs fp32.
        """
        settings = self.backbone.settings
        dtype: torch.dtype = getattr(torch, settings.denoiser_dtype)
        name = "denoiser_dtype" if settings.denoiser_quantization is None else "denoiser_quantization"
        if dtype == torch.float32 and name == "denoiser_dtype":
            return dtype
        told = f"`model.init_args.backbone.init_args.{name}: {getattr(settings, name)}`"
        if under_fsdp(self._trainer) or (self._trainer and isinstance(self.trainer.strategy, DeepSpeedStrategy)):
            raise UserError(
                f"{told}: FSDP2 and DeepSpeed need all weights in one precision: leave it out, or train with DDP"
            )
        if not adapter_layers(self.backbone.denoiser):
            raise UserError(f"{told}: without a LoRA it would round the trained weights: leave it out")
        return dtype

    def _check_assistant(self) -> None:
        """Whether a student's assistant can be part of this run.

        Raises:
            UserError: the strategy shards the network, blocks are compiled, or more than a LoRA is trained.
        """
        if self.backbone.assistant is None:
            return
        told = "`model.init_args.backbone.init_args.assistant`"
        if under_fsdp(self._trainer) or (self._trainer and isinstance(self.trainer.strategy, DeepSpeedStrategy)):
            raise UserError(
                f"{told} is added to whole layers, which FSDP2 and DeepSpeed cut over ranks: train with DDP"
            )
        if self.speed.compile is not None:
            raise UserError(
                f"{told} is switched off for drawing, which compiled blocks do not know: unset speed.compile"
            )
        if not adapter_layers(self.backbone.denoiser):
            raise UserError(f"{told} is left out of what is exported, which only a LoRA allows: train one")

    def _start(self) -> None:
        if self.start_from is None:
            return
        path = Path(self.start_from)
        if not path.exists():
            raise UserError(f"`model.init_args.start_from` {path} does not exist; name an adapter or a checkpoint")
        self.begin_from(path)

    def begin_from(self, path: Path) -> None:
        """Load the weights of an export or a checkpoint before training begins.

        Raises:
            UserError: they do not fit what is trained here.
        """
        from lit_safety.adapters.start_from import fill, is_checkpoint, read_checkpoint

        trained = dict(self.trainable_parameters())
        weights = read_checkpoint(path)["state_dict"] if is_checkpoint(path) else self.read_export(path)
        check_weights(trained, weights, f"`model.init_args.start_from` {path}")
        fill(trained, weights)

    def read_export(self, path: Path) -> dict[str, Tensor]:
        """The weights that `save_export` wrote, by the names of `trainable_parameters`."""
        from lit_safety.adapters.start_from import read_adapter

        weights = read_adapter(path, self.lora, POLICY, self.adaptable_layers())
        return {f"backbone.denoiser.{name}": value for name, value in weights.items()}

    def adaptable_layers(self) -> dict[str, dict[str, AdaptableLayer]]:
        """The denoiser's layers that a LoRA file may adapt."""
        from lit_safety.adapters.layer_names import adaptable_layers

        return {self.backbone.DENOISER: adaptable_layers(self.backbone.denoiser, self.backbone.DENOISER)}

    def _shard(self) -> None:
        """Shard the network over the ranks (FSDP2), and check it against the checkpoint that will be loaded."""
        as_on_rank_0((p for _, p in self.trainable_parameters()), self.trainer.strategy.root_device)
        for network in self.networks():
            shard(network, self.device_mesh["data_parallel"])  # type: ignore[index]
        self.register_state_dict_post_hook(drop_frozen)
        if self.trainer.ckpt_path is not None and Path(str(self.trainer.ckpt_path)).is_file():
            from lit_safety.adapters.start_from import read_file

            held = read_file(Path(str(self.trainer.ckpt_path)))["state_dict"]
            check_weights(dict(self.trainable_parameters()), held, "the checkpoint")

    def networks(self) -> list[torch.nn.Module]:
        """The networks that a step runs; FSDP2 shards these."""
        return [self.backbone.denoiser]

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and parameters of the trained weights."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    # ---- the reference: the same network ----------------------------------------------------------------------

    @property
    def has_reference(self) -> bool:
        """Whether `reference` can be run, in addition to what caches hold."""
        return True

    def reference(self) -> AbstractContextManager[None]:
        """A context in which the denoiser is the reference. Leave it before any backward pass."""
        return adapters_off(self._layers)

    # ---- the parts of a step ----------------------------------------------------------------------------------

    def ordered(self, batch: PairBatch) -> PairBatch:
        """The batch with each pair's images in the order in which they are trained; called once, first in a step.

        All else that is computed on a batch (`errors`, `loss`, `labels`, `noised`) takes the batch that it returns.
        """
        return batch

    def reference_pass(
        self, batch: PairBatch, noisy: Tensor, timesteps: Tensor, target: Tensor, conditioning: Conditioning
    ) -> ReferencePass:
        """The reference's errors on the batch, from its cache or by a forward pass on the output of `noised`."""
        if batch.reference is not None:
            return cached_pass(batch, self.dropped_prompts(batch))
        with torch.no_grad(), self.steps.reference(self):
            prediction = self.backbone.predict(noisy, timesteps, conditioning)
        chosen, rejected = self.image_errors(batch, prediction, target).chunk(2)
        return ReferencePass(chosen, rejected, prediction[: len(batch)])

    def compared(self, batch: PairBatch, prediction: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Prediction and target (2B, C, h, w), scaled if the batch has masks, so that errors count only the mask."""
        if batch.mask is None:
            return prediction, target
        if self.objective.reads_drift:
            raise UserError(
                f"{type(self.objective).__name__} reads whole predictions: set data.init_args.masked to false"
            )
        return masked(batch.mask, prediction, target)

    def image_errors(self, batch: PairBatch, prediction: Tensor, target: Tensor) -> Tensor:
        """Errors (2B,) of chosen and rejected; for pairs with a mask, only where the mask is white."""
        return prediction_error(*self.compared(batch, prediction, target))

    @property
    def anchors_clean_alone(self) -> bool:
        """Whether an objective's anchor acts only on pairs with a clean prompt."""
        return True

    @property
    def drops_prompts(self) -> bool:
        """Whether prompts can be dropped in training."""
        return self.prompt_dropout > 0

    def dropped_prompts(self, batch: PairBatch) -> list[bool]:
        """Which pairs are trained on the empty prompt; a pure function of the samples' seeds."""
        if not self.training or self.prompt_dropout == 0:
            return [False] * len(batch)
        return [uniform(seed, "prompt-dropout") < self.prompt_dropout for seed in batch.seeds]

    def labels(self, batch: PairBatch) -> PairLabels:
        """Whether prompts are clean (B,), harmful labels (B, 2), costs (B, 2), scores (B, 2), on the batch's device.

        Raises:
            UserError: a pair lacks a label that the objective needs.
        """
        check_labels(self.objective, batch)
        labels = PairLabels(clean=batch.clean, harmful=batch.harmful, cost=batch.cost, score=batch.score)
        if (of := batch.groups) is not None:
            labels.groups = GroupLabels(of.ranks, of.harmful, of.cost, of.score)
        return labels

    def timesteps(self, batch: PairBatch) -> Tensor:
        """One training timestep a pair (B,), a pure function of the samples' seeds."""
        # In double precision: in single precision a number just below 1 would become 1, which is outside the schedule.
        fractions = torch.tensor([uniform(seed, TIMESTEP) for seed in batch.noise_seeds], dtype=torch.float64)
        return self.backbone.timesteps(fractions, self._latent_size(batch)).to(self.device, non_blocking=True)

    def _latent_size(self, batch: PairBatch) -> tuple[int, int] | None:
        held = batch if batch.groups is None else batch.groups
        if held.latents is not None:
            return held.latents.shape[-2], held.latents.shape[-1]
        if batch.groups is not None and batch.groups.images is not None:
            return self.backbone.latent_size(*batch.groups.images.shape[-2:])
        return None if batch.chosen is None else self.backbone.latent_size(*batch.chosen.shape[-2:])

    def noised(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """x_t (2B, C, h, w), timesteps (2B,), targets (2B, C, h, w), conditioning (2B rows): chosen, then rejected.

        For groups, N rows each: the images of the first prompt, then those of the second, and so on.
        """
        if batch.groups is not None:
            from lit_safety.modules.groups import noised_groups

            return noised_groups(self, batch, batch.groups)
        with torch.no_grad():
            posterior = self.posterior(batch)
            shape = tuple(posterior.shape[2:])
            noise = self.steps.noise(self, batch, shape)
            latents = self.backbone.latents(posterior, self.gaussian(batch, LATENT, shape).repeat(2, 1, 1, 1))
            timesteps = self.timesteps(batch).repeat(2)
            noisy = self.backbone.add_noise(latents, noise, timesteps)
            target = self.backbone.target(latents, noise, timesteps)
        conditioning = {name: torch.cat([rows, rows]) for name, rows in self.conditioning(batch).items()}
        if batch.crops is not None:
            conditioning |= self.backbone.crop_conditioning(batch.crops.transpose(0, 1).flatten(0, 1))
        return noisy, timesteps, target, conditioning

    def posterior(self, batch: PairBatch) -> Tensor:
        """Mean and standard deviation of the images' latents (2B, 2, C, h, w): chosen, then rejected."""
        if batch.latents is not None:
            return batch.latents.transpose(0, 1).flatten(0, 1)
        if batch.chosen is None or batch.rejected is None:
            raise ValueError(f"samples {', '.join(batch.keys)} have neither images nor latents")
        return self.backbone.posterior(to_floats(torch.cat([batch.chosen, batch.rejected])))

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """The text encoders' outputs for B prompts, B rows; prompts that are too long are counted."""
        from lit_safety.backbones.backbone import encode_alike

        self.truncated.look(self.backbone, prompts)
        with torch.no_grad():
            return encode_alike(self.backbone, prompts)

    def gaussian(self, batch: PairBatch, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape), each row a pure function of its noise seed and ``purpose``."""
        drawn = batch.draws.get(purpose)
        if drawn is not None and tuple(drawn.shape[1:]) == shape:
            return drawn
        return normal(batch.noise_seeds, purpose, shape).to(self.device, non_blocking=True)

    # ---- training, validation, test, prediction ---------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        if self._trainer is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.finite_loss.advance()  # here, after ranks have shared a gradient, so that all of them stop
        batch = self.ordered(batch)
        if self.speed.selective is not None:
            loss, output, errors = self.speed.selective.step(self, batch)
        else:
            errors = self.errors(batch)
            output = self.loss(errors, batch)
            loss = output.loss.mean()
        begins = self._trainer is not None and self.global_step == 0 and batch_idx == 0
        cached = batch.reference is not None or (batch.groups is not None and batch.groups.reference is not None)
        if begins and (cached or self.speed.compile is not None):
            from lit_safety.modules.start_check import check_start

            check_start(self, batch, errors)
        term = None
        if self.anchors is not None:
            term = self.anchors.loss(self, batch)
            self.log("loss/anchors", term.detach(), batch_size=len(batch))
            loss = loss + term
        if self.retain is not None:
            self.retain.hold(self, term, output.keeping)
        self.finite_loss.watch(loss, batch.keys)
        self.last_means = {name: values.mean() for name, values in output.logs.items()}
        self.log_dict(self.last_means, batch_size=len(batch))
        self.log("loss", output.loss.detach().mean(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[Image]:
        return self.draw(batch.prompts, batch.seeds)

    def _evaluation_step(self, batch: PairBatch, stage: str) -> None:
        # Evaluation batches have the same seeds in every epoch: same pairs, timesteps and noise every time.
        batch = self.ordered(batch)
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

    # ---- the optimizer; a gradient that is not finite stops the run before a checkpoint is written -------------

    def configure_optimizers(self) -> Any:
        trained = self.trainable_parameters()
        if rounded := [name for name, p in trained if p.dtype != torch.float32]:
            raise UserError(
                f"{rounded[0]} is trained but not in fp32: make it trainable in `configure_policy`, before frozen "
                "weights are converted to bfloat16"
            )
        return self.scheduled([p for _, p in trained])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.retain is not None:
            self.log_dict(self.retain.project(self))
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._gradient_norm = None
        if gradients:  # DeepSpeed does not show gradients
            self._gradient_norm = norm = whole(torch.nn.utils.get_total_norm(gradients))
            self._watch_gradient(norm)
            self.log("grad_norm", norm)

    def _watch_gradient(self, norm: Tensor) -> None:
        # In fp16 the scaler skips steps that overflow; the first steps do so by design.
        if self._trainer is None or self._trainer.precision != "16-mixed":
            self.finite_loss.watch_gradient(norm)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        self.steps.follow(self)
        if self.attack is not None:
            self.attack.turn(self, arguments[1])
        engine: Any = self.trainer.model if isinstance(self.trainer.strategy, DeepSpeedStrategy) else None
        # DeepSpeed knows the norm only now.
        if engine is not None and (found := engine.get_global_grad_norm()) is not None:
            norm = torch.as_tensor(found).to(self.device, torch.float32)
            self._watch_gradient(norm)
            self.log("grad_norm", norm)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if fused and gradient_clip_val and self.trainer.precision == "16-mixed":
            raise UserError(
                "a fused optimizer undoes the scaling of 16-mixed within its step, after gradients were clipped: set "
                "`model.init_args.optimizer.init_args.fused: false`, `trainer.precision: bf16-mixed` or "
                "`trainer.gradient_clip_val: null`"
            )
        # Clip by the norm that was just logged: computing it again would cost a pass over all gradients.
        if self._gradient_norm is None or not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._gradient_norm)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.retain is not None:
            self.retain.check(self.trainer)
        if self.attack is not None:
            self.attack.check(self)
        if self.anchors is not None:
            self.anchors.prepare(self, self.trainer)

    def on_train_end(self) -> None:
        self.finite_loss.check()

    # ---- output of the module: drawings, exports, checkpoints -----------------------------------------------

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """One image for each prompt, drawn by the policy from the initial noise of its own seed."""
        from lit_safety.backbones.call import call_options

        pipe, side = self.backbone.pipeline(), self.drawing.resolution
        drawn = pipe(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=self.drawing.steps,
            **call_options(pipe, self.drawing.guidance, count=len(prompts)),
            **({} if side is None else {"height": side, "width": side}),
        )
        return list(drawn.images)

    def draw_latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The latents (B, C, h, w) of such drawings, scaled as in training, without noise from the image encoder."""
        from lit_safety.data.reading.decode import to_tensor

        images = torch.stack([to_tensor(image) for image in self.draw(prompts, seeds)]).to(self.device)
        with torch.no_grad():
            posterior = self.backbone.posterior(images)
            return self.backbone.latents(posterior, torch.zeros_like(posterior[:, 0]))

    def draw_rows(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Image]]:
        """Images of the prompts that a run logs: one row for each thing that is trained."""
        return [self.draw(prompts, seeds)]

    def exports(self) -> list[str]:
        """The folders, inside the run's folder, of the adapters that a fit writes."""
        return ["adapter"]

    @contextmanager
    def exporting(self, export: str) -> Iterator[None]:
        """A context in which the weights of ``export`` are whole and in fp32. All ranks must enter it."""
        trained = dict(self.trainable_parameters())
        with replaced(self, trained, master_weights(trained)):
            yield

    def save_export(self, folder: Path) -> None:
        """Write the weights of the current export; called on rank 0, inside `exporting`."""
        self.backbone.save_lora(folder, POLICY)

    def export_settings(self, export: str) -> dict[str, Any]:
        """What the card of ``export`` says about the training."""
        settings: dict[str, Any] = {"rank": self.lora.rank, "alpha": self.lora.alpha}
        if self.backbone.assistant is not None:
            settings["assistant"] = f"{self.backbone.assistant.path}, in training alone"
        return settings

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite_loss.check()
        super().on_save_checkpoint(checkpoint)
        trained = {name for name, _ in self.trainable_parameters()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["objective"] = self.objective.state_dict()
        checkpoint["stability"] = self.steps.state_dict()
        if self.backbone.assistant is not None:
            checkpoint["assistant"] = self.backbone.assistant.sha256
        if self.attack is not None:
            checkpoint["adversary"] = self.attack.state_dict()
        if self._trainer is not None:
            checkpoint["strategy"] = family(self.trainer.strategy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        mine = None if self.backbone.assistant is None else self.backbone.assistant.sha256
        if checkpoint.get("assistant") != mine:
            raise UserError(
                "the checkpoint was trained with another file (or none) than the present "
                "`model.init_args.backbone.init_args.assistant`: set it to the same file"
            )
        try:
            self.objective.load_state_dict(checkpoint.get("objective", {}))
        except ValueError as error:
            raise UserError(f"{error}: resume with the config.yaml of the run that wrote it") from error
        self.steps.load_state_dict(checkpoint.get("stability", {}))
        if self.attack is not None and (self._trainer is None or self.trainer.state.fn == "fit"):
            self.attack.load_state_dict(checkpoint.get("adversary", []))
        if "state_dict" not in checkpoint:  # DeepSpeed has already put the weights into its engine
            return
        check_weights(dict(self.trainable_parameters()), checkpoint["state_dict"], "the checkpoint")
