"""A user's own class in YAML: it is used if it can be called; otherwise the message says what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import Judge
from lit_safety.judges.load import load_judge, object_from_file
from lit_safety.judges.scorers import PreferenceScorer
from lit_safety.objectives import Objective

OWN = """
class Judge:
    def __init__(self, threshold: float = 0.5):
        self.name, self.settings = "own", {"threshold": threshold}

class Plain(Judge):
    def judge(self, images):
        return []

class OtherNames(Judge):
    def judge(self, frames, verbose=False):
        return []

class Static(Judge):
    @staticmethod
    def judge(images):
        return []

class ListAlone(Judge):
    def judge(self, images: list) -> list:
        return []

class NoMethod(Judge):
    pass

class TooMany(Judge):
    def judge(self, images, prompts):
        return []

class OfBools(Judge):
    def judge(self, images) -> bool:
        return True

class OfNothing(Judge):
    def judge(self, images) -> None:
        pass

class NoSettings:
    name = "own"

    def judge(self, images):
        return []

class TextSettings(NoSettings):
    settings = "threshold .5"

def function(images):
    return []

class Scorer:
    name, settings = "own", {}

    def score(self, images, prompts):
        return [1.0 for _ in images]

class Swapped(Scorer):
    def score(self, prompts, images):
        return []
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_judges.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def described(name: str, folder: Path) -> str:
    (folder / "judge.yaml").write_text(f"class_path: own_judges.{name}\n")
    return str(folder / "judge.yaml")


@pytest.mark.parametrize("name", ["Plain", "OtherNames", "Static", "ListAlone"])
def test_a_judge_without_exact_annotations_is_taken(name: str, tmp_path: Path) -> None:
    judge = load_judge(described(name, tmp_path))
    assert type(judge).__name__ == name
    assert judge.judge([]) == []
    assert judge.settings == {"threshold": 0.5}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NoMethod", ["has no method `judge`", "judge(self, images: Sequence[Image]) -> list[Verdict | JudgeError]"]),
        ("TooMany", ["judge(self, images, prompts)", "prompts"]),
        ("OfBools", ["returns bool", "-> list[Verdict | JudgeError]"]),
        ("OfNothing", ["returns", "-> list[Verdict | JudgeError]"]),
        ("NoSettings", ["`settings`", "dict[str, Any]"]),
        ("TextSettings", ["`settings`", "str"]),
        ("function", ["own_judges.function", "judge(self, images"]),
    ],
)
def test_what_a_judge_lacks_is_named_in_one_line(name: str, says: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_judge(described(name, tmp_path))
    for word in ("judge.yaml", f"own_judges.{name}", *says):
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "protocol" not in str(refused.value)


def test_so_are_members_of_a_union(tmp_path: Path) -> None:
    file = tmp_path / "union.yaml"
    file.write_text(
        "class_path: lit_safety.judges.Union\n"
        "init_args: {judges: [{class_path: own_judges.Plain}, {class_path: own_judges.NoMethod}]}\n"
    )
    with pytest.raises(UserError, match=r"own_judges.NoMethod has no method `judge`"):
        load_judge(str(file))
    file.write_text(file.read_text().replace("NoMethod", "NoSettings"))
    with pytest.raises(UserError, match=r"NoSettings has no `settings`"):
        load_judge(str(file))


def test_parameters_in_another_order_are_reported(tmp_path: Path) -> None:
    made = object_from_file(Path(described("Scorer", tmp_path)), PreferenceScorer, "--preference", "x")
    assert made.name == "own"
    with pytest.raises(UserError, match=r"Swapped.*swap its parameters"):
        object_from_file(Path(described("Swapped", tmp_path)), PreferenceScorer, "--preference", "x")
    with pytest.raises(UserError, match=r"Scorer has no method `judge`"):
        object_from_file(Path(described("Scorer", tmp_path)), Judge, "--judge", "x")


def test_an_objective_without_a_loss_is_refused_when_it_is_made() -> None:
    class Empty(Objective):
        pass

    with pytest.raises(ValueError, match="Empty has no loss: define `preference"):
        Empty()
