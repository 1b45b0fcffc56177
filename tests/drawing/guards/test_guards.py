import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.drawing.gallery import DrawingSettings, Gallery, draw_batch
from lit_safety.drawing.guards.safe_latent_diffusion import STRENGTHS, SafeLatentDiffusion
from lit_safety.drawing.guards.safree import (
    SAFREE,
    SafeText,
    leave_one_out,
    project,
    projector,
    safe_texts,
    text_parts,
    triggered,
)
from lit_safety.drawing.pipelines import load_pipeline
from lit_safety.drawing.prompts import Prompt

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
    """Onto the span of (1, 1, 0): [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]; the same from two parallel rows."""
    expected = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert torch.allclose(projector(torch.tensor([[2.0, 2.0, 0]])), expected)
    assert torch.allclose(projector(torch.tensor([[1.0, 1, 0], [3, 3, 0]])), expected, atol=1e-6)


def test_triggers() -> None:
    """d = 1, 1, 1.3: the others' means are 1.15, 1.15, 1; only 1.3 >= 1.01 x 1. At alpha 0.31 none."""
    distances = torch.tensor([1.0, 1.0, 1.3])
    assert triggered(distances, 0.01) == [2]
    assert triggered(distances, 0.31) == []


def test_the_two_orders_of_the_projection() -> None:
    """In the plane: concepts along (1, 0), so I - P_C = diag(0, 1); the prompt along u = (0.6, 0.8), so
    P_I = u u^T = [[0.36, 0.48], [0.48, 0.64]].

    p = (1, 2) in the code's order: P_I p = (1.32, 1.76), then (0, 1.76): nothing along the concept is left.
    In the paper's: (I - P_C) p = (0, 2), then P_I: (0.96, 1.28), of which 0.96 / 1.6 = 60% lies along the concept.
    """
    space, prompt = projector(torch.tensor([[3.0, 0]])), projector(torch.tensor([[0.6, 0.8]]))
    token = torch.tensor([[1.0, 2.0]])
    assert torch.allclose(project(token, prompt, space, "code"), torch.tensor([[0.0, 1.76]]), atol=1e-6)
    assert torch.allclose(project(token, prompt, space, "paper"), torch.tensor([[0.96, 1.28]]), atol=1e-6)


def test_a_token_is_left_out_by_id_0_or_by_the_mask() -> None:
    """Start 7, tokens 3 and 5, end 9, padding 9: the published code writes 0 in their place, the paper masks them."""
    ids, mask = torch.tensor([7, 3, 5, 9, 9]), torch.tensor([1, 1, 1, 1, 0])
    found, masks = leave_one_out(ids, mask, 1, 2, "code")
    assert found.tolist() == [[7, 0, 5, 9, 9], [7, 3, 0, 9, 9]]
    assert masks.tolist() == [mask.tolist()] * 2
    found, masks = leave_one_out(ids, mask, 1, 2, "paper")
    assert found.tolist() == [ids.tolist()] * 2
    assert masks.tolist() == [[1, 0, 1, 1, 0], [1, 1, 0, 1, 0]]


def test_the_steps_of_the_projected_prompt() -> None:
    """Paper: gamma sigmoid(b) = 10 / (1 + e^-0.4) = 5.987. Published code: it goes on to the step numbered
    round(10 sigmoid(5 (10 b - 5.333))), counted from 0. b = 0.4: sigmoid(-6.665) = 0.0013, step 0, one step;
    b = 0.54: sigmoid(0.335) = 0.583, step 6, seven; b = 1: eleven. None without a trigger, all without self-validation.
    """
    text = SafeText(torch.zeros(1, 1), (1,), 0.4)
    assert SAFREE(follow="paper").steps(text) == pytest.approx(5.9869, abs=1e-4)
    assert [SAFREE().steps(SafeText(text.safe, (1,), b)) for b in (0.4, 0.54, 1.0)] == [1, 7, 11]
    for follow in ("code", "paper"):
        assert SAFREE(follow=follow).steps(SafeText(text.safe, (), 0.4)) == 0
        assert SAFREE(self_validation=False, follow=follow).steps(text) == math.inf


