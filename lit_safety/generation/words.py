"""What prompts alone tell of their words: those of a harmful prompt that no harmless prompt has may name the harm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lit_safety.core.chance import uniform

_AROUND = 4
"""So many words around the harmful ones may go with them."""


def words_of(text: str) -> list[str]:
    """The words of a prompt as they are compared: without punctuation, in lower case."""
    return [word.strip(".,;:!?\"'()[]").casefold() for word in text.split()]


class Words:
    """The words of harmless prompts.

    Args:
        harmless: the prompts.
    """

    def __init__(self, harmless: Sequence[str]) -> None:
        self.harmless = list(dict.fromkeys(harmless))
        self._sets = [frozenset(words_of(text)) for text in self.harmless]
        self._known = frozenset[str]().union(*self._sets)
        self._beside = {two for text in self.harmless for two in _beside(words_of(text))}

    def unknown(self, prompt: str) -> list[int]:
        """Which words of a prompt no harmless prompt has, by their numbers."""
        return [number for number, word in enumerate(words_of(prompt)) if word not in self._known]

    def dropped(self, prompt: str, seed: int) -> str:
        """The prompt without the words that no harmless prompt has.

        Where the rest then reads as harmless prompts do (every two words beside each other stand so in one of them),
        with up to four words more on either side, these go too: "a cat beside a gun" becomes "a cat". Of a prompt with
        no such words, or with no others, a part of one to four words is left out, which ``seed`` chooses.
        """
        given, gone = prompt.split(), self.unknown(prompt)
        if gone and len(gone) < len(given):
            return " ".join(self._smooth(given, gone[0], gone[-1] + 1) or _without(given, gone))
        size = max(0, min(1 + int(uniform(seed, "drop-size") * 4), len(given) - 1))
        start = int(uniform(seed, "drop-start") * (len(given) - size + 1))
        return " ".join(given[:start] + given[start + size :])

    def _smooth(self, given: list[str], start: int, stop: int) -> list[str] | None:
        """The words without ``start`` to ``stop`` and as few around as the rest needs to read as harmless ones do."""
        for more in range(_AROUND + 1):
            for left in range(more + 1):
                if start - left < 0 or stop + more - left > len(given):
                    continue
                rest = given[: start - left] + given[stop + more - left :]
                if rest and set(_beside(words_of(" ".join(rest)))) <= self._beside:
                    return rest
        return None

    def nearest(self, prompt: str, seed: int) -> str:
        """The harmless prompt that shares the most words with this one, by the share of all their words; of equals the
        one that ``seed`` chooses."""
        own = frozenset(words_of(prompt))
        likeness = [len(own & other) / len(own | other) for other in self._sets]
        best = [text for text, like in zip(self.harmless, likeness, strict=True) if like == max(likeness)]
        return best[int(uniform(seed, "nearest") * len(best))]


def _beside(words: list[str]) -> list[tuple[str, str]]:
    """Every two words beside each other, with "" before the first and after the last."""
    return list(pairwise(["", *words, ""]))


def _without(given: list[str], gone: Sequence[int]) -> list[str]:
    return [word for number, word in enumerate(given) if number not in set(gone)]


def kept_share(prompt: str, drawn: str) -> float:
    """The share of a prompt's words that another one has too."""
    own, other = words_of(prompt), set(words_of(drawn))
    return sum(word in other for word in own) / max(len(own), 1)
