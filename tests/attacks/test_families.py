"""Attacks that compute, on a tiny pipeline of every family: they do what they say, or refuse it by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.attacks import NoiseInversion, Recipe, Reweighted, StartImage, StrongestFineTune, Target, Weighting
from lit_safety.attacks.network import open_network
from lit_safety.attacks.noise_inversion import NO_TEXT, Steps
from lit_safety.backbones.call import call_options
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, draw_batch
from lit_safety.drawing.prompts import Prompt
from tests.conftest import save_tiny_pipeline
from tests.helpers.flow_pipelines import FAMILIES, save_flow
from tests.helpers.tiny_pipelines import save_sd3, save_sdxl

DRAWING = DrawingSettings(steps=3, guidance=3.0, batch_size=2, device="cpu", resolution=32)
PROMPTS = [Prompt(text, "explicit", "violence", "", (), False, seed) for seed, text in enumerate(("a gun", "red gun"))]
SAVED = {
    "sd": save_tiny_pipeline, "sdxl": save_sdxl, "sd3": save_sd3,
    **{name: lambda folder, name=name: save_flow(name, folder) for name in FAMILIES},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SAVED))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVED[request.param](tmp_path_factory.mktemp("families") / request.param)


def target(folder: Path, tmp_path: Path, **changes) -> Target:
    given = {"drawing": DRAWING, "seed": 0, "work": tmp_path / "work"} | changes
    return Target("arm", Arm(), folder, folder, PROMPTS, PROMPTS, **given)


def drawn(stage) -> np.ndarray:
    return draw_batch(stage.pipe, stage.prompts, stage.drawing)


def test_noise_is_found_again_from_what_was_drawn_from_it(folder: Path, category_shards: Path, tmp_path: Path):
    """Latents that the stock pipeline drew without text, run backwards, are its noise; it draws them again."""
    network = open_network(folder, Arm(), "cpu", 32)
    backbone = network.backbone
    steps = Steps.of(network, 3)
    told = float(getattr(backbone.settings, "guidance", 1.0))
    posterior = torch.zeros(1, 2, *backbone.posterior(torch.zeros(1, 3, 32, 32)).shape[2:])
    noise = torch.randn(2, *posterior.shape[2:], generator=torch.Generator().manual_seed(0))

    def drawn(latents: torch.Tensor) -> torch.Tensor:
        given = {"latents": backbone.given_latents(latents), "height": 32, "width": 32}
        with torch.no_grad():
            found = latents
            text = backbone.encode_text([NO_TEXT] * 2)
            for timestep, (a, b) in zip(steps.timesteps, steps.coefficients, strict=True):
                found = a * found + b * backbone.predict(found, timestep.expand(2), text)
        pixels = network.pipe(
            prompt=[NO_TEXT] * 2, num_inference_steps=3, output_type="latent" if decodes else "np", **given,
            **call_options(network.pipe, told, None, 2),
        ).images  # fmt: skip
        if decodes:
            assert torch.allclose(backbone.drawn_latents(pixels), found, atol=1e-3)
        return found

    decodes = folder.name != "klein"  # whose `latent` has lost its statistics
    images = drawn(noise)
    with torch.no_grad():
        again = steps.inverted(images, 30)
    assert float((again - noise).pow(2).mean()) < 1e-4
    assert torch.allclose(drawn(again), images, atol=0.05)


def test_stages_of_an_inversion_hold_no_text(folder: Path, category_shards: Path, tmp_path: Path):
    stages = list(NoiseInversion(str(category_shards), passes=[1, 2]).stages(target(folder, tmp_path)))
    assert [stage.budget for stage in stages] == [1, 2]
    assert {p.prompt.strip() for stage in stages for p in stage.prompts} == {""}
    assert all(np.isfinite(drawn(stage)).all() for stage in stages)


def test_a_start_image_is_drawn_from_or_refused_by_name(folder: Path, category_shards: Path, tmp_path: Path):
    attacked = target(folder, tmp_path)
    attack = StartImage(str(category_shards), steps=[2], strength=0.7)
    reason = attack.refuses(attacked)
    if folder.name in ("klein", "flux_2", "sana"):
        assert reason is not None
        assert "Pipeline" in reason
        return
    assert reason is None
    stages = [(stage.budget, stage.drawing.edit.inputs(None, stage.prompts, None)["image"], drawn(stage))
              for stage in attack.stages(attacked)]  # fmt: skip
    assert [budget for budget, _, _ in stages] == [0, 2]
    assert not np.array_equal(np.asarray(stages[0][1][0]), np.asarray(stages[1][1][0]))
    assert all(pixels.shape == (2, 32, 32, 3) and np.isfinite(pixels).all() for *_, pixels in stages)


def test_weighing_changes_what_is_drawn_and_ends_with_its_stage(folder: Path, tmp_path: Path):
    attacked = target(folder, tmp_path, drawing=replace(DRAWING, steps=2, precision="float32"))
    plain = draw_batch(attacked.network().pipe, PROMPTS, attacked.drawing)
    ways = [Weighting(tokens=4.0), Weighting(layers=0.0, layer=0), Weighting(tokens=1.0000001)]
    attack = Reweighted(ways)
    assert attack.refuses(attacked) is None
    found = [drawn(stage) for stage in attack.stages(attacked)]
    if folder.name != "flux":  # CLIP gives FLUX no tokens, and T5's random text hardly counts
        assert np.abs(found[0] - plain).max() > 0
    assert np.abs(found[1] - plain).max() > 0
    assert np.abs(found[2] - plain).max() < 1e-3  # the first two are gone
    assert "no layer 99" in str(Reweighted([Weighting(layers=2.0, layer=99)]).refuses(attacked))


def test_all_weights_are_trained_or_a_lora(folder: Path, category_shards: Path, tmp_path: Path):
    """Two recipes at one budget, each from the arm as it was."""
    attacked = target(folder, tmp_path, drawing=replace(DRAWING, steps=2))
    recipes = [Recipe("full", 1e-2, "SGD"), Recipe("lora", 1e-2, "AdamW", 2)]
    attack = StrongestFineTune(str(category_shards), recipes, steps=[2], pictures=2, batch_size=2)
    stages = [(stage.budget, stage.label, drawn(stage)) for stage in attack.stages(attacked)]
    assert [(budget, label) for budget, label, _ in stages] == [(2, recipe.label()) for recipe in recipes]
    plain = draw_batch(attacked.network().pipe, PROMPTS, attacked.drawing)
    assert all(np.abs(pixels - plain).max() > 0 for *_, pixels in stages)
