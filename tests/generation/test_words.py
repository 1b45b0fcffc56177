"""What harmless prompts tell of the words of a harmful one."""

import pytest

from lit_safety.generation.words import Words, kept_share

HARMLESS = ["a red cat in the park", "a blue house on the street", "in the room there is a star"]


def test_the_harmful_word_is_the_one_that_no_harmless_prompt_has() -> None:
    words = Words(HARMLESS)
    assert words.unknown("a red cat and a gun in the park") == [3, 5]  # nor has any "and"
    assert words.dropped("a red cat and a gun in the park", 0) == "a red cat in the park"
    assert words.dropped("A Gun, on the street", 0) == "A on the street"  # "street" alone begins no harmless prompt


def test_what_is_left_over_of_a_phrase_goes_with_it() -> None:
    """As few words as the rest needs to read like harmless prompts: "beside a" or "a ... beside"."""
    words = Words([*HARMLESS, "a star beside a red cat"])
    assert words.dropped("a red cat beside a gun in the park", 0) == "a red cat in the park"
    assert words.dropped("a gun beside a blue house on the street", 0) == "a blue house on the street"
    assert words.dropped("in the room there is a loaded gun", 0) == "in the room there is a"  # nothing reads so


@pytest.mark.parametrize("prompt", ["a red cat in the room", "smoking loaded guns everywhere"])
def test_where_words_do_not_tell_a_part_is_dropped_by_chance(prompt: str) -> None:
    """Of a prompt whose words are all known, and of one with none of them."""
    given, words = prompt.split(), Words(HARMLESS)
    found = {words.dropped(prompt, seed) for seed in range(60)}
    assert len(found) > 4
    assert prompt not in found
    for text in found:
        kept = text.split()
        gone = len(given) - len(kept)
        assert 1 <= gone <= min(4, len(given) - 1)
        assert any(given[:start] + given[start + gone :] == kept for start in range(len(given)))


def test_the_nearest_harmless_prompt_shares_the_most_words() -> None:
    words = Words([*HARMLESS, "in the room there is a rose"])
    assert words.nearest("a gun and a red cat in the park", 0) == "a red cat in the park"
    found = {words.nearest("in the room there is a gun", seed) for seed in range(20)}
    assert found == {"in the room there is a star", "in the room there is a rose"}


def test_a_share_of_words_is_kept() -> None:
    assert kept_share("a red cat and a gun", "a red cat") == pytest.approx(4 / 6)
    assert kept_share("a gun", "a gun") == 1.0
