"""A language model that is asked over HTTP: on a local server (vLLM, llama.cpp, Ollama, ...) or a remote one."""

from __future__ import annotations

from dataclasses import dataclass

from lit_safety.core.errors import UserError
from lit_safety.core.http import AGAIN, AnswerError, Endpoint, EndpointError


@dataclass(frozen=True)
class ChatModel:
    """A language model behind an OpenAI-compatible chat endpoint.

    Args:
        url: base URL of the API, such as http://localhost:8000/v1.
        model: the model's name there.
        key_variable: environment variable that holds the API key; none is sent where it is not set.
        timeout: seconds to wait for an answer.
        attempts: how often a question is asked when the server fails, waiting longer each time.
        wait: seconds before the second attempt; doubled before each further one, up to a minute.

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
        for name in ("timeout", "attempts", "max_tokens"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} must be above 0, not {getattr(self, name)}")
        try:
            self._endpoint().key()
        except UserError as error:
            raise UserError(f"--url: {error}") from error
        except EndpointError as error:
            raise UserError(str(error)) from error

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.key_variable, self.timeout, self.attempts - 1, self.wait)

    def ask(self, question: str, seed: int) -> str:
        """The text of the answer.

        Raises:
            AnswerError: what came is not a chat answer.
            UserError: the server refuses, or fails at every attempt.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        try:
            return self._endpoint().chat(body)
        except AnswerError as error:
            raise AnswerError(f"the server's answer is not a chat answer ({error})") from error
        except EndpointError as error:
            why = str(error) if error.status is None else f"HTTP {error.status}"
            if error.status is not None and error.status not in AGAIN:
                raise UserError(f"{self.url}: refuses the question ({why}){_hint(error.status)}") from error
            raise UserError(
                f"{self.url}: does not answer, asked {self.attempts} times ({why}); what it answered is kept"
            ) from error


def _hint(code: int) -> str:
    if code in (401, 403):
        return "; set the API key's environment variable (--key_variable)"
    return "; check --url and --model" if code in (301, 302, 307, 308, 404) else ""
