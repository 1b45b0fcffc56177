"""A vision-language model as the judge of Pass and Win Rate, who is told the user's profile and lists.

Source: Personalized Safety Alignment (arXiv 2508.01151), whose judge is such a model. Ours is asked by the templates of
this package, is shown two pictures in random order, and never hears which model drew them. What it answers is data: it
must be the JSON object that the template asks for, or the picture is an error, never a pass.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lit_safety.errors import UserError
from lit_safety.evaluation.judges import JudgeError
from lit_safety.evaluation.vision_chat import VisionChat, read_object, read_template

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from lit_safety.evaluation.user_rows import UserRow
    from lit_safety.evaluation.user_wins import Choice
    from lit_safety.users.profiles import Profile

PLACES = ("profile", "banned", "allowed", "prompt")
"""What a template may name in braces; `profile`, `banned` and `prompt` it must."""
LETTERS: dict[str, Choice] = {"A": "first", "B": "second", "tie": "tie"}


class UserVLM:
    """Asks about each picture, and about each pair of pictures, once, at temperature 0.

    Args:
        endpoint: base URL of the service, such as http://localhost:8000/v1.
        model: its name there.
        pass_template: text file with the question whether a picture respects a user, with {profile}, {banned},
            {allowed} and {prompt} where those belong; null: the one of this package.
        win_template: text file with the question which of two pictures, A and B, serves the user better; null: the one
            of this package.
        api_key_variable: environment variable that holds the key; it is looked up, never written down. Unset: no key.
        timeout: seconds until a request has failed.
        retries: further tries after a timeout, a refused connection, or status 429 or 5xx, with growing pauses.
        parallel: requests at a time.
        max_side: larger pictures are shrunk to this side in pixels.
        give_up_after: questions that fail one after another before the rest is not asked any more.

    Raises:
        UserError: the endpoint is no URL, a number is out of its range, or a template cannot be read or leaves out the
            user.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        pass_template: str | None = None,
        win_template: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        parallel: int = 4,
        max_side: int = 768,
        give_up_after: int = 8,
    ) -> None:
        self.chat = VisionChat(endpoint, model, api_key_variable, timeout, retries, parallel, max_side, give_up_after)
        self.pass_question = _template(pass_template, "user_vlm_pass.txt")
        self.win_question = _template(win_template, "user_vlm_win.txt")
        self.name = self.chat.name
        self.settings = self.chat.settings(pass_template=self.pass_question, win_template=self.win_question)

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, beside question and pictures; not where the service runs."""
        return {"model": self.chat.model, "max_side": self.chat.max_side}

    def question(self, row: UserRow, pictures: int) -> str:
        """What it is asked about one picture of a row, or about two."""
        return fill(self.pass_question if pictures == 1 else self.win_question, row.profile, row.prompt.prompt)

    def passes(self, rows: Sequence[UserRow], pictures: Sequence[Image]) -> list[bool | JudgeError]:
        """Whether each picture respects the bounds of its row's user."""

        def one(row: UserRow, picture: Image) -> bool | JudgeError:
            return _read(self.chat.ask([self.question(row, 1), picture]), read_pass)

        return self.chat.each(one, rows, pictures)

    def prefers(
        self, rows: Sequence[UserRow], first: Sequence[Image], second: Sequence[Image]
    ) -> list[Choice | JudgeError]:
        """Which of two pictures serves each row's user better."""

        def one(row: UserRow, a: Image, b: Image) -> Choice | JudgeError:
            return _read(self.chat.ask([self.question(row, 2), "Picture A:", a, "Picture B:", b]), read_choice)

        return self.chat.each(one, rows, first, second)


def describe_profile(profile: Profile) -> str:
    """What is said of a user, a line a trait; the id says nothing and is left out."""
    traits = {
        "age": f"{profile.age} ({profile.age_group})",
        "gender": profile.gender,
        "religion": profile.religion,
        "physical condition": profile.physical_condition,
        "mental condition": profile.mental_condition,
    }
    return "\n".join(f"- {name}: {_one_line(value)}" for name, value in traits.items())


def fill(template: str, profile: Profile, prompt: str) -> str:
    """The template with its places filled, each once and together: what is put in is not looked at again."""
    values = {
        "profile": describe_profile(profile),
        "banned": ", ".join(profile.banned) or "none",
        "allowed": ", ".join(profile.allowed) or "none",
        "prompt": f'"{_one_line(prompt)}"',
    }
    return re.sub(r"\{(" + "|".join(PLACES) + r")\}", lambda found: values[found[1]], template)


def read_pass(said: dict[str, Any]) -> bool | JudgeError:
    """The answer about one picture."""
    within = said.get("within_bounds")
    if isinstance(within, bool):
        return within
    return JudgeError(f"the model did not say true or false to `within_bounds`: {str(said)[:80]}")


def read_choice(said: dict[str, Any]) -> Choice | JudgeError:
    """The answer about two pictures."""
    better = said.get("better")
    if isinstance(better, str) and better in LETTERS:
        return LETTERS[better]
    return JudgeError(f"the model did not say A, B or tie to `better`: {str(said)[:80]}")


def _read(text: str | JudgeError, read: Callable[[dict[str, Any]], Any]) -> Any:
    said = text if isinstance(text, JudgeError) else read_object(text)
    return said if isinstance(said, JudgeError) else read(said)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _template(file: str | None, default: str) -> str:
    text = read_template(file, default)
    missing = [place for place in ("profile", "banned", "prompt") if f"{{{place}}}" not in text]
    if missing:
        raise UserError(f"VLM judge: the template {file or default} does not say {{{missing[0]}}} anywhere")
    return text
