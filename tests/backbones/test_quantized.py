"""A frozen base in 8 bits with a LoRA in float32 on top; what is missing or cannot be is refused in one line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_safety.__main__ import main
from lit_safety.adapters.lora import LoRA
from lit_safety.backbones import FlowSettings, GuidedFlowSettings, load_backbone
from lit_safety.backbones.lowered import is_quantized, lower_frozen
from lit_safety.core.errors import UserError
from lit_safety.modules import SCDPO
from tests.helpers.flow_pipelines import save_flow
from tests.helpers.small_fits import small_fit

WORDS = "model.init_args.backbone"
CALLBACKS = "[{class_path: lit_safety.callbacks.ExportAdapter}]"
#: It is not a dependency: the tests that need it run only if it is installed.
NEEDS_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flow("flux", tmp_path_factory.mktemp("flow") / "flux")


@pytest.mark.parametrize("kind", ["torchao_8bit", "bitsandbytes_8bit", "bitsandbytes_4bit"])
def test_a_package_that_is_missing_is_named(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lit_safety.backbones.lowered.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"denoiser_quantization: {kind}.*pip install {kind.partition('_')[0]}"):
        load_backbone(str(folder), settings=GuidedFlowSettings(denoiser_quantization=kind))  # type: ignore[arg-type]
    load_backbone(str(folder), False, settings=GuidedFlowSettings(denoiser_quantization=kind))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bitsandbytes_without_a_gpu_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lit_safety.backbones.lowered.find_spec", lambda name: name)
    with pytest.raises(UserError, match="needs a GPU"):
        load_backbone(str(folder), settings=GuidedFlowSettings(denoiser_quantization="bitsandbytes_4bit"))


def test_what_is_trained_whole_or_cut_is_not_quantized(folder: Path):
    settings = GuidedFlowSettings(denoiser_quantization="torchao_8bit")
    with pytest.raises(UserError, match=r"denoiser_quantization.*policy"):
        SCDPO(str(folder), policy="full", backbone=settings)


def test_weights_in_bytes_are_left_as_they_are():
    """As bitsandbytes keeps them: whoever lowers frozen weights must not read bytes as numbers."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    network[1].weight = torch.nn.Parameter(torch.ones(8, 1, dtype=torch.uint8), requires_grad=False)
    lower_frozen(network, torch.bfloat16)
    assert network[0].weight.dtype is torch.bfloat16
    assert network[1].weight.dtype is torch.uint8
    assert is_quantized(network[1].weight)
    assert not is_quantized(network[0].weight)


@pytest.fixture
def module(folder: Path) -> SCDPO:
    settings = GuidedFlowSettings(denoiser_quantization="torchao_8bit", denoiser_dtype="bfloat16")
    made = SCDPO(str(folder), lora=LoRA(rank=2), backbone=settings)
    torch.manual_seed(0)
    made.configure_model()
    return made


@NEEDS_TORCHAO
def test_the_base_is_in_8_bits_and_the_lora_in_float32(module: SCDPO, folder: Path):
    layers = dict(module.backbone.denoiser.named_modules())
    layer = layers["transformer_blocks.0.attn.to_q"]
    assert is_quantized(layer.base_layer.weight)  # type: ignore[union-attr, arg-type]
    kinds = {p.dtype for _, p in module.trainable_parameters()}
    assert kinds == {torch.float32}
    whole = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    found = layer.base_layer.weight.dequantize().float()  # type: ignore[union-attr, operator]
    true = whole["transformer_blocks.0.attn.to_q.weight"]
    assert (found - true).abs().max() < 0.02 * true.abs().max()
    assert not torch.equal(found, true)


@NEEDS_TORCHAO
def test_gradients_reach_the_lora_and_the_reference_is_the_same_function(module: SCDPO):
    noisy, t = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 900.0])
    text = module.encode_text(["a red cat", "a gun"])
    with torch.no_grad(), module.reference():
        reference = module.backbone.predict(noisy, t, text)
    policy = module.backbone.predict(noisy, t, text)
    assert torch.equal(policy, reference)
    policy.square().mean().backward()
    gradients = {name: p.grad for name, p in module.trainable_parameters() if ".lora_B." in name}
    assert all(one is not None and bool(one.isfinite().all()) for one in gradients.values())
    assert all(float(one.abs().max()) > 0 for one in gradients.values() if one is not None)


@NEEDS_TORCHAO
def test_ddp_leaves_the_base_alone(module: SCDPO):
    """It sends all weights at its start, which these cannot be."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(module)
        left = wrapped.parameters_to_ignore
        assert "backbone.denoiser.transformer_blocks.0.attn.to_q.base_layer.weight" in left
        assert not any(".lora_" in name for name in left)
    finally:
        dist.destroy_process_group()


@NEEDS_TORCHAO
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_exports_what_the_whole_model_loads(
    precision: str, folder: Path, pair_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from diffusers import DiffusionPipeline

    overlay = tmp_path / "family.yaml"
    overlay.write_text("model: {init_args: {lora: {init_args: {target_modules: null}}}}")
    settings = {
        "model.init_args.pretrained": folder, "data.init_args.resolution": 32, "trainer.max_steps": 2,
        "model.init_args.drawing.resolution": 32, "trainer.limit_val_batches": 1, "trainer.precision": precision,
        "trainer.val_check_interval": 2, "trainer.callbacks": CALLBACKS,
        WORDS: "lit_safety.backbones.GuidedFlowSettings",
        f"{WORDS}.init_args.denoiser_quantization": "torchao_8bit",
        f"{WORDS}.init_args.denoiser_dtype": "float32" if precision == "32-true" else "bfloat16",
    }  # fmt: skip
    arguments = small_fit("fit", ["scdpo.yaml", str(overlay)], tmp_path / "runs", pair_shards, settings)
    assert main(arguments) == 0, capsys.readouterr().err
    adapter = tmp_path / "runs" / "scdpo" / "latest" / "adapter"
    trained = load_file(adapter / "pytorch_lora_weights.safetensors")
    assert {one.dtype for one in trained.values()} == {torch.float32}
    assert max(float(one.abs().max()) for key, one in trained.items() if ".lora_B." in key) > 0
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(adapter)
    held = [key for key in pipe.transformer.state_dict() if ".lora_" in key]
    assert len(held) == len(trained)


def test_a_reference_cache_of_the_whole_model_is_not_taken():
    """Its errors are those of another function."""
    from lit_safety.modules.checks import _changed

    assert _changed(FlowSettings(denoiser_quantization="torchao_8bit"), FlowSettings()) == ["denoiser_quantization"]
    assert _changed(FlowSettings(denoiser_dtype="bfloat16"), FlowSettings()) == []
