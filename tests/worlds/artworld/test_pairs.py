"""Pairs and prompts of the art world."""

from pathlib import Path

import numpy as np
import pytest

from lit_safety.core.errors import UserError
from lit_safety.judges.art.subjects import HARMS, HELD_OUT_STYLE, NAMED, STYLES, SUBJECTS, U_TEST, U_VAL
from lit_safety.worlds.artworld import art as icons
from lit_safety.worlds.artworld.pairs import KINDS, LOOKALIKES, SEEN_STYLES, make_pair
from lit_safety.worlds.artworld.prompts import prompt_rows
from lit_safety.worlds.artworld.scene import SIDE, Art
from lit_safety.worlds.held_out import HeldOut


@pytest.fixture(scope="module")
def drawn(art_file: Path) -> Art:
    return Art(art_file)


@pytest.mark.parametrize("part", ["train", "val"])
def test_pairs_differ_only_where_the_harm_is(drawn: Art, part: str) -> None:
    for index in range(60):
        pair = make_pair(part, index, drawn)
        chosen, rejected = (np.asarray(image, int) for image in (pair.chosen, pair.rejected))
        assert chosen.shape == (SIDE, SIDE, 3)
        rows, columns = np.nonzero((chosen != rejected).any(2))
        assert len(rows) > 0, pair.metadata
        assert pair.metadata["harmful"]["chosen"] is False
        if KINDS[index % len(KINDS)] != "clean_quality":  # one subject's square: at most half of a scene of two
            assert pair.metadata["harmful"]["rejected"] is True
            assert np.ptp(columns) <= 38


def test_pairs_hold_nothing_that_is_held_out(drawn: Art) -> None:
    held_out = HeldOut({name: SUBJECTS[name].synonyms for name in (*U_VAL, *U_TEST)})
    last = HeldOut({SUBJECTS[name].synonyms[-1]: () for name in HARMS})
    for index in range(400):
        prompt = make_pair("train", index, drawn).metadata["prompt"]
        assert held_out.found_in(prompt) is None
        assert STYLES[HELD_OUT_STYLE] not in prompt
        assert last.found_in(prompt) is None


def test_costs_order_the_pairs_by_harm(drawn: Art) -> None:
    for index in range(120):
        cost, harmful = (make_pair("train", index, drawn).metadata[key] for key in ("cost", "harmful"))
        assert (cost["rejected"] > 0) is harmful["rejected"]
        assert cost["chosen"] < 0


def test_a_pair_is_a_function_of_its_number(drawn: Art) -> None:
    first, again = make_pair("train", 7, drawn), make_pair("train", 7, drawn)
    assert first.metadata == again.metadata
    assert first.chosen.tobytes() == again.chosen.tobytes()


@pytest.mark.parametrize("part", ["val", "test"])
def test_prompts_ask_for_the_unnamed_of_their_own_part(part: str) -> None:
    rows = list(prompt_rows(part))
    own, other = (U_TEST, U_VAL) if part == "test" else (U_VAL, U_TEST)
    asked = {name for row in rows for name in str(row["benign"]).split(";") if name}
    assert set(own) <= asked
    assert not set(other) & asked
    assert set(NAMED) <= asked
    assert {row["concept"] for row in rows if row["kind"] == "explicit"} == set(HARMS)
    for row in rows:
        unnamed = {name for name in str(row["benign"]).split(";") if name in own}
        assert unnamed == {name for name in str(row["unnamed"]).split(";") if name}


def test_only_test_prompts_say_the_held_out_style_and_they_are_marked() -> None:
    for part in ("val", "test"):
        rows = [row for row in prompt_rows(part) if f"{STYLES[HELD_OUT_STYLE]} style" in str(row["prompt"])]
        assert all(row["held_out"] == 1 for row in rows)
        assert bool(rows) is (part == "test")


def test_harmful_prompts_ask_only_for_named_things_next_to_the_harm() -> None:
    for row in prompt_rows("test"):
        if row["kind"] in ("explicit", "implicit"):
            assert row["unnamed"] == ""
    assert set(SEEN_STYLES) | {HELD_OUT_STYLE} == set(STYLES)
    assert set(NAMED) >= LOOKALIKES


ICONS = {
    "prefix": "p", "width": 4, "height": 2, "aliases": {"old": {"parent": "new"}},
    "icons": {"new": {"body": '<rect width="4" height="2" fill="#f00"/>'},
              "shifted": {"body": '<rect x="10" width="4" height="2"/>', "left": 10}},
}  # fmt: skip


def test_an_icon_is_found_by_its_alias_and_the_first_name_that_is_there() -> None:
    assert 'viewBox="0 0 4 2"' in icons.svg(ICONS, ("missing", "old"))
    assert 'viewBox="10 0 4 2"' in icons.svg(ICONS, ("shifted",))
    with pytest.raises(UserError, match="missing"):
        icons.svg(ICONS, ("missing",))


def test_an_icon_is_cut_to_what_is_drawn_and_centred() -> None:
    pytest.importorskip("resvg_py")
    image = icons.rasterise(icons.svg(ICONS, ("new",)))
    rows, columns = np.nonzero(image[..., 3] > 128)
    assert image.shape == (icons.ART_SIDE, icons.ART_SIDE, 4)
    assert abs(np.ptp(columns) + 1 - 2 * (np.ptp(rows) + 1)) <= 2  # twice as wide as high, as it was
    assert abs(columns.mean() - (icons.ART_SIDE - 1) / 2) < 1
    assert abs(rows.mean() - (icons.ART_SIDE - 1) / 2) < 1


def test_without_npm_the_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="@iconify-json/twemoji@"):
        icons.fetch(tmp_path)
