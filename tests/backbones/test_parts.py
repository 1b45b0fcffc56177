"""Parts that are not used are not loaded, and the fingerprint of a cache is computed from files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_safety.backbones import load_backbone
from lit_safety.backbones.fingerprint import part_hashes, reference_hashes
from lit_safety.backbones.parts import Parts
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import tensor_hashes
from tests.helpers.tiny_pipelines import save_sd3, save_sdxl

PARTS = ("vae", "text_encoder", "tokenizer")


def test_encoders_are_loaded_when_they_are_used_and_never_registered(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline))
    assert not set(PARTS) & set(backbone.parts.loaded)
    with torch.no_grad():
        backbone.encode_text(["a cat"])
        assert "vae" not in backbone.parts.loaded
        backbone.posterior(torch.zeros(2, 3, 32, 32))
    assert set(PARTS) <= set(backbone.parts.loaded)
    assert [name for name, _ in backbone.named_children()] == ["denoiser"]
    assert not any(p.requires_grad for name in PARTS[:2] for p in backbone.part(name).parameters())
    assert backbone.pipeline().vae is backbone.vae


def test_encoders_follow_the_denoiser(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline)).to("meta")
    assert backbone.device.type == "meta"
    assert backbone.text_encoder.device.type == "meta"


def test_without_a_denoiser(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline), denoiser=False)
    assert "unet" not in backbone.parts.loaded
    assert backbone.encode_text(["a cat", ""])["encoder_hidden_states"].shape == (2, 16, 32)


def test_a_library_of_the_index_is_not_imported(tiny_pipeline: Path, tmp_path: Path):
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    stated = json.loads(index.read_text())
    index.write_text(json.dumps(stated | {"vae": ["antigravity", "AutoencoderKL"]}))
    with pytest.raises(UserError, match="its vae is of the library 'antigravity'"):
        _ = load_backbone(str(tmp_path / "pipe")).vae
    index.write_text(json.dumps(stated | {"vae": ["diffusers", "NoSuchClass"]}))
    with pytest.raises(UserError, match="diffusers has no NoSuchClass"):
        _ = load_backbone(str(tmp_path / "pipe")).vae


def test_a_fingerprint_follows_the_weights_and_not_the_files(tiny_pipeline: Path, tmp_path: Path):
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    first = part_hashes(str(tiny_pipeline), PARTS)
    assert set(first) == set(PARTS)
    assert part_hashes(str(tmp_path / "pipe"), PARTS) == first
    (file,) = (tmp_path / "pipe" / "vae").glob("*.safetensors")
    weights = load_file(file)
    file.unlink()
    names = sorted(weights)
    pieces = [file.with_name(f"diffusion_pytorch_model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    save_file({name: weights[name] for name in names[:5]}, pieces[0])
    save_file({name: weights[name] for name in names[5:]}, pieces[1])
    index = {name: pieces[number >= 5].name for number, name in enumerate(names)}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert part_hashes(str(tmp_path / "pipe"), PARTS) == first
    weights[names[3]].view(-1)[-1] += 1
    save_file({name: weights[name] for name in names[:5]}, pieces[0])
    changed = part_hashes(str(tmp_path / "pipe"), PARTS)
    assert changed["vae"] != first["vae"]
    assert changed["text_encoder"] == first["text_encoder"]
    pieces[0].write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is not a readable safetensors file"):
        part_hashes(str(tmp_path / "pipe"), PARTS)
    shutil.rmtree(tmp_path / "pipe" / "vae")
    settings = tmp_path / "pipe" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 12}))
    assert part_hashes(str(tmp_path / "pipe"), ["tokenizer"])["tokenizer"] != first["tokenizer"]  # cuts elsewhere
    assert set(part_hashes(str(tmp_path / "pipe"), PARTS)) == {"text_encoder", "tokenizer"}


def test_variants_that_are_not_loaded_do_not_count(tiny_pipeline: Path, tmp_path: Path):
    """A clone of SD1.5 has them next to the weights; fetched from the hub it has not."""
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    for variant in ("fp16", "non_ema"):
        name = f"diffusion_pytorch_model.{variant}.safetensors"
        save_file({"other": torch.ones(2)}, tmp_path / "pipe" / "unet" / name)
    assert part_hashes(str(tmp_path / "pipe"), ["unet"]) == part_hashes(str(tiny_pipeline), ["unet"])


def test_a_fingerprint_follows_a_text_encoders_settings(tiny_pipeline: Path, tmp_path: Path):
    """Another activation gives other text with the same weights; a default that is stated is none that is left out."""
    first = part_hashes(str(tiny_pipeline), PARTS)["text_encoder"]
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    file = tmp_path / "pipe" / "text_encoder" / "config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in stated.items() if name != "layer_norm_eps"}))
    assert part_hashes(str(tmp_path / "pipe"), PARTS)["text_encoder"] == first
    file.write_text(
        json.dumps(stated | {"_name_or_path": "elsewhere", "transformers_version": "0", "dtype": "float16"})
    )
    assert part_hashes(str(tmp_path / "pipe"), PARTS)["text_encoder"] == first
    file.write_text(json.dumps(stated | {"hidden_act": "gelu"}))
    assert part_hashes(str(tmp_path / "pipe"), PARTS)["text_encoder"] != first


def edited(folder: Path, file: str, **changes: object) -> None:
    """Change keys of a JSON file; None takes a key out."""
    path = folder / file
    stated = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


def hashes_of(folder: Path) -> dict[str, str]:
    """What decides caches made with a tiny Stable Diffusion, the reference's included."""
    return part_hashes(str(folder), PARTS) | reference_hashes(str(folder), "unet")


