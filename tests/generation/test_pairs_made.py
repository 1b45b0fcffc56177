"""Which pairs are kept, which are left out and why, with a painter that draws the colours in its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.format.sample import PairMetadata, Sides
from lit_safety.generation import pairs
from lit_safety.generation.pairs import Assessment, Assessor, LeftOut, Made, PairMaker, PromptPair, why_not
from tests.helpers.generate_stubs import ColourPainter, RedScorer


def by_red(images: Sequence[Image.Image]) -> list[Assessment | None]:
    """Red above 100 is harmful, and is the cost; red 7 cannot be judged."""
    reds = [image.getpixel((0, 0))[0] for image in images]  # type: ignore[index]
    return [None if red == 7 else Assessment(red > 100, float(red - 100)) for red in reds]


def maker(painter: ColourPainter, **options: Any) -> PairMaker:
    given = {
        "assess": by_red,
        "scorer": None,
        "counterpart": "same_seed",
        "strength": 0.8,
        "both_prompts": False,
        "clean_candidates": 0,
        **options,
    }
    return PairMaker(painter, **given)  # type: ignore[arg-type]


def row(number: int, harmful: str, safe: str) -> PromptPair:
    return PromptPair(number, f"bad {harmful}", f"good {safe}", ("violence",), "gun", 40 + number)


def test_the_safe_image_is_chosen_for_the_harmful_prompt() -> None:
    painter = ColourPainter()
    (made,) = maker(painter)([row(3, "200,0,0", "10,0,0")])
    assert isinstance(made, Made)
    assert made.key == "000003-u"
    assert made.metadata == PairMetadata(
        "bad 200,0,0", "harmful", "safety", ("violence",), Sides(False, True), "gun", Sides(-90.0, 100.0), seed=43,
        noise_seeds=Sides(43, 43),
    )  # fmt: skip
    assert (made.chosen.getpixel((0, 0)), made.rejected.getpixel((0, 0))) == ((10, 0, 0), (200, 0, 0))
    assert [asked["seeds"] for asked in painter.asked] == [[43], [43]]  # the counterpart has the same seed


def test_img2img_redraws_the_harmful_image_away_from_its_prompt() -> None:
    painter = ColourPainter()
    (made,) = maker(painter, counterpart="img2img", strength=0.75)([row(0, "200,0,0", "10,0,0")])
    assert isinstance(made, Made)
    assert painter.asked[1] == {
        "images": [(200, 0, 0)],
        "prompts": ["good 10,0,0"],
        "negatives": ["bad 200,0,0"],
        "strength": 0.75,
    }
    assert made.metadata.noise_seeds is None  # the chosen image was not drawn from noise alone


def test_both_prompts_make_two_samples() -> None:
    harmful, clean = maker(ColourPainter(), both_prompts=True)([row(0, "200,0,0", "10,0,0")])
    assert isinstance(harmful, Made)
    assert isinstance(clean, Made)
    assert (clean.key, clean.metadata.prompt, clean.metadata.prompt_kind) == ("000000-s", "good 10,0,0", "clean")
    assert clean.metadata.harmful == Sides(False, True)
    assert clean.chosen is harmful.chosen


@pytest.mark.parametrize("counterpart", ["same_seed", "img2img"])
def test_what_is_wrong_is_left_out_and_the_rest_of_the_batch_is_not(counterpart: str) -> None:
    rows = [
        row(0, "200,0,0", "10,0,0"),
        row(1, "90,0,0", "10,0,0"),
        row(2, "200,0,0", "150,0,0"),
        row(3, "200,0,0", "7,0,0"),
        row(4, "nan", "10,0,0"),
        row(5, "200,0,0", "nan"),
        row(6, "210,0,0", "11,0,0"),
    ]
    made = list(maker(ColourPainter(), counterpart=counterpart)(rows))
    assert [one.reason if isinstance(one, LeftOut) else one.metadata.cost for one in made] == [
        Sides(-90.0, 100.0),
        pairs.NO_HARM,
        pairs.STILL_HARMFUL,
        pairs.NOT_JUDGED,
        pairs.NOT_DRAWN,
        pairs.NOT_DRAWN,
        Sides(-89.0, 110.0),
    ]


def test_costs_in_the_wrong_order_are_seen_where_a_judge_decides_too() -> None:
    assert why_not(Assessment(False, 2.0), Assessment(True, 1.0)) == pairs.WRONG_ORDER
    assert why_not(Assessment(False, 1.0), Assessment(True, 1.0)) == pairs.WRONG_ORDER
    assert why_not(Assessment(False, -1.0), Assessment(True, 1.0)) is None
    assert why_not(Assessment(False), Assessment(True)) is None


class Ranked(ColourPainter):
    """The two images of the harmful pair as their prompts say, then the candidates in the colours of a list."""

    def __init__(self, reds: list[int]) -> None:
        super().__init__()
        self.reds = reds

    def from_text(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        drawn = super().from_text(prompts, seeds)
        before = len(self.asked) - 3
        return drawn if before < 0 else [Image.new("RGB", (8, 8), (self.reds[before], 0, 0))] * len(prompts)


@pytest.mark.parametrize(
    ("reds", "expected"),
    [
        ([50, 90, 20], Sides(90.0, 20.0)),
        ([50, 200, 20], Sides(50.0, 20.0)),  # the second is harmful: it is not a candidate, whatever its score
        ([50, 200, 7], pairs.TOO_FEW),  # the third cannot be judged
        ([50, 50, 50], pairs.TIED),
    ],
)
def test_clean_pairs_are_the_best_and_the_worst_of_the_safe_candidates(reds: list[int], expected: Any) -> None:
    painter = Ranked(reds)
    making = maker(painter, clean_candidates=3, scorer=RedScorer())
    (_, made) = making([row(0, "200,0,0", "10,0,0")])
    if isinstance(made, LeftOut):
        assert made.reason == expected
        return
    assert (made.key, made.metadata.score) == ("000000-c", expected)
    assert (made.metadata.order, made.metadata.prompt_kind) == ("quality", "clean")
    assert made.metadata.harmful == Sides(False, False)
    assert made.chosen.getpixel((0, 0))[0] == expected.chosen  # type: ignore[index]
    assert made.rejected.getpixel((0, 0))[0] == expected.rejected  # type: ignore[index]
    seeds = [asked["seeds"] for asked in painter.asked]
    assert len({tuple(one) for one in seeds[2:]}) == 3  # each candidate has a seed of its own
    best, worst = reds.index(expected.chosen), reds.index(expected.rejected)
    assert made.metadata.noise_seeds == Sides(*seeds[2 + best], *seeds[2 + worst])


def test_noise_that_was_drawn_in_half_precision_is_not_said() -> None:
    """A generator gives other numbers in it, and training draws in single precision."""
    painter = ColourPainter(precision="float16")
    (made,) = maker(painter)([row(0, "200,0,0", "10,0,0")])
    assert isinstance(made, Made)
    assert made.metadata.noise_seeds is None


def test_settings_that_do_not_go_together_are_named() -> None:
    for options, settings, complaint in (
        ({"counterpart": "img2img", "strength": 0}, {}, "--strength 0"),
        ({"counterpart": "img2img", "strength": 1.5}, {}, r"--strength 1\.5"),
        ({"counterpart": "img2img", "strength": 0.1}, {"steps": 9}, "large enough for one of 9 steps"),
        ({"counterpart": "img2img"}, {"guidance": 1.0}, "needs --guidance above 1"),
        ({"clean_candidates": 2}, {}, "needs a --scorer"),
        ({"clean_candidates": 1, "scorer": RedScorer()}, {}, "must be 0 or at least 2"),
    ):
        with pytest.raises(UserError, match=complaint):
            maker(ColourPainter(**settings), **options)
    with pytest.raises(UserError, match="give --judge, --cost_model or both"):
        Assessor(None, None)


# ---- judges and cost models


class Costs:
    def __init__(self, values: list[float]) -> None:
        self.values = values

    def costs(self, images: Sequence[Image.Image]) -> list[float]:
        return self.values[: len(images)]


class Failing:
    name, settings = "failing", {}

    def judge(self, images: Sequence[Image.Image]) -> Any:
        raise RuntimeError("out of order")


def assessor(judge: Any = None, costs: Any = None) -> Assessor:
    made = Assessor.__new__(Assessor)
    made.judge, made.costs, made._seen, made._known, made._why = judge, costs, 0, 0, ""
    return made


def test_a_cost_above_zero_is_harmful_where_there_is_no_judge() -> None:
    image = Image.new("RGB", (8, 8))
    found = assessor(costs=Costs([1.5, -0.5, float("nan")]))([image] * 3)
    assert found == [Assessment(True, 1.5), Assessment(False, -0.5), None]


def test_a_judge_that_fails_makes_nothing_safe_and_is_not_borne_for_ever() -> None:
    image = Image.new("RGB", (8, 8))
    failing = assessor(judge=Failing(), costs=Costs([1.0] * 8))
    assert failing([image] * 8) == [None] * 8
    with pytest.raises(UserError, match=r"16 images .*out of order"):
        failing([image] * 8)


def grouped(painter: ColourPainter, *rows: PromptPair, **options: Any) -> list[Made | LeftOut]:
    return list(maker(painter, per_prompt=4, **options)(list(rows)))


class Reds(ColourPainter):
    """The n-th drawing of a harmful prompt has the n-th red of its last word."""

    def from_text(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        turn = len([one for one in self.asked if "bad" in one["prompts"][0]])
        found = [" ".join([*words[:-1], words[-1].split("/")[turn % 3 if "bad" in words else 0]])
                 for words in (prompt.split() for prompt in prompts)]  # fmt: skip
        return super().from_text(found, seeds)


def test_a_group_is_the_safe_counterpart_and_harmful_images_of_their_own_seeds() -> None:
    painter = Reds()
    (made,) = grouped(painter, row(3, "200,0,0/30,0,0/220,0,0", "10,0,0"), scorer=RedScorer())
    assert isinstance(made, Made)
    facts = made.metadata.images
    assert [image.getpixel((0, 0))[0] for image in made.images] == [10, 200, 30, 220]
    assert [(one.harmful, one.cost, one.score) for one in facts] == [
        (False, -90.0, 10.0), (True, 100.0, 200.0), (False, -70.0, 30.0), (True, 120.0, 220.0),
    ]  # fmt: skip
    assert made.metadata.ranks == (0, 2, 1, 3)
    assert (facts[0].seed, facts[1].seed) == (43, 43)
    assert len({one.seed for one in facts}) == 3
    assert (made.chosen, made.rejected) == (made.images[0], made.images[3])


@pytest.mark.parametrize(
    ("harmful", "safe", "reason"),
    [
        ("20,0,0/30,0,0/40,0,0", "10,0,0", pairs.NO_HARM),
        ("200,0,0/30,0,0/220,0,0", "150,0,0", pairs.STILL_HARMFUL),
        ("200,0,0/7,0,0/220,0,0", "10,0,0", pairs.NOT_JUDGED),
        ("200,0,0/nan/220,0,0", "10,0,0", pairs.NOT_DRAWN),
    ],
)
def test_a_group_that_says_nothing_is_left_out(harmful: str, safe: str, reason: str) -> None:
    assert grouped(Reds(), row(1, harmful, safe)) == [LeftOut("000001-u", reason)]


@pytest.mark.parametrize("count", [1, 65])
def test_a_group_has_2_to_64_images(count: int) -> None:
    with pytest.raises(UserError, match="per_prompt"):
        maker(ColourPainter(), per_prompt=count)
