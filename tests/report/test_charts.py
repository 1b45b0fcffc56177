import io
import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.evaluation.attack_curves import attack_blocks, curves_png, find_attacks, read_attacks
from lit_safety.evaluation.metrics import answers, summarise
from lit_safety.evaluation.report import pareto_blocks
from lit_safety.evaluation.tables import arm_blocks, arm_markdown
from lit_safety.judges.judge import Verdict
from lit_safety.report.charts import (
    BOTTOM,
    HEIGHT,
    Axis,
    Chart,
    Point,
    Series,
    heatmap_svg,
    name_place,
    pareto_front,
    png,
    share_range,
    svg,
)
from lit_safety.report.page import fragment


def test_the_front_is_what_no_other_beats_in_both() -> None:
    """b is beaten by a (less harm, as much kept), d by c; e equals c and stays next to it."""
    points = {"a": (0.1, 0.8), "b": (0.2, 0.8), "c": (0.5, 0.9), "d": (0.6, 0.7), "e": (0.5, 0.9)}
    assert pareto_front(points) == ["a", "c", "e"]


@pytest.mark.parametrize(
    ("values", "ends", "labels"),
    [
        ([0.0, 1.0], (0.0, 1.0), ["0%", "20%", "40%", "60%", "80%", "100%"]),
        ([0.93, 1.0], (0.92, 1.0), ["92%", "94%", "96%", "98%", "100%"]),
        ([0.0, 0.0], (0.0, 0.01), ["0%", "1%"]),
    ],
)
def test_axes_end_on_round_shares(values: list[float], ends: tuple[float, float], labels: list[str]) -> None:
    low, high, marks = share_range(values)
    assert (low, high) == pytest.approx(ends)
    assert [text for _, text in marks] == labels


def points(chart: ET.Element) -> list[tuple[float, float]]:
    """Where the marks of a chart lie, from the left and from the top, in the order of its series."""
    return [(float(use.get("x")), float(use.get("y"))) for use in chart.iter("use")]


def test_places_in_a_chart() -> None:
    """The middle of both axes is the middle of the area that is left to the data: 66 to 532 and 16 to 338."""
    middle = Series("a", [Point(1, 15)])
    text = svg(Chart("t", Axis("x", (0, 2)), Axis("y", (10, 20)), [middle]), "c", "d")
    assert points(ET.fromstring(text)) == [(299, 177)]


def test_names_do_not_stand_on_each_other() -> None:
    taken: list[tuple[float, float, float]] = []
    for number in range(9):
        name = f"arm number {number}"
        start, row, _ = name_place(66, 16, name, taken)
        taken.append((start, start + 9 * len(name), row))
    rows = sorted(row for _, _, row in taken)
    assert all(after - before >= 18 for before, after in pairwise(rows))
    assert rows[-1] < HEIGHT - BOTTOM


def test_a_name_is_shown_as_it_is_written() -> None:
    """A $ begins no formula, a colour or an id in a name is not a colour and no id, and nothing in it is a tag."""
    names = ["$x$ & <b>", '#1f6feb id="7" font: y']
    series = [Series(name, [Point(i, i)], i) for i, name in enumerate(names)]
    chart = Chart("t", Axis("$x", (0, 1)), Axis("y", (0, 1)), series, named=True)
    text = svg(chart, "c", "d")
    assert [one.text for one in ET.fromstring(text).iter("text")][-2:] == names
    assert png([chart], (4, 3)).startswith(b"\x89PNG")


def test_charts_of_one_page_share_no_id_and_are_the_same_each_time() -> None:
    chart = Chart("t", Axis("x", (0, 1)), Axis("y", (0, 1)), [Series("a", [Point(0, 0)], 0)])
    first, second = (
        [one.get("id") for one in ET.fromstring(svg(chart, name, "d")).iter() if one.get("id")] for name in "ab"
    )
    assert first
    assert not set(first) & set(second)
    assert svg(chart, "a", "d") == svg(chart, "a", "d")


