"""`python -m lit_safety COMMAND ...`. Help is answered without importing torch."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from lit_safety import __version__
from lit_safety.core.endings import STOPPED, end_now, explain, signals, stopped_by
from lit_safety.core.errors import UserError
from lit_safety.core.hardware import out_of_memory
from lit_safety.core.processes import check_launcher, watch_parent

TRAINER_COMMANDS = {
    "fit": "train: preference optimisation by YAML, `fit --config configs/scdpo.yaml`",
    "validate": "errors and margins on the validation pairs, at fixed timesteps and noise",
    "test": "evaluation metrics of a checkpoint against the base model",
    "predict": "draw prompts with a checkpoint into a folder",
}
OTHER_COMMANDS = {
    "evaluate": "draw the same prompts and seeds with several models, judge, report",
    "artworld": "build the art world: icons of six design teams, pipeline, judges, shards",
    "attack": "attack models in several ways, and plot success against cost",
    "compare": "print several metrics.json in one table",
    "cost-model": "how accurate a cost model is, on labelled shards and on drawn images",
    "dossier": "run a list of evaluations and attacks on a model, and write what they show on one page",
    "explain": "where and when an adapter acts: knock-outs, gate ratios, energy; a page with heat maps",
    "init": "write the config of a method into a folder, to edit it",
    "judge-audit": "measure how right a judge is on labelled images",
    "merge": "merge LoRA experts into one, in delta space",
    "patch": "give an aligned adapter back the harmless things that it lost",
    "shards": "convert, inspect and check shards of preference pairs",
    "study": "do the runs of a study file, and tabulate and plot their figures",
    "toyworld": "build the toy world: scenes, pipeline, judges, shards",
    "users": "embed users' profiles, draw for users, and measure how well their bounds are kept",
}

ALL_HELP = "--help_all"
"""Of the trainer's commands: show every option."""

READER_GONE = 128 + 13
"""Exit status of a program that SIGPIPE ends."""


def usage() -> str:
    """The top-level help."""
    lines = ["usage: python -m lit_safety COMMAND [--help] [options]", ""]
    lines += ["Make text-to-image models safe by preference optimisation.", "", "commands:"]
    lines += [f"  {name:<11} {text}" for name, text in (TRAINER_COMMANDS | OTHER_COMMANDS).items()]
    lines += ["", "`COMMAND --help` explains a command's options; the README shows the first steps."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done; 2: bad input, or an error of the machine (one line on stderr); 130 and 143: stopped by Ctrl-C or SIGTERM
    (also one line); 141: the reader of its output ended first.
    """
    print_anything()
    arguments = list(sys.argv[1:] if argv is None else argv)
    with signals():
        try:
            status = _run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # so that a closed pipe is noticed here, and not while Python ends
            return status
        except UserError as error:
            from lit_safety.core.check_config import name_file
            from lit_safety.core.parsing import shorten

            return _complain(name_file(shorten(str(error)), arguments))
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            # As after `... | head`: end without a message, as other tools do, but not with status 0.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE
        except (KeyboardInterrupt, SystemExit) as error:
            if (by := stopped_by(error)) is None:
                raise
            if os.environ.get("LOCAL_RANK", "0").strip() in ("", "0"):  # only one of several ranks prints
                with suppress(OSError):
                    print(f"stopped by {'Ctrl-C' if by == signal.SIGINT else by.name}", file=sys.stderr, flush=True)
            return 128 + by
        except Exception as error:
            message = out_of_memory(error, arguments[0] if arguments else "") or explain(error)
            if message is None:
                raise
            return _complain(message)


def _reader_is_gone() -> bool:
    """Whether stdout is the closed pipe, and not another pipe of the program."""
    if not hasattr(select, "poll"):  # Windows
        return True
    ends = select.poll()
    ends.register(sys.stdout.fileno(), 0)
    return bool(ends.poll(0))  # without requested events it reports only that the other end is closed


def _complain(message: str) -> int:
    with suppress(OSError):  # stderr is closed
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    # transformers prints a remark about image processors without torchvision; we do not use them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    check_launcher()
    command = arguments[0]
    if command in TRAINER_COMMANDS:
        from lit_safety.core.check_config import check_config

        if {"-h", "--help"} & set(arguments):
            from lit_safety.cli.help import short_help

            print(short_help(arguments))
            return 0
        check_config(arguments[1:])
        arguments = ["--help" if word == ALL_HELP else word for word in arguments]
        from lit_safety.cli.trainer import run_trainer

        run_trainer(arguments)
    elif command in OTHER_COMMANDS:
        from lit_safety.cli.commands import run_command

        run_command(arguments)
    else:
        from lit_safety.core.meant import did_you_mean

        raise UserError(f"unknown command {command!r}{did_you_mean(command, TRAINER_COMMANDS | OTHER_COMMANDS)}")
    return 0


def print_anything() -> None:
    """Let stdout and stderr, also of started processes, accept any text.

    Prompts and file names can hold any letter, but a terminal or a batch system may accept only ASCII. Other letters
    are then written as an escape (`\\xe9`) instead of ending the run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    encoding = (os.environ.get("PYTHONIOENCODING") or getattr(sys.stdout, "encoding", None) or "utf-8").partition(":")[
        0
    ]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"


def see_working_folder() -> None:
    """Let YAML name classes in files of the working folder, as `python -m` does. Installed packages come first."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.append(here)


def run() -> NoReturn:
    """The program: `main`, then the end of the process."""
    see_working_folder()
    status = main()
    if status in STOPPED:
        end_now(status)
    sys.exit(status)


if __name__ == "__main__":
    watch_parent()
    run()
