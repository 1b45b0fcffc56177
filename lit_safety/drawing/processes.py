"""Several processes draw one arm's missing images: one a GPU, or a few on a large CPU.

The batches stay the parts of the list that one process would draw, and are dealt out whole, so the pixels are the same
and every image is written by one process alone.
"""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from lit_safety.core.endings import signals
from lit_safety.core.errors import UserError
from lit_safety.core.processes import deaf_to_ctrl_c, end_all, end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.gallery import DrawingSettings, Gallery


@dataclass(frozen=True)
class Load:
    """How an arm's pipeline is loaded; is sent to other processes."""

    folder: Path
    arm: Arm
    drawing: DrawingSettings

    def __call__(self, rank: int = 0, processes: int = 1) -> Any:
        """The pipeline, ready to draw: on `cuda` process i takes GPU i, round robin.

        Raises:
            UserError: it does not load, or cannot do what is asked for.
        """
        from lit_safety.drawing.pipelines import load_pipeline

        device = str(self.drawing.device)
        if device == "cuda" and processes > 1:
            import torch

            device = f"cuda:{rank % max(1, torch.cuda.device_count())}"
        pipe = load_pipeline(self.folder, self.arm, device, self.drawing.precision)
        return self.drawing.edit.pipeline(pipe) if self.drawing.edit is not None else pipe


def draw_missing(load: Load, gallery: Gallery, tick: Callable[[int], None], processes: int) -> None:
    """Draw whatever a gallery lacks. `tick` hears how many images are done, those already there first.

    Raises:
        UserError: a pipeline does not load, an image cannot be written, or a process was killed; the images drawn
            so far stay.
    """
    batches = gallery.missing()
    tick(len(gallery.prompts) - sum(map(len, batches)))
    gallery.forget_partial()
    count = min(processes, len(batches))
    if count <= 1:
        if batches:
            gallery.draw(load(), load.arm.negative_prompt, tick, load.arm.guard, batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs torch's threads may hang
    threads = _threads() // count
    readers: dict[Any, Any] = {}
    try:
        for rank in range(count):
            reader, writer = context.Pipe(duplex=False)
            work = (load, gallery, batches[rank::count], rank, count, max(1, threads), writer)
            process = context.Process(target=_draw, args=work, daemon=True, name=f"draw {rank}")
            with deaf_to_ctrl_c():
                process.start()
            writer.close()  # so that the end of the process is the end of the pipe
            readers[reader] = process
        _listen(readers, tick)
    finally:
        end_all(readers.values())


def _listen(readers: dict[Any, Any], tick: Callable[[int], None]) -> None:
    left = dict(readers)
    while left:
        ready: list[Any] = connection.wait(list(left))
        for reader in ready:
            try:
                said = reader.recv()
            except (EOFError, OSError):
                process = left.pop(reader)
                process.join()
                if process.exitcode:
                    raise UserError(
                        f"the drawing process {process.name.split()[-1]} ended with status {process.exitcode} (killed, "
                        "or out of memory?); the images drawn so far stay, run the same command again to go on"
                    ) from None
                continue
            if isinstance(said, str):
                raise UserError(said)
            tick(said)


def _draw(
    load: Load, gallery: Gallery, batches: list[range], rank: int, processes: int, threads: int, writer: Any
) -> None:
    """What one process does. It ends with the process that began it, even when that one is killed."""
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt, BrokenPipeError), signals():  # or the process that started it is gone
        try:
            gallery.draw(load(rank, processes), load.arm.negative_prompt, writer.send, load.arm.guard, batches)
        except UserError as error:
            writer.send(str(error))


def _threads() -> int:
    import torch

    return torch.get_num_threads()
