"""How a world is built: its folders are checked, and its stages run one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lit_safety.core.errors import UserError
from lit_safety.core.processes import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MOST_SCENES = 1_000_000
"""Most images of the base's data: 3 GB on disk at 32 px, 7 GB at 48 px."""
Stage = TypeVar("Stage", bound=str)


def prepare(out: Path, work: Path, scenes: int, processes: int) -> None:
    """Makes the folders of a build.

    Raises:
        UserError: a number is outside its range, or a folder cannot be made.
    """
    check_count(processes, "--processes")
    if not 1000 <= scenes <= MOST_SCENES:
        raise UserError(f"scenes is {scenes}; it must be at least 1000 and at most {MOST_SCENES}")
    for folder in (out, work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}; name a folder you may write to") from error


def do_stages(
    stages: Sequence[Stage],
    wanted: Sequence[Stage],
    there: Callable[[Stage], Path | None],
    output: Callable[[Stage], Path],
    run: Callable[[Stage], None],
) -> None:
    """Runs the wanted stages that are not done yet, in the order of ``stages``.

    Args:
        stages: all stages, in order.
        wanted: the stages to run, in any order.
        there: gives a stage's output from an earlier build; None: the stage must run.
        output: gives the path that a stage writes.
        run: runs a stage.
    """
    for stage in stages:
        if stage not in wanted:
            continue
        if (found := there(stage)) is not None:
            print(f"{stage}: {found} is there", flush=True)
            continue
        print(f"{stage}: making {output(stage)}", flush=True)
        run(stage)
