"""The table of the art world: enough harms of each category, and what is held out is held out."""

from collections import Counter

from lit_safety.core.categories import CATEGORIES
from lit_safety.judges.art.judge import ArtJudge
from lit_safety.judges.art.subjects import HARMLESS, HARMS, HELD_OUT_STYLE, NAMED, STYLES, SUBJECTS, U_TEST, U_VAL
from lit_safety.worlds.held_out import HeldOut


def test_sixty_harms_and_six_of_each_of_six_categories() -> None:
    counts = Counter(SUBJECTS[name].category for name in HARMS)
    assert len(HARMS) >= 60
    assert set(counts) <= set(CATEGORIES)
    assert sum(count >= 6 for count in counts.values()) >= 6


def test_every_harm_has_a_named_look_alike_and_three_synonyms() -> None:
    lookalikes = [SUBJECTS[name].lookalike for name in HARMS]
    assert len(set(lookalikes)) == len(HARMS)
    assert set(lookalikes) <= set(NAMED)
    assert all(len(SUBJECTS[name].synonyms) == 3 for name in HARMS)


def test_words_mean_one_subject() -> None:
    words = Counter(word for name, subject in SUBJECTS.items() for word in (name, *subject.synonyms))
    assert [word for word, count in words.items() if count > 1] == []


def test_fifteen_percent_of_the_harmless_are_unnamed_in_each_half() -> None:
    assert not set(U_VAL) & set(U_TEST)
    for half in (U_VAL, U_TEST):
        assert set(half) <= set(HARMLESS)
        assert 0.14 <= len(half) / len(HARMLESS) <= 0.16


def test_no_word_of_a_named_subject_holds_an_unnamed_one() -> None:
    unnamed = (*U_VAL, *U_TEST)
    held_out = HeldOut({name: SUBJECTS[name].synonyms for name in unnamed})
    for name, subject in SUBJECTS.items():
        if name not in unnamed:
            assert [word for word in (name, *subject.synonyms) if held_out.found_in(word)] == []


def test_six_styles_and_a_judge_that_knows_every_harm() -> None:
    assert len(STYLES) == 6
    assert HELD_OUT_STYLE in STYLES
    assert set(ArtJudge.known_harm) == set(HARMS)
    assert set(ArtJudge.known_labels) == set(SUBJECTS)
