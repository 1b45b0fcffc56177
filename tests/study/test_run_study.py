"""The runner: what is done is noted, what is noted is skipped, a failure loses nothing."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.report.charts import pareto_front
from lit_safety.study import run as runner
from lit_safety.study.run import FILE_NAME, Figure, Result, _look_up, append_result, read_results, run_study
from lit_safety.study.table import tabulate

#: Stands in for `python -m lit_safety`: writes the numbers it is given and counts how often it is called.
PROGRAM = """
import json, pathlib, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[2:])
with open(options["calls"], "a") as file:
    file.write(options["name"] + "\\n")
if options.get("fail"):
    print("error: asked to fail")
    sys.exit(2)
if "after" in options:
    assert pathlib.Path(options["after"], "report", "metrics.json").exists(), "it was called too early"
folder = pathlib.Path(options["folder"], "report")
folder.mkdir(parents=True, exist_ok=True)
numbers = {"ip": float(options["ip"]), "recall": float(options["recall"])}
(folder / "metrics.json").write_text(json.dumps({"aligned": numbers, "base": {"ip": 0.9}}))
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(program)))
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.setattr(runner, "check_words", lambda words: None)  # the options are the stand-in's

    def write(rows: dict[str, dict[str, object]], **more: object) -> str:
        file = tmp_path / "study.yaml"
        common = {"folder": "{folder}", "calls": str(tmp_path / "calls.txt"), "recall": 1.0}
        study = {
            "out": str(tmp_path / "out"),
            "defaults": {"work": common},
            "rows": {name: {"work": {"name": name, **options}} for name, options in rows.items()},
            "figures": {"ip": "aligned.ip", "recall": "aligned.recall"},
            "baseline": {"ip": "base.ip"},
            "percent": ["ip", "recall"],
            "pareto": ["ip", "recall"],
            **more,
        }
        file.write_text(yaml.safe_dump(study, sort_keys=False))
        return str(file)

    return write


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().split()


def test_finished_jobs_are_skipped_and_changed_ones_done_again(make, tmp_path: Path):
    run_study(make({"a": {"ip": 0.5}, "b": {"ip": 0.25}}))
    assert calls(tmp_path) == ["a", "b"]
    run_study(make({"a": {"ip": 0.5}, "b": {"ip": 0.125}, "c": {"ip": 0}}))
    assert calls(tmp_path) == ["a", "b", "b", "c"]
    results = read_results(tmp_path / "out")
    assert [(r.row, r.figures["ip"], r.base["ip"]) for r in results] == [
        ("a", 0.5, 0.9),
        ("b", 0.25, 0.9),
        ("b", 0.125, 0.9),
        ("c", 0.0, 0.9),
    ]


def test_a_failure_is_reported_at_the_end_and_costs_only_what_needs_it(make, tmp_path: Path):
    file = make(
        {
            "bad": {"ip": 0, "fail": "yes"},
            "child": {"ip": 0, "after": "{folder:bad}"},
            "good": {"ip": 0.1},
        }
    )
    with pytest.raises(UserError, match=r"2 of 3 jobs failed: bad/seed0.*asked to fail.*child/seed0 needs bad"):
        run_study(file)
    assert calls(tmp_path) == ["bad", "good"]
    assert [r.row for r in read_results(tmp_path / "out")] == ["good"]


def test_two_at_a_time_wait_for_what_they_need(make, tmp_path: Path):
    rows = {f"child{i}": {"ip": 0.1, "after": "{folder:parent}"} for i in range(3)}
    run_study(make({**rows, "parent": {"ip": 0.2}}, seeds=[0, 1]), processes=2)
    assert len(read_results(tmp_path / "out")) == 8


