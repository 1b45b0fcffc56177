"""UNets that were published alone, in the forms in which they are: a folder, whole and partial files, LDM's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm, gather_arms
from lit_safety.drawing.gallery import DrawingSettings, draw_batch
from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt

SETTINGS = DrawingSettings(steps=2, device="cpu")
PROMPTS = [Prompt(text, "clean", "", "", (), False, seed) for seed, text in enumerate(("a car", "a tree"))]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def draw(pipeline: Path, arm: Arm) -> np.ndarray:
    arm.check("x")
    return draw_batch(load_pipeline(pipeline, arm), PROMPTS, SETTINGS, None, arm.guard)


@pytest.fixture(scope="module")
def changed(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `unet/` folder with other weights, as SafetyDPO and Diffusion-DPO publish one, and nothing else."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(pipeline / "unet", folder / "unet")
    generator = torch.Generator().manual_seed(8)
    weights = load_file(folder / "unet" / WEIGHTS)
    other = {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in weights.items()}
    save_file(other, folder / "unet" / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def fused(pipeline: Path, changed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole pipeline with these weights: what an arm with the UNet must draw as."""
    folder = tmp_path_factory.mktemp("fused") / "pipeline"
    shutil.copytree(pipeline, folder)
    shutil.copy(changed / "unet" / WEIGHTS, folder / "unet" / WEIGHTS)
    return folder


