"""From records to rows: which layout a file has, and what each record says in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upo.data.columns import number, numeric_columns
from upo.data.notes import Notes, plural
from upo.data.read import Record, describe
from upo.data.text import Message, Text, is_blank, is_transcript, parse_text, parse_transcript, shared_prefix, shared_turns
from upo.errors import DataError

LAYOUTS: dict[str, frozenset[str]] = {  # and the fields each one reads
    "preference": frozenset({"prompt", "chosen", "rejected", "anchor", "ref_rewards", "tools"}),
    "transcript": frozenset({"prompt", "chosen", "rejected", "anchor", "ref_rewards"}),
    "unpaired": frozenset({"prompt", "completion", "label", "ref_rewards", "tools"}),
    "group": frozenset({"prompt", "completions", "labels", "ref_rewards", "tools"}),
}


@dataclass(frozen=True)
class Row:
    """One row as text. Prompt and completions are all strings, or all conversations; a completion is then one assistant message."""

    origin: str
    kind: str  # pair (chosen, rejected), unpaired or group
    prompt: Text
    completions: tuple[Text, ...]
    labels: tuple[int, ...]  # +1, -1 or 0 for none
    columns: dict[str, tuple[float, ...]] = field(default_factory=dict)  # one number per completion
    tools: list[dict[str, Any]] | None = None
    anchor: Text | None = None  # what the base model answers, in the form of the completions
    ref_rewards: tuple[float, ...] | None = None  # of answers that the reference gave to this prompt


@dataclass
class Rows:
    """What a source holds."""

    layout: str
    shape: str  # in words, e.g. "explicit prompt, conversations"
    count: int  # records read
    rows: list[Row]
    errors: list[DataError]  # records that cannot be used, in order
    notes: Notes
    ignored: tuple[str, ...]  # fields that no row made use of


def parse_rows(records: Iterable[Record], layout: str = "auto") -> Rows:
    """Read every record in one layout: the given one, or that of the first record. Bad records are collected, not raised."""
    rows: list[Row] = []
    errors: list[DataError] = []
    notes = Notes()
    fields: dict[str, None] = {}  # in the order of the file
    used: set[str] = set()
    count, first = 0, frozenset[str]()
    for origin, record in records:
        count += 1
        if isinstance(record, DataError):
            errors.append(record)
            continue
        try:
            if layout == "auto":
                layout = detect_layout(record, origin)
            first = first or frozenset(key for key, value in record.items() if value is not None)
            fields.update(dict.fromkeys(record))
            row = _PARSERS[layout](record, origin, notes, first)
        except DataError as error:
            errors.append(error)
            continue
        if row is not None:
            columns, taken = numeric_columns(record, LAYOUTS[layout], row.kind, len(row.completions))
            row.columns.update(columns)
            used |= taken
            rows.append(row)
    own = LAYOUTS.get(layout, frozenset())
    return Rows(layout, _shape(rows, layout, first), count, rows, errors, notes, tuple(f for f in fields if f not in used | own))


def _shape(rows: Sequence[Row], layout: str, first: frozenset[str]) -> str:
    parts = sorted({"plain strings" if isinstance(row.prompt, str) else "conversations" for row in rows})
    if layout in ("preference", "transcript"):
        parts.insert(0, "explicit prompt" if "prompt" in first else "prompt taken from what the completions share")
    if any(row.tools for row in rows):
        parts.append("tools")
    return ", ".join(parts)


def detect_layout(record: Mapping[str, Any], origin: str) -> str:
    """The layout whose fields a record has. Raises DataError listing the layouts if there is none."""
    if record.get("completions") is not None:
        return "group"
    if record.get("chosen") is not None and record.get("rejected") is not None:
        return "transcript" if is_transcript(record["chosen"]) or is_transcript(record.get("prompt")) else "preference"
    if record.get("completion") is not None:
        return "unpaired"
    fields = [f"{name} (null)" if value is None else str(name) for name, value in record.items()]
    raise DataError(
        f"{origin}: no known layout in the fields {', '.join(fields) or '(none)'}. Known: prompt + chosen + rejected, "
        "chosen + rejected that begin alike, prompt + completion + label, prompt + completions (+ scores). Rename the fields."
    )


def _pair(record: Mapping[str, Any], origin: str, notes: Notes, first: frozenset[str]) -> Row | None:
    chosen, rejected = (_text(record, name, origin) for name in ("chosen", "rejected"))
    prompt: Text
    if "prompt" in first or record.get("prompt") is not None:
        prompt = _text(record, "prompt", origin)
    else:
        prompt, chosen, rejected = _split(chosen, rejected, origin)
    return _row(record, origin, notes, "pair", prompt, {"chosen": chosen, "rejected": rejected}, (1, -1))


def _split(chosen: Text, rejected: Text, origin: str) -> tuple[Text, Text, Text]:
    """The prompt that both texts begin with, and what is left of each."""
    at = 0
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = shared_prefix(chosen, rejected)
    elif not isinstance(chosen, str) and not isinstance(rejected, str):
        at = shared_turns(chosen, rejected)
    if at == 0:
        raise DataError(f'{origin}: no "prompt", and "chosen" and "rejected" share no beginning to take it from; add the field "prompt".')
    return chosen[:at], chosen[at:], rejected[at:]


def _transcript(record: Mapping[str, Any], origin: str, notes: Notes, first: frozenset[str]) -> Row | None:
    turns: dict[str, Text] = {}
    for name in ("prompt", "chosen", "rejected"):
        if name == "prompt" and record.get("prompt") is None:
            continue
        text = _field(record, name, origin)
        if not isinstance(text, str):
            raise DataError(f'{origin}: "{name}" is {describe(text)}; a transcript is a string of "Human:" and "Assistant:" turns.')
        text = str(parse_text(text, origin, name))
        is_answer = "prompt" in turns and not is_transcript(text)
        turns[name] = [{"role": "assistant", "content": text.strip()}] if is_answer else parse_transcript(text, origin, name)
    try:
        return _pair({**record, **turns}, origin, notes, first)
    except DataError:  # HH has some rows that part before the last turn, or end in an empty or a human one
        notes.add("transcript", origin)
        return None


def _unpaired(record: Mapping[str, Any], origin: str, notes: Notes, first: frozenset[str]) -> Row | None:
    label = 1
    if "label" in first or record.get("label") is not None:
        label = _label(_field(record, "label", origin), origin, "label")
    else:
        notes.add("unlabelled", origin)
    return _row(
        record, origin, notes, "unpaired", _text(record, "prompt", origin), {"completion": _text(record, "completion", origin)}, (label,)
    )


def _group(record: Mapping[str, Any], origin: str, notes: Notes, first: frozenset[str]) -> Row | None:
    values = _field(record, "completions", origin)
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise DataError(f'{origin}: "completions" is {"empty" if values == [] else describe(values)}; give a list of strings or of conversations.')
    texts: dict[str, Text] = {f"completions[{i}]": parse_text(value, origin, f"completions[{i}]") for i, value in enumerate(values)}
    labels: tuple[int, ...] = (0,) * len(texts)
    for name in ("labels", "scores"):
        given = record.get(name)
        if given is not None and (not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(texts)):
            what = plural(len(given), "value") if isinstance(given, Sequence) and not isinstance(given, str) else describe(given)
            raise DataError(f'{origin}: "{name}" is {what} for {len(texts)} completions; give a list with one for each.')
        if given is not None and name == "labels":
            labels = tuple(_label(value, origin, f"labels[{i}]") for i, value in enumerate(given))
        elif given is not None:
            for i, value in enumerate(given):
                if number(value) is None:
                    raise DataError(f'{origin}: "scores[{i}]" is {value if isinstance(value, float) else describe(value)}; a finite number is needed.')
    return _row(record, origin, notes, "group", _text(record, "prompt", origin), texts, labels)


_PARSERS = {"preference": _pair, "transcript": _transcript, "unpaired": _unpaired, "group": _group}


def _row(
    record: Mapping[str, Any], origin: str, notes: Notes, kind: str, prompt: Text, completions: dict[str, Text], labels: tuple[int, ...]
) -> Row:
    """A row in one form: all strings or all conversations, no repeated turns, nothing blank. `completions` by field name."""
    texts = dict(completions)
    forms = {isinstance(text, str) for text in (prompt, *texts.values())}
    if len(forms) == 2:
        prompt = _as_turn(prompt, "user")
        texts = {name: _as_turn(text, "assistant") for name, text in texts.items()}
    repeated = False
    if isinstance(prompt, list):
        for name, text in texts.items():
            if len(text) > len(prompt) and _same_turns(text[: len(prompt)], prompt):
                texts[name], repeated = text[len(prompt) :], True
    _check_prompt(prompt, origin)
    for name, text in texts.items():
        _check_completion(text, origin, name)
    if len(forms) == 2:
        notes.add("wrapped", origin)
    if repeated:
        notes.add("repeated", origin)
    if kind == "pair" and texts["chosen"] == texts["rejected"]:
        notes.add("identical", origin)
    anchor = _anchor(record, origin, prompt) if kind == "pair" else None
    return Row(origin, kind, prompt, tuple(texts.values()), labels, tools=_tools(record, origin), anchor=anchor, ref_rewards=_ref_rewards(record, origin))


def _as_turn(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _same_turns(a: Text, b: Text) -> bool:
    return [(m["role"], m["content"]) for m in a if isinstance(m, dict)] == [(m["role"], m["content"]) for m in b if isinstance(m, dict)]


def _check_prompt(prompt: Text, origin: str) -> None:
    if is_blank(prompt):
        raise DataError(f'{origin}: "prompt" is empty; give it a text, or remove the row.')
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DataError(f'{origin}: "prompt" ends in an assistant turn, and so does each completion; end it with a user turn.')


def _check_completion(text: Text, origin: str, name: str) -> None:
    if is_blank(text):
        raise DataError(f'{origin}: "{name}" is empty; give it a text, or remove the row.')
    if isinstance(text, list) and (len(text) != 1 or text[0]["role"] != "assistant"):
        roles = ", ".join(m["role"] for m in text)
        raise DataError(f'{origin}: "{name}" must be one assistant message after the prompt, but is: {roles}; move earlier turns to "prompt".')


def _field(record: Mapping[str, Any], name: str, origin: str) -> Any:
    value = record.get(name)
    if value is None:
        what = "is null" if name in record else "is missing"
        raise DataError(f'{origin}: "{name}" {what}; each row of this layout needs it (`data.layout` forces another layout).')
    return value


def _text(record: Mapping[str, Any], name: str, origin: str) -> Text:
    return parse_text(_field(record, name, origin), origin, name)


def _label(value: Any, origin: str, name: str) -> int:
    if isinstance(value, (bool, int, float)) and value in (1, 0, -1):
        return 1 if value == 1 else -1
    raise DataError(f'{origin}: "{name}" is {value!r:.40}; a label is true or false, 1 or 0, 1 or -1.')


def _anchor(record: Mapping[str, Any], origin: str, prompt: Text) -> Text | None:
    """The field "anchor", as a string or one assistant message like the completions."""
    if record.get("anchor") is None:
        return None
    anchor = _text(record, "anchor", origin)
    if isinstance(prompt, list):
        anchor = _as_turn(anchor, "assistant")
    elif isinstance(anchor, list):
        anchor = str(anchor[-1]["content"])
    _check_completion(anchor, origin, "anchor")
    return anchor


def _ref_rewards(record: Mapping[str, Any], origin: str) -> tuple[float, ...] | None:
    """The field "ref_rewards", a list of numbers."""
    given = record.get("ref_rewards")
    if given is None:
        return None
    values = [number(v) for v in given] if isinstance(given, Sequence) and not isinstance(given, str) else []
    if not values or None in values:
        raise DataError(f'{origin}: "ref_rewards" must be a list of finite numbers, the rewards of answers that the reference gave to this prompt.')
    return tuple(v for v in values if v is not None)


def _tools(record: Mapping[str, Any], origin: str) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError(f'{origin}: "tools" is a string but not JSON; give a list of function schemas.') from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f'{origin}: "tools" is {describe(tools)}; give a list of function schemas.')
    return [dict(tool) for tool in tools] if tools else None