def test_only_what_is_asked_for_and_what_it_needs(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = make({"x": {"ip": 0.1}, "y1": {"ip": 0.1, "after": "{folder:x}"}, "z": {"ip": 0.1}})
    run_study(file, only="y*", dry_run=True)
    assert "python -m lit_safety work" in capsys.readouterr().out
    assert not (tmp_path / "calls.txt").exists()
    run_study(file, only="y*")
    assert calls(tmp_path) == ["x", "y1"]
    with pytest.raises(UserError, match="--only q"):
        run_study(file, only="q")


def test_a_line_cut_short_by_a_kill_is_done_again_and_the_file_stays_whole(make, tmp_path: Path):
    file = make({"a": {"ip": 0.5}, "b": {"ip": 0.25}})
    run_study(file)
    results = tmp_path / "out" / FILE_NAME
    results.write_text(results.read_text()[:-40])
    run_study(file)
    assert calls(tmp_path) == ["a", "b", "b"]
    run_study(file)
    assert calls(tmp_path) == ["a", "b", "b"]
    assert [result.row for result in read_results(tmp_path / "out")] == ["a", "b"]
    tabulate(file)
    assert "| b (1 seed) | 25.0 | 100.0 |" in (tmp_path / "out" / "table.md").read_text()


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path):
    for row in ("é", "b", "c"):
        append_result(tmp_path, Result(row, 0, "", 1.0, {}, {}, []))
        file = tmp_path / FILE_NAME
        file.write_bytes(file.read_bytes().removesuffix(b"\n"))
    assert [result.row for result in read_results(tmp_path)] == ["é", "b", "c"]


