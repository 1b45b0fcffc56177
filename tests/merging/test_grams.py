"""What layers are fed with along the sampling path: by the definition, shared, planned and in groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_safety.adapters import LoRA
from lit_safety.adapters.low_rank import LowRank
from lit_safety.backbones import Backbone, load_backbone
from lit_safety.core.chance import generator, sample_seed
from lit_safety.core.errors import UserError
from lit_safety.merging.experts import Expert
from lit_safety.merging.grams import look, plan, shared_inputs
from lit_safety.merging.merge_experts import merge_looked
from lit_safety.merging.options import CalibrationOptions, Recipe
from lit_safety.merging.own_prompts import OwnPrompts
from lit_safety.merging.regmean import Grams

OPTIONS = CalibrationOptions(steps=2, batch_size=2, memory=1.0)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
QUERY, KEY, TEXT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
SHARED = {KEY: (f"unet.{QUERY}",)}
PROMPTS = OwnPrompts({"hate": ["a gun", "a blue gun with a cat", "a gun and a house"], "violence": ["a red gun"]},
                     ["a cat", "a red house", "a blue cat"])  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> Backbone:
    return load_backbone(str(tiny_pipeline))


@pytest.fixture(scope="module")
def experts() -> list[Expert]:
    torch.manual_seed(0)

    def linear(inputs: int) -> LowRank:
        return LowRank(0.3 * torch.randn(2, inputs), torch.randn(64, 2), 0.5)

    def conv() -> LowRank:
        return LowRank(0.1 * torch.randn(2, 32 * 9), torch.randn(32, 2), 0.5, (3, 3))

    return [
        Expert("hate", {f"unet.{QUERY}": linear(64), f"unet.{KEY}": linear(64), f"unet.{CONV}": conv()}),
        Expert("violence", {f"unet.{QUERY}": linear(64), f"unet.{TEXT}": linear(32), f"unet.{CONV}": conv()}),
    ]


def grams_of(backbone: Backbone, experts: list[Expert], options: CalibrationOptions = OPTIONS) -> dict[str, Grams]:
    found: dict[str, Grams] = {}
    for group in look(backbone, experts, PROMPTS, Recipe(), options).groups:
        found |= group
    return found


def by_the_definition(pipe, layer: str, prompts: list[str]) -> list[torch.Tensor]:
    """mean over tokens of x x^T, unconditional and conditional, with a stock pipeline, one prompt at a time."""
    seen: list[torch.Tensor] = []
    module = pipe.unet.get_submodule(layer)
    handle = getattr(module, "base_layer", module).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for prompt in prompts:
        pipe(prompt, num_inference_steps=2, guidance_scale=3.0, output_type="latent",
             generator=[generator(sample_seed(0, 0, prompt), "calibration drawing")])  # fmt: skip
    handle.remove()
    found = []
    for half in (0, 1):
        rows = []
        for x in (one[half] for one in seen):
            if x.ndim == 3:  # (C, H, W): patches of 3 x 3 as a row each, channels first
                padded = nn.functional.pad(x, (1, 1, 1, 1))
                rows += [
                    padded[:, i : i + 3, j : j + 3].flatten() for i in range(x.shape[1]) for j in range(x.shape[2])
                ]
            else:
                rows += list(x)
        tokens = torch.stack(rows)
        found.append(tokens.T @ tokens / len(tokens))
    return found


@torch.no_grad()
def test_grams_are_what_the_definition_says(backbone: Backbone, tiny_pipeline: Path, experts: list[Expert]):
    """Under the expert's own weights on its prompts; G_0 = clean + half the unconditional + half the
    unconditional of the experts that adapt what is fed with it."""
    found = grams_of(backbone, experts)
    for layer in (KEY, TEXT, CONV):
        pipe = load_backbone(str(tiny_pipeline)).pipeline()
        unconditional, conditional = by_the_definition(pipe, layer, list(PROMPTS.clean))
        anchor = conditional + 0.5 * unconditional
        adapting = [one for one in experts if {f"unet.{layer}", *SHARED.get(layer, ())} & one.layers.keys()]
        for number, expert in enumerate(experts):
            if expert not in adapting:  # it adapts nothing that is fed with this input
                assert not found[f"unet.{layer}"].own[number].any()
                continue
            pipe = load_backbone(str(tiny_pipeline)).pipeline()
            for name, part in expert.layers.items():
                weight = pipe.unet.get_submodule(name.removeprefix("unet.")).weight
                weight.data += part.delta(torch.float32).reshape(weight.shape)
            unconditional, conditional = by_the_definition(pipe, layer, list(PROMPTS.own[expert.name]))
            torch.testing.assert_close(found[f"unet.{layer}"].own[number], conditional, rtol=1e-3, atol=1e-4)
            anchor = anchor + 0.5 / len(adapting) * unconditional
        torch.testing.assert_close(found[f"unet.{layer}"].anchor, anchor, rtol=1e-3, atol=1e-4)


def test_layers_fed_with_the_same_tensor_share_one_matrix(backbone: Backbone, experts: list[Expert]):
    found = grams_of(backbone, experts)
    assert found[f"unet.{QUERY}"].anchor is found[f"unet.{KEY}"].anchor
    assert found[f"unet.{QUERY}"].anchor is not found[f"unet.{TEXT}"].anchor
    looked = look(backbone, experts, PROMPTS, Recipe(), OPTIONS)
    assert looked.about["inputs"] == 3
    assert looked.about["prompts by expert"] == {"hate": 3, "violence": 1}
    assert looked.about["gigabytes"] == pytest.approx(4e-9 * 4 * (64**2 + 32**2 + 288**2))


def test_neither_groups_nor_batches_nor_order_nor_adapters_on_the_base_matter(
    tiny_pipeline: Path, backbone: Backbone, experts: list[Expert]
):
    plain = grams_of(backbone, experts)
    adapted = load_backbone(str(tiny_pipeline))
    for parameter in LoRA(rank=2, target_modules=["to_k", "to_q", "conv1"]).attach(adapted.denoiser, "policy"):
        parameter.data.fill_(0.3)
    narrow = replace(OPTIONS, memory=4e-9 * 4 * 288**2, batch_size=3)
    looked = look(adapted, experts[::-1], PROMPTS, Recipe(), narrow)
    assert looked.about["groups"] == 2
    found: dict[str, Grams] = {}
    for group in looked.groups:
        found |= group
    assert found.keys() == plain.keys()
    for name, grams in plain.items():
        for one, other in zip((grams.anchor, *grams.own), (found[name].anchor, *found[name].own), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_layer_that_does_not_fit_is_named_with_what_it_takes(backbone: Backbone, experts: list[Expert]):
    with pytest.raises(UserError, match=rf"memory 0\.001: the inputs of unet\.{CONV} alone take 0\.00133 GB"):
        look(backbone, experts, PROMPTS, Recipe(), replace(OPTIONS, memory=0.001))


def test_several_mu_come_from_one_look(backbone: Backbone, experts: list[Expert]):
    recipes = [Recipe(mu=mu) for mu in (0.0, 1.0)]
    groups = list(look(backbone, experts, PROMPTS, Recipe(), OPTIONS).groups)
    anchors = {name: grams.anchor.double() for group in groups for name, grams in group.items()}
    free, kept = merge_looked(experts, recipes, groups)

    def on_clean(layer: LowRank, name: str) -> float:
        return float((layer.delta() @ anchors[name] @ layer.delta().T).trace())

    for name, layer in free.layers.items():
        assert layer.rank <= sum(expert.layers[name].rank for expert in experts if name in expert.layers)
        assert free.fits[name].residual < 1e-6
        assert on_clean(kept.layers[name], name) < on_clean(layer, name)
    assert kept.layers[f"unet.{CONV}"].kernel == (3, 3)


def test_without_guidance_there_is_no_unconditional_half(backbone: Backbone, experts: list[Expert]):
    found = grams_of(backbone, experts, replace(OPTIONS, guidance=1.0))
    clean = look(backbone, experts, PROMPTS, Recipe(method="sum", null_space=0.01), replace(OPTIONS, guidance=1.0))
    for group in clean.groups:
        for name, grams in group.items():
            assert grams.own == ()
            torch.testing.assert_close(grams.anchor, found[name].anchor, rtol=1e-5, atol=1e-6)


# Plans of networks that no test could hold.


def sdxl_on_meta() -> tuple[nn.Module, dict[str, nn.Module], list]:
    """SDXL's UNet without weights, its attention layers, and what a forward with guidance takes."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        inputs = [torch.empty(2, 4, 128, 128), torch.empty(2), torch.empty(2, 77, 2048),
                  {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}]  # fmt: skip
    ends = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    return unet, {name: one for name, one in unet.named_modules() if name.endswith(ends)}, inputs


