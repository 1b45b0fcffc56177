"""LoRA files of other tools: the network holds the true update, or the file is refused."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn

from lit_safety.adapters import LoRA, load_lora
from lit_safety.adapters.layer_names import adaptable_layers
from lit_safety.adapters.load_lora import fuse_loras
from lit_safety.adapters.lora_file import METADATA_KEY, read_lora
from lit_safety.adapters.start_from import read_adapter
from lit_safety.core.errors import UserError
from tests.helpers.sdxl_names import sgm

Tensors = dict[str, Tensor]
PARTS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ENCODER = ("q_proj", "out_proj", "fc1")
RANK, ALPHA = 3, 6.0


def save_file(tensors: Tensors, file: Path, metadata: dict[str, str] | None = None) -> None:
    save_tensors({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file, metadata)


def layers(network: nn.Module, *endings: str) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if name.endswith(endings)}


def pairs(found: Mapping[str, Any], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random A and B for linear layers and convolutions by their names."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in found.items():
        out, *inside = module.weight.shape
        ones = [1] * (len(inside) - 1)
        made[name] = tuple(0.2 * torch.randn(*s, generator=draw) for s in ((RANK, *inside), (out, RANK, *ones)))
    return made


def delta(pair: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    a, b = (factor.double().flatten(1) for factor in pair)
    return b @ a * scale


def truth(made: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0, part: str = "unet") -> Tensors:
    return {f"{part}.{name}": delta(pair, scale) for name, pair in made.items()}


def weights(pipe: Any) -> Tensors:
    parts = {part: getattr(pipe, part) for part in PARTS if getattr(pipe, part, None) is not None}
    return {
        f"{part}.{name}": module.weight.detach().double().flatten(1)
        for part, network in parts.items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def loaded(pipe: Any, file: Path) -> Tensors:
    """What loading and folding in has added to the pipeline's weights, where it is not zero."""
    before = weights(pipe)
    load_lora(pipe, file)
    fuse_loras(pipe)
    pipe.unload_lora_weights()
    after = weights(pipe)
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Whether updates are equal; CLIP's layers have two spellings."""
    told = [{n.replace(".text_model.", "."): value for n, value in one.items()} for one in (found, expected)]
    assert told[0].keys() == told[1].keys()
    for name, value in told[1].items():
        torch.testing.assert_close(told[0][name], value, rtol=1e-4, atol=1e-5)


def dotted(made: Mapping[str, tuple[Tensor, Tensor]], prefix: str, down: str, up: str) -> Tensors:
    return {
        f"{prefix}{n}{end}": factor for n, pair in made.items() for end, factor in zip((down, up), pair, strict=True)
    }


def kohya(
    made: Mapping[str, tuple[Tensor, Tensor]], prefix: str = "lora_unet_", alpha: float | None = ALPHA
) -> Tensors:
    found = dotted({n.replace(".", "_"): p for n, p in made.items()}, prefix, ".lora_down.weight", ".lora_up.weight")
    if alpha is not None:
        found |= {f"{prefix}{name.replace('.', '_')}.alpha": torch.tensor(alpha) for name in made}
    return found


def processors(made: Mapping[str, tuple[Tensor, Tensor]], prefix: str = "unet.") -> Tensors:
    """diffusers' names of 2023."""
    old = {}
    for name, pair in made.items():
        block, _, short = name.removesuffix(".0").rpartition(".")
        old[f"{block}.processor.{short}"] = pair
    return dotted(old, prefix, "_lora.down.weight", "_lora.up.weight")


