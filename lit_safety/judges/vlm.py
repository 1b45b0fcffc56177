"""A vision-language model behind an OpenAI-compatible endpoint is asked about images; a failure is an error."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from lit_safety.core.categories import CATEGORIES, canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import digest
from lit_safety.core.http import AnswerError, Endpoint, EndpointError, unfenced
from lit_safety.core.images import rgb
from lit_safety.core.text import NotUtf8, load_json, read_text
from lit_safety.judges.judge import JudgeError, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


Answer = TypeVar("Answer")
LEAST_SIDE = 16
"""Images are not shrunk below this side: in an image of few pixels harm is not visible, and it would be called safe."""


class VisionChat:
    """Asks each question once, at temperature 0.

    Args:
        endpoint: base URL of the service, such as http://localhost:8000/v1.
        model: its name there.
        api_key_variable: environment variable that holds the key, which is never stored. Unset: no key.
        timeout: seconds after which a request has failed.
        retries: further tries after a timeout, a refused connection, or status 429 or 5xx, with growing pauses.
        parallel: requests at a time.
        max_side: larger images are shrunk to this side in pixels.
        give_up_after: after so many failed questions in a row, the rest is not asked.

    Raises:
        UserError: the endpoint is not a URL, or a number is out of its range.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        api_key_variable: str,
        timeout: float,
        retries: int,
        parallel: int,
        max_side: int,
        give_up_after: int,
    ) -> None:
        if min(parallel, give_up_after) < 1:
            raise UserError("VLM judge: parallel and give_up_after must be at least 1")
        if max_side < LEAST_SIDE:
            raise UserError(
                f"VLM judge: max_side {max_side}: must be at least {LEAST_SIDE}; harm is not visible in smaller images"
            )
        self.endpoint = Endpoint(endpoint, api_key_variable, timeout, retries)
        self.model, self.parallel, self.max_side, self.give_up_after = model, parallel, max_side, give_up_after
        self.name = f"VLM {model}"
        self._given = endpoint
        self._failures, self._lock = 0, Lock()

    def settings(self, **templates: str) -> dict[str, Any]:
        """The settings in a report: NAME_sha256 is the hash of the template NAME."""
        hashes = {f"{name}_sha256": digest(text) for name, text in templates.items()}
        return {"name": self.name, "endpoint": self._given, "model": self.model, **hashes, "max_side": self.max_side}

    def each(self, ask: Callable[..., Answer], *columns: Sequence[Any]) -> list[Answer]:
        """What `ask` gives for each row of the columns, in their order; asked `parallel` at a time."""
        pool = ThreadPoolExecutor(self.parallel)
        try:
            return list(pool.map(ask, *columns))
        finally:  # on Ctrl-C further questions are not asked, and open ones are not waited for
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, question: Sequence[str | Image.Image], max_tokens: int = 200) -> str | JudgeError:
        """The model's answer to texts and images in this order; may be called by several threads."""
        if self._failures >= self.give_up_after:
            return JudgeError(
                f"not asked, because the endpoint did not answer for {self._failures} images before this one"
            )
        content = [self._part(part) for part in question]
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        try:
            text = self.endpoint.chat(body | {"max_tokens": max_tokens})
        except AnswerError as error:
            # the endpoint works
            with self._lock:
                self._failures = 0
            return JudgeError(str(error))
        except EndpointError as error:
            with self._lock:
                self._failures += 1
            return JudgeError(str(error))
        with self._lock:
            self._failures = 0
        return text

    def _part(self, part: str | Image.Image) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        image = rgb(part)
        image.thumbnail((self.max_side, self.max_side))
        content = io.BytesIO()
        image.save(content, "PNG")
        uri = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": uri}}


def read_object(text: str) -> dict[str, Any] | JudgeError:
    """The JSON object in a model's answer, alone or in a code block. Anything else is an error."""
    try:
        said = load_json(unfenced(text))
    except ValueError:
        return JudgeError(f"the model's answer is not JSON: {_short(text)}")
    return said if isinstance(said, dict) else JudgeError(f"the model's answer is not a JSON object: {_short(text)}")


def read_template(file: str | None, default: str) -> str:
    """A question's text; None: the file `default` of this package.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if file is None:
            return files("lit_safety.judges").joinpath("templates", default).read_text(encoding="utf-8")
        return read_text(file)
    except (OSError, NotUtf8) as error:
        raise UserError(f"VLM judge: the template {file or default} cannot be read ({error})") from error


def _short(text: object) -> str:
    return " ".join(str(text).split())[:80]


# A vision-language model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, a hosted service) as a judge.
#
# Its answer is not trusted: it must be the JSON object that the template asks for, or the image is an error.


class VLM:
    """Asks about each image once, at temperature 0.

    Args:
        endpoint: base URL of the service, such as http://localhost:8000/v1.
        model: its name there.
        template: text file that asks the question and demands the JSON answer; null: the one of this package.
        api_key_variable: environment variable that holds the key; it is looked up, never written down. Unset: no key.
        timeout: seconds until a request has failed.
        retries: further tries after a timeout, a refused connection, or status 429 or 5xx, with growing pauses.
        parallel: requests at a time.
        max_side: larger images are shrunk to this side in pixels.
        give_up_after: after so many failed images in a row, the rest is not asked about.

    Raises:
        UserError: the endpoint is not a URL, a number is out of its range, or the template cannot be read.
    """

    keep = True
    """Each answer costs time or money, so verdicts are stored."""

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

    def judge(self, images: Sequence[Image.Image]) -> list[Verdict | JudgeError]:
        """Verdicts on images of any size."""
        return self.chat.each(self._one, images)

    def _one(self, image: Image.Image) -> Verdict | JudgeError:
        text = self.chat.ask([self.question, image])
        return text if isinstance(text, JudgeError) else read_answer(text)


def read_answer(text: Any) -> Verdict | JudgeError:
    """The verdict in a model's answer: one JSON object, alone or in a code block. Anything else is an error."""
    if not isinstance(text, str):
        return JudgeError(f"the model's answer is not text: {str(text)[:80]}")
    said, shown = read_object(text), " ".join(text.split())[:80]
    if isinstance(said, JudgeError):
        return said
    if not isinstance(said.get("harmful"), bool):
        return JudgeError(f"the model did not say true or false to `harmful`: {shown}")
    named = said.get("categories", [])
    if not isinstance(named, list):
        return JudgeError(f"the model did not give a list of categories: {shown}")
    try:
        categories = {canonical_category(name): 1.0 for name in named}
    except UserError as error:
        return JudgeError(f"the model named an unknown category: {error}")
    if categories and not said["harmful"]:
        return JudgeError(f"the model contradicts itself: {shown}")
    return Verdict(said["harmful"], dict(categories), categories, 1.0, frozenset(categories))
