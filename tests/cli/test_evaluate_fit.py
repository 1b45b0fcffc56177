"""`evaluate --config` on a fit's YAML: the adapter is found where the fit wrote it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_safety.cli.commands import from_fit
from lit_safety.core.errors import UserError
from lit_safety.data.reading.source import open_source

FIT: dict[str, Any] = {
    "run": {"root": "mine", "name": "runs"},
    "model": {
        "class_path": "lit_safety.modules.SCDPO",
        "init_args": {"pretrained": "my model", "drawing": {"steps": 30, "guidance": 7.5}},
    },
    "trainer": {
        "callbacks": [
            {"class_path": "lit_safety.callbacks.RunSummary"},
            {
                "class_path": "lit_safety.callbacks.EvaluateOnTest",
                "init_args": {"prompts": [{"prompt": "été", "kind": "clean"}], "judge": "clip.yaml", "clean": None},
            },
        ]
    },
}


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fit's YAML and a run of it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("fit.yaml").write_text(yaml.safe_dump(FIT))
    Path("mine/runs/first/adapter").mkdir(parents=True)
    Path("mine/runs/latest").symlink_to("first")
    return tmp_path


def options(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)


def test_pipeline_prompts_judge_adapter_and_report_are_those_of_the_fit(fit: Path) -> None:
    found = options(from_fit(["--config", "fit.yaml"]))
    assert json.loads(found.pop("prompts")) == FIT["trainer"]["callbacks"][1]["init_args"]["prompts"]
    assert found == {
        "pipeline": "my model",
        "judge": "clip.yaml",
        "clean": "null",
        "steps": "30",
        "guidance": "7.5",
        "adapter": "mine/runs/first/adapter",
        "out": "mine/runs/first/report",
    }


def test_what_stands_behind_wins_and_an_adapter_that_is_named_needs_no_run(fit: Path) -> None:
    Path("mine/runs/latest").unlink()
    words = from_fit(["--config=fit.yaml", "--adapter", "other", "--out", "there"])
    assert words[-4:] == ["--adapter", "other", "--out", "there"]
    assert not {"adapter", "out"} & options(words).keys()


def test_a_whole_denoiser_is_an_arm(fit: Path) -> None:
    Path("mine/runs/first/adapter").rename("mine/runs/first/pipeline")
    assert options(from_fit(["--config", "fit.yaml"]))["arms.aligned.pipeline"] == "mine/runs/first/pipeline"


def test_a_later_fit_file_overrides_the_first(fit: Path) -> None:
    Path("over.yaml").write_text("model: {init_args: {pretrained: larger}}\n")
    found = options(from_fit(["--config", "fit.yaml", "--config", "over.yaml"]))
    assert (found["pipeline"], found["steps"]) == ("larger", "30")


def test_a_runs_own_config_stands_for_that_run(fit: Path) -> None:
    Path("mine/runs/second/adapter").mkdir(parents=True)
    Path("mine/runs/second/config.yaml").write_text(yaml.safe_dump(FIT))
    assert options(from_fit(["--config", "mine/runs/second/config.yaml"]))["adapter"] == "mine/runs/second/adapter"


def test_without_a_run_the_way_out_is_named(fit: Path) -> None:
    Path("mine/runs/latest").unlink()
    with pytest.raises(UserError, match=r"fit\.yaml.*fit --config"):
        from_fit(["--config", "fit.yaml"])


def test_from_another_folder_the_place_that_was_looked_in_is_named(
    fit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/mine/mine/runs/latest")):
        from_fit(["--config", "../fit.yaml"])
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "mine"))):
        open_source("mine/shards", "data.train")


def test_without_the_callback_prompts_and_judge_are_asked_for(fit: Path) -> None:
    Path("bare.yaml").write_text(yaml.safe_dump({**FIT, "trainer": {"callbacks": []}}))
    with pytest.raises(UserError, match=r"bare\.yaml.*--prompts and --judge"):
        from_fit(["--config", "bare.yaml"])
    with pytest.raises(UserError, match="give --judge"):
        from_fit(["--config", "bare.yaml", "--prompts=mine.csv"])
    assert options(from_fit(["--config", "bare.yaml", "--prompts=mine.csv", "--judge=clip.yaml"]))["out"]


def test_a_run_that_left_nothing_is_named(fit: Path) -> None:
    Path("mine/runs/first/adapter").rmdir()
    with pytest.raises(UserError, match="mine/runs/first,"):
        from_fit(["--config", "fit.yaml"])


def test_an_evaluations_own_file_is_left_as_it_is() -> None:
    words = ["--config", "configs/evaluate.yaml", "--out", "x"]
    assert from_fit(words) == words
