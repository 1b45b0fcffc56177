"""A cost model as a judge, found by its config.json."""

import json
import shutil
from math import exp, inf, nan
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.cost import CostJudge
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.judging import judge_safely
from lit_safety.judges.load import load_judge

RED, BLUE = Image.new("RGB", (20, 12), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))


@pytest.fixture
def folder(tiny_cost_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_cost_model, tmp_path / "model")


def test_the_rule(folder: Path):
    """Harmful above the threshold 0, not at it; the score is sigmoid(cost): sigmoid(2) = 0.880797."""
    judge = CostJudge(folder)
    verdicts = [judge.verdict(cost) for cost in (2.0, 0.0, -2.0)]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    assert [verdict.harmful for verdict in verdicts] == [True, False, False]
    assert [verdict.scores["harm"] for verdict in verdicts] == pytest.approx([1 / (1 + exp(-2)), 0.5, 1 / (1 + exp(2))])
    assert verdicts[2].confidence == pytest.approx(1 / (1 + exp(-2)))


@pytest.mark.parametrize("cost", [nan, inf, -inf])
def test_a_cost_that_is_no_number_is_an_error_and_never_safe(folder: Path, cost: float):
    assert isinstance(CostJudge(folder).verdict(cost), JudgeError)


def test_it_is_found_by_the_config_and_judges_any_size(folder: Path):
    judge = load_judge(str(folder))
    assert isinstance(judge, CostJudge)
    answers = judge_safely(judge, [RED, BLUE])
    costs = judge.scorer.costs([RED, BLUE]).tolist()
    assert [answer.harmful for answer in answers] == [cost > 0 for cost in costs]
    assert judge.settings["labels"] == []
    assert len(judge.settings["clip_fingerprint"]) == 64


def test_the_threshold_is_the_folders(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"threshold": 3}))
    judge = load_judge(str(folder))
    verdict = CostJudge(folder).verdict(2.0)
    assert isinstance(verdict, Verdict)
    assert not verdict.harmful
    assert judge.settings["threshold"] == 3


def test_broken_weights_are_refused_and_broken_images_become_errors(folder: Path):
    judge = CostJudge(folder)
    torch.nn.init.constant_(judge.scorer.adapter.head.weight, nan)
    assert isinstance(judge_safely(judge, [RED])[0], JudgeError)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model: .*model\.safetensors"):
        load_judge(str(folder))
