"""From text to token ids and back: prompts exactly as inference sees them, completions with the token that ends their turn."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upo.data.forest import Tokens
from upo.data.text import Message, Text
from upo.errors import ModelError
from upo.models import is_native

_VOCABULARY = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "added_tokens.json")

# Some templates write today's date. A run's tokens must not change overnight, so for them it is always the date that Llama 3 falls back
# to. The line break after the macro is one that the template engine removes.
_DATE = datetime.datetime(2024, 7, 26)
_FORMATS = "".join(f"|replace('%{letter}', '{_DATE.strftime('%' + letter)}')" for letter in "aAbBdHIjmMpSyY")
_FIXED_CLOCK = "{% macro strftime_now(format) %}{{ format" + _FORMATS + " }}{% endmacro %}\n"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, from its own files and without running code from it. Raises ModelError."""
    if not any((folder / name).is_file() for name in _VOCABULARY):
        raise ModelError(f"{folder}: no tokenizer (none of tokenizer.json, tokenizer.model, vocab.json); copy the base model's files there.")
    settings = _read_json(folder / "tokenizer_config.json")
    if settings.get("auto_map") and not is_native("tokenizer_config.json", settings):
        raise ModelError(f"{folder}/tokenizer_config.json: asks for code of its own (auto_map), which is never run; use a model with a standard tokenizer.")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:200] or type(error).__name__}).") from None
    return Tokenizer(folder, loaded)


