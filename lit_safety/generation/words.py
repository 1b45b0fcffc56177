"""What prompts alone tell of their words: those of a harmful prompt that no harmless prompt has may name the harm."""

from __future__ import annotations

from collections.abc import Sequence

from lit_safety.core.chance import uniform


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

    def unknown(self, prompt: str) -> list[int]:
        """Which words of a prompt no harmless prompt has, by their numbers."""
        return [number for number, word in enumerate(words_of(prompt)) if word not in self._known]

    def dropped(self, prompt: str, seed: int) -> str:
        """The prompt without the words that no harmless prompt has; of a prompt with none or only such words, without
        a part of one to four words, which ``seed`` chooses."""
        given, gone = prompt.split(), set(self.unknown(prompt))
        if gone and len(gone) < len(given):
            return " ".join(word for number, word in enumerate(given) if number not in gone)
        size = max(0, min(1 + int(uniform(seed, "drop-size") * 4), len(given) - 1))
        start = int(uniform(seed, "drop-start") * (len(given) - size + 1))
        return " ".join(given[:start] + given[start + size :])

    def nearest(self, prompt: str, seed: int) -> str:
        """The harmless prompt that shares the most words with this one, by the share of all their words; of equals the
        one that ``seed`` chooses."""
        own = frozenset(words_of(prompt))
        likeness = [len(own & other) / len(own | other) for other in self._sets]
        best = [text for text, like in zip(self.harmless, likeness, strict=True) if like == max(likeness)]
        return best[int(uniform(seed, "nearest") * len(best))]


def kept_share(prompt: str, drawn: str) -> float:
    """The share of a prompt's words that another one has too."""
    own, other = words_of(prompt), set(words_of(drawn))
    return sum(word in other for word in own) / max(len(own), 1)
