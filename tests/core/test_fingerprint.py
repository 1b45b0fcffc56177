"""What names images and verdicts by content: folders of models, behind links too."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256
from lit_safety.drawing.reference_images import Reference
from lit_safety.judges.clip import Clip


def weights(path: Path, value: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.full((4,), value)}, path)
    return path


def test_a_linked_folder_counts_as_its_content(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        weights(tmp_path / name / "model.safetensors", value)
    model = tmp_path / "model"
    model.mkdir()
    (model / "unet").symlink_to(tmp_path / "one")
    first = content_sha256(model)
    (model / "unet").unlink()
    (model / "unet").symlink_to(tmp_path / "two")
    assert content_sha256(model) != first
    (model / "unet").unlink()
    shutil.copytree(tmp_path / "one", model / "unet")
    assert content_sha256(model) == first  # a link to a folder and a copy of it are the same model


def test_weights_that_are_not_loaded_do_not_count_in_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    weights(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", 1.0)
    first = content_sha256(tmp_path)
    weights(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", 2.0)
    (tmp_path / "unet" / "._config.json").write_bytes(b"of macOS")
    assert content_sha256(tmp_path) == first
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert content_sha256(tmp_path) != first


def test_what_is_not_there_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        content_sha256(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match=r"pipe\.safetensors"):
        content_sha256(tmp_path / "pipe.safetensors")


def test_a_clip_s_preprocessing_from_elsewhere_is_named(clip_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(clip_folder, tmp_path / "other")
    first = Clip(str(clip_folder), "x", processor=str(other)).settings
    config = other / "preprocessor_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"image_mean": [0.25, 0.25, 0.25]}))
    assert Clip(str(clip_folder), "x", processor=str(other)).settings != first
    assert "processor" not in Clip(str(clip_folder), "x").settings


def test_images_in_a_linked_folder_are_read(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "elsewhere").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "elsewhere" / f"{number}.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(list(Reference(str(tmp_path / "images")))) == 2
