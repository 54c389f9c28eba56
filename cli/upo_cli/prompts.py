"""Prompts from the command line: text files, JSON lines, standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from upo.errors import ConfigError, DataError

Message = dict[str, str]


def conversations(prompts: tuple[str, ...], file: Path | None, system: str | None = None) -> list[list[Message]]:
    """One list of messages for each prompt, in order; those of standard input if neither prompts nor a file is given."""
    found = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read ({error}).") from None
        found += _read(text, str(file))
    elif not prompts:
        if sys.stdin.isatty():
            raise click.UsageError('No prompt. Give --prompt "...", --file FILE, or pipe prompts in, one a line.')
        found = _read(sys.stdin.read(), "standard input")
    if not found:
        raise DataError(f"{file or 'standard input'}: no prompt in it.")
    for number, messages in enumerate(found, 1):
        if not all(m["content"].strip() for m in messages):
            raise ConfigError(f"prompt {number}: it is empty.")
    first = [{"role": "system", "content": system}] if system else []
    return [first + messages for messages in found]


def plain_text(messages: list[Message], option: str = "--plain") -> str:
    """The only turn's text, for a model without a chat template."""
    if len(messages) != 1:
        raise ConfigError(f"{option}: the prompt has {len(messages)} turns ({', '.join(m['role'] for m in messages)}); without a chat template it can have one.")
    return messages[0]["content"]


def _read(text: str, name: str) -> list[list[Message]]:
    """Prompts from lines of text, or of JSON if the file is named so or begins with a brace."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not name.endswith((".jsonl", ".json")) and not text.lstrip().startswith("{"):
        return [[{"role": "user", "content": line}] for _, line in lines]
    return [_from_json(line, f"{name}:{number}") for number, line in lines]


def _from_json(line: str, where: str) -> list[Message]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}). One object a line is expected.") from None
    value = row if isinstance(row, str) else row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    raise DataError(f'{where}: no prompt here. Write {{"prompt": "..."}} or {{"messages": [{{"role": "user", "content": "..."}}]}}.')
