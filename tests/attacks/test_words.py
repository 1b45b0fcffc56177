from pathlib import Path

import pytest
import torch

from lit_safety.attacks.soft_prompt import SoftTokens
from lit_safety.attacks.suffix import shorten_to_fit, suffix_starts, usable_words
from lit_safety.core.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_pipeline: Path):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer")


def test_words_come_back_as_the_tokens_they_are(tokenizer) -> None:
    words = usable_words(tokenizer)
    assert len(words) == len(set(words.texts)) > 5
    numbers = torch.tensor([0, 2, 1])
    ids = tokenizer(f"a {words.say(numbers)}", add_special_tokens=False)["input_ids"]
    assert ids[1:] == words.ids[numbers].tolist()
    assert not set(words.ids.tolist()) & set(tokenizer.all_special_ids)


def test_prompts_lose_last_words_only_where_the_suffix_needs_the_room(tokenizer) -> None:
    """16 tokens; start and end are two, each letter is one: `a red cat and` has 10, `house` is 5 more."""
    kept, cut = shorten_to_fit(tokenizer, ["a red cat and house", "a  cat"], 4)
    assert kept == ["a red cat and", "a  cat"]
    assert cut == 1
    with pytest.raises(UserError, match="lower its length"):
        shorten_to_fit(tokenizer, ["house"], 12)


def test_the_suffix_begins_where_the_end_token_was(tokenizer) -> None:
    places = suffix_starts(tokenizer, ["a cat", "red"])
    assert places.tolist() == [5, 4]
    with_suffix = tokenizer("a cat s")["input_ids"]
    assert tokenizer.decode([with_suffix[5]]).strip() == "s"


def test_words_that_the_text_encoder_was_not_taught_are_left_out(make_target) -> None:
    """Rows of zeros in the token embedding are words that say nothing; a suffix and a soft prompt do without them."""
    network = make_target().network()
    tokenizer, encoder = network.encoders()[0]
    every = usable_words(tokenizer)
    weight = encoder.get_input_embeddings().weight
    gone = every.ids[:3]
    with torch.no_grad():
        weight[gone] = 0.0
    left = usable_words(tokenizer, [encoder])
    assert left.ids.tolist() == [n for n in every.ids.tolist() if n not in gone.tolist()]
    known = weight.detach()[[n for n in range(len(weight)) if n not in gone.tolist()]]
    tokens = SoftTokens(network, 1, 64, seed=0)
    assert torch.allclose(tokens.tables[0].mean(0), known.mean(0), atol=0.1 * 5 * float(known.std(0).max()) / 8)
    assert tokens.scales[0] == pytest.approx(float(known.std(0).mean()))
