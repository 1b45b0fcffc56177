"""Adapters of the published layout, against the published arithmetic written down again."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import layer_norm

from lit_safety.adapters.user_attention import UserAdapter
from lit_safety.adapters.user_file import load_user_adapter, save_published, to_published
from lit_safety.core.errors import UserError

Make = Callable[..., Any]
#: Widths of the tiny UNets' cross-attention layers: down, up, middle.
WIDTHS = {"sd": [8, 16, 16, 16, 8, 8, 24], "sdxl": [16] + [24] * 2 + [24] * 4 + [16] * 2 + [24] * 2}
USER = 12


def published(family: str, context: int = 32) -> dict[str, dict[str, Tensor]]:
    """A random checkpoint as the published trainer saves it; nothing of ours has a hand in it."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    layers = {}
    for index, width in enumerate(WIDTHS[family]):
        layers[f"{index}.to_k_user.0.weight"] = draw(width, context)
        layers[f"{index}.to_v_user.0.weight"] = draw(width, context)
    proj = {"proj.weight": draw(context, USER), "proj.bias": draw(context)}
    return {"psa_adapter": layers, "user_proj": proj | {"norm.weight": 1 + draw(context), "norm.bias": draw(context)}}


class Reference:
    """One layer of the published arithmetic, by softmax written out; `user` is (B, 1, d_ctx) and always there."""

    def __init__(self, weights: dict[str, Tensor], index: int, user: Tensor) -> None:
        self.key, self.value = (weights[f"{index}.to_{side}_user.0.weight"] for side in "kv")
        self.user = user

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.reshape(len(x), x.shape[1], attn.heads, -1).permute(0, 2, 1, 3)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1)
            return (weights @ v).permute(0, 2, 1, 3).flatten(2)

        q = split(attn.to_q(hidden_states))
        text = attend(q, split(attn.to_k(encoder_hidden_states)), split(attn.to_v(encoder_hidden_states)))
        user = attend(q, split(self.user @ self.key.T), split(self.user @ self.value.T))
        return attn.to_out[0](text + 1.0 * user)


def reference(unet: Any, checkpoint: dict[str, dict[str, Tensor]], embeddings: Tensor) -> Any:
    """`unet` with the published arithmetic in place of its cross-attention, for these users."""
    p = checkpoint["user_proj"]
    tokens = embeddings @ p["proj.weight"].T + p["proj.bias"]
    tokens = layer_norm(tokens, tokens.shape[1:], p["norm.weight"], p["norm.bias"])[:, None]
    index = 0
    for name in unet.attn_processors:
        if "attn1" not in name:
            layer = Reference(checkpoint["psa_adapter"], index, tokens)
            unet.get_submodule(name.removesuffix(".processor")).set_processor(layer)
            index += 1
    assert index == len(WIDTHS[unet_family(unet)])
    return unet


def unet_family(unet: Any) -> str:
    return "sdxl" if unet.config.addition_embed_type else "sd"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("alias", ["psa_adapter", "user_adapter"])
