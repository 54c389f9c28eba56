"""KTO's mismatched completions: for each scored completion one that answers another prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from upo.data.batch import Example
from upo.data.forest import Tokens
from upo.data.notes import plural
from upo.data.split import prompt_key
from upo.errors import DataError
from upo.random import words


def assign_partners(examples: Sequence[Example], seed: int, max_length: int) -> list[Example]:
    """The same examples with `partners` set; each completion is the partner of exactly one other.

    Prompts are put in a seeded order, with the completions of each in a row, and the row of all is shifted by the largest prompt's
    number of completions: so far that no prompt meets itself. Partners are cut at the right where the prompt leaves no room for them.
    Raises DataError if one prompt owns more than half of the completions, as it then must meet itself.
    """
    slots: dict[str, list[tuple[int, int]]] = {}  # prompt -> its (row, completion)
    for r, example in enumerate(examples):
        slots.setdefault(prompt_key(example.prompt), []).extend((r, i) for i in range(len(example.completions)))
    total = sum(map(len, slots.values()))
    largest = max(slots.values(), key=len, default=[])
    if 2 * len(largest) > total:
        first = examples[largest[0][0]]
        raise DataError(
            f"{first.origin}: its prompt owns {len(largest)} of {plural(total, 'completion')}; KTO compares each with a completion of another "
            "prompt, so no prompt may own more than half. Add rows with other prompts, or use another loss (dpo, sft)."
        )
    ranked = sorted(slots, key=lambda key: (int(words(1, seed, "partners", key)[0]), key))
    line = [slot for key in ranked for slot in slots[key]]
    partners: dict[tuple[int, int], Tokens] = {}
    for place, slot in enumerate(line):
        r, i = line[(place + len(largest)) % total]
        partners[slot] = examples[r].completions[i][: max_length - len(examples[slot[0]].prompt)]
    return [replace(e, partners=tuple(partners[r, i] for i in range(len(e.completions)))) for r, e in enumerate(examples)]