class Tokenizer:
    """A model's tokenizer and chat template.

    `hash` identifies vocabulary, template and special tokens. `eos_ids` are all tokens at which generation stops: those of
    generation_config.json, config.json and the tokenizer, and `turn_end`, the token with which the template closes an assistant turn.
    """

    def __init__(self, folder: Path, loaded: Any) -> None:
        self.folder = folder
        self._loaded = loaded
        loaded.model_max_length = int(1e30)  # lengths are this library's business; transformers would only print a warning
        self._last: tuple[Any, str, list[int]] | None = None
        stops = [loaded.eos_token_id] if loaded.eos_token_id is not None else []
        for name in ("generation_config.json", "config.json"):
            value = _read_json(folder / name).get("eos_token_id")
            stops += value if isinstance(value, list) else [] if value is None else [value]
        if not stops:
            raise ModelError(f"{folder}: no end-of-text token in tokenizer_config.json, generation_config.json or config.json; add eos_token.")
        self.eos: int = loaded.eos_token_id if loaded.eos_token_id is not None else stops[0]
        self.turn_end = self._find_turn_end(set(stops))
        self.eos_ids: tuple[int, ...] = tuple(sorted({*stops, self.turn_end}))
        self.pad_id: int = loaded.pad_token_id if loaded.pad_token_id is not None else self.eos
        self.special: tuple[str, ...] = tuple(t.content for t in loaded.added_tokens_decoder.values() if t.special)
        self.hash = self._hash()

    @property
    def has_template(self) -> bool:
        return bool(self._loaded.chat_template)

    @property
    def turn_end_text(self) -> str:
        return str(self._loaded.convert_ids_to_tokens(self.turn_end))

    def prompt_ids(self, prompt: Text, tools: Sequence[dict[str, Any]] | None = None) -> Tokens:
        """[n] int32. A conversation goes through the chat template with its generation prompt; a string is text, with BOS where the
        tokenizer adds one by itself. Raises ModelError without a chat template."""
        return np.array(self._prompt(prompt, tools)[1], np.int32)

    def completion_ids(self, prompt: Text, completion: Text, tools: Sequence[dict[str, Any]] | None = None) -> Tokens:
        """[m] int32: what the model should generate after `prompt_ids(prompt)`, with the token that ends the turn as the last one.

        For a conversation it is the rendered whole minus the rendered prompt, without what the template writes after the end of the
        turn (ChatML's line break: no model generates it). Where the template renders the prompt differently once it is answered, or
        leaves out part of the answer (thinking, mostly), the completion's own text is taken. The prompt's tokens never change with the completion: where a merge
        would cross the border, the completion is tokenised by itself.
        """
        text, ids = self._prompt(prompt, tools)
        if isinstance(prompt, str) or isinstance(completion, str):
            tokens = self._continue(text, ids, str(completion), special=True)
            return self._ended(tokens, self.eos)
        whole = self._render([*prompt, *completion], tools, generation=False)
        said = str(completion[-1]["content"])
        if whole.startswith(text) and said.strip() in whole[len(text) :]:
            tokens = self._continue(text, ids, whole[len(text) :], special=False)
        elif any(message.get("tool_calls") for message in completion):
            raise ModelError(f"{self.folder}: its chat template renders answered prompts differently, so tool calls cannot be told apart from them.")
        else:
            tokens = self._fragment(said)
        ends = [i for i, token in enumerate(tokens) if token == self.turn_end]
        return self._ended(tokens[: ends[-1]] if ends else tokens, self.turn_end)

    def text_ids(self, text: str) -> Tokens:
        """[n] int32 of a text in the middle of another, special tokens written in it included."""
        return np.array(self._fragment(text), np.int32)

    def decode(self, tokens: Sequence[int] | Tokens) -> str:
        """Text without special tokens."""
        return str(self._loaded.decode([int(t) for t in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _ended(self, tokens: list[int], end: int) -> Tokens:
        """A completion's tokens with one token at their end that closes them."""
        while tokens and tokens[-1] == end:
            tokens = tokens[:-1]
        if not tokens:
            raise ModelError(f"{self.folder}: nothing of the completion is left in tokens; its chat template may leave out tool calls.")
        return np.array([*tokens, end], np.int32)

    def _prompt(self, prompt: Text, tools: Sequence[dict[str, Any]] | None) -> tuple[str, list[int]]:
        """The prompt as rendered text and as tokens; the last one is remembered, as each of its completions asks for it."""
        key = (prompt, tools)
        if self._last is None or self._last[0] != key:
            text = prompt if isinstance(prompt, str) else self._render(prompt, tools, generation=True)
            self._last = (key, text, self._encode(text, special=isinstance(prompt, str)))
        return self._last[1], self._last[2]

    def _continue(self, prompt: str, ids: list[int], text: str, special: bool) -> list[int]:
        """Tokens of `text` after the prompt: from the joint text where its tokens begin with the prompt's, else by itself."""
        joint = self._encode(prompt + text, special)
        return joint[len(ids) :] if joint[: len(ids)] == ids else self._fragment(text)

    def _fragment(self, text: str) -> list[int]:
        """Tokens of a text in the middle of another: SentencePiece would begin it with a space that is not there."""
        tokens = self._encode(text, special=False)
        if tokens and str(self._loaded.convert_ids_to_tokens(tokens[0])).startswith("▁"):
            anchor = self._encode("\n", special=False)
            joint = self._encode("\n" + text, special=False)
            if joint[: len(anchor)] == anchor:
                return joint[len(anchor) :]
        return tokens

    def _encode(self, text: str, special: bool) -> list[int]:
        bare = list(self._loaded.encode(text, add_special_tokens=False))
        if not special:
            return bare
        tokens = list(self._loaded.encode(text, add_special_tokens=True))
        # What the tokenizer adds in front (BOS) belongs to a text that goes on; what it adds behind (EOS) does not.
        end = next((e for e in range(len(tokens), len(bare) - 1, -1) if tokens[e - len(bare) : e] == bare), len(tokens))
        return tokens[:end]

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, generation: bool) -> str:
        if not self.has_template:
            raise ModelError(
                f"{self.folder}: no chat template, but the data holds conversations. Use the model's instruct version, put a "
                "chat_template.jinja into the folder, or give prompts and completions as plain strings."
            )
        given = list(tools) if tools else None
        try:
            template = self._loaded.get_chat_template(None, given)
            if "strftime_now" in template:
                template = _FIXED_CLOCK + template
            rendered = self._loaded.apply_chat_template(
                list(messages), tools=given, chat_template=template, add_generation_prompt=generation, tokenize=False
            )
            return str(rendered)
        except Exception as error:  # a template raises what it likes, e.g. on roles it does not know
            roles = ", ".join(m["role"] for m in messages)
            raise ModelError(f"{self.folder}: its chat template refuses turns of {roles} ({str(error).strip()[:200]}); change the rows or the model.") from None

    def _find_turn_end(self, stops: set[int]) -> int:
        """The first special token after an assistant's words, or the end of text where the template has none (or there is none)."""
        mark = "upo"
        try:
            text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], None, generation=False)
        except ModelError:
            return self.eos
        special = {i for i, token in self._loaded.added_tokens_decoder.items() if token.special} | stops
        tail = self._encode(text.rpartition(mark)[2], special=False)
        return next((token for token in tail if token in special), self.eos)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name in _VOCABULARY:
            if (self.folder / name).is_file():
                digest.update(name.encode() + b"\0" + hashlib.sha256((self.folder / name).read_bytes()).digest())
        # tokenizer_config.json also records where and by which version it was saved, so only what it means is taken from it.
        meaning = [self._loaded.chat_template, self.eos_ids, self.pad_id, self._encode("a b", special=True)]
        digest.update(json.dumps(meaning).encode())
        return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); download the model again.") from None
    return data if isinstance(data, dict) else {}
