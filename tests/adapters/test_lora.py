import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from lit_safety.adapters import LoRA, load_lora
from lit_safety.adapters.lora import WEIGHTS_NAME, adapter_layers, adapters_off
from lit_safety.backbones import Backbone, load_backbone
from lit_safety.core.errors import UserError


def predict(backbone: Backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        text = backbone.encode_text(["a red cat", "a house"])
        return backbone.predict(noisy, torch.tensor([100, 700]), text)


def with_random_lora(folder: Path, rank: int = 4, alpha: float = 8.0) -> Backbone:
    """A backbone whose LoRA is not the identity."""
    backbone = load_backbone(str(folder))
    parameters = LoRA(rank=rank, alpha=alpha).attach(backbone.denoiser, "policy")
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data.normal_(0, 0.2, generator=generator)
    return backbone


def test_a_fresh_adapter_changes_nothing(tiny_pipeline: Path):
    base = predict(load_backbone(str(tiny_pipeline)))
    backbone = load_backbone(str(tiny_pipeline))
    LoRA(rank=4).attach(backbone.denoiser, "policy")
    assert torch.equal(predict(backbone), base)


def test_off_is_the_base_and_leaves_requires_grad_alone(tiny_pipeline: Path):
    base = predict(load_backbone(str(tiny_pipeline)))
    backbone = with_random_lora(tiny_pipeline)
    frozen = next(p for n, p in backbone.denoiser.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    before = [p.requires_grad for p in backbone.parameters()]
    adapted = predict(backbone)
    assert not torch.allclose(adapted, base)
    with adapters_off(adapter_layers(backbone.denoiser)):
        assert torch.equal(predict(backbone), base)
    assert torch.equal(predict(backbone), adapted)
    assert [p.requires_grad for p in backbone.parameters()] == before


def test_only_the_adapter_is_trainable_and_in_fp32(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline))
    backbone.to(torch.bfloat16)
    parameters = LoRA(rank=4).attach(backbone.denoiser, "policy")
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters}
    assert {p.dtype for p in trainable} == {torch.float32}
    # to_q, to_k, to_v and to_out of self- and cross-attention, an A and a B each.
    attentions = sum(name.endswith((".attn1", ".attn2")) for name, _ in backbone.denoiser.named_modules())
    assert len(parameters) == attentions * 4 * 2


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 1.0), (3, 3.0)])
def test_round_trip_through_stock_diffusers(tiny_pipeline: Path, tmp_path: Path, rank: int, alpha: float):
    """Alpha other than rank must survive: a reader that assumes alpha = rank would scale the update wrongly."""
    backbone = with_random_lora(tiny_pipeline, rank, alpha)
    backbone.save_lora(tmp_path, "policy")
    expected = predict(backbone)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.load_lora_weights(tmp_path)
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        text = backbone.encode_text(["a red cat", "a house"])["encoder_hidden_states"]
        found = pipe.unet(noisy, torch.tensor([100, 700]), text).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_equal_weights_make_equal_files(tiny_pipeline: Path, tmp_path: Path):
    """PEFT keeps the layers' names in a set, whose order changes from process to process."""
    backbone = load_backbone(str(tiny_pipeline))
    targets = ["to_v", "to_q", "to_out.0", "to_k", "proj_out", "proj_in", "ff.net.2", "conv1"]
    LoRA(rank=2, target_modules=targets).attach(backbone.denoiser, "policy")
    backbone.save_lora(tmp_path, "policy")
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        kept = json.loads(file.metadata()["lora_adapter_metadata"])
    assert kept["unet.target_modules"] == sorted(targets)


def test_scale_zero_is_the_base_and_scale_is_linear_in_the_update(tiny_pipeline: Path, tmp_path: Path):
    with_random_lora(tiny_pipeline).save_lora(tmp_path, "policy")
    base = predict(load_backbone(str(tiny_pipeline)))
    for scale, same in ((0.0, True), (0.5, False), (-1.0, False)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
        load_lora(pipe, tmp_path, scale)
        backbone = load_backbone(str(tiny_pipeline))
        backbone.denoiser = pipe.unet
        found = predict(backbone)
        assert torch.allclose(found, base, rtol=1e-5, atol=1e-6) == same
        layer = adapter_layers(pipe.unet)[0]
        assert layer.scaling["lit_safety"] == pytest.approx(2.0 * scale)  # alpha / rank = 8 / 4


def test_an_adapter_of_another_backbone_is_refused(tiny_pipeline: Path, wide_pipeline: Path, tmp_path: Path):
    with_random_lora(wide_pipeline).save_lora(tmp_path, "policy")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    with pytest.raises(UserError, match=r"another backbone"):
        load_lora(pipe, tmp_path)


def test_missing_and_damaged_files_are_named(tiny_pipeline: Path, tmp_path: Path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    with pytest.raises(UserError, match="no adapter at"):
        load_lora(pipe, tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"not tensors")
    with pytest.raises(UserError, match="readable safetensors"):
        load_lora(pipe, tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="safetensors only"):
        load_lora(pipe, tmp_path / "lora.bin")


def test_targets_that_match_nothing_are_named(tiny_pipeline: Path):
    with pytest.raises(UserError, match="target_modules"):
        LoRA(target_modules=["to_nowhere"]).attach(load_backbone(str(tiny_pipeline)).denoiser, "policy")
