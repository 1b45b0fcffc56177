import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, Gallery, draw_batch
from lit_safety.drawing.guards.safe_latent_diffusion import STRENGTHS, SafeLatentDiffusion
from lit_safety.drawing.guards.safree import SAFREE, SafeText, projector, safe_texts, triggered
from lit_safety.drawing.pipelines import load_pipeline

SETTINGS = DrawingSettings(steps=4, guidance=3.0, batch_size=2)


@pytest.fixture(scope="module")
def pipe(pipeline: Path):
    return load_pipeline(pipeline, Arm(), "cpu")


@pytest.fixture
def prompts(ask):
    return [ask("explicit", "violence", "knife", "car", seed=1), ask("clean", benign="tree", seed=2)]


@pytest.mark.parametrize("strength", ["medium", "strong", "max"])
def test_sld_draws_what_diffusers_own_pipeline_draws(pipe, prompts, strength: str) -> None:
    """Pixel by pixel against the pipeline that diffusers has deprecated, with the paper's settings."""
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    names = ("sld_warmup_steps", "sld_guidance_scale", "sld_threshold", "sld_momentum_scale", "sld_mom_beta")
    given = dict(zip(names, STRENGTHS[strength], strict=True)) | {"sld_warmup_steps": 1}
    theirs = StableDiffusionPipelineSafe(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    theirs._safety_text_concept = "gun"
    expected = theirs(
        [p.prompt for p in prompts], num_inference_steps=4, guidance_scale=3.0, output_type="np",
        generator=[torch.Generator().manual_seed(p.seed) for p in prompts], **given,
    ).images  # fmt: skip
    guard = SafeLatentDiffusion(strength, concept="gun", warmup_steps=1)
    assert np.allclose(draw_batch(pipe, prompts, SETTINGS, guard=guard), expected, atol=1e-4)
    assert np.abs(draw_batch(pipe, prompts, SETTINGS) - expected).max() > 1e-3


def test_a_guard_leaves_the_pipeline_as_it_was(pipe, prompts) -> None:
    plain = draw_batch(pipe, prompts, SETTINGS)
    unet = pipe.unet
    for guard in (SafeLatentDiffusion("max"), SAFREE(["k n i f e"], reattention=True)):
        draw_batch(pipe, prompts, SETTINGS, guard=guard)
        assert pipe.unet is unet
        assert "forward" not in vars(unet)
        assert all(not block._forward_pre_hooks for block in unet.up_blocks)
    assert (draw_batch(pipe, prompts, SETTINGS) == plain).all()


def test_guards_need_guidance(pipe, prompts) -> None:
    with pytest.raises(UserError, match="--guidance above 1"):
        draw_batch(pipe, prompts, DrawingSettings(steps=1, guidance=1.0), guard=SafeLatentDiffusion())


@pytest.mark.parametrize(
    "guard", [SafeLatentDiffusion("max", concept="gun"), SAFREE(["k n i f e"], reattention=True)], ids=["sld", "safree"]
)
def test_batches_at_the_same_time_do_not_meet(pipe, prompts, tmp_path: Path, guard) -> None:
    """Three workers share the UNet, not the guard's momentum, steps or hooks."""

    def draw(workers: int) -> list[bytes]:
        settings = DrawingSettings(steps=4, guidance=3.0, batch_size=1, workers=workers)
        gallery = Gallery(tmp_path / str(workers), "x", {}, prompts * 3, settings)
        gallery.draw(pipe, None, lambda _: None, guard)
        from PIL import Image

        return [Image.open(one.path).tobytes() for one in gallery.all()]

    assert draw(1) == draw(3)


def test_projector() -> None:
    """Onto the span of (1, 1, 0): [[.5, .5, 0], [.5, .5, 0], [0, 0, 0]]; the same from two parallel rows."""
    expected = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert torch.allclose(projector(torch.tensor([[2.0, 2.0, 0]])), expected)
    assert torch.allclose(projector(torch.tensor([[1.0, 1, 0], [3, 3, 0]])), expected, atol=1e-6)


def test_triggers() -> None:
    """d = 1, 1, 1.3: the others' means are 1.15, 1.15, 1; only 1.3 >= 1.01 x 1. At alpha .31 none."""
    distances = torch.tensor([1.0, 1.0, 1.3])
    assert triggered(distances, 0.01) == [2]
    assert triggered(distances, 0.31) == []


def test_the_steps_of_the_projected_prompt() -> None:
    """gamma sigmoid(b): 10 / (1 + e^-0.4) = 5.987; none without a trigger, all without self-validation."""
    text = SafeText(torch.zeros(1, 1), (1,), 0.4)
    assert SAFREE().steps(text) == pytest.approx(5.9869, abs=1e-4)
    assert SAFREE().steps(SafeText(text.safe, (), 0.4)) == 0
    assert SAFREE(self_validation=False).steps(text) == math.inf


def test_only_trigger_tokens_change_and_leave_the_concepts(pipe) -> None:
    concepts = ["k", "k n"]
    (text,) = safe_texts(pipe.tokenizer, pipe.text_encoder, ["a k n b"], concepts, 0.01)
    tokens = pipe.tokenizer(["a k n b"], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        plain = pipe.text_encoder(tokens["input_ids"]).last_hidden_state[0]
    changed = (text.safe - plain).abs().amax(1) > 1e-5
    assert set(changed.nonzero().flatten().tolist()) == set(text.triggers)
    assert text.triggers
    assert 0 < text.change <= 2


def test_a_prompt_of_one_token_is_left_alone(pipe) -> None:
    (text,) = safe_texts(pipe.tokenizer, pipe.text_encoder, ["a"], ["k"], 0.01)
    assert (text.triggers, text.change) == ((), 0.0)


def test_reattention_damps_what_is_raised_and_low() -> None:
    """The mean (frequency 0) of the drawn third is above the other's: x .5. Its checkerboard (the highest frequency)
    stays; a mean below the other's stays too; the other thirds are never touched."""
    board = torch.tensor([[1.0, -1.0] * 4, [-1.0, 1.0] * 4] * 4)
    drawn = torch.stack([4 + board, torch.ones(8, 8)])[None]
    other = torch.stack([torch.ones(8, 8), torch.full((8, 8), 3.0)])[None]
    guard = SAFREE(reattention=True, reattention_scale=0.5)
    found = guard.reattend(torch.cat([drawn, drawn, other]), torch.tensor([True]))
    assert torch.allclose(found[1], torch.stack([2 + board, torch.ones(8, 8)]), atol=1e-5)
    assert torch.equal(found[::2], torch.cat([drawn, other]))


def test_reattention_leaves_prompts_alone_that_are_not_projected() -> None:
    """The second row's prompt has no unsafe token: its two features differ in the last digit, by their place in the
    batch, and must not be damped for that."""
    drawn = torch.full((2, 1, 8, 8), 4.0)
    other = torch.stack([torch.ones(1, 8, 8), torch.full((1, 8, 8), 4.0 - 1e-6)])
    found = SAFREE(reattention=True).reattend(torch.cat([drawn, drawn, other]), torch.tensor([True, False]))
    assert torch.allclose(found[2], torch.full((1, 8, 8), 0.9 * 4), atol=1e-5)
    assert torch.equal(found[3], drawn[1])


def test_both_switches_of_safree_change_the_picture(pipe, prompts) -> None:
    def draw(**switches: bool) -> np.ndarray:
        guard = SAFREE(["k n i f e"], self_validation=False, reattention_scale=0.0, **switches)
        return draw_batch(pipe, prompts, SETTINGS, guard=guard)

    plain = draw_batch(pipe, prompts, SETTINGS)
    drawings = [plain, draw(), draw(reattention=True), draw(projection=False, reattention=True)]
    for i, one in enumerate(drawings):
        for other in drawings[:i]:
            assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: SafeLatentDiffusion("hyper"), lambda: SAFREE([]), lambda: SAFREE(reattention_scale=1.0),
        lambda: SAFREE(projection=False), lambda: SafeLatentDiffusion().check(object()),
    ],
)  # fmt: skip
def test_bad_settings(make) -> None:
    with pytest.raises(UserError):
        make()


def test_safree_refuses_two_text_encoders(pipe) -> None:
    class Two:
        unet, text_encoder, text_encoder_2 = pipe.unet, pipe.text_encoder, pipe.text_encoder

    with pytest.raises(UserError, match="one text encoder"):
        SAFREE().check(Two())
