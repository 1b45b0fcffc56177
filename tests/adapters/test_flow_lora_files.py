"""LoRA files that other programs wrote for transformers of rectified flow: every update at its layer, or refused with
the number of those that have none."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_safety.adapters.layer_names import adaptable_layers
from lit_safety.adapters.load_lora import converter
from lit_safety.adapters.lora_file import read_lora
from lit_safety.core.errors import UserError
from tests.helpers.flow_pipelines import FAMILIES

RANK = 2
ALPHA = 6.0
KOHYA = ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha")
PEFT = ("{}.lora_A.weight", "{}.lora_B.weight", None)
QKV = ["to_q", "to_k", "to_v"]


def within(block: str, names: list[str]) -> list[str]:
    return [f"transformer.{block}.{name}" for name in names]


#: By who wrote it: family, endings of the keys, and for each layer of the file the layers of diffusers that share it.
FILES: dict[str, tuple[str, tuple[str, str, str | None], dict[str, list[str]]]] = {
    "FLUX.1, kohya, with CLIP": ("flux", KOHYA, {
        "lora_unet_double_blocks_0_img_attn_qkv": within("transformer_blocks.0.attn", QKV),
        "lora_unet_double_blocks_0_txt_attn_qkv":
            within("transformer_blocks.0.attn", ["add_q_proj", "add_k_proj", "add_v_proj"]),
        "lora_unet_double_blocks_0_txt_mlp_2": within("transformer_blocks.0", ["ff_context.net.2"]),
        "lora_unet_single_blocks_1_linear2": within("single_transformer_blocks.1", ["proj_out"]),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj":
            ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"],
    }),
    "FLUX.1, diffusers": ("flux", PEFT, {
        "transformer.single_transformer_blocks.0.proj_out": within("single_transformer_blocks.0", ["proj_out"]),
        "transformer.transformer_blocks.0.attn.to_add_out": within("transformer_blocks.0.attn", ["to_add_out"]),
    }),
    "FLUX.2-klein, kohya": ("klein", KOHYA, {
        "lora_unet_double_blocks_0_img_attn_qkv": within("transformer_blocks.0.attn", QKV),
        "lora_unet_single_blocks_1_linear2": within("single_transformer_blocks.1", ["attn.to_out"]),
    }),
    "FLUX.2-klein, PEFT": ("klein", ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None), {
        "double_blocks.0.txt_attn.qkv":
            within("transformer_blocks.0.attn", ["add_q_proj", "add_k_proj", "add_v_proj"]),
        "single_blocks.0.linear1": within("single_transformer_blocks.0", ["attn.to_qkv_mlp_proj"]),
    }),
    "Qwen-Image, kohya": ("qwen_image", KOHYA, {
        "lora_unet_transformer_blocks_0_attn_to_out_0": within("transformer_blocks.0", ["attn.to_out.0"]),
        "lora_unet_transformer_blocks_1_img_mlp_net_0_proj": within("transformer_blocks.1", ["img_mlp.net.0.proj"]),
    }),
    "Qwen-Image, Lightning's": ("qwen_image", KOHYA, {
        "transformer_blocks.1.attn.add_q_proj": within("transformer_blocks.1", ["attn.add_q_proj"]),
    }),
    "Qwen-Image, ComfyUI": ("qwen_image", PEFT, {
        "diffusion_model.transformer_blocks.0.txt_mlp.net.2": within("transformer_blocks.0", ["txt_mlp.net.2"]),
    }),
    "Z-Image, kohya": ("z_image", KOHYA, {
        "lora_unet_layers_1_attention_to_q": within("layers.1", ["attention.to_q"]),
        "lora_unet_context_refiner_0_feed_forward_w3": within("context_refiner.0", ["feed_forward.w3"]),
    }),
    "Z-Image, ai-toolkit": ("z_image", PEFT, {
        "diffusion_model.noise_refiner.0.attention.to_out.0": within("noise_refiner.0", ["attention.to_out.0"]),
    }),
    "SANA, diffusers": ("sana", PEFT, {
        "transformer.transformer_blocks.0.attn1.to_q": within("transformer_blocks.0", ["attn1.to_q"]),
        "transformer.transformer_blocks.0.attn2.to_out.0": within("transformer_blocks.0", ["attn2.to_out.0"]),
    }),
    "SANA, kohya": ("sana", KOHYA, {
        "lora_unet_transformer_blocks_0_attn2_to_v": within("transformer_blocks.0", ["attn2.to_v"]),
    }),
}  # fmt: skip


@cache
def family(name: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The pipeline's class, and the layers of its networks that take LoRAs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        pipe = FAMILIES[name](Path(folder) / "words")
    parts = {part: getattr(pipe, part, None) for part in pipe._lora_loadable_modules}
    return type(pipe), {part: adaptable_layers(one, part) for part, one in parts.items() if one is not None}


def write(file: Path, name: str, keys: tuple[str, str, str | None], layers: dict[str, list[str]]) -> dict[str, Tensor]:
    """A file of random updates; returns them (out, in) by the file's layers."""
    _, known = family(name)
    down, up, alpha = keys
    tensors, updates = {}, {}
    generator = torch.Generator().manual_seed(0)
    for layer, shared in layers.items():
        shapes = [known[one.partition(".")[0]][one.partition(".")[2]].shape for one in shared]
        a = torch.randn(RANK, shapes[0][1], generator=generator)
        b = torch.randn(sum(out for out, _ in shapes), RANK, generator=generator)
        tensors |= {down.format(layer): a, up.format(layer): b}
        if alpha is not None:
            tensors[alpha.format(layer)] = torch.tensor(ALPHA)
        updates[layer] = (1.0 if alpha is None else ALPHA / RANK) * b @ a
    save_file(tensors, file)
    return updates


@pytest.mark.parametrize("written", FILES)
def test_every_update_is_at_its_layer(written: str, tmp_path: Path):
    name, keys, layers = FILES[written]
    kind, known = family(name)
    updates = write(tmp_path / "foreign.safetensors", name, keys, layers)
    found = read_lora(tmp_path / "foreign.safetensors", known, converter(kind))
    assert set(found) == {one for shared in layers.values() for one in shared}
    for layer, shared in layers.items():
        together = torch.cat([found[one].scale * found[one].b @ found[one].a for one in shared])
        torch.testing.assert_close(together, updates[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["klein", "z_image", "sana"])
def test_a_file_for_another_family_is_refused_with_how_many_layers_have_no_place(name: str, tmp_path: Path):
    kind, known = family(name)
    _, keys, layers = FILES["Qwen-Image, kohya"]
    write(tmp_path / "foreign.safetensors", "qwen_image", keys, layers)
    with pytest.raises(UserError, match=r"made for another backbone: [12] of 2 layers"):
        read_lora(tmp_path / "foreign.safetensors", known, converter(kind))
