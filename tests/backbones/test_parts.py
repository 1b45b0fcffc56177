"""What is not used is not loaded, and what decides a cache is told from files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_safety.backbones import load_backbone
from lit_safety.backbones.fingerprint import fingerprint
from lit_safety.errors import UserError

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
    first = fingerprint(str(tiny_pipeline), PARTS)
    assert set(first) == set(PARTS)
    assert fingerprint(str(tmp_path / "pipe"), PARTS) == first
    (file,) = (tmp_path / "pipe" / "vae").glob("*.safetensors")
    weights = load_file(file)
    file.unlink()
    names = sorted(weights)
    pieces = [file.with_name(f"diffusion_pytorch_model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    save_file({name: weights[name] for name in names[:5]}, pieces[0])
    save_file({name: weights[name] for name in names[5:]}, pieces[1])
    index = {name: pieces[number >= 5].name for number, name in enumerate(names)}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert fingerprint(str(tmp_path / "pipe"), PARTS) == first
    weights[names[3]].view(-1)[-1] += 1
    save_file({name: weights[name] for name in names[:5]}, pieces[0])
    changed = fingerprint(str(tmp_path / "pipe"), PARTS)
    assert changed["vae"] != first["vae"]
    assert changed["text_encoder"] == first["text_encoder"]
    pieces[0].write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is no readable safetensors file"):
        fingerprint(str(tmp_path / "pipe"), PARTS)
    shutil.rmtree(tmp_path / "pipe" / "vae")
    settings = tmp_path / "pipe" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 12}))
    assert fingerprint(str(tmp_path / "pipe"), ["tokenizer"])["tokenizer"] != first["tokenizer"]  # cuts elsewhere
    assert set(fingerprint(str(tmp_path / "pipe"), PARTS)) == {"text_encoder", "tokenizer"}


def test_variants_that_are_not_loaded_do_not_count(tiny_pipeline: Path, tmp_path: Path):
    """A clone of SD1.5 has them beside the weights; fetched from the hub it has not."""
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    for variant in ("fp16", "non_ema"):
        name = f"diffusion_pytorch_model.{variant}.safetensors"
        save_file({"other": torch.ones(2)}, tmp_path / "pipe" / "unet" / name)
    assert fingerprint(str(tmp_path / "pipe"), ["unet"]) == fingerprint(str(tiny_pipeline), ["unet"])


def test_a_fingerprint_follows_a_text_encoders_settings(tiny_pipeline: Path, tmp_path: Path):
    """Another activation gives other text with the same weights; a default that is stated is none that is left out."""
    first = fingerprint(str(tiny_pipeline), PARTS)["text_encoder"]
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    file = tmp_path / "pipe" / "text_encoder" / "config.json"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in stated.items() if name != "layer_norm_eps"}))
    assert fingerprint(str(tmp_path / "pipe"), PARTS)["text_encoder"] == first
    file.write_text(
        json.dumps(stated | {"_name_or_path": "elsewhere", "transformers_version": "0", "dtype": "float16"})
    )
    assert fingerprint(str(tmp_path / "pipe"), PARTS)["text_encoder"] == first
    file.write_text(json.dumps(stated | {"hidden_act": "gelu"}))
    assert fingerprint(str(tmp_path / "pipe"), PARTS)["text_encoder"] != first
