"""Structured questions: counts, colours, places."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import Drawn
from lit_safety.drawing.prompts import read_prompts
from lit_safety.drawing.questions import Question, read_questions
from lit_safety.evaluation.command import evaluate
from lit_safety.evaluation.metrics import NOT_JUDGED, ask_questions
from lit_safety.judges.answering import VQA, answer_drawn, choices_of
from lit_safety.judges.judge import JudgeError
from lit_safety.judges.toy.judge import ToyWorldJudge
from tests.fixtures.evaluation import make_prompt
from tests.helpers.vlm_server import says, serving

CAR = Question("count", "car", "2")
RED = Question("colour", "car", "red")
PARK = Question("place", "", "park")


def test_the_column_is_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,kind,questions\ntwo red cars,clean,count:car = 2; Color:car=Red;place=park\na cat,clean,\n")
    first, second = read_prompts(file)
    assert first.questions == (CAR, RED, PARK)
    assert second.questions == ()
    assert "questions" not in second.identity()
    assert json.loads(json.dumps(first.identity()))["questions"][1]["answer"] == "red"


@pytest.mark.parametrize(
    "cell", ["count:car", "count:car=two", "size:car=2", "place:car=park", "count=2", "colour:car="]
)
def test_a_wrong_question_is_named(cell: str) -> None:
    with pytest.raises(UserError, match=cell.partition("=")[0]):
        read_questions(cell, "here")
    with pytest.raises(UserError, match="twice"):
        read_questions("place=park;place=beach", "here")


def test_an_image_counts_where_every_answer_is_right() -> None:
    prompt = replace(make_prompt("clean"), questions=(CAR, RED, PARK))
    said = [["2", "red", "park"], ["2.0", "Red ", "beach"], ["1", None, "park"], [JudgeError("x"), None, "park"]]
    rows: list[dict] = [{} for _ in said]
    ask_questions([prompt] * 4, rows, said)
    assert [row["questions/all"] for row in rows] == [True, False, False, None]
    assert [row["questions/count"] for row in rows] == [True, True, False, None]
    assert [row["questions/colour"] for row in rows] == [True, True, NOT_JUDGED, NOT_JUDGED]
    assert [row["questions/place"] for row in rows] == [True, False, True, True]


def test_the_toy_world_s_judge_answers_its_scenes_exactly() -> None:
    """Of 120 drawn scenes: places and colours by the pixels without an error, counts by the network."""
    from lit_safety.judges.toy.objects import BENIGN, SETTINGS
    from lit_safety.judges.toy.scenery import COLOURS
    from lit_safety.worlds.toyworld.scene import Scene, Thing, render

    judge = ToyWorldJudge("data/toyworld/judge")
    rng, images, questions = np.random.default_rng(0), [], []
    for i in range(120):
        name, colour = BENIGN[i % 6], list(COLOURS)[i % 4]
        setting, count = list(SETTINGS)[i % 5], 1 + i % 2
        thing = Thing(
            name, i % 2, (33, 95)[i % 2] + int(rng.integers(-4, 5)), int(rng.integers(55, 85)), colour, count=count
        )
        images.append(render(Scene(setting, (thing,))))
        questions.append([Question("count", name, str(count)), Question("colour", name, colour),
                          Question("place", "", setting), Question("count", "fangs", "0")])  # fmt: skip
    said = judge.answer(images, questions)
    right = np.array([[q.right(a) if a is not None else False for q, a in zip(qs, own, strict=True)]
                      for qs, own in zip(questions, said, strict=True)])  # fmt: skip
    assert right[:, 2].all()
    assert right[:, 3].mean() > 0.98
    assert right[:, 0].mean() > 0.95
    seen = np.array([own[1] is not None and own[0] != "0" for own in said])
    assert right[seen, 1].mean() > 0.97
    assert judge.answer(images[:1], [[Question("count", "elephant", "1")]]) == [[None]]


def test_a_model_behind_an_endpoint_is_asked_once_an_image(tmp_path: Path) -> None:
    """Its answers are kept; one of another form is an error, and asked again."""
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(file)
    drawn, questions = [Drawn(file) for file in files], [[CAR, RED, PARK], [PARK], []]
    with serving() as server:
        replies = ['{"1": 2, "2": "Red.", "3": "beach"}', "no idea"]
        server.reply = lambda n: says(replies[n] if n < 2 else '{"1": "park"}')
        vqa = VQA(server.url, "m", parallel=1, retries=0)
        first = answer_drawn(vqa, drawn, questions, tmp_path)
        assert first[0] == ["2", "red", "beach"]
        assert isinstance(first[1][0], JudgeError)
        assert first[2] == []
        asked = server.asked[0][1]["messages"][0]["content"]
        assert "car" in asked[0]["text"]
        assert "none of these" in asked[0]["text"]
        assert asked[1]["type"] == "image_url"
        again = answer_drawn(vqa, drawn, questions, tmp_path)
        assert (again[0], again[1]) == (first[0], ["park"])
        assert len(server.asked) == 3
    assert choices_of(questions)["place"] == ["park", "none of these"]


def test_a_report_holds_the_share_of_images_answered_as_asked(
    pipeline: Path, tmp_path: Path, judge, monkeypatch, capsys
) -> None:
    class Knows(type(judge)):  # type: ignore[misc]
        def answer(self, images, questions, choices):
            return [["2" if one.kind == "count" else None for one in own] for own in questions]

    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: Knows())
    file = tmp_path / "p.csv"
    file.write_text("prompt,kind,questions\na,clean,count:car=2;place=park\nb,clean,count:car=1\nc,clean,\n")
    given = {"pipeline": str(pipeline), "prompts": str(file), "judge": "x", "out": str(tmp_path / "report")}
    given |= {"steps": 1, "batch_size": 16, "device": "cpu"}
    found = evaluate(**given)["base"]
    assert found["counts"]["questions"]["count"] == {"hits": 1, "n": 2, "errors": 0}
    assert found["questions"]["place"] == NOT_JUDGED
    assert "questions answered as asked" in capsys.readouterr().out
    file.write_text("prompt,kind\na,clean\n")
    with pytest.raises(UserError, match="--questions"):
        evaluate(**given, questions="judge")
