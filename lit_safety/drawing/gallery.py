"""Drawing prompts with a diffusers pipeline: the same noise for every arm, each image written once, resumable.

An image's initial noise comes from a generator of its own seed, on the CPU: it depends neither on the batch nor on
the device. Its last digits do depend on the other images of its batch. So batches are fixed parts of the list, and a
batch that a kill cut short is drawn again whole: a resumed run holds the same pixels as one that was never killed.

Several processes can draw one arm's missing images: one a GPU, or a few on a large CPU. Whole batches are dealt out, so
the pixels stay the same and every image is written by one process alone.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from itertools import groupby
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from lit_safety.core.endings import signals
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest
from lit_safety.core.processes import check_count, deaf_to_ctrl_c, end_all, end_with_parent
from lit_safety.drawing.pipelines import PainterSettings
from lit_safety.drawing.threads import each_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from lit_safety.drawing.arms import Arm
    from lit_safety.drawing.edits import Edit
    from lit_safety.drawing.guards.guard import Guard
    from lit_safety.drawing.prompts import Prompt


UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
"""What PIL raises for a file that is missing, cut short, damaged or far too large."""


@dataclass(frozen=True)
class DrawingSettings(PainterSettings):
    """How images are drawn: the options of all commands that draw.

    Args:
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 3 is good for the toy world, 7.5 is common for Stable Diffusion. A
            column for it in the prompt set has priority.
        resolution: Side of the images in pixels; null is the pipeline's own.
        batch_size: Images drawn at once.
        device: The device, such as cpu or cuda:1; null: cuda if there is a GPU.
        precision: Number format of the weights while drawing. Training and gradients use float32.
        workers: Batches that a process draws at the same time; null: one for each core for a small network on a CPU,
            else 1.
        edit: Redraw images instead of drawing from text alone; null: from text alone.

    Raises:
        UserError: a number is out of its range.
    """

    steps: int = 20
    guidance: float = 3.0
    batch_size: int = 32
    workers: int | None = None
    edit: Edit | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None:
            check_count(self.workers, "--workers")

    def pixels(self) -> dict[str, Any]:
        """All settings that pixels depend on, for the report. The number of workers is not one of them."""
        names = [one.name for one in fields(self) if one.name not in ("workers", "edit")]
        about = {name: getattr(self, name) for name in names}
        return about | ({"edit": self.edit.describe()} if self.edit is not None else {})

    def protocol(self) -> dict[str, Any]:
        """The settings that must be equal if two sets of images are compared, without those for speed."""
        compared = ("steps", "guidance", "resolution", "edit")
        return {key: value for key, value in self.pixels().items() if key in compared}


@dataclass(frozen=True)
class GridSettings(DrawingSettings):
    """How a grid's images are drawn: a few at once.

    It is in this file because `--help` imports the types in the file of a command's options, and a grid's own file
    names types of torch.
    """

    batch_size: int = 8


@dataclass(frozen=True)
class Drawn:
    """An image on disk, or why it is missing."""

    path: Path
    error: str | None = None


class Gallery:
    """The images of one arm in a folder named by everything they depend on.

    Images of other weights, prompts or settings are in other folders, so they are never mistaken for these.

    Args:
        parent: holds the galleries of all arms.
        name: the arm.
        identity: what the pixels depend on besides prompts and settings, such as the weights; can be written as JSON.
        prompts: what is drawn; row i is file `{i:05d}.png`.
        settings: how they are drawn.
    """

    def __init__(
        self, parent: Path, name: str, identity: dict[str, Any], prompts: Sequence[Prompt], settings: DrawingSettings
    ) -> None:
        self.prompts = list(prompts)
        self.settings = settings
        rows = [_row(p) for p in self.prompts]
        self.identity = {**identity, **settings.pixels(), "prompts_sha256": digest(rows)}
        self.sha256 = digest(self.identity)
        self.folder = parent / f"{name}-{self.sha256[:12]}"

    def drawn(self, row: int) -> Drawn | None:
        """The image of a row, whole and readable, or the error instead of it; None: it must still be drawn."""
        path = self._path(row)
        note = path.with_suffix(".error")
        if note.is_file():
            return Drawn(path, error=note.read_text(encoding="utf-8"))
        try:
            with Image.open(path) as image:
                image.load()
        except UNREADABLE:  # missing, or cut short by a crash of the machine
            return None
        return Drawn(path)

    def missing(self) -> list[range]:
        """The batches with at least one missing image."""
        starts = range(0, len(self.prompts), self.settings.batch_size)
        batches = [range(start, min(start + self.settings.batch_size, len(self.prompts))) for start in starts]
        return [batch for batch in batches if any(self.drawn(row) is None for row in batch)]

    def draw(
        self,
        pipe: Any,
        negative_prompt: str | None,
        tick: Callable[[int], None],
        guard: Guard | None = None,
        batches: Sequence[range] | None = None,
    ) -> None:
        """Draw the missing images. `tick` is called with how many images are done, first with those that exist already.

        Args:
            batches: some of `missing()`, if other processes draw the others; None: all.

        Raises:
            UserError: an image cannot be written; those drawn so far stay.
        """
        if batches is None:
            batches = self.missing()
            tick(len(self.prompts) - sum(map(len, batches)))

        def draw(pipe: Any, batch: range) -> int:
            prompts = [self.prompts[row] for row in batch]
            pixels = draw_batch(pipe, prompts, self.settings, negative_prompt, guard)
            for row, image in zip(batch, pixels, strict=True):
                self._keep(row, image)
            return len(batch)

        for count in each_batch(pipe, batches, draw, self.settings.workers):
            tick(count)

    def forget_partial(self) -> None:
        """Remove half-written files of a process that has ended."""
        for partial in self.folder.glob(".*.partial"):
            process = partial.suffixes[-2].lstrip(".")
            if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc").is_dir():
                partial.unlink(missing_ok=True)

    def all(self) -> list[Drawn]:
        """Every row's image or error, in order."""
        return [self.drawn(row) or Drawn(self._path(row), "the image is missing") for row in range(len(self.prompts))]

    def _path(self, row: int) -> Path:
        return self.folder / f"{row:05d}.png"

    def _keep(self, row: int, pixels: np.ndarray) -> None:
        import numpy as np

        path = self._path(row)
        if self.drawn(row) is not None:  # an earlier run ended after this image
            return
        if not np.isfinite(pixels).all():  # it would be saved as a black image, which a judge calls safe
            _write(path.with_suffix(".error"), b"the pipeline drew numbers that are not finite")
            return
        about = PngImagePlugin.PngInfo()
        about.add_itxt("prompt", self.prompts[row].prompt)
        about.add_itxt("row", json.dumps(self.prompts[row].identity(), ensure_ascii=False))
        about.add_itxt("settings", json.dumps(self.identity, ensure_ascii=False))
        content = io.BytesIO()
        Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8)).save(content, "PNG", pnginfo=about)
        _write(path, content.getvalue())


