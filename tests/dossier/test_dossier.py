"""The command `dossier` on the toy world with few prompts: what it writes, resumption, and what was not run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lit_safety.cli.commands import run_command
from lit_safety.core.errors import UserError
from lit_safety.dossier import command, summary
from lit_safety.dossier.command import dossier
from lit_safety.dossier.steps import RESULTS, load_list, whole_sha256
from lit_safety.drawing.prompts import read_prompts
from lit_safety.study import run as runner
from tests.fixtures.evaluation import save_adapter
from tests.helpers.documents import CONFIGS, ROOT

WORLD = ROOT / "data" / "toyworld"
HARMLESS = {"explicit": 0, "implicit": 0, "lookalike": 2, "clean": 4, "adversarial": 0}
HARM = {"explicit": 1, "implicit": 0, "lookalike": 0, "clean": 0, "adversarial": 0}


@pytest.fixture(scope="module")
def called() -> Iterator[list[str]]:
    """Steps run in this process, not in processes of their own; the names of those that were begun."""
    begun: list[str] = []

    def call(study: Any, job: Any, threads: int, stop: Any, lock: Any) -> Any:
        begun.append(job.name)
        if job.name in command.__dict__.get("STOP_AT", ()):
            raise KeyboardInterrupt
        job.folder.mkdir(parents=True, exist_ok=True)
        for words in job.commands:
            run_command([*words, *job.beside])
        return runner.collect(study, job, 1.0)

    patch = pytest.MonkeyPatch()
    patch.setattr(runner, "_call", call)
    patch.setattr(runner, "POLL", 0.01)
    yield begun
    patch.undo()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a tiny dossier: a judge's audit, two evaluations, an attack, a step that fails, one without a
    file."""
    folder = tmp_path_factory.mktemp("dossier")
    images = folder / "labelled"
    for name, colour in (("harmful/a", "red"), ("harmful/b", "black"), ("safe/c", "white"), ("safe/d", "green")):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(images / f"{name}.png")
    attacks: dict[str, Any] = {
        "scale": {"class_path": "lit_safety.attacks.AdapterScale", "init_args": {"scales": [0.0]}}
    }
    attacks["other"] = {
        "class_path": "lit_safety.attacks.FineTune",
        "init_args": {"shards": str(WORLD / "world.json"), "steps": [1]},
    }
    (folder / "attacks.yaml").write_text(yaml.safe_dump({"attacks": attacks, "second_judges": ["nowhere"]}))
    steps = {
        "judge": {"about": "the judge", "command": "judge-audit", "options": {"images": "{labelled}"}},
        "harm": {"about": "harm", "command": "evaluate", "options": {"prompts": "{prompts}", **HARM}},
        "kept": {
            "about": "what must stay", "command": "evaluate", "options": {"prompts": "{prompts}", **HARMLESS},
            "optional": {"clip": "{clip}"},
        },
        "attacks": {
            "about": "attacks", "command": "attack",
            "options": {"config": "{attacks}", "prompts": "{prompts}", "explicit": 1, "only": ["scale"]},
        },
        "broken": {"about": "what fails", "command": "evaluate", "options": {"prompts": "{pipeline}"}},
        "published": {"about": "a protocol", "command": "evaluate",
                      "options": {"protocol": "safetydpo-i2p", "prompts": "{i2p}"}},
    }  # fmt: skip
    files = {"prompts": "prompts", "labelled": "images", "attacks": "attacks", "clip": "a CLIP", "i2p": "I2P"}
    (folder / "list.yaml").write_text(
        yaml.safe_dump({"title": "Tiny", "files": files, "steps": steps}, sort_keys=False)
    )
    adapter = save_adapter(WORLD / "pipeline", folder / "adapter")
    return {
        "pipeline": str(WORLD / "pipeline"), "judge": str(WORLD / "judge"), "adapter": str(adapter),
        "list": str(folder / "list.yaml"), "out": str(folder / "out"), "steps": 1, "device": "cpu",
        "files": {"prompts": str(WORLD / "prompts" / "test.csv"), "labelled": str(images),
                  "attacks": str(folder / "attacks.yaml")},
    }  # fmt: skip


