"""Which rows are held out: whole prompts, never some of a prompt's rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from upo.data.batch import Example
from upo.data.forest import Tokens
from upo.data.notes import places
from upo.errors import DataError
from upo.random import words


def prompt_key(prompt: Tokens) -> str:
    """A prompt's identity: SHA-256 of its token ids, little-endian int32."""
    return hashlib.sha256(prompt.astype("<i4").tobytes()).hexdigest()


def split_by_prompt(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) rows. Prompts, ranked by the seed's word for each, are held out until about `share` of the rows is.

    At least one prompt is held out and one is left, whatever the share. A prompt's rank depends on the seed and its tokens only, not
    on the order of the rows. Raises DataError if all rows have one prompt.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(prompt_key(example.prompt), []).append(i)
    if len(groups) < 2:
        raise DataError(f"data.eval: all rows ({places(e.origin for e in examples)}) have one prompt, so none can be held out; set data.eval: 0.")
    ranked = sorted(groups, key=lambda key: (int(words(1, seed, "split", key)[0]), key))
    held: set[int] = set()
    for key in ranked[:-1]:
        if held and len(held) + len(groups[key]) / 2 > share * len(examples):
            break
        held.update(groups[key])
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]