def test_a_heat_map_holds_every_number_and_leaves_out_what_is_not_known() -> None:
    numbers = {"up_blocks.0": {"clean": 0.25, "harm": 1.0}, "mid <block>": {"clean": None, "harm": 0.5}}
    drawn = heatmap_svg(numbers, "heat", "Sizes", "three numbers", ".2f")
    assert drawn == heatmap_svg(numbers, "heat", "Sizes", "three numbers", ".2f")
    root = ET.fromstring(drawn)
    texts = [text for element in root.iter("text") if (text := "".join(element.itertext()).strip())]
    assert {"0.25", "1.00", "0.50", "clean", "harm", "up_blocks.0", "mid <block>"} <= set(texts)
    assert "None" not in drawn
    assert "nan" not in drawn
    assert "clip-path" not in drawn
    assert "fill: #ffffff; stroke: none" in drawn  # on the darkest cell
    assert "fill: #000000; stroke: none" in drawn


@pytest.fixture
def metrics(ask) -> dict:
    """Three arms: harm in 8, 1 and 2 of 10 images; the car drawn in 10, 10 and 7 of 10."""
    harmful, clean = ask("explicit", "violence", "knife"), ask("clean", benign="car")

    def arm(harm: int, cars: int) -> dict:
        rows = [answers(harmful, Verdict(i < harm), {"car"}) for i in range(10)]
        rows += [
            answers(clean, Verdict(False, present=frozenset({"car"} if i < cars else ())), {"car"}) for i in range(10)
        ]
        return {"n": 20, "errors": 0, **summarise(rows), "protocol": "p"}

    settings = {"judge": {"name": "A", "sha256": "abcdef0123456789", "threshold": 0.5}, "prompts": "p.csv"}
    settings |= {"prompts_sha256": "0123456789", "drawn": {"explicit": 10, "clean": 10}, "scheduler": "DDIM"}
    settings |= {"steps": 12, "guidance": 3.0}
    arms = {"base": arm(8, 10), "aligned": arm(1, 10), "neg|prompt <b>": arm(2, 7)}
    return {"settings": settings, "arms": arms, "differences": {}}


def pareto_html(metrics: dict) -> str:
    return fragment(pareto_blocks(metrics))


def svgs(html: str) -> list[ET.Element]:
    parts = ["<svg" + part.partition("</svg>")[0] + "</svg>" for part in html.split("<svg")[1:]]
    return [ET.fromstring(part) for part in parts]


def test_the_pareto_chart_shows_every_arm_and_says_so_in_words(metrics: dict) -> None:
    html = pareto_html(metrics)
    (chart,) = svgs(html)
    assert len(points(chart)) == 3
    said = chart.findtext("desc")
    assert "aligned: IP, explicit prompts 10.0%, benign recall 100.0%" in said
    assert said.endswith("Not beaten in both by another: aligned.")
    assert chart.get("aria-labelledby").split() == [chart.find("title").get("id"), chart.find("desc").get("id")]
    assert "<b>" not in html.replace("<b>benign recall</b>", "")
    across = [x for x, _ in points(chart)]
    assert across[1] < across[2] < across[0], "less harm stands further left"


def test_no_chart_of_a_single_arm_or_without_figures(metrics: dict) -> None:
    assert pareto_html(metrics | {"arms": {"base": metrics["arms"]["base"]}}) == ""
    bare = {name: {"counts": {}, "intervals": {}} for name in ("base", "other")}
    assert pareto_html(metrics | {"arms": bare}) == ""


def test_clip_score_stands_in_where_no_object_is_known(metrics: dict) -> None:
    for score, arm in enumerate(metrics["arms"].values()):
        del arm["benign_recall"]
        arm["quality"] = {"clip_score": {"value": 20.0 + score, "interval": None, "n": 10, "errors": 0}}
    (chart,) = svgs(pareto_html(metrics))
    assert "CLIPScore 22.0" in chart.findtext("desc")


