"""The network that is trained: loaded, given an adapter, cut into pieces, drawn with and written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from PIL.Image import Image
from torch import Tensor

from lit_safety.adapters.lora import LoRA, adapter_layers, adapters_off
from lit_safety.adapters.lora_layouts import Place, places_of
from lit_safety.adapters.start_from import fill, is_checkpoint, read_adapter, read_checkpoint, read_file
from lit_safety.adapters.zero import master_weights, replaced, unpartitioned
from lit_safety.backbones import Backbone, load_backbone
from lit_safety.errors import UserError
from lit_safety.modules.frozen_weights import lower_frozen
from lit_safety.modules.schedule import ScheduleSettings, make_scheduler, steps_of
from lit_safety.modules.sharding import as_on_rank_0, drop_frozen, shard, under_fsdp
from lit_safety.modules.speed import Speed
from lit_safety.modules.strategy_checks import check_weights

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


class Policy(LightningModule):
    """A denoiser with something in it that is trained; what it is trained for is `PreferenceModule`'s.

    Args:
        pretrained: the model to align: a diffusers pipeline folder or a hub id.
        lora: the adapter that is trained.
        optimizer: made from the trainable parameters.
        lr_scheduler: made from the optimizer; None: constant learning rate.
        drawing: how pictures are drawn.
        speed: how a step is computed.
        start_from: weights to begin with, of another run.
    """

    backbone: Backbone

    def __init__(
        self,
        pretrained: str,
        lora: LoRA | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        drawing: Drawing | None,
        speed: Speed | None,
        start_from: str | None,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.lora = lora or LoRA()
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.drawing = drawing or Drawing()
        self.speed = speed or Speed()
        self.start_from = start_from

    # ---- in

    def configure_model(self) -> None:
        if "backbone" in self._modules:
            return
        if self._trainer is None or not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.backbone = load_backbone(self.pretrained)
            self.configure_policy()
            self._start()
            self.speed.apply(self.backbone.denoiser)
            if under_fsdp(self._trainer):  # which wants one precision in all that it cuts together
                self._shard()
            elif self._trainer is not None and self.trainer.precision == "bf16-mixed":
                for network in self.networks():
                    lower_frozen(network, torch.bfloat16)
            return
        with unpartitioned():  # diffusers loads into whole parameters only
            self.backbone = load_backbone(self.pretrained)
            # DeepSpeed sends weights as bytes, and those in channels-last cannot be read as such.
            whole: Any = self.backbone
            whole.to(memory_format=torch.contiguous_format)
            self.configure_policy()
            self._start()
            self.speed.apply(self.backbone.denoiser)

    def _start(self) -> None:
        if self.start_from is None:
            return
        path = Path(self.start_from)
        if not path.exists():
            raise UserError(f"`model.init_args.start_from` {path} does not exist; name an adapter or a checkpoint")
        self.begin_from(path)

    def begin_from(self, path: Path) -> None:
        """Begin with the weights that an export or a checkpoint holds, before anything is trained.

        Raises:
            UserError: they are not those of what is trained here.
        """
        trained = dict(self.trainable_parameters())
        weights = read_checkpoint(path)["state_dict"] if is_checkpoint(path) else self.read_export(path)
        check_weights(trained, weights, f"`model.init_args.start_from` {path}")
        fill(trained, weights)

    def read_export(self, path: Path) -> dict[str, Tensor]:
        """What `save_export` has written, by the names of `trainable_parameters`."""
        weights = read_adapter(path, self.lora, POLICY, self.places())
        return {f"backbone.denoiser.{name}": value for name, value in weights.items()}

    def places(self) -> dict[str, dict[str, Place]]:
        """The layers of the denoiser that a LoRA's file may adapt."""
        return {self.backbone.DENOISER: places_of(self.backbone.denoiser, self.backbone.DENOISER)}

    def _shard(self) -> None:
        """Cut what computes into pieces for FSDP2, and compare the pieces with the checkpoint that fills them."""
        as_on_rank_0((p for _, p in self.trainable_parameters()), self.trainer.strategy.root_device)
        for network in self.networks():
            shard(network, self.device_mesh["data_parallel"])  # type: ignore[index]
        self.register_state_dict_post_hook(drop_frozen)
        if self.trainer.ckpt_path is not None and Path(str(self.trainer.ckpt_path)).is_file():
            held = read_file(Path(str(self.trainer.ckpt_path)))["state_dict"]
            check_weights(dict(self.trainable_parameters()), held, "the checkpoint")

    def networks(self) -> list[torch.nn.Module]:
        """The networks that a step runs: what FSDP2 cuts into pieces."""
        return [self.backbone.denoiser]

    def configure_policy(self) -> None:
        """Make something of ``self.backbone.denoiser`` trainable; override to train something else than a LoRA."""
        self.lora.attach(self.backbone.denoiser, POLICY)
        self._layers = adapter_layers(self.backbone.denoiser)

    def trainable_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and parameters of what is trained."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        trained = self.trainable_parameters()
        if rounded := [name for name, p in trained if p.dtype != torch.float32]:
            raise UserError(
                f"{rounded[0]} is trained and no longer in fp32: make it trainable in `configure_policy`, before "
                "frozen weights are lowered to bfloat16"
            )
        optimizer = self.make_optimizer([p for _, p in trained])
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

    # ---- the reference: the same network

    @property
    def has_reference(self) -> bool:
        """Whether `reference` can be run, beside what caches hold of it."""
        return True

    def reference(self) -> AbstractContextManager[None]:
        """Within, the denoiser is the reference; left before any backward pass."""
        return adapters_off(self._layers)

    # ---- out

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """One picture a prompt by the policy, each from the initial noise of its own seed."""
        drawn = self.backbone.pipeline()(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=self.drawing.steps,
            guidance_scale=self.drawing.guidance,
        )
        return list(drawn.images)

    def draw_rows(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[Image]]:
        """What a run shows of itself: the prompts as rows of pictures, one row for each thing that is trained."""
        return [self.draw(prompts, seeds)]

    def exports(self) -> list[str]:
        """The folders, below the run's, of the adapters that a fit leaves."""
        return ["adapter"]

    @contextmanager
    def exporting(self, export: str) -> Iterator[None]:
        """Within, what is trained is whole, in fp32, and what belongs into ``export``; on all ranks."""
        trained = dict(self.trainable_parameters())
        with replaced(self, trained, master_weights(trained)):
            yield

    def save_export(self, folder: Path) -> None:
        """Write the weights of the export at hand; called on rank 0, within `exporting`."""
        self.backbone.save_lora(folder, POLICY)

    def export_settings(self, export: str) -> dict[str, Any]:
        """What the card of ``export`` says of what was trained."""
        return {"rank": self.lora.rank, "alpha": self.lora.alpha}
