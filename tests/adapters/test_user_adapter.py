from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_safety.adapters import LoRA
from lit_safety.adapters.lora import adapter_layers, adapters_off
from lit_safety.adapters.user_attention import UserAdapter, detach
from lit_safety.core.errors import UserError

Make = Callable[..., Any]

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "widths", "attention", "projection"),
    [
        (SD15, [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280], 19_169_280, 2_754_816),
        (SDXL, [640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10, 340_787_200, 7_346_176),
    ],
    ids=["SD1.5", "SDXL"],
)
def test_published_layer_order_and_number_of_parameters(
    config: dict[str, Any], widths: list[int], attention: int, projection: int
):
    """SD1.5: 2 * 768 * sum of 16 widths; projection 3584 * 768 + 768 + 2 * 768. Of Qwen2.5-7B's 3584 numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    adapter = UserAdapter.attach(unet, 3584, tokens=1)
    layers = list(adapter.layers.values())
    assert [layer.to_v_user.out_features for layer in layers] == widths
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == attention
    parts = (adapter.projection.linear, adapter.projection.norm)
    assert sum(p.numel() for part in parts for p in part.parameters()) == projection
    assert next(reversed(adapter.layers)).startswith("mid_block")


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_lora_with_it(make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor, lora_first: bool):
    """Each alone is as without the other, both together are something else, and the LoRA gets the user's gradient."""

    def with_lora(unet: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        for parameter in LoRA(rank=4).attach(unet, "policy"):
            parameter.data.normal_(0, 0.2, generator=generator)

    lora_only, user_only, unet = make_unet(), make_unet(), make_unet()
    with_lora(lora_only)
    tokens = make_adapter(user_only).projection(users)
    if lora_first:
        with_lora(unet)
    adapter = make_adapter(unet)
    if not lora_first:
        with_lora(unet)
    with adapter.off():
        assert torch.equal(call_unet(unet), call_unet(lora_only))
    with adapters_off(adapter_layers(unet)):
        assert torch.equal(call_unet(unet, tokens), call_unet(user_only, tokens))
    both = call_unet(unet, tokens)
    assert (both - call_unet(lora_only)).abs().max() > 1e-3
    assert (both - call_unet(user_only, tokens)).abs().max() > 1e-3
    both.square().mean().backward()
    query = [p.grad for name, p in unet.named_parameters() if "attn2.to_q.lora_B" in name]
    assert query
    assert all((grad != 0).any() for grad in query)


def test_fresh_user_attention_on_a_lora_starts_from_the_base_key(make_unet: Make):
    unet = make_unet()
    LoRA(rank=4).attach(unet, "policy")
    adapter = UserAdapter.attach(unet, 12)
    name, layer = next(iter(adapter.layers.items()))
    assert torch.equal(layer.to_k_user.weight, unet.get_submodule(name).to_k.base_layer.weight)


def test_the_handle_is_found_again_and_taken_out(make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor):
    unet = make_unet()
    before = set(unet.state_dict())
    with pytest.raises(UserError, match="has no user attention"):
        UserAdapter.of(unet)
    adapter = make_adapter(unet)
    found = UserAdapter.of(unet)
    assert found.layers == adapter.layers
    assert found.projection is adapter.projection
    with pytest.raises(UserError, match="has user attention already"):
        UserAdapter.attach(unet, 12)
    detach(unet)
    assert set(unet.state_dict()) == before
    with pytest.raises(UserError, match="has no user attention"):
        UserAdapter.of(unet)


def test_attention_that_was_replaced_is_named(make_unet: Make, make_adapter: Make):
    """Attention slicing puts its own processors in, and the user's bounds would be gone without a word."""
    unet = make_unet()
    make_adapter(unet)
    unet.set_attention_slice("max")
    with pytest.raises(UserError, match=r"down_blocks\.0.*attn2.*Sliced"):
        UserAdapter.of(unet)
    detach(unet)  # what is left of it
    assert set(unet.state_dict()) == set(make_unet().state_dict())


def test_a_checkpoint_of_the_unet_carries_the_adapter(
    make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor
):
    unet = make_unet()
    tokens = make_adapter(unet).projection(users)
    other = make_unet()
    UserAdapter.attach(other, 12).unet.load_state_dict(unet.state_dict())
    assert torch.equal(call_unet(other, UserAdapter.of(other).projection(users)), call_unet(unet, tokens))
