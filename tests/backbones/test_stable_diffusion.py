import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError


def test_latents_are_scaled_posterior_samples(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = backbone.vae.encode(images).latent_dist
        zero = backbone.encode_images(images, torch.zeros(2, 4, 8, 8))
        one = backbone.encode_images(images, torch.ones(2, 4, 8, 8))
    factor = backbone.vae.config.scaling_factor
    torch.testing.assert_close(zero, posterior.mean * factor)
    torch.testing.assert_close(one - zero, posterior.std * factor, rtol=1e-4, atol=1e-6)


def test_text_is_encoded_as_the_stock_pipeline_does(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    prompts = ["a red cat", ""]
    expected = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        assert torch.equal(backbone.encode_text(prompts)["encoder_hidden_states"], expected)


def test_epsilon_target_is_the_noise(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline))
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(backbone.target(latents, noise, torch.tensor([10, 900])), noise)


def test_velocity_target_and_noising_golden(tiny_v_pipeline: Path):
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise; v = sqrt(abar) noise - sqrt(1 - abar) x0.

    abar is the running product of 1 - beta, beta = linspace(sqrt(0.00085), sqrt(0.012), 1000)^2.
    """
    backbone = load_backbone(str(tiny_v_pipeline))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[[10, 900]].view(2, 1, 1, 1)
    latents, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([10, 900])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        backbone.add_noise(latents, noise, t), abar.sqrt() * latents + (1 - abar).sqrt() * noise, **close
    )
    torch.testing.assert_close(
        backbone.target(latents, noise, t), abar.sqrt() * noise - (1 - abar).sqrt() * latents, **close
    )


def test_noise_is_added_in_fp32_under_autocast(tiny_pipeline: Path):
    """In bf16 abar rounds to 1 at the first timesteps (bf16 has 8 bits), and nothing would be added there."""
    backbone = load_backbone(str(tiny_pipeline))
    images, noise = torch.zeros(1, 3, 32, 32), torch.ones(1, 4, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = backbone.encode_images(images, torch.zeros(1, 4, 8, 8))
        noisy = backbone.add_noise(latents, noise, torch.tensor([0]))
    assert latents.dtype is torch.float32
    # sqrt(1 - abar_0) = sqrt(0.00085) = 0.0291548
    added = noisy - latents * (1 - 0.00085) ** 0.5
    torch.testing.assert_close(added, torch.full_like(added, 0.0291548), rtol=1e-3, atol=1e-5)


def test_weights_stored_as_a_variant_load(tiny_pipeline: Path, tmp_path: Path):
    StableDiffusionPipeline.from_pretrained(tiny_pipeline).save_pretrained(tmp_path / "half", variant="fp16")
    backbone = load_backbone(str(tmp_path / "half"))
    with torch.no_grad():
        assert backbone.posterior(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 4, 8, 8)
        assert backbone.encode_text(["a cat"])["encoder_hidden_states"].shape == (1, 16, 32)


def test_timesteps_cover_the_schedule(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline))
    assert backbone.timesteps(torch.tensor([0.0, 0.5, 0.9999])).tolist() == [0, 500, 999]
    assert backbone.timestep_fraction(torch.tensor([0, 500])).tolist() == [0.0, 0.5]


def test_everything_is_frozen_and_in_fp32(tiny_pipeline: Path):
    parameters = list(load_backbone(str(tiny_pipeline)).parameters())
    assert parameters
    assert not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in parameters} == {torch.float32}


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_backbone(str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere"):
        load_backbone(str(tmp_path / "nowhere"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "HunyuanDiTPipeline"}')
    with pytest.raises(UserError, match="HunyuanDiTPipeline are not supported"):
        load_backbone(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="does not load"):
        load_backbone(str(tmp_path))


def test_sample_prediction_is_refused_by_name(tiny_pipeline: Path, tmp_path: Path):
    shutil.copytree(tiny_pipeline, tmp_path / "sample")
    config = tmp_path / "sample" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"sample"'))
    with pytest.raises(UserError, match="'sample'"):
        load_backbone(str(tmp_path / "sample"))
