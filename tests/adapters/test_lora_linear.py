"""Our forward of PEFT's LoRA linear layer: PEFT's values, fewer kernels, and PEFT's own code where it is not simple."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lit_safety.adapters import LoRA
from lit_safety.adapters.lora import adapter_layers, adapters_off
from lit_safety.adapters.lora_linear import LoRALinear, use_own_forward
from lit_safety.backbones import load_backbone
from tests.helpers.documents import ROOT

KINDS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "autocast": torch.float32}
TOLERANCE = {"fp32": 0.0, "fp64": 1e-12, "bf16": 0.02, "autocast": 0.02}


def pair_of_layers(kind: str, bias: bool = True, **config: Any) -> tuple[Any, Any]:
    """The same layer with random weights, by PEFT's forward and by ours."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40, bias=bias)).requires_grad_(False)
    settings = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, **config}
    inject_adapter_in_model(LoraConfig(target_modules=["0"], **settings), net, "policy")
    net.to(KINDS[kind])
    net[0].cast_input_dtype_enabled = False  # type: ignore[assignment]
    own = copy.deepcopy(net)
    use_own_forward(own)
    assert type(own[0]) is LoRALinear
    return net, own


def outcome(net: Any, kind: str) -> list[Tensor]:
    """Output and all gradients, of the same input each time."""
    torch.manual_seed(1)
    net.zero_grad()
    x = torch.randn(2, 7, 24).to(KINDS[kind]).requires_grad_()
    toward = torch.randn(2, 7, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = net(x)
    found.backward(toward.to(found.dtype))
    assert x.grad is not None
    return [found.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("bias", "alpha"), [(True, 4), (False, 6)])
def test_values_and_gradients_are_those_of_pefts_forward(kind: str, bias: bool, alpha: int):
    """In fp32 on a CPU to the bit, so that a run of before can be repeated."""
    found = [outcome(net, kind) for net in pair_of_layers(kind, bias, lora_alpha=alpha)]
    assert len(found[0]) == len(found[1]) == 4
    for expected, ours in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours - expected).abs().max() <= TOLERANCE[kind] * expected.abs().max()


def test_in_bf16_it_is_nearer_to_the_exact_sum_than_peft():
    """The update is added before it is rounded."""
    exact = outcome(pair_of_layers("bf16")[0].double(), "fp64")
    peft, own = (
        torch.stack([(one.double() - true).norm() for one, true in zip(outcome(net, "bf16"), exact, strict=True)])
        for net in pair_of_layers("bf16")
    )
    assert own[0] < peft[0]


def with_second_adapter(net: Any) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), net, "second")
    net[0].set_adapter(["policy", "second"])


def with_hook(net: Any) -> None:
    net[0].lora_A["policy"].register_forward_hook(lambda _, given, found: 2 * found)


def with_base_hook(net: Any) -> None:
    net[0].base_layer.register_forward_hook(lambda _, given, found: found + 1)


def with_dropout(net: Any) -> None:
    net[0].lora_dropout["policy"] = nn.Dropout(1.0)


def merged(net: Any) -> None:
    net[0].merge()


def with_trained_base(net: Any) -> None:
    net[0].base_layer.weight.requires_grad_(True)


def with_replaced_base_forward(net: Any) -> None:
    base = net[0].base_layer
    base.forward = lambda x: 3 * nn.Linear.forward(base, x)


