from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import parse_metadata
from lit_safety.judges.toy.objects import CONCEPTS, LABELS, SETTINGS
from lit_safety.worlds.toyworld.captions import HELD_OUT_TEMPLATES, TEMPLATES, U_TEST, U_VAL
from lit_safety.worlds.toyworld.emblems import COLOURS
from lit_safety.worlds.toyworld.onpolicy import (
    COUNT,
    OWNER,
    WAYS,
    Order,
    confirmed,
    plan_pair,
    plan_pairs,
    rounded,
    write_onpolicy,
)
from lit_safety.worlds.toyworld.prompts import prompt_rows
from lit_safety.worlds.toyworld.scene import SLOTS, Scene, Thing, render
from lit_safety.worlds.toyworld.seeds import SEEDS
from tests.helpers.documents import TOYWORLD


def _harms(order: Order) -> list[str]:
    """The harms that a prompt asks for, by name or by phrase."""
    words = order.prompt.split()
    return [n for n, c in CONCEPTS.items() if n in words or any(phrase in order.prompt for phrase in c.phrases)]


def test_labels_say_what_each_image_was_asked_to_show() -> None:
    for pair in plan_pairs(240):
        parse_metadata(pair.metadata, pair.key)
        for side, order in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert pair.metadata["harmful"][side] == bool(_harms(order)), order
        harmful = pair.metadata["prompt_kind"] == "harmful"
        assert pair.metadata["prompt"] == (pair.rejected if harmful else pair.chosen).prompt
        assert pair.chosen.seed == pair.rejected.seed == pair.metadata["seed"]
        assert pair.chosen != pair.rejected
        assert "cost" not in pair.metadata
        if pair.metadata["categories"]:
            (concept,) = _harms(pair.rejected)
            assert pair.metadata["categories"] == [CONCEPTS[concept].category]


def test_a_better_image_never_scores_less_and_quality_pairs_differ_in_the_drawing_alone() -> None:
    ways = Counter[str]()
    for pair in plan_pairs(240):
        score = pair.metadata["score"]
        assert 0 <= score["rejected"] <= score["chosen"] == 1
        assert pair.chosen.how == "full"
        if pair.metadata["order"] == "quality":
            assert pair.chosen.prompt == pair.rejected.prompt
            assert score["rejected"] < score["chosen"]
            ways[pair.rejected.how] += 1
        else:
            assert pair.rejected.how == "full"
    assert ways == {"one_step": 20, "overguided": 20}
    assert all(WAYS["full"][0] > WAYS[how][0] for how in ways)


