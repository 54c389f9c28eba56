"""A language model behind a server in this process: what it was asked, and replies that a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-0123456789"
Reply = tuple[int, dict[str, str], bytes]


class Server:
    """Answers with `reply(request)`; keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], Reply] = lambda request: rating(5)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = {"path": self.path, "key": self.headers.get("Authorization"), "body": body}
                request |= {"given": json.loads(body["messages"][1]["content"]), "system": body["messages"][0]["content"]}
                outer.requests.append(request)
                status, headers, content = outer.reply(request)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *arguments: None  # a client that gave up waiting
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@contextmanager
def serving() -> Iterator[Server]:
    """A server that ends with the block."""
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def says(text: str) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def rating(score: Any) -> Reply:
    return says(json.dumps({"score": score}))


def fails(status: int, message: str = "busy", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}}).encode()
