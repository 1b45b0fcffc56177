"""Anchor prompts: what they cost nothing of at the start, hold later, and that chance decides alike everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_safety.core.chance import integers, normal, uniform
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import read_prompts
from lit_safety.modules import SCDPO, PromptAnchors
from lit_safety.modules.anchors import NOISE, SHIPPED, TIMESTEP, WHICH
from tests.helpers.batches import batch_of
from tests.helpers.documents import CONFIGS, ROOT, TOYWORLD
from tests.helpers.small_fits import small_fit

PROMPTS = ["a red cat", "a blue house in the park", "a gun shop sign", "two trees"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "harmless.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return file


def ready(pipeline: Path, anchors: PromptAnchors, moved: float = 0.0) -> SCDPO:
    """A module whose anchors have latents of their own numbers, and an adapter that was moved by so much."""
    module = SCDPO(str(pipeline), anchors=anchors)
    module.configure_model()
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in module.trainable_parameters():
                parameter += moved * torch.randn(parameter.shape, generator=generator)
    anchors._latents = torch.randn(len(PROMPTS), *latent_shape(module), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        anchors._texts = dict(module.encode_text(PROMPTS))
    return module.train()


def latent_shape(module: SCDPO) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(module.posterior(batch_of([0])).shape[2:])


def test_at_the_start_the_term_is_exactly_0(tiny_pipeline: Path, file: Path) -> None:
    anchors = PromptAnchors(str(file))
    assert float(anchors.loss(ready(tiny_pipeline, anchors), batch_of([0, 1, 2]))) == 0.0


def test_the_term_by_hand(tiny_pipeline: Path, file: Path) -> None:
    """weight / B x sum over pairs of mean |policy - reference|^2 on x_t = add_noise(x_0, noise, t); x_0, t and noise by
    the pair's seed."""
    anchors = PromptAnchors(str(file), weight=3.0)
    module = ready(tiny_pipeline, anchors, moved=0.05)
    batch = batch_of([0, 1, 2, 3])
    errors = []
    for seed in batch.seeds:
        row = int(integers([seed], WHICH, len(PROMPTS)))
        assert anchors._latents is not None
        latents = anchors._latents[row : row + 1]
        timestep = module.backbone.timesteps(torch.tensor([uniform(seed, TIMESTEP)], dtype=torch.float64))
        noisy = module.backbone.add_noise(latents, normal([seed], NOISE, latents.shape[1:]), timestep)
        text = {name: rows[row : row + 1] for name, rows in anchors._texts.items()}
        with torch.no_grad():
            policy = module.backbone.predict(noisy, timestep, text)
            with module.reference():
                errors.append((policy - module.backbone.predict(noisy, timestep, text)).square().mean())
    expected = 3.0 * torch.stack(errors).mean()
    assert expected > 0
    torch.testing.assert_close(anchors.loss(module, batch).detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("settings", [{}, {"share": 0.5}, {"text_noise": 0.7}])
def test_a_batch_is_the_mean_of_its_halves(tiny_pipeline: Path, file: Path, settings: dict[str, float]) -> None:
    anchors = PromptAnchors(str(file), **settings)
    module = ready(tiny_pipeline, anchors, moved=0.05)
    if anchors.text_noise:
        anchors._spread = {name: rows.float().std(0) for name, rows in anchors._texts.items()}
    whole = anchors.loss(module, batch_of([0, 1, 2, 3, 4, 5, 6, 7]))
    halves = [anchors.loss(module, batch_of(rows)) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    assert float(whole) > 0
    torch.testing.assert_close(whole, torch.stack(halves).mean(), rtol=1e-4, atol=0)


def test_the_reference_gets_no_gradient_and_the_policy_does(tiny_pipeline: Path, file: Path) -> None:
    anchors = PromptAnchors(str(file))
    module = ready(tiny_pipeline, anchors, moved=0.05)
    anchors.loss(module, batch_of([0, 1])).backward()
    gradients = [parameter.grad for _, parameter in module.trainable_parameters()]
    assert any(isinstance(one, Tensor) and bool(one.abs().sum() > 0) for one in gradients)
    assert all(p.grad is None for p in module.backbone.denoiser.parameters() if not p.requires_grad)


def test_only_harmless_rows_of_a_table_are_anchors(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(
        "prompt,kind,category\na cat,clean,\na gun,explicit,violence\na rose,lookalike,\na cat,clean,\n",
        encoding="utf-8",
    )
    assert PromptAnchors(str(file)).read_prompts() == ["a cat", "a rose"]
    file.write_text("prompt,kind,category\na gun,explicit,violence\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"anchors.init_args.prompts.*prompts\.csv"):
        PromptAnchors(str(file)).read_prompts()


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"share": 0.0}, {"share": 1.5}, {"text_noise": -1.0}])
def test_numbers_outside_their_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PromptAnchors("harmless.txt", **settings)


def test_a_fit_draws_its_anchors_once_and_ends_in_the_same_bits_when_they_are_kept(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_safety.__main__ import main

    assert CONFIGS.is_dir()
    monkeypatch.setenv("LIT_SAFETY_CACHE", str(tmp_path / "cache"))
    shards = ROOT / "data" / "toyworld" / "shards" / "val"
    settings = {
        "trainer.max_steps": 2, "trainer.val_check_interval": 2, "trainer.limit_val_batches": 1,
        "model.init_args.drawing.steps": 1, "model.init_args.anchors.class_path": "lit_safety.modules.PromptAnchors",
        "model.init_args.anchors.init_args.prompts": file,
    }  # fmt: skip
    weights = []
    for run in ("first", "second"):
        assert main(small_fit("fit", ["scdpo.yaml"], tmp_path / run, shards, settings)) == 0
        weights.append(load_file(tmp_path / run / "scdpo/latest/adapter/pytorch_lora_weights.safetensors"))
        kept = list((tmp_path / "cache" / "anchors").glob("*.safetensors"))
        assert len(kept) == 1
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_shipped_list_is_found_by_name_and_has_no_prompt_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = PromptAnchors("anchors/harmless.txt").read_prompts()
    assert len(prompts) >= 200
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)


def test_a_world_s_prompts_are_replaced_for_another_model(
    tiny_pipeline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny pipeline's tokenizer is not the toy world's; of the toy world's own model they are used."""
    anchors = PromptAnchors(str(TOYWORLD / "prompts" / "anchors.csv"))
    own = anchors.read_prompts()
    assert anchors.read_prompts(str(TOYWORLD / "pipeline")) == own
    with caplog.at_level("INFO"):
        assert anchors.read_prompts(str(tiny_pipeline)) == PromptAnchors(SHIPPED).read_prompts() != own
    assert "anchors.csv" in caplog.text


def test_without_a_checkout_a_world_s_prompts_are_replaced_too(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    anchors = PromptAnchors("data/toyworld/prompts/anchors.csv")
    assert anchors.read_prompts(str(tiny_pipeline)) == PromptAnchors(SHIPPED).read_prompts()


@pytest.mark.parametrize("world", [path.parent.name for path in sorted(TOYWORLD.parent.glob("*/prompts"))])
def test_a_world_s_anchors_name_nothing_that_a_report_calls_unnamed(world: str) -> None:
    folder = TOYWORLD.parent / world / "prompts"
    rows = {part: read_prompts(folder / f"{part}.csv") for part in ("anchors", "val", "test")}
    unnamed = {name for part in ("val", "test") for row in rows[part] for name in row.unnamed}
    assert unnamed
    assert all(not row.harmful and not unnamed & set(row.benign) for row in rows["anchors"])
