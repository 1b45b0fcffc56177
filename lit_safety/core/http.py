"""JSON over HTTP with a time limit, a few retries and a bounded answer: the one client of chat endpoints."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from typing import Any

from lit_safety.core.errors import UserError
from lit_safety.core.text import load_json

MAX_ANSWER_BYTES = 4 << 20
MAX_WAIT = 60.0
"""Seconds between two tries, at most."""
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed later."""


class EndpointError(Exception):
    """The service gave no usable answer.

    Args:
        message: what happened.
        status: the HTTP status, where that is what happened.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AnswerError(EndpointError):
    """The service answered, but with something that is not what was asked for."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are refused: they would send the key to the address that the answer names."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Opened(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Remembers the connections of one request, so that they can be closed when its time is up."""

    def __init__(self) -> None:
        urllib.request.HTTPSHandler.__init__(self)
        self.connections: list[http.client.HTTPConnection] = []

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._remembering(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._remembering(http.client.HTTPSConnection), request)

    def _remembering(self, kind: Any) -> Any:
        def make(*given: Any, **options: Any) -> Any:
            self.connections.append(kind(*given, **options))
            return self.connections[-1]

        return make

    def cut_off(self) -> None:
        """Close them: code that waits for these connections gets an error at once."""
        for connection in self.connections:
            if (sock := connection.sock) is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class Endpoint:
    """An HTTP service that takes and gives JSON.

    Args:
        url: base URL, http or https.
        api_key_variable: environment variable that holds the bearer token; unset: none is sent.
        timeout: seconds after which a request has failed, even if the answer still arrives slowly.
        retries: further tries after a failure that may be temporary.
        pause: seconds before the first further try; doubled each time, up to `MAX_WAIT`.

    Raises:
        UserError: the URL is not valid, or a number is out of its range.
    """

    def __init__(self, url: str, api_key_variable: str, timeout: float, retries: int, pause: float = 0.5) -> None:
        if "@" in url:  # the URL stands in reports and messages
            raise UserError("endpoint: the URL holds a user or password; give the key in the environment variable")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {url}: must start with http:// or https://, such as http://localhost:8000/v1")
        if not 0 < timeout <= threading.TIMEOUT_MAX or retries < 0:
            raise UserError(f"endpoint {url}: timeout {timeout} must be above 0 and retries {retries} not negative")
        try:
            parts = urllib.parse.urlsplit(url)
            whole = bool(parts.hostname) and not parts.query and not parts.fragment
            whole = whole and (parts.port is None or parts.port > 0)  # reading the port checks it
        except ValueError:  # a port that is not a number, a bracket that is not closed
            whole = False
        if not whole or not url.isascii() or not url.isprintable() or " " in url:
            raise UserError(
                f"endpoint {url}: is not a base URL; give scheme, host and path, as http://localhost:8000/v1"
            )
        self.url, self.timeout, self.retries, self.pause = url.rstrip("/"), timeout, retries, pause
        self._variable = api_key_variable

    def key(self) -> str:
        """The bearer token; empty where there is none.

        Raises:
            EndpointError: a header cannot hold it; the key itself is not shown.
        """
        key = os.environ.get(self._variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # http.client would name the key in its complaint
            raise EndpointError(
                f"the environment variable {self._variable} holds characters that cannot be part of a key"
            )
        return key

    def chat(self, body: dict[str, Any]) -> str:
        """The text that a chat endpoint answers.

        Raises:
            AnswerError: its answer is not text.
            EndpointError: as `post`.
        """
        answer = self.post("/chat/completions", body)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise AnswerError("the endpoint's answer lacks choices[0].message.content") from error
        if not isinstance(text, str):
            raise AnswerError(f"the model's answer is not text: {' '.join(str(text).split())[:80]}")
        return text

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the service answers.

        Raises:
            AnswerError: its answer is not JSON, or too long.
            EndpointError: a timeout, a failed connection or a bad status, after the last try.
        """
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.pause * 2.0 ** min(attempt - 1, 30), MAX_WAIT))
            status = None
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                problem, status = f"{self.url} answered status {error.code}", error.code
                error.close()
                if error.code not in AGAIN:
                    raise EndpointError(problem, status) from error
            except TimeoutError:
                problem = f"{self.url} gave no answer in {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                problem = f"{self.url} gave no answer in {self.timeout:g} s" if late else f"{self.url}: {reason!s}"
        raise EndpointError(f"{problem}, {self.retries + 1} times", status)

    def _once(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := self.key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        until = time.monotonic() + self.timeout
        opened = _Opened()
        # The socket's own limit is for each read: it would never be reached if the headers arrive byte by byte.
        watch = threading.Timer(self.timeout, opened.cut_off)
        watch.daemon = True
        watch.start()
        try:
            with urllib.request.build_opener(_NoRedirects, opened).open(request, timeout=self.timeout) as answer:
                content = self._read(answer, until)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= until:
                raise TimeoutError from error
            raise
        finally:
            watch.cancel()
        try:
            return load_json(content)
        except ValueError as error:
            raise AnswerError(f"{self.url}: the answer is not JSON") from error

    def _read(self, answer: http.client.HTTPResponse, until: float) -> bytes:
        """The whole answer, if it arrives in time."""
        chunks, size, announced = [], 0, answer.length
        while announced is None or size < announced:
            chunk = answer.read1(1 << 16 if announced is None else min(1 << 16, announced - size))
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise AnswerError(f"{self.url}: the answer has more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > until:
                raise TimeoutError
        content = b"".join(chunks)
        if announced is not None and size < announced:
            raise http.client.IncompleteRead(content, announced - size)
        return content


def unfenced(text: str) -> str:
    """An answer without the three backticks around it, if it has them."""
    text = text.strip()
    if len(text) < 6 or not (text.startswith("```") and text.endswith("```")):
        return text
    return text[3:-3].removeprefix("json").strip()
