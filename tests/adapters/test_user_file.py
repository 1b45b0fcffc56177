import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_safety.adapters.user_file import METADATA_KEY, WEIGHTS_NAME, load_user_adapter, save_user_adapter
from lit_safety.core.errors import UserError

Make = Callable[..., Any]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_round_trip_to_the_bit(
    make_unet: Make, call_unet: Make, make_adapter: Make, users: Tensor, tmp_path: Path, family: str, tokens: int
):
    """Weights, statistics and null user: both rows, one of them unknown, are drawn alike."""
    unet = make_unet(family)
    adapter = make_adapter(unet, tokens)
    known = torch.tensor([True, False])
    expected = call_unet(unet, adapter.projection(users, known))
    save_user_adapter(adapter, tmp_path, base_model="some/model")
    other = make_unet(family)
    found = load_user_adapter(other, tmp_path)
    assert torch.equal(call_unet(other, found.projection(users, known)), expected)
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as handle:
        about = json.loads(handle.metadata()[METADATA_KEY])
    assert about == {
        "format_version": 1, "base_model": "some/model", "tokens": tokens, "embedding_dim": 12, "context_dim": 32,
    }  # fmt: skip


def test_our_file_goes_before_a_published_one(make_unet: Make, make_adapter: Make, tmp_path: Path):
    save_user_adapter(make_adapter(make_unet()), tmp_path, "x")
    (tmp_path / "psa_adapter.bin").write_bytes(b"damaged")
    assert load_user_adapter(make_unet(), tmp_path).projection.tokens == 4


def test_bad_files_are_named_with_the_layer(make_unet: Make, make_adapter: Make, tmp_path: Path):
    file = save_user_adapter(make_adapter(make_unet()), tmp_path, "some/model")
    tensors = load_file(file)
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    about = json.loads(metadata[METADATA_KEY])

    def refuse(match: str, changes: dict[str, Tensor | None], unet: Any = None, **other: Any) -> None:
        changed = {name: t for name, t in (tensors | changes).items() if t is not None}
        save_file(changed, file, {METADATA_KEY: json.dumps(about | other)})
        unet = unet if unet is not None else make_unet()
        with pytest.raises(UserError, match=match):
            load_user_adapter(unet, tmp_path)
        assert not hasattr(unet, "user_projection")

    layer = "layers.mid_block.attentions.0.transformer_blocks.0.attn2.to_v_user.weight"
    assert layer in tensors
    refuse(r"mid_block.*to_v_user\.weight is missing", {layer: None})
    refuse(r"mid_block.*to_v_user\.weight has shape \(24, 31\)", {layer: torch.zeros(24, 31)})
    refuse(r"mid_block.*to_v_user\.weight holds numbers that are not finite", {layer: tensors[layer] * float("inf")})
    refuse(r"this model lacks layers\.x", {"layers.x": torch.zeros(1)})
    refuse("not above 0", {"projection.std": torch.zeros(12)})
    refuse("weight of the user projection", {"projection.linear.weight": None})
    refuse(r"linear\.weight has shape \(128, 12\), this model's layer \(64, 12\)", {}, tokens=2)
    refuse(r"\(some/model\): its context is 32 wide, this model's 16", {}, unet=make_unet(context=16))
    refuse(r"down_blocks\.2.*is missing", {}, unet=make_unet("sdxl"))
    refuse("format version 3 is not known", {}, format_version=3)
    refuse("must be whole numbers", {}, tokens="4")
    save_file(tensors, file)
    with pytest.raises(UserError, match="is not a user adapter"):
        load_user_adapter(make_unet(), file)
    file.unlink()
    with pytest.raises(UserError, match=r"no user adapter at .*user_adapter\.safetensors, psa_adapter"):
        load_user_adapter(make_unet(), tmp_path)


def test_weights_that_are_not_finite_or_gathered_are_not_written(make_unet: Make, make_adapter: Make, tmp_path: Path):
    adapter = make_adapter(make_unet())
    adapter.projection.null_tokens.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"projection\.null_tokens is empty or holds"):
        save_user_adapter(adapter, tmp_path, "x")
    adapter.projection.null_tokens.data = torch.empty(0)
    with pytest.raises(UserError, match=r"projection\.null_tokens is empty or holds"):
        save_user_adapter(adapter, tmp_path, "x")
    assert not list(tmp_path.iterdir())
