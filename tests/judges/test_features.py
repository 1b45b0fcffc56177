import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.drawing.reference_images import Reference
from lit_safety.judges.fid import Penultimate, extract, feature_network
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge
from tests.helpers.pair_shards import metadata, sample, write_shards, write_tar


@pytest.fixture
def judge(tmp_path: Path) -> ToyWorldJudge:
    torch.manual_seed(0)
    ToyJudge(labels=["gun", "car"], harm={"gun": "violence"}, width=8).save_pretrained(tmp_path / "judge")
    return ToyWorldJudge(tmp_path / "judge")


@pytest.mark.parametrize(("architecture", "dimension"), [("plain", 6 * 8), ("residual", 2 * 8 * 16)])
def test_the_head_on_the_features_is_the_network(architecture: str, dimension: int) -> None:
    torch.manual_seed(0)
    network = ToyJudge(labels=["gun", "car"], harm={}, width=8, architecture=architecture).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = Penultimate(network, 32)(images)
    last = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
    assert features.shape == (2, dimension)
    assert torch.allclose(last(features), network(images.float() / 127.5 - 1), atol=1e-6)


def make_image(level: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), level, dtype=np.uint8))


def test_sizes_are_not_mixed_and_order_is_kept() -> None:
    """The mean of each image, whatever its neighbours' size."""

    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((2, 3))

    levels = [(1, 8), (2, 8), (3, 16), (4, 8)]
    found = extract(Mean(), [(str(v), make_image(v, side)) for v, side in levels])
    assert found[:, 0].tolist() == [1, 2, 3, 4]
    assert found.dtype == torch.float64


def test_another_size_than_the_judge_s_names_the_image(judge: ToyWorldJudge) -> None:
    with pytest.raises(UserError, match=r"b\.png: is 64 x 64 pixels"):
        extract(judge.features, [("a.png", make_image(1)), ("b.png", make_image(1, 64))])


def test_a_judge_without_features_is_refused() -> None:
    class Bare:
        name, settings = "bare", {}

    with pytest.raises(UserError, match="judge bare"):
        feature_network("judge", Bare())


def test_inception_without_its_extra_says_what_to_install(judge: ToyWorldJudge, monkeypatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    assert "torch_fidelity" not in sys.modules
    with pytest.raises(UserError, match=r"pip install 'lit-safety\[inception\]'"):
        feature_network("inception", judge)


def test_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    make_image(7).save(tmp_path / "b.png")
    make_image(9).save(tmp_path / "more" / "a.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("not an image")
    reference = Reference(str(tmp_path))
    assert [image.getpixel((0, 0))[0] for _, image in reference] == [7, 9]
    assert reference.count == 2
    before = reference.sha256
    make_image(8).save(tmp_path / "b.png")
    again = Reference(str(tmp_path))
    list(again)
    assert again.sha256 != before


def test_the_chosen_images_of_clean_pairs(tmp_path: Path) -> None:
    """Of 12 pairs every fourth is clean, and a pair's number is the red of its chosen image. A chosen image that is
    labelled harmful is left out, without a manifest too."""
    write_shards(tmp_path / "shards", samples=12, samples_per_shard=5)
    harmful = sample(15, json=json.dumps(metadata(15, harmful={"chosen": True, "rejected": True})).encode())
    write_tar(tmp_path / "shards" / "bare.tar", [("a", sample(19)), ("b", harmful), ("c", sample(23))])

    def reds(given: Path) -> list[int]:
        return [image.getpixel((7, 0))[0] for _, image in Reference(str(given))]

    assert reds(tmp_path / "shards") == [3, 7, 11]
    assert reds(tmp_path / "shards" / "bare.tar") == [19, 23]


@pytest.mark.parametrize("content", [None, b"not an image"])
def test_a_reference_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        list(Reference(str(tmp_path)))
    with pytest.raises(UserError, match="absent"):
        list(Reference(str(tmp_path / "absent")))