def size_of(drawn: Sequence[Drawn]) -> str | None:
    """The size of the first image that exists, such as `512 x 512`; None: there is none."""
    for one in drawn:
        try:
            with Image.open(one.path) as image:
                return f"{image.width} x {image.height}"
        except UNREADABLE:
            continue
    return None


def draw_batch(
    pipe: Any,
    prompts: Sequence[Prompt],
    settings: DrawingSettings,
    negative_prompt: str | None = None,
    guard: Guard | None = None,
) -> np.ndarray:
    """Pixels (B, H, W, 3) in [0, 1] by the stock call of any diffusers text-to-image pipeline.

    A call has one guidance scale, so prompts with another scale are drawn in another call.

    Raises:
        UserError: the pipeline refuses these settings.
    """
    import numpy as np
    import torch

    from lit_safety.adapters.user_pipeline import draws_for_users
    from lit_safety.backbones.call import call_options

    own = [settings.guidance if p.guidance is None else p.guidance for p in prompts]
    if len(set(own)) > 1:
        parts = [[row for row, _ in group] for _, group in groupby(enumerate(own), key=lambda pair: pair[1])]
        return np.concatenate(
            [draw_batch(pipe, [prompts[row] for row in part], settings, negative_prompt, guard) for part in parts]
        )
    extra: dict[str, Any] = {}
    if draws_for_users(pipe):
        extra["user"] = [p.user for p in prompts]
    negatives = None if negative_prompt is None else [negative_prompt] * len(prompts)
    if settings.edit is not None:
        extra |= settings.edit.inputs(pipe, prompts, settings.resolution)
    elif settings.resolution is not None:
        extra |= {"height": settings.resolution, "width": settings.resolution}
    try:
        with guard.around(pipe, [p.prompt for p in prompts]) if guard is not None else nullcontext():
            return pipe(
                prompt=[p.prompt for p in prompts],
                generator=[torch.Generator("cpu").manual_seed(p.seed) for p in prompts],
                num_inference_steps=settings.steps,
                output_type="np",
                **call_options(pipe, own[0], negatives, len(prompts)),
                **extra,
            ).images
    except ValueError as error:  # a size, a number of steps or a UNet that this family does not accept
        raise UserError(f"{type(pipe).__name__} refuses the settings: {str(error).splitlines()[0]}") from error