@pytest.mark.parametrize("follow", ["code", "paper"])
def test_only_trigger_tokens_change(pipe, follow: str) -> None:
    (part,) = text_parts(pipe)
    (text,) = safe_texts(part, ["a k n b"], ["k", "k n"], 0.01, follow)
    ids, _ = part.tokens(["a k n b"])
    with torch.no_grad():
        plain = pipe.text_encoder(ids).last_hidden_state[0]
    changed = (text.safe - plain).abs().amax(1) > 1e-5
    assert set(changed.nonzero().flatten().tolist()) == set(text.triggers)
    assert text.triggers
    assert 0 < text.change <= 2


def test_the_codes_order_leaves_nothing_of_the_concepts(pipe) -> None:
    """What the denoiser sees of an unsafe token has no component along the concepts' pooled texts."""
    concepts = ["k", "k n"]
    (part,) = text_parts(pipe)
    with torch.no_grad():
        space = projector(part.pooled(*part.tokens(concepts)))
    for follow, most in (("code", 1e-4), ("paper", None)):
        (text,) = safe_texts(part, ["a k n b"], concepts, 0.01, follow)
        unsafe = text.safe[list(text.triggers)]
        share = (unsafe @ space).norm(dim=1) / unsafe.norm(dim=1)
        assert (share < most).all() if most else (share > 1e-3).all()


@pytest.mark.parametrize("follow", ["code", "paper"])
def test_a_prompt_of_one_token_is_projected_and_the_empty_one_is_not(pipe, follow: str) -> None:
    (part,) = text_parts(pipe)
    one, empty = safe_texts(part, ["a", ""], ["k"], 0.01, follow)
    assert one.triggers == (1,)
    assert one.change > 0
    assert empty.triggers == ()


def test_reattention_damps_what_is_raised_and_low() -> None:
    """The mean (frequency 0) of the drawn third is above the other's: x 0.5. Its checkerboard (the highest frequency)
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


def test_both_switches_of_safree_change_the_image(pipe, prompts) -> None:
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
        lambda: SAFREE(projection=False), lambda: SAFREE(follow="codes"), lambda: SafeLatentDiffusion().check(object()),
    ],
)  # fmt: skip
def test_bad_settings(make) -> None:
    with pytest.raises(UserError):
        make()


def loaded(folder: Path):
    return load_pipeline(folder, Arm(), "cpu")


def ask_for(*prompts: str) -> list[Prompt]:
    return [Prompt(prompt, "clean", "", "", (), False, seed=seed) for seed, prompt in enumerate(prompts)]


def test_sdxl_changes_the_second_encoders_numbers_alone(tiny_sdxl: Path, monkeypatch) -> None:
    """As in the published code: the tokens of the second encoder, 16 of 48 numbers here, in the space of its pooled
    texts. The first encoder's numbers, start, end and padding, and the pooled text stay."""
    pipe = loaded(tiny_sdxl)
    (part,) = text_parts(pipe)
    assert (part.columns, part.encoder) == (slice(32, 48), pipe.text_encoder_2)
    seen = []
    forward = type(pipe.unet).forward

    def spy(unet, *given, **keywords):
        seen.append((keywords["encoder_hidden_states"], keywords["added_cond_kwargs"]["text_embeds"]))
        return forward(unet, *given, **keywords)

    monkeypatch.setattr(type(pipe.unet), "forward", spy)
    prompts = ask_for("a gun and a cat")
    draw_batch(pipe, prompts, SETTINGS)
    (plain, pooled), seen[:] = seen[0], []
    guard = SAFREE(["gun", "red gun"], self_validation=False)
    draw_batch(pipe, prompts, SETTINGS, guard=guard)
    (safe, same) = seen[0]
    assert torch.equal(pooled, same)
    places = safe_texts(part, [prompts[0].prompt], guard.concepts, guard.alpha)[0].triggers
    changed = ((safe - plain).abs() > 1e-5).nonzero()
    assert set(changed[:, 0].tolist()) == {1}
    assert set(changed[:, 1].tolist()) == set(places)
    assert min(changed[:, 2].tolist()) >= 32
    with torch.no_grad():
        space = projector(pipe.text_encoder_2(part.tokens(guard.concepts)[0]).text_embeds)
    assert (safe[1, list(places), 32:] @ space).abs().max() < 1e-4


