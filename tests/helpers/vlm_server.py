"""A real HTTP server on this machine in the place of a vision-language model, which answers as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        #: Headers (and the path) and body of every request.
        self.asked: list[tuple[dict, dict]] = []
        #: Number of the request -> status and content of the answer.
        self.reply: Callable[[int], tuple[int, bytes]] = lambda _: says('{"harmful": false, "categories": []}')

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((dict(self.headers) | {"path": self.path}, body))
        status, content = self.server.reply(len(self.server.asked) - 1)
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def says(text: object) -> tuple[int, bytes]:
    """An answer of the chat endpoint."""
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
