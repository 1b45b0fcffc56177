"""Keys of YAML and of options that are not known: refused in a second, with the file and what was meant."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_safety.core.check_config import check_command, check_config, name_file
from lit_safety.core.errors import UserError
from lit_safety.core.shipped import configs

METHODS = ("scdpo", "dpo_expert", "psa", "cost_model")
EVALUATE = "lit_safety.evaluation.command:evaluate"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def refusal(text: str, *more: str) -> str:
    Path("mine.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        check_config(["--config", "scdpo.yaml", "--config", "mine.yaml", *more])
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("modle: {init_args: {}}", "modle", "model"),
        ("trainer: {max_stepps: 3}", "`trainer`", "max_steps"),
        ("run: {roott: x}", "`run`", "root"),
        ("model: {init_args: {objectiv: 3}}", "`model`", "objective"),
        ("model: {init_args: {objective: {init_args: {bta: 3}}}}", "`model.init_args.objective`", "beta"),
        ("model: {init_args: {optimizer: {init_args: {weigth_decay: 3}}}}", "optimizer", "weight_decay"),
        ("model: {init_args: {drawing: {guidence: 3}}}", "`model.init_args.drawing`", "guidance"),
        ("data: {init_args: {batchsize: 3}}", "`data`", "batch_size"),
        ("model: {class_path: lit_safety.modules.SCDP}", "`model`", "SCDPO"),
        ("model: {init_args: {objective: lit_safety.objectives.DiffusionDP}}", "objective", "DiffusionDPO"),
        (
            "trainer: {callbacks: [{class_path: lit_safety.callbacks.DrawSamples, init_args: {promts: [a]}}]}",
            "`trainer.callbacks.0`",
            "prompts",
        ),
        ("trainer: {callbacks+: [{class_path: lit_safety.callbacks.DrawSample}]}", "callbacks", "DrawSamples"),
    ],
)
def test_the_file_the_key_and_what_was_meant_are_named(text: str, key: str, meant: str) -> None:
    said = refusal(text)
    assert said.startswith("mine.yaml: ")
    assert key in said
    assert f"'{meant}'" in said.partition("did you mean")[2]


def test_a_changed_class_has_the_keys_of_its_own() -> None:
    changed = "model: {init_args: {objective: {class_path: lit_safety.objectives.DiffusionDPO, init_args: {gamma: 1}}}}"
    assert "'gamma'" in refusal(changed)
    Path("over.yaml").write_text(changed.replace("gamma: 1", "beta: 1"))
    classes = check_config(["--config", "scdpo.yaml", "--config", "over.yaml"])
    assert classes["model.objective"] == "lit_safety.objectives.DiffusionDPO"


def test_options_are_checked_as_files_are() -> None:
    for option in ("--model.init_args.objective.init_args.bta", "--model.objective.bta"):
        with pytest.raises(UserError, match=r"'bta'.*'beta'"):
            check_config(["--config", "scdpo.yaml", option, "3"])
    with pytest.raises(UserError, match="max_steps"):
        check_config(["--config=scdpo.yaml", "--trainer.max_step=3"])


def test_a_file_of_the_trainers_keys_is_an_overlay_too_where_the_methods_file_would_undo_it() -> None:
    Path("mine.yaml").write_text("trainer: {max_steps: 3, limit_val_batches: 2}\n")
    with pytest.raises(UserError, match=r"mine\.yaml.*`trainer\.max_steps`.*--config scdpo\.yaml --config mine\.yaml"):
        check_config(["--config", "mine.yaml", "--config", "scdpo.yaml"])
    check_config(["--config", "scdpo.yaml", "--config", "mine.yaml"])
    check_config(["--config", "strategies/ddp.yaml", "--config", "scdpo.yaml"])  # nothing of it is undone


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arms: {half: }", "`arms.half` is empty.*adapter"),
        ("arms: {half: runs/latest/adapter}", "`arms.half` is 'runs/latest/adapter'.*adapter"),
        ("arms: {a: {guard: {class_path: lit_safety.drawing.guards.Safre}}}", "did you mean 'SAFREE'"),
        (
            "arms: {a: {guard: {class_path: lit_safety.drawing.guards.Zzz}}}",
            "known are Guard, RoutedExperts, SafeLatentDiffusion, SAFREE$",
        ),
    ],
)
def test_arms_that_say_nothing_and_guards_that_are_not_there(text: str, says: str) -> None:
    Path("arms.yaml").write_text(f"{text}\n")
    with pytest.raises(UserError, match=says) as refused:
        check_command(EVALUATE, ["--config", "arms.yaml"])
    assert "arms.yaml" in str(refused.value)


def test_a_fits_yaml_is_no_other_commands() -> None:
    Path("fit.yaml").write_text("model: {class_path: lit_safety.modules.SCDPO}\n")
    for command in ("attacks.command:attack", "evaluation.users.evaluate:evaluate_users", "merging.merge:merge"):
        with pytest.raises(UserError, match=r"fit\.yaml: is the YAML of a fit"):
            check_command(f"lit_safety.{command}", ["--config", "fit.yaml"])
    check_command(EVALUATE, ["--config", "fit.yaml"])


def test_a_command_line_without_a_method_says_how_to_get_one() -> None:
    for words in ([], ["--trainer.max_steps", "3"]):
        with pytest.raises(UserError, match="init"):
            check_config(words)
    check_config(["--help_all"])


def test_overlays_stand_behind_the_methods_file() -> None:
    with pytest.raises(UserError, match=r"sd15\.yaml.*scdpo\.yaml.*--config scdpo\.yaml --config sd15\.yaml"):
        check_config(["--config", "sd15.yaml", "--config", "scdpo.yaml"])
    with pytest.raises(UserError, match=r"sd15\.yaml.*class_path"):
        check_config(["--config", "sd15.yaml"])
    Path("more.yaml").write_text("trainer: {limit_val_batches: 3}\n")
    check_config(["--config", "more.yaml", "--config", "scdpo.yaml", "--config", "sd15.yaml"])


def test_a_class_of_ones_own_is_looked_for_in_the_working_folder() -> None:
    with pytest.raises(UserError) as refused:
        check_config(["--config", "scdpo.yaml", "--model", "my_method.Mine"])
    assert "my_method.py" in str(refused.value)
    assert "pip install" not in str(refused.value)
    Path("my_methods.py").write_text(
        "from lit_safety.modules import SCDPO\n\nclass Mine(SCDPO):\n"
        "    def __init__(self, *args, extra: int = 1, **more):\n        super().__init__(*args, **more)\n"
    )
    with pytest.raises(UserError, match="my_methods"):
        check_config(["--config", "scdpo.yaml", "--model", "my_method.Mine"])
    check_config(
        ["--config", "scdpo.yaml", "--model", "my_methods.Mine", "--model.extra", "2", "--model.policy", "full"]
    )
    with pytest.raises(UserError, match="'extra'"):
        check_config(["--config", "scdpo.yaml", "--model", "my_methods.Mine", "--model.extr", "2"])


def test_a_package_that_is_known_is_to_be_installed() -> None:
    with pytest.raises(UserError, match="pip install prodigyopt"):
        check_config(["--config", "scdpo.yaml", "--model.optimizer", "prodigyopt.Prodigy"])


@pytest.mark.parametrize("text", ["a: [1", "- a\n", "", "trainer: {max_steps: 1, max_steps: 2}"])
def test_what_is_no_config_is_named(text: str) -> None:
    assert "mine.yaml" in refusal(text)


def test_a_file_that_is_not_there_is_named_with_one_like_it() -> None:
    with pytest.raises(UserError, match=r"scdp\.yaml.*scdpo\.yaml"):
        check_config(["--config", "scdp.yaml"])


@pytest.mark.parametrize("method", METHODS)
def test_everything_that_is_shipped_passes(method: str) -> None:
    for overlay in [*configs().glob("models/*.yaml"), *configs().glob("strategies/*.yaml")]:
        words = ["--config", f"{method}.yaml", "--config", str(overlay)]
        if overlay.parent.name == "models" and method == "cost_model":
            continue
        if method == "psa" and "backbone" in yaml.safe_load(overlay.read_text()).get("model", {}).get("init_args", {}):
            # Settings of a family of transformers, which PSA does not train: its user attention is for UNets.
            with pytest.raises(UserError, match=rf"{overlay.name}.*'backbone'"):
                check_config(words)
            continue
        check_config(words)


@pytest.mark.parametrize(
    ("command", "config"),
    [(EVALUATE, "evaluate"), (EVALUATE, "baselines"), ("lit_safety.attacks.command:attack", "attack")],
)
def test_the_other_commands_configs_pass_and_their_keys_are_checked(command: str, config: str) -> None:
    words = ["--config", f"{config}.yaml", "--arms.mine.adapter", "x"]
    check_command(command, words)
    for text, meant in (("promts: x", "prompts"), ("arms: {a: {adaptr: x}}", "adapter")):
        Path("mine.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"mine\.yaml.*'{meant}'"):
            check_command(command, [*words, "--config", "mine.yaml"])


def test_values_that_look_like_classes_are_left_alone() -> None:
    check_config(
        ["--config", "scdpo.yaml", "--run.name", "a.b", "--trainer.default_root_dir", "runs.x", "--ckpt_path", "a.ckpt"]
    )


def test_a_wrong_key_is_answered_within_two_seconds_of_work() -> None:
    """Before torch: the processor's seconds, so that a busy machine does not count."""
    code = (
        "import sys, time; from lit_safety.__main__ import main\n"
        "assert main(['fit', '--config', 'scdpo.yaml', '--model.init_args.objectiv', '3']) == 2\n"
        "assert 'torch' not in sys.modules and time.process_time() < 2, time.process_time()"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'objective'" in done.stderr
    assert time.monotonic() - began < 20


def test_the_console_script_sees_classes_in_the_working_folder(own_folder: Path) -> None:
    """A script's own folder is first on Python's path, and not the working folder."""
    script = own_folder / "bin" / "lit-safety"
    script.parent.mkdir()
    script.write_text("from lit_safety.__main__ import run\nrun()\n")
    Path("my_judge.py").write_text("raise SystemExit('read')\n")
    words = ["fit", "--config", "scdpo.yaml", "--model", "my_judge.Nope"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert "no class my_judge.Nope" in done.stderr  # the file was found, and the class is not in it
    safe = subprocess.run([sys.executable, "-P", str(script), *words], capture_output=True, text=True, check=False)
    assert "no my_judge.py" in safe.stderr


FIRST = "model: {init_args: {pretrained: x, objective: {init_args: {beta: 3}}}}\njudge: y\n"
SECOND = "data: {init_args: {train: x}}\narms: {mine: {guard: {class_path: a.B}}}\n"


@pytest.mark.parametrize(
    ("said", "file"),
    [
        ("`model.init_args.objective.init_args.beta`: is wrong", "first.yaml"),
        ("`model.init_args.objective`: Option 'beta' is not accepted", "first.yaml"),
        ("beta must be above 0, got 3", "first.yaml"),
        ("--judge y: no such folder", "first.yaml"),
        ("data.init_args.train: x does not exist", "second.yaml"),
        ("`arms.init_args.guard`: no such class", "second.yaml"),
        ("`trainer.max_steps`: is wrong", None),
        ("second.yaml: `judge`: is wrong", None),
        ("the disk is full", None),
    ],
)
def test_the_last_file_that_says_the_key_is_named(
    said: str, file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(FIRST)
    Path("second.yaml").write_text(SECOND)
    words = ["fit", "--config", "first.yaml", "--config=second.yaml"]
    assert name_file(said, words) == (said if file is None else f"{file}: {said}")


def test_an_option_behind_the_file_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(FIRST)
    said = "--judge z: no such folder"
    assert name_file(said, ["evaluate", "--config", "first.yaml", "--judge", "z"]) == said
    assert name_file(said, ["evaluate", "--judge", "z", "--config", "first.yaml"]) == f"first.yaml: {said}"