def test_sd3_changes_each_encoders_part(tiny_sd3: Path) -> None:
    """CLIPs of 32 and 16 numbers next to each other, T5's 64 in the rows below them."""
    pipe = loaded(tiny_sd3)
    parts = text_parts(pipe)
    first = pipe.tokenizer.model_max_length
    assert [(part.rows, part.columns) for part in parts] == [
        (slice(0, first), slice(0, 32)),
        (slice(0, first), slice(32, 48)),
        (slice(first, first + 256), slice(0, 64)),
    ]
    prompts = ["a gun and a cat"]
    encoded = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)[0]
    for part in parts:
        (text,) = safe_texts(part, prompts, ["gun"], 0.01)
        taken = encoded[0, part.rows, part.columns]
        assert torch.allclose(part.hidden(part.tokens(prompts)[0])[0], taken, atol=1e-5)
        changed = ((text.safe - taken).abs().amax(1) > 1e-5).nonzero().flatten().tolist()
        assert changed == list(text.triggers)
        assert text.triggers


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3"])
@pytest.mark.parametrize("follow", ["code", "paper"])
def test_every_family_draws_under_safree(family: str, follow: str, request) -> None:
    """Another image with the guard, the same image as before without it, and a batch as its rows alone."""
    pipe = loaded(request.getfixturevalue(family))
    prompts = ask_for("a gun and a cat", "gun")
    plain = draw_batch(pipe, prompts, SETTINGS)
    guard = SAFREE(["gun", "red gun"], self_validation=False, follow=follow)
    guard.check(pipe)
    safe = draw_batch(pipe, prompts, SETTINGS, guard=guard)
    for row in range(2):
        assert np.abs(safe[row] - plain[row]).max() > 1e-4
        np.testing.assert_allclose(draw_batch(pipe, [prompts[row]], SETTINGS, guard=guard)[0], safe[row], atol=1e-4)
    assert (draw_batch(pipe, prompts, SETTINGS) == plain).all()


@pytest.mark.parametrize(
    "guard", [SAFREE(["gun"], reattention=True, self_validation=False), SafeLatentDiffusion("max", concept="gun")]
)
def test_guards_with_a_third_row_draw_with_sdxl(tiny_sdxl: Path, guard) -> None:
    pipe = loaded(tiny_sdxl)
    prompts = ask_for("a gun and a cat", "blue house")
    plain, found = (draw_batch(pipe, prompts, SETTINGS, guard=one) for one in (None, guard))
    assert np.isfinite(found).all()
    assert np.abs(found - plain).max() > 1e-4


def test_safree_says_which_pipelines_it_works_on(pipe, tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match="reattention: false"):
        SAFREE(reattention=True).check(loaded(tiny_sd3))

    class OfAnotherFamily:
        unet, text_encoder, tokenizer = pipe.unet, object(), pipe.tokenizer

    class Flux:
        transformer, text_encoder, text_encoder_2 = pipe.unet, pipe.text_encoder, object()
        tokenizer = pipe.tokenizer

    for other in (OfAnotherFamily(), Flux(), object()):
        with pytest.raises(UserError, match=type(other).__name__):
            SAFREE().check(other)
