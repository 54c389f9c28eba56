"""Control texts: where they stand, what they cost, and which rows and objectives they go with."""

from __future__ import annotations

import json

import numpy as np
import pytest

from upo.config import load_config
from upo.data.control import Control
from upo.data.load import load_data
from upo.data.tokenizer import load_tokenizer
from upo.errors import ConfigError, DataError
from upo.training.reporter import Silent

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": i % 2 == 0} for i in range(6)]


def config(tmp_path, rows=ROWS, **options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "control": ["<|good|>", "<|bad|>"]}
    return load_config({"model": "m", "data": data, "objective": {"preference": "csft"}, **options})


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


def test_each_completion_stands_behind_the_text_of_its_label(tmp_path, tokenizer):
    bare = load_config({"model": "m", "data": {"train": str(tmp_path / "rows.jsonl")}, "objective": {"preference": "kto"}})
    controlled = load_data(config(tmp_path), tokenizer, Silent())
    plain = load_data(bare, tokenizer, Silent())
    for with_text, without in zip(controlled.train, plain.train, strict=True):
        text = "<|good|>" if with_text.labels[0] > 0 else "<|bad|>"
        added = len(with_text.completions[0]) - len(without.completions[0])
        np.testing.assert_array_equal(with_text.completions[0][added:], without.completions[0])
        assert tokenizer.decode(with_text.completions[0][:added]) == text
        np.testing.assert_array_equal(with_text.prompt, without.prompt)
        assert with_text.texts == without.texts, "scorers read the answer alone"
    assert controlled.hash != plain.hash


def test_answers_are_asked_for_behind_the_good_one(tokenizer):
    control = Control.of(("<|good|>", "<|bad|>"), tokenizer)
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Who?"}])
    asked = control.after(prompt)
    assert asked[: len(prompt)].tolist() == prompt.tolist() and tokenizer.decode(asked[len(prompt) :]) == "<|good|>"
    assert Control.of(None, tokenizer) is None


def test_the_texts_count_against_the_longest_row(tmp_path, tokenizer):
    lengths = [e.tokens for e in load_data(config(tmp_path), tokenizer, Silent()).train]
    longest = max(lengths)
    assert len(load_data(config(tmp_path, train={"max_length": longest + 1}), tokenizer, Silent()).train) == 6
    kept = load_data(config(tmp_path, train={"max_length": longest - 1}), tokenizer, Silent()).train
    assert 0 < len(kept) < 6 and all(e.tokens < longest for e in kept)


def test_what_they_do_not_go_with(tmp_path, tokenizer):
    groups = [{"prompt": "a", "completions": ["b", "c"]}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: data\.control needs a label for each completion"):
        load_data(config(tmp_path, groups), tokenizer, Silent())
    for control, objective in ((["a", "b"], "dpo"), (None, "csft")):
        with pytest.raises(ConfigError, match=r"^data\.control: goes with the loss csft"):
            load_config({"model": "m", "data": {"train": "t", "control": control}, "objective": {"preference": objective}})
    with pytest.raises(ConfigError, match=r"data\.control: must be two different texts"):
        load_config({"model": "m", "data": {"train": "t", "control": ["a", "a"]}, "objective": {"preference": "csft"}})
