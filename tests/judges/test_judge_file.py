import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import check_labels
from lit_safety.judges.load import load_judge
from lit_safety.judges.q16 import Q16
from lit_safety.judges.toy.judge import ToyJudge
from lit_safety.judges.union import Union
from tests.helpers.documents import CONFIGS

JUDGES = CONFIGS / "judges"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "p.p").write_bytes(pickle.dumps(np.eye(2, 8, dtype=np.float32), protocol=2))
    return tmp_path / "p.p"


def save(file: Path, content: object) -> str:
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_a_union_of_a_toy_judge_and_q16(clip_folder: Path, prompts: Path, tmp_path: Path) -> None:
    ToyJudge(labels=["gun"], harm={"gun": "violence"}, width=8).save_pretrained(tmp_path / "toy")
    where = "lit_safety.judges"
    q16 = {
        "class_path": f"{where}.Q16",
        "init_args": {"clip": str(clip_folder), "prompts": str(prompts)},
    }
    toy = {"class_path": f"{where}.ToyWorldJudge", "init_args": {"folder": str(tmp_path / "toy")}}
    union = {"class_path": f"{where}.Union", "init_args": {"judges": [toy, q16]}}
    judge = load_judge(save(tmp_path / "union.yaml", union))
    assert isinstance(judge, Union)
    assert judge.name == "toyworld/toy or Q16"
    assert isinstance(load_judge(save(tmp_path / "q16.json", q16)), Q16)


def shipped(name: str, clip: Path, prompts: Path) -> dict:
    """A shipped file with this test's weights in it."""
    text = (JUDGES / f"{name}.yaml").read_text()
    text = text.replace("openai/clip-vit-large-patch14", str(clip))
    return yaml.safe_load(text.replace("data/judges/q16/prompts.p", str(prompts)))


@pytest.mark.parametrize("name", ["q16", "clip", "vlm"])
def test_what_is_shipped_loads(name: str, clip_folder: Path, prompts: Path, tmp_path: Path) -> None:
    judge = load_judge(save(tmp_path / "j.yaml", shipped(name, clip_folder, prompts)))
    assert judge.settings["name"] == judge.name


@pytest.mark.parametrize("name", ["nudenet", "nudenet_or_q16"])
def test_what_is_shipped_with_nudenet(name: str, clip_folder: Path, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    class Quiet:
        def detect(self, _: object) -> list:
            return []

    monkeypatch.setattr("lit_safety.judges.nudenet._load", lambda: (Quiet(), "3"))
    judge = load_judge(save(tmp_path / "j.yaml", shipped(name, clip_folder, prompts)))
    assert "NudeNet" in judge.name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"init_args": {}}, "class_path"),
        ([1], "class_path"),
        ({"class_path": "lit_safety.judges.Q16", "init_args": {"clap": "x"}}, "clap"),
        ({"class_path": "no.such.Judge"}, "no.such"),
        ({"class_path": "lit_safety.core.UserError"}, "Judge"),
        (
            {
                "class_path": "lit_safety.judges.Q16",
                "init_args": {"clip": "x", "prompts": "absent.p"},
            },
            "absent.p: no such file",
        ),
    ],
)
def test_a_file_that_describes_none(tmp_path: Path, content: object, says: str) -> None:
    file = save(tmp_path / "j.yaml", content)
    with pytest.raises(UserError, match=says) as error:
        load_judge(file)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "j.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_judge(str(tmp_path / "j.yaml"))
    with pytest.raises(UserError, match="no such folder"):
        load_judge(str(tmp_path / "absent.yaml"))


def test_a_judge_of_categories_takes_prompts_with_concepts(clip_folder: Path, ask) -> None:
    check_labels(load_judge(str(clip_folder)), [ask("explicit", "violence", "knife")], "p.csv")
