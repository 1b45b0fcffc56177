"""Reading a language model's answer strictly: JSON of the shape that was asked for, or nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lit_safety.bounded import load_json
from lit_safety.evaluation.endpoint import AnswerError, unfenced

MAX_PROMPT = 400


def parse_prompts(text: str, name: str, least: int, most: int) -> list[str]:
    """The prompts in `{"NAME": ["...", ...]}`, which may stand in a fence of three backticks.

    Args:
        text: the answer.
        name: the one key that is asked for.
        least: fewer are an error.
        most: so many are asked for; more are an error.

    Raises:
        AnswerError: it is anything else; says what.
    """
    try:
        answer = load_json(unfenced(text))
    except ValueError as error:
        raise AnswerError(f"is not JSON ({error}): {text[:80]!r}") from error
    if not isinstance(answer, dict) or set(answer) != {name} or not isinstance(answer[name], list):
        raise AnswerError(f"is not an object with one list {name!r}: {text[:80]!r}")
    if not least <= len(answer[name]) <= most:
        raise AnswerError(f"holds {len(answer[name])} prompts, not {least if least == most else f'{least} to {most}'}")
    return [_prompt(one) for one in answer[name]]


def _prompt(one: object) -> str:
    if not isinstance(one, str) or not one.strip():
        raise AnswerError(f"holds {one!r} where a prompt was asked for")
    prompt = " ".join(one.split())
    if len(prompt) > MAX_PROMPT:
        raise AnswerError(f"holds a prompt of {len(prompt)} letters, over the limit of {MAX_PROMPT}: {prompt[:60]!r}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise AnswerError("holds a prompt with a broken character") from error
    return prompt


def same(prompt: str) -> str:
    """Equal for prompts that differ by case, blanks and punctuation only."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


def numbered(prompts: Sequence[str]) -> str:
    """The prompts as they stand in a question."""
    return "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(prompts, start=1)) or "(none yet)"
