"""Shared fixtures: a tiny random Stable Diffusion pipeline and drawn preference pairs, made once a session."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# No test may reach for the network, and two cores are best shared between processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# pytest looks for `tests.helpers` in the root (setup.cfg); so do the processes that tests start
# (`class_path: tests.helpers.strategies_cpu.DeepSpeedCPU`).
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

pytest_plugins = ["tests.fixtures.evaluation", "tests.fixtures.shards"]

WORDS = ["a", "red", "blue", "cat", "house", "gun", "and", "with"]


def save_tiny_pipeline(folder: Path, prediction_type: str = "epsilon", channels: int = 32, seed: int = 0) -> Path:
    """A random `StableDiffusionPipeline` for 32 x 32 images, written with `save_pretrained`."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    files = folder.parent / f"{folder.name}-vocabulary"
    files.mkdir(parents=True, exist_ok=True)
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *sorted({c for w in WORDS for c in w}),
        *sorted({c + "</w>" for w in WORDS for c in w}),
    ]
    (files / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=16)
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(channels, 2 * channels),
        norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16, 16), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


#: The longest files: two processes begin with them, so that neither waits for the other in the end.
LONGEST = ("tests/strategies/", "tests/cli/", "tests/docs/", "tests/worlds/", "tests/benchmarks/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: next((n for n, path in enumerate(LONGEST) if item.nodeid.startswith(path)), len(LONGEST))
    )


@pytest.fixture(autouse=True, scope="module")
def frozen_garbage() -> None:
    """What lives at the beginning of a file, libraries above all, is left out of every collection from then on.

    Lightning and torch collect after each fit, and each time would walk through 400,000 objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept for later runs lies among the tests' files, not in the user's home."""
    os.environ["LIT_SAFETY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline, epsilon-prediction."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


@pytest.fixture(scope="session")
def tiny_v_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline, v-prediction."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny-v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def wide_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pipeline whose layers are named alike and sized differently."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "wide", channels=64)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random SDXL."""
    from tests.helpers.tiny_pipelines import save_sdxl

    return save_sdxl(tmp_path_factory.mktemp("pipelines") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random SD3 with all three text encoders."""
    from tests.helpers.tiny_pipelines import save_sd3

    return save_sd3(tmp_path_factory.mktemp("pipelines") / "tiny-sd3")


def write_pairs(
    folder: Path, count: int, samples_per_shard: int = 8, seed: int = 0, categories: Sequence[str] = ()
) -> Path:
    """Shards of ``count`` random 32 x 32 pairs, half of them with a harmful prompt.

    The harmful ones are about violence; or all pairs, two and two, about ``categories`` in turn.
    """
    import numpy as np
    from PIL import Image

    from lit_safety.data.format.writer import ShardWriter

    random = np.random.default_rng(seed)

    def make_image() -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))

    with ShardWriter(folder, samples_per_shard=samples_per_shard) as writer:
        for i in range(count):
            harmful = i % 2 == 0
            about = [categories[i // 2 % len(categories)]] if categories else []
            metadata = {
                "prompt": "a gun and a house" if harmful else "a red cat",
                "prompt_kind": "harmful" if harmful else "clean",
                "categories": about if about else ["violence"] if harmful else [],
                "harmful": {"chosen": False, "rejected": True},
                "order": "safety",
                "cost": {"chosen": -1.0, "rejected": 1.0},
            }
            writer.write(f"{i:05d}", metadata, make_image(), make_image())
    return folder


@pytest.fixture(scope="session")
def pair_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 4 shards of 8 pairs."""
    return write_pairs(tmp_path_factory.mktemp("shards") / "pairs", count=32)


@pytest.fixture(scope="session")
def category_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 6 shards of 8 pairs, 24 about hate and 24 about violence."""
    return write_pairs(tmp_path_factory.mktemp("shards") / "categories", count=48, categories=("hate", "violence"))


def save_tiny_clip(folder: Path, seed: int = 0, side: int = 16) -> Path:
    """A random `CLIPModel` of 8 numbers an embedding, with its preprocessing, as `save_pretrained` writes it."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(seed)
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(
        vision_config={**layers, "image_size": side, "patch_size": 8, "projection_dim": 8},
        text_config={**layers, "vocab_size": 16, "max_position_embeddings": 8, "projection_dim": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    """Writes tiny CLIPs."""
    return save_tiny_clip


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny CLIP for 16 x 16 images."""
    return save_tiny_clip(tmp_path_factory.mktemp("clips") / "tiny")


@pytest.fixture(scope="session")
def tiny_cost_model(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained cost model on the tiny CLIP."""
    import torch

    from lit_safety.cost_model import CostScorer, save_cost_model
    from lit_safety.cost_model.network import ClipTower, CostAdapter

    torch.manual_seed(0)
    tower = ClipTower(str(tiny_clip))
    adapter = CostAdapter(tower.width, 4)
    torch.nn.init.normal_(adapter.head.weight)
    return save_cost_model(tmp_path_factory.mktemp("cost-models") / "tiny", CostScorer(tower, adapter, 0.5), {}, {},
                           {"images": 8, "harmful": 4, "not_calibrated": None})  # fmt: skip
