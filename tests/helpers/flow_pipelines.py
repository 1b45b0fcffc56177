"""Tiny random pipelines of the flow-matching families, as `save_pretrained` writes them; random numbers stand wherever
real weights have any (statistics, means, padding tokens), so that leaving them out shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.tiny_pipelines import WORDS, clip_tokenizer

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def byte_tokenizer(template: str, special: Sequence[str], **settings: Any) -> Any:
    """A `Qwen2Tokenizer` without merges: every byte is a token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    words = [*sorted(ByteLevel.alphabet()), *special]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=4096, **settings
    )
    tokenizer.chat_template = template
    return tokenizer


def qwen_tokenizer() -> Any:
    return byte_tokenizer(
        QWEN_TEMPLATE, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        unk_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def mistral_tokenizer() -> Any:
    """Stands for FLUX.2's `PixtralProcessor`, which needs torchvision; the same calls, padded to the left."""
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    return byte_tokenizer(
        MISTRAL_TEMPLATE, ["<s>", "</s>", "<pad>", *marks], unk_token="<pad>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", padding_side="left", additional_special_tokens=marks,
    )  # fmt: skip


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *map(chr, range(33, 127))]
    vocabulary = {word: number for number, word in enumerate(words)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=4096, add_bos_token=True)


def qwen3(kind: str, layers: int, width: int) -> Any:
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=288, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{w}", -2.0) for w in WORDS), ("\u2581", -3.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16), "norm_num_groups": 8, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def kl_vae() -> Any:
    """4 channels at half the side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12,
        **LEVELS,
    )  # fmt: skip


def flux_2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(sample_size=32, latent_channels=4, **LEVELS)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def dynamic(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        **{"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15} | settings
    )


def flux(words: Path, guided: bool = True, **scheduler: Any) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=guided,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=dynamic(**scheduler), vae=kl_vae(), text_encoder=CLIPTextModel(clip), text_encoder_2=t5(),
        tokenizer=clip_tokenizer(words), tokenizer_2=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def flux_2_transformer(guided: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guided,
    )  # fmt: skip


def klein(words: Path, distilled: bool = False) -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(
        scheduler=dynamic(), vae=flux_2_vae(), text_encoder=qwen3("Qwen3ForCausalLM", 28, 8),
        tokenizer=qwen_tokenizer(), transformer=flux_2_transformer(False), is_distilled=distilled,
    )  # fmt: skip


def flux_2(words: Path) -> Any:
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral", "vocab_size": 288, "hidden_size": 8, "intermediate_size": 16, "head_dim": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 31, "sliding_window": None,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 30, "patch_size": 6,
    }  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=1)
    )
    return Flux2Pipeline(
        scheduler=dynamic(), vae=flux_2_vae(), text_encoder=encoder, tokenizer=mistral_tokenizer(),
        transformer=flux_2_transformer(True),
    )  # fmt: skip


def qwen_image(words: Path) -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 288, "max_position_embeddings": 4096, "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, vision_start_token_id=1, vision_end_token_id=2, vision_token_id=3
        )
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.7, 1.0],
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = dynamic(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=qwen_tokenizer(), transformer=transformer
    )


def z_image(words: Path) -> Any:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_vae(), text_encoder=qwen3("Qwen3Model", 2, 16),
        tokenizer=qwen_tokenizer(), transformer=transformer,
    )  # fmt: skip


def sana(words: Path) -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    gemma = Gemma2Config(
        head_dim=8, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=1, vocab_size=128, max_position_embeddings=8192, attn_implementation="eager",
    )  # fmt: skip
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_block_types": ("ResBlock", "EfficientViTBlock"), f"{side}_block_out_channels": (8, 8)}
        sides |= {f"{side}_qkv_multiscales": ((), (5,)), f"{side}_layers_per_block": (1, 1)}
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407, **sides,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=16,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=Gemma2Model(gemma), vae=vae, transformer=transformer,
        scheduler=scheduler,
    )  # fmt: skip


FAMILIES: dict[str, Callable[..., Any]] = {
    "flux": flux, "klein": klein, "flux_2": flux_2, "qwen_image": qwen_image, "z_image": z_image, "sana": sana,
}  # fmt: skip


def save_flow(family: str, folder: Path, **settings: Any) -> Path:
    """One of `FAMILIES` into a folder; every weight that begins as zero is random."""
    import torch

    torch.manual_seed(0)
    pipe = FAMILIES[family](folder.parent / f"{folder.name}-vocabulary", **settings)
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            if not weight.any():
                weight.normal_(0, 0.05)
    pipe.save_pretrained(folder)
    return folder