CHANGES = (
    with_second_adapter,
    with_hook,
    with_base_hook,
    with_dropout,
    merged,
    with_trained_base,
    with_replaced_base_forward,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_simple_is_left_to_peft(change: Any):
    found = []
    for net in pair_of_layers("fp32"):
        before = outcome(net, "fp32")[0]
        torch.manual_seed(2)
        change(net)
        found.append(outcome(net, "fp32"))
        if change is not with_trained_base and change is not merged:
            assert not torch.allclose(found[-1][0], before), "the change has no effect: the test would show nothing"
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_variants_of_lora_keep_their_values(options: dict[str, bool]):
    found = [outcome(net, "fp32") for net in pair_of_layers("fp32", **options)]
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_weights_that_are_quantised_or_cut_over_ranks_compute_by_peft():
    """torchao's weights are tensors of a class of their own, as this one is; those of ZeRO 3 are empty between uses."""
    from torch.testing._internal.two_tensor import TwoTensor

    layer = pair_of_layers("fp32")[1][0]
    assert layer._simple() == "policy"
    whole = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(TwoTensor(whole.data, whole.data), requires_grad=False)
    assert layer._simple() is None
    layer.base_layer.weight = whole
    layer.lora_A["policy"].weight.ds_id = 3
    assert layer._simple() is None


def test_off_and_on_again():
    net = pair_of_layers("fp32")[1]
    base = net[0].base_layer
    x = torch.randn(3, 24)
    adapted = net(x)
    with adapters_off(adapter_layers(net)):
        assert torch.equal(net(x), base(x))
    assert torch.equal(net(x), adapted)
    assert not torch.allclose(adapted, base(x))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_network_trains_as_by_peft(tiny_pipeline: Path, half: bool, checkpointing: bool):
    found: list[list[Tensor]] = []
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    for forward in ("peft", "own"):
        unet: Any = load_backbone(str(tiny_pipeline)).denoiser
        torch.manual_seed(0)
        parameters = LoRA(4, 8.0, layers, forward=forward).attach(unet, "policy")  # type: ignore[arg-type]
        kinds = {type(layer) for layer in adapter_layers(unet)}
        assert (LoRALinear in kinds) is (forward == "own")
        for parameter in parameters:
            parameter.data.normal_(0, 0.1)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        width = unet.config.cross_attention_dim
        noisy, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, width)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            sample = unet(noisy, torch.tensor([100, 700]), words).sample
        sample.float().square().sum().backward()
        found.append([sample, *(p.grad for p in parameters if p.grad is not None)])
        assert len(found[-1]) == len(parameters) + 1
    for expected, ours in zip(*found, strict=True):
        if half:
            assert (ours - expected).norm() <= 0.1 * expected.norm()
        else:
            assert torch.equal(ours, expected)


def test_names_and_files_are_pefts(tiny_pipeline: Path, tmp_path: Path):
    names = []
    for forward in ("peft", "own"):
        backbone = load_backbone(str(tiny_pipeline))
        LoRA(2, forward=forward).attach(backbone.denoiser, "policy")  # type: ignore[arg-type]
        names.append(list(backbone.denoiser.state_dict()))
        backbone.save_lora(tmp_path / forward, "policy")
    assert names[0] == names[1]
    assert len({file.stat().st_size for file in tmp_path.rglob("*.safetensors")}) == 1


def test_it_compiles_to_one_graph_and_stays():
    """Policy and reference are a graph each, forward; a second step compiles nothing."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    net = pair_of_layers("fp32")[1]
    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(net, backend=counter, fullgraph=True)
    expected = outcome(net, "fp32")
    counts = []
    for _ in range(3):
        for ours, true in zip(outcome(compiled, "fp32"), expected, strict=True):
            torch.testing.assert_close(ours, true)
        with torch.no_grad(), adapters_off(adapter_layers(net)):
            compiled(torch.randn(2, 7, 24))
        counts.append(counter.frame_count)
    assert counts == [2, 2, 2]
    torch._dynamo.reset()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kernel_counts

    return kernel_counts


def test_kernels_of_a_layer(kernels: Any):
    """Outside of products: casts of x, A, B and of their gradients; PEFT casts x twice, writes sums and scales them."""
    counts, moved = [], []
    for net in pair_of_layers("fp32"):
        x, toward = torch.randn(64, 24, requires_grad=True), torch.randn(64, 40).bfloat16()
        net[0].base_layer.to(torch.bfloat16)
        with kernels.counting() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                found = net(x)
            torch.autograd.backward(found, toward)
        counts.append(counter.outside()[0])
        moved.append(counter.outside()[1])
    assert counts[1] == 6
    assert counts[0] >= 10
    assert moved[1] < 0.6 * moved[0]


def test_kernels_of_stable_diffusion(kernels: Any):
    """SD1.5 at 512 pixels, bf16 autocast, one image forward and backward, the layers of `configs/scdpo.yaml`."""
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    counted, gigabytes = kernels.denoiser_pass("sd15", "full", 512, LoRA(16, 16, layers)).outside()
    assert 1300 < counted <= 2500
    assert 7 < gigabytes <= 9
