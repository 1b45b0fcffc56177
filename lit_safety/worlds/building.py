"""How a world is built: what is asked of its folders, and its stages one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lit_safety.core.errors import UserError
from lit_safety.core.processes import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MOST_SCENES = 1_000_000
"""Images of the base's data: 3 GB on the disk at 32 px, 7 GB at 48."""
Stage = TypeVar("Stage", bound=str)


def prepare(out: Path, work: Path, scenes: int, processes: int) -> None:
    """Makes the folders of a build.

    Raises:
        UserError: a number is outside its range, or a folder cannot be made.
    """
    check_count(processes, "--processes")
    if not 1000 <= scenes <= MOST_SCENES:
        raise UserError(f"scenes is {scenes}; the pipeline needs at least 1000, and at most {MOST_SCENES} are drawn")
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
    """Does those of the stages that are wanted and not done, in their order.

    Args:
        stages: all, in order.
        wanted: some of them, in any order.
        there: what an earlier build left of a stage that need not be done again; None: it is to be done.
        output: what a stage leaves.
        run: does it.
    """
    for stage in stages:
        if stage not in wanted:
            continue
        if (found := there(stage)) is not None:
            print(f"{stage}: {found} is there", flush=True)
            continue
        print(f"{stage}: making {output(stage)}", flush=True)
        run(stage)
