"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, a hosted service) as a judge.

What it answers is data: it must be the JSON object that the template asks for, or the picture is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_safety.data.categories import CATEGORIES, canonical_category
from lit_safety.errors import UserError
from lit_safety.evaluation.judges import JudgeError, Verdict
from lit_safety.evaluation.vision_chat import VisionChat, read_object, read_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image


class VLMJudge:
    """Asks about each picture once, at temperature 0.

    Args:
        endpoint: base URL of the service, such as http://localhost:8000/v1.
        model: its name there.
        template: text file that asks the question and demands the JSON answer; null: the one of this package.
        api_key_variable: environment variable that holds the key; it is looked up, never written down. Unset: no key.
        timeout: seconds until a request has failed.
        retries: further tries after a timeout, a refused connection, or status 429 or 5xx, with growing pauses.
        parallel: requests at a time.
        max_side: larger pictures are shrunk to this side in pixels.
        give_up_after: pictures that fail one after another before the rest is not asked about any more.

    Raises:
        UserError: the endpoint is no URL, a number is out of its range, or the template cannot be read.
    """

    keep = True
    """Each answer costs: `kept_verdicts` keeps them."""

    def __init__(
        self,
        endpoint: str,
        model: str,
        template: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 3,
        parallel: int = 4,
        max_side: int = 768,
        give_up_after: int = 8,
    ) -> None:
        self.chat = VisionChat(endpoint, model, api_key_variable, timeout, retries, parallel, max_side, give_up_after)
        self.question = read_template(template, "vlm_prompt.txt")
        self.name = self.chat.name
        self.settings: dict[str, Any] = {
            **self.chat.settings(template=self.question),
            "rule": "harmful = the model's own word",
            "labels": sorted(CATEGORIES),
            "categories": list(CATEGORIES),
        }

    def judge(self, images: Sequence[Image]) -> list[Verdict | JudgeError]:
        """Verdicts on pictures of any size."""
        return self.chat.each(self._one, images)

    def _one(self, image: Image) -> Verdict | JudgeError:
        text = self.chat.ask([self.question, image])
        return text if isinstance(text, JudgeError) else read_answer(text)


def read_answer(text: Any) -> Verdict | JudgeError:
    """The verdict in a model's answer: one JSON object, alone or in a code fence. Anything else is an error."""
    if not isinstance(text, str):
        return JudgeError(f"the model answered no text: {str(text)[:80]}")
    said, shown = read_object(text), " ".join(text.split())[:80]
    if isinstance(said, JudgeError):
        return said
    if not isinstance(said.get("harmful"), bool):
        return JudgeError(f"the model did not say true or false to `harmful`: {shown}")
    named = said.get("categories", [])
    if not isinstance(named, list):
        return JudgeError(f"the model gave no list of categories: {shown}")
    try:
        categories = {canonical_category(name): 1.0 for name in named}
    except UserError as error:
        return JudgeError(f"the model named a category that there is not: {error}")
    if categories and not said["harmful"]:
        return JudgeError(f"the model contradicts itself: {shown}")
    return Verdict(said["harmful"], dict(categories), categories, 1.0, frozenset(categories))
