import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lit_safety.adapters.lora import WEIGHTS_NAME, adapter_layers
from lit_safety.adapters.lora_file import METADATA_KEY, read_lora, write_lora
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def attach(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """A backbone with a random PEFT adapter, and that adapter's configuration."""
    backbone = load_backbone(str(folder))
    unet: Any = backbone.denoiser
    unet.add_adapter(LoraConfig(**({"r": 4, "target_modules": ["to_q", "to_out.0"]} | settings)), adapter_name="x")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return backbone, unet.peft_config["x"]


def peft_deltas(unet: torch.nn.Module, component: str = "unet") -> dict[str, torch.Tensor]:
    """What PEFT itself would add to each layer, convolutions flattened."""
    (adapter,) = unet.peft_config  # type: ignore[misc]
    names = {id(module): name for name, module in unet.named_modules()}
    layers: list[Any] = list(adapter_layers(unet))
    # CLIP's layers begin with `text_model.` in older releases of transformers only; here they always do.
    prefix = f"{component}.text_model." if component == "text_encoder" else f"{component}."
    return {
        prefix + names[id(layer)].removeprefix("text_model."): layer.get_delta_weight(adapter)
        .detach()
        .flatten(1)
        .double()
        for layer in layers
        if adapter in layer.scaling
    }


def assert_same(found: dict[str, LowRank], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, layer in found.items():
        torch.testing.assert_close(layer.delta(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": 2, "rank_pattern": {"to_q": 7}, "alpha_pattern": {"attn1.to_out.0": 32}},
        {"lora_alpha": 8, "target_modules": ["conv1", "proj_in", "to_k"]},
    ],
    ids=["alpha", "rank-stabilised", "patterns", "convolutions"],
)
def test_updates_are_read_as_peft_applies_them_and_stock_diffusers_reads_what_is_written(
    tiny_pipeline: Path, tmp_path: Path, settings: dict[str, Any]
):
    backbone, _ = attach(tiny_pipeline, **settings)
    backbone.save_lora(tmp_path, "x")
    layers = read_lora(tmp_path)
    assert_same(layers, peft_deltas(backbone.denoiser))
    (tmp_path / "again").mkdir()
    write_lora(tmp_path / "again" / WEIGHTS_NAME, layers)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(tmp_path / "again")
    assert_same(layers, peft_deltas(pipe.unet))
    assert_same(read_lora(tmp_path / "again"), peft_deltas(pipe.unet))


def test_every_layer_keeps_its_own_rank_and_scale(tiny_pipeline: Path, tmp_path: Path):
    """Three layers, no two of one rank or alpha, one of them named as another's end; a zero update is left out."""
    shapes = {
        "conv_in": (32, 36),
        "mid_block.attentions.0.proj_in": (64, 64),
        ATTENTION: (64, 64),
        "conv_out": (4, 288),
    }
    kernels = {"conv_in": (3, 3), "mid_block.attentions.0.proj_in": (1, 1), "conv_out": (3, 3)}
    layers = {
        f"unet.{name}": LowRank(torch.randn(rank, i), torch.randn(o, rank), 0.1 * (rank + 1), kernels.get(name, ()))
        for rank, (name, (o, i)) in enumerate(shapes.items())
    }
    write_lora(tmp_path / WEIGHTS_NAME, layers)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(tmp_path)
    del layers["unet.conv_in"]  # rank 0
    assert_same(layers, peft_deltas(pipe.unet))
    with pytest.raises(UserError, match="all its layers have rank 0"):
        write_lora(tmp_path / "x.safetensors", {"unet.x": LowRank(torch.zeros(0, 2), torch.zeros(2, 0))})


def test_kohyas_layout_is_read_with_its_alphas(tiny_pipeline: Path, tmp_path: Path):
    backbone, _ = attach(tiny_pipeline, target_modules=["to_q", "to_out.0", "proj_in", "ff.net.2"])
    backbone.save_lora(tmp_path, "x")
    kohya = convert_state_dict_to_kohya(load_file(tmp_path / WEIGHTS_NAME))
    for key in kohya:
        if key.endswith(".alpha"):
            kohya[key] = torch.tensor(1.0 if "to_q" in key else 2.0)
    file = tmp_path / "kohya.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in kohya.items()}, file)
    expected = {
        name: delta * ((1.0 if name.endswith("to_q") else 2.0) / 4) / 2.0  # alpha / r; PEFT's own alpha was 8, so 2
        for name, delta in peft_deltas(backbone.denoiser).items()
    }
    assert_same(read_lora(file), expected)


def kohya_of(names: dict[str, torch.nn.Module], rank: int, alpha: float) -> dict[str, torch.Tensor]:
    """A random file in kohya's layout for linear layers by their names there."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, module in names.items():
        out, inputs = module.weight.flatten(1).shape  # type: ignore[operator]
        found[f"{name}.lora_down.weight"] = 0.2 * torch.randn(rank, inputs, generator=generator)
        found[f"{name}.lora_up.weight"] = 0.2 * torch.randn(out, rank, generator=generator)
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def test_kohyas_file_of_unet_and_text_encoder_is_read_as_stock_diffusers_reads_it(tiny_pipeline: Path, tmp_path: Path):
    """What its trainer writes by default. `to_q_lora` is `to_q` in the UNet and `q_proj` in the text encoder."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    of_unet = {n: m for n, m in pipe.unet.named_modules() if n.endswith(("to_q", "to_out.0", "ff.net.2"))}
    of_text = {n: m for n, m in pipe.text_encoder.named_modules() if n.endswith(("q_proj", "out_proj", "fc1"))}
    layers = {f"lora_unet_{name.replace('.', '_')}": module for name, module in of_unet.items()}
    for name, module in of_text.items():
        layers[f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}"] = module
    save_file(kohya_of(layers, 4, 2.0), tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    expected = peft_deltas(pipe.unet) | peft_deltas(pipe.text_encoder, "text_encoder")
    assert len(expected) == len(layers)
    found = read_lora(tmp_path / "kohya.safetensors")
    assert_same(found, expected)
    assert {layer.scale for layer in found.values()} == {0.5}
    (tmp_path / "again").mkdir()
    write_lora(tmp_path / "again" / WEIGHTS_NAME, found)
    again = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    again.load_lora_weights(tmp_path / "again")
    assert_same(found, peft_deltas(again.unet) | peft_deltas(again.text_encoder, "text_encoder"))


def test_text_encoders_layers_are_recognised_alike(tmp_path: Path):
    """By both releases of transformers, so that two experts' updates of one layer meet in one."""
    for number, prefix in enumerate(("text_model.", "")):
        layer = f"text_encoder.{prefix}encoder.layers.0.self_attn.q_proj"
        pair = {f"{layer}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
        save_file(pair, tmp_path / f"{number}.safetensors")
    names = [set(read_lora(tmp_path / f"{number}.safetensors")) for number in range(2)]
    assert names[0] == names[1] == {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj"}


def test_pefts_own_folder_is_read(tiny_pipeline: Path, tmp_path: Path):
    backbone, config = attach(tiny_pipeline, lora_alpha=6, use_rslora=True)
    config.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(backbone.denoiser, adapter_name="x")
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    assert_same(read_lora(tmp_path), peft_deltas(backbone.denoiser))


@pytest.mark.parametrize(
    ("layers", "component"),
    [(["transformer_blocks.0.attn.to_q", "x_embedder"], "transformer"), (["mid_block.attentions.0.proj_in"], "unet"),
     (["text_model.encoder.x.q_proj"], None), (["mid_block.attentions.0.proj_in", "x_embedder"], None)],
)  # fmt: skip
def test_a_peft_folder_adapts_what_its_layers_belong_to(tmp_path: Path, layers: list[str], component: str | None):
    pair = {f"{layer}.lora_{side}.weight": torch.ones(2, 2) for layer in layers for side in "AB"}
    save_file({f"base_model.model.{key}": value for key, value in pair.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    if component is None:
        with pytest.raises(UserError, match="UNets"):
            read_lora(tmp_path)
        return
    found = read_lora(tmp_path)
    assert set(found) == {f"{component}.{layer}" for layer in layers}
    assert {layer.scale for layer in found.values()} == {2.0}
    assert {layer.scale for layer in read_lora(tmp_path / "adapter_model.safetensors").values()} == {2.0}
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json next to it"):
        read_lora(tmp_path)


def test_text_encoders_are_read_and_written_next_to_the_denoiser(tiny_pipeline: Path, tmp_path: Path):
    """In diffusers' older spelling, which its text encoders still have."""
    backbone, config = attach(tiny_pipeline, lora_alpha=2)
    encoder: Any = backbone.text_encoder
    own = LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "out_proj"], init_lora_weights=False)
    encoder.add_adapter(own, adapter_name="x")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(backbone.denoiser, adapter_name="x"),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(encoder, adapter_name="x")),
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=own.to_dict(),
    )
    assert any("lora_linear_layer" in key for key in load_file(tmp_path / WEIGHTS_NAME))
    expected = peft_deltas(backbone.denoiser) | peft_deltas(encoder, "text_encoder")
    layers = read_lora(tmp_path)
    assert_same(layers, expected)
    (tmp_path / "again").mkdir()
    write_lora(tmp_path / "again" / WEIGHTS_NAME, layers)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(tmp_path / "again")
    assert_same(layers, peft_deltas(pipe.unet) | peft_deltas(pipe.text_encoder, "text_encoder"))


def test_a_file_that_says_nothing_of_alpha_has_alpha_equal_to_its_rank(tmp_path: Path):
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    save_file({f"unet.{ATTENTION}.lora_A.weight": a, f"unet.{ATTENTION}.lora_B.weight": b}, tmp_path / "x.safetensors")
    assert read_lora(tmp_path)[f"unet.{ATTENTION}"].scale == 1.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias"), ({"bias": "lora_only"}, "biases"),
     ({"init_lora_weights": "pissa"}, "pissa")],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused_by_name(
    tiny_pipeline: Path, tmp_path: Path, settings: dict[str, Any], named: str
):
    backbone, _ = attach(tiny_pipeline, **settings)
    backbone.save_lora(tmp_path, "x")
    with pytest.raises(UserError, match=named):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("key", "named"),
    [(f"unet.{ATTENTION}.lokr_w1", "LoKr"), ("lora_unet_x.hada_w1_a", "LoHa"), ("lora_unet_x.dora_scale", "DoRA"),
     ("lora_unet_x.lora_mid.weight", "LoCon"), ("unet.x.lora_A.weight", "lora_B.weight: unet.x"),
     ("lora_unet_input_blocks_3_1_proj_in.lora_down.weight", "SDXL"), ("unet.x.weight", "unet.x.weight|layout"),
     ("unet.x.lora_diag", "KaSA"), ("unet.x.alpha", "unet.x.alpha does not belong")],
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path: Path, key: str, named: str):
    save_file({key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=named):
        read_lora(tmp_path / "x.safetensors")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path):
    pair = {"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.tensor([[float("nan")]])}
    save_file(pair, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"lora_B\.weight holds numbers that are not finite"):
        read_lora(tmp_path)


def pair_of(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"unet.{ATTENTION}.lora_A.weight": a, f"unet.{ATTENTION}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("a", "b"),
    [((4,), (3,)), ((), ()), ((0, 4), (3, 0)), ((2, 4), (3, 5)), ((2, 4, 3), (3, 2, 1)), ((2, 4, 3, 3), (3, 2))],
)
def test_factors_that_are_no_product_are_refused_by_their_shapes(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]
):
    save_file(pair_of(torch.ones(a), torch.ones(b)), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"{ATTENTION}: factors of shape .* are not a LoRA"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"lora_alpha": "x"}, "alpha"), ({"lora_alpha": None}, "alpha"),
     ({"lora_alpha": 4, "alpha_pattern": ["x"]}, "alpha"), ({"lora_alpha": float("nan")}, "its alpha is nan"),
     ({"lora_alpha": 4, "alpha_pattern": {"(((": 2}}, "alpha"),
     ({"lora_alpha": 4, "kasa_config": {"beta": 1}}, "kasa_config is set"),
     ({"lora_alpha": 4, "use_bdlora": {"x": 1}}, "use_bdlora is set")],
)  # fmt: skip
def test_settings_that_tell_no_plain_update_are_named(tmp_path: Path, settings: dict[str, Any], named: str):
    metadata = {METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    save_file(pair_of(torch.ones(2, 4), torch.ones(3, 2)), tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=named):
        read_lora(tmp_path)


def test_a_pattern_that_never_ends_is_refused_in_seconds(tmp_path: Path):
    """Patterns are the file's, and so are the names that they are tried on."""
    pair = {f"transformer.x_embedder.{'a' * 60}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    metadata = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {r"((a|aa|aaa)+)+\d": 2}}
    save_file(pair, tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(UserError, match="alpha_pattern takes too long"):
        read_lora(tmp_path)


def test_an_alpha_that_tensor_and_settings_tell_differently_is_refused(tmp_path: Path):
    tensors = pair_of(torch.ones(2, 4), torch.ones(3, 2)) | {f"unet.{ATTENTION}.alpha": torch.tensor(2.0)}
    for alpha in (2, 4):
        save_file(tensors, tmp_path / "x.safetensors", {METADATA_KEY: json.dumps({"unet.lora_alpha": alpha})})
        if alpha == 2:
            assert read_lora(tmp_path)[f"unet.{ATTENTION}"].scale == 1.0
            continue
        with pytest.raises(UserError, match=r"alpha is 2 .* 4"):
            read_lora(tmp_path)


def test_a_folder_of_two_adapters_is_refused(tiny_pipeline: Path, tmp_path: Path):
    backbone, config = attach(tiny_pipeline)
    backbone.save_lora(tmp_path, "x")
    config.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_NAME), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"{WEIGHTS_NAME}: name the file"):
        read_lora(tmp_path)
    assert read_lora(tmp_path / WEIGHTS_NAME)


def test_whole_numbers_are_no_factors(tmp_path: Path):
    save_file(
        {k: v.to(torch.int8) for k, v in pair_of(torch.ones(2, 4), torch.ones(3, 2)).items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(UserError, match="floating-point numbers"):
        read_lora(tmp_path)


def test_eight_bit_numbers_are_read(tmp_path: Path):
    pair = pair_of(torch.tensor([[1.5, -2.0]]), torch.tensor([[0.5]]))
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in pair.items()}, tmp_path / "x.safetensors")
    assert read_lora(tmp_path)[f"unet.{ATTENTION}"].delta().tolist() == [[0.75, -1.0]]


def test_kohyas_file_of_another_network_is_refused(tmp_path: Path):
    """Underscores of layers that diffusers' converter does not know would become dots."""
    layers = {"lora_unet_double_blocks_0_img_attn_qkv": torch.nn.Linear(4, 4)}
    save_file(kohya_of(layers, 2, 1.0), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="lora_unet_double_blocks_0_img_attn_qkv"):
        read_lora(tmp_path)


CONVOLUTION = "down_blocks.0.resnets.0.conv1"


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("layer", "a", "b"),
    [
        (ATTENTION, (32, 4), (4, 32)),  # both factors turned
        (CONVOLUTION, (4, 72), (8, 4)),  # kernels laid out as a linear layer
        (CONVOLUTION, (4, 8, 1, 1), (8, 4, 1, 1)),  # the kernels are lost
        (ATTENTION, (4, 8, 3, 3), (8, 4, 1, 1)),  # a linear layer has none
    ],
)
def test_factors_that_no_layer_of_the_name_has_are_refused_without_the_model(
    tmp_path: Path, layer: str, a: tuple[int, ...], b: tuple[int, ...]
):
    file = written(
        tmp_path, {f"unet.{layer}.lora_A.weight": torch.rand(a), f"unet.{layer}.lora_B.weight": torch.rand(b)}
    )
    with pytest.raises(UserError, match=layer):
        read_lora(file)


