"""A LoRA that lives in a user adapter's file: drawn with, switched off, fused and taken out together with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_safety.adapters import LoRA, load_lora, load_psa, unload_psa
from lit_safety.adapters.lora import WEIGHTS_NAME as LORA_NAME
from lit_safety.adapters.user_attention import UserAdapter, user_arguments
from lit_safety.adapters.user_file import WEIGHTS_NAME, fill_user_adapter, save_user_adapter
from lit_safety.adapters.user_lora import ADAPTER
from lit_safety.core.errors import UserError

TARGETS = ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv2"]


@pytest.fixture
def load(tiny_pipeline: Path) -> Callable[[], Any]:
    def make() -> Any:
        pipe: Any = DiffusionPipeline.from_pretrained(tiny_pipeline)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def trained(load: Callable[[], Any]) -> UserAdapter:
    """User attention and a LoRA of rank 2 and alpha 6 next to it, of random weights, as PSA has them in training."""
    torch.manual_seed(5)
    unet = load().unet
    LoRA(2, 6.0, TARGETS).attach(unet, "policy")
    adapter = UserAdapter.attach(unet, 3, 2)
    for name, parameter in unet.named_parameters():
        if ".policy." in name:
            parameter.data.normal_(0, 0.2)
    for _, parameter in adapter.named_parameters():
        parameter.data.normal_(0, 0.2)
    return adapter


@pytest.fixture
def folder(trained: UserAdapter, tmp_path: Path) -> Path:
    save_user_adapter(trained, tmp_path / "psa", "tiny", "policy")
    return tmp_path / "psa"


@pytest.fixture
def other(load: Callable[[], Any], tmp_path: Path) -> Path:
    """Somebody else's LoRA, on other layers too."""
    from peft import get_peft_model_state_dict

    torch.manual_seed(6)
    pipe = load()
    LoRA(2, None, ["to_k", "to_q"]).attach(pipe.unet, "other")
    for name, parameter in pipe.unet.named_parameters():
        if ".other." in name:
            parameter.data.normal_(0, 0.2)
    layers = get_peft_model_state_dict(pipe.unet, adapter_name="other")
    pipe.save_lora_weights(tmp_path / "other", unet_lora_layers=layers)
    assert (tmp_path / "other" / LORA_NAME).is_file()
    return tmp_path / "other"


def predict(unet: Any, tokens: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = unet.config
    noisy = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(noisy, 3, text, **({} if tokens is None else user_arguments(tokens))).sample


def tokens_of(unet: Any) -> Tensor:
    with torch.no_grad():
        return UserAdapter.of(unet).projection(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]))


def test_what_was_trained_is_what_is_drawn(load: Callable[[], Any], trained: UserAdapter, folder: Path):
    pipe = load()
    load_psa(pipe, folder)
    expected = predict(trained.unet, tokens_of(trained.unet))
    assert torch.equal(predict(pipe.unet, tokens_of(pipe.unet)), expected)
    assert not any(parameter.requires_grad for name, parameter in pipe.unet.named_parameters() if "lora_" in name)


def test_scale_0_and_unloading_are_the_base_to_the_bit(load: Callable[[], Any], folder: Path):
    pipe = load()
    base = predict(pipe.unet)
    load_psa(pipe, folder, scale=0.0)
    assert torch.equal(predict(pipe.unet, tokens_of(pipe.unet)), base)
    load_psa(pipe, folder)
    assert not torch.allclose(predict(pipe.unet, tokens_of(pipe.unet)), base)
    unload_psa(pipe)
    assert torch.equal(predict(pipe.unet), base)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


