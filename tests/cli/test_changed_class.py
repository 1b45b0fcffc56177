"""A class named instead of another one begins from its own defaults, on every way in which it can be named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_safety.__main__ import main
from lit_safety.callbacks.summary import call_of
from lit_safety.core.parsing import classes_first
from lit_safety.objectives import DiffusionDPO, SafetyConstrainedDPO
from tests.helpers.documents import CONFIGS

DPO = "lit_safety.objectives.DiffusionDPO"
OWN = {"beta": 5000.0, "label_smoothing": 0.0, "sft_weight": 0.0, "anchor_weight": 0.0}
GIVEN = {
    "beta": 100.0, "cost_weight": 2.0, "gamma": 1.0, "dfm_detach": True, "cost_clip": None, "sft_weight": 5.0,
    "anchor_weight": 20.0,
}  # fmt: skip
"""What configs/scdpo.yaml gives SafetyConstrainedDPO."""

Printed = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """The resolved config of a `fit` with configs/scdpo.yaml and more, and what stood on stderr."""

    def read(*words: str, config: str = "scdpo.yaml", command: str = "fit") -> tuple[dict[str, Any], str]:
        with pytest.raises(SystemExit) as ended:
            main([command, "--config", str(CONFIGS / config), *words, "--print_config"])
        assert ended.value.code == 0
        captured = capsys.readouterr()
        lines = [line for line in captured.out.splitlines() if not line.startswith("[")]  # DeepSpeed's log
        return yaml.safe_load("\n".join(lines)), captured.err

    return read


def overlay(folder: Path, content: Any) -> list[str]:
    file = folder / "overlay.yaml"
    file.write_text(yaml.safe_dump(content))
    return ["--config", str(file)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.init_args.objective", DPO], OWN),
        (["--model.init_args.objective.class_path", DPO], OWN),
        (["--model.objective", "DiffusionDPO"], OWN),
        (["--model.init_args.objective", DPO, "--model.init_args.objective.init_args.beta", "7"], OWN | {"beta": 7.0}),
        (["--model.init_args.objective.init_args.beta=7", f"--model.init_args.objective={DPO}"], OWN | {"beta": 7.0}),
        (["--model.init_args.objective", f"{{class_path: {DPO}, init_args: {{beta: 9}}}}"], OWN | {"beta": 9.0}),
    ],
)
def test_an_objective_named_on_the_command_line(words: list[str], expected: dict[str, Any], printed: Printed):
    config, said = printed(*words)
    objective = config["model"]["init_args"]["objective"]
    assert objective == {"class_path": DPO, "init_args": expected}
    for dropped in ("beta: 100.0", "sft_weight: 5.0", "anchor_weight: 20.0"):
        assert dropped in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("own", [{}, {"init_args": {"sft_weight": 1.0}}])
def test_an_objective_named_by_a_second_file(own: dict[str, Any], tmp_path: Path, printed: Printed):
    given = {"model": {"init_args": {"objective": {"class_path": DPO, **own}}}}
    config, said = printed(*overlay(tmp_path, given))
    assert config["model"]["init_args"]["objective"]["init_args"] == OWN | own.get("init_args", {})
    assert "SafetyConstrainedDPO" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--model.init_args.objective", "lit_safety.objectives.SafetyConstrainedDPO"],
        ["--model.init_args.objective.class_path=lit_safety.objectives.SafetyConstrainedDPO"],
    ],
)
def test_the_same_class_keeps_what_was_given(words: list[str], printed: Printed):
    config, said = printed(*words)
    assert config["model"]["init_args"]["objective"]["init_args"] == GIVEN
    assert not said


def test_optimizer_and_scheduler(tmp_path: Path, printed: Printed):
    changed = {
        "optimizer": {"class_path": "torch.optim.Adam"},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 5}},
    }
    config, said = printed(*overlay(tmp_path, {"model": {"init_args": changed}}))
    found = config["model"]["init_args"]
    assert (found["optimizer"]["init_args"]["lr"], found["optimizer"]["init_args"]["weight_decay"]) == (0.001, 0)
    assert found["lr_scheduler"]["init_args"] == {"step_size": 5, "gamma": 0.1, "last_epoch": -1}
    assert "lr: 0.003" in said
    assert "max_lr: 0.003" in said


def test_a_logger_keeps_only_the_folder_that_it_cannot_do_without(printed: Printed):
    config, _ = printed("--trainer.logger", "lightning.pytorch.loggers.CSVLogger")
    arguments = config["trainer"]["logger"]["init_args"]
    assert (arguments["save_dir"], arguments["name"], arguments["version"]) == (".", "lightning_logs", None)


def test_a_subclass_of_the_module_is_the_same_method_with_a_part_changed(printed: Printed):
    config, said = printed("--model.class_path", "tests.helpers.runs_reference.LateTimesteps")
    assert config["model"]["init_args"]["objective"]["init_args"] == GIVEN
    assert not said


def test_a_subclass_of_the_strategy_keeps_its_settings(printed: Printed):
    pytest.importorskip("deepspeed")
    zero = str(CONFIGS / "strategies" / "deepspeed_zero3.yaml")
    given, _ = printed("--config", zero)
    config, said = printed(
        "--config", zero, "--trainer.strategy.class_path", "tests.helpers.strategies_cpu.DeepSpeedCPU"
    )
    stage = given["trainer"]["strategy"]["init_args"]["stage"]
    assert config["trainer"]["strategy"]["class_path"] == "tests.helpers.strategies_cpu.DeepSpeedCPU"
    assert (config["trainer"]["strategy"]["init_args"]["stage"], stage) == (3, 3)
    assert "instead of" not in said


def test_another_module_begins_from_its_own_defaults(printed: Printed):
    config, said = printed("--model", "lit_safety.modules.DPOExpert")
    model = config["model"]["init_args"]
    assert model["pretrained"] == "data/toyworld/pipeline"  # it has no default
    assert (model["objective"], model["lora"], model["lr_scheduler"]) == (None, None, None)
    assert "DPOExpert" in said


def test_the_loss_of_the_cost_model(printed: Printed):
    before, _ = printed(config="cost_model.yaml")
    given = before["model"]["init_args"]["loss"]
    changed = "lit_safety.cost_model.InfoNCECostLoss"
    assert given["class_path"] != changed
    config, _ = printed("--model.init_args.loss", changed, config="cost_model.yaml")
    alone, _ = printed("--model.init_args.loss", "null", "--model.init_args.loss", changed, config="cost_model.yaml")
    assert config["model"]["init_args"]["loss"] == alone["model"]["init_args"]["loss"]


def test_a_guard_of_an_evaluation(tmp_path: Path, printed: Printed):
    guard = {"class_path": "lit_safety.guards.SAFREE"}
    words = ["--out", str(tmp_path), *overlay(tmp_path, {"arms": {"SLD": {"guard": guard}}})]
    config, _ = printed(*words, config="baselines.yaml", command="evaluate")
    arguments = config["arms"]["SLD"]["guard"]["init_args"]
    assert arguments["concepts"] is None
    assert "strength" not in arguments


def test_classes_are_read_before_their_arguments():
    assert classes_first(["fit", "--a.b=1", "--x", "-1", "--a", "C"]) == ["fit", "--a", "C", "--a.b=1", "--x", "-1"]
    unchanged = ["--a.b", "1", "--config", "f.yaml", "--a", "C", "--a.c", "2", "--d.e", "1", "--d", "null"]
    assert classes_first(unchanged) == unchanged


def test_the_run_prints_the_loss_with_all_that_it_uses():
    assert call_of(DiffusionDPO(beta=7)) == (
        "DiffusionDPO(beta=7, label_smoothing=0.0, sft_weight=0.0, anchor_weight=0.0)"
    )
    said = call_of(SafetyConstrainedDPO(beta=100.0, cost_weight=2.0, sft_weight=5.0))
    assert all(part in said for part in ("beta=100.0", "cost_weight=2.0", "gamma=1.0", "sft_weight=5.0"))
