"""What a command imports before it does anything: a fit what its YAML names, a help no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: Lines of ours that SC-DPO's fit may have imported once its classes are made.
BUDGET = 11_000

FIT = """
import json, sys
from pathlib import Path
from lit_safety.cli import trainer

def made(self, subcommand):
    files = {name: one.__file__ for name, one in sys.modules.items()
             if name.split(".")[0] == "lit_safety" and getattr(one, "__file__", None)}
    print("FOUND" + json.dumps({name: len(Path(file).read_text().splitlines()) for name, file in files.items()}))
    raise SystemExit

trainer.LitSafetyCLI._run_subcommand = made
trainer.run_trainer(["fit", "--config", "configs/scdpo.yaml", "--run.root", sys.argv[1]])
"""
PRINT = """
import sys
from lit_safety.cli import trainer

try:
    trainer.run_trainer(["fit", "--config", "configs/scdpo.yaml", "--print_config"])
except SystemExit:
    pass
print("FOUND " + " ".join(sorted({"diffusers", "peft", "accelerate"} & set(sys.modules))))
"""
HELP = """
import sys
from lit_safety.__main__ import main

try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("TORCH" if "torch" in sys.modules else "NO TORCH")
"""


def output(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_a_fit_of_scdpo_imports_what_its_config_names(tmp_path: Path) -> None:
    (line,) = (line for line in output(FIT, str(tmp_path)).splitlines() if line.startswith("FOUND"))
    lines: dict[str, int] = json.loads(line.removeprefix("FOUND"))
    assert "lit_safety.modules.scdpo" in lines
    assert "lit_safety.callbacks.export" in lines
    floors = {name.split(".")[1] for name in lines if "." in name}
    assert not floors & {"merging", "attacks", "users", "evaluation", "judges", "cost_model", "worlds", "generation"}
    assert sum(lines.values()) <= BUDGET, sorted(lines.items(), key=lambda one: -one[1])[:20]


def test_settings_are_printed_without_what_loads_models() -> None:
    assert output(PRINT).rstrip().endswith("FOUND")


@pytest.mark.parametrize(
    "command", [["merge"], ["patch"], ["shards"], ["shards", "precompute"], ["evaluate"], ["users"]]
)
def test_help_imports_no_torch(command: list[str]) -> None:
    said = output(HELP, *command, "--help")
    assert "usage:" in said
    assert said.rstrip().endswith("NO TORCH")
