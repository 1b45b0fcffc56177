from dataclasses import replace

import pytest
import torch

from lit_safety.attacks import Reweighted, Weighting
from lit_safety.attacks.reweighted import Weighed
from lit_safety.core.errors import UserError


def encoded(network, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return network.backbone.encode_text(texts)["encoder_hidden_states"]


def test_the_concepts_token_alone_is_scaled_and_other_rows_stay(make_target, rows) -> None:
    """`red gun`: places 1 to 3 are r, e, d, the next g, u, n. The empty and the negative prompt are not touched."""
    network = make_target().network()
    tokenizer = network.encoders()[0][0]
    texts = ["red gun", "", "gun red"]
    before = encoded(network, texts)
    Weighed(Weighting(tokens=3.0, of="concept"), [replace(rows[1], concept="gun")]).put(network)
    after = encoded(network, texts)
    ids = tokenizer(texts[0])["input_ids"]
    word = tokenizer("gun", add_special_tokens=False)["input_ids"]
    start = next(n for n in range(len(ids)) if ids[n : n + len(word)] == word)
    factors = torch.ones(16)
    factors[start : start + len(word)] = 3.0
    assert torch.allclose(after[0], before[0] * factors[:, None])
    assert torch.equal(after[1:], before[1:])
    Weighed(Weighting(tokens=2.0), [rows[1]]).put(network)  # in the place of the one before
    factors = torch.ones(16)
    factors[1 : len(ids) - 1] = 2.0
    assert torch.allclose(encoded(network, texts)[0], before[0] * factors[:, None])


def test_a_layer_without_weight_is_left_out(make_target, rows) -> None:
    """With all layers at 0 the text encoder gives its normalised embeddings; rows of other prompts stay."""
    network = make_target().network()
    encoder = network.encoders()[0][1]
    texts = ["a gun", "a cat"]
    before = encoded(network, texts)
    Weighed(Weighting(layers=0.0), [rows[0]]).put(network)
    after = encoded(network, texts)
    assert torch.equal(after[1], before[1])
    modules = dict(encoder.named_modules())
    embeddings = next(module for name, module in modules.items() if name.endswith("embeddings"))
    norm = next(module for name, module in modules.items() if name.endswith("final_layer_norm"))
    ids = torch.tensor(network.encoders()[0][0](texts[:1], padding="max_length", max_length=16)["input_ids"])
    with torch.no_grad():
        assert torch.allclose(after[0], norm(embeddings(input_ids=ids))[0], atol=1e-6)


def test_prompts_in_a_template_or_cut_short_are_found(make_target, rows) -> None:
    network = make_target().network()
    long = "red gun and a red gun"  # more than 16 places: its end is cut
    before = encoded(network, [long])
    Weighed(Weighting(tokens=2.0), [replace(rows[0], prompt=long)]).put(network)
    after = encoded(network, [long])
    assert torch.allclose(after[0, 1:15], 2 * before[0, 1:15])
    assert torch.equal(after[0, 15], before[0, 15])


def test_bad_input(make_target) -> None:
    with pytest.raises(UserError, match="one of them not 1"):
        Weighting()
    with pytest.raises(UserError, match="at least one"):
        Reweighted([])
    assert Reweighted().points == 12
    assert Reweighted().refuses(make_target()) is None
