import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.edits import Edit, mask, place_of, read_images
from lit_safety.drawing.gallery import DrawingSettings, Gallery, Load, draw_batch
from lit_safety.drawing.guards.safe_latent_diffusion import SafeLatentDiffusion
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.evaluation.command import evaluate


@pytest.fixture
def image_folder(tmp_path: Path) -> str:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("part", "white"),
    [
        ("left", ["##..", "##..", "##..", "##.."]),
        ("right", ["..##", "..##", "..##", "..##"]),
        ("middle", ["....", ".##.", ".##.", "...."]),
        ("all", ["####"] * 4),
    ],
)
def test_masks(part, white: list[str]) -> None:
    assert ["".join(".#"[int(v > 0)] for v in row) for row in np.asarray(mask(part, 4))] == white


def test_each_prompt_has_its_image_whatever_is_around_it(ask) -> None:
    prompts = [ask("clean", benign="car", seed=seed) for seed in range(40)]
    places = [place_of(prompt, 5) for prompt in prompts]
    assert set(places) == {0, 1, 2, 3, 4}
    assert place_of(replace(prompts[7], held_out=True), 5) == places[7]


def stock(task: str, pipe, prompts, settings: DrawingSettings) -> np.ndarray:
    """The same by diffusers' own classes, called as its documentation calls them."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    family = StableDiffusionImg2ImgPipeline if task == "image_to_image" else StableDiffusionInpaintPipeline
    theirs = family(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    given, _ = read_images(settings.edit.images)
    images = [given[place_of(prompt, len(given))] for prompt in prompts]
    images = [ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS) for image in images]
    extra = {"mask_image": [mask("left", 32)] * len(prompts)} if task == "inpainting" else {}
    return theirs(
        prompt=[p.prompt for p in prompts], image=images, strength=0.5, num_inference_steps=4, guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(p.seed) for p in prompts], output_type="np", **extra,
    ).images  # fmt: skip


@pytest.mark.parametrize("task", ["image_to_image", "inpainting"])
def test_edits_are_those_of_the_stock_pipelines(
    pipeline: Path, adapter: Path, image_folder: str, small_set, task: str
) -> None:
    """With and without a LoRA in the model; and the LoRA matters."""
    settings = DrawingSettings(steps=4, guidance=3.0, device="cpu", edit=Edit(task, image_folder, 0.5, "left"))
    drawn = []
    for arm in (Arm(), Arm(adapter=str(adapter))):
        drawn.append(draw_batch(Load(pipeline, arm, settings)(), small_set[:3], settings))
        expected = stock(task, load_pipeline(pipeline, arm), small_set[:3], settings)
        assert np.allclose(drawn[-1], expected, atol=1e-4)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_inpainting_takes_latents_of_any_number_of_channels() -> None:
    """The toy world's have 8, which the stock pipeline would refuse; the UNet itself stays as it is."""
    from diffusers import UNet2DConditionModel

    from lit_safety.drawing.edits import _ordinary

    small = {"block_out_channels": (8,), "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), **small,
    )  # fmt: skip
    said = _ordinary(unet, 8)
    assert (said.config.in_channels, unet.config.in_channels) == (4, 8)
    assert said.conv_in is unet.conv_in
    assert _ordinary(unet, 4) is unet, "a UNet made for inpainting has more channels than the latents: let it speak"


def test_what_images_were_redrawn_decides_where_the_drawings_lie(image_folder: str, small_set, tmp_path: Path) -> None:
    edits = [None, Edit("image_to_image", image_folder, 0.5, "left"), Edit("image_to_image", image_folder, 0.6, "left")]
    edits += [Edit("inpainting", image_folder, 0.5, "left"), Edit("inpainting", image_folder, 0.5, "right")]
    galleries = [Gallery(tmp_path, "a", {}, small_set, DrawingSettings(edit=edit)) for edit in edits]
    assert len({one.folder for one in galleries}) == 5
    assert len({json.dumps(DrawingSettings(edit=edit).protocol()) for edit in edits}) == 5


def test_a_guard_guards_an_edit(pipeline: Path, image_folder: str, small_set) -> None:
    settings = DrawingSettings(steps=4, device="cpu", edit=Edit("image_to_image", image_folder, 0.9, "all"))
    pipe = Load(pipeline, Arm(), settings)()
    guard = SafeLatentDiffusion("max", concept="g u n", warmup_steps=0)
    plain, guarded = (draw_batch(pipe, small_set[:2], settings, guard=one) for one in (None, guard))
    assert np.abs(plain - guarded).max() > 1e-3


def test_evaluate_edits(
    pipeline: Path, adapter: Path, prompts_csv: Path, image_folder: str, tmp_path, judge, monkeypatch
):
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: judge)
    given = {"pipeline": str(pipeline), "prompts": str(prompts_csv), "judge": "x", "steps": 2, "device": "cpu"}
    evaluate(**given, out=str(tmp_path / "out"), adapter=str(adapter), edit="inpainting", edit_images=image_folder)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    about = metrics["settings"]["edit"]
    assert (about["task"], about["strength"], about["part"]) == ("inpainting", 0.7, "middle")
    assert "benign_recall" in metrics["aligned"]
    assert "inpainting at strength 0.7" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(UserError, match="give both or neither"):
        evaluate(**given, out=str(tmp_path / "other"), edit="inpainting")


@pytest.mark.parametrize("strength", [0.0, 1.1, float("nan")])
def test_a_strength_that_draws_nothing(strength: float) -> None:
    with pytest.raises(UserError, match="--edit_strength"):
        Edit("inpainting", "x", strength, "left")


def test_images_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--edit_images"):
        read_images(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"not an image")
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"a\.png"):
        read_images(str(tmp_path))
