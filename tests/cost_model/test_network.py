import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.cost_model.network import ClipTower
from lit_safety.data.reading.decode import to_tensor

IMAGES = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0)).mul(255).round().div(127.5).sub(1)


def test_the_embedding_is_that_of_clip_itself(tiny_clip: Path):
    from transformers import CLIPImageProcessorPil, CLIPModel

    image = Image.new("RGB", (16, 16), (200, 30, 90))
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(tiny_clip).get_image_features(pixel_values=pixels)
    found = ClipTower(str(tiny_clip))(to_tensor(image)[None])
    assert torch.allclose(found, getattr(expected, "pooler_output", expected), atol=1e-5)


@pytest.mark.parametrize(("features", "width"), [("embedding", 8), ("pooled", 16), ("patches", 32)])
def test_outputs_do_not_depend_on_the_batch(tiny_clip: Path, features, width: int):
    tower = ClipTower(str(tiny_clip), features)
    found = tower(IMAGES)
    assert found.shape == (3, width)
    assert tower.width == width
    assert torch.allclose(tower(IMAGES[1:2]), found[1:2], atol=1e-6)
    assert not any(parameter.requires_grad for parameter in tower.network.parameters())


def test_patches_hold_the_pooled_features(tiny_clip: Path):
    patches, pooled = (ClipTower(str(tiny_clip), kind)(IMAGES) for kind in ("patches", "pooled"))
    assert torch.equal(patches[:, :16], pooled)


def test_the_fingerprint_follows_weights_and_preprocessing_not_the_place(
    tiny_clip: Path, make_clip: Callable[..., Path], tmp_path: Path
):
    copy = shutil.copytree(tiny_clip, tmp_path / "copy")
    original = ClipTower(str(tiny_clip)).sha256
    assert ClipTower(str(copy), "patches").sha256 == original
    assert ClipTower(str(make_clip(tmp_path / "other", seed=1))).sha256 != original
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.4, 0.4, 0.4]}))
    assert ClipTower(str(copy)).sha256 != original


def test_a_tower_without_projection_gives_what_it_has(tiny_clip: Path, tmp_path: Path):
    from transformers import CLIPModel

    CLIPModel.from_pretrained(tiny_clip).vision_model.save_pretrained(tmp_path)
    shutil.copy(tiny_clip / "preprocessor_config.json", tmp_path)
    with pytest.raises(UserError, match="visual_projection"):
        ClipTower(str(tmp_path))
    pooled = ClipTower(str(tmp_path), "pooled")
    assert torch.allclose(pooled(IMAGES), ClipTower(str(tiny_clip), "pooled")(IMAGES), atol=1e-6)
    assert pooled.sha256 == ClipTower(str(tmp_path), "pooled").sha256


def test_what_is_no_clip_is_refused(tiny_clip: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nor a hub id"):
        ClipTower("/no/such/folder")
    with pytest.raises(UserError, match=r"lacks config\.json"):
        ClipTower(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="type 'bert'"):
        ClipTower(str(tmp_path))
    broken = shutil.copytree(tiny_clip, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="does not load"):
        ClipTower(str(broken))


def test_a_tower_of_other_layers_or_spoilt_numbers_is_refused(tiny_clip: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_clip / "model.safetensors")
    name = next(name for name in weights if name.startswith("vision_model.encoder.layers.0"))
    more = {name.replace("layers.0", "layers.7"): weights[name].clone()}
    for number, change in enumerate((more, {name: torch.full_like(weights[name], torch.nan)})):
        folder = Path(shutil.copytree(tiny_clip, tmp_path / str(number)))
        save_file(weights | change, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=name.split("layers")[0]):
            ClipTower(str(folder))
