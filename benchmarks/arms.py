"""What is compared: the published recipe's step, and ours on cached inputs and on a reference cache."""

from __future__ import annotations

from typing import Any

import torch
from networks import TOY, backbone_of, parts_of
from recipes import BETA, RANK, RATE, Clock, SafetyDPO, autocast, half_of, update
from torch import Tensor

from lit_safety.adapters.lora import LoRA
from lit_safety.backbones.lowered import lower_frozen
from lit_safety.core.chance import LATENT, NOISE, normal
from lit_safety.data.reading.batch import PairBatch
from lit_safety.modules import PreferenceModule
from lit_safety.modules.speed import Speed
from lit_safety.objectives import DiffusionDPO


class Published(SafetyDPO):
    """SafetyDPO's step on random images of one prompt.

    Args:
        model, scale, device: which networks, and where.
        batch: pairs a step.
        resolution: of the images.
        checkpointing: activations computed a second time, as it forces on SDXL.
    """

    def __init__(
        self, model: str, scale: str, device: torch.device, batch: int, resolution: int, checkpointing: bool
    ) -> None:
        frozen = half_of(device) or torch.float32
        parts = parts_of(model, scale, device)
        vae, policy = (parts.get(name).to(device, frozen) for name in ("vae", "unet"))
        texts = [
            parts.get(name).to(device, frozen)
            for name in ("text_encoder", "text_encoder_2")
            if name in parts.index.components
        ]
        reference = parts_of(model, scale, device).get("unet").to(device, frozen)
        parameters = LoRA(rank=RANK, forward="peft").attach(policy, "policy")
        if checkpointing:
            policy.enable_gradient_checkpointing()
            policy.train()
        super().__init__(vae, texts, policy, parts.get("scheduler"), parameters, reference)
        self.images = torch.rand(2 * batch, 3, resolution, resolution, device=device) * 2 - 1
        longest = texts[0].config.max_position_embeddings
        self.tokens = torch.zeros(batch, longest, dtype=torch.long, device=device)

    def step(self) -> None:
        """A step on the same images."""
        self.train(self.images, self.tokens)


class Ours:
    """The step of `PreferenceModule.training_step` on batches out of a cache.

    Args:
        model, scale, device, batch, resolution: as the other side's.
        speed: how a step is computed; None: as it is.
        blocks: which blocks are adapted; None: all.
    """

    def __init__(
        self,
        model: str,
        scale: str,
        device: torch.device,
        batch: int,
        resolution: int,
        speed: Speed | None = None,
        blocks: list[str] | None = None,
    ) -> None:
        self.device, self.clock = device, Clock(device)
        module = PreferenceModule(
            str(TOY / "pipeline"), DiffusionDPO(BETA), LoRA(rank=RANK, blocks=blocks), speed=speed
        )
        module.backbone = backbone_of(model, scale, device)
        module.lora = module.lora.with_targets(module.backbone.lora_targets())
        module.configure_policy()
        if (half := half_of(device)) is not None:  # as a fit in bf16-mixed does
            lower_frozen(module.backbone.denoiser, half)
        module.speed.apply(module.backbone.denoiser)
        self.module = module.to(device).train()
        self.parameters = [p for _, p in module.trainable_parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=1e-2, fused=device.type != "meta")
        self.batch = cached_batch(module, batch, resolution).to(device)
        # The true ones, at which the loss does not saturate either.
        self.batch.reference = reference_errors(module, self.batch)
        module.noised = self.clock.timed("noise", module.noised)  # type: ignore[method-assign]
        module.reference_pass = self.clock.timed("reference", module.reference_pass)  # type: ignore[method-assign]

    def step(self, reference_cached: bool) -> dict[str, Tensor]:
        """One optimizer step; returns what it would log."""
        module, clock = self.module, self.clock
        batch = self.batch
        if not reference_cached:
            batch = batch.take(range(len(batch)))
            batch.reference = None
        inside = sum(clock.seconds.get(name, 0.0) for name in ("noise", "reference"))
        with autocast(self.device), clock.part("policy"):
            if module.speed.selective is not None:
                loss, output, _ = module.speed.selective.step(module, batch)
            else:
                output = module.loss(module.errors(batch), batch)
                loss = output.loss.mean()
        if clock.on:  # what was measured within
            clock.seconds["policy"] -= sum(clock.seconds.get(n, 0.0) for n in ("noise", "reference")) - inside
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            update(self.optimizer, self.parameters)
        return output.logs


def reference_errors(module: PreferenceModule, batch: PairBatch) -> Tensor:
    """What a cache of one draw holds of a batch: (B, 2, 1)."""
    with torch.no_grad(), autocast(module.device):
        found = module.reference_pass(batch, *module.noised(batch))
    return torch.stack([found.chosen, found.rejected], dim=1).unsqueeze(2)


def cached_batch(module: PreferenceModule, pairs: int, resolution: int) -> PairBatch:
    """Random latents and text as a cache gives them: with timesteps and noise of its own, drawn ahead by a worker."""
    unet: Any = module.backbone.denoiser
    config = unet.config
    vae = module.backbone.parts.config("vae")
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    length = 77
    if module.backbone.DENOISER == "transformer":  # SD3's texts: 77 tokens of CLIP and 256 of T5
        conditioning = {
            "encoder_hidden_states": torch.randn(pairs, 333, config.joint_attention_dim),
            "pooled_projections": torch.randn(pairs, config.pooled_projection_dim),
        }
        return _batch(conditioning, config.in_channels, side, resolution)
    if isinstance(module.backbone.parts.index.components.get("text_encoder"), tuple):
        length = module.backbone.parts.config("text_encoder")["max_position_embeddings"]
    conditioning = {"encoder_hidden_states": torch.randn(pairs, length, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditioning["text_embeds"] = torch.randn(pairs, pooled)
    return _batch(conditioning, config.in_channels, side, resolution)


def _batch(conditioning: dict[str, Tensor], channels: int, side: int, resolution: int) -> PairBatch:
    """As many pairs as the conditioning has rows."""
    pairs = len(next(iter(conditioning.values())))
    unknown = torch.full((pairs, 2), float("nan"))
    latents = torch.rand(pairs, 2, 2, channels, side, side)
    whole = torch.tensor([float(resolution)] * 2 + [0.0] * 2 + [float(resolution)] * 2)
    fixed = list(range(pairs))
    return PairBatch(
        keys=[f"{row}" for row in range(pairs)],
        seeds=list(range(pairs)),
        prompts=["a red cat"] * pairs,
        prompt_kinds=["harmful"] * pairs,
        categories=[()] * pairs,
        orders=["safety"] * pairs,
        chosen=None,
        rejected=None,
        clean=torch.zeros(pairs),
        harmful=unknown,
        cost=unknown,
        has_cost=[False] * pairs,
        score=unknown,
        has_score=[False] * pairs,
        has_harmful=[False] * pairs,
        user_ids=[None] * pairs,
        latents=latents,
        conditioning=conditioning,
        empty={name: rows[:1] for name, rows in conditioning.items()},
        crops=whole.expand(pairs, 2, 6).clone(),
        # Whatever `seeds` are, so that the reference's errors stay those of these timesteps and this noise.
        fixed_seeds=fixed,
        draws={name: normal(fixed, name, latents.shape[3:]) for name in (NOISE, LATENT)},
    )
