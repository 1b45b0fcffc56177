"""SDXL against the stock pipeline's own numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, StableDiffusionXLPipeline

from lit_safety.backbones import load_backbone
from lit_safety.core.errors import UserError
from lit_safety.data.reading.decode import crop_of
from tests.helpers.tiny_pipelines import save_sdxl


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: matrix kernels of some processors round by the batch's size."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with v-prediction that encodes empty prompts."""
    folder = tmp_path_factory.mktemp("pipelines") / "encoding"
    return save_sdxl(folder, zeros=False, prediction_type="v_prediction")


def stock_text(folder: Path, prompts: list[str]) -> tuple[torch.Tensor, ...]:
    """Prompts' hidden states, those of no prompt, and the pooled ones of both."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    with torch.no_grad():
        return pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=True)


def test_text_is_encoded_as_the_stock_pipeline_does(tiny_sdxl: Path):
    """An empty prompt is what guidance uses where no negative prompt is given: zeros."""
    hidden, none, pooled, pooled_none = stock_text(tiny_sdxl, ["a red cat", "a gun"])
    with torch.no_grad():
        found = load_backbone(str(tiny_sdxl), denoiser=False).encode_text(["a red cat", "a gun", "", ""])
    close(found["encoder_hidden_states"], torch.cat([hidden, none]))
    close(found["text_embeds"], torch.cat([pooled, pooled_none]))
    assert not found["encoder_hidden_states"][2:].any()
    assert not found["text_embeds"][2:].any()


def test_an_empty_prompt_is_encoded_where_the_pipeline_does_so(encoding: Path, tiny_sdxl: Path):
    hidden, none, pooled, pooled_none = stock_text(encoding, ["a red cat", "a gun"])
    backbone = load_backbone(str(encoding), denoiser=False)
    with torch.no_grad():
        found = backbone.encode_text(["a red cat", "a gun", "", ""])
    close(found["encoder_hidden_states"], torch.cat([hidden, none]))
    close(found["text_embeds"], torch.cat([pooled, pooled_none]))
    assert found["encoder_hidden_states"][2:].any()
    # A cache of the one is none of the other, although their weights may be the same.
    kinds = [backbone.encoder_hashes(str(folder))["empty prompt"] for folder in (encoding, tiny_sdxl)]
    assert kinds == ["encoded", "zeros"]


def test_time_ids_are_those_of_the_stock_pipeline(tiny_sdxl: Path):
    """An image of 100 x 60 (width x height) cut to 32 x 32: scaled by 32 / 60 it is 53.3 x 32, and (53.3 - 32) / 2
    = 10.67, so 11 pixels are cut off at its left. The pipeline's order: original size, top left, target size."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    expected = pipe._get_add_time_ids((60, 100), (0, 11), (32, 32), torch.float32, text_encoder_projection_dim=16)
    backbone = load_backbone(str(tiny_sdxl), denoiser=False)
    assert torch.equal(backbone.crop_conditioning(torch.tensor([crop_of((60, 100), (32, 32))]))["time_ids"], expected)


def test_sizes_count_and_are_those_of_a_whole_image_where_none_are_given(tiny_sdxl: Path):
    backbone = load_backbone(str(tiny_sdxl))
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        text = backbone.encode_text(["a red cat", "a gun"])
        predictions = [
            backbone.predict(noisy, timesteps, text | backbone.crop_conditioning(torch.tensor([crop] * 2)))
            for crop in ([32.0, 32, 0, 0, 32, 32], [60.0, 100, 0, 11, 32, 32])
        ]
        whole = backbone.predict(noisy, timesteps, text)
    assert torch.equal(whole, predictions[0])
    assert not torch.equal(whole, predictions[1])


def test_sizes_of_a_whole_image_golden(tiny_sdxl: Path):
    """A latent of 8 x 10, 4 pixels a side each: 32 x 40 pixels. Filled in where the latents are, on a meta device too,
    which takes no copy from the host."""
    backbone = load_backbone(str(tiny_sdxl), denoiser=False)
    ids = backbone._whole_image(torch.zeros(2, 4, 8, 10))
    assert ids.tolist() == [[32, 40, 0, 0, 32, 40]] * 2
    assert backbone._whole_image(torch.zeros(2, 4, 8, 10, device="meta")).device.type == "meta"


def test_velocity_is_the_schedulers(encoding: Path):
    """The target of a pipeline that ships an Euler sampler is DDPM's: v = sqrt(abar) noise - sqrt(1 - abar) x0."""
    backbone = load_backbone(str(encoding))
    scheduler = DDPMScheduler.from_pretrained(encoding, subfolder="scheduler")
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    abar = scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    velocity = backbone.target(latents, noise, t)
    assert torch.equal(velocity, scheduler.get_velocity(latents, noise, t))
    torch.testing.assert_close(velocity, abar.sqrt() * noise - (1 - abar).sqrt() * latents)
    assert torch.equal(backbone.add_noise(latents, noise, t), scheduler.add_noise(latents, noise, t))


def test_latents_with_a_mean_and_a_deviation_are_turned_back_by_the_stock_decoder(tiny_sdxl: Path, tmp_path: Path):
    """Stock decoding: latents * std / scaling_factor + mean."""
    shutil.copytree(tiny_sdxl, tmp_path / "pipe")
    file = tmp_path / "pipe" / "vae" / "config.json"
    mean, std = [0.5, -1.0, 0.0, 2.0], [2.0, 1.0, 0.5, 4.0]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_mean": mean, "latents_std": std}))
    backbone = load_backbone(str(tmp_path / "pipe"), denoiser=False)
    posterior = torch.randn(2, 2, 4, 8, 8)
    latents = backbone.latents(posterior, torch.zeros(2, 4, 8, 8))
    back = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.13025 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(back, posterior[:, 0])


def test_what_is_no_sdxl_is_refused_by_name(tiny_sdxl: Path, tiny_pipeline: Path, tmp_path: Path):
    shutil.copytree(tiny_pipeline, tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(UserError, match="SDXL"):
        load_backbone(str(tmp_path / "pipe"))
    shutil.copytree(tiny_sdxl, tmp_path / "edm")
    EDMEulerScheduler().save_pretrained(tmp_path / "edm" / "scheduler")
    file = tmp_path / "edm" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    with pytest.raises(UserError, match="EDMEulerScheduler, of the EDM process"):
        load_backbone(str(tmp_path / "edm"))


def test_tokenizers_of_two_lengths_are_named(tmp_path: Path):
    folder = save_sdxl(tmp_path / "pipe")
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 15}))
    with pytest.raises(UserError, match="16 and of tokenizer_2 15"):
        load_backbone(str(folder)).encode_text(["a cat"])
