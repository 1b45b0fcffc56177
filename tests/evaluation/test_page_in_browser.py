"""The page in a real headless browser: slow, and only where there is one."""

import json
import re
import shutil
import subprocess
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_safety.drawing.gallery import Drawn
from lit_safety.evaluation.report import page
from lit_safety.evaluation.run import ArmResult, Results
from lit_safety.judges.judge import Verdict

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]


def screenshot(html: str, folder: Path, width: int) -> np.ndarray:
    """Pixels (H, W, 3) of the top of the page as the browser draws it from disk."""
    (folder / "index.html").write_text(html, encoding="utf-8")
    shot = folder / f"{width}.png"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1500", f"--screenshot={shot}"]
    subprocess.run([*command, (folder / "index.html").as_uri()], check=True, capture_output=True, timeout=120)
    return np.asarray(Image.open(shot).convert("RGB")).astype(int)


@pytest.fixture
def html(tmp_path: Path, judge, small_set) -> str:
    """A page of four arms under two attacks, whose harmful image is a fine red and blue checkerboard, its safe ones
    plain green."""
    board = np.indices((32, 32)).sum(0) % 2
    harmful = np.stack([255 * board, 0 * board, 255 * (1 - board)], axis=-1).astype(np.uint8)
    drawn = [Drawn(tmp_path / f"{i}.png") for i in range(len(small_set))]
    for i, one in enumerate(drawn):
        Image.fromarray(harmful if i == 0 else np.full_like(harmful, (0, 200, 0))).save(one.path)
    verdicts = [Verdict(i == 0, present=frozenset({"car"})) for i in range(len(small_set))]
    safe, green = [Verdict(False) for _ in small_set], [drawn[1]] * len(small_set)
    given = {"base": (drawn, verdicts), "SCDPO": (green, safe), "safe latent diffusion": (drawn, verdicts)}
    arms = {
        name: ArmResult({"pipeline": "p", "judge": {"name": "j"}}, "p", *shown)
        for name, shown in (given | {"x": (green, safe)}).items()
    }
    results = Results(tmp_path, {"pipeline": "p", "judge": {"name": "j"}}, small_set, [judge], arms)
    points = [{"budget": b, "asr": b / 64, "n": 40, "interval": [b / 80, b / 50]} for b in (0, 1, 4, 16, 32)]
    attack = {"budget": "candidates tried", "arms": dict.fromkeys(list(arms)[:2], points)}
    attacks = {"attacks": {"greedy suffix": attack, "paraphrases": attack}, "protocol": {"seed": 0}}
    return page(results, results.metrics(), attacks)


PROBE = """<script>
const veiled = [...document.querySelectorAll('.veil')].map(v => v.querySelector('img'));
const filters = () => veiled.map(i => getComputedStyle(i).filter);
const found = {before: filters()};
document.querySelector('.veil input').click();
found.clicked = filters();
document.querySelector('#all').click();
found.all = filters();
found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const name = e => (e.getAttribute('aria-labelledby') || '').split(' ').map(i => document.getElementById(i).textContent);
found.charts = [...document.querySelectorAll('svg')].map(name);
const inside = s => [...s.querySelectorAll('text')].every(t => {
  const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();
  return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
});
found.inside = [...document.querySelectorAll('svg')].map(inside);
found.smallest = Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height));
found.unnamed = [...document.querySelectorAll('input')].filter(i => !i.labels.length && !i.ariaLabel).length;
found.levels = [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1]);
const out = document.createElement('pre');
out.id = 'found';
out.textContent = JSON.stringify(found);
document.body.append(out);
</script></body>"""


@pytest.fixture(params=[390, 1300])
def seen(request: pytest.FixtureRequest, html: str, tmp_path: Path) -> dict:
    """What a script finds in the page: in a frame as wide as a phone, because a window has a least width."""
    (tmp_path / "inner.html").write_text(html.replace("</body>", PROBE), encoding="utf-8")
    frame = (
        f"<!doctype html><iframe id=f src=inner.html style='border:0;width:{request.param}px;height:3000px'></iframe>"
        "<script>f.onload=()=>{document.title=f.contentDocument.getElementById('found').textContent}</script>"
    )
    (tmp_path / "outer.html").write_text(frame, encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,3100", "--virtual-time-budget=5000"]
    command += ["--dump-dom", (tmp_path / "outer.html").as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout
    title = re.search(r"<title>(.*)</title>", dom)
    assert title, dom[:500]
    return json.loads(unescape(title.group(1)))


def test_a_click_shows_one_image_and_the_box_all(seen: dict) -> None:
    assert len(seen["before"]) >= 2
    assert all("blur" in one for one in seen["before"])
    assert seen["clicked"][0] == "none"
    assert all("blur" in one for one in seen["clicked"][1:])
    assert set(seen["all"]) == {"none"}


def test_charts_fit_are_legible_and_are_named(seen: dict) -> None:
    """Harm against two kinds of recall and two attacks; no text leaves its chart or gets smaller than 9 pixels."""
    assert len(seen["charts"]) == 4
    assert all(title and len(said) > 20 for title, said in seen["charts"])
    assert all(seen["inside"])
    assert seen["smallest"] >= 9
    assert seen["overflow"] <= 0


def test_a_screen_reader_finds_its_way(seen: dict) -> None:
    """Every box has a name; headings begin with one of the first level and never skip one."""
    assert seen["unnamed"] == 0
    levels = seen["levels"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("width", [500, 1300])
def test_harm_is_blurred_until_it_is_asked_for(html: str, tmp_path: Path, width: int) -> None:
    """Pure red squares of the board are seen only when the box is ticked; green images are seen at once."""

    def share(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
        return float((np.abs(pixels - colour).max(axis=-1) < 12).mean())

    hidden = screenshot(html, tmp_path, width)
    ticked = screenshot(html.replace("type=checkbox id=all", "type=checkbox checked id=all"), tmp_path, width)
    assert share(hidden, (255, 0, 0)) == 0
    assert share(ticked, (255, 0, 0)) > 0.001
    assert share(hidden, (0, 200, 0)) > 0.005


def test_a_phone_needs_no_sideways_scrolling(html: str, tmp_path: Path) -> None:
    """Nothing is drawn outside the page's margin at the width of a phone."""
    pixels = screenshot(html, tmp_path, 500)
    assert (pixels[:, -6:] == pixels[0, -1]).all()
