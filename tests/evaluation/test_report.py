import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lit_safety.drawing.gallery import Drawn
from lit_safety.evaluation.report import _tiles, judged_categories, page
from lit_safety.evaluation.run import ArmResult, Results
from lit_safety.judges.judge import JudgeError, Verdict

SETTINGS = {"pipeline": "<script>alert(1)</script>", "judge": {"name": "brightness", "threshold": 0.5}, "steps": 2}


@pytest.fixture
def results(tmp_path: Path, judge, small_set) -> Results:
    """The first image harmful, the second without verdict, the third without image; large images in `big`."""
    prompts = [replace(small_set[0], prompt='a "gun" <b>&</b>'), *small_set[1:]]
    verdicts = [Verdict(True), JudgeError("crash & burn"), *(Verdict(False) for _ in prompts[2:])]
    arms = {}
    for name, side in (("base", 32), ("big", 700)):
        drawn = [Drawn(tmp_path / f"{name}{i}.png") for i in range(len(prompts))]
        for one in drawn[:2] + drawn[3:]:
            Image.new("RGB", (side, side), (200, 10, 10)).save(one.path)
        arms[name] = ArmResult(SETTINGS, "p", drawn, verdicts)
    return Results(tmp_path, SETTINGS, prompts, [judge], arms)


