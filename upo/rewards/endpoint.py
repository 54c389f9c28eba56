"""One OpenAI-compatible server: one host, no redirects, a key that leaves for that host only, and patience with errors that pass."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from upo.errors import ConfigError, UpoError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LONGEST_WAIT = 120.0  # seconds, whatever the server asks for
LARGEST_REPLY = 2**20  # bytes
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


@dataclass(frozen=True)
class Address:
    """Where the server is: https, or http on this very machine."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ConfigError, without the key's configuration prefix, for anything but https://HOST[:PORT]/PATH or http on loopback."""
        wrong = ConfigError("url: must be like https://api.openai.com/v1.")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise wrong
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise wrong from None
        if parts.username or parts.password:
            raise ConfigError("url: holds a user name or password. Give the key in an environment variable that `key` names.")
        if parts.query or parts.fragment or not host:
            raise wrong
        if parts.scheme != "https" and not (parts.scheme == "http" and host in LOOPBACK):
            raise ConfigError(f"url {url!r} must begin with https://; http is for this machine only (http://127.0.0.1:8000/v1).")
        return cls(parts.scheme == "https", host, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/"))


def read_key(variable: str, host: str) -> str:
    """The key in an environment variable; "" if none is named. Raises ConfigError unless <variable>_HOST says that it is for this host.

    A configuration names both the variable and the server. Without the second variable, one from elsewhere could have any secret sent
    anywhere.
    """
    if not variable:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ConfigError("key: must be the name of an environment variable that holds the key, e.g. OPENAI_API_KEY; never the key itself.")
    key, bound = os.environ.get(variable, "").strip(), os.environ.get(f"{variable}_HOST", "").strip().lower()
    if not key:
        raise ConfigError(f"key: the environment variable {variable} is not set.")
    if bound != host:
        raise ConfigError(
            f"key: {variable} is not for {host}. A key is sent only to the host that {variable}_HOST names: export {variable}_HOST={host}"
            + (f" (it names {bound} now)." if bound else ", if you trust that host with it.")
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"key: {variable} holds characters that no key has.")
    return key


@dataclass
class Endpoint:
    """Requests to one address: at most `per_minute`, each with a time limit and repeated where the fault may pass."""

    address: Address
    key: str = field(repr=False)
    timeout: float = 60.0
    retries: int = 5
    per_minute: float = 60.0
    repeated: int = 0  # requests that were sent again
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server replies. Raises UpoError in one line, in which the key does not occur."""
        cause = ""
        for attempt in range(self.retries + 1):
            self._take_turn()
            wait = min(2.0**attempt, LONGEST_WAIT)
            try:
                status, headers, content = self._once(path, json.dumps(body).encode())
            except TimeoutError:
                cause = f"did not answer within {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as error:
                cause = f"cannot be reached ({self.shown(error) or type(error).__name__})"
            else:
                if status == 200:
                    return _json(content)
                cause = f"answered {status} ({self.shown(_message(content))})"
                if status not in PASSING:
                    raise UpoError(f"{self._name} {self._final(status, headers, cause)}")
                wait = _retry_after(headers) or wait
            if attempt < self.retries:
                with self._lock:
                    self.repeated += 1
                self._pause(wait)
        raise UpoError(f"{self._name} {cause}, {self.retries + 1} times in a row. Try again later, or raise `timeout` or lower `per_minute`.")

    def close(self) -> None:
        """No more requests; those who wait for their turn give up."""
        self._closed.set()

    @property
    def _name(self) -> str:
        return f"{self.address.host}:{self.address.port}"

    def _once(self, path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        connection = kind(self.address.host, self.address.port, timeout=self.timeout)
        end = time.monotonic() + self.timeout
        try:
            authorisation = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            connection.request("POST", self.address.path + path, body, {"Content-Type": "application/json", **authorisation})
            response = connection.getresponse()
            content = b""
            while len(content) <= LARGEST_REPLY and (part := response.read1(65536)):
                content += part
                if time.monotonic() > end:  # the socket's limit is for each piece
                    raise TimeoutError
            return response.status, dict(response.getheaders()), content[:LARGEST_REPLY]
        finally:
            connection.close()

    def _final(self, status: int, headers: Mapping[str, str], cause: str) -> str:
        if 300 <= status < 400:
            target = self.shown(next((v for k, v in headers.items() if k.lower() == "location"), "elsewhere"))
            return f"redirects to {target}, which is not followed. Give the final address as `url`."
        if status in (401, 403):
            return f"{cause}: it does not accept the key. Check the variable that `key` names."
        return f"{cause}. Check `url` and `model`."

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + 60.0 / self.per_minute
        self._pause(turn - now)

    def _pause(self, seconds: float) -> None:
        if self._closed.wait(max(seconds, 0.0)):
            raise UpoError(f"{self._name}: stopped.")

    def shown(self, value: object) -> str:
        """On one line, cut, and without the key."""
        text = " ".join(str(value).split())
        return (text.replace(self.key, "***") if self.key else text)[:200]


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _message(content: bytes) -> str:
    """What an error says, in OpenAI's form or as it is."""
    reply = _json(content)
    error = reply.get("error") if isinstance(reply, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else content.decode("utf-8", "replace")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from a number or a date; None without a usable one."""
    value = next((v for k, v in headers.items() if k.lower() == "retry-after"), "")
    try:
        seconds = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)
