"""Layouts: what each record means, and what is said about those that mean nothing."""

from __future__ import annotations

import json

import pytest

from upo.data.rows import parse_rows
from upo.data.text import parse_transcript


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def parse(*records: dict, layout: str = "auto"):
    return parse_rows(((f"f:{i}", record) for i, record in enumerate(records, 1)), layout)


def row(record: dict, layout: str = "auto"):
    parsed = parse(record, layout=layout)
    assert not parsed.errors, parsed.errors
    (found,) = parsed.rows
    return found


def error(*records: dict, layout: str = "auto") -> str:
    parsed = parse(*records, layout=layout)
    (found,) = parsed.errors
    return str(found)


def test_explicit_pair_of_strings():
    parsed = parse({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})
    (found,) = parsed.rows
    assert (found.origin, found.kind, found.prompt, found.completions, found.labels) == ("f:1", "pair", "The sky is", (" blue.", " green."), (1, -1))
    assert (parsed.layout, parsed.shape) == ("preference", "explicit prompt, plain strings")


def test_explicit_pair_of_conversations():
    parsed = parse({"prompt": [user("Hi")], "chosen": [says("Hello")], "rejected": [says("No")]})
    (found,) = parsed.rows
    assert found.prompt == [user("Hi")]
    assert found.completions == ([says("Hello")], [says("No")])
    assert (parsed.layout, parsed.shape) == ("preference", "explicit prompt, conversations")


def test_implicit_conversations_share_their_leading_turns():
    turns = [user("Hi"), says("Hello"), user("Well?")]
    parsed = parse({"chosen": [*turns, says("Yes")], "rejected": [*turns, says("No")]})
    assert parsed.rows[0].prompt == turns
    assert parsed.rows[0].completions == ([says("Yes")], [says("No")])
    assert parsed.shape == "prompt taken from what the completions share, conversations"


