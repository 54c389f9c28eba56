"""What happened to rows on their way to tokens, in words: nothing is dropped, cut or changed without a line that names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """One kind of event: its message begins with the number of rows."""

    text: str
    remedy: str = ""
    dropped: bool = False  # the row is gone
    harmless: bool = False  # worth a line, but not a warning


NOTES: dict[str, Note] = {
    "transcript": Note("dropped: the two transcripts do not end in one answer each to the same turns", dropped=True),
    "prompt_too_long": Note(
        "dropped: the prompt alone fills train.max_length, even without its leading turns", "raise train.max_length", dropped=True
    ),
    "too_long": Note(
        "dropped: longer than train.max_length, even without the leading turns of the prompt",
        "raise train.max_length, or set train.overflow: cut",
        dropped=True,
    ),
    "cut": Note("with completions cut to train.max_length; none of their completions ends its turn", "raise train.max_length to keep them whole"),
    "trimmed": Note("with leading turns of the prompt left out to fit train.max_length", harmless=True),
    "repeated": Note("whose completions repeated the turns of the prompt, which were taken off", harmless=True),
    "wrapped": Note("with a plain string beside a conversation, read as a user or assistant message", harmless=True),
    "identical": Note("whose chosen and rejected completions are the same: no preference to learn", "check how the pairs were made"),
    "special": Note("whose text spells out special tokens of the tokenizer, which then count as such", "remove them from the data"),
    "unlabelled": Note("without a label field: each completion counts as desirable", harmless=True),
    "plain": Note(
        "of plain strings, which are trained on as they are, without the model's chat template",
        "write prompts and completions as lists of messages; or, if that is meant, ask the model with --plain",
    ),
}


class Notes(dict[str, list[str]]):
    """Kind of event (a key of NOTES) -> origins of the rows it happened to, in order."""

    def add(self, kind: str, origin: str) -> None:
        self.setdefault(kind, []).append(origin)

    def merge(self, other: Mapping[str, list[str]]) -> None:
        for kind, origins in other.items():
            self.setdefault(kind, []).extend(origins)

    @property
    def dropped(self) -> int:
        """Rows that are gone."""
        return sum(len(origins) for kind, origins in self.items() if NOTES[kind].dropped)

    def lines(self) -> list[tuple[bool, str]]:
        """(is a warning, message) for each kind, in the order of NOTES."""
        found = []
        for kind, note in NOTES.items():
            if origins := self.get(kind):
                remedy = f". Remedy: {note.remedy}" if note.remedy else ""
                found.append((not note.harmless, f"{plural(len(origins), 'row')} {note.text} ({places(origins)}){remedy}."))
        return found


def places(origins: Iterable[str], limit: int = 5) -> str:
    """`train.jsonl:3, 8, 12 and 40 more`."""
    origins = list(origins)
    shown, last = [], ""
    for origin in origins[:limit]:
        file, _, line = origin.rpartition(":")
        shown.append(line if file == last else origin)
        last = file
    more = f" and {len(origins) - limit} more" if len(origins) > limit else ""
    return ", ".join(shown) + more


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