def test_convolutions_and_small_layers_of_a_high_rank_are_read_without_the_model(tmp_path: Path):
    shapes = {
        CONVOLUTION: ((4, 8, 3, 3), (8, 4, 1, 1)),
        "conv_out": ((16, 32, 3, 3), (4, 16, 1, 1)),
        "down_blocks.1.attentions.0.proj_in": ((4, 8, 1, 1), (8, 4, 1, 1)),
        "down_blocks.0.resnets.0.conv_shortcut": ((4, 8, 1, 1), (8, 4, 1, 1)),
    }
    tensors = {
        f"unet.{layer}.lora_{side}.weight": torch.rand(shape)
        for layer, both in shapes.items()
        for side, shape in zip("AB", both, strict=True)
    }
    assert {name.removeprefix("unet.") for name in read_lora(written(tmp_path, tensors))} == set(shapes)


def test_halves_of_two_adapters_are_no_pair(tmp_path: Path):
    a, b = torch.rand(4, 8), torch.rand(8, 4)
    file = written(tmp_path, {f"unet.{ATTENTION}.lora_A.x.weight": a, f"unet.{ATTENTION}.lora_B.y.weight": b})
    with pytest.raises(UserError, match="x and y"):
        read_lora(file)


def test_an_alpha_of_0_is_refused_where_programs_differ_on_it(tmp_path: Path):
    name = f"lora_unet_{ATTENTION.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": torch.rand(4, 8), f"{name}.lora_up.weight": torch.rand(8, 4)}
    assert (
        read_lora(written(tmp_path, tensors | {f"{name}.alpha": torch.tensor(-4.0)}))[f"unet.{ATTENTION}"].scale == -1
    )
    with pytest.raises(UserError, match="alpha is 0"):
        read_lora(written(tmp_path, tensors | {f"{name}.alpha": torch.tensor(0.0)}))


def test_the_prefix_of_whole_checkpoints_is_no_whole_difference(tmp_path: Path):
    a, b = torch.rand(4, 8), torch.rand(8, 4)
    name = f"model.diffusion_model.{ATTENTION}"
    (found,) = read_lora(written(tmp_path, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})).items()
    assert found[0] == f"unet.{ATTENTION}"
    torch.testing.assert_close(found[1].delta(), (b @ a).double())
    with pytest.raises(UserError, match="whole weight differences"):
        read_lora(written(tmp_path, {f"{name}.diff": a}))
