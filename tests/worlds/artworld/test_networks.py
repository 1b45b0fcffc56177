"""What the art world's judges and cost model learn from, and how their networks are stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lit_safety.judges.art.judge import ArtJudge
from lit_safety.judges.art.subjects import HARMS, HELD_OUT_STYLE, STYLES, SUBJECTS, U_TEST, U_VAL
from lit_safety.judges.load import load_judge
from lit_safety.worlds.artworld.clip import FAMILY, draw_family
from lit_safety.worlds.artworld.cost_model import _chunk, write_cost_shards
from lit_safety.worlds.artworld.judge_training import JUDGE_A, JUDGE_B, judged_scenes
from lit_safety.worlds.artworld.seeds import SEEDS
from lit_safety.worlds.judging import learn


def test_a_family_differs_in_one_thing_and_never_shows_the_style_that_is_held_out(art_file: Path) -> None:
    style = 1 + list(STYLES).index(HELD_OUT_STYLE)
    for index in range(40):
        members = draw_family("clip", index, art_file)
        meanings = np.array([meant for _, _, meant in members])
        assert len(members) == FAMILY
        assert (meanings[:, 3] != style).all()
        assert ((meanings[1:] != meanings[0]).sum(1) <= 1).all(), "each other scene differs in one thing"
        assert all(len(captions) == 3 for _, captions, _ in members)


def test_the_cost_model_knows_what_no_pair_names(art_file: Path, tmp_path: Path) -> None:
    """Its own seeds, labels and no costs; unnamed subjects are asked for too, the style that is held out never is."""
    prompts = [pair.metadata["prompt"] for pair in _chunk(("train", 0, 300, art_file))]
    unnamed = [name for name in (*U_VAL, *U_TEST) if any(name in prompt for prompt in prompts)]
    assert len(unnamed) > 20
    assert not any("classic" in prompt for prompt in prompts)
    write_cost_shards(tmp_path / "shards", "val", art_file, processes=1, count=6)
    seeds = json.loads((tmp_path / "shards" / "manifest.json").read_text())["seeds"]
    assert seeds["first"] in SEEDS["cost_model"]
    assert seeds["last"] in SEEDS["cost_model"]


def test_a_judge_comes_back_from_its_folder_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for training in (JUDGE_A, JUDGE_B):
        judge = ArtJudge(width=8, architecture=training.architecture, counts=True).eval()
        folder = tmp_path / training.owner
        judge.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
        images = torch.rand(3, 3, 48, 48) * 2 - 1
        with torch.no_grad():
            there, two = ArtJudge.from_pretrained(folder).told(images)
            assert two is not None
            assert there.shape == two.shape == (3, len(SUBJECTS))
            assert torch.allclose(there, judge.told(images)[0], atol=0.02)
        assert set(load_judge(str(folder)).settings["categories"]) == {SUBJECTS[name].category for name in HARMS}


def test_a_killed_training_goes_on(art_file: Path, tmp_path: Path) -> None:
    images, labels, twice = judged_scenes(art_file, JUDGE_A, 0, 16)
    state, judge = tmp_path / "judge.pt", ArtJudge(width=4, architecture="deep", counts=True)
    learn(judge, images, labels, twice, 0.01, 4, 1e-3, state)
    first = torch.load(state, weights_only=True)
    again = ArtJudge(width=4, architecture="deep", counts=True)
    learn(again, images, labels, twice, 0.01, 4, 1e-3, state)  # the minutes were used already
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, first["model"][name])
    learn(again, images, labels, twice, 0.02, 4, 1e-3, state)
    assert torch.load(state, weights_only=True)["step"] > first["step"] > 0


@pytest.mark.parametrize("training", [JUDGE_A, JUDGE_B])
def test_judges_draw_scenes_of_their_own(art_file: Path, training: object) -> None:
    assert set(SEEDS["judge_a"]).isdisjoint(SEEDS["judge_b"])
    images, labels, twice = judged_scenes(art_file, training, 0, 60)  # type: ignore[arg-type]
    assert images.shape == (60, 48, 48, 3)
    assert labels.shape == twice.shape == (60, len(SUBJECTS))
    assert ((twice <= labels) | (twice == -1)).all(), "two of what is not there"