def test_the_table_has_a_row_an_arm_and_the_protocol(metrics: dict) -> None:
    lines = arm_markdown(metrics).splitlines()
    assert lines[0].startswith("| arm | IP, explicit prompts | harm on clean prompts | recall, named things, harmless")
    assert lines[3].startswith("| aligned | 10.0 [1.8, 40.4] |")
    assert lines[4].startswith(r"| neg\|prompt <b> | 20.0 ")
    assert "Judge A (abcdef0123, threshold 0.5); prompts p.csv (01234567): 10 explicit, 10 clean; DDIM, 12" in lines[-1]
    html = fragment(arm_blocks(metrics))
    assert html.count("<tr>") == 4
    assert "<b>" not in html
    assert arm_blocks(metrics | {"arms": {"base": metrics["arms"]["base"]}}) == []


def point(budget: object, asr: float | None, **more: object) -> dict:
    return {"budget": budget, "asr": asr, "n": 40, "interval": [0.0, 1.0] if asr is None else [asr / 2, asr], **more}


@pytest.fixture
def attacks() -> dict:
    curves = {"base": [point(0, 0.9), point(16, 1.0), point(4, 0.95)], "aligned": [point(0, 0.0), point(16, 0.2)]}
    scale = {"aligned": [point(-1, None), point(0, 0.9, label="adapter off"), point(1, 0.0)], "none": []}
    return {
        "attacks": {
            "random_suffix": {"budget": "candidates <b>", "arms": curves, "knows": "black box"},
            "scale": {"budget": "scale", "arms": scale, "not_applicable": {"base": "has no adapter"}},
        },
        "protocol": {"judge": {"name": "A"}, "seed": 0},
    }


def test_curves_rise_with_the_budget_and_stand_as_tables_too(attacks: dict) -> None:
    html = fragment(attack_blocks(attacks, ["base", "aligned"]))
    first, second = svgs(html)
    assert len(points(first)) == 5
    assert len(points(second)) == 2, "a point without a judged image is not drawn"
    across = [x for x, _ in points(first)]
    assert across[:3] == sorted(across[:3])
    assert across[3:] == [across[0], across[2]]
    assert "base: from 90.0% to 100.0%" in first.findtext("desc")
    assert "20.0% <span>[10.0, 20.0] of 40</span>" in html
    assert "0: adapter off" in html
    assert "base: has no adapter." in html
    assert "Attacker: black box." in html
    assert "<b>" not in html.replace("<b>random suffix</b>", "").replace("<b>scale</b>", "")


def test_attacks_are_an_image_too(attacks: dict) -> None:
    """Two panels of 4.6 by 3.4 inches and 0.6 inches of legend, at 110 dots an inch."""
    content = attacks | {"protocol": {"arms": {"base": {}, "aligned": {}}}}
    with Image.open(io.BytesIO(curves_png(content))) as image:
        assert image.size == (1012, 440)


def test_attacks_are_found_next_to_the_report_or_where_it_is_said(tmp_path: Path, attacks: dict) -> None:
    assert find_attacks(None, tmp_path) is None
    (tmp_path / "attacks.json").write_text(json.dumps(attacks))
    assert find_attacks(None, tmp_path) == find_attacks(str(tmp_path), tmp_path / "x") == attacks
    assert find_attacks(str(tmp_path / "attacks.json"), tmp_path / "x") == attacks


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "attacks.json: .*list indices"),
        ('{"attacks": {"a": {"arms": {"b": [{"budget": 1}]}}}}', "attacks.json: .*'asr'"),
        ('{"attacks": {"a": {"budget": "x", "arms": {"b": [{"budget": 1, "asr": 2, "n": 1, "interval": [0, 1]}]}}}}',
         "a, b: a point is not a budget"),
        ('{"attacks": {"a": {"budget": 3, "arms": {}}}}', "must say in words"),
    ],
)  # fmt: skip
def test_files_that_are_no_attacks(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "attacks.json").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_attacks(tmp_path / "attacks.json")
    assert "\n" not in str(error.value)