def test_implicit_identical_conversations_keep_their_last_turn():
    parsed = parse({"chosen": [user("Hi"), says("Yo")], "rejected": [user("Hi"), says("Yo")]})
    assert parsed.rows[0].prompt == [user("Hi")]
    assert parsed.notes == {"identical": ["f:1"]}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not "The sky is bl"
        ("Q: x\nA: yes", "Q: x\nA: no", "Q: x\nA:"),  # the space goes with the answer
        ("Q: x\nyes", "Q: x\nyesterday", "Q: x\n"),  # one is the beginning of the other
        ("Q: x\n\nyes", "Q: x\n\nno", "Q: x\n\n"),  # line breaks stay with the prompt
        ("A B", "A B C", "A"),
        ("one  two", "one  three", "one"),  # two spaces stay together
        ("A word\tx", "A word y", "A word"),
    ],
)
def test_implicit_strings_part_at_a_word_or_line(chosen, rejected, prompt):
    found = row({"chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.completions) == (prompt, (chosen.removeprefix(prompt), rejected.removeprefix(prompt)))


@pytest.mark.parametrize(("chosen", "rejected"), [("blue", "black"), ("yes", "no"), ([says("a")], [says("b")]), ("a b", [says("b")])])
def test_implicit_pair_that_shares_nothing(chosen, rejected):
    assert error({"chosen": chosen, "rejected": rejected}) == (
        'f:1: no "prompt", and "chosen" and "rejected" share no beginning to take it from; add the field "prompt".'
    )


@pytest.mark.parametrize(("label", "expected"), [(True, 1), (False, -1), (1, 1), (0, -1), (-1, -1), (1.0, 1)])
def test_unpaired_labels(label, expected):
    found = row({"prompt": "a", "completion": "b", "label": label})
    assert (found.kind, found.completions, found.labels) == ("unpaired", ("b",), (expected,))


def test_completions_without_a_label_field_are_desirable_and_said_to_be():
    parsed = parse({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})
    assert [r.labels for r in parsed.rows] == [(1,), (1,)]
    assert parsed.notes == {"unlabelled": ["f:1", "f:2"]}


def test_group_with_scores_and_labels():
    found = row({"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 0.5, 0], "labels": [1, 0, False], "cost": 2})
    assert (found.kind, found.completions, found.labels) == ("group", ("b", "c", "d"), (1, -1, -1))
    assert found.columns == {"scores": (1.0, 0.5, 0.0), "cost": (2.0, 2.0, 2.0)}


def test_group_of_conversations_without_labels():
    found = row({"prompt": [user("a")], "completions": [[says("b")], [says("c")]]})
    assert (found.completions, found.labels) == (([says("b")], [says("c")]), (0, 0))


def test_transcripts_become_conversations():
    shared = "\n\nHuman: Hi there\n\nAssistant: Hello.\nHow are you?\n\nHuman: Fine: you?\n\nAssistant:"
    parsed = parse({"chosen": shared + " Good!", "rejected": shared + " Bad."})
    assert parsed.rows[0].prompt == [user("Hi there"), says("Hello.\nHow are you?"), user("Fine: you?")]
    assert parsed.rows[0].completions == ([says("Good!")], [says("Bad.")])
    assert parsed.layout == "transcript"


def test_transcript_prompt_with_plain_answers():
    found = row({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " No"})
    assert (found.prompt, found.completions) == ([user("Hi")], ([says("Hello")], [says("No")]))


@pytest.mark.parametrize(
    "rejected",
    [
        "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: b",  # ends in a human turn
        "\n\nHuman: Hi\n\nAssistant:",  # an empty answer
        "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",  # goes on for another turn
    ],
)
def test_transcripts_that_do_not_pair_up_are_dropped_and_named(rejected):
    good = "\n\nHuman: Hi\n\nAssistant: "
    parsed = parse({"chosen": good + "x", "rejected": good + "y"}, {"chosen": good + "x", "rejected": rejected})
    assert len(parsed.rows) == 1 and not parsed.errors
    assert parsed.notes == {"transcript": ["f:2"]}
    assert parsed.notes.dropped == 1


def test_real_pairs_survive_the_way_through_transcripts(harmless_pairs):
    records = [json.loads(line) for line in harmless_pairs.read_text(encoding="utf-8").splitlines()[:300]]
    name = {"user": "Human", "assistant": "Assistant"}

    def transcript(messages: list[dict]) -> str:
        return "".join(f"\n\n{name[m['role']]}: {m['content']}" for m in messages)

    direct = parse(*records)
    again = parse(*({side: transcript(r["prompt"] + r[side]) for side in ("chosen", "rejected")} for r in records))
    assert not direct.errors and not again.errors and not direct.notes and not again.notes

    def stripped(messages: list[dict]) -> list[dict]:
        return [{**m, "content": m["content"].strip()} for m in messages]

    for a, b in zip(direct.rows, again.rows, strict=True):
        assert stripped(a.prompt) == b.prompt
        assert tuple(map(stripped, a.completions)) == b.completions


def test_prompt_turns_repeated_in_the_completions_are_taken_off():
    turns = [user("Hi")]
    parsed = parse({"prompt": "Hi", "chosen": [*turns, says("a")], "rejected": [*turns, says("b")]})
    assert (parsed.rows[0].prompt, parsed.rows[0].completions) == (turns, ([says("a")], [says("b")]))
    assert parsed.notes == {"wrapped": ["f:1"], "repeated": ["f:1"]}


def test_strings_beside_conversations_become_messages():
    assert row({"prompt": "Hi", "chosen": [says("a")], "rejected": [says("b")]}).prompt == [user("Hi")]
    found = row({"prompt": [user("Hi")], "chosen": "a", "rejected": "b"})
    assert found.completions == ([says("a")], [says("b")])


def test_null_fields_of_messages_and_text_parts():
    """Parquet gives every message the keys of all; some data sets write a text as a list of parts."""
    prompt = [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "tool_calls": None}]
    assert row({"prompt": prompt, "chosen": [says("a")], "rejected": [says("b")]}).prompt == [user("Hi")]


def test_tools_and_tool_calls():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    found = row({"prompt": [user("a")], "chosen": [call], "rejected": [says("b")], "tools": json.dumps(tools)})
    assert found.tools == tools
    assert found.completions[0] == [{**call, "content": ""}]


def test_numeric_columns_of_pairs():
    parsed = parse(
        {
            "prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 3, "score_rejected": 1.5, "chosen_rating": 5, "rejected_rating": 4,
            "margin": 0.25, "safe": True, "id": "x", "half_chosen": 1, "nan": float("nan"), "label": 7, "bad_chosen": "x", "bad_rejected": 1,
        }
    )  # fmt: skip
    assert parsed.rows[0].columns == {
        "score": (3.0, 1.5), "rating": (5.0, 4.0), "margin": (0.25, 0.25), "safe": (1.0, 1.0), "half_chosen": (1.0, 1.0), "label": (7.0, 7.0),
        "bad_rejected": (1.0, 1.0),
    }  # fmt: skip
    assert parsed.ignored == ("id", "nan", "bad_chosen")


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"prompt": [user("a")], "chosen": [says("b")], "rejected": [says("c")]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**PAIR, "chosen": None}, 'f:2: "chosen" is null; each row of this layout needs it'),
        ({"prompt": "a", "chosen": "b"}, 'f:2: "rejected" is missing; each row of this layout needs it (`data.layout` forces another layout).'),
        ({"chosen": "x b", "rejected": "x c"}, 'f:2: "prompt" is missing; each row of this layout needs it'),
        ({**PAIR, "chosen": 3}, 'f:2: "chosen" is a number; give a string or a list of {"role", "content"} messages.'),
        ({**PAIR, "prompt": {"role": "user"}}, 'f:2: "prompt" is an object; give a string or a list'),
        ({**PAIR, "chosen": " \n"}, 'f:2: "chosen" is empty; give it a text, or remove the row.'),
        ({**PAIR, "prompt": ""}, 'f:2: "prompt" is empty; give it a text, or remove the row.'),
        ({**CHAT, "prompt": []}, 'f:2: "prompt" is empty; give it a text, or remove the row.'),
        ({**CHAT, "chosen": []}, 'f:2: "chosen" is empty; give it a text, or remove the row.'),
        ({**CHAT, "chosen": [says(" ")]}, 'f:2: "chosen" is empty; give it a text, or remove the row.'),
        ({**CHAT, "chosen": ["b"]}, 'f:2: "chosen[0]" is a string; a conversation is a list of {"role", "content"} messages.'),
        ({**CHAT, "chosen": [{"content": "b"}]}, 'f:2: "chosen[0]" has no "role"; each message needs one'),
        ({**CHAT, "chosen": [{"from": "gpt", "value": "b"}]}, 'f:2: "chosen[0]" has ShareGPT keys; rename "from" to "role" (human: user, gpt: assistant)'),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, 'f:2: "content" of "chosen[0]" is null; only text is supported.'),
        ({**CHAT, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, 'f:2: "content" of "prompt[0]" holds parts other than text'),
        ({**CHAT, "chosen": [user("b")]}, 'f:2: "chosen" must be one assistant message after the prompt, but is: user; move earlier turns to "prompt".'),
        ({**CHAT, "chosen": [says("b"), user("c"), says("d")]}, "but is: assistant, user, assistant; move earlier turns"),
        ({**CHAT, "prompt": [user("a"), says("b")]}, 'f:2: "prompt" ends in an assistant turn, and so does each completion; end it with a user turn.'),
        ({**PAIR, "chosen": "\ud800"}, 'f:2: "chosen" holds half of a surrogate pair'),
        ({**CHAT, "tools": "{"}, 'f:2: "tools" is a string but not JSON; give a list of function schemas.'),
        ({**CHAT, "tools": 3}, 'f:2: "tools" is a number; give a list of function schemas.'),
    ],
)
def test_bad_pair(record, message):
    assert message in error(PAIR, record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": "yes"}, "f:2: \"label\" is 'yes'; a label is true or false, 1 or 0, 1 or -1."),
        ({"prompt": "a", "completion": "b", "label": 2}, 'f:2: "label" is 2; a label is true or false'),
        ({"prompt": "a", "completion": "b"}, 'f:2: "label" is missing'),
        ({"completion": "b", "label": 1}, 'f:2: "prompt" is missing'),
        ({"prompt": "a", "completion": "", "label": 1}, 'f:2: "completion" is empty'),
    ],
)
def test_bad_unpaired_row(record, message):
    assert message in error({"prompt": "a", "completion": "b", "label": True}, record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": []}, 'f:2: "completions" is empty; give a list of strings or of conversations.'),
        ({"completions": "b"}, 'f:2: "completions" is a string; give a list'),
        ({"completions": ["b", 3]}, 'f:2: "completions[1]" is a number'),
        ({"completions": ["b", ""]}, 'f:2: "completions[1]" is empty'),
        ({"scores": [1]}, 'f:2: "scores" is 1 value for 2 completions; give a list with one for each.'),
        ({"scores": 1}, 'f:2: "scores" is a number for 2 completions'),
        ({"scores": [1, "x"]}, 'f:2: "scores[1]" is a string; a finite number is needed.'),
        ({"scores": [10**400, 1]}, 'f:2: "scores[0]" is a number; a finite number is needed.'),
        ({"scores": [1, float("nan")]}, 'f:2: "scores[1]" is nan; a finite number is needed.'),
        ({"labels": [1, 5]}, 'f:2: "labels[1]" is 5; a label is'),
    ],
)
def test_bad_group(change, message):
    group = {"prompt": "a", "completions": ["b", "c"]}
    assert message in error(group, {**group, **change})


