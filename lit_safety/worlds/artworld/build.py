"""The commands of the art world: `build` makes all its files, `sheet` draws a contact sheet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lit_safety.worlds.building import do_stages, prepare

if TYPE_CHECKING:
    from lit_safety.worlds.artworld.judge_training import JudgeTraining

Stage = Literal[
    "art",
    "tokenizer",
    "scenes",
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
]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class Minutes:
    """Wall time of each training. An interrupted training of VAE or UNet continues from its saved state."""

    text: float = 4.0
    """Text encoder, before the UNet."""
    vae: float = 9.0
    """Autoencoder, from the toy world's."""
    unet: float = 170.0
    """UNet and text encoder together; this decides how sharp the images are."""
    judge: float = 40.0
    """Judge A; judge B gets the same time."""
    clip: float = 10.0
    """The cost model's backbone."""


@dataclass
class _Build:
    """The folders of a build, and the code of each stage."""

    out: Path
    work: Path
    toy: Path
    scenes: int
    minutes: Minutes
    processes: int
    device: str

    @property
    def on_gpu(self) -> bool:
        """Whether steps are large enough for a GPU, and one process trains."""
        return self.device != "cpu"

    def output(self, stage: Stage) -> Path:
        """The file or folder that a stage writes."""
        return {
            "art": self.work / "art.npz",
            "tokenizer": self.work / "tokenizer",
            "scenes": self.work / "images.npy",
            "text": self.work / "text_encoder",
            "vae": self.work / "vae",
            "latents": self.work / "latents.npy",
            "unet": self.work / "unet.done",
            "judge": self.out / "judge",
            "judge_b": self.out / "judge_b",
            "clip": self.out / "clip",
            "cost_model": self.out / "cost_model",
            "prompts": self.out / "prompts" / "test.csv",
            "shards": self.out / "shards" / "val",
            "export": self.out / "pipeline",
        }[stage]

    def there(self, stage: Stage) -> Path | None:
        """The stage's output, if an earlier build wrote it."""
        return found if (found := self.output(stage)).exists() else None

    def run(self, stage: Stage) -> None:
        """Runs one stage. It imports what it needs here, so that the command's help does not import torch."""
        steps: dict[Stage, Callable[[], None]] = {
            "art": self._art, "tokenizer": self._tokenizer, "scenes": self._scenes, "text": self._text,
            "vae": self._vae, "latents": self._latents, "unet": self._unet, "judge": self._judge,
            "judge_b": self._judge_b, "clip": self._clip, "cost_model": self._cost_model, "prompts": self._prompts,
            "shards": self._shards, "export": self._export,
        }  # fmt: skip
        steps[stage]()

    def _art(self) -> None:
        from lit_safety.worlds.artworld.art import make_art

        make_art(self.work)

    def _tokenizer(self) -> None:
        import numpy as np

        from lit_safety.worlds.artworld.networks import build_tokenizer, known_tokens
        from lit_safety.worlds.artworld.sampling import vocabulary

        unfinished = self.work / "tokenizer.new"
        np.save(self.work / "known.npy", known_tokens(build_tokenizer(unfinished), vocabulary()))
        unfinished.rename(self.work / "tokenizer")

    def _scenes(self) -> None:
        from lit_safety.worlds.artworld.base import make_scenes

        make_scenes(self.work, self.scenes, self.processes)

    def _text(self) -> None:
        from lit_safety.worlds.artworld.base import train_text_encoder

        understood = train_text_encoder(self.work, self.minutes.text, device=self.device)
        print(f"text encoder: {understood:.1%} of new captions are understood completely")

    def _vae(self) -> None:
        from lit_safety.worlds.artworld.networks import new_vae
        from lit_safety.worlds.autoencoder import train_vae

        size = 64 if self.on_gpu else 16
        vae = new_vae(self.toy / "vae")
        train_vae(self.work, vae, self._images(), self.minutes.vae, size, lr=1.5e-3, device=self.device)

    def _latents(self) -> None:
        from lit_safety.worlds.autoencoder import encode_all

        encode_all(self.work, self._images(), device=self.device)

    def _images(self) -> Any:
        import numpy as np

        return np.load(self.work / "images.npy", mmap_mode="c")

    def _unet(self) -> None:
        from lit_safety.worlds.artworld.base import write_caption_ids
        from lit_safety.worlds.artworld.networks import new_unet
        from lit_safety.worlds.denoiser import train_unet

        write_caption_ids(self.work)
        world, size = (1, 256) if self.on_gpu else (self.processes, 32)
        train_unet(self.work, new_unet, self.minutes.unet, world, size, self.device)
        (self.work / "unet.done").touch()

    def _judge(self) -> None:
        from lit_safety.worlds.artworld.judge_training import JUDGE_A

        self._train_judge("judge", JUDGE_A)

    def _judge_b(self) -> None:
        from lit_safety.worlds.artworld.judge_training import JUDGE_B

        self._train_judge("judge_b", JUDGE_B)

    def _train_judge(self, stage: Stage, training: JudgeTraining) -> None:
        from lit_safety.worlds.artworld.judge_training import train_judge

        judge = train_judge(
            self.output(stage), self.output("art"), self.minutes.judge, training,
            batch_size=256 if self.on_gpu else 64, workers=self.processes, state=self.work / f"{stage}.pt",
            device=self.device,
        )  # fmt: skip
        print(f"{stage}: {judge.notes['accuracy']}")

    def _clip(self) -> None:
        from lit_safety.worlds.artworld.clip import make_clip

        make_clip(self.work, self.output("clip"), self.minutes.clip, self.processes, device=self.device)

    def _cost_model(self) -> None:
        from lit_safety.worlds.artworld.cost_model import make_cost_model

        make_cost_model(
            self.output("clip"), self.output("cost_model"), self.work / "cost_model", self.output("art"), self.processes
        )

    def _prompts(self) -> None:
        from lit_safety.worlds.artworld.prompts import write_prompt_files

        write_prompt_files(self.out / "prompts")

    def _shards(self) -> None:
        from lit_safety.worlds.artworld.pairs import write_shards

        write_shards(self.out / "shards", self.output("art"))

    def _export(self) -> None:
        import numpy as np
        from transformers import CLIPTokenizer

        from lit_safety.drawing.worlds import write_marker
        from lit_safety.worlds.artworld.networks import new_unet, whole_text_encoder
        from lit_safety.worlds.denoiser import averaged, write_pipeline

        networks, tokenizer = averaged(self.work, new_unet), CLIPTokenizer.from_pretrained(self.work / "tokenizer")
        networks.text = whole_text_encoder(networks.text, np.load(self.work / "known.npy"), tokenizer)
        write_pipeline(self.work, networks, tokenizer, self.output("export"), self.output("tokenizer"))
        write_marker(self.out, "artworld", self.output("export"), own_words=False)


