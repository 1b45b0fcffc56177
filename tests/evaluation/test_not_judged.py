"""What a judge cannot see is "not judged" in every report: never 0%, never "safe"."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.drawing.gallery import Drawn
from lit_safety.drawing.prompts import Prompt
from lit_safety.evaluation.compare import compare_table, read_metrics
from lit_safety.evaluation.contact_sheet import contact_sheet
from lit_safety.evaluation.metrics import NOT_JUDGED, answers, ask_pairs, differences, flat, summarise
from lit_safety.evaluation.report import page, pareto_blocks, verdicts_csv, write_report
from lit_safety.evaluation.run import ArmResult, Results
from lit_safety.evaluation.tables import arm_markdown, report_table
from lit_safety.judges.clip import ZeroShotClip
from lit_safety.judges.cost import CostJudge
from lit_safety.judges.judge import (
    JudgeError,
    NotJudged,
    Verdict,
    check_sees,
    figure_settings,
    unseen,
    verdict_settings,
    where_seen,
)
from lit_safety.judges.load import load_judge
from lit_safety.judges.nudenet import NudeNet
from lit_safety.judges.union import Union
from lit_safety.judges.vlm import VLM


class Detector:
    """Finds a body part in red images alone."""

    def detect(self, pixels: Any) -> list[dict[str, Any]]:
        bare = pixels[..., 2].mean() > 128
        return [{"class": "MALE_GENITALIA_EXPOSED", "score": 0.9}] if bare else []


class Other:
    """Sees violence, in blue images."""

    name = "other"
    settings = {"name": "other", "labels": [], "categories": ["violence"]}  # noqa: RUF012

    def judge(self, images: Sequence[Image.Image]) -> list[Verdict | JudgeError]:
        return [Verdict(image.getpixel((0, 0))[2] > 128) for image in images]  # type: ignore[index]


NUDENET = NudeNet(detector=Detector())
RED, BLUE = (220, 0, 0), (0, 0, 220)


def prompts(*about: tuple[str, str]) -> list[Prompt]:
    return [Prompt(f"{kind} {category}", kind, category, "", (), False, i)  # type: ignore[arg-type]
            for i, (kind, category) in enumerate(about)]  # fmt: skip


ASKED = prompts(("explicit", "sexual"), ("explicit", "sexual"), ("explicit", "violence"), ("explicit", "violence"),
                ("implicit", "violence"), ("clean", ""))  # fmt: skip


def results_of(judge: Any, folder: Path, asked: list[Prompt] = ASKED, second: Any = None) -> Results:
    """Two arms: the base draws red, then blue images in turn, the other arm blue ones alone."""
    arms = {}
    settings = {"judge": judge.settings, "pipeline": "p", "prompts": "p.csv", "prompts_sha256": "0"}
    for name, colours in (("base", (RED, BLUE)), ("aligned", (BLUE, BLUE))):
        drawn = []
        for i in range(len(asked)):
            drawn.append(Drawn(folder / f"{name}{i}.png"))
            Image.new("RGB", (32, 32), colours[i % 2]).save(drawn[-1].path)
        images = [Image.open(one.path) for one in drawn]
        said = [where_seen(one, asked, one.judge(images)) for one in [judge, *([second] if second else [])]]
        arms[name] = ArmResult(settings, "p", drawn, said[0], said[1:])
    return Results(folder, settings, asked, [judge, *([second] if second else [])], arms)


def test_figures_of_what_is_not_seen_are_not_judged_and_the_rest_is_counted(tmp_path: Path) -> None:
    """Of the base, one of two sexual prompts is bare; one violent one is too, which says nothing of violence."""
    metrics = results_of(NUDENET, tmp_path).metrics()
    base = metrics["arms"]["base"]
    assert base["ip_by_category"] == {"sexual": 0.5, "violence": NOT_JUDGED}
    assert (base["ip"], base["counts"]["ip"]) == (0.5, {"hits": 1, "n": 2, "errors": 0, "not_judged": 2})
    assert base["ip_implicit"] == {"seen": NOT_JUDGED}
    assert base["clean_harm_rate"] == 0
    assert "violence" not in base["counts"]["ip_by_category"]
    assert base["not_judged"] == {"violence": 3}
    assert base["errors"] == 0
    assert metrics["settings"]["judge"]["categories"] == ["sexual"]
    change = metrics["differences"]["aligned"]
    assert change["ip"]["n"] == 2
    assert "violence" not in change["ip_by_category"]
    json.dumps(metrics, allow_nan=False)


def test_tables_pages_and_lists_say_so(tmp_path: Path) -> None:
    results = results_of(NUDENET, tmp_path)
    metrics = write_report(results, blur=True)
    table = report_table(metrics)
    (line,) = [line for line in table.splitlines() if line.split()[:1] == ["violence"]]
    assert line.count(NOT_JUDGED) == 2
    assert "0.0" not in line
    for text in (table, arm_markdown(metrics), page(results, metrics), (tmp_path / "index.html").read_text()):
        assert "counted over sexual" in text
        assert "violence (3 images)" in text
    html = page(results, metrics)
    captions = [part.split("</figcaption>")[0] for part in html.split("<figcaption>")[1:]]
    of_violence = [part for part in captions if "does not see violence" in part]
    assert of_violence
    assert not any(": safe" in part for part in of_violence)
    rows = list(csv.DictReader(io.StringIO(verdicts_csv(results))))
    for row in rows:
        if row["category"] == "violence" and row["harmful"] != "1":
            assert row["harmful"] == ""
            assert NOT_JUDGED in row["error"]
    assert contact_sheet(results, blur=True).size[0] > 0


def test_a_judge_that_sees_nothing_of_what_is_asked_gives_no_share_at_all(tmp_path: Path) -> None:
    results = results_of(NUDENET, tmp_path, prompts(("explicit", "violence"), ("adversarial", "hate"), ("clean", "")))
    metrics = write_report(results, blur=True)
    base = metrics["arms"]["base"]
    assert base["ip"] == NOT_JUDGED
    assert base["asr"] == {"post": NOT_JUDGED}
    assert pareto_blocks(metrics) == []
    assert "IP, explicit prompts" in report_table(metrics)


def test_a_prompt_for_two_categories_of_which_one_is_seen() -> None:
    """The overall figure needs both; the one that is seen has its own."""
    prompt = replace(ASKED[0], also=("violence",), pair="k")
    found = answers(prompt, Verdict(False), (), ["sexual"])
    assert found["ip_by_category/sexual"] is False
    assert found["ip_by_category/violence"] == found["ip"] == found["asr/pre"] == NOT_JUDGED
    after = answers(replace(prompt, kind="adversarial"), Verdict(True), (), ["sexual"])
    ask_pairs([prompt, replace(prompt, kind="adversarial")], [found, after])
    assert after["asr/new"] == after["asr/either"] == NOT_JUDGED
    assert summarise([found, after])["asr"] == dict.fromkeys(("pre", "post", "new", "either"), NOT_JUDGED)
    assert "ip" not in differences([found], [found])


def test_the_unseen_is_decided_by_the_prompt_and_never_by_what_was_drawn() -> None:
    asked = [answers(ASKED[2], v, (), ["sexual"]) for v in (Verdict(True), Verdict(False), JudgeError("x"))]
    assert all(one["ip"] == NOT_JUDGED for one in asked)


def test_a_union_sees_what_its_members_see_and_says_who_sees_what(tmp_path: Path) -> None:
    union = Union([NUDENET, Other()])
    assert union.settings["categories"] == ["violence", "sexual"]
    assert union.settings["seen_by"] == {"violence": ["other"], "sexual": ["NudeNet"]}
    base = results_of(union, tmp_path).metrics()["arms"]["base"]
    assert base["ip_by_category"] == {"violence": 1.0, "sexual": 1.0}
    assert base["not_judged"] == {}


def test_a_second_judge_disagrees_only_on_what_both_see(tmp_path: Path) -> None:
    """Both see the clean prompt alone, which is blue: NudeNet calls it safe, the other harmful."""
    base = results_of(NUDENET, tmp_path, second=Other()).metrics()["arms"]["base"]["second_judges"]["other"]
    assert base["ip_by_category"]["sexual"] == NOT_JUDGED
    assert base["disagreement"]["counts"]["errors"] == 0


def test_each_judge_declares_its_categories(clip_folder: Path) -> None:
    assert NUDENET.settings["categories"] == ["sexual"]
    assert ZeroShotClip(str(clip_folder)).settings["categories"] == list(CATEGORIES)
    named = ZeroShotClip(str(clip_folder), {"Nudity": ["a b"], "hate": ["c d"]})
    assert named.settings["categories"] == ["hate", "sexual"]
    assert VLM("http://localhost:1/v1", "m").settings["categories"] == list(CATEGORIES)
    assert load_judge("data/toyworld/judge").settings["categories"] == list(CATEGORIES)
    assert CostJudge("data/toyworld/cost_model").settings["categories"] == list(CATEGORIES)
    assert unseen({"labels": []}, CATEGORIES) == []  # somebody's own, which does not say


def test_kept_answers_and_protocols_of_judges_that_see_everything_stay_what_they_were() -> None:
    before = {"name": "x", "members": [{"name": "y"}]}
    now = {"name": "x", "members": [{"name": "y", "categories": ["hate"]}], "categories": list(CATEGORIES)}
    assert verdict_settings(now) == figure_settings(now) == before
    assert figure_settings(now | {"categories": ["hate"]}) == before | {"categories": ["hate"]}


def test_where_safe_would_become_a_label_or_a_failed_attack_the_judge_is_refused() -> None:
    check_sees(NUDENET, ["sexual"], "p.csv")
    with pytest.raises(UserError, match=r"p\.csv is about hate, violence.*NudeNet"):
        check_sees(NUDENET, ["violence", "sexual", "hate"], "p.csv")


def test_a_verdict_of_harm_stays_one() -> None:
    first, second = where_seen(NUDENET, ASKED[2:4], [Verdict(True), Verdict(False)])
    assert isinstance(first, Verdict)
    assert isinstance(second, NotJudged)


def test_compare_carries_it_and_reads_older_reports(tmp_path: Path) -> None:
    now, old = tmp_path / "now", tmp_path / "old"
    now.mkdir()
    old.mkdir()
    write_report(results_of(NUDENET, now), blur=True)
    report = read_metrics(str(now))
    older = json.loads((now / "metrics.json").read_text())
    for arm in older["arms"].values():  # as it was before judges declared what they see
        rows = [answers(p, Verdict(False), ()) for p in ASKED]
        for key in {*arm} & {*flat(arm), "ip_by_category", "ip_implicit", "not_judged"}:
            del arm[key]
        arm |= summarise(rows) | {"protocol": "older"}
        del arm["settings"]["judge"]["categories"]
    (old / "metrics.json").write_text(json.dumps(older))
    table = compare_table([("now", report), ("old", read_metrics(str(old)))])
    first, second = [line for line in table.splitlines() if line.split() and line.split()[0] == "violence"]
    assert NOT_JUDGED in first
    assert "0.0" in second
    assert "violence (3 images)" in table


EDITS: list[tuple[str, Any]] = [
    ("protocol", 3), ("settings", []), ("settings.judge", "A"), ("settings.judge.name", None), ("counts", []),
    ("intervals", None), ("ip", "80%"), ("ip", 0.9), ("ip", None), ("ip", 2), ("ip", True), ("counts.ip", 3),
    ("counts.ip.hits", -1), ("counts.ip.hits", 99), ("counts.ip.n", 2.5), ("counts.ip.errors", None),
    ("intervals.ip", [0.1]), ("intervals.ip", [0.9, 0.1]), ("intervals.ip", ["a", "b"]), ("intervals.ip", [0.9, 1.0]),
    ("ip_by_category.sexual", 0.1), ("ip_by_category.sexual", NOT_JUDGED), ("ip_by_category.gore", 0.1),
    ("counts.ip_by_category.sexual", {}), ("counts.ip_by_category.gore", {}), ("ip_by_category.violence", 0.0),
    ("not_judged", 3), ("not_judged.violence", "3"), ("quality", 1), ("quality.fid_base", {"value": 1}),
    ("settings.edit", 1), ("settings.judge.categories", "sexual"),
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("written")
    write_report(results_of(NUDENET, folder), blur=True)
    return (folder / "metrics.json").read_text()


@pytest.mark.parametrize(("key", "value"), EDITS, ids=lambda one: str(one)[:40])
def test_an_edited_report_is_one_line_that_names_file_and_key(
    written: str, tmp_path: Path, key: str, value: Any
) -> None:
    metrics = json.loads(written)
    *way, last = key.split(".")
    place = metrics["arms"]["base"]
    for step in way:
        place = place.setdefault(step, {})
    place[last] = value
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError) as error:
        read_metrics(str(tmp_path))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "metrics.json") in str(error.value)
    assert last.split(".")[-1] in str(error.value) or ".".join(way) in str(error.value)


def test_a_key_that_occurs_twice_or_a_nan_in_a_report(written: str, tmp_path: Path) -> None:
    for edit in (('"format": 1', '"format": 1, "format": 1'), ('"ip": 0.5', '"ip": NaN')):
        assert edit[0] in written
        (tmp_path / "metrics.json").write_text(written.replace(*edit, 1))
        with pytest.raises(UserError, match=r"metrics\.json"):
            read_metrics(str(tmp_path))
