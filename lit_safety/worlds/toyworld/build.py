"""The commands of the toy world: `build` makes all its files in stages, `sheet` draws contact sheets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lit_safety.core.errors import UserError
from lit_safety.worlds.building import do_stages, prepare

Stage = Literal[
    "scenes",
    "tokenizer",
    "text",
    "vae",
    "latents",
    "unet",
    "judge",
    "judge_b",
    "clip",
    "cost_model",
    "prompts",
    "shards",
    "export",
    "onpolicy",
]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class Minutes:
    """Wall time of each training, on two CPU cores. An interrupted training continues from its saved state."""

    text: float = 1.5
    """Text encoder, before the UNet."""
    vae: float = 8.0
    """Autoencoder."""
    unet: float = 80.0
    """UNet and text encoder together; this decides how sharp the images are."""
    judge: float = 4.0
    """Judge A; judge B gets the same time."""
    clip: float = 6.0
    """CLIP, both towers."""


@dataclass
class WorldBuild:
    """The folders of a build, and the code of each stage."""

    out: Path
    work: Path
    scenes: int
    minutes: Minutes
    processes: int
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
            "clip": self.out / "clip",
            "cost_model": self.out / "cost_model",
            "prompts": self.out / "prompts" / "test.csv",  # written last
            "shards": self.out / "shards" / "conflict",  # written last
            "export": self.out / "pipeline",
            "onpolicy": self.out / "shards" / "onpolicy",
        }

    def output_of(self, stage: Stage, redo: bool) -> Path | None:
        """The output that makes the stage unnecessary: its own or, for a step towards the pipeline, the pipeline."""
        if redo and stage in ("prompts", "shards", "export", "onpolicy"):
            return None
        outputs = [self.done[stage]]
        if stage in STAGES[: STAGES.index("judge")] and not redo:
            outputs.append(self.done["export"])
        return next((output for output in outputs if output.exists()), None)

    def run(self, stage: Stage) -> None:
        """Runs one stage. It imports what it needs here, so that the command's help does not import torch."""
        steps: dict[Stage, Callable[[], None]] = {
            "scenes": self._scenes,
            "tokenizer": self._tokenizer,
            "text": self._text,
            "vae": self._vae,
            "latents": self._latents,
            "unet": self._unet,
            "judge": self._judge,
            "judge_b": self._judge_b,
            "clip": self._clip,
            "cost_model": self._cost_model,
            "prompts": self._prompts,
            "shards": self._shards,
            "export": self._export,
            "onpolicy": self._onpolicy,
        }
        steps[stage]()

    def _scenes(self) -> None:
        from lit_safety.worlds.toyworld.unet import make_scenes

        make_scenes(self.work, self.scenes, self.processes)

    def _tokenizer(self) -> None:
        from lit_safety.worlds.toyworld.text import build_tokenizer

        build_tokenizer(self.work / "tokenizer")

    def _text(self) -> None:
        from lit_safety.worlds.toyworld.text import train_text_encoder

        understood = train_text_encoder(self.work, self.minutes.text, min(30_000, self.scenes))
        print(f"text encoder: {understood:.1%} of new captions are understood completely")

    def _vae(self) -> None:
        import numpy as np

        from lit_safety.worlds.autoencoder import train_vae
        from lit_safety.worlds.toyworld.vae import new_vae

        train_vae(self.work, new_vae(), np.load(self.work / "scenes.npz")["pictures"], self.minutes.vae)

    def _latents(self) -> None:
        import numpy as np

        from lit_safety.worlds.autoencoder import encode_all

        encode_all(self.work, np.load(self.work / "scenes.npz")["pictures"])

    def _unet(self) -> None:
        import numpy as np
        from transformers import CLIPTokenizer

        from lit_safety.worlds.denoiser import train_unet, write_ids
        from lit_safety.worlds.toyworld.text import tokenize
        from lit_safety.worlds.toyworld.unet import new_unet

        tokenizer = CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        captions = np.load(self.work / "scenes.npz")["captions"]
        ids = tokenize(tokenizer, captions.reshape(-1).tolist()).view(*captions.shape, -1)
        write_ids(self.work, ids, tokenize(tokenizer, [""])[0])
        train_unet(self.work, new_unet, self.minutes.unet, world=self.processes)
        (self.work / "unet.done").touch()

    def _judge(self) -> None:
        from lit_safety.worlds.toyworld.judge_training import JUDGE_A, train_judge

        _tell(train_judge(self.done["judge"], self.minutes.judge, JUDGE_A))

    def _judge_b(self) -> None:
        from lit_safety.worlds.toyworld.judge_training import JUDGE_B, train_judge

        _tell(train_judge(self.done["judge_b"], self.minutes.judge, JUDGE_B))

    def _clip(self) -> None:
        from lit_safety.worlds.toyworld.clip_checks import make_clip

        make_clip(self.work, self.done["clip"], self.minutes.clip, self.processes)

    def _cost_model(self) -> None:
        from lit_safety.worlds.toyworld.cost_model import make_cost_model

        make_cost_model(
            self.done["clip"], self.out / "shards", self.done["cost_model"], self.work / "cost_model", self.processes
        )

    def _prompts(self) -> None:
        from lit_safety.worlds.toyworld.prompts import write_prompt_files

        write_prompt_files(self.out / "prompts")

    def _shards(self) -> None:
        from lit_safety.worlds.toyworld.pairs import write_shards

        write_shards(self.out / "shards")

    def _export(self) -> None:
        from transformers import CLIPTokenizer

        from lit_safety.drawing.worlds import write_marker
        from lit_safety.worlds.denoiser import averaged, write_pipeline
        from lit_safety.worlds.toyworld.unet import new_unet

        tokenizer = CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        write_pipeline(self.work, averaged(self.work, new_unet), tokenizer, self.done["export"])
        write_marker(self.out, "toyworld", self.done["export"])

    def _onpolicy(self) -> None:
        from lit_safety.worlds.toyworld.onpolicy import write_onpolicy

        agreement = write_onpolicy(
            self.done["export"], self.done["judge"], self.done["onpolicy"], self.work / "onpolicy"
        )
        if agreement:
            print(f"onpolicy: judge A confirms {agreement['harmful']:.1%} of harmful, {agreement['safe']:.1%} of safe")


def _tell(found: dict[str, float]) -> None:
    print(f"judge: {found['exact']:.2%} of {found['n']:.0f} new scenes completely right, harm {found['harm']:.2%}")


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
