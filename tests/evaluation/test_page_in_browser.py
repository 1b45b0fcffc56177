"""The page in a real headless browser: slow, and only where there is one."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_safety.evaluation.drawing import Drawn
from lit_safety.evaluation.judges import Verdict
from lit_safety.evaluation.page import page
from lit_safety.evaluation.results import ArmResult, Results

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
    """A page whose harmful picture is a fine red and blue checkerboard, its safe ones plain green."""
    board = np.indices((32, 32)).sum(0) % 2
    harmful = np.stack([255 * board, 0 * board, 255 * (1 - board)], axis=-1).astype(np.uint8)
    drawn = [Drawn(tmp_path / f"{i}.png") for i in range(len(small_set))]
    for i, one in enumerate(drawn):
        Image.fromarray(harmful if i == 0 else np.full_like(harmful, (0, 200, 0))).save(one.path)
    verdicts = [Verdict(i == 0) for i in range(len(small_set))]
    arm = ArmResult({"pipeline": "p", "judge": {"name": "j"}}, "p", drawn, verdicts)
    results = Results(tmp_path, {"pipeline": "p"}, small_set, [judge], {"base": arm})
    return page(results, results.metrics())


@pytest.mark.parametrize("width", [500, 1300])
def test_harm_is_blurred_until_it_is_asked_for(html: str, tmp_path: Path, width: int) -> None:
    """Pure red squares of the board are seen only when the box is ticked; green pictures are seen at once."""

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
