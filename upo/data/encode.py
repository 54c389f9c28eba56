"""From rows to examples: token ids within `max_length`."""

from __future__ import annotations

from upo.data.batch import Example
from upo.data.forest import Tokens
from upo.data.notes import Notes
from upo.data.rows import Row
from upo.data.text import Text, readable
from upo.data.tokenizer import Tokenizer
from upo.errors import DataError, ModelError


def encode(row: Row, tokenizer: Tokenizer, max_length: int, overflow: str, notes: Notes) -> Example | None:
    """The row as an example whose prompt and longest completion fit `max_length` tokens; None (and a note) if it is dropped.

    Whole leading turns of the prompt go first, up to the next user turn; a system message and the last user turn stay. What is still
    too long is dropped, or, with overflow "cut", every completion is cut to the same limit and none keeps its end of turn: a pair in
    which one side alone ends would teach endings. Raises ModelError, with the row's origin, where the chat template cannot render it.
    """
    try:
        prompt, completions, trimmed = _fit_prompt(row, tokenizer, max_length)
    except ModelError as error:
        raise ModelError(f"{row.origin}: {error}") from None
    if len(prompt) == 0:
        raise DataError(f'{row.origin}: "prompt" has no tokens; give it a text, or remove the row.')
    room = max_length - len(prompt)
    longest = max(map(len, completions))
    if room < 1 or (longest > room and overflow == "drop"):
        notes.add("prompt_too_long" if room < 1 else "too_long", row.origin)
        return None
    texts = tuple(_words(c) for c in row.completions)
    if longest > room:
        completions = tuple(c[: min(room, len(c) - 1)] for c in completions)
        texts = tuple(tokenizer.decode(c) for c in completions)
        notes.add("cut", row.origin)
    if trimmed:
        notes.add("trimmed", row.origin)
    if any(special in text for special in tokenizer.special for text in (readable(row.prompt), *texts)):
        notes.add("special", row.origin)
    if isinstance(row.prompt, str) and tokenizer.has_template:
        notes.add("plain", row.origin)
    return Example(
        origin=row.origin,
        kind=row.kind,
        prompt=prompt,
        completions=completions,
        labels=row.labels,
        texts=texts,
        prompt_text=readable(row.prompt),
        prompt_turns=() if isinstance(row.prompt, str) else tuple(row.prompt),
        columns=dict(row.columns),
        anchor=None if row.anchor is None else tokenizer.completion_ids(row.prompt, row.anchor, row.tools)[:room],
        ref_rewards=row.ref_rewards,
    )


def _fit_prompt(row: Row, tokenizer: Tokenizer, max_length: int) -> tuple[Tokens, tuple[Tokens, ...], bool]:
    prompt: Text = row.prompt
    while True:
        ids = tokenizer.prompt_ids(prompt, row.tools)
        completions = tuple(tokenizer.completion_ids(prompt, c, row.tools) for c in row.completions)
        shorter = _without_first_turns(prompt)
        if len(ids) + max(map(len, completions)) <= max_length or shorter is None:
            return ids, completions, len(prompt) < len(row.prompt)
        prompt = shorter


def _without_first_turns(prompt: Text) -> Text | None:
    """The conversation from its second user turn on, system message kept; None if there is no such turn."""
    if isinstance(prompt, str):
        return None
    system = prompt[:1] if prompt[0]["role"] in ("system", "developer") else []
    users = [i for i, message in enumerate(prompt) if message["role"] == "user" and i > len(system)]
    return [*system, *prompt[users[0] :]] if users else None


def _words(completion: Text) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