def test_unknown_fields_list_the_layouts():
    assert "in the fields prompt, chosen, rejected (null). Known" in error({"prompt": "a", "chosen": "b", "rejected": None})
    assert error({"question": "a", "answer": "b"}).startswith("f:1: no known layout in the fields question, answer. Known: prompt + chosen + rejected,")


def test_forced_layout():
    assert error(PAIR, layout="group") == 'f:1: "completions" is missing; each row of this layout needs it (`data.layout` forces another layout).'
    assert error(PAIR, layout="transcript") == 'f:1: "prompt" is not a transcript of "Human:" and "Assistant:" turns; set data.layout to another one.'
    both = {**PAIR, "completion": "d"}
    assert parse(both).rows[0].kind == "pair"
    assert parse(both, layout="unpaired").rows[0].completions == ("d",)


def test_bad_rows_are_collected_with_the_good_ones_kept():
    parsed = parse(PAIR, {**PAIR, "chosen": ""}, PAIR, {**PAIR, "rejected": 1})
    assert [r.origin for r in parsed.rows] == ["f:1", "f:3"]
    assert [str(e)[:3] for e in parsed.errors] == ["f:2", "f:4"]
    assert parsed.count == 4


def test_transcript_turns():
    assert parse_transcript("\n\nHuman: a\n\nb\n\nAssistant: Human: c\n\nAssistant:", "f:1", "x") == [user("a\n\nb"), says("Human: c")]
