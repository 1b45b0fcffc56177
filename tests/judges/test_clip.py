from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.clip import Clip, clip_scores, mean_interval


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return Clip(str(clip_folder), "--clip")


def make_images(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()) for one in pixels]


def test_vectors_have_length_one(clip: Clip) -> None:
    for vectors in (clip.images(make_images(3)), clip.texts(["a", "b c", "d" * 50])):
        assert vectors.shape == (3, 8)
        assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_a_long_text_keeps_its_end_token(clip: Clip) -> None:
    """12 places: start, 10 letters, end. Text beyond them does not matter, and the end is still read: cutting it
    off, as torchmetrics 1.9 does, gives another vector."""
    long = " ".join("abcdefghijklmnop")
    ten = " ".join("abcdefghij")
    assert torch.allclose(clip.texts([long]), clip.texts([ten]), atol=1e-6)
    cut = clip.tokenizer(long, return_tensors="pt")["input_ids"][:, : clip.length]
    assert clip.tokenizer.eos_token_id not in cut[0].tolist()
    without_end = clip.model.get_text_features(cut).pooler_output
    assert torch.nn.functional.cosine_similarity(without_end, clip.texts([long])).item() < 0.999


def test_scores_are_torchmetrics_where_that_works(clip: Clip, clip_folder: Path) -> None:
    """Short prompts, and its class fed with bare tensors as transformers 4 returned them: the same mean."""
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    class Bare(torch.nn.Module):
        config = clip.model.config

        def get_image_features(self, *inputs: torch.Tensor) -> torch.Tensor:
            return clip.model.get_image_features(*inputs).pooler_output

        def get_text_features(self, *inputs: torch.Tensor) -> torch.Tensor:
            return clip.model.get_text_features(*inputs).pooler_output

    texts, images = ["a b", "c", "d e f"], make_images(3)
    processor = CLIPImageProcessorPil.from_pretrained(clip.settings["clip"])
    metric = CLIPScore(lambda: (Bare(), CLIPProcessor(processor, clip.tokenizer)))
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    metric.update(tensors, texts)
    ours = clip_scores(clip, images, clip.texts(texts))
    assert max(0.0, sum(ours) / 3) == pytest.approx(metric.compute().item(), abs=1e-3)
    assert len({round(score, 3) for score in ours}) == 3


def test_mean_and_interval() -> None:
    """1, 2, 3, 6: mean 3, s^2 = (4 + 1 + 0 + 9) / 3 = 14/3, half = 1.959964 sqrt(14/3 / 4) = 2.11700."""
    value, interval = mean_interval([1.0, 2.0, 3.0, 6.0], 0, 100)
    assert value == 3
    assert interval == pytest.approx([3 - 2.11700, 3 + 2.11700], abs=1e-5)


def test_a_missing_score_widens_the_interval() -> None:
    value, interval = mean_interval([20.0] * 9 + [None], 0, 100)
    assert value == 20
    assert interval is not None
    assert interval[0] < 18
    assert interval[1] > 28
    assert mean_interval([None, None], 0, 100) == (None, None)
    assert mean_interval([5.0], 0, 100) == (5.0, None)


@pytest.mark.parametrize("damage", ["absent", "empty", "weights", "cut", "tokenizer"])
def test_what_is_no_clip_is_one_line(clip_folder: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    folder = tmp_path / "clip"
    if damage == "empty":
        folder.mkdir()
    elif damage != "absent":
        shutil.copytree(clip_folder, folder)
    if damage == "weights":
        (folder / "model.safetensors").unlink()
    elif damage == "cut":
        (folder / "model.safetensors").write_bytes(b"12345678")
    elif damage == "tokenizer":
        for file in folder.glob("tokenizer*"):
            file.write_text("{")
    with pytest.raises(UserError, match=f"--clip {folder}") as error:
        Clip(str(folder), "--clip")
    assert "\n" not in str(error.value)


def test_a_clip_of_the_hub_is_named_by_its_commit(clip_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """As the hub's client keeps it, without any network: the report says which commit the weights are of."""
    import shutil

    from huggingface_hub import constants

    commit, model = "0123456789" * 4, tmp_path / "models--some--clip"
    shutil.copytree(clip_folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("lit_safety.backbones.hub.hub_answers", lambda: False)
    monkeypatch.chdir(tmp_path)
    found = Clip("some/clip", "--clip").settings
    assert (found["sha256"], found["revision"]) == (None, commit)
    assert "revision" not in Clip(str(clip_folder), "--clip").settings
    with pytest.raises(UserError, match="--clip some/other") as error:
        Clip("some/other", "--clip")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_clip_without_a_file_is_refused_by_its_name(clip_folder: Path, tmp_path: Path, name: str) -> None:
    """Without its vocabulary every text would be the same vector, and every image be as near to all of them."""
    import shutil

    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (folder / name).rename(folder / f"._{name}")
    (folder / "merges.txt").unlink(missing_ok=True)  # of the older layout, which may lie there too
    with pytest.raises(UserError, match=name) as error:
        Clip(str(folder), "--clip")
    assert str(error.value).startswith(f"--clip {folder}")


def test_a_clip_of_other_layers_or_spoilt_numbers_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    weights = load_file(clip_folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("text_model.encoder.layers.0"))
    spoilt = weights[name].clone().fill_(torch.inf)
    changes = {
        "lost": {key: value for key, value in weights.items() if key != name},
        "more": weights | {name.replace("layers.0", "layers.7"): weights[name].clone()},
        "spoilt": weights | {name: spoilt},
    }
    for kind, content in changes.items():
        folder = Path(shutil.copytree(clip_folder, tmp_path / kind))
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=name.rsplit(".", 1)[1]):
            Clip(str(folder), "--clip")


def test_a_clip_in_half_precision_alone_is_read(clip: Clip, clip_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert torch.equal(Clip(str(folder), "--clip").texts(["a b"]), clip.texts(["a b"]))
