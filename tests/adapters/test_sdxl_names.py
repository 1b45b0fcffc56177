"""Kohya's files for SDXL, which name the UNet's blocks as the published checkpoint does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_safety.adapters.layer_names import adaptable_layers, to_one_layout
from lit_safety.adapters.load_lora import load_lora
from lit_safety.adapters.lora_file import read_lora
from lit_safety.core.errors import UserError
from lit_safety.merging.merge import merge
from tests.helpers.sdxl_names import sgm
from tests.helpers.tiny_pipelines import save_sdxl

RANK, ALPHA = 2, 1.0
#: Keys of published files, and the layers of diffusers' UNet that they stand for.
PUBLISHED = {
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
        "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_out.0"
    ),
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks_8_1_transformer_blocks_2_ff_net_0_proj": (
        "down_blocks.2.attentions.1.transformer_blocks.2.ff.net.0.proj"
    ),
    "middle_block_1_transformer_blocks_0_attn2_to_k": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_transformer_blocks_2_ff_net_2": "up_blocks.0.attentions.0.transformer_blocks.2.ff.net.2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `StableDiffusionXLPipeline` with the blocks of SDXL's UNet: three, of two layers each."""
    folder = save_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16, 16), norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=48, transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pipe(pipeline: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(pipeline)


def kohya(
    networks: Mapping[str, nn.Module], name: Callable[[str, str], str], wanted: str = "", seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random file of all layers with ``wanted`` in their names, and their true updates by `{component}.{layer}`."""
    generator = torch.Generator().manual_seed(seed)
    tensors, truth = {}, {}
    for component, network in networks.items():
        for known, layer in adaptable_layers(network, component).items():
            if wanted not in known:
                continue
            weight: Tensor = network.get_submodule(layer.name).weight  # type: ignore[assignment]
            a = torch.randn(RANK, *weight.shape[1:], generator=generator)
            b = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=generator)
            key = name(component, known)
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
            truth[f"{component}.{known}"] = (b.flatten(1).double() @ a.flatten(1).double()) * ALPHA / RANK
    return tensors, truth


def kohyas_name(component: str, layer: str) -> str:
    own = sgm(layer, 2) if component == "unet" else layer
    return {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component] + own.replace(
        ".", "_"
    )


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-4)


def test_published_keys_stand_for_these_layers(pipe: Any, tmp_path: Path) -> None:
    known = {"unet": adaptable_layers(pipe.unet, "unet")}
    for key, layer in PUBLISHED.items():
        tensors = {f"lora_unet_{key}.lora_down.weight": torch.ones(1, 1)}
        assert list(to_one_layout(tensors, tmp_path).factors) == [f"unet.{layer}"]
        assert list(to_one_layout(tensors, tmp_path, known).factors) == [f"unet.{layer}"]


@pytest.mark.parametrize("wanted", ["attn", ""], ids=["attention", "every layer"])
def test_every_layer_is_read_with_and_without_the_network(pipe: Any, tmp_path: Path, wanted: str) -> None:
    tensors, truth = kohya({"unet": pipe.unet}, kohyas_name, wanted)
    save_file(tensors, tmp_path / "x.safetensors")
    for known in (None, {"unet": adaptable_layers(pipe.unet, "unet")}):
        found = read_lora(tmp_path / "x.safetensors", known)
        assert_same({name: layer.delta() for name, layer in found.items()}, truth)


def test_names_are_those_that_diffusers_converters_give(pipe: Any, tmp_path: Path) -> None:
    """They agree on every layer of a whole file; what they drop or refuse besides is why they are not asked first."""
    tensors, truth = kohya({"unet": pipe.unet}, kohyas_name)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=pipe.unet.config)
    assert set(to_one_layout(state, tmp_path, {"unet": adaptable_layers(pipe.unet, "unet")}).factors) == set(truth)
    assert len(alphas) == len(truth)


@pytest.mark.parametrize("known", [True, False], ids=["--pipeline", "without the model"])
def test_a_merge_of_kohyas_files_is_the_sum_of_their_true_updates(pipeline: Path, tmp_path: Path, known: bool) -> None:
    """The UNet and both text encoders; the merged file as stock diffusers loads it."""
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(pipeline)
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts_of(pipe).items()}
    expected: dict[str, Tensor] = {}
    for seed in (1, 2):
        networks = parts_of(pipe) if seed == 1 else {"unet": pipe.unet}
        tensors, truth = kohya(networks, kohyas_name, "" if seed == 1 else "to_", seed)
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        for name, delta in truth.items():
            expected[name] = expected.get(name, 0) + delta
    merge(
        [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)], str(tmp_path / "out"), method="sum",
        pipeline=str(pipeline) if known else None,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path / "out")
    pipe.fuse_lora(components=list(before))
    pipe.unload_lora_weights()
    for component, network in parts_of(pipe).items():
        for known_as, layer in adaptable_layers(network, component).items():
            weight = network.get_submodule(layer.name).weight.detach().flatten(1).double()
            change = weight - before[component][f"{layer.name}.weight"].flatten(1).double()
            wanted = expected.get(f"{component}.{known_as}", torch.zeros_like(change))
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-3)


def test_diffusers_names_in_kohyas_form_are_read_too(pipe: Any, tmp_path: Path) -> None:
    """Other trainers write `lora_unet_down_blocks_...` for SDXL."""
    tensors, truth = kohya({"unet": pipe.unet}, lambda _, layer: f"lora_unet_{layer.replace('.', '_')}")
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same({name: layer.delta() for name, layer in read_lora(tmp_path / "x.safetensors").items()}, truth)


@pytest.mark.parametrize(
    "layer",
    ["input_blocks_3_1_proj_in", "input_blocks_4_0_op", "input_blocks_12_0_op", "output_blocks_0_1_conv",
     "output_blocks_12_0_in_layers_2"],
)  # fmt: skip
def test_blocks_of_no_published_unet_are_refused_without_the_network(tmp_path: Path, layer: str) -> None:
    tensors = {f"lora_unet_{layer}.lora_{s}.weight": torch.ones(2, 2) for s in ("down", "up")}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x\.safetensors.*{layer.split('_', 2)[0]}.*--pipeline"):
        read_lora(tmp_path / "x.safetensors")


def test_files_of_another_family_are_refused_by_their_first_layer(
    pipeline: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """A file for Stable Diffusion 1.5 on SDXL, and the other way round; the pipeline stays as it was."""
    old: Any = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    new: Any = StableDiffusionXLPipeline.from_pretrained(pipeline)
    of_old, _ = kohya({"unet": old.unet}, lambda _, layer: f"lora_unet_{layer.replace('.', '_')}", "attn1")
    of_new, _ = kohya({"unet": new.unet}, kohyas_name, "attn1")
    for tensors, target, folder in ((of_old, new, pipeline), (of_new, old, tiny_pipeline)):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=r"x\.safetensors was made for another backbone"):
            load_lora(target, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=r"x\.safetensors was made for another backbone"):
            merge([str(tmp_path / "x.safetensors")], str(tmp_path / "out"), method="mean", pipeline=str(folder))
        assert not any("lora" in name for name in target.unet.state_dict())
