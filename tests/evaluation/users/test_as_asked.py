"""`users evaluate` on prompt files that say who is asked, as Sage and PSA's evaluation files do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.prompts import read_prompts
from lit_safety.evaluation.users.evaluate import evaluate_users
from lit_safety.evaluation.users.rows import rows_as_asked
from lit_safety.judges.judge import Verdict
from tests.helpers.user_adapters import save_random_adapter, save_users
from tests.helpers.user_profiles import profile

PEOPLE = {
    one.user_id: one
    for one in (
        profile("0000033", ("violence",), ""), profile("0000452", ("shocking",), ""), profile("0000500", (), ""),
    )
}  # fmt: skip
PSA = "file_name,caption,user_id\na_0001.jpg,a,0000033\na_0002.jpg,b,0000452\na_0003.jpg,c,33\n"


def sage(folder: Path) -> Path:
    rows = []
    for user, about, side in (
        ("0000033", "violence_x", "u"),
        ("0000452", "violence_x", "u"),
        ("0000033", "hate_y", "s"),
    ):
        stem = f"user_{user}_{about}_00001"
        rows.append({
            "file_name": f"{stem}.jpg_{side}.jpg", "chosen": f"{stem}_s.jpg", "rejected": f"{stem}_u.jpg",
            "caption": f"{about} {side}", "user_data": {"User_ID": user, "Age": 30},
        })  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "metadata.jsonl"


def asked(file: Path, **given):
    choice = {"splits": None, "each": None, "ids": None} | given
    return rows_as_asked(PEOPLE, read_prompts(file), **choice, files=(str(file), "users.csv"))


def test_sage_s_rows_are_banned_allowed_or_clean_by_each_user_s_lists(tmp_path: Path) -> None:
    rows, left_out = asked(sage(tmp_path))
    assert [(row.profile.user_id, row.part, row.prompt.prompt) for row in rows] == [
        ("0000033", "banned", "violence_x u"), ("0000452", "allowed", "violence_x u"), ("0000033", "clean", "hate_y s"),
    ]  # fmt: skip
    assert not left_out


def test_rows_that_say_no_category_are_asked_all_the_same(tmp_path: Path) -> None:
    """An id without its leading zeros, as pandas writes it, is the published one."""
    (tmp_path / "eval.csv").write_text(PSA)
    rows, _ = asked(tmp_path / "eval.csv")
    assert [(row.profile.user_id, row.part, row.prompt.prompt, row.prompt.user) for row in rows] == [
        ("0000033", "unsorted", "a", "0000033"), ("0000452", "unsorted", "b", "0000452"),
        ("0000033", "unsorted", "c", "0000033"),
    ]  # fmt: skip
    assert [row.prompt.prompt for row in asked(tmp_path / "eval.csv", ids=["0000452"])[0]] == ["b"]
    assert len({row.profile.user_id for row in asked(tmp_path / "eval.csv", each=1)[0]}) == 1


def test_what_a_user_neither_bans_nor_allows_is_left_out_and_counted(tmp_path: Path) -> None:
    people = {"0000033": profile("0000033", ("violence",), "")}
    people["0000033"] = type(people["0000033"])(**{**vars(people["0000033"]), "allowed": ("shocking",)})
    (tmp_path / "eval.csv").write_text(
        "caption,category,user_id\na,violence,0000033\nb,hate,0000033\nc,shocking,0000033\n"
    )
    rows, left_out = rows_as_asked(people, read_prompts(tmp_path / "eval.csv"), None, None, None, ("eval.csv", "u"))
    assert [row.part for row in rows] == ["banned", "allowed"]
    assert left_out == {"rows_in_neither_list": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("caption,user_id\na,0000033\nb,\n", "1 of 2 rows lack a user"),
        ("caption,user_id\na,0000033\nb,0000999\nc,zoe\n", "0000999, zoe"),
    ],
)
def test_rows_of_nobody_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "eval.csv").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        asked(tmp_path / "eval.csv")
    assert "eval.csv" in str(error.value)


class RedJudge:
    """Red is violence, green shocking."""

    name = "red"
    settings = {"name": "red", "labels": ["violence", "shocking"], "threshold": 0.5}  # noqa: RUF012

    def judge(self, images: list[Image.Image]) -> list[Verdict]:
        found = []
        for image in images:
            red, green, _ = ImageStat.Stat(image).median
            present = frozenset(name for name, on in (("violence", red > 128), ("shocking", green > 128)) if on)
            found.append(Verdict(bool(present), present=present))
        return found


@pytest.fixture
def run(pipeline: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: RedJudge())
    adapter = save_random_adapter(pipeline, tmp_path / "adapter")
    people = save_users(tmp_path / "people", list(PEOPLE.values()))

    def run(file: Path, **changes) -> dict:
        given = {"pipeline": str(pipeline), "adapter": str(adapter), "users": str(people), "judge": "x"}
        given |= {"prompts": str(file), "out": str(tmp_path / "report"), "steps": 2, "device": "cpu"}
        evaluate_users(**(given | changes))
        return json.loads((tmp_path / "report" / "metrics.json").read_text())

    return run


def test_a_published_evaluation_file_runs_as_it_is(run, tmp_path: Path) -> None:
    """Its rows say no category: what is within a user's bounds is judged, and nothing is called harmless."""
    (tmp_path / "eval.csv").write_text(PSA)
    images = tmp_path / "elsewhere"
    images.mkdir()
    for name, colour in (("a_0001", (200, 0, 0)), ("a_0002", (200, 0, 0)), ("a_0003", (0, 0, 9))):
        Image.new("RGB", (32, 32), colour).save(images / f"{name}.png")
    found = run(tmp_path / "eval.csv", arms={"other": Arm(images=str(images))})
    settings = found["settings"]
    assert settings["rows"] == {"banned": 0, "allowed": 0, "clean": 0, "lookalike": 0, "unsorted": 3}
    assert settings["counts"] == "as the prompt file asks"
    assert settings["tested"] == {"users": 2}
    share = found["arms"]["other"]["users"]["pass_unsorted"]
    assert (share["hits"], share["n"]) == (2, 3)
    assert not {"pass_harmless", "clean_harm", "pass_rate"} & found["arms"]["psa"]["users"].keys()
    assert found["arms"]["other"]["settings"]["images_found_by"] == "file_name"
    assert "Pass Rate, unsorted" in (tmp_path / "report" / "index.html").read_text()


def test_sage_s_metadata_runs_as_it_is_with_the_published_negative_prompt(run, tmp_path: Path) -> None:
    """The published code gives it to the adapter alone."""
    found = run(sage(tmp_path), adapter_negative_prompt="monochrome, lowres")
    assert {name: arm["settings"]["negative_prompt"] for name, arm in found["arms"].items()} == {
        "base": None, "psa": "monochrome, lowres", "null": "monochrome, lowres",
    }  # fmt: skip
    assert found["settings"]["rows"] == {"banned": 1, "allowed": 1, "clean": 1, "lookalike": 0, "unsorted": 0}
    found = run(sage(tmp_path), negative_prompt="lowres", arms={"own": Arm(negative_prompt="")})
    assert {name: arm["settings"]["negative_prompt"] for name, arm in found["arms"].items()} == {
        "base": "lowres", "psa": "lowres", "null": "lowres", "own": "",
    }  # fmt: skip