@pytest.mark.parametrize(
    ("file", "changes", "parts"),
    [
        ("tokenizer/tokenizer_config.json", {"pad_token": "a</w>"}, {"tokenizer"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 12}, {"tokenizer"}),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, {"tokenizer"}),
        ("tokenizer/tokenizer_config.json", {"truncation_side": "left"}, {"tokenizer"}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, {"text_encoder"}),
        ("text_encoder/config.json", {"layer_norm_eps": 1e-3}, {"text_encoder"}),
        ("text_encoder/config.json", {"use_attention_mask": True}, {"text_encoder"}),
        ("vae/config.json", {"scaling_factor": 0.5}, {"vae", "latent scaling"}),
        ("vae/config.json", {"shift_factor": 0.1}, {"vae", "latent scaling"}),
        ("vae/config.json", {"latents_mean": [1, 1, 1, 1], "latents_std": [1, 1, 1, 2]}, {"vae", "latent scaling"}),
        ("vae/config.json", {"act_fn": "gelu"}, {"vae"}),
        ("unet/config.json", {"act_fn": "gelu"}, {"unet"}),
        ("unet/config.json", {"freq_shift": 1}, {"unet"}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.012 * 1.05}, {"scheduler"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, {"scheduler"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, {"scheduler"}),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, {"scheduler"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 900}, {"scheduler"}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, {"scheduler"}),
    ],
)
def test_each_setting_that_decides_a_cache_is_hashed(
    file: str, changes: dict[str, object], parts: set[str], tiny_pipeline: Path, tmp_path: Path
):
    first = hashes_of(tiny_pipeline)
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    edited(tmp_path / "pipe", file, **changes)
    changed = hashes_of(tmp_path / "pipe")
    assert {part for part in first if changed[part] != first[part]} == parts


def test_settings_that_decide_nothing_keep_a_cache(tiny_pipeline: Path, tmp_path: Path):
    """How it draws, how it trained, who saved it; and defaults that are stated or left out."""
    first = hashes_of(tiny_pipeline)
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    edited(tmp_path / "pipe", "tokenizer/tokenizer_config.json", clean_up_tokenization_spaces=True, name_or_path="x")
    edited(tmp_path / "pipe", "text_encoder/config.json", attention_dropout=0.3, torch_dtype="float16", pad_token_id=0)
    edited(tmp_path / "pipe", "vae/config.json", _name_or_path="x", _diffusers_version="0", sample_size=64)
    edited(tmp_path / "pipe", "vae/config.json", force_upcast=False, shift_factor=None)
    edited(tmp_path / "pipe", "unet/config.json", sample_size=64, center_input_sample=None)
    scheduler = "scheduler/scheduler_config.json"
    edited(tmp_path / "pipe", scheduler, timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True)
    edited(tmp_path / "pipe", scheduler, clip_sample=True, trained_betas=None, rescale_betas_zero_snr=None)
    assert hashes_of(tmp_path / "pipe") == first
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))  # another sampler of one process
    assert hashes_of(tmp_path / "pipe") == first