def _row(prompt: Prompt) -> tuple[Any, ...]:
    """What the pixels of a row depend on."""
    guidance = () if prompt.guidance is None else (prompt.guidance,)
    user = () if prompt.user is None else ({"user": prompt.user},)
    return prompt.prompt, prompt.seed, *guidance, *user


def _write(path: Path, content: bytes) -> None:
    """Write whole or not at all. Without a sync, unlike a shard, because a lost image is noticed and drawn again."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):  # the error that led here is the one to report
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the images drawn so far stay: make room and run the same "
            "command again to continue"
        ) from error


@dataclass(frozen=True)
class Load:
    """How to load an arm's pipeline; it is sent to other processes."""

    folder: Path
    arm: Arm
    drawing: DrawingSettings

    def __call__(self, rank: int = 0, processes: int = 1) -> Any:
        """The pipeline, ready to draw: on `cuda` process i takes GPU i, round robin.

        Raises:
            UserError: it does not load, or does not support what is asked for.
        """
        from lit_safety.drawing.pipelines import load_pipeline

        device = str(self.drawing.device)
        if device == "cuda" and processes > 1:
            import torch

            device = f"cuda:{rank % max(1, torch.cuda.device_count())}"
        pipe = load_pipeline(self.folder, self.arm, device, self.drawing.precision)
        return self.drawing.edit.pipeline(pipe) if self.drawing.edit is not None else pipe


def draw_missing(load: Load, gallery: Gallery, tick: Callable[[int], None], processes: int) -> None:
    """Draw the missing images of a gallery. `tick` is called with how many are done, first with those that exist
    already.

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
                        "or out of memory?); the images drawn so far stay: run the same command again to continue"
                    ) from None
                continue
            if isinstance(said, str):
                raise UserError(said)
            tick(said)


def _draw(
    load: Load, gallery: Gallery, batches: list[range], rank: int, processes: int, threads: int, writer: Any
) -> None:
    """The work of one process. It ends with the process that started it, even if that one is killed."""
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt, BrokenPipeError), signals():  # the pipe breaks if the parent has ended
        try:
            gallery.draw(load(rank, processes), load.arm.negative_prompt, writer.send, load.arm.guard, batches)
        except UserError as error:
            writer.send(str(error))


def _threads() -> int:
    import torch

    return torch.get_num_threads()
