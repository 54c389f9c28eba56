"""From a file to the rows of a run: what fits, what is cut, what is held out, and what is said about it."""

from __future__ import annotations

import json

import pytest

from upo.config import load_config
from upo.data.encode import encode
from upo.data.load import load_data
from upo.data.notes import NOTES, Notes, places
from upo.data.rows import Row
from upo.data.split import split_by_prompt
from upo.data.tokenizer import load_tokenizer
from upo.errors import DataError, ModelError


class Recorder:
    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []
        self.done = 0

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def start(self, phase: str, total: int, unit: str) -> None: ...

    def advance(self, done: int) -> None:
        self.done += done

    def metrics(self, record) -> None: ...


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def pair(prompt, chosen: str = "abc", rejected: str = "de") -> dict:
    prompt = [turn("user", prompt)] if isinstance(prompt, str) else prompt
    return {"prompt": prompt, "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


@pytest.fixture
def load(tmp_path, tokenizer):
    def run(rows: list[dict], held_out: list[dict] | None = None, data: dict | None = None, **train):
        def write(name: str, some: list[dict]) -> str:
            path = tmp_path / name
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
            return str(path)

        data = {"train": write("train.jsonl", rows), **(data or {})}
        if held_out is not None:
            data["eval"] = write("eval.jsonl", held_out)
        recorder = Recorder()
        loaded = load_data(load_config({"model": "m", "data": data, "train": train}), tokenizer, recorder)
        return loaded, recorder

    return run


# --- What fits ----------------------------------------------------------------------------------------------------------------------


def fit(tokenizer, row: dict, max_length: int, overflow: str = "drop"):
    notes = Notes()
    completions = (row["chosen"], row["rejected"])
    example = encode(Row("f:1", "pair", row["prompt"], completions, (1, -1), {"x": (1.0, 2.0)}), tokenizer, max_length, overflow, notes)
    return example, dict(notes)


def test_example_carries_tokens_texts_and_columns(tokenizer):
    example, notes = fit(tokenizer, pair("hi"), 100)
    assert example.prompt.tolist() == tokenizer.prompt_ids([turn("user", "hi")]).tolist()
    assert [c.tolist() for c in example.completions] == [[67, 68, 69, 2], [70, 71, 2]]
    assert (example.origin, example.kind, example.labels, example.columns) == ("f:1", "pair", (1, -1), {"x": (1.0, 2.0)})
    assert (example.texts, example.prompt_text) == (("abc", "de"), "hi")
    assert example.tokens == len(example.prompt) + 7
    assert notes == {}


def test_prompt_text_of_several_turns_names_the_roles(tokenizer):
    example, _ = fit(tokenizer, pair([turn("system", "be"), turn("user", "hi"), turn("assistant", "yo"), turn("user", "so?")]), 100)
    assert example.prompt_text == "system: be\nuser: hi\nassistant: yo\nuser: so?"


LONG = [turn("system", "be"), turn("user", "one"), turn("assistant", "two"), turn("user", "three"), turn("assistant", "four"), turn("user", "five")]


def test_whole_leading_turns_go_first_and_the_system_message_stays(tokenizer):
    whole = len(tokenizer.prompt_ids(LONG)) + 4
    for limit, kept in ((whole, LONG), (whole - 1, [LONG[0], *LONG[3:]]), (len(tokenizer.prompt_ids([LONG[0], LONG[5]])) + 4, [LONG[0], LONG[5]])):
        example, notes = fit(tokenizer, pair(LONG), limit)
        assert example.prompt.tolist() == tokenizer.prompt_ids(kept).tolist()
        assert notes == ({} if kept == LONG else {"trimmed": ["f:1"]})
        assert example.prompt_text.count("\n") == 5, "scorers see the whole prompt"


def test_row_that_still_does_not_fit_is_dropped(tokenizer):
    shortest = len(tokenizer.prompt_ids([LONG[0], LONG[5]]))
    assert fit(tokenizer, pair(LONG), shortest + 3) == (None, {"too_long": ["f:1"]})
    assert fit(tokenizer, pair(LONG), shortest) == (None, {"prompt_too_long": ["f:1"]})
    assert fit(tokenizer, pair(LONG), shortest, "cut") == (None, {"prompt_too_long": ["f:1"]})


@pytest.mark.parametrize(
    ("room", "chosen", "rejected"),
    [
        (4, [67, 68, 69, 2], [70, 71, 2]),  # both fit
        (3, [67, 68, 69], [70, 71]),  # one loses its end, so the other does
        (2, [67, 68], [70, 71]),
        (1, [67], [70]),
    ],
)
def test_cutting_is_never_one_sided(tokenizer, room, chosen, rejected):
    example, notes = fit(tokenizer, pair("hi"), len(tokenizer.prompt_ids([turn("user", "hi")])) + room, "cut")
    assert [c.tolist() for c in example.completions] == [chosen, rejected]
    assert notes == ({} if room == 4 else {"cut": ["f:1"]})
    assert example.texts == (tokenizer.decode(chosen), tokenizer.decode(rejected)), "scorers see what is trained on"


def test_special_tokens_in_texts_are_noted(tokenizer):
    assert fit(tokenizer, pair("hi", "a<|im_end|>b"), 100)[1] == {"special": ["f:1"]}


def test_template_error_names_the_row(make_tiny_llama):
    folder = make_tiny_llama()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    with pytest.raises(ModelError, match=r"^f:1: .*no chat template"):
        fit(load_tokenizer(folder), pair("hi"), 100)


# --- What is said -------------------------------------------------------------------------------------------------------------------


def test_everything_that_happens_is_reported(load, tmp_path):
    rows = [{**pair("a"), "score_chosen": 1, "score_rejected": 2, "id": "x"}, pair("b", "x" * 200), pair("c", "same", "same"), pair("d", "y" * 300)]
    loaded, told = load(rows, max_length=64)
    file = tmp_path / "train.jsonl"
    tokens = sum(e.tokens for e in loaded.train)
    assert told.infos == [
        f"{file}: preference (explicit prompt, conversations), 2 rows, 4 completions, {tokens} tokens; columns score; not used: id",
    ]
    assert told.warnings == [
        f"2 rows dropped: longer than train.max_length, even without the leading turns of the prompt ({file}:2, 4). "
        "Remedy: raise train.max_length, or set train.overflow: cut.",
        f"1 row whose chosen and rejected completions are the same: no preference to learn ({file}:3). Remedy: check how the pairs were made.",
    ]
    assert told.done == 4
    report = loaded.report
    assert (report.layout, report.read, report.train_rows, report.eval_rows, report.columns, report.ignored) == ("preference", 4, 2, 0, ("score",), ("id",))
    assert dict(report.notes) == {"identical": [f"{file}:3"], "too_long": [f"{file}:2", f"{file}:4"]}


def test_plain_strings_on_an_instruct_model_are_warned_about(load, tmp_path):
    loaded, told = load([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    assert loaded.train[0].prompt.tolist() == [67]
    assert told.warnings == [
        f"1 row of plain strings, which are trained on as they are, without the model's chat template ({tmp_path}/train.jsonl:1). "
        "Remedy: write prompts and completions as lists of messages; or, if that is meant, ask the model with --plain."
    ]
    assert len(told.infos) == 1


def test_places_are_short():
    assert places([f"a.jsonl:{i}" for i in (1, 2, 3)]) == "a.jsonl:1, 2, 3"
    assert places([*(f"a.jsonl:{i}" for i in range(1, 9)), "b.jsonl:1"]) == "a.jsonl:1, 2, 3, 4, 5 and 4 more"
    assert places(["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]) == "a.jsonl:1, b.jsonl:1, 2"


def test_first_bad_row_stops_the_run_and_counts_the_others(load, tmp_path):
    file = tmp_path / "train.jsonl"
    with pytest.raises(DataError) as error:
        load([pair("a"), {**pair("b"), "chosen": 3}])
    assert str(error.value) == f'{file}:2: "chosen" is a number; give a string or a list of {{"role", "content"}} messages.'
    with pytest.raises(DataError) as error:
        load([pair("a"), {**pair("b"), "chosen": 3}, pair("c", ""), pair("d", "")])
    assert str(error.value).endswith(f"messages. (2 more rows cannot be used; `upo data check {file}` lists them.)")


def test_nothing_left(load, tmp_path):
    with pytest.raises(DataError) as error:
        load([pair("a" * 60), pair("b", "c" * 60), pair("d" * 60)], max_length=40)
    assert str(error.value) == (
        f"{tmp_path}/train.jsonl: no row is left of 3: 2 dropped: the prompt alone fills train.max_length, even without its leading turns "
        f"({tmp_path}/train.jsonl:1, 3); 1 dropped: longer than train.max_length, even without the leading turns of the prompt "
        f"({tmp_path}/train.jsonl:2). train.max_length is 40; raise it, or shorten the texts."
    )
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank\.jsonl: no rows; it needs at least one\."):
        load([pair("a")], data={"train": str(tmp_path / "blank.jsonl")})


def test_rows_in_memory_stand_for_the_files(tokenizer):
    config = load_config({"model": "m", "data": {"train": "not-there.jsonl", "eval": 0.5}})
    loaded = load_data(config, tokenizer, Recorder(), train=[pair("a"), pair("b")], held_out=[pair("c")])
    assert [e.origin for e in (*loaded.train, *loaded.eval)] == ["dataset:1", "dataset:2", "dataset:1"]


# --- What is held out ---------------------------------------------------------------------------------------------------------------


def test_split_is_by_prompt_and_fixed_by_the_seed(load):
    rows = [pair(f"p{i % 10}", f"c{i}") for i in range(30)]
    loaded, told = load(rows, data={"eval": 0.3}, seed=3)
    held = sorted({e.prompt_text for e in loaded.eval})
    assert (len(loaded.train), len(loaded.eval)) == (21, 9)
    assert not {e.prompt_text for e in loaded.train} & set(held)
    assert held == ["p1", "p4", "p6"]  # fixed for good: a new NumPy or platform must hold out the same
    assert told.infos[1] == "held out: 9 rows, split by prompt; 21 left for training"
    again, _ = load(rows[::-1], data={"eval": 0.3}, seed=3)
    assert sorted({e.prompt_text for e in again.eval}) == held, "the order of the rows does not matter"
    other, _ = load(rows, data={"eval": 0.3}, seed=4)
    assert sorted({e.prompt_text for e in other.eval}) != held
    none, _ = load(rows, data={"eval": 0})
    assert (len(none.train), none.eval) == (30, ())


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_share_leaves_something_on_both_sides(load, share, held):
    loaded, _ = load([pair(f"p{i}") for i in range(4)], data={"eval": share})
    assert (len(loaded.eval), len(loaded.train)) == (held, 4 - held)


@pytest.mark.parametrize(("share", "held"), [(0.45, 4), (0.6, 8)])
def test_share_is_met_as_nearly_as_whole_prompts_allow(load, share, held):
    """Three prompts of four rows each: of 5.4 rows wanted 4 are nearer than 8, of 7.2 it is 8."""
    loaded, _ = load([pair(f"p{i % 3}", f"c{i}") for i in range(12)], data={"eval": share})
    assert len(loaded.eval) == held


def test_one_prompt_cannot_be_split(load, tmp_path):
    with pytest.raises(DataError) as error:
        load([pair("p", "a"), pair("p", "b")], data={"eval": 0.5})
    assert str(error.value) == f"data.eval: all rows ({tmp_path}/train.jsonl:1, 2) have one prompt, so none can be held out; set data.eval: 0."


def test_eval_file_and_its_overlap(load, tmp_path):
    loaded, told = load([pair("a"), pair("b")], [pair("c"), pair("b", "other"), pair("d", "same", "same")])
    assert [e.origin for e in loaded.eval] == [f"{tmp_path}/eval.jsonl:{i}" for i in (1, 2, 3)]
    assert loaded.report.overlap == (f"{tmp_path}/eval.jsonl:2",)
    assert loaded.report.read == 5
    assert loaded.report.notes == {"identical": [f"{tmp_path}/eval.jsonl:3"]}
    assert told.warnings[-1] == f"1 held-out row with prompts that are trained on ({tmp_path}/eval.jsonl:2); evaluation will look too good"


def test_hash_follows_tokens_labels_columns_and_split(load):
    rows = [pair("a"), pair("b")]
    base = load(rows)[0].hash
    assert load(rows)[0].hash == base
    others = [
        load(rows[::-1]),
        load([pair("a"), pair("b", "abd")]),
        load([{**pair("a"), "x": 1}, pair("b")]),
        load([{**pair("a"), "x": 2}, pair("b")]),
        load(rows, data={"eval": 0.5}),
        load([{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "labels": [1, -1]} for r in rows]),
    ]
    assert len({base, *(loaded.hash for loaded, _ in others)}) == 7


def test_real_pairs(tokenizer, harmless_pairs):
    rows = [json.loads(line) for line in harmless_pairs.read_text(encoding="utf-8").splitlines()[:120]]
    told = Recorder()
    config = load_config({"model": "m", "data": {"train": "-", "eval": 0.1}, "train": {"max_length": 600}})
    loaded = load_data(config, tokenizer, told, train=rows)
    dropped = loaded.report.notes.dropped
    assert dropped > 0 and len(loaded.train) + len(loaded.eval) + dropped == 120
    for e in (*loaded.train, *loaded.eval):
        source = rows[int(e.origin.rpartition(":")[2]) - 1]
        assert e.texts == (source["chosen"][0]["content"], source["rejected"][0]["content"])
        assert [tokenizer.decode(c) for c in e.completions] == list(e.texts)
        assert all(c[-1] == 2 and len(e.prompt) + len(c) <= 600 for c in e.completions)
        assert tokenizer.decode(e.prompt).endswith(f"user\n{source['prompt'][-1]['content']}\nassistant\n")


def test_every_note_is_a_sentence():
    for kind in NOTES:
        notes = Notes({kind: ["f:1"]})
        ((_, text),) = notes.lines()
        assert text.startswith("1 row ") and text.endswith(".") and "(f:1)" in text


def test_split_needs_no_tokenizer_state(tokenizer):
    """Ranks come from the seed and a prompt's tokens alone, so a row keeps its side when others are added far from the border."""
    notes = Notes()
    examples = [
        e for i in range(40) if (e := encode(Row(f"f:{i}", "pair", f"q{i}", (" a", " b"), (1, -1)), tokenizer, 64, "drop", notes)) is not None
    ]
    _, few = split_by_prompt(examples[:30], 0.2, 0)
    _, more = split_by_prompt(examples, 0.2, 0)
    old = {e.origin for e in more if int(e.origin[2:]) < 30}
    assert old <= {e.origin for e in few} or {e.origin for e in few} <= old
