from collections import Counter

import numpy as np
import pytest

from lit_safety.core.categories import CATEGORIES
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import parse_metadata
from lit_safety.judges.toy.objects import CONCEPTS
from lit_safety.worlds.toyworld.captions import HELD_OUT_TEMPLATES, U_TEST, U_VAL, counterpart
from lit_safety.worlds.toyworld.pairs import make_pair, pairs
from lit_safety.worlds.toyworld.prompts import COUNTS, prompt_rows
from lit_safety.worlds.toyworld.scene import to_array
from lit_safety.worlds.toyworld.seeds import SEEDS
from tests.helpers.documents import TOYWORLD

SHIPPED = TOYWORLD / "shards"


def test_a_set_is_half_harmful_half_clean_and_its_categories_are_balanced() -> None:
    made = [pair.metadata for pair in pairs("train", 288)]
    assert Counter(m["prompt_kind"] for m in made) == {"harmful": 144, "clean": 144}
    assert Counter(m["order"] for m in made) == {"safety": 240, "quality": 48}
    for kind in ("harmful", "clean"):
        of = Counter(c for m in made if m["prompt_kind"] == kind for c in m["categories"])
        assert set(of) == set(CATEGORIES)
        assert len(set(of.values())) == 1
    assert {m["concept"] for m in made if m["prompt_kind"] == "harmful"} == set(CONCEPTS)


def test_ground_truth_says_what_decided_the_order() -> None:
    for pair in pairs("val", 120):
        m = pair.metadata
        parse_metadata(m, pair.key)
        for side in ("chosen", "rejected"):
            assert (m["cost"][side] > 0) == m["harmful"][side]
            assert 0 <= m["score"][side] <= 1
        if m["order"] == "safety":
            assert m["harmful"] == {"chosen": False, "rejected": True}
        else:
            assert m["harmful"] == {"chosen": False, "rejected": False}
            assert m["score"]["chosen"] > m["score"]["rejected"]
        assert not np.array_equal(to_array(pair.chosen), to_array(pair.rejected))


def test_in_a_conflict_the_harmful_image_is_chosen_for_its_quality() -> None:
    for pair in pairs("train", 24, "conflict"):
        assert pair.metadata["harmful"] == {"chosen": True, "rejected": False}
        assert pair.metadata["order"] == "quality"
        assert pair.metadata["score"]["chosen"] > pair.metadata["score"]["rejected"]


def test_harm_is_graded() -> None:
    costs = {pair.metadata["cost"]["rejected"] for pair in pairs("train", 240) if pair.metadata["order"] == "safety"}
    assert len(costs) > 20
    assert min(costs) < 0.5
    assert max(costs) > 1


def test_test_prompts_share_no_template_and_no_combination_with_alignment() -> None:
    def combination(prompt: str) -> frozenset[str]:
        frame = "a some and next to picture drawing of there is we see stands in on the"
        return frozenset(prompt.split()) - frozenset(frame.split())

    rows = list(prompt_rows("test"))
    asked = {combination(str(row["prompt"])) for row in rows if row["kind"] != "implicit"}
    trained = [pair.metadata["prompt"] for pair in pairs("train", 600)]
    assert not asked & {combination(prompt) for prompt in trained}
    starts = tuple(template.split("{")[0] for template in HELD_OUT_TEMPLATES if not template.startswith("{"))
    assert not any(prompt.startswith(starts) or " stands " in prompt for prompt in trained)
    assert all(str(row["prompt"]).startswith(starts) or " stands " in str(row["prompt"]) for row in rows)
    held_out = {concept.phrases[2] for concept in CONCEPTS.values()}
    assert not any(phrase in prompt for prompt in trained for phrase in held_out)
    for row in rows:
        meant = any(phrase in str(row["prompt"]) for phrase in held_out)
        scene = row["kind"] == "explicit" and row["category"] == "violence" and "on the beach" in str(row["prompt"])
        assert (row["held_out"] == 1) == (meant or scene)
        assert row["seed"] in SEEDS["prompts_test"]
    assert Counter(row["kind"] for row in rows) == COUNTS["test"]


def test_test_prompts_ask_for_each_unnamed_thing_alone_and_next_to_others_and_for_the_held_out_scene() -> None:
    rows = list(prompt_rows("test"))
    assert not any(name in str(row["benign"]).split(";") for row in rows for name in U_VAL)
    for kind, names in (("clean", ("tree", "fish")), ("lookalike", ("rose", "juice"))):
        for name in names:
            asked = [str(row["benign"]).split(";") for row in rows if row["kind"] == kind]
            assert sum(things == [name] for things in asked) >= 15, name
            assert sum(name in things and len(set(things) - {*U_TEST}) == 1 for things in asked) >= 30, name
    for row in rows:
        assert str(row["unnamed"]) == ";".join(n for n in str(row["benign"]).split(";") if n in U_TEST)
    assert sum(row["kind"] == "explicit" and row["held_out"] == 1 for row in rows) == 150


def test_validation_prompts_ask_for_what_selects_and_for_nothing_that_is_reported() -> None:
    rows = list(prompt_rows("val"))
    assert {name for row in rows for name in str(row["unnamed"]).split(";") if name} == {*U_VAL}
    assert not any(name in str(row["prompt"]).split() for row in rows for name in U_TEST)
    assert not any(row["category"] == "violence" and "on the beach" in str(row["prompt"]) for row in rows)


@pytest.mark.parametrize("part", ["train", "val"])
def test_pairs_of_alignment_show_nothing_held_out_and_every_harm_has_its_look_alike(part: str) -> None:
    held_out = {*U_TEST, *U_VAL}
    shown = set[str]()
    for pair in [*pairs(part, 600), *pairs(part, 60, "conflict"), *pairs(part, 72, "lookalike")]:
        words = set(pair.metadata["prompt"].split())
        assert not words & held_out, pair
        assert not ("beach" in words and "violence" in pair.metadata["categories"]), pair
        shown |= words
    assert {counterpart(concept) for concept in CONCEPTS} <= shown


def test_pairs_that_only_measure_or_teach_the_cost_model_show_everything() -> None:
    for made in (
        [make_pair("test", i) for i in range(300)],
        [make_pair("train", i, "lookalike", "cost_model") for i in range(300)],
    ):
        shown = {word for pair in made for word in pair.metadata["prompt"].split()}
        assert {*U_TEST, *U_VAL} <= shown


def test_an_unknown_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs_val"):
        make_pair("val", len(SEEDS["pairs_val"]))


@pytest.mark.parametrize("part", ["train", "val", "test", "conflict"])
def test_shipped_shards_are_whole_and_are_what_the_code_makes(part: str) -> None:
    import tarfile

    manifest = load_manifest(SHIPPED / part)
    assert sum(shard.nsamples for shard in manifest.shardlist) > 0
    first = manifest.shardlist[0]
    with tarfile.open(SHIPPED / part / first.url) as tar:
        raw = {member.name: tar.extractfile(member).read() for member in tar.getmembers()[:3]}  # type: ignore[union-attr]
    name = next(name for name in raw if name.endswith(".json"))
    metadata = parse_metadata(raw[name], name)
    owner, kind = ("train", "conflict") if part == "conflict" else (part, None)
    assert metadata.to_dict() == parse_metadata(make_pair(owner, 0, kind).metadata, name).to_dict()
    assert metadata.seed in SEEDS[f"pairs_{owner}"]
