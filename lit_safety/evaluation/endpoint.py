"""JSON over HTTP with a time limit, a few retries and a bounded answer."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from lit_safety.errors import UserError

MAX_ANSWER_BYTES = 1 << 20
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed later."""


class EndpointError(Exception):
    """The service gave no usable answer."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to wherever the answer points."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """An HTTP service that takes and gives JSON.

    Args:
        url: base URL, http or https.
        api_key_variable: environment variable that holds the bearer token; unset: none is sent.
        timeout: seconds until a request has failed.
        retries: further tries after a failure that may pass.
        pause: seconds before the first further try; doubled each time.

    Raises:
        UserError: the URL is none, or a number is out of its range.
    """

    def __init__(self, url: str, api_key_variable: str, timeout: float, retries: int, pause: float = 0.5) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {url}: must start with http:// or https://, such as http://localhost:8000/v1")
        if not 0 < timeout < float("inf") or retries < 0:
            raise UserError(f"endpoint {url}: timeout {timeout} must be above 0 and retries {retries} not negative")
        try:
            parts = urllib.parse.urlsplit(url)
            whole = bool(parts.hostname) and not parts.query and not parts.fragment and (parts.port or 1) > 0
        except ValueError:  # a port that is no number, a bracket that is not closed
            whole = False
        if not whole:
            raise UserError(f"endpoint {url}: is no base URL; give scheme, host and path, as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None:  # the URL stands in the report
            raise UserError("endpoint: the URL holds a user or password; give the key by the environment variable")
        self.url, self.timeout, self.retries, self.pause = url.rstrip("/"), timeout, retries, pause
        self._variable = api_key_variable
        self._opener = urllib.request.build_opener(_NoRedirects)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the service answers.

        Raises:
            EndpointError: a timeout, a bad status, or an answer that is no JSON, after the last try.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                problem = f"{self.url} answered status {error.code}"
                error.close()
                if error.code not in AGAIN:
                    raise EndpointError(problem) from error
            except TimeoutError:
                problem = f"{self.url} gave no answer in {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                problem = f"{self.url} gave no answer in {self.timeout:g} s" if late else f"{self.url}: {reason}"
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        raise EndpointError(f"{problem}, {self.retries + 1} times")

    def _once(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self._variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # http.client would name the key in its complaint
            raise EndpointError(f"the key in {self._variable} holds characters that no header can hold")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        until = time.monotonic() + self.timeout
        with self._opener.open(request, timeout=self.timeout) as answer:
            content = self._read(answer, until)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise EndpointError(f"{self.url} answered no JSON") from error

    def _read(self, answer: http.client.HTTPResponse, until: float) -> bytes:
        """The whole answer. The socket's own limit holds for each piece; one that drips would never be over."""
        content, announced = b"", answer.length
        while announced is None or len(content) < announced:
            piece = answer.read1(1 << 16 if announced is None else min(1 << 16, announced - len(content)))
            if not piece:
                break
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                raise EndpointError(f"{self.url} answered more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > until:
                raise TimeoutError
        if announced is not None and len(content) < announced:
            raise http.client.IncompleteRead(content, announced - len(content))
        return content
