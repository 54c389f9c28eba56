"""Prompts and completions as they stand in a row: plain strings or conversations, checked and brought into one form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from upo.data.read import describe
from upo.errors import DataError

Message = dict[str, Any]  # role, content (a string), and what the chat template knows, e.g. tool_calls
Text = str | list[Message]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_text(value: Any, origin: str, name: str) -> Text:
    """A string, or a list of messages with string contents and without null fields. Raises DataError naming the field."""
    if isinstance(value, str):
        return _unicode(value, origin, name)
    if isinstance(value, Sequence):
        return [_message(item, origin, f"{name}[{i}]") for i, item in enumerate(value)]
    raise DataError(f'{origin}: "{name}" is {describe(value)}; give a string or a list of {{"role", "content"}} messages.')


def _message(item: Any, origin: str, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f'{origin}: "{name}" is {describe(item)}; a conversation is a list of {{"role", "content"}} messages.')
    if "role" not in item and {"from", "value"} <= set(item):
        raise DataError(f'{origin}: "{name}" has ShareGPT keys; rename "from" to "role" (human: user, gpt: assistant) and "value" to "content".')
    if not isinstance(item.get("role"), str):
        raise DataError(f'{origin}: "{name}" has no "role"; each message needs one (system, user, assistant or tool).')
    message = {key: value for key, value in item.items() if value is not None}  # Parquet fills keys other messages have with null
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        what = "holds parts other than text" if isinstance(content, list) else f"is {describe(content)}"
        raise DataError(f'{origin}: "content" of "{name}" {what}; only text is supported.')
    return {**message, "content": _unicode(content, origin, name)}


def _unicode(text: str, origin: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f'{origin}: "{name}" holds half of a surrogate pair (\\ud8..), which is not text; repair the escape.') from None
    return text


def is_transcript(value: Any) -> bool:
    """Whether a string is an Anthropic HH transcript: turns that begin with `\\n\\nHuman:` and `\\n\\nAssistant:`."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def parse_transcript(text: str, origin: str, name: str) -> list[Message]:
    """The turns of an HH transcript; an empty last turn (the cue of a prompt) is left out. Raises DataError if it is none."""
    head, *turns = _TURN.split(text.strip())
    if head.strip() or not turns:
        raise DataError(f'{origin}: "{name}" is not a transcript of "Human:" and "Assistant:" turns; set data.layout to another one.')
    messages: list[Message] = [
        {"role": _ROLES[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    return messages[:-1] if not messages[-1]["content"] else messages


def is_blank(text: Text) -> bool:
    """Nothing but white space, and no tool call."""
    if isinstance(text, str):
        return not text.strip()
    return not any(m["content"].strip() or m.get("tool_calls") for m in text)


def readable(text: Text) -> str:
    """As a scorer or a reader sees it: a string, or the only message's content, or `role: content` line by line."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in text)


def shared_turns(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many leading messages two conversations share, leaving each at least one."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), max(limit, 0))


def shared_prefix(a: str, b: str) -> int:
    """Where to split two strings that begin alike: the last shared word or line boundary that leaves each a text of its own.

    A character-level split would cut words ("the sky is bl" + "ue"), which tokenises like nothing the model has read. A space goes
    with the completion and a line break with the prompt. 0 if there is no such place.
    """
    limit = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    for i in range(limit, 0, -1):
        boundary = a[i - 1] == "\n" or (a[i : i + 1].isspace() and b[i : i + 1].isspace() and not a[i - 1].isspace())
        if boundary and a[i:].strip() and b[i:].strip():
            return i
    return 0
