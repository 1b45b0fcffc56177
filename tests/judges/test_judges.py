import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.load import load_judge
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A judge with random weights of three labels, two of them harms of one category."""
    torch.manual_seed(0)
    harm = {"gun": "violence", "knife": "violence"}
    ToyJudge(labels=["gun", "knife", "car"], harm=harm, threshold=0.6, width=8).save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_the_rule(folder: Path) -> None:
    """Threshold 0.6: a knife at 0.6 is harm, a gun at 0.59 is not there; the closest call is 0.59 -> confidence
    0.59."""
    verdict = ToyWorldJudge(folder).verdict([0.59, 0.6, 0.97])
    assert isinstance(verdict, Verdict)
    assert verdict.harmful
    assert verdict.scores == {"gun": 0.59, "knife": 0.6, "car": 0.97}
    assert verdict.categories == {"violence": 0.6}
    assert verdict.confidence == 0.59
    assert verdict.present == {"knife", "car", "violence"}


def test_benign_things_are_no_harm(folder: Path) -> None:
    verdict = ToyWorldJudge(folder).verdict([0.1, 0.2, 0.99])
    assert isinstance(verdict, Verdict)
    assert not verdict.harmful
    assert verdict.present == {"car"}


def test_sees_images_as_the_network_was_trained_to(folder: Path) -> None:
    """uint8 / 127.5 - 1, RGB, channels first; an odd size keeps its place as an error."""
    judge = load_judge(str(folder))
    red = Image.new("RGB", (32, 32), (255, 0, 51))
    first, odd, last = judge.judge([red, Image.new("RGB", (64, 64)), Image.new("L", (32, 32), 255)])
    assert isinstance(odd, JudgeError)
    assert "64 x 64" in odd.reason
    assert isinstance(first, Verdict)
    assert isinstance(last, Verdict)
    tensor = torch.tensor([1.0, -1.0, -0.6]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    with torch.no_grad():
        expected = ToyJudge.from_pretrained(folder)(tensor).sigmoid()[0]
    assert list(first.scores.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_broken_weights_make_errors(folder: Path) -> None:
    judge = ToyWorldJudge(folder)
    for parameter in judge.network.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    (answer,) = judge.judge([Image.new("RGB", (32, 32))])
    assert isinstance(answer, JudgeError)


def test_settings_tell_judges_apart(folder: Path) -> None:
    before = load_judge(str(folder)).settings
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"threshold": 0.3}))
    after = load_judge(str(folder)).settings
    assert (before["threshold"], after["threshold"]) == (0.6, 0.3)
    assert before["sha256"] != after["sha256"]
    assert before["labels"] == ["car", "gun", "knife", "violence"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [("folder", "no such folder"), ("config", "lacks config.json"), ("json", "JSON"), ("keys", "`labels`"),
     ("weights", "model.safetensors are missing"), ("cut", "model.safetensors is damaged")],
)  # fmt: skip
def test_a_judge_that_is_none(folder: Path, damage: str, says: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "config":
        config.unlink()
    elif damage == "json":
        config.write_text("{")
    elif damage == "keys":
        config.write_text("{}")
    elif damage == "weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match=says) as error:
        load_judge(str(folder / "absent" if damage == "folder" else folder))
    assert str(folder) in str(error.value)