@torch.no_grad()
def test_the_plan_for_sdxl_is_counted_without_its_weights():
    """70 blocks (60 of width 1280, 10 of 640) with 10 adapted layers each and 6 inputs of their own; the text is one
    for all: 421 matrices, not 700. ff.net.2, four times as wide, decides."""
    unet, layers, (sample, time, text, added) = sdxl_on_meta()
    inputs = shared_inputs(layers, lambda: unet(sample, time, text, added_cond_kwargs=added))
    assert len(layers) == 700
    assert sum(len(one.layers) for one in inputs) == 700
    assert len(inputs) == 70 * 5 + 1 + 70
    of_text = next(one for one in inputs if any("attn2.to_k" in name for name in one.layers))
    assert len(of_text.layers) == 140
    # per block: q k v, to_out, cross q, cross to_out and ff.net.0 of the block's width, ff.net.2 of four times that
    one_set = 4 * (2048**2 + sum(n * (5 * w**2 + (4 * w) ** 2) for n, w in ((60, 1280), (10, 640))))
    assert sum(one.bytes(0) for one in inputs) == 2 * one_set
    groups = plan(inputs, 8, gigabytes=24)
    assert sum(len(group) for group in groups) == len(inputs)
    assert all(sum(one.bytes(8) for one in group) <= 24e9 for group in groups)
    assert len(groups) == -(-10 * one_set // int(24e9))


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3"])
def test_other_families_are_merged_too(family: str, request: pytest.FixtureRequest):
    """In groups, with all layers that attention has; q, k and v share, and the text of SDXL is one for all blocks."""
    backbone = load_backbone(str(request.getfixturevalue(family)))
    torch.manual_seed(1)
    ends = ("to_q", "to_k", "to_v", "add_k_proj", "ff.net.2")
    layers = {name: one for name, one in backbone.denoiser.named_modules() if name.endswith(ends)}
    experts = [
        Expert(category, {
            f"{backbone.DENOISER}.{name}":
            LowRank(0.1 * torch.randn(2, one.in_features), torch.randn(one.out_features, 2))
            for name, one in layers.items()
        }) for category in PROMPTS.own
    ]  # fmt: skip
    whole = look(backbone, experts, PROMPTS, Recipe(), OPTIONS)
    assert whole.about["inputs"] < len(layers)
    half = look(backbone, experts, PROMPTS, Recipe(), replace(OPTIONS, memory=whole.about["gigabytes"] / 1.5))
    assert half.about["groups"] == 2
    one, two = (merge_looked(experts, [Recipe()], looked.groups)[0] for looked in (whole, half))
    assert one.layers.keys() == {f"{backbone.DENOISER}.{name}" for name in layers}
    for name, layer in one.layers.items():
        torch.testing.assert_close(layer.delta(), two.layers[name].delta(), rtol=1e-3, atol=1e-4)
        assert torch.isfinite(layer.delta()).all()
    assert one.residual < 1e-6
