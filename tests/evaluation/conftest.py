"""A pipeline of random weights, a judge that needs none, and prompts for both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat

from lit_safety.drawing.prompts import COLUMNS, Prompt
from lit_safety.judges.judge import JudgeError, Verdict

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # the helpers that write shards

LABELS = ["knife", "skull", "car", "tree"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_vocabulary(folder: Path) -> list[str]:
    """The files of a CLIP tokenizer that knows single letters; returns its words, the end token last."""
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return words


def build_pipeline(folder: Path, width: int = 32) -> Path:
    """A StableDiffusionPipeline of 32 x 32 images with random weights, saved to `folder`."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = save_vocabulary(folder)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16),
        unet=UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, width), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def save_adapter(pipeline: Path, folder: Path) -> Path:
    """A LoRA with random weights for the UNet of `pipeline`, as diffusers saves it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


def build_clip(folder: Path, length: int = 12, projection: int = 8) -> Path:
    """Takes 32 x 32 images and texts of single letters, at most `length` tokens with start and end."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
    )  # fmt: skip

    words = save_vocabulary(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=length, bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1, projection_dim=projection, **shape,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=projection, **shape)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection))
    for parameter in model.parameters():  # CLIP's own initial weights are so small that all vectors look alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length).save_pretrained(
        folder
    )
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adapter(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(pipeline, tmp_path_factory.mktemp("adapter"))


class BrightnessJudge:
    """Harmful: redder than green. Every label is present or not by a threshold of its own."""

    name = "brightness"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"name": self.name, "labels": [*LABELS, "violence", "shocking"]}

    def judge(self, images: list[Image.Image]) -> list[Verdict | JudgeError]:
        answers: list[Verdict | JudgeError] = []
        for image in images:
            red, green, blue = (mean / 255 for mean in ImageStat.Stat(image).mean)
            scores = dict(zip(LABELS, (red, green, blue, (red + blue) / 2), strict=True))
            present = frozenset(name for name, p in scores.items() if p > 0.5)
            answers.append(Verdict(red > green, scores, {"violence": red, "shocking": green}, 0.95, present))
        return answers


@pytest.fixture
def judge() -> BrightnessJudge:
    return BrightnessJudge()


def make_prompt(
    kind: str, category: str = "", concept: str = "", benign: str = "", held_out: bool = False, seed: int = 0
):
    """A prompt whose text says what it asks for."""
    text = f"{concept or category} {benign}".strip()
    return Prompt(text, kind, category, concept, tuple(filter(None, benign.split(";"))), held_out, seed)  # type: ignore[arg-type]


SMALL_SET = [
    make_prompt("explicit", "violence", "knife", "car", seed=1),
    make_prompt("explicit", "shocking", "skull", "tree", seed=2),
    make_prompt("implicit", "violence", "knife", held_out=True, seed=3),
    make_prompt("lookalike", benign="tree", seed=4),
    make_prompt("clean", benign="car", seed=5),
    make_prompt("clean", benign="car;tree", seed=6),
]


def save_csv(file: Path, prompts: list[Prompt]) -> Path:
    """Write prompts as the CSV that `read_prompts` reads."""
    lines = [",".join(COLUMNS)]
    for p in prompts:
        cells = [p.prompt, p.kind, p.category, p.concept, ";".join(p.benign), str(int(p.held_out)), str(p.seed)]
        lines.append(",".join(cells))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def ask() -> Callable[..., Prompt]:
    """`make_prompt`, where tests cannot import it."""
    return make_prompt


@pytest.fixture
def small_set() -> list[Prompt]:
    return list(SMALL_SET)


@pytest.fixture
def prompts_csv(tmp_path: Path) -> Path:
    return save_csv(tmp_path / "prompts.csv", SMALL_SET)


@pytest.fixture
def other_adapter(tmp_path: Path) -> Path:
    """A LoRA for a UNet of another width than `pipeline`'s."""
    return save_adapter(build_pipeline(tmp_path / "wider", width=48), tmp_path / "other_adapter")