@cache
def stored(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


def fresh(folder: Path) -> Any:
    """A pipeline without any loaded adapter."""
    return deepcopy(stored(folder))


@pytest.fixture
def pipe(tiny_pipeline: Path) -> Any:
    return fresh(tiny_pipeline)


PREFIXES = {
    "an adapter's name": ("unet.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT's prefix": ("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "both prefixes": ("unet.base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "PEFT's first": ("base_model.model.unet.", ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI's": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
    "compiled": ("unet._orig_mod.", ".lora_A.weight", ".lora_B.weight"),
    "dots": ("unet.", ".lora.down.weight", ".lora.up.weight"),
    "down and up": ("unet.", ".lora_down.weight", ".lora_up.weight"),
    "none": ("", ".lora_A.weight", ".lora_B.weight"),
}


@pytest.mark.parametrize("layout", PREFIXES)
def test_every_prefix_and_suffix_lands_on_the_same_layers(pipe: Any, tmp_path: Path, layout: str):
    """With the network at hand, without it, and as weights to start from."""
    made = pairs(layers(pipe.unet, *ATTENTION))
    file = tmp_path / "x.safetensors"
    save_file(dotted(made, *PREFIXES[layout]), file)
    expected = truth(made)
    same({name: layer.delta() for name, layer in read_lora(file).items()}, expected)
    begun = read_adapter(file, LoRA(rank=RANK), "policy", {"unet": adaptable_layers(pipe.unet, "unet")})
    assert {name.split(".lora_")[0] for name in begun} == set(made)
    same(loaded(pipe, file), expected)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_old_attention_processors_are_read(pipe: Any, tmp_path: Path, prefix: str):
    made = pairs(layers(pipe.unet, *ATTENTION))
    save_file(processors(made, prefix), tmp_path / "x.safetensors")
    same({name: one.delta() for name, one in read_lora(tmp_path / "x.safetensors").items()}, truth(made))
    same(loaded(pipe, tmp_path / "x.safetensors"), truth(made))


@pytest.mark.parametrize("alpha", [ALPHA, None])
@pytest.mark.parametrize("kind", ["attention", "convolutions", "top"])
def test_kohyas_unet_layers_keep_their_alpha(pipe: Any, tmp_path: Path, kind: str, alpha: float | None):
    endings = {
        "attention": ATTENTION,
        "convolutions": (".conv1", "conv_shortcut", "time_emb_proj", "samplers.0.conv", "proj_in", "ff.net.0.proj"),
        "top": ("conv_in", "conv_out", "time_embedding.linear_1"),
    }
    made = pairs(layers(pipe.unet, *endings[kind]))
    save_file(kohya(made, alpha=alpha), tmp_path / "x.safetensors")
    expected = truth(made, 1.0 if alpha is None else alpha / RANK)
    same({name: layer.delta() for name, layer in read_lora(tmp_path / "x.safetensors").items()}, expected)
    same(loaded(pipe, tmp_path / "x.safetensors"), expected)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
@pytest.mark.parametrize("with_unet", [True, False])
def test_text_encoders_parts_are_loaded_and_folded_in(pipe: Any, tmp_path: Path, prefix: str, with_unet: bool):
    of_text = pairs(layers(pipe.text_encoder, *ENCODER), seed=1)
    of_unet = pairs(layers(pipe.unet, "to_q")) if with_unet else {}
    named = {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in of_text.items()}
    save_file(kohya(named, prefix) | kohya(of_unet), tmp_path / "x.safetensors")
    expected = truth(of_text, ALPHA / RANK, "text_encoder") | truth(of_unet, ALPHA / RANK)
    same(loaded(pipe, tmp_path / "x.safetensors"), expected)
    with pytest.raises(UserError, match=r"text_encoder\.text_model\.encoder\.layers\.0"):  # a fit freezes them
        read_adapter(
            tmp_path / "x.safetensors", LoRA(rank=RANK), "policy", {"unet": adaptable_layers(pipe.unet, "unet")}
        )


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_sdxls_published_names_are_recognised_with_the_network(tiny_xl_pipeline: Path, tmp_path: Path, prefix: str):
    pipe = fresh(tiny_xl_pipeline)
    inside = (
        *ATTENTION,
        "proj_in",
        "ff.net.2",
        ".conv1",
        ".conv2",
        "time_emb_proj",
        "conv_shortcut",
        "samplers.0.conv",
    )
    endings = (*inside, "conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2")
    made = pairs(layers(pipe.unet, *endings))
    named = {sgm(name, depth=1): pair for name, pair in made.items()}
    assert len(named) == len(made)
    file = tmp_path / "x.safetensors"
    if prefix == "lora_unet_":
        save_file(kohya(named), file)
    else:
        alphas = {f"{prefix}{name}.alpha": torch.tensor(ALPHA) for name in named}
        save_file(dotted(named, prefix, ".lora_down.weight", ".lora_up.weight") | alphas, file)
    with pytest.raises(UserError, match="SDXL"):
        read_lora(file)
    same(loaded(pipe, file), truth(made, ALPHA / RANK))


def test_sdxls_middle_block_is_recognised_without_the_network(tiny_xl_pipeline: Path, tmp_path: Path):
    """Otherwise it would become `unet.mid_block.1...`, a layer that does not exist."""
    unet = fresh(tiny_xl_pipeline).unet
    made = pairs({n: m for n, m in layers(unet, *ATTENTION, "proj_in", ".conv1").items() if n.startswith("mid_block")})
    save_file(kohya({sgm(name, 1): pair for name, pair in made.items()}), tmp_path / "x.safetensors")
    same({n: one.delta() for n, one in read_lora(tmp_path / "x.safetensors").items()}, truth(made, ALPHA / RANK))


def test_both_text_encoders_of_sdxl_get_their_parts(tiny_xl_pipeline: Path, tmp_path: Path):
    pipe = fresh(tiny_xl_pipeline)
    tensors, expected = {}, {}
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        made = pairs(layers(getattr(pipe, part), *ENCODER), seed=number)
        named = {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in made.items()}
        tensors |= kohya(named, f"lora_te{number}_")
        expected |= truth(made, ALPHA / RANK, part)
    save_file(tensors, tmp_path / "x.safetensors")
    same(loaded(pipe, tmp_path / "x.safetensors"), expected)


# ---- files of which a part has no place


def bigger(made: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """As of a UNet with one more block."""
    more = (torch.ones(RANK, 64), torch.ones(64, RANK))
    return {**made, **{f"down_blocks.7.attentions.0.transformer_blocks.0.attn1.{q}": more for q in ("to_q", "to_v")}}


@pytest.mark.parametrize("layout", ["kohya", "processors", "diffusers", "comfy"])
def test_a_layer_without_a_place_refuses_the_whole_file(pipe: Any, tmp_path: Path, layout: str):
    made = bigger(pairs(layers(pipe.unet, *ATTENTION)))
    written = {
        "kohya": kohya(made),
        "processors": processors(made),
        "diffusers": dotted(made, "unet.", ".lora_A.weight", ".lora_B.weight"),
        "comfy": dotted(made, "diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
    }
    file = tmp_path / "x.safetensors"
    save_file(written[layout], file)
    with pytest.raises(UserError, match=rf"2 of {len(made)} layers .*down_blocks\.7.*attn1\.to_q") as said:
        load_lora(pipe, file)
    assert str(file) in str(said.value)
    assert "\n" not in str(said.value)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    with pytest.raises(UserError, match=r"start_from.*down_blocks\.7"):
        read_adapter(file, LoRA(rank=RANK), "policy", {"unet": adaptable_layers(pipe.unet, "unet")})


@pytest.mark.parametrize("part", ["text_encoder_2", "text_encoder", "transformer"])
def test_a_part_that_the_pipeline_does_not_have_refuses_the_whole_file(pipe: Any, tmp_path: Path, part: str):
    made = pairs(layers(pipe.unet, "to_q"))
    extra = (torch.ones(RANK, 64), torch.ones(64, RANK))
    layer = "transformer_blocks.0.attn.to_q" if part == "transformer" else "encoder.layers.40.self_attn.q_proj"
    tensors = dotted(made, "unet.", ".lora_A.weight", ".lora_B.weight")
    save_file(
        tensors | dotted({layer: extra}, f"{part}.", ".lora_A.weight", ".lora_B.weight"), tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match=rf"1 of {len(made) + 1} layers .*{part}\..*{layer}"):
        load_lora(pipe, tmp_path / "x.safetensors")


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("count", [3, None])
def test_half_pairs_are_refused(pipe: Any, tmp_path: Path, side: str, count: int | None):
    """Some layers, or all: a LoRA that holds A alone."""
    made = pairs(layers(pipe.unet, *ATTENTION))
    tensors = dotted(made, "unet.", ".lora_A.weight", ".lora_B.weight")
    gone = sorted(key for key in tensors if f".lora_{side}." in key)[:count]
    save_file({key: tensor for key, tensor in tensors.items() if key not in gone}, tmp_path / "x.safetensors")
    for read in (lambda f: load_lora(pipe, f), read_lora):
        with pytest.raises(UserError, match=rf"{len(gone)} of {len(made)} layers lack") as said:
            read(tmp_path / "x.safetensors")
        assert gone[0].split(".lora_")[0] in str(said.value)


def test_what_is_no_part_of_a_lora_is_named(pipe: Any, tmp_path: Path):
    made = dotted(pairs(layers(pipe.unet, "to_q")), "unet.", ".lora_A.weight", ".lora_B.weight")
    save_file(made | {"unet.conv_in.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"unet\.conv_in\.weight"):
        load_lora(pipe, tmp_path / "x.safetensors")


def test_two_adapters_in_one_file_are_refused(pipe: Any, tmp_path: Path):
    made = pairs(layers(pipe.unet, "to_q"))
    one, two = (dotted(made, "unet.", f".lora_A.{n}.weight", f".lora_B.{n}.weight") for n in ("one", "two"))
    save_file(one | two, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="as of two adapters"):
        load_lora(pipe, tmp_path / "x.safetensors")


def test_a_name_that_is_taken_is_refused_and_the_first_adapter_stays(pipe: Any, tmp_path: Path):
    made = pairs(layers(pipe.unet, "to_q"))
    save_file(dotted(made, "unet.", ".lora_A.weight", ".lora_B.weight"), tmp_path / "x.safetensors")
    load_lora(pipe, tmp_path / "x.safetensors", name="style")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(UserError, match="style"):
        load_lora(pipe, tmp_path / "x.safetensors", name="style")
    assert before.keys() == pipe.unet.state_dict().keys()
    load_lora(pipe, tmp_path / "x.safetensors", name="another", scale=0.5)
    assert pipe.get_list_adapters() == {"unet": ["style", "another"]}


# ---- settings


def random_adapter(pipe: Any, **settings: Any) -> tuple[LoraConfig, Tensors, Tensors]:
    """PEFT's own random adapter of the UNet: its settings, its tensors, and what it adds to each layer."""
    config = LoraConfig(**({"r": 4, "target_modules": ["to_q", "to_v"], "init_lora_weights": False} | settings))
    pipe.unet.add_adapter(config, adapter_name="x")
    added = {
        f"unet.{name}": module.get_delta_weight("x").detach().double().flatten(1)
        for name, module in pipe.unet.named_modules()
        if "x" in getattr(module, "lora_A", {})
    }
    state = {
        key: value.clone().contiguous() for key, value in get_peft_model_state_dict(pipe.unet, adapter_name="x").items()
    }
    return config, state, added


PATTERNS = {
    "lora_alpha": 32,
    "use_rslora": True,
    "rank_pattern": {"mid_block.*to_q": 2},
    "alpha_pattern": {"mid_block.*to_q": 3},
}


@pytest.mark.parametrize("kind", ["folder", "weights", "single network"])
def test_pefts_folder_and_a_networks_own_file_keep_patterns_and_rank_stabilisation(
    pipe: Any, tiny_pipeline: Path, tmp_path: Path, kind: str
):
    config, state, expected = random_adapter(pipe, **PATTERNS)
    path = tmp_path
    if kind == "single network":
        pipe.unet.save_lora_adapter(tmp_path, adapter_name="x")
    else:
        config.save_pretrained(tmp_path)
        path = tmp_path if kind == "folder" else tmp_path / "adapter_model.safetensors"
        save_file({f"base_model.model.{key}": t for key, t in state.items()}, tmp_path / "adapter_model.safetensors")
    same({name: layer.delta() for name, layer in read_lora(path).items()}, expected)
    same(loaded(fresh(tiny_pipeline), path), expected)


def test_dora_is_loaded_by_stock_diffusers_whole_or_refused(pipe: Any, tiny_pipeline: Path, tmp_path: Path):
    config, state, _ = random_adapter(pipe, use_dora=True)
    named = {f"unet.{key}": value for key, value in state.items()}
    about = {
        METADATA_KEY: json.dumps(
            {f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        )
    }
    save_file(named, tmp_path / "x.safetensors", about)
    own, stock = fresh(tiny_pipeline), fresh(tiny_pipeline)
    stock.load_lora_weights(tmp_path, weight_name="x.safetensors")
    load_lora(own, tmp_path / "x.safetensors")
    given = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 5, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        found, expected = (one.unet(*given).sample for one in (own, stock))
    assert torch.equal(found, expected)
    extra = dotted(
        {"down_blocks.7.x": (torch.ones(4, 2), torch.ones(2, 4))}, "unet.", ".lora_A.weight", ".lora_B.weight"
    )
    save_file(named | extra, tmp_path / "x.safetensors", about)
    refusing = fresh(tiny_pipeline)
    with pytest.raises(UserError, match=r"DoRA.*tensors"):
        load_lora(refusing, tmp_path / "x.safetensors")
    assert not any("lora" in key for key in refusing.unet.state_dict())
    kohyas = kohya(pairs(layers(refusing.unet, "to_q")))
    kohyas |= {key.replace(".alpha", ".dora_scale"): torch.ones(4, 1) for key in list(kohyas) if key.endswith(".alpha")}
    save_file(kohyas, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="DoRA"):
        load_lora(refusing, tmp_path / "x.safetensors")


# ---- without the network


@pytest.mark.parametrize(
    "layer",
    [
        "mid_block.1.transformer_blocks.0.attn1.to_q",
        "model.down_blocks.0.resnets.0.conv1",
        "mid_block.attentions.0.to.q",
        "down_blocks.resnets.0.conv1",
        "encoder.layers.0.self_attn.q_proj",
    ],
)
def test_a_layer_that_no_unet_can_have_is_refused_without_the_network(tmp_path: Path, layer: str):
    pair = {layer: (torch.ones(RANK, 4), torch.ones(4, RANK))}
    save_file(dotted(pair, "unet.", ".lora_A.weight", ".lora_B.weight"), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"unet\..*{layer}"):
        read_lora(tmp_path / "x.safetensors")


def test_every_layer_of_both_families_can_exist(pipe: Any, tiny_xl_pipeline: Path, tmp_path: Path):
    for one in (pipe, fresh(tiny_xl_pipeline)):
        tensors: Tensors = {}
        for part in PARTS:
            if (network := getattr(one, part, None)) is not None:
                found = {
                    place.name: network.get_submodule(place.name) for place in adaptable_layers(network, part).values()
                }
                if part != "unet":
                    found = {n: m for n, m in found.items() if "position" not in n}
                tensors |= dotted(pairs(found), f"{part}.", ".lora_A.weight", ".lora_B.weight")
        save_file(tensors, tmp_path / "x.safetensors")
        assert len(read_lora(tmp_path / "x.safetensors")) == len(tensors) // 2


def test_own_files_load_bit_by_bit_as_by_stock_diffusers(
    pipe: Any, tiny_pipeline: Path, tmp_path: Path, make_file: Callable[[Path], None]
):
    make_file(tmp_path)
    stock = fresh(tiny_pipeline)
    stock.load_lora_weights(tmp_path)
    stock.fuse_lora()
    load_lora(pipe, tmp_path)
    fuse_loras(pipe)
    before = fresh(tiny_pipeline).unet.state_dict()
    assert any(not torch.equal(value, before[key.replace(".base_layer", "")]) for key, value in base_of(pipe).items())
    for key, value in base_of(stock).items():
        assert torch.equal(base_of(pipe)[key], value), key


def base_of(pipe: Any) -> Tensors:
    return {key: value for key, value in pipe.unet.state_dict().items() if "lora_" not in key}


@pytest.fixture
def make_file(tiny_pipeline: Path) -> Callable[[Path], None]:
    from lit_safety.backbones import load_backbone

    def make(folder: Path) -> None:
        backbone = load_backbone(str(tiny_pipeline))
        for parameter in LoRA(rank=4, alpha=7).attach(backbone.denoiser, "policy"):
            parameter.data.normal_(0, 0.2)
        backbone.save_lora(folder, "policy")
        assert load_file(folder / "pytorch_lora_weights.safetensors")

    return make
