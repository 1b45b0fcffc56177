import io

import pytest

from lit_safety.core import progress
from lit_safety.core.progress import shown


def test_lines_of_a_log_say_how_far_it_is_and_at_what(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with shown("suffix: base", 4) as bar:
        now[0] = 1.0
        bar.tell("1 of 64 candidates")  # no line is due yet
        now[0] = 16.0
        bar.tell("9 of 64 candidates")
        bar.advance(2)
        now[0] = 32.0
        bar.advance(1)
        bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "9 of 64 candidates" in lines[1]
    assert "candidates" not in lines[2]
    assert "3 of 4" in lines[2]
    assert lines[3].endswith("4 done in 32 s")


def test_a_name_in_brackets_is_no_markup_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setattr(progress, "Console", lambda **_: Console(force_terminal=True, file=io.StringIO()))
    with shown("[/red]x: {base}", 2) as bar:
        bar.tell("[/bold]")
        bar.advance(2)
