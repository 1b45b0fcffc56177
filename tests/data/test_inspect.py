from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.inspect import CELL, inspect
from lit_safety.report.sheet import GAP, LEFT
from tests.helpers.pair_shards import write_shards


def test_it_says_what_the_shards_hold(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(shards), samples=3)
    text = capsys.readouterr().out
    assert "40 pairs in 6 shards" in text
    assert "hate 13, sexual 13, violence 14" in text
    assert "clean 10, harmful 30" in text
    assert "safe>harmful 40" in text
    assert "5 to 7 pairs" in text
    assert text.count("prompt ") >= 3
    assert "safe over harmful by safety; 8 x 8, 8 x 8 pixels" in text


def test_the_sheet_blurs_what_is_harmful_unless_asked_not_to(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", 3, 3)
    images = {}
    for shown in (False, True):
        inspect(str(tmp_path / "shards"), samples=3, sheet=str(tmp_path / "sheet.png"), show_harmful=shown)
        images[shown] = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    column = LEFT + CELL + GAP
    assert images[False].shape[1] == column + CELL + GAP
    assert (images[False][:, :column] == images[True][:, :column]).all()  # the chosen ones are safe
    middle = column + CELL // 2  # the edge between the two halves of a drawing
    line = images[True].shape[0] - GAP - CELL // 2
    sharp, blurred = (abs(np.diff(images[shown][line, middle - 4 : middle + 4, 1])).max() for shown in (True, False))
    assert sharp > 80
    assert blurred < 20


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder: .*none does not exist"):
        inspect(str(tmp_path / "none"))


def test_the_command_line_learns_the_signatures_without_torch() -> None:
    modules = ("inspect", "validate", "convert.folder", "convert.coprov2", "convert.sage")
    imports = ", ".join(f"lit_safety.data.{module}" for module in modules)
    code = f"import sys, {imports}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
