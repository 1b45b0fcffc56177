"""The networks of the toy world's flow twin: its transformer, its two text towers, its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lit_safety.backbones.stable_diffusion_3 import STAND_INS, BiasedJointAttention
from lit_safety.worlds.denoiser import Trainee, save_pipeline, take_average
from lit_safety.worlds.toyworld.text import WIDTH
from lit_safety.worlds.toyworld.vae import LATENT_CHANNELS
from lit_safety.worlds.training import fast_numbers

SHIFT = 3.0
"""The scheduler's shift, as in SD3."""
IMAGE_TOKENS = 16
"""Tokens of an image: patches of 2 x 2 on 8 x 8 latents."""


def new_transformer() -> Any:
    """An untrained SD3Transformer2DModel of 3.6 M parameters on 16 tokens an image; it begins by predicting 0."""
    transformer: Any = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:
        block.attn.set_processor(BiasedJointAttention())
    for name, layer in transformer.named_modules():  # as Peebles & Xie, 2023, arXiv:2212.09748: blocks begin at 0
        if isinstance(layer, nn.Linear) and ("norm1" in name or "norm_out" in name or name == "proj_out"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return transformer


def towers(folder: Path) -> tuple[Any, Any]:
    """The two text encoders of the pipeline, made from the CLIPTextModel in the folder.

    The layer before the last is the toy encoder's last layer in the first tower, and its first layer in the second.
    """
    toy = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    made = []
    for further in (1, 0):
        settings = {**toy.config.to_dict(), "num_hidden_layers": toy.config.num_hidden_layers + further}
        tower = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
        tower.text_model.load_state_dict(toy.state_dict(), strict=not further)
        with torch.no_grad():
            tower.text_projection.weight.copy_(torch.eye(toy.config.hidden_size))
            if further:  # only the residual passes
                last = tower.text_model.encoder.layers[-1]
                for layer in (last.self_attn.out_proj, last.mlp.fc2):
                    layer.weight.zero_()
                    layer.bias.zero_()
        made.append(tower.requires_grad_(False).eval())
    return made[0], made[1]


class FlowNetworks(Trainee):
    """The transformer, which is trained, and the frozen towers."""

    def __init__(self, transformer: nn.Module, text: nn.Module, text_2: nn.Module) -> None:
        super().__init__()
        self.transformer, self.text, self.text_2 = transformer, text, text_2

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.transformer.parameters()), "share": 1.0}]

    def loss(self, latents: Tensor, ids: Tensor, spread: Tensor) -> Tensor:
        """Mean squared error of noise - latents at sigma = spread."""
        noise, sigma = torch.randn_like(latents), spread.view(-1, 1, 1, 1)
        noisy = (1 - sigma) * latents + sigma * noise
        with torch.no_grad():
            found = [tower(ids, output_hidden_states=True) for tower in (self.text, self.text_2)]
            hidden = torch.cat([one.hidden_states[-2] for one in found], -1)
            pooled = torch.cat([one.text_embeds for one in found], -1)
            hidden = pad(hidden, (0, 0, 0, len(STAND_INS)))  # at the position of the 256 rows of zeros for a missing T5
            bias = pad(hidden.new_tensor(STAND_INS), (hidden.shape[1] - len(STAND_INS) + IMAGE_TOKENS, 0))
        with fast_numbers(noisy.device):
            predicted = self.transformer(
                hidden_states=noisy,
                timestep=1000 * spread,
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
                joint_attention_kwargs={"attention_mask": bias},
                return_dict=False,
            )[0]
        return mse_loss(predicted.float(), noise - latents)


def load_networks(work: Path) -> FlowNetworks:
    """A new transformer, and the towers of the work folder's text_encoder/."""
    return FlowNetworks(new_transformer(), *towers(work / "text_encoder"))


def write_pipeline(work: Path, target: Path) -> None:
    """Writes the pipeline with the averaged weights from transformer.pt, so that stock diffusers can load it."""
    networks = load_networks(work)
    take_average(networks, work / "transformer.pt")
    vae = AutoencoderKL.from_pretrained(work / "vae")
    vae.register_to_config(shift_factor=0.0)  # the stock pipeline cannot draw if it is None
    pipeline = StableDiffusion3Pipeline(
        transformer=networks.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=networks.text,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        text_encoder_2=networks.text_2,
        tokenizer_2=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    save_pipeline(pipeline, target)