def test_a_line_cut_within_a_letter_is_left_out(tmp_path: Path):
    file = tmp_path / FILE_NAME
    file.write_bytes('{"row": "é'.encode()[:-1])
    assert read_results(tmp_path) == []
    append_result(tmp_path, Result("b", 0, "", 1.0, {}, {}, []))
    assert [result.row for result in read_results(tmp_path)] == ["b"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path):
    (tmp_path / FILE_NAME).write_text('{"row": \n{"row": "b"}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_results(tmp_path)


def test_a_job_without_its_metrics_is_an_error(make, tmp_path: Path):
    file = make({"a": {"ip": 0.5}}, metrics="{folder}/elsewhere.json")
    with pytest.raises(UserError, match=r"elsewhere\.json cannot be read"):
        run_study(file)
    with pytest.raises(UserError, match="study run"):
        tabulate(file)


def test_table_and_plot(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Row a at seeds 0 and 1 has ip 0.1 twice: mean 10.0, range 10.0 to 10.0; b at seed 0 alone: 25.0."""
    file = make({"a": {"ip": 0.1}, "b": {"ip": 0.25}}, row_seeds={"a": [0, 1]})
    run_study(file)
    tabulate(file)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.splitlines()[2:] == [
        "| base | 90.0 |  |",
        "| a (2 seeds) | 10.0 (10.0 to 10.0) | 100.0 (100.0 to 100.0) |",
        "| b (1 seed) | 25.0 | 100.0 |",
    ]
    assert table in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "pareto.png") as image:
        assert image.size == (1320, 660)


def test_many_figures_stand_below_each_other(make, tmp_path: Path):
    """Ten figures of one row: a line each, the row in a column next to the base."""
    figures = {f"figure {i}": "aligned.ip" for i in range(10)}
    file = make({"a": {"ip": 0.125}}, figures=figures, baseline={"figure 0": "base.ip"}, percent=[], pareto=[])
    run_study(file)
    tabulate(file)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[:4] == [
        "|  | base | a (1 seed) |",
        "|---|---|---|",
        "| figure 0 | 0.900 | 0.125 |",
        "| figure 1 |  | 0.125 |",
    ]
    assert len(lines) == 12


def test_more_rows_than_figures_stand_below_each_other(make, tmp_path: Path):
    """Ten figures of eleven rows and the base: a line a row."""
    figures = {f"figure {i}": "aligned.ip" for i in range(10)}
    file = make({f"r{i}": {"ip": i / 16} for i in range(11)}, figures=figures, percent=[], pareto=[])
    run_study(file)
    tabulate(file)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(lines) == 14
    assert lines[-1] == "| r10 (1 seed) |" + " 0.625 |" * 10


def test_front_keeps_what_nothing_beats():
    """a (0, 0.9) and b (0.1, 1) are each best in one; c (0.1, 0.9) is beaten by both; d equals b and beats nothing."""
    points = {"c": (0.1, 0.9), "b": (0.1, 1.0), "a": (0.0, 0.9), "d": (0.1, 1.0)}
    assert pareto_front(points) == ["a", "b", "d"]


def test_results_are_json_lines(make, tmp_path: Path):
    run_study(make({"a": {"ip": 0.5}}))
    (line,) = (tmp_path / "out" / FILE_NAME).read_text().splitlines()
    assert json.loads(line)["commands"][0][0] == "work"


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("a.b", 0.5),
        ("a.list.1", 7.0),
        ("max:a.each", 3.0),
        ("a.list.2", None),
        ("a.gone", None),
        ("a.b.c", None),
        ("max:a.empty", None),
        ("a.each", None),
        ("mean:a.each", 2.0),
        ("each:a.each", {"x": 1.0, "y": 3.0}),
        ("each:a.b", None),
        ("each:a.empty", None),
        ("a.yes", None),
    ],
)
def test_figures_are_looked_up_by_their_place(place: str, number: Figure):
    metrics = {"a": {"b": 0.5, "list": [1, 7], "each": {"x": 1, "y": 3, "z": None}, "empty": {}, "yes": True}}
    assert _look_up(metrics, place) == number


def test_two_calls_do_not_do_one_study_at_once(make, tmp_path: Path):
    study = make({"a": {"ip": 0.5}})
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another `study run` works in"):
        run_study(study)
    run_study(study)
    assert calls(tmp_path) == ["a"]


def test_sigterm_ends_the_running_command_too(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program, pid = tmp_path / "endless.py", tmp_path / "pid.txt"
    program.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), 15)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, str(program), str(pid)))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_study(make({"a": {"ip": 0.5}}))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before


#: A command that takes its time to end: it says when it was asked to, and waits for leave.
SLOW_TO_END = """
import os, pathlib, signal, sys, time
from lit_safety.core import processes
processes.POLL = 0.05
processes.watch_parent()
place = pathlib.Path(sys.argv[1])
def end(number, frame):
    (place / "ending").touch()
    while not (place / "leave").exists():
        time.sleep(0.02)
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
(place / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def test_a_killed_call_ends_its_job_and_the_next_call_waits_for_that(make, tmp_path: Path):
    program, study = tmp_path / "slow.py", make({"a": {"ip": 0.5}})
    program.write_text(SLOW_TO_END)
    own = f"""import sys
from lit_safety.study import run
run.PROGRAM = (sys.executable, {str(program)!r}, {str(tmp_path)!r})
run.run_study({study!r})"""
    call = subprocess.Popen([sys.executable, "-c", own], stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "pid")
    call.kill()
    call.wait()
    wait_for(tmp_path / "ending")
    with pytest.raises(UserError, match=str(tmp_path / "out")):
        run_study(study)
    (tmp_path / "leave").touch()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    run_study(study)
    assert calls(tmp_path) == ["a"]


def wait_for(path: Path) -> None:
    for _ in range(1500):
        if path.exists() and (path.name != "pid" or path.read_text()):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} does not come")


def test_a_key_that_no_command_knows_is_refused_before_the_first_job(tmp_path: Path) -> None:
    """The evaluation comes after the training, and its mistake before."""
    file = tmp_path / "study.yaml"
    fit = {"config": "scdpo.yaml", "trainer.max_steps": 1}
    for row, named in (
        ({"fit": fit, "evaluate": {"promts": "x"}}, "evaluate.*'promts'.*'prompts'"),
        ({"fit": fit | {"trainer.max_stepps": 1}}, "fit.*'max_stepps'.*'max_steps'"),
        ({"fit": fit | {"config": "nowhere.yaml"}}, r"nowhere\.yaml"),
    ):
        file.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "rows": {"my row": row}, "figures": {}}))
        with pytest.raises(UserError, match=f"my row.*{named}"):
            run_study(str(file))
    assert not (tmp_path / "out").exists()


def test_the_lines_of_a_dry_run_can_be_run_where_names_hold_blanks(
    make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(make({"my row": {"ip": 0.1}}), dry_run=True)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "python -m lit_safety" in one]
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "lit_safety", "work"]
    assert any("my row" in word for word in words)
