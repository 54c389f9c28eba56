"""Prompts from the command line: text files, JSON lines, standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from upo.data.text import Message, is_blank, parse_text
from upo.errors import ConfigError, DataError


def conversations(prompts: tuple[str, ...], file: Path | None, system: str | None = None) -> list[list[Message]]:
    """One list of messages for each prompt, in order; those of standard input if neither prompts nor a file is given."""
    found = [_messages(prompt, f"--prompt {number}") for number, prompt in enumerate(prompts, 1)]
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
        found += _read(text, str(file))
    elif not prompts:
        if sys.stdin.isatty():
            raise click.UsageError('No prompt. Give --prompt "...", --file FILE, or pipe prompts in, one a line.')
        found = _read(sys.stdin.read(), "standard input")
    if not found:
        raise DataError(f"{file or 'standard input'}: no prompt in it.")
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return [first + messages for messages in found]


def plain_text(messages: list[Message], option: str = "--plain") -> str:
    """The only turn's text, for a model without a chat template."""
    if len(messages) != 1:
        raise ConfigError(f"{option}: the prompt has {len(messages)} turns ({', '.join(m['role'] for m in messages)}); without a chat template it can have one.")
    return str(messages[0]["content"])


def _read(text: str, name: str) -> list[list[Message]]:
    """Prompts from lines of text, or of JSON if the file is named so or begins with a brace."""
    lines = [(f"{name}:{number}", line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not name.endswith((".jsonl", ".ndjson", ".json")) and not text.lstrip().startswith("{"):
        return [_messages(line, where) for where, line in lines]
    return [_from_json(line, where) for where, line in lines]


def _from_json(line: str, where: str) -> list[Message]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}). One object a line is expected.") from None
    value = row if isinstance(row, str) else row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
    if not isinstance(value, (str, list)):
        raise DataError(f'{where}: no prompt here. Write {{"prompt": "..."}} or {{"messages": [{{"role": "user", "content": "..."}}]}}.')
    return _messages(value, where)


def _messages(value: str | list[Any], where: str) -> list[Message]:
    """A prompt as a conversation that the model is to go on with."""
    parsed = parse_text(value, where, "prompt")
    if is_blank(parsed):
        raise DataError(f"{where}: the prompt is empty.")
    messages = [{"role": "user", "content": parsed}] if isinstance(parsed, str) else parsed
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the prompt ends in an assistant turn; end it with a user turn.")
    return messages
