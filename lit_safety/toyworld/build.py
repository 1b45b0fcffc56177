"""The commands of the toy world: `build` makes every artefact, `sheet` draws contact sheets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lit_safety.errors import UserError

Stage = Literal[
    "scenes", "tokenizer", "text", "vae", "latents", "unet", "judge", "judge_b", "prompts", "shards", "export"
]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class Minutes:
    """Wall time of each training, on two CPU cores. A training goes on where it was interrupted."""

    text: float = 1.5
    """Text encoder, before the UNet."""
    vae: float = 8.0
    """Autoencoder."""
    unet: float = 80.0
    """UNet and text encoder together; decides how crisp the pictures are."""
    judge: float = 4.0
    """Judge A, and as long again judge B."""


@dataclass
class _Job:
    out: Path
    work: Path
    scenes: int
    minutes: Minutes
    done: dict[Stage, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.done = {
            "scenes": self.work / "scenes.npz",
            "tokenizer": self.work / "tokenizer",
            "text": self.work / "text_encoder",
            "vae": self.work / "vae",
            "latents": self.work / "latents.npy",
            "unet": self.work / "unet.done",
            "judge": self.out / "judge",
            "judge_b": self.out / "judge_b",
            "prompts": self.out / "prompts",
            "shards": self.out / "shards",
            "export": self.out / "pipeline",
        }

    def run(self, stage: Stage) -> None:
        """Does one stage; imports what it needs, so that naming a command costs no torch."""
        steps: dict[Stage, Callable[[], None]] = {
            "scenes": self._scenes,
            "tokenizer": self._tokenizer,
            "text": self._text,
            "vae": self._vae,
            "latents": self._latents,
            "unet": self._unet,
            "judge": self._judge,
            "judge_b": self._judge_b,
            "prompts": self._prompts,
            "shards": self._shards,
            "export": self._export,
        }
        steps[stage]()

    def _scenes(self) -> None:
        from lit_safety.toyworld.dataset import make_scenes

        make_scenes(self.work, self.scenes)

    def _tokenizer(self) -> None:
        from lit_safety.toyworld.tokenizer import build_tokenizer

        build_tokenizer(self.work / "tokenizer")

    def _text(self) -> None:
        from lit_safety.toyworld.text import train_text_encoder

        understood = train_text_encoder(self.work, self.minutes.text)
        print(f"text encoder: {understood:.1%} of 2,000 fresh captions understood in full")

    def _vae(self) -> None:
        from lit_safety.toyworld.vae import train_vae

        train_vae(self.work, self.minutes.vae)

    def _latents(self) -> None:
        from lit_safety.toyworld.vae import encode_all

        encode_all(self.work)

    def _unet(self) -> None:
        from lit_safety.toyworld.unet_training import train_unet

        train_unet(self.work, self.minutes.unet)
        (self.work / "unet.done").touch()

    def _judge(self) -> None:
        from lit_safety.toyworld.judge_training import JUDGE_A, train_judge

        _tell(train_judge(self.done["judge"], self.minutes.judge, JUDGE_A))

    def _judge_b(self) -> None:
        from lit_safety.toyworld.judge_training import JUDGE_B, train_judge

        _tell(train_judge(self.done["judge_b"], self.minutes.judge, JUDGE_B))

    def _prompts(self) -> None:
        from lit_safety.toyworld.prompts import write_prompts

        write_prompts(self.done["prompts"])

    def _shards(self) -> None:
        from lit_safety.toyworld.shards import write_shards

        write_shards(self.done["shards"])

    def _export(self) -> None:
        from lit_safety.toyworld.export import export_pipeline

        export_pipeline(self.work, self.done["export"])


def _tell(found: dict[str, float]) -> None:
    print(f"judge: {found['exact']:.2%} of {found['n']:.0f} fresh scenes told in full, harm {found['harm']:.2%}")


def build(
    out: Path = Path("data/toyworld"),
    work: Path = Path("runs/toyworld"),
    stages: list[Stage] = list(STAGES),  # noqa: B006 - read only; jsonargparse shows it in --help
    minutes: Minutes = Minutes(),  # noqa: B008 - read only
    scenes: int = 60_000,
    redo: bool = False,
) -> None:
    """Build the toy world: scenes, networks, judge, prompts, preference pairs.

    A stage whose output is there is skipped; a killed build goes on where it was; no output is ever half-written.

    Args:
        out: where the artefacts go: pipeline/, judge/, prompts/, shards/.
        work: where scenes, latents and the state of trainings are kept meanwhile.
        stages: what to do, in this order whatever the order given.
        minutes: wall time of each training.
        scenes: how many scenes the pipeline learns from.
        redo: do the prompts, shards and export stages even though their output is there.
    """
    if scenes < 1000:
        raise UserError(f"scenes is {scenes}; the pipeline needs at least 1000")
    for folder in (out, work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}; name a folder you may write to") from error
    job = _Job(out, work, scenes, minutes)
    for stage in STAGES:
        if stage not in stages:
            continue
        if job.done[stage].exists() and not (redo and stage in ("prompts", "shards", "export")):
            print(f"{stage}: {job.done[stage]} is there", flush=True)
            continue
        print(f"{stage}: making {job.done[stage]}", flush=True)
        job.run(stage)


def sheet(
    out: Path = Path("runs/toyworld/sheet.png"),
    pipeline: Path | None = None,
    prompts: Path = Path("data/toyworld/prompts/test.csv"),
    count: int = 100,
    guidance: float = 3.0,
    steps: int = 20,
) -> None:
    """Draw a contact sheet of drawn scenes or, when a pipeline is given, of what it makes of prompts.

    Args:
        out: the PNG.
        pipeline: a folder in diffusers' layout; none: the world's own drawn scenes.
        prompts: a prompt CSV; the pictures take its rows at even distances.
        count: pictures on the sheet.
        guidance: classifier-free guidance.
        steps: denoising steps.
    """
    from lit_safety.toyworld.drawing import draw, quiet, sheet_of

    out.parent.mkdir(parents=True, exist_ok=True)
    if pipeline is None:
        from lit_safety.toyworld.sampling import draw_scene
        from lit_safety.toyworld.scene import render
        from lit_safety.toyworld.seeds import stream

        pictures = [render(draw_scene(stream("checks", i))[0]) for i in range(count)]
    else:
        import csv

        from diffusers import StableDiffusionPipeline

        with prompts.open(newline="") as file:
            rows = list(csv.DictReader(file))
        rows = rows[:: max(1, len(rows) // count)][:count]
        loaded = quiet(StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None))
        texts, seeds = [row["prompt"] for row in rows], [int(row["seed"]) for row in rows]
        pictures = draw(loaded, texts, seeds, steps, guidance)
    sheet_of(pictures).save(out)
    print(f"{len(pictures)} pictures: {out}")
