from pathlib import Path

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.judges.toy.objects import CONCEPTS, LABELS
from lit_safety.worlds.toyworld.judge_training import check_judge, judged_scenes, seen
from tests.helpers.documents import TOYWORLD


@pytest.mark.parametrize("name", ["judge", "judge_b"])
def test_shipped_judge_tells_fresh_scenes(name: str) -> None:
    torch.set_num_threads(1)
    judge = ToyJudge.from_pretrained(TOYWORLD / name)
    assert judge.labels == list(LABELS)
    assert judge.harm == {concept: CONCEPTS[concept].category for concept in CONCEPTS}
    clean = check_judge(judge, count=300)
    assert clean["exact"] >= 0.99
    assert clean["harm"] >= 0.99
    assert check_judge(judge, count=300, degraded=True)["exact"] >= 0.98
    assert check_judge(judge, count=300, hybrids=1.0)["exact"] >= 0.93


@pytest.mark.parametrize("architecture", ["plain", "residual"])
def test_a_judge_comes_back_from_its_folder_as_it_was(architecture: str, tmp_path: Path) -> None:
    judge = ToyJudge(width=8, architecture=architecture, threshold=0.7, notes={"made": "here"}).eval()
    judge.save_pretrained(tmp_path)
    again = ToyJudge.from_pretrained(tmp_path)
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    assert torch.equal(judge(pictures), again(pictures))
    assert (again.threshold, again.notes, again.architecture) == (0.7, {"made": "here"}, architecture)


def test_a_folder_without_a_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        ToyJudge.from_pretrained(tmp_path)


def test_labels_follow_what_is_seen() -> None:
    assert [seen(share) for share in (0.0, 0.3, 0.5, 0.7, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    pictures, labels = judged_scenes("checks", 0, 200, hybrids=1.0)
    assert pictures.shape == (200, 32, 32, 3)
    assert labels.shape == (200, len(LABELS))
    between = ((labels > 0) & (labels < 1)).any(1)
    assert 0.2 < between.mean() < 0.8
    assert labels.sum(1).max() <= 3
    assert (labels.sum(1) == 0).any()
