"""SD3 against the stock pipeline and diffusers' flow-matching scheduler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling

from lit_safety.adapters.lora import LoRA
from lit_safety.backbones import load_backbone
from lit_safety.backbones.stable_diffusion_3 import count_missing_t5
from lit_safety.core.errors import UserError
from tests.helpers.tiny_pipelines import save_sd3

PROMPTS = ["a red cat", "a gun"]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: matrix kernels of some processors round by the batch's size."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def without(folder: Path, out: Path, *endings: str) -> Path:
    """The same weights, its index without some text encoders and their tokenizers."""
    shutil.copytree(folder, out)
    index = out / "model_index.json"
    gone = {f"{name}{ending}": [None, None] for ending in endings for name in ("text_encoder", "tokenizer")}
    index.write_text(json.dumps(json.loads(index.read_text()) | gone))
    return out


@pytest.mark.parametrize("endings", [(), ("_3",)], ids=["all", "no T5"])
def test_text_is_encoded_as_the_stock_pipeline_does(tiny_sd3: Path, tmp_path: Path, endings: tuple[str, ...]):
    folder = without(tiny_sd3, tmp_path / "pipe", *endings)
    gone = [f"{name}{ending}" for ending in endings for name in ("text_encoder", "tokenizer")]
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **dict.fromkeys(gone))
    backbone = load_backbone(str(folder), denoiser=False)
    with torch.no_grad():
        hidden, none, pooled, pooled_none = pipe.encode_prompt(PROMPTS, None, None, device="cpu")
        found = backbone.encode_text([*PROMPTS, "", ""])
    rows = found["encoder_hidden_states"].shape[1]
    close(found["encoder_hidden_states"], torch.cat([hidden, none])[:, :rows])
    close(found["pooled_projections"], torch.cat([pooled, pooled_none]))
    # T5's part follows CLIP's 16 tokens; without it two rows stand for 256 of zeros.
    assert rows == (16 + 256 if endings == () else 16 + 2)
    assert hidden[:, 16:].any() == (endings == ())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_rows_stand_for_a_missing_t5(tiny_sd3: Path, tmp_path: Path, checkpointing: bool):
    """Prediction and gradient are those of the stock pipeline's 256 rows of zeros, which caches of 0.2 hold."""
    backbone = load_backbone(str(without(tiny_sd3, tmp_path / "pipe", "_3")))
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipe", text_encoder_3=None, tokenizer_3=None)
    if checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
        backbone.denoiser.train()
    with torch.no_grad():
        hidden, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, device="cpu")
        short = backbone.encode_text(PROMPTS)
    t, noisy = torch.tensor([900.0, 100.0]), torch.randn(2, 4, 8, 8)
    found = []
    for text in (short, {"encoder_hidden_states": hidden, "pooled_projections": pooled}):
        one = noisy.clone().requires_grad_(True)
        prediction = backbone.predict(one, t, text)
        prediction.square().mean().backward()
        found += [(prediction.detach(), one.grad)]
    expected = stock.transformer(noisy, hidden, pooled, t, return_dict=False)[0]
    close(found[1][0], expected)
    close(found[0][0], expected)
    close(found[0][1], found[1][1])
    no_t5 = stock.transformer(noisy, short["encoder_hidden_states"], pooled, t, return_dict=False)[0]
    assert (no_t5 - expected).abs().max() > 1e-3  # without the bias it is another function
    close(backbone.denoiser(hidden_states=noisy, timestep=t, **short, return_dict=False)[0], expected)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = [backbone.predict(noisy, t, text) for text in (short, dict(short, encoder_hidden_states=hidden))]
    assert (half[0].float() - half[1].float()).abs().max() < 0.02 * half[1].float().std()


def test_a_pipeline_draws_the_same_with_two_rows_for_a_missing_t5(tiny_sd3: Path, tmp_path: Path):
    folder = without(tiny_sd3, tmp_path / "pipe", "_3")
    drawn, rows = [], []
    for counted in (False, True):
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        pipe.set_progress_bar_config(disable=True)
        if counted:
            count_missing_t5(pipe)
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, named: rows.append(named["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
        drawn.append(pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **settings).images)
        hook.remove()
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5)
    assert rows == [16 + 256] * 2 + [16 + 2] * 2


def test_zeros_stand_where_a_clip_encoder_is_missing(tiny_sd3: Path, tmp_path: Path):
    """Of CLIP's 48 numbers a token the first 32 are the first encoder's; of the pooled ones likewise."""
    whole = load_backbone(str(tiny_sd3), denoiser=False)
    first = load_backbone(str(without(tiny_sd3, tmp_path / "second", "_2")), denoiser=False)
    second = load_backbone(str(without(tiny_sd3, tmp_path / "first", "")), denoiser=False)
    t5 = load_backbone(str(without(tiny_sd3, tmp_path / "t5", "", "_2")), denoiser=False)
    with torch.no_grad():
        rows, of_first, of_second, of_t5 = (one.encode_text(PROMPTS) for one in (whole, first, second, t5))
    hidden, pooled = rows["encoder_hidden_states"], rows["pooled_projections"]
    expected = hidden.clone()
    expected[:, :16, 32:48] = 0
    assert torch.equal(of_first["encoder_hidden_states"], expected)
    assert torch.equal(of_first["pooled_projections"], torch.cat([pooled[:, :32], torch.zeros(2, 16)], dim=1))
    expected = hidden.clone()
    expected[:, :16, :32] = 0
    assert torch.equal(of_second["encoder_hidden_states"], expected)
    assert torch.equal(of_second["pooled_projections"], torch.cat([torch.zeros(2, 32), pooled[:, 32:]], dim=1))
    assert torch.equal(of_t5["encoder_hidden_states"][:, -256:], hidden[:, 16:])
    assert not of_t5["encoder_hidden_states"][:, :-256].any()
    assert not of_t5["pooled_projections"].any()
    assert second.encoder_hashes(second.parts.source)["text_encoder"] == "absent"
    assert first.too_long(["a " * 17, "a " * 13]) == [True, False]


