from __future__ import annotations

import json
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.format.sample import PairMetadata, Sides, parse_metadata

FULL: dict[str, Any] = {
    "prompt": "ein Bär, 熊",
    "prompt_kind": "harmful",
    "categories": ["Harrasment", "harassment", "Violence"],
    "concept": "gun",
    "harmful": {"chosen": False, "rejected": None},
    "order": "composite",
    "cost": {"chosen": -1, "rejected": 2.5},
    "score": {"chosen": 0.25, "rejected": 0.5},
    "user_id": "0000001",
    "source": "set, row 3",
    "seed": 7,
}
LEAST: dict[str, Any] = {
    "prompt": "p",
    "prompt_kind": "clean",
    "order": "safety",
    "harmful": {"chosen": None, "rejected": True},
}


def test_a_full_sample_goes_to_json_and_back() -> None:
    parsed = parse_metadata(json.dumps(FULL).encode(), "here")
    assert parsed.categories == ("harassment", "violence")
    assert parsed.harmful == Sides(False, None)
    assert parsed.cost == Sides(-1.0, 2.5)
    assert parse_metadata(parsed.to_json(), "here") == parsed


def test_what_is_left_out_is_not_known() -> None:
    parsed = parse_metadata(LEAST, "here")
    assert parsed == PairMetadata("p", "clean", "safety", harmful=Sides(None, True))
    assert parsed.label == "unknown>harmful"
    assert set(parsed.to_dict()) == {"prompt", "prompt_kind", "order", "categories", "harmful"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt": ""}, "'prompt' must be a non-empty text"),
        ({"prompt": " \n"}, "'prompt' must be a non-empty text"),
        ({"prompt": 3}, "'prompt'"),
        ({"prompt": "a\ud800"}, "'prompt' holds a broken character at 1"),
        ({"prompt_kind": "safe"}, "'prompt_kind' must be one of 'harmful', 'clean', not 'safe'"),
        ({"prompt_kind": ["clean"]}, "'prompt_kind' must be one of"),
        ({"order": None}, "'order' must be one of 'safety', 'quality', 'composite'"),
        ({"categories": "hate"}, "'categories' must be a list"),
        ({"categories": ["hat"]}, "unknown category 'hat'"),
        ({"harmful": {"chosen": 0, "rejected": True}}, "'harmful.chosen' must be true or false"),
        ({"harmful": {"chosen": True}}, "'harmful.rejected' is missing"),
        ({"harmful": None}, "'harmful' must be an object"),
        ({"cost": {"chosen": float("nan"), "rejected": 1}}, "'cost.chosen' must be a finite number, not nan"),
        ({"cost": {"chosen": 10**400, "rejected": 1}}, "'cost.chosen' must be a finite number, not 1000"),
        ({"concept": "a\ud800"}, "'concept' holds a broken character at 1"),
        ({"score": {"chosen": True, "rejected": 1}}, "'score.chosen' must be a finite number, not True"),
        ({"user_id": 1}, "'user_id' must be a text"),
        ({"seed": 1.5}, "'seed' must be a whole number"),
        ({"promt": "x"}, "unknown field 'promt'"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_metadata({**LEAST, **changes}, "shard.tar: sample 'k'")
    assert str(caught.value).startswith("shard.tar: sample 'k': ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b" " * (2 << 20), "over the limit"),
    ],
    ids=["bytes", "cut", "deep", "list", "long"],
)
def test_broken_json_is_one_line(raw: bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_metadata(raw, "here")