def build(
    out: Path = Path("data/artworld"),
    work: Path = Path("runs/artworld"),
    toy: Path = Path("data/toyworld/pipeline"),
    stages: list[Stage] = list(STAGES),  # noqa: B006 - read only; jsonargparse shows it in --help
    minutes: Minutes = Minutes(),  # noqa: B008 - read only
    scenes: int = 100_000,
    processes: int = 2,
    device: str = "cpu",
) -> None:
    """Build the art world: icons, scenes, networks, judges, prompts, preference pairs.

    A stage is skipped if its output exists. A killed build continues where it stopped. Outputs are never half-written.

    Args:
        out: folder for the results: pipeline/, judge/, judge_b/, clip/, cost_model/, prompts/, shards/.
        work: folder for icons, scenes, latents and the state of trainings.
        toy: the toy world's pipeline; the training of the autoencoder starts from its autoencoder.
        stages: the stages to run; they always run in this order.
        minutes: wall time of each training.
        scenes: how many scenes the pipeline learns from.
        processes: how many processes draw scenes and, on a CPU, train the UNet; one for each core is best.
        device: where networks train. On cuda steps are four to eight times as large; how many minutes are then enough
            was not measured.

    Raises:
        UserError: torch does not find the device.
    """
    from lit_safety.worlds.training import check_device

    prepare(out, work, scenes, processes)
    check_device(device)
    world = _Build(out, work, toy, scenes, minutes, processes, device)
    do_stages(STAGES, stages, world.there, world.output, world.run)
