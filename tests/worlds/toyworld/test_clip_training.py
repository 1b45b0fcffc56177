from math import exp, log
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from lit_safety.worlds.contrastive import contrastive_loss
from lit_safety.worlds.toyworld.build import Minutes, build
from lit_safety.worlds.toyworld.clip import train_toy_clip


def test_contrastive_loss_is_the_symmetric_cross_entropy() -> None:
    """Two images and two captions with scale e^log(2) = 2.

    images = [[1, 0], [0, 1]], texts = [[1, 0], [0.6, 0.8]]: cosines [[1, 0.6], [0, 0.8]], logits [[2, 1.2], [0, 1.6]].
    Images: -log(e^2 / (e^2 + e^1.2)), -log(e^1.6 / (e^0 + e^1.6)); captions: -log(e^2 / (e^2 + e^0)),
    -log(e^1.6 / (e^1.2 + e^1.6)). The loss is the mean of both means.
    """
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    meanings = torch.tensor([[1, 0, 0, 0, 2], [1, 0, 0, 0, 3]])
    of_images = (log(1 + exp(1.2 - 2)) + log(1 + exp(-1.6))) / 2
    of_captions = (log(1 + exp(-2)) + log(1 + exp(1.2 - 1.6))) / 2
    loss = contrastive_loss(images, texts, meanings, torch.tensor(log(2.0)))
    assert loss.item() == pytest.approx((of_images + of_captions) / 2, abs=1e-6)


def test_captions_of_one_meaning_are_right_for_each_others_images() -> None:
    """Equal meanings: the target is 1/2 for each, so equal features give log 2 and no gradient."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    meanings = torch.tensor([[3, 1, 0, 0, 2], [3, 1, 0, 0, 2]])
    loss = contrastive_loss(features, features.detach(), meanings, torch.tensor(0.0))
    loss.backward()
    assert loss.item() == pytest.approx(log(2), abs=1e-6)
    assert features.grad is not None
    assert features.grad.abs().max() < 1e-6


def test_training_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    _, first = train_toy_clip(tmp_path, 0.01, families=8, batch_size=2, world=1)
    drawn = (tmp_path / "clip_pictures.npy").stat().st_mtime_ns
    _, done = train_toy_clip(tmp_path, 0.01, families=8, batch_size=2, world=1)
    assert done == first  # the minutes were used already
    _, more = train_toy_clip(tmp_path, 0.02, families=8, batch_size=2, world=1)
    assert more["images"] > first["images"] > 0
    assert more["minutes"] == pytest.approx(0.02, abs=0.01)
    assert (tmp_path / "clip_pictures.npy").stat().st_mtime_ns == drawn


@pytest.mark.slow
def test_the_stage_with_two_processes_writes_a_folder_that_loads(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    build(out, work, ["clip"], Minutes(clip=0.05), processes=2)
    assert CLIPModel.from_pretrained(out / "clip").config.projection_dim == 96
    assert "retrieval" in (out / "clip" / "README.md").read_text()
    before = (out / "clip" / "model.safetensors").stat().st_mtime_ns
    build(out, work, ["clip"], Minutes(clip=0.05), processes=2)
    assert (out / "clip" / "model.safetensors").stat().st_mtime_ns == before
