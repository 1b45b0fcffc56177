import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from lit_safety.adapters.user_attention import UserAdapter, UserAttention, detach
from lit_safety.core.errors import UserError

Make = Callable[..., Any]


def by_hand(attn: Any, user: UserAttention, x: Tensor, text: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Row by row, head by head, in float64: softmax(q k^T / sqrt d) v over text, plus scale times that over users."""

    def look(q: Tensor, context: Tensor, key: Tensor, value: Tensor) -> Tensor:
        k, v = context @ key.double().T, context @ value.double().T
        width = q.shape[1] // attn.heads
        heads = []
        for i in range(attn.heads):
            part = slice(i * width, (i + 1) * width)
            heads.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1) @ v[:, part])
        return torch.cat(heads, 1)

    rows = []
    for i in range(len(x)):
        q = x[i].double() @ attn.to_q.weight.double().T
        out = look(q, text[i].double(), attn.to_k.weight, attn.to_v.weight)
        out += scale * look(q, tokens[i].double(), user.to_k_user.weight, user.to_v_user.weight)
        rows.append(out @ attn.to_out[0].weight.double().T + attn.to_out[0].bias.double())
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_formula(tokens: int, scale: float):
    """to_out(SDPA(q, Wk T, Wv T) + scale SDPA(q, W'k u, W'v u)), user tokens attended together."""
    torch.manual_seed(0)
    attn = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4).requires_grad_(False)
    user = UserAttention(attn, tokens)
    user.scale = scale
    torch.nn.init.normal_(user.to_k_user.weight)
    torch.nn.init.normal_(user.to_v_user.weight)
    x, text, users = torch.randn(2, 9, 8), torch.randn(2, 5, 6), torch.randn(2, tokens, 6)
    expected = by_hand(attn, user, x, text, users, scale)
    attn.set_processor(user)
    found = attn(x, text, user_tokens=users)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_token_is_the_same_at_every_pixel_and_its_key_is_frozen():
    torch.manual_seed(0)
    attn = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    user = UserAttention(attn, 1)
    assert [name for name, p in user.named_parameters() if p.requires_grad] == ["to_v_user.weight"]
    torch.nn.init.normal_(user.to_v_user.weight)
    x, text = torch.randn(1, 9, 8), torch.randn(1, 5, 6)
    base = attn(x, text)
    attn.set_processor(user)
    added = attn(x, text, user_tokens=torch.randn(1, 1, 6)) - base
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-5)


def test_a_mask_over_the_text_counts_for_the_text_only():
    """The padded text tokens may hold anything; the user is seen all the same."""
    torch.manual_seed(0)
    attn = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    user = UserAttention(attn, 3)
    torch.nn.init.normal_(user.to_v_user.weight)
    attn.set_processor(user)
    x, text, users = torch.randn(1, 9, 8), torch.randn(1, 5, 6), torch.randn(1, 3, 6)
    mask = torch.tensor([[[0.0, 0.0, 0.0, -1e9, -1e9]]])
    masked = attn(x, text, attention_mask=mask, user_tokens=users)
    torch.testing.assert_close(masked, attn(x, text[:, :3], user_tokens=users), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_base_to_the_bit_at_the_start_at_scale_zero_and_off(
    make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor, family: str, tokens: int
):
    base = call_unet(make_unet(family))
    unet = make_unet(family)
    fresh = UserAdapter.attach(unet, 12, tokens)
    assert torch.equal(call_unet(unet, fresh.projection(users)), base)
    detach(fresh.unet)
    assert torch.equal(call_unet(unet), base)
    adapter = make_adapter(unet, tokens)
    adapted = call_unet(unet, adapter.projection(users))
    assert (adapted - base).abs().max() > 1e-3
    with adapter.off():
        assert torch.equal(call_unet(unet), base)
    assert torch.equal(call_unet(unet, adapter.projection(users)), adapted)
    adapter.set_scale(0)
    assert torch.equal(call_unet(unet, adapter.projection(users)), base)


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_base_to_the_bit_under_autocast(make_unet: Make, call_unet: Make, users: Tensor, tokens: int):
    with torch.autocast("cpu", torch.bfloat16):
        base = call_unet(make_unet())
        unet = make_unet()
        fresh = UserAdapter.attach(unet, 12, tokens)
        assert torch.equal(call_unet(unet, fresh.projection(users)), base)


def test_the_key_moves_from_the_second_step_on(make_unet: Make, call_unet: Make, users: Tensor):
    """dL/dW'k is proportional to W'v, which is 0 before the first step only."""
    unet = make_unet()
    adapter = UserAdapter.attach(unet, 12, tokens=4)
    parameters = [p for _, p in adapter.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    largest = []
    for _ in range(2):
        optimizer.zero_grad()
        call_unet(unet, adapter.projection(users)).square().mean().backward()
        keys = [layer.to_k_user.weight.grad for layer in adapter.layers.values()]
        largest.append([float(grad.abs().max()) for grad in keys])
        optimizer.step()
    assert set(largest[0]) == {0.0}
    assert min(largest[1]) > 0.0


def test_what_is_trained_is_fp32_next_to_a_halved_base(make_unet: Make, call_unet: Make, users: Tensor):
    unet = make_unet().to(torch.bfloat16)
    adapter = UserAdapter.attach(unet, 12)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {id(p) for p in trained} == {id(p) for _, p in adapter.named_parameters()}


def test_rows_do_not_see_each_other(make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor):
    """Two rows of two users are what each row is with its user in both places."""
    unet = make_unet()
    adapter = make_adapter(unet)
    tokens = adapter.projection(users)
    both = call_unet(unet, tokens)
    for row in range(2):
        alone = call_unet(unet, tokens[[row, row]])
        torch.testing.assert_close(both[row], alone[row], rtol=1e-5, atol=1e-6)
        assert (both[1 - row] - alone[1 - row]).abs().max() > 1e-4


def test_gradient_checkpointing_gives_the_same_gradients(
    make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor
):
    """What is computed again in the backward pass must see the same users."""
    gradients = []
    for checkpointing in (False, True):
        unet = make_unet()
        adapter = make_adapter(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        call_unet(unet, adapter.projection(users)).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapter.named_parameters()})
    # All known: the null user's gradient is there, and zero.
    assert all((grad != 0).any() for name, grad in gradients[0].items() if "null_tokens" not in name)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-6)


def test_channels_last(make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor):
    unet = make_unet()
    adapter = make_adapter(unet)
    plain = call_unet(unet, adapter.projection(users))
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(call_unet(unet, adapter.projection(users)), plain, rtol=1e-4, atol=1e-5)


def test_no_user_is_an_error_and_so_is_a_wrong_number(make_unet: Make, call_unet: Make, make_adapter: Make):
    unet = make_unet()
    make_adapter(unet)
    with pytest.raises(UserError, match="called without a user"):
        call_unet(unet)
    for shape in ((1, 4, 32), (2, 3, 32)):
        with pytest.raises(UserError, match="one set of tokens"):
            call_unet(unet, torch.zeros(shape))


def test_weights_start_like_the_base_key(make_unet: Make):
    unet = make_unet()
    adapter = UserAdapter.attach(unet, 12)
    for name, layer in adapter.layers.items():
        assert torch.equal(layer.to_k_user.weight, unet.get_submodule(name).to_k.weight)
        assert not layer.to_v_user.weight.any()
        assert layer.to_k_user.weight.data_ptr() != unet.get_submodule(name).to_k.weight.data_ptr()


def test_an_unknown_kind_of_attention_is_named(make_unet: Make):
    from diffusers.models.attention_processor import SlicedAttnProcessor

    unet = make_unet()
    unet.set_attn_processor(SlicedAttnProcessor(1))
    with pytest.raises(UserError, match=r"down_blocks\.0.*attn2 computes its attention by SlicedAttnProcessor"):
        UserAdapter.attach(unet, 12)
    with pytest.raises(UserError, match="no cross-attention layer"):
        UserAdapter.attach(SimpleNamespace(attn_processors={}), 12)
