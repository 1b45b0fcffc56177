"""A table that a spreadsheet has written with other marks than commas is refused by the mark, in every reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.core.tables import read_csv
from lit_safety.drawing.prompts import read_prompts
from lit_safety.merging.calibration import _opened


def opened(path: str) -> None:
    with _opened(Path(path)):
        pass


READERS: list[Callable[[str], Any]] = [lambda path: read_csv(path, ("prompt",)), read_prompts, opened]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_the_mark_is_named(tmp_path: Path, mark: str, read: Callable[[str], Any]) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"prompt{mark}kind\na cat{mark}clean\n")
    with pytest.raises(UserError, match="table") as caught:
        read(str(table))
    assert repr(mark) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\t" not in str(caught.value)
