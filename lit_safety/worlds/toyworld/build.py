"""The commands of the toy world: `build` makes all its files, `sheet` draws contact sheets."""

from pathlib import Path

from lit_safety.core.errors import UserError
from lit_safety.worlds.building import do_stages, prepare
from lit_safety.worlds.toyworld.stages import STAGES, Minutes, Stage, WorldBuild


def build(
    out: Path = Path("data/toyworld"),
    work: Path = Path("runs/toyworld"),
    stages: list[Stage] = list(STAGES),  # noqa: B006 - read only; jsonargparse shows it in --help
    minutes: Minutes = Minutes(),  # noqa: B008 - read only
    scenes: int = 60_000,
    processes: int = 2,
    redo: bool = False,
) -> None:
    """Build the toy world: scenes, networks, judge, prompts, preference pairs.

    A stage is skipped if its output exists, and so are the steps towards an existing pipeline. A killed build continues
    where it stopped. Outputs are never half-written.

    Args:
        out: folder for the results: pipeline/, judge/, clip/, prompts/, shards/.
        work: folder for scenes, latents and the state of trainings.
        stages: the stages to run; they always run in this order.
        minutes: wall time of each training.
        scenes: how many scenes the pipeline learns from.
        processes: how many processes draw scenes and train the UNet and CLIP; one for each core is best.
        redo: run the stages prompts, shards, export and onpolicy even if their output exists.
    """
    prepare(out, work, scenes, processes)
    world = WorldBuild(out, work, scenes, minutes, processes)
    do_stages(STAGES, stages, lambda stage: world.output_of(stage, redo), world.done.__getitem__, world.run)


def sheet(
    out: Path = Path("runs/toyworld/sheet.png"),
    pipeline: Path | None = None,
    prompts: Path = Path("data/toyworld/prompts/test.csv"),
    count: int = 100,
    guidance: float = 3.0,
    steps: int = 20,
) -> None:
    """Draw a contact sheet of drawn scenes or, if a pipeline is given, of its images of prompts.

    Args:
        out: the PNG.
        pipeline: a folder in diffusers' layout; none: the world's own drawn scenes.
        prompts: a prompt CSV; rows are taken from it at equal distances.
        count: images on the sheet.
        guidance: classifier-free guidance.
        steps: denoising steps.
    """
    from lit_safety.report.sheet import plain_sheet
    from lit_safety.worlds.toyworld.drawing import draw, quiet

    if not 1 <= count <= 10_000:
        raise UserError(f"--count {count}: a sheet holds from 1 to 10000 images")
    out.parent.mkdir(parents=True, exist_ok=True)
    if pipeline is None:
        from lit_safety.worlds.toyworld.sampling import draw_scene
        from lit_safety.worlds.toyworld.scene import render
        from lit_safety.worlds.toyworld.seeds import stream

        images = [render(draw_scene(stream("checks", i))[0]) for i in range(count)]
    else:
        import csv

        from diffusers import StableDiffusionPipeline

        with prompts.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        rows = rows[:: max(1, len(rows) // count)][:count]
        loaded = quiet(StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None))
        texts, seeds = [row["prompt"] for row in rows], [int(row["seed"]) for row in rows]
        images = draw(loaded, texts, seeds, steps, guidance)
    plain_sheet([images[row : row + 20] for row in range(0, len(images), 20)], zoom=2).save(out)
    print(f"{len(images)} images: {out}")