def test_one_row_in_the_middle_of_a_tensor_counts(tmp_path: Path):
    """As textual inversion edits one row of the token embedding."""
    weights = {"token_embedding.weight": torch.zeros(3000, 128), "other": torch.ones(4)}
    save_file(weights, tmp_path / "model.safetensors")
    first = tensor_hashes(tmp_path / "model.safetensors")
    weights["token_embedding.weight"][1500] = 0.5
    save_file(weights, tmp_path / "model.safetensors")
    assert len(set(first) & set(tensor_hashes(tmp_path / "model.safetensors"))) == 1


def test_the_shift_of_a_flow_model_and_each_tokenizer_count(tiny_sd3: Path, tmp_path: Path):
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    first = part_hashes(str(tiny_sd3), names) | reference_hashes(str(tiny_sd3), "transformer")
    shutil.copytree(tiny_sd3, tmp_path / "pipe")
    edited(tmp_path / "pipe", "scheduler/scheduler_config.json", shift=2.0)
    edited(tmp_path / "pipe", "tokenizer_2/tokenizer_config.json", pad_token="a</w>")
    edited(tmp_path / "pipe", "vae/config.json", shift_factor=0.07)
    again = str(tmp_path / "pipe")
    changed = part_hashes(again, names) | reference_hashes(again, "transformer")
    assert {name for name in first if changed[name] != first[name]} == {"scheduler", "tokenizer_2", "latent scaling"}


def test_a_copy_that_was_saved_again_and_one_behind_links_are_alike(tiny_pipeline: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, local_files_only=True)
    pipe.save_pretrained(tmp_path / "saved")
    assert hashes_of(tmp_path / "saved") == hashes_of(tiny_pipeline)
    (tmp_path / "links").mkdir()
    for entry in tiny_pipeline.iterdir():
        (tmp_path / "links" / entry.name).symlink_to(entry)
    assert hashes_of(tmp_path / "links") == hashes_of(tiny_pipeline)
    (tmp_path / "saved" / "unet" / "._diffusion_pytorch_model.safetensors").write_bytes(b"of macOS")
    assert hashes_of(tmp_path / "saved") == hashes_of(tiny_pipeline)


@pytest.mark.parametrize("name", ["scheduler", "text_encoder", "tokenizer", "vae", "unet"])
@pytest.mark.parametrize("index", [[None, None], None])
def test_a_pipeline_that_names_no_part_that_drawing_needs_is_refused(
    tiny_pipeline: Path, tmp_path: Path, name: str, index: Any
):
    stated = json.loads((tiny_pipeline / "model_index.json").read_text())
    changed = {**stated, name: index} if index else {key: value for key, value in stated.items() if key != name}
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=name):
        Parts(str(tmp_path / "pipe")).pipeline()


def test_an_sdxl_with_a_tokenizer_too_many_is_refused(tmp_path: Path):
    """diffusers would pair the first tokenizer with the second encoder."""
    folder = save_sdxl(tmp_path / "pipe")
    stated = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**stated, "text_encoder": [None, None]}))
    with pytest.raises(UserError, match="names no text_encoder"):
        Parts(str(folder)).pipeline()


def test_sd3_draws_without_its_text_encoders(tmp_path: Path):
    folder = save_sd3(tmp_path / "pipe")
    stated = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**stated, "text_encoder_3": [None, None]}))
    assert Parts(str(folder)).pipeline().text_encoder_3 is None


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_a_network_without_its_configuration_is_refused_by_the_file(tiny_pipeline: Path, tmp_path: Path, name: str):
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    (tmp_path / "pipe" / name / "config.json").unlink()
    with pytest.raises(UserError, match=rf"{name}/config\.json is missing"):
        Parts(str(tmp_path / "pipe")).get(name)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text_encoder", {"hidden_size": 33}),
        ("text_encoder", {"num_attention_heads": 5}),
        ("vae", {"block_out_channels": [8]}),
    ],
)
def test_a_configuration_that_contradicts_itself_is_one_line(
    tiny_pipeline: Path, tmp_path: Path, name: str, settings: dict[str, Any]
):
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    file = tmp_path / "pipe" / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=name) as caught:
        Parts(str(tmp_path / "pipe")).get(name)
    assert "\n" not in str(caught.value)
    if name == "text_encoder":
        with pytest.raises(UserError, match=name) as caught:
            part_hashes(str(tmp_path / "pipe"), [name])
        assert "\n" not in str(caught.value)