def test_a_pipeline_without_a_clip_encoder_draws(tiny_sd3: Path, tmp_path: Path):
    """The stock pipeline cannot encode text then; the backbone does, and no prompt is none."""
    backbone = load_backbone(str(without(tiny_sd3, tmp_path / "pipe", "")))
    pipe = backbone.pipeline()

    def draw(**more: object) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(row) for row in range(2)]
        return torch.from_numpy(pipe(generator=seeds, num_inference_steps=2, output_type="np", **more).images)

    drawn = draw(prompt=PROMPTS, guidance_scale=4.0)
    assert drawn.shape == (2, 32, 32, 3)
    assert not torch.equal(drawn, draw(prompt=["a cat", "a cat"], guidance_scale=4.0))
    with torch.no_grad():
        text, none = backbone.encode_text(PROMPTS), backbone.encode_text(["", ""])
    given = {
        "prompt_embeds": text["encoder_hidden_states"], "pooled_prompt_embeds": text["pooled_projections"],
        "negative_prompt_embeds": none["encoder_hidden_states"],
        "negative_pooled_prompt_embeds": none["pooled_projections"],
    }  # fmt: skip
    del pipe.encode_prompt  # the stock one again
    assert torch.equal(drawn, draw(guidance_scale=4.0, **given))


def test_noise_and_target_are_those_of_the_flow_matching_scheduler(tiny_sd3: Path):
    """x_t = sigma noise + (1 - sigma) x0, and one Euler step from sigma to 0 along the target gives x0 back."""
    backbone = load_backbone(str(tiny_sd3))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_sd3, subfolder="scheduler")
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = scheduler.timesteps[[0, 500, 999]]
    sigma = scheduler.sigmas[[0, 500, 999]].view(3, 1, 1, 1)
    noisy = backbone.add_noise(latents, noise, t)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, t, noise))
    torch.testing.assert_close(noisy, sigma * noise + (1 - sigma) * latents)
    target = backbone.target(latents, noise, t)
    assert torch.equal(target, noise - latents)
    torch.testing.assert_close(noisy - sigma * target, latents, rtol=1e-4, atol=1e-5)


def test_timesteps_golden(tiny_sd3: Path):
    """Half of z ~ N(0, 1) lie below 0 and a share of 0.8413447 below 1. sigmoid(0) = 0.5, sigmoid(1) = 0.7310586; with
    shift 3, sigma = 3 u / (1 + 2 u): 1.5 / 2 = 0.75 and 2.1931758 / 2.4621172 = 0.8907683."""
    backbone = load_backbone(str(tiny_sd3), denoiser=False)
    found = backbone.timesteps(torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([750.0, 890.7683]))
    torch.testing.assert_close(backbone.timestep_fraction(found), torch.tensor([0.75, 0.8907683]))
    # The ends of the uniform numbers stay within the schedule, whose lowest sigma is 3 / 1000 / (1 + 2 / 1000).
    ends = backbone.timesteps(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    torch.testing.assert_close(ends[0], torch.tensor(2.9940))
    assert 990 < ends[1] <= 1000


def test_timesteps_are_distributed_as_in_diffusers_own_training(tiny_sd3: Path):
    """20,000 draws by its script's functions, index into the scheduler's timesteps: the deciles agree within 10."""
    backbone = load_backbone(str(tiny_sd3), denoiser=False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_sd3, subfolder="scheduler")
    generator = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling("logit_normal", 20_000, 0.0, 1.0, generator=generator)
    drawn = scheduler.timesteps[(u * 1000).long()]
    deciles = torch.arange(1, 10) / 10
    assert (torch.quantile(drawn, deciles) - backbone.timesteps(deciles)).abs().max() < 10


def test_a_shift_that_depends_on_the_image_is_the_stock_pipelines(tmp_path: Path):
    """8 x 12 latents are 4 x 6 tokens: mu = 0.5 + 0.65 (24 - 256) / 3840 = 0.46073, e^mu = 1.58523; of u = 0.5
    0.61319."""
    folder = save_sd3(tmp_path / "pipe", without=("_3",))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    backbone = load_backbone(str(folder), denoiser=False)
    found = backbone.timesteps(torch.tensor([0.5]), (8, 12))
    torch.testing.assert_close(found, torch.tensor([613.1866]), rtol=1e-5, atol=0)


def test_a_student_of_few_steps_is_refused(tmp_path: Path):
    folder = save_sd3(tmp_path / "stable-diffusion-3.5-large-turbo", without=("_3",))
    with pytest.raises(UserError, match=r"stable-diffusion-3\.5-large"):
        load_backbone(str(folder))


def test_a_lora_adapts_the_text_stream_by_default(tiny_sd3: Path):
    backbone = load_backbone(str(tiny_sd3))
    LoRA(rank=2).with_targets(backbone.lora_targets()).attach(backbone.denoiser, "policy")
    adapted = {name.split(".lora_A")[0] for name, _ in backbone.denoiser.named_parameters() if ".lora_A." in name}
    linear = {
        name.removesuffix(".base_layer")
        for name, layer in backbone.denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear) and ".lora_" not in name and ".norm1" not in name
    }
    left = {name for name in linear - adapted if name.startswith("transformer_blocks.")}
    assert adapted >= {f"transformer_blocks.0.attn.{name}" for name in ("add_q_proj", "to_add_out", "to_q")}
    assert left == set(), left
