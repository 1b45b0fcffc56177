"""Pipelines as people have them on disk: training, drawing and caching give one answer, and it is the right one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_safety.adapters.start_from import read_denoiser
from lit_safety.backbones import load_backbone
from lit_safety.backbones.fingerprint import part_hashes
from lit_safety.backbones.hub import _needed
from lit_safety.backbones.parts import Parts
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256 as file_fingerprint
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.pipelines import arm_pipeline, load_pipeline, local_pipeline

NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
Edit = Callable[[Path], object]


def renamed(parts: tuple[str, ...], variant: str) -> Edit:
    def edit(folder: Path) -> None:
        for part in parts:
            file = folder / part / f"{NAMES[part]}.safetensors"
            file.rename(file.with_name(f"{NAMES[part]}.{variant}.safetensors"))

    return edit


def half_beside(folder: Path) -> None:
    """Other numbers in half precision next to the full ones, in one file and in several."""
    other = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).half()
    other.save_pretrained(folder / "unet", variant="fp16", max_shard_size="100KB")
    for part in ("vae", "text_encoder"):
        file = folder / part / f"{NAMES[part]}.safetensors"
        content = {name: torch.zeros_like(value).half() for name, value in load_file(file).items()}
        save_file(content, file.with_name(f"{NAMES[part]}.fp16.safetensors"))


def in_pieces(variant: str | None) -> Edit:
    def edit(folder: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.save_pretrained(folder / "unet", variant=variant, max_shard_size="100KB")

    return edit


def index(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "model_index.json"
        stated = {name: value for name, value in json.loads(file.read_text()).items() if value != [None, None]}
        file.write_text(json.dumps(stated | changes))

    return edit


def of_macos(folder: Path) -> None:
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (folder / ".DS_Store").write_bytes(b"\x00")


def with_mark(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def linked(folder: Path) -> None:
    """As the hub's cache has it."""
    blobs = folder.parent / f"{folder.name}-blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))


CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "requires_safety_checker": True,
}
READ: dict[str, Edit] = {
    "UNet alone in fp16": renamed(("unet",), "fp16"),
    "VAE and text encoder alone in fp16": renamed(("vae", "text_encoder"), "fp16"),
    "all in fp16": renamed(("unet", "vae", "text_encoder"), "fp16"),
    "all in bf16": renamed(("unet", "vae", "text_encoder"), "bf16"),
    "half precision next to full": half_beside,
    "UNet in pieces": in_pieces(None),
    "UNet in pieces of half precision": in_pieces("fp16"),
    "a safety checker that is not there": index(**CHECKER),
    "an index without the names of what is absent": index(),
    "files of macOS": of_macos,
    "an index with a mark": with_mark,
    "links": linked,
}


def answers(folder: Path) -> dict[str, Tensor]:
    """What training and drawing compute with, which must be the same."""
    backbone, pipe = load_backbone(str(folder)), load_pipeline(local_pipeline(str(folder)), Arm())
    with torch.no_grad():
        text = backbone.encode_text(["a red cat", "a gun"])["encoder_hidden_states"]
        drawn, _ = pipe.encode_prompt(["a red cat", "a gun"], "cpu", 1, False)
    assert torch.equal(text, drawn)
    found = {"text": text}
    for name, one, other in (("unet", backbone.denoiser, pipe.unet), ("vae", backbone.part("vae"), pipe.vae)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])
            found[f"{name}.{key}"] = value
    return found


@pytest.mark.parametrize("case", READ)
def test_training_drawing_and_caching_read_the_same(case: str, tiny_pipeline: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "pipe"))
    READ[case](folder)
    expected, found = answers(tiny_pipeline), answers(folder)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    parts = ["unet", "vae", "text_encoder", "tokenizer"]
    assert part_hashes(str(folder), parts) == part_hashes(str(tiny_pipeline), parts)
    denoiser = read_denoiser(folder, "unet")
    assert denoiser.keys() == read_denoiser(tiny_pipeline, "unet").keys()
    assert all(torch.equal(value, found[f"unet.{name}"]) for name, value in denoiser.items())


def pickled(folder: Path) -> None:
    for part, name in NAMES.items():
        file = folder / part / f"{name}.safetensors"
        torch.save(load_file(file), file.with_name(f"{name if part != 'text_encoder' else 'pytorch_model'}.bin"))
        file.unlink()


def changed(part: str, change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / part / f"{NAMES[part]}.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})

    return edit


def lost(weights: dict[str, Tensor]) -> None:
    del weights[sorted(weights)[3]]


def one_more(weights: dict[str, Tensor]) -> None:
    name = next(name for name in sorted(weights) if ".0." in name)
    weights[name.replace(".0.", ".9.", 1)] = torch.zeros(2)


def not_finite(weights: dict[str, Tensor]) -> None:
    weights[max(weights)].view(-1)[-1] = torch.nan


def a_piece_lost(folder: Path) -> None:
    in_pieces("fp16")(folder)
    min((folder / "unet").glob("*00002-of*")).unlink()


def pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 3438167540\n"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(text)


def of_edm(folder: Path) -> None:
    stated = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(stated))


