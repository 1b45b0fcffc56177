from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_safety.adapters import LoRA
from lit_safety.adapters.lora_file import read_lora
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones import Backbone, load_backbone
from lit_safety.core.chance import normal, sample_seed
from lit_safety.core.errors import UserError
from lit_safety.merging.calibration import draw_latents, forwards, measure_activity
from lit_safety.merging.experts import Expert
from lit_safety.merging.methods import Activity
from lit_safety.merging.options import CalibrationOptions
from lit_safety.modules.speed import Speed

PROMPTS = ["a gun", "a red cat and a house", "a blue gun with a cat"]
OPTIONS = CalibrationOptions(timesteps=2, steps=2, batch_size=2)
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> Backbone:
    return load_backbone(str(tiny_pipeline))


@pytest.fixture(scope="module")
def experts() -> list[Expert]:
    """Two experts of a linear layer and a convolution; the second does not adapt the linear one."""
    torch.manual_seed(0)
    conv = [LowRank(torch.randn(2, 32 * 9), torch.randn(32, 2), 0.5, (3, 3)) for _ in range(2)]
    linear = LowRank(torch.randn(3, 32), torch.randn(64, 3), -2.0)
    return [
        Expert("a", {f"unet.{LINEAR}": linear, f"unet.{CONV}": conv[0]}),
        Expert("b", {f"unet.{CONV}": conv[1]}),
    ]


@torch.no_grad()
def inputs_of(backbone: Backbone, layer: str, prompt: str) -> list[torch.Tensor]:
    """What the base feeds into a layer at both noise levels, one prompt at a time."""
    inputs: list[torch.Tensor] = []
    module = backbone.denoiser.get_submodule(layer)
    seeds = [sample_seed(OPTIONS.seed, 0, prompt)]
    latents = draw_latents(backbone, [prompt], seeds, OPTIONS)
    handle = module.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    for level, place in enumerate((0.25, 0.75)):
        timesteps = backbone.timesteps(torch.tensor([place]))
        noise = normal(seeds, f"calibration noise {level}", latents.shape[1:])
        backbone.predict(backbone.add_noise(latents, noise, timesteps), timesteps, backbone.encode_text([prompt]))
    handle.remove()
    assert len(inputs) == 2
    return inputs


def by_the_definition(backbone: Backbone, expert: Expert, layer: str, prompt: str) -> torch.Tensor:
    """mean over tokens and timesteps of |delta x|, with the whole update: (out,)."""
    found = []
    for x in inputs_of(backbone, layer, prompt):
        part = expert.layers[f"unet.{layer}"]
        delta = part.delta(torch.float32)
        if part.kernel:
            y = torch.nn.functional.conv2d(x, delta.reshape(32, 32, 3, 3), padding=1).flatten(2).transpose(1, 2)
        else:
            y = x @ delta.T
        found.append(y[0].abs().mean(dim=0))
    return torch.stack(found).mean(dim=0).double()


def size_by_the_definition(backbone: Backbone, layer: str) -> torch.Tensor:
    """mean over tokens (or places) and timesteps of |x|: (prompts, in)."""
    found = []
    for prompt in PROMPTS:
        sizes = [x[0].flatten(1).T if x.ndim == 4 else x[0] for x in inputs_of(backbone, layer, prompt)]
        found.append(torch.stack([size.abs().mean(dim=0) for size in sizes]).mean(dim=0))
    return torch.stack(found)


def test_activity_is_what_the_definition_says(backbone: Backbone, experts: list[Expert]):
    ticks: list[None] = []
    found = measure_activity(backbone, experts, PROMPTS, OPTIONS, lambda: ticks.append(None))
    assert len(ticks) == forwards(PROMPTS, OPTIONS) == 4  # two batches, two noise levels
    conv = torch.stack(
        [torch.stack([by_the_definition(backbone, expert, CONV, p) for p in PROMPTS]) for expert in experts]
    )
    expected = Activity.empty(2, 32, 32 * 9)
    expected.add(conv, size_by_the_definition(backbone, CONV).repeat_interleave(9, dim=1))
    torch.testing.assert_close(found[f"unet.{CONV}"].inputs, expected.inputs, rtol=1e-4, atol=1e-5)
    sizes = size_by_the_definition(backbone, LINEAR).sum(0).double()
    torch.testing.assert_close(found[f"unet.{LINEAR}"].inputs, sizes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[f"unet.{CONV}"].total, expected.total, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[f"unet.{CONV}"].votes, expected.votes)
    linear = torch.stack([by_the_definition(backbone, experts[0], LINEAR, p) for p in PROMPTS]).sum(0)
    torch.testing.assert_close(found[f"unet.{LINEAR}"].total[0], linear, rtol=1e-4, atol=1e-5)
    assert found[f"unet.{LINEAR}"].total[1].count_nonzero() == 0
    assert found[f"unet.{LINEAR}"].votes[0].tolist() == [3] * 64


def test_neither_order_nor_batches_nor_adapters_on_the_base_matter(tiny_pipeline: Path, experts: list[Expert]):
    backbone = load_backbone(str(tiny_pipeline))
    first = measure_activity(backbone, experts, PROMPTS, OPTIONS)
    for parameter in LoRA(rank=2, target_modules=["to_k", "conv1"]).attach(backbone.denoiser, "policy"):
        parameter.data.fill_(0.3)
    options = CalibrationOptions(timesteps=2, steps=2, batch_size=3)
    second = measure_activity(backbone, experts[::-1], PROMPTS[::-1], options)
    for name, one in first.items():
        torch.testing.assert_close(second[name].total, one.total, rtol=1e-4, atol=1e-5)
        assert torch.equal(second[name].votes, one.votes)


def test_a_network_that_was_compiled_for_training_is_measured_too(tiny_pipeline: Path, experts: list[Expert]):
    """Compiled blocks would pass by hooks that are set later, and all rows would be the first expert's."""
    backbone = load_backbone(str(tiny_pipeline))
    options = CalibrationOptions(timesteps=1, steps=1, batch_size=2)
    plain = measure_activity(backbone, experts, PROMPTS[:2], options)
    Speed(compile="eager").apply(backbone.denoiser)
    found = measure_activity(backbone, experts, PROMPTS[:2], options)
    for name, one in plain.items():
        assert one.total.count_nonzero()
        assert torch.equal(found[name].total, one.total)


def test_experts_of_another_backbone_are_refused(backbone: Backbone, wide_pipeline: Path, tmp_path: Path,
                                                save_expert: Callable[..., Path]):  # fmt: skip
    wide = Expert("wide", read_lora(save_expert(tmp_path, 0, pipeline=wide_pipeline)))
    with pytest.raises(UserError, match=r"to_.* another backbone"):
        measure_activity(backbone, [wide], PROMPTS, OPTIONS)
    for name, named in (("unet.nowhere", "unet.nowhere is not a layer"), ("text_encoder.x", "adapts text_encoder.x")):
        with pytest.raises(UserError, match=named):
            measure_activity(
                backbone, [Expert("x", {name: LowRank(torch.ones(1, 1), torch.ones(1, 1))})], PROMPTS, OPTIONS
            )