def written(out: Path) -> dict[str, bytes]:
    """What was written, without images and logs; of the dossier without its times."""
    kept = [
        one for one in out.rglob("*") if one.suffix in (".json", ".csv", ".html", ".md") and "images" not in one.parts
    ]
    found = {one.relative_to(out).as_posix(): one.read_bytes() for one in kept}
    content = json.loads(found["dossier.json"])
    content.pop("times")
    found["dossier.json"] = json.dumps(content).encode()
    page = found["index.html"].decode().splitlines()
    found["index.html"] = "\n".join(line for line in page if "Time of the steps" not in line).encode()
    return found


@pytest.fixture(scope="module")
def first(given: dict[str, Any], called: list[str]) -> dict[str, bytes]:
    """A dossier that was never interrupted; one step of it fails."""
    with pytest.raises(UserError, match="1 of 5 steps failed"):
        dossier(**given)
    return written(Path(given["out"]))


@pytest.fixture(scope="module")
def content(first: dict[str, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(first["dossier.json"])
    return found


def test_every_figure_stands_in_the_file_that_its_row_names(content: dict[str, Any], given: dict[str, Any]) -> None:
    out = Path(given["out"])
    rows = [row for row in content["figures"] if "unit" not in row]
    assert {row["step"] for row in rows} == {"harm", "kept"}
    for row in rows:
        metrics = json.loads((out / row["file"]).read_text())
        figure, _, part = row["figure"].partition("/")
        for arm, found in row["arms"].items():
            here = metrics["arms"][arm][figure]
            assert found["value"] == (here[part] if part else here) or "absent" in found
        for arm, change in row["changes"].items():
            here = metrics["differences"][arm][figure]
            low, high = (here[part] if part else here)["interval"]
            assert change["says"] == ("no change seen" if low <= 0 <= high else "rose" if low > 0 else "fell")
    ip = next(row for row in rows if row["figure"] == "ip")
    assert ip["arms"]["base"]["n"] == ip["arms"]["aligned"]["n"] == 8
    (scale,) = [row for row in content["attacks"] if row["arm"] == "aligned"]
    report = json.loads((out / scale["file"]).read_text())
    assert scale["strongest"]["asr"] == report["attacks"]["scale"]["arms"]["aligned"][0]["asr"]
    assert scale["budget"] == 0.0
    (base,) = [row for row in content["attacks"] if row["arm"] == "base"]
    assert "no adapter" in base["not_applicable"]


def test_the_judges_own_figures_stand_next_to_what_it_judged(content: dict[str, Any]) -> None:
    assert content["judge"]["n"] == 4
    assert content["judge"]["sensitivity"]["n"] == 2
    ip = next(row for row in content["figures"] if row["figure"] == "ip")
    assert "corrected" in ip["arms"]["base"]
    assert " of 2 images labelled harmful" in content["summary"]["judge"]


def test_what_was_not_run_is_shown_with_its_reason_and_nothing_is_said_of_it(
    content: dict[str, Any], first: dict[str, bytes]
) -> None:
    states = {name: step["state"] for name, step in content["steps"].items()}
    assert states == dict.fromkeys(["judge", "harm", "kept", "attacks"], "done") | dict.fromkeys(
        ["broken", "published"], "not run"
    )
    assert content["steps"]["published"]["reason"] == "--files.i2p was not given"
    assert content["steps"]["broken"]["reason"]
    assert content["steps"]["kept"]["left_out"] == ["--clip (--files.clip was not given)"]
    assert len(content["summary"]["not_run"]) == 2
    assert content["steps"]["broken"]["results"] == {}
    page = first["index.html"].decode()
    for name in ("broken", "published"):
        assert name in page
        assert not any(row["step"] == name for row in [*content["figures"], *content["attacks"]])


def test_commands_and_hashes_are_there_to_repeat_it(content: dict[str, Any], given: dict[str, Any]) -> None:
    assert content["command"].startswith("python -m lit_safety dossier --pipeline=")
    command_of = content["steps"]["attacks"]["command"]
    assert "--arms=null" in command_of
    assert "--second_judges=null" in command_of
    assert f"--adapter={given['adapter']}" in command_of
    hashes = content["hashes"]
    assert hashes["pipeline"] and hashes["adapter"] and hashes["code"] and hashes["judges"][given["judge"]]  # noqa: PT018
    assert set(hashes["files"]) == {"prompts", "labelled", "attacks"}
    assert hashes["named_by_files"] == {"attacks": {str(WORLD / "world.json"): whole_sha256(str(WORLD / "world.json"))}}
    assert {"python", "torch", "diffusers", "lit_safety"} <= hashes["versions"].keys()
    assert content["steps"]["harm"]["results"].keys() >= {"metrics.json", "verdicts.csv"}


def test_the_table_holds_every_figure(first: dict[str, bytes], content: dict[str, Any]) -> None:
    lines = list(csv.DictReader(first["table.csv"].decode().splitlines()))
    count = sum(len(row["arms"]) for row in content["figures"]) + len(content["attacks"])
    assert len(lines) == count
    ip = next(one for one in lines if one["figure"] == "ip" and one["arm"] == "aligned")
    assert float(ip["low"]) <= float(ip["value"]) <= float(ip["high"])
    assert ip["file"] == "steps/harm/metrics.json"


def test_the_summary_says_in_words_what_the_rows_say() -> None:
    """Made up rows: harm fell from 80 to 2 of 100, a recall kept, another lost, one attack of two brought harm back."""

    def row(figure: str, before: float, after: float, low: float, high: float) -> dict[str, Any]:
        arms = {"base": (before, [before - 0.05, before + 0.05]), "aligned": (after, [0.01, after + 0.05])}
        says = "no change seen" if low <= 0 <= high else "fell" if high < 0 else "rose"
        return {
            "step": "s", "figure": figure, "title": figure, "of": "images", "file": "f", "better": "lower",
            "arms": {name: {"value": v, "interval": i, "n": 100, "errors": 0} for name, (v, i) in arms.items()},
            "changes": {"aligned": {"value": after - before, "interval": [low, high], "says": says}},
        }  # fmt: skip

    rows = [
        row("ip", 0.8, 0.02, -0.85, -0.7),
        row("clean_harm_rate", 0.0, 0.01, -0.02, 0.03),
        row("named_recall/harmless", 0.9, 0.89, -0.04, 0.02),
        row("unnamed_recall/harmless", 0.9, 0.8, -0.15, -0.05),
    ]
    top = {"interval": [0.3, 0.9], "n": 40, "errors": 0}
    attacks = [
        {"attack": name, "arm": "aligned", "strongest": {"asr": asr, **top}, "budget": 8, "label": "", "unit": "u"}
        for name, asr in (("fine-tuning", 0.9), ("seeds", 0.1))
    ]
    assert len(summary.fell(rows, "aligned")) == 1
    assert summary.fell(rows, "aligned")[0].startswith("ip: 80.0%")
    assert [one.partition(":")[0] for one in summary.not_fallen(rows, "aligned")] == ["clean_harm_rate"]
    (held,) = summary.held(rows, "aligned")
    assert "more than 4.0 points is ruled out" in held
    (lost,) = summary.lost(rows, "aligned")
    assert "5.0 to 15.0 points" in lost
    back, stood = summary.broke(attacks, "aligned")
    assert back[0].startswith("fine-tuning: harm on 90.0%")
    assert stood[0].startswith("seeds: harm on 10.0%")
    words = summary.in_plain_words(rows, attacks, "aligned")
    assert "80 before and 2 after were harmful (95% interval of the latter: 1 to 7)" in words[0]
    assert words[-1] == "Of 2 attacks that were run, 1 brought harm back on at least half of the prompts: fine-tuning."
    assert [summary.of_100(share) for share in (0.0, 0.004, 0.5, 0.996, 1.0)] == [
        "0", "fewer than 1", "50", "more than 99", "100",
    ]  # fmt: skip
    assert "(no images)" in summary.judged({"missing": "no images"})


def test_what_is_done_is_not_done_again_and_killed_it_goes_on_to_the_same_bytes(
    first: dict[str, bytes], given: dict[str, Any], called: list[str]
) -> None:
    called.clear()
    with pytest.raises(UserError):
        dossier(**given)
    assert called == ["broken"]  # what failed is done again, and nothing else
    assert written(Path(given["out"])) == first
    shutil.rmtree(given["out"])
    command.STOP_AT = ("kept",)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        dossier(**given)
    del command.STOP_AT  # type: ignore[attr-defined]
    assert not (Path(given["out"]) / "dossier.json").exists()
    called.clear()
    with pytest.raises(UserError):
        dossier(**given)
    assert called == ["kept", "attacks", "broken"]
    assert written(Path(given["out"])) == first


def test_other_weights_or_files_are_measured_again(
    first: dict[str, bytes], given: dict[str, Any], called: list[str], tmp_path: Path
) -> None:
    changed = tmp_path / "prompts.csv"
    changed.write_text((WORLD / "prompts" / "test.csv").read_text().replace("we see", "there is", 1))
    assert read_prompts(str(changed))
    called.clear()
    with pytest.raises(UserError):
        dossier(**{**given, "files": {**given["files"], "prompts": str(changed)}})
    assert called == ["judge", "harm", "kept", "attacks", "broken"]


def test_names_that_a_list_does_not_know_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--files\.promts.*prompts"):
        dossier(**{**given, "files": {"promts": "x"}})
    with pytest.raises(UserError, match="--list nothing"):
        dossier(**{**given, "list": "nothing"})
    bad = tmp_path / "bad.yaml"
    step = {"about": "x", "command": "evaluate", "options": {"prompts": "{other}"}}
    bad.write_text(yaml.safe_dump({"title": "x", "files": {}, "steps": {"one": step}}))
    with pytest.raises(UserError, match=r"steps\.one.*other"):
        load_list(str(bad))
    bad.write_text(yaml.safe_dump({"title": "x", "files": {}, "steps": {"one": {**step, "command": "fit"}}}))
    with pytest.raises(UserError, match=r"steps\.one\.command"):
        load_list(str(bad))


@pytest.mark.parametrize("name", ["quick", "full"])
def test_every_command_of_the_shipped_lists_is_understood(name: str, tmp_path: Path) -> None:
    """`--print_config` goes through each command's own parser."""
    from lit_safety.dossier.steps import Given, job_of
    from lit_safety.drawing.gallery import DrawingSettings

    listed, _ = load_list(name)
    files = dict.fromkeys(listed.files, "x") | {"attacks": str(CONFIGS / "attack.yaml"), "features": "judge"}
    given = Given("x", "y", "z", None, None, files, DrawingSettings(), False)
    seen = set()
    for step_name, step in listed.steps.items():
        job, why = job_of(step_name, step, given, tmp_path, (), 2)
        assert job is not None, why
        assert job.commands[0][0] in RESULTS
        shape = (job.commands[0][0], frozenset(word.partition("=")[0] for word in job.commands[0]))
        if shape in seen:
            continue
        seen.add(shape)
        with pytest.raises(SystemExit) as ended:
            run_command([*job.commands[0], *job.beside, "--print_config"])
        assert ended.value.code == 0, f"{step_name}: {job.commands[0]}"
