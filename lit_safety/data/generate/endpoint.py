"""One question to an OpenAI-compatible chat endpoint: any local server (vLLM, llama.cpp, Ollama, ...) or a remote."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from lit_safety.errors import UserError

MAX_ANSWER_BYTES = 4 << 20
MAX_WAIT = 60.0
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class AnswerError(Exception):
    """The endpoint answered, but with something that is no chat answer."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would hand the key and the question to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Where questions go, and how patiently.

    Args:
        url: base URL of the API, such as http://localhost:8000/v1.
        model: the model's name there.
        key_variable: environment variable that holds the API key; none is sent where it is not set.
        timeout: seconds to wait for an answer.
        attempts: how often a question is asked when the server fails, waiting longer each time.
        wait: seconds before the second attempt; doubled before each further one.

    Raises:
        UserError: the URL is not http(s), or a number makes no sense.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 1.0
    max_tokens: int = 2048
    timeout: float = 120.0
    attempts: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--url {self.url}: must begin with http:// or https://, such as http://localhost:8000/v1")
        try:
            parts = urllib.parse.urlsplit(self.url)
            named = bool(parts.hostname) and parts.port != 0  # reading the port checks it
        except ValueError as error:
            raise UserError(f"--url {self.url}: is no URL ({error})") from error
        if not named or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise UserError(f"--url {self.url}: is no URL; one is http://localhost:8000/v1")
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():  # the key itself is not shown
            raise UserError(f"the environment variable {self.key_variable} holds letters that no API key has")
        for name in ("timeout", "attempts", "max_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be above 0, not {getattr(self, name)}")

    def ask(self, question: str, seed: int) -> str:
        """The text of the answer.

        Raises:
            AnswerError: what came is no chat answer.
            UserError: the server refuses, or fails at every attempt.
        """
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), MAX_WAIT))
            try:
                return _text(self._post(question, seed))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code} {error.reason}"
                if error.code not in TRY_AGAIN:
                    raise UserError(f"{self.url}: refuses the question ({why}){_hint(error.code)}") from error
            except (OSError, http.client.HTTPException) as error:  # no connection, cut short, or too slow
                why = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"{self.url}: does not answer, asked {self.attempts} times ({why}); what it answered is kept")

    def _post(self, question: str, seed: int) -> bytes:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout) as answer:
            data: bytes = answer.read(MAX_ANSWER_BYTES + 1)
        if len(data) > MAX_ANSWER_BYTES:
            raise AnswerError(f"the answer is over the limit of {MAX_ANSWER_BYTES} bytes")
        return data


def _text(data: bytes) -> str:
    try:
        text = json.loads(data.decode("utf-8"))["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise AnswerError(f"the server's answer is no chat answer ({type(error).__name__}: {error})") from error
    if not isinstance(text, str):
        raise AnswerError("the server's answer holds no text")
    return text


def _hint(code: int) -> str:
    if code in (401, 403):
        return "; set the API key's environment variable (--key_variable)"
    return "; check --url and --model" if code in (301, 302, 307, 308, 404) else ""