def test_the_published_arithmetic(
    make_unet: Make, call_unet: Make, users: Tensor, tmp_path: Path, family: str, kind: str, alias: str
):
    """The prediction with a loaded file is the published one to 1e-5 in fp32, for users and for the zero vector."""
    checkpoint = published(family)
    embeddings = torch.stack([users[0], torch.zeros(USER)])
    expected = call_unet(reference(make_unet(family), checkpoint, embeddings))
    renamed = {alias: checkpoint["psa_adapter"], "user_proj": checkpoint["user_proj"]}
    file = tmp_path / f"psa_adapter.{kind}"
    if kind == "bin":
        torch.save(renamed, file)
    else:
        save_file({f"{part}.{name}": t for part, entries in renamed.items() for name, t in entries.items()}, file)
    unet = make_unet(family)
    adapter = load_user_adapter(unet, tmp_path)
    found = call_unet(unet, adapter.projection(embeddings))
    assert (found - call_unet(make_unet(family))).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The published null user is the zero vector.
    null = adapter.projection(embeddings, torch.tensor([True, False]))
    torch.testing.assert_close(call_unet(unet, null), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_what_is_read_is_written_back(make_unet: Make, tmp_path: Path, kind: str):
    checkpoint = published("sd")
    torch.save(checkpoint, tmp_path / "psa_adapter.bin")
    adapter = load_user_adapter(make_unet(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost
        file = save_published(adapter, tmp_path / f"again.{kind}")
    if kind == "bin":
        again = torch.load(file, weights_only=True)
        assert {part: list(entries) for part, entries in again.items()} == {
            part: list(entries) for part, entries in checkpoint.items()
        }
        again = {f"{part}.{name}": t for part, entries in again.items() for name, t in entries.items()}
    else:
        again = load_file(file)
    for part, entries in checkpoint.items():
        for name, tensor in entries.items():
            assert torch.equal(again[f"{part}.{name}"], tensor)


def test_standardisation_is_folded_in_and_the_loss_of_the_null_user_is_said(
    make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor, tmp_path: Path
):
    """W ((e - mean) / std) + b = (W / std) e + (b - W (mean / std)): raw embeddings give the same images."""
    unet = make_unet()
    adapter = make_adapter(unet, tokens=1)
    expected = call_unet(unet, adapter.projection(users))
    with pytest.warns(UserWarning, match="null user"):
        save_published(adapter, tmp_path / "psa_adapter.bin")
    found = call_unet(reference(make_unet(), torch.load(tmp_path / "psa_adapter.bin", weights_only=True), users))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "pt"])
def test_of_four_published_tokens_the_first_is_loaded(
    make_unet: Make, call_unet: Make, users: Tensor, tmp_path: Path, kind: str
):
    """proj has 4 * d_ctx rows; the published attention of such a file has one key and value, of the first token."""
    checkpoint = published("sd")
    generator = torch.Generator().manual_seed(9)
    expected = call_unet(reference(make_unet(), checkpoint, users[:2]))
    of_four = dict(checkpoint["user_proj"])
    for name, tensor in (("proj.weight", (96, USER)), ("proj.bias", (96,))):
        of_four[name] = torch.cat([of_four[name], torch.randn(*tensor, generator=generator)])
    file, parts = tmp_path / f"psa_adapter.{kind}", {**checkpoint, "user_proj": of_four}
    if kind == "safetensors":
        save_file({f"{part}.{name}": t for part, entries in parts.items() for name, t in entries.items()}, file)
    else:
        torch.save(parts, file)
    unet = make_unet()
    with pytest.warns(UserWarning, match="4 user tokens"):
        adapter = load_user_adapter(unet, file)
    assert adapter.projection.tokens == 1
    found = call_unet(unet, adapter.projection(users[:2]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_more_than_one_token_cannot_be_written(make_unet: Make):
    with pytest.raises(UserError, match="this adapter has 4"):
        to_published(UserAdapter.attach(make_unet(), USER, tokens=4))


def test_missing_and_superfluous_layers_are_named(make_unet: Make, tmp_path: Path):
    file = tmp_path / "psa_adapter.bin"

    def refuse(match: str, unet: Any = None, **changes: Any) -> None:
        checkpoint = published("sd")
        for name, value in changes.items():
            part, _, entry = name.partition("__")
            if value is None:
                del checkpoint[part][entry]
            else:
                checkpoint.setdefault(part, {})[entry] = value
        torch.save(checkpoint, file)
        unet = unet if unet is not None else make_unet()
        with pytest.raises(UserError, match=match):
            load_user_adapter(unet, file)
        assert not hasattr(unet, "user_projection")

    name = "6.to_v_user.0.weight"
    refuse(r"psa_adapter\.6\.to_v_user\.0\.weight is missing, which is for mid_block", **{f"psa_adapter__{name}": None})
    refuse(r"8, 31\), this model's layer \(8, 32\)", **{"psa_adapter__0.to_k_user.0.weight": torch.zeros(8, 31)})
    refuse(r"more than one user token", **{"psa_adapter__0.to_k_user.1.weight": torch.zeros(8, 32)})
    both = {f"user_adapter__{n}": t for n, t in published("sd")["psa_adapter"].items()}
    refuse("psa_adapter and user_adapter", **both)
    refuse(r"user_proj\.x is not of this layout", user_proj__x=torch.zeros(1))
    refuse(r"user_proj\.norm\.bias is missing", **{"user_proj__norm.bias": None})
    refuse(r"linear\.weight has shape \(64, 12\)", **{"user_proj__proj.weight": torch.zeros(64, USER)})
    rows = {"user_proj__proj.weight": torch.zeros(80, USER), "user_proj__proj.bias": torch.zeros(80)}
    refuse(r"linear\.weight has shape \(80, 12\)", **rows)
    refuse("not finite", **{"user_proj__norm.weight": torch.full((32,), float("nan"))})
    refuse(r"down_blocks\.0.*this model's layer \(8, 16\)", unet=make_unet(context=16))
    refuse(r"psa_adapter\.7\.to_k_user\.0\.weight is missing, which is for up_blocks\.1", unet=make_unet("sdxl"))