class Tags(HTMLParser):
    """All tags with their attributes, and whether they are inside a veil; checks that every tag is closed."""

    VOID = frozenset({"meta", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.found: list[tuple[str, dict, bool]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        veiled = any(a.get("class") == "veil" for _, a in self.open)
        self.found.append((tag, dict(attrs), veiled))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag


@pytest.fixture
def html(results: Results) -> str:
    return page(results, results.metrics())


def test_every_tag_is_closed_and_nothing_is_fetched(html: str) -> None:
    tags = Tags(html)
    assert tags.open == []
    names = {tag for tag, _, _ in tags.found}
    assert not names & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import", html)
    assert all(a["src"].startswith("data:image/") for tag, a, _ in tags.found if tag == "img")


def test_what_users_write_is_shown_not_run(html: str) -> None:
    assert "<script>" not in html
    assert "<b>&</b>" not in html
    assert 'a "gun" <b>&</b>' in unescape(html)


def test_every_image_says_what_it_is(html: str) -> None:
    images = [a for tag, a, _ in Tags(html).found if tag == "img"]
    assert len(images) == 10
    assert all(len(a["alt"]) > 20 for a in images)


def test_harmful_and_unjudged_images_are_veiled_and_no_others(html: str) -> None:
    veiled = [a["alt"] for tag, a, veil in Tags(html).found if tag == "img" and veil]
    assert len(veiled) == 4
    assert sum("harmful" in alt for alt in veiled) == 2
    assert sum("no verdict" in alt for alt in veiled) == 2
    boxes = [a for tag, a, veil in Tags(html).found if tag == "input" and veil]
    assert all(box["aria-label"].startswith("show the image") for box in boxes)


def test_large_images_are_shrunk(html: str, results: Results) -> None:
    assert html.count("data:image/jpeg") == html.count("data:image/png") == 5
    assert len(html) < 100_000


def test_errors_are_announced(html: str) -> None:
    assert "role=alert" in html
    assert "crash &amp; burn" in html


def test_captions_tell_harm_from_harmless_by_sign_and_word(html: str) -> None:
    """Not by colour alone: another sign in another frame, and another word."""
    captions = re.findall(r'<span class="mark (\w+)"><i aria-hidden=true>(.)</i> ([^<]*)', html)
    found = {mark: {sign for kind, sign, _ in captions if kind == mark} for mark, _, _ in captions}
    assert found == {"harm": {"\u2715"}, "safe": {"\u2713"}, "open": {"?"}}
    words = {mark: {words.split()[0].strip(",") for kind, _, words in captions if kind == mark} for mark in found}
    assert words == {"harm": {"harmful"}, "safe": {"safe"}, "open": {"no"}}
    frames = dict(re.findall(r"\.mark\.(\w+) i\{([^}]*)\}", html))
    assert frames["harm"] != frames["open"]


def test_ip_is_spelled_out(html: str) -> None:
    assert "inappropriate probability: the share of images with harm" in html.lower()


def test_the_judges_stand_side_by_side(results: Results, html: str, judge) -> None:
    """The second judge errs on the third image and calls the fourth harmful, which the first one calls safe."""
    assert "The judges side by side" not in html

    other = SimpleNamespace(name="stricter", settings=judge.settings)
    for arm in results.arms.values():
        said = [Verdict(True), Verdict(False), JudgeError("gone"), Verdict(True), *[Verdict(False)] * 99]
        arm.second.append(said[: len(arm.verdicts)])
    results.judges.append(other)
    text = page(results, results.metrics())
    (table,) = re.findall(r"<h2>The judges side by side</h2>.*?</table>", text, re.DOTALL)
    rows = {
        re.sub("<[^>]+>", "", head): re.findall(r"<td>([\d.]+|-|none)", cells)
        for head, cells in re.findall(r"<tr><th scope=row>(.*?)</th>(.*?)</tr>", table, re.DOTALL)
    }
    kinds = [prompt.kind for prompt in results.prompts]
    both = [
        (one, two) for one, two in zip(results.arms["base"].verdicts, results.arms["base"].second[0], strict=True)
        if isinstance(one, Verdict) and isinstance(two, Verdict)
    ]  # fmt: skip
    share = 100 * sum(one.harmful != two.harmful for one, two in both) / len(both)
    differs = f"images on which stricter differs from {SETTINGS['judge']['name']}"
    assert rows[differs] == [f"{share:.1f}"] * 2
    assert "explicit" in kinds
    for name in (SETTINGS["judge"]["name"], "stricter"):
        assert len(rows[f"IP, explicit prompts: {name}"]) == 2


def test_the_page_shows_named_next_to_unnamed_and_what_is_there_twice(results: Results) -> None:
    """None of the prompts asks for an unnamed thing, until the last does."""
    assert "not measured" in page(results, results.metrics())
    prompts = [*results.prompts[:-1], replace(results.prompts[-1], unnamed=("tree",))]
    seen = Verdict(False, {"car": 1.0, "tree": 1.0}, present=frozenset({"car", "tree"}), counts={"car": 1, "tree": 2})
    arms = {name: replace(arm, verdicts=[*arm.verdicts[:-1], seen]) for name, arm in results.arms.items()}
    twice = replace(results, prompts=prompts, arms=arms)
    text = page(twice, twice.metrics())
    assert twice.metrics()["base"]["unnamed_recall"] == {"harmless": 0.0, "clean": 0.0}
    assert "tree, several" in text
    assert "recall, unnamed things" in text


def test_the_figures_that_a_protocol_counts_come_first_and_corrected_rates_next_to_what_was_found() -> None:
    def arm(share: float, fid: float) -> dict:
        return {
            "ip": share,
            "ip_by_category": {"sexual": share},
            "clean_harm_rate": 0.0,
            "quality": {"fid_reference": {"value": fid, "interval": None, "n": 8, "errors": 0}},
            "corrected": {"ip": {"value": share / 2, "interval": [0.0, share], "n": 8, "errors": 0}},
        }

    arms = {"base": arm(0.8, 10.0), "aligned": arm(0.2, 12.5)}
    settings = {"protocol": {"counted": ["ip_by_category/sexual", "fid_reference"]}}
    metrics = {"settings": settings, "arms": arms, **arms, "differences": {}}
    found = [(tile.title, tile.value, tile.note) for tile in _tiles(metrics)]
    assert [value for _, value, _ in found] == ["80.0% → 20.0%", "10.00 → 12.50", "80.0% → 20.0%", "0.0% → 0.0%"]
    assert "sexual" in found[0][0]
    assert "aligned corrected: 10.0 [0.0, 20.0]" in found[2][2]
    assert "corrected" not in found[0][2]


def test_a_judge_that_names_no_categories_is_said_to() -> None:
    (text,) = judged_categories({"settings": {"judge": {"name": "x", "categories": ["hate", "sexual"]}}})
    assert "hate, sexual" in text.text
    (text,) = judged_categories({"settings": {"judge": {"name": "x"}}})
    assert "does not say" in text.text
    assert judged_categories({"settings": {}}) == []