def to_ldm(name: str) -> str:
    """The names of Stable Diffusion's own code, of a UNet of two levels of one layer each."""
    tops = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0", "conv_out": "out.2", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
    }  # fmt: skip
    for block in range(2):
        for layer in range(2):
            tops[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{2 * block + layer}.0"
            tops[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{2 * block + layer}.1"
    inner = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    top = next(top for top in sorted(tops, key=len, reverse=True) if name.startswith(f"{top}."))
    rest = name.removeprefix(f"{top}.")
    if ".resnets." in f".{top}":
        first, _, last = rest.partition(".")
        rest = f"{inner[first]}.{last}"
    return f"model.diffusion_model.{tops[top]}.{rest}"


@pytest.mark.parametrize(
    "form", ["folder", "unet folder", "file", "unet. names", "ldm names", "ldm names alone", "half"]
)
def test_a_published_unet_draws_as_the_pipeline_with_it(
    pipeline: Path, changed: Path, fused: Path, tmp_path: Path, form: str
) -> None:
    weights = load_file(changed / "unet" / WEIGHTS)
    renamed: dict[str, Callable[[str], str]] = {
        "file": lambda name: name, "half": lambda name: name, "unet. names": lambda name: f"unet.{name}",
        "ldm names": to_ldm, "ldm names alone": lambda name: to_ldm(name).removeprefix("model.diffusion_model."),
    }  # fmt: skip
    unet = {"folder": changed, "unet folder": changed / "unet"}.get(form, tmp_path / "esd.safetensors")
    if form in renamed:
        given = {renamed[form](name): t.half() if form == "half" else t for name, t in weights.items()}
        save_file(given, unet)
    arm = Arm(unet=str(unet))
    found = draw(pipeline, arm)
    np.testing.assert_allclose(found, draw(fused, Arm()), atol=2e-2 if form == "half" else 1e-5)
    assert np.abs(found - draw(pipeline, Arm())).max() > 0.05
    about = arm.describe(pipeline)
    assert about["unet_tensors"] == {"replaced": len(weights), "of": len(weights)}
    assert len(about["unet_sha256"]) == 64


def test_guards_and_loras_work_on_top(pipeline: Path, changed: Path, fused: Path, adapter: Path) -> None:
    for more in (
        {"adapter": str(adapter)},
        {"guard": SafeLatentDiffusion("max")},
        {"adapter": str(adapter), "scale": 0.5},
    ):
        found = draw(pipeline, Arm(unet=str(changed), **more))
        np.testing.assert_allclose(found, draw(fused, Arm(**more)), atol=1e-4)
        assert np.abs(found - draw(pipeline, Arm(unet=str(changed)))).max() > 1e-3


@pytest.mark.parametrize("part", ["attn2.to_k attn2.to_v", "attn2"])
def test_changed_weights_alone_are_put_in_on_request(pipeline: Path, changed: Path, tmp_path: Path, part: str) -> None:
    """UCE publishes attn2.to_k and attn2.to_v, ESD-x the cross-attention, each by diffusers' names without `unet.`"""
    weights, base = load_file(changed / "unet" / WEIGHTS), load_file(pipeline / "unet" / WEIGHTS)
    own = {name: t for name, t in weights.items() if any(word in name for word in part.split())}
    assert 0 < len(own) < len(weights)
    file = tmp_path / "uce.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in own.items()}, file)
    with pytest.raises(UserError, match=r"uce\.safetensors: holds .* tensors.*unet_partial"):
        load_pipeline(pipeline, Arm(unet=str(file)))
    arm = Arm(unet=str(file), unet_partial=True)
    state = load_pipeline(pipeline, arm).unet.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, own[name].bfloat16().float() if name in own else base[name]), name
    assert arm.describe(pipeline)["unet_tensors"] == {"replaced": len(own), "of": len(base)}


def test_a_pickled_file_is_refused_with_the_line_that_converts_it(
    pipeline: Path, changed: Path, fused: Path, tmp_path: Path
) -> None:
    """ESD's first release: `torch.save` of the UNet's state dict; and others under `state_dict`."""
    weights = load_file(changed / "unet" / WEIGHTS)
    for name, content in (("esd.pt", weights), ("ckpt.bin", {"state_dict": weights}), ("x.safetensors", weights)):
        file = tmp_path / name.partition(".")[0] / name
        file.parent.mkdir()
        torch.save(content, file)
        with pytest.raises(UserError, match=r"arm x: .*python -c") as error:
            Arm(unet=str(file)).check("x")
        exec(str(error.value).split('"')[1], {})
        (new,) = set(file.parent.glob("*.safetensors")) - {file}
        found = draw(pipeline, Arm(unet=str(new)))
        np.testing.assert_allclose(found, draw(fused, Arm()), atol=1e-5)


def wrong(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    name = "conv_in.weight"
    changes: dict[str, dict[str, Tensor]] = {
        "shape": {name: weights[name][:, :2].contiguous()}, "nan": {name: torch.full_like(weights[name], float("nan"))},
        "strange": {"controlnet.weight": torch.zeros(2)},
        "lora": {"conv_in.lora_A.weight": torch.zeros(2, 2)}, "whole numbers": {name: torch.zeros(8, 4, 3, 3).long()},
    }  # fmt: skip
    return weights | changes[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("shape", "conv_in.weight has shape"), ("nan", "not finite"), ("strange", "controlnet.weight"),
        ("lora", "`adapter`"),
        ("whole numbers", "floating-point"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("partial", [False, True])
def test_what_does_not_fit_is_refused(
    pipeline: Path, changed: Path, tmp_path: Path, kind: str, says: str, partial: bool
) -> None:
    file = tmp_path / "odd.safetensors"
    save_file(wrong(load_file(changed / "unet" / WEIGHTS), kind), file)
    with pytest.raises(UserError, match=says) as error:
        load_pipeline(pipeline, Arm(unet=str(file), unet_partial=partial))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_checkpoint_is_a_pipeline_and_no_unet(pipeline: Path, changed: Path, tmp_path: Path) -> None:
    weights = {to_ldm(name): tensor for name, tensor in load_file(changed / "unet" / WEIGHTS).items()}
    save_file(weights | {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"first_stage_model.*from_single_file"):
        load_pipeline(pipeline, Arm(unet=str(tmp_path / "sd.safetensors")))


def test_a_part_in_ldm_s_names_is_refused(pipeline: Path, changed: Path, tmp_path: Path) -> None:
    weights = {to_ldm(name): tensor for name, tensor in load_file(changed / "unet" / WEIGHTS).items()}
    del weights["model.diffusion_model.out.2.bias"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"part\.safetensors: .*207 .*208 .*conv_out\.bias.*unet_partial"):
        load_pipeline(pipeline, Arm(unet=str(tmp_path / "part.safetensors")))


def test_folders_that_are_no_unet_of_this_model(
    pipeline: Path, changed: Path, wide_pipeline: Path, tiny_sd3: Path, tmp_path: Path
) -> None:
    for place, says in (
        (tmp_path, "UNet's folder"), (tmp_path / "absent", "hf download"), (tiny_sd3 / "transformer", "does not load"),
        (wide_pipeline, "cross_attention_dim is 32"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as error:
            draw(pipeline, Arm(unet=str(place)))
        assert str(place) in str(error.value)
    with pytest.raises(UserError, match="StableDiffusion3Pipeline"):
        load_pipeline(tiny_sd3, Arm(unet=str(changed)))
    copy = tmp_path / "unet"
    shutil.copytree(changed / "unet", copy)
    (copy / WEIGHTS).unlink()
    torch.save({}, copy / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="use_safetensors=False"):
        draw(pipeline, Arm(unet=str(copy)))
    with pytest.raises(UserError, match="unet_partial"):
        Arm(unet_partial=True).check("x")


def test_the_command_line_takes_both_keys() -> None:
    words = ["--arms.uce.unet", "uce.safetensors", "--arms.uce.unet_partial", "true"]
    assert json.loads(gather_arms(words)[0].partition("=")[2]) == {"unet": "uce.safetensors", "unet_partial": True}
    with pytest.raises(UserError, match=r"unet_partial.*true or false"):
        gather_arms(["--arms.uce.unet_partial", "maybe"])