@pytest.mark.parametrize("first", ["lora", "psa"])
def test_somebody_elses_lora_counts_next_to_it(load: Callable[[], Any], folder: Path, other: Path, first: str):
    """In either order of loading, fused or not, the same image; and one that either alone does not give."""
    pipe = load()
    for step in ("lora", "psa") if first == "lora" else ("psa", "lora"):
        load_psa(pipe, folder) if step == "psa" else load_lora(pipe, other)
    both = predict(pipe.unet, tokens_of(pipe.unet))
    reference = load()
    load_psa(reference, folder)
    alone = predict(reference.unet, tokens_of(reference.unet))
    load_lora(reference, other, scale=0.5)
    assert not torch.allclose(both, alone, atol=1e-4)
    assert not torch.allclose(both, predict(reference.unet, tokens_of(reference.unet)), atol=1e-4)
    pipe.fuse_lora()
    torch.testing.assert_close(predict(pipe.unet, tokens_of(pipe.unet)), both, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="is fused"):
        unload_psa(pipe)
    pipe.unfuse_lora()
    unload_psa(pipe)
    only_other = load()
    load_lora(only_other, other)
    torch.testing.assert_close(predict(pipe.unet), predict(only_other.unet), atol=1e-4, rtol=1e-4)


def test_nothing_is_drawn_where_it_does_not_count(load: Callable[[], Any], folder: Path, other: Path):
    pipe = load()
    load_psa(pipe, folder)
    load_lora(pipe, other, name="style")
    pipe.set_adapters(["style"])
    with pytest.raises(UserError, match=f"LoRA is not active.*'{ADAPTER}' among"):
        pipe("a cat", num_inference_steps=1, height=32, width=32)
    pipe.set_adapters(["style", ADAPTER])
    pipe("a cat", num_inference_steps=1, height=32, width=32)
    pipe.disable_lora()
    with pytest.raises(UserError, match="LoRA is not active"):
        pipe("a cat", num_inference_steps=1, height=32, width=32)
    fused = load()
    load_lora(fused, other)
    fused.fuse_lora()
    with pytest.raises(UserError, match="fused into this pipeline"):
        load_psa(fused, folder)


def test_training_goes_on_from_the_file(load: Callable[[], Any], trained: UserAdapter, folder: Path):
    unet = load().unet
    lora = LoRA(2, 6.0, TARGETS)
    lora.attach(unet, "policy")
    adapter = UserAdapter.attach(unet, 3, 2)
    fill_user_adapter(adapter, folder, lora)
    assert torch.equal(predict(unet, tokens_of(unet)), predict(trained.unet, tokens_of(trained.unet)))
    for wrong, match in ((None, "has a LoRA of rank 2 and alpha 6"), (LoRA(2, 2.0, TARGETS), "alpha 6")):
        with pytest.raises(UserError, match=match):
            fill_user_adapter(adapter, folder, wrong)
    fresh = load().unet
    less = LoRA(2, 6.0, TARGETS[:2])
    less.attach(fresh, "policy")
    with pytest.raises(UserError, match="other layers"):
        fill_user_adapter(UserAdapter.attach(fresh, 3, 2), folder, less)


def damaged(folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    file = folder / WEIGHTS_NAME
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
        metadata = dict(handle.metadata())
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def first(tensors: dict[str, Tensor], side: str = "lora_A") -> str:
    return min(name for name in tensors if side in name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, m: t.pop(first(t)), "is missing; is the file complete"),
        (lambda t, m: t[first(t)].fill_(float("nan")), "not finite"),
        (lambda t, m: t.update({first(t): torch.zeros(3, 4)}), "another backbone"),
        (
            lambda t, m: t.update({"lora.nowhere.lora_A.weight": torch.zeros(2, 4)}),
            "a linear or conv",
        ),
        (
            lambda t, m: m.update(lit_safety_user_adapter=m["lit_safety_user_adapter"].replace('"alpha"', '"a"')),
            "alpha",
        ),
        (lambda t, m: [t.pop(name) for name in list(t) if name.startswith("lora.")], "no weights"),
    ],
)
def test_a_damaged_file_is_refused_and_the_pipeline_stays(
    load: Callable[[], Any], folder: Path, change: Any, match: str
):
    pipe = load()
    base = predict(pipe.unet)
    damaged(folder, change)
    with pytest.raises(UserError, match=match):
        load_psa(pipe, folder)
    assert torch.equal(predict(pipe.unet), base)
