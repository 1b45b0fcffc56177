"""Rectified flow: which timesteps are drawn, by default and as diffusers' training scripts draw them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from lit_safety.adapters.lora import LoRA
from lit_safety.backbones import BackboneSettings, FlowSettings, GuidedFlowSettings, load_backbone
from lit_safety.backbones.flow import pack, sampled, unpack
from lit_safety.core.errors import UserError
from lit_safety.modules import SCDPO
from tests.helpers.tiny_pipelines import save_sd3

HALF = torch.tensor([0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose scheduler shifts by the size of the image; its stored sigmas are not shifted then."""
    folder = save_sd3(tmp_path_factory.mktemp("flow") / "dynamic", without=("_3",))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    return folder


@pytest.mark.parametrize("scheme", ["logit_normal", "uniform", "mode"])
def test_samplings_are_those_of_diffusers(scheme: str):
    """20,000 draws of its function: their quantiles are what a share of uniform numbers becomes."""
    named = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": 1.29}
    generator = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling(scheme, 20_000, generator=generator, **named)
    shares = torch.arange(1, 10) / 10
    found = sampled(shares, FlowSettings(sampling=scheme, mean=0.3, std=0.8))
    assert (torch.quantile(drawn, shares) - found).abs().max() < 0.02


def test_cosmap_has_the_density_of_the_paper():
    """Shares of 1001 equal steps: their density is 2 / (pi (1 - 2 u + 2 u^2))."""
    u = sampled(torch.linspace(0, 0.999, 1000, dtype=torch.float64), FlowSettings(sampling="cosmap"))
    middle = (u[1:] + u[:-1]) / 2
    density = 0.001 / (u[1:] - u[:-1])
    torch.testing.assert_close(density, 2 / (torch.pi * (1 - 2 * middle + 2 * middle**2)), rtol=2e-3, atol=0)


def test_the_default_trains_where_the_pipeline_draws(dynamic: Path):
    """The scheduler with the pipeline's mu: its timestep of sigma 0.5 before shifting is that of u = 0.5."""
    backbone = load_backbone(str(dynamic), denoiser=False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(dynamic, subfolder="scheduler")
    for size in ((8, 8), (64, 32)):
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (size[0] // 2 * (size[1] // 2) - 256)
        scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=mu)
        torch.testing.assert_close(backbone.timesteps(HALF, size), scheduler.timesteps[1:])


def test_the_script_of_diffusers_trains_unshifted_where_the_shift_is_dynamic(dynamic: Path, tiny_sd3: Path):
    """It takes scheduler.timesteps[int(1000 u)]; u = 0.5."""
    for folder, expected in ((dynamic, 500.0), (tiny_sd3, 750.0)):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        backbone = load_backbone(str(folder), denoiser=False, settings=FlowSettings(shift="script"))
        found = backbone.timesteps(HALF)
        torch.testing.assert_close(found, torch.tensor([expected]))
        assert abs(float(scheduler.timesteps[500]) - float(found)) < 1


def test_a_shift_may_be_set(tiny_sd3: Path):
    backbone = load_backbone(str(tiny_sd3), denoiser=False, settings=FlowSettings(shift=1.0))
    torch.testing.assert_close(backbone.timesteps(HALF), torch.tensor([500.0]))


@pytest.mark.parametrize("wrong", [{"shift": 0.0}, {"std": -1.0}], ids=str)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FlowSettings(**wrong)


def test_settings_of_another_kind_of_family_are_refused(tiny_pipeline: Path, tiny_sd3: Path):
    with pytest.raises(UserError, match="BackboneSettings"):
        # A UNet has no shift: a value that it would not read is not passed over.
        load_backbone(str(tiny_pipeline), denoiser=False, settings=_Other())
    assert load_backbone(str(tiny_sd3), denoiser=False, settings=BackboneSettings()).settings.shift == "inference"


class _Other(FlowSettings):
    pass


def test_packing_and_its_way_back():
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 0].tolist() == latents[0, :, :2, :2].flatten().tolist()
    assert torch.equal(unpack(tokens, 4, 6), latents)


def test_frozen_weights_in_bfloat16_and_a_lora_in_float32(tiny_sd3: Path):
    """The numbers are those of bf16-mixed, whose frozen weights are cast after they were read."""
    settings = FlowSettings(denoiser_dtype="bfloat16", encoder_dtype="bfloat16")
    module = SCDPO(str(tiny_sd3), lora=LoRA(rank=2), backbone=settings)
    torch.manual_seed(0)
    module.configure_model()
    plain = SCDPO(str(tiny_sd3), lora=LoRA(rank=2))
    torch.manual_seed(0)
    plain.configure_model()
    kinds = {name: p.dtype for name, p in module.backbone.denoiser.named_parameters()}
    assert kinds["transformer_blocks.0.attn.to_q.base_layer.weight"] is torch.bfloat16
    assert {dtype for name, dtype in kinds.items() if ".lora_" in name} == {torch.float32}
    with torch.no_grad():
        text = module.encode_text(["a red cat"])
        assert {one.dtype for one in text.values()} == {torch.float32}
        close, t = plain.encode_text(["a red cat"]), torch.tensor([500.0])
        assert (text["pooled_projections"] - close["pooled_projections"]).abs().max() < 0.1
        noisy = torch.randn(1, 4, 8, 8)
        found = module.backbone.predict(noisy, t, text)
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain.backbone.predict(noisy, t, text)
    assert found.dtype is torch.float32
    assert (found - expected.float()).abs().max() < 0.05 * expected.float().std()
    assert next(module.backbone.part("vae").parameters()).dtype is torch.float32
    images = module.draw(["a red cat"], [0])
    assert images[0].size == (32, 32)


def test_frozen_weights_below_fp32_are_refused_where_all_is_trained(tiny_sd3: Path):
    module = SCDPO(str(tiny_sd3), policy="full", backbone=FlowSettings(denoiser_dtype="bfloat16"))
    with pytest.raises(UserError, match="denoiser_dtype"):
        module.configure_model()


def test_embedded_guidance_cannot_be_negative():
    assert GuidedFlowSettings().guidance == 3.5  # that of diffusers' scripts for FLUX.1 and FLUX.2
    with pytest.raises(ValueError, match="guidance"):
        GuidedFlowSettings(guidance=-1.0)