def test_the_set_is_balanced() -> None:
    made = [pair.metadata for pair in plan_pairs(COUNT)]
    kinds = Counter(m["source"].split("/")[-1] for m in made)
    assert kinds == {"harmful": COUNT // 2, "clean_harm": COUNT // 3, "clean_quality": COUNT // 6}
    for kind in ("harmful", "clean"):
        of = Counter(c for m in made if m["prompt_kind"] == kind for c in m["categories"])
        assert set(of) == set(CATEGORIES)
        assert len(set(of.values())) == 1
    asked = [m for m in made if m["prompt_kind"] == "harmful"]
    named = sum(m["concept"] in m["prompt"].split() for m in asked)
    assert 0.6 < named / len(asked) < 0.8


def test_nothing_held_out_is_ever_asked_of_the_base() -> None:
    def combination(prompt: str) -> frozenset[str]:
        return frozenset(prompt.split()) & {*LABELS, *COLOURS, *SETTINGS}

    drawn = [order.prompt for pair in plan_pairs(COUNT) for order in (pair.chosen, pair.rejected)]
    assert not any(concept.phrases[2] in prompt for prompt in drawn for concept in CONCEPTS.values())
    assert not any(" stands " in prompt or prompt.startswith("we see ") for prompt in drawn)
    assert len(HELD_OUT_TEMPLATES) == 2
    assert any(prompt.startswith(TEMPLATES[1].split("{")[0]) for prompt in drawn)
    words = {word for prompt in drawn for word in prompt.split()}
    assert not words & {*U_TEST, *U_VAL}
    for pair in plan_pairs(COUNT):
        if "violence" in pair.metadata["categories"]:
            assert not any("beach" in order.prompt for order in (pair.chosen, pair.rejected))
    for part in ("val", "test"):
        asked = {combination(str(row["prompt"])) for row in prompt_rows(part) if row["kind"] != "implicit"}
        plain = [prompt for prompt in drawn if not any(p in prompt for c in CONCEPTS.values() for p in c.phrases)]
        assert not asked & {combination(prompt) for prompt in plain}


def test_its_seeds_are_its_own() -> None:
    first = plan_pair(0)
    assert first.metadata["seed"] == SEEDS[OWNER].start
    assert [p.metadata["seed"] for p in plan_pairs(3)] == list(SEEDS[OWNER][:3])
    others = [seeds for owner, seeds in SEEDS.items() if owner != OWNER]
    assert not any(SEEDS[OWNER].start in seeds or SEEDS[OWNER][-1] in seeds for seeds in others)


def test_the_judges_figure_counts_by_label_and_leaves_worse_drawings_out() -> None:
    from lit_safety.judges.toy.judge import ToyJudge

    pairs = list(plan_pairs(6))
    judge = ToyJudge.from_pretrained(TOYWORLD / "judge")
    empty, gun = Scene("park", ()), Scene("park", (), Thing("gun", 1, SLOTS[1], 70))
    drawn = {order: render(empty) for pair in pairs for order in (pair.chosen, pair.rejected)}
    assert confirmed(judge, pairs, drawn) == {"harmful": 0.0, "safe": 1.0}
    (worse,) = [pair.rejected for pair in pairs if pair.rejected.how != "full"]
    assert confirmed(judge, pairs, drawn | {worse: render(gun)}) == {"harmful": 0.0, "safe": 1.0}
    drawn[pairs[0].chosen] = drawn[pairs[0].rejected] = render(gun)
    assert confirmed(judge, pairs, drawn) == {"harmful": 0.2, "safe": 0.8333}  # 1 of 5; 5 of 6


def test_a_tiny_set_is_drawn_goes_on_after_a_kill_and_is_the_same(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    out, work = tmp_path / "out" / "onpolicy", tmp_path / "work"
    write_onpolicy(TOYWORLD / "pipeline", tmp_path / "none", out, work, count=6)
    first = load_manifest(out)
    assert first.provenance["judge A confirms"] == "not measured"
    assert "asked for" in first.provenance["labels"]
    images = sorted(work.rglob("*.png"))
    assert len(images) == 12
    images[0].unlink()
    kept = images[-1].stat().st_mtime_ns
    write_onpolicy(TOYWORLD / "pipeline", tmp_path / "none", out, work, count=6)
    assert images[-1].stat().st_mtime_ns == kept
    assert load_manifest(out).shardlist == first.shardlist


def test_without_a_pipeline_the_stage_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage export"):
        write_onpolicy(tmp_path / "none", tmp_path / "none", tmp_path / "out", tmp_path / "work")


def test_shipped_set_is_what_the_code_plans() -> None:
    import tarfile

    folder = TOYWORLD / "shards" / "onpolicy"
    manifest = load_manifest(folder)
    assert sum(shard.nsamples for shard in manifest.shardlist) == COUNT
    assert manifest.seeds == {"first": SEEDS[OWNER].start, "last": SEEDS[OWNER].stop - 1}
    assert manifest.provenance["judge A confirms"]["harmful"] > 0.95
    planned = iter(plan_pairs(COUNT))
    for shard in manifest.shardlist:
        with tarfile.open(folder / shard.url) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    pair = next(planned)
                    assert member.name == f"{pair.key}.json"
                    held = parse_metadata(tar.extractfile(member).read(), member.name)  # type: ignore[union-attr]
                    assert held == parse_metadata(pair.metadata, pair.key)
    assert next(planned, None) is None


def test_rounding_colours_cannot_be_seen() -> None:
    """Multiples of 4: 129 -> 128, 131 -> 132, 255 -> 256, which is cut to 255."""
    image = Image.new("RGB", (1, 1), (129, 131, 255))
    assert rounded(image).getpixel((0, 0)) == (128, 132, 255)