REFUSED: dict[str, tuple[Edit, str]] = {
    "no vocabulary": (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json"),
    "no settings of the tokenizer": (
        lambda folder: (folder / "tokenizer" / "tokenizer_config.json").unlink(),
        "tokenizer_config.json",
    ),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
    "pickled weights": (pickled, ".bin"),
    "weights from before the average": (renamed(("unet",), "non_ema"), "non_ema"),
    "a pointer of git LFS": (pointer, "git lfs pull"),
    "numbers that are not finite": (changed("unet", not_finite), "not finite"),
    "and in the VAE": (changed("vae", not_finite), "not finite"),
    "a UNet without a layer": (changed("unet", lost), "conv"),
    "a text encoder without a layer": (changed("text_encoder", lost), "layers"),
    "a UNet with a layer too many": (changed("unet", one_more), ".9."),
    "a text encoder with a layer too many": (changed("text_encoder", one_more), "layers.9."),
    "a piece missing": (a_piece_lost, "00002-of"),
    "a scheduler of another process": (of_edm, "scheduler_config.json"),
    "a VAE that was not copied": (lambda folder: shutil.rmtree(folder / "vae"), "vae"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_training_and_drawing_refuse_the_same_by_name(case: str, tiny_pipeline: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "pipe"))
    edit, named = REFUSED[case]
    edit(folder)
    for reading in (
        lambda: load_pipeline(local_pipeline(str(folder)), Arm()),
        lambda: load_backbone(str(folder)).pipeline(),
    ):
        with pytest.raises(UserError) as refused:
            reading()
        assert named in str(refused.value)
        assert str(folder) in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_every_tokenizer_of_a_family_is_looked_at(part: str, tiny_sd3: Path, tiny_sdxl: Path, tmp_path: Path):
    for number, source in enumerate((tiny_sd3, tiny_sdxl)):
        if not (source / part).is_dir():
            continue
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        (folder / part / "tokenizer.json").unlink()
        for reading in (load_backbone, lambda at: load_pipeline(Path(at), Arm())):
            with pytest.raises(UserError, match=rf"{part}/tokenizer\.json"):
                reading(str(folder))


def test_a_whole_pipeline_keeps_what_stands_in_its_index(tiny_sdxl: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "pipe"))
    index(force_zeros_for_empty_prompt=False)(folder)
    assert load_pipeline(folder, Arm()).config.force_zeros_for_empty_prompt is False
    assert load_pipeline(tiny_sdxl, Arm()).config.force_zeros_for_empty_prompt is True


def test_a_pipeline_is_loaded_in_the_precision_that_is_asked_for(tiny_sd3: Path):
    pipe = Parts(str(tiny_sd3), torch.bfloat16).pipeline()
    assert {one.dtype for one in (pipe.transformer, pipe.vae, pipe.text_encoder_3)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "StableDiffusionPipeline"),
        ("conditioner.embedders.0.transformer.weight", "StableDiffusionXLPipeline"),
        ("model.diffusion_model.joint_blocks.0.x.weight", "StableDiffusion3Pipeline"),
    ],
)
def test_a_checkpoint_in_one_file_says_how_to_convert_it(tensor: str, kind: str, tmp_path: Path):
    file = tmp_path / "sd.safetensors"
    save_file({tensor: torch.zeros(1)}, file)
    arm = Arm(pipeline=str(file))
    for reading, key in (
        (lambda: load_backbone(str(file)), "model.init_args.pretrained"),
        (lambda: load_backbone(str(file), key="--model"), "--model"),
        (lambda: load_backbone(str(tmp_path)), "model.init_args.pretrained"),  # its folder
        (lambda: local_pipeline(str(file)), "--pipeline"),
        (lambda: arm_pipeline("fused", arm, "elsewhere"), "fused"),
    ):
        with pytest.raises(UserError) as refused:
            reading()
        assert f"{kind}.from_single_file('{file}').save_pretrained(" in str(refused.value)
        assert key in str(refused.value)


@pytest.mark.parametrize("name", ["sd.ckpt", "notes.txt"])
def test_other_files_are_no_hub_ids(name: str, tmp_path: Path):
    file = tmp_path / name
    for there in (False, True):
        if there:
            file.write_bytes(b"x")
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            load_backbone(str(file))


def test_the_hub_is_asked_for_what_is_read():
    pieces = [f"model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    small = ["config.json", "model.safetensors.index.fp16.json"]
    others = ["pytorch_model.bin", "model.non_ema.safetensors", "pytorch_model.bin.index.json"]
    files = [f"text_encoder/{name}" for name in [*pieces, *small, *others]]
    assert sorted(_needed(tuple(files), "text_encoder")) == sorted(f"text_encoder/{name}" for name in [*pieces, *small])
    whole = (*files, "text_encoder/model.safetensors", "unet/model.safetensors")
    assert sorted(_needed(whole, "text_encoder")) == ["text_encoder/config.json", "text_encoder/model.safetensors"]


def test_files_of_macos_do_not_change_what_a_report_names(tiny_pipeline: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "pipe"))
    of_macos(folder)
    assert file_fingerprint(folder) == file_fingerprint(tiny_pipeline)
