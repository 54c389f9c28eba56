"""A language model behind an OpenAI-compatible server, as options that name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from upo.errors import ConfigError
from upo.losses.options import option
from upo.rewards.endpoint import Address, Endpoint, read_key


@dataclass(frozen=True)
class Service:
    """Which model on which server, by whose key, how often. docs/scorers.md says what each option means, at `judge`."""

    url: str = ""
    model: str = ""
    key: str = option("", optional=True)
    temperature: float = option(0.0, least=0)
    per_minute: float = option(60.0, above=0)
    parallel: int = option(4, least=1, most=64)
    timeout: float = option(60.0, above=0)
    retries: int = option(5, least=0)

    volatile: ClassVar[frozenset[str]] = frozenset({"key", "per_minute", "parallel", "timeout", "retries"})  # do not change what is said

    def endpoint(self, name: str) -> Endpoint:
        """The server. Raises ConfigError beginning with `name`: an address that is refused, a key that is missing or for another host."""
        try:
            address = Address.parse(self.url)
            return Endpoint(address, read_key(self.key, address.host), self.timeout, self.retries, self.per_minute)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    def ask(self, endpoint: Endpoint, system: str, user: str) -> str:
        """The model's reply; "" if it gave none, or one that a limit cut off. Raises UpoError if the server gives none at all."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        reply = endpoint.post("/chat/completions", {"model": self.model, "temperature": self.temperature, "messages": messages})
        return _content(reply)


def _content(reply: Any) -> str:
    try:
        choice = reply["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) and choice.get("finish_reason") != "length" else ""
