from pathlib import Path

import pytest

from lit_safety.merging.experts import base_model
from lit_safety.report.card import Card, Section, card_text, code


@pytest.mark.parametrize("base", ["some/base", "/models/a b", "C:\\models\\a: #1", "a \"quoted\" 'one'", "ärger/模型"])
def test_the_base_model_that_a_card_names_is_read_back(tmp_path: Path, base: str) -> None:
    (tmp_path / "README.md").write_text(card_text(Card("t", "x", [], base)), encoding="utf-8")
    assert base_model(tmp_path) == base


def test_nothing_in_a_cell_ends_it_or_is_a_tag() -> None:
    text = card_text(Card("t", "x", [Section("s", head=("a", "b"), rows=[("x|y", "1\n| z | <b>")])]))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == ["| a | b |", "|---|---|", r"| x\|y | 1 \| z \| &lt;b> |"]
    assert not text.startswith("---")


def test_nothing_in_code_ends_it() -> None:
    assert code("a`b\nc") == "`a'b c`"
