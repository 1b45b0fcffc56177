"""The short help of the trainer's commands: the method's own keys, and where to find the rest. Works without torch."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from lit_safety.core.check_config import check_config
from lit_safety.core.errors import UserError
from lit_safety.core.signatures import Absent, Parameter, nested, signature_of

#: What each command is for, and the keys of the data that it reads.
ABOUT = {
    "fit": "Train. Later --config files and options override earlier ones.",
    "validate": "Errors and margins on the validation pairs, at fixed timesteps and noise.",
    "test": "The same on test pairs; then draws and judges the prompts of `EvaluateOnTest` with base and checkpoint.",
    "predict": "Draw the test pairs' prompts with a checkpoint into a folder.",
}
DEFAULT = "scdpo.yaml"
#: Classes whose keys are shown: dotted key -> the YAML key of its arguments.
SHOWN = {
    "model": "model.init_args",
    "model.objective": "model.init_args.objective.init_args",
    "model.lora": "model.init_args.lora.init_args",
    "data": "data.init_args",
}
WIDTH = 120
#: Keys that the program fills in.
HIDDEN = {"seed"}


def short_help(arguments: Sequence[str]) -> str:
    """The help of a command, for the classes that its `--config` and options name, else for SC-DPO.

    Args:
        arguments: the command and the words after it.
    """
    command, *rest = arguments
    words = [word for word in rest if word not in ("-h", "--help")]
    has_config = any(word.split("=")[0] in ("--config", "-c") for word in words)
    try:
        classes = check_config(words if has_config else ["--config", DEFAULT, *words])
    except UserError:  # the error is reported when the command runs
        classes = check_config(["--config", DEFAULT])
    program = f"python -m lit_safety {command}"
    more = [] if command == "fit" else ["--ckpt_path last"]
    lines = [f"usage: {program} --config FILE [--config OVERLAY ...] [--KEY VALUE ...]", "", ABOUT[command], ""]
    lines += [f"    {' '.join([program, '--config configs/scdpo.yaml', *more])}", ""]
    lines += ["  --config FILE      YAML; a shipped one is found by its name. `init` writes one to edit."]
    lines += ["  --ckpt_path PATH   a checkpoint, or `last`: the newest run's" + _auto(command)]
    lines += ["  --print_config     print the settings that would be used, and end", ""]
    if command == "fit":
        for key, place in SHOWN.items():
            lines += _keys(place, classes.get(key))
        lines += [
            "Lightning's own: --trainer.max_steps, .precision, .devices, .accumulate_grad_batches, .callbacks ..."
        ]
    else:
        lines += ["Its keys are those of the fit: `python -m lit_safety fit --help`."]
    lines += [
        "",
        "The rest:",
        f"    {program} --help_all             every option, also of the trainer and the loggers",
        f"    {program} --model.help CLASS     every option of a module; --data.help CLASS of a datamodule",
        "    configs/scdpo.yaml               explains each key; so does the file that `init` writes",
    ]
    return "\n".join(lines)


def _auto(command: str) -> str:
    return "; `auto`: the same, or a new run" if command == "fit" else ""


def _keys(place: str, path: str | None) -> list[str]:
    try:
        found = None if path is None else signature_of(path)
    except Absent:
        return []
    if found is None:
        return []
    lines = [f"{place} ({path}), with defaults:"]
    for one in found.parameters.values():
        if one.name not in HIDDEN:
            lines.append(_line(one))
    return [*lines, ""]


def _line(one: Parameter) -> str:
    inner = nested(one)
    doc = one.doc or ("" if inner is None else f"{', '.join(inner.parameters)}: {inner.doc}")
    said = re.split(r"[.;] ", doc)[0].rstrip(".")
    default = "required" if one.default is None else one.default
    default = default if len(default) < 22 else "..."
    return f"  {one.name:<18} {default:<20} {textwrap.shorten(said, WIDTH - 42, placeholder=' ...')}"
