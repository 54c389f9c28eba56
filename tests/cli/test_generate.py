"""`upo generate`: which model and adapter are loaded, where prompts come from, and what is printed."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from upo_cli.main import main

from upo import adapters
from upo.config import load_config

ADAPTER = {
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((2, 4), np.float32),
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": np.ones((3, 2), np.float32),
}


class Fake:
    """Stands for tokenizer, backend and learner; the answer to a prompt is the prompt backwards."""

    name = "fake"
    info = types.SimpleNamespace(notes=("rope repaired",))
    has_template = True
    context = 1000

    def __init__(self) -> None:
        self.configs, self.prompts, self.samplings = [], [], []

    def prompt_ids(self, prompt):
        self.prompts.append(prompt)
        text = prompt if isinstance(prompt, str) else "|".join(f"{m['role']}:{m['content']}" for m in prompt)
        return np.array([ord(c) for c in text], np.int32)

    def decode(self, tokens):
        return "".join(chr(int(t)) for t in tokens)

    def load(self, config):
        self.configs.append(config)
        return self

    def generate(self, prompts, sampling):
        self.samplings.append((len(prompts), sampling))
        return [p[::-1] for p in prompts]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    import upo_cli.generate as command

    fake = Fake()
    monkeypatch.setattr(command, "get_backend", lambda name: fake)
    monkeypatch.setattr("upo.data.tokenizer.load_tokenizer", lambda folder: fake)
    monkeypatch.setattr("upo.models.resolve", lambda model, revision=None: Path(model))
    monkeypatch.setattr("upo.models.model_config", lambda folder: ({"max_position_embeddings": fake.context}, []))
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "MLX_RANK"):
        monkeypatch.delenv(variable, raising=False)
    return fake


@pytest.fixture
def run(fake):
    """A finished run in ./run, on a model with a revision."""
    text = "model: trained\nrevision: abc\nbackend: mlx\ndtype: float32\ndata: {train: rows.jsonl}\nadapter: {rank: 4, start: gone}\nreference: start\n"
    text += "objective: {preset: upo, auxiliary: {rewards: [{scorer: python, function: 'x.py:f'}]}}\n"
    Path("run").mkdir()
    Path("run/config.yaml").write_text(text)
    adapters.write_adapter("run/adapter", ADAPTER, adapters.peft_config("trained", 2, 6.0, ["model.layers.0.mlp.up_proj"]))
    return Path("run")


def upo(*arguments: str, **options):
    return CliRunner().invoke(main, ["generate", *arguments], catch_exceptions=False, **options)


def test_a_run_brings_its_model_and_adapter(fake, run):
    result = upo("run", "--prompt", "abc", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "cba:resu\n", "")
    (config,) = fake.configs
    assert (config.model, config.revision, config.backend, config.dtype) == ("trained", "abc", "mlx", "float32")
    assert (config.adapter.start, config.adapter.rank, config.adapter.alpha, config.reference) == ("run", 2, 6.0, "base")
    assert config.objective.auxiliary is None, "no value head, and no scorer that is code"


def test_a_model_alone(fake):
    result = upo("--model", "m", "--prompt", "abc", "--backend", "torch")
    assert result.exit_code == 0 and "rope repaired" in result.stderr
    (config,) = fake.configs
    assert (config.model, config.backend, config.adapter.start) == ("m", "torch", None)


def test_a_model_with_an_adapter(fake, run):
    assert upo("--model", "m", "--adapter", "run/adapter", "--prompt", "a").exit_code == 0
    assert fake.configs[0].adapter.start == "run/adapter" and fake.configs[0].adapter.rank == 2
    # the run's adapter on another copy of its model
    assert upo("run", "--model", "folder", "--prompt", "a").exit_code == 0
    assert (fake.configs[1].model, fake.configs[1].revision, fake.configs[1].adapter.start) == ("folder", None, "run")


def test_sampling(fake):
    arguments = ["--prompt", "a", "--prompt", "b", "--prompt", "c", "--batch-size", "2", "--seed", "7", "--max-tokens", "5", "--temperature", "0", "--top-p", "1"]
    assert upo("--model", "m", *arguments).exit_code == 0
    assert [(n, s.seed, s.batch_size, s.max_tokens, s.temperature, s.top_p) for n, s in fake.samplings] == [(2, 7, 2, 5, 0.0, 1.0), (1, 9, 2, 5, 0.0, 1.0)]


def test_what_may_go_beyond_the_context_is_said(fake):
    """The longest prompt is user:abc, 8 tokens: with 12 more it ends at 20."""
    arguments = ("--model", "m", "--prompt", "a", "--prompt", "abc", "--max-tokens", "12")
    fake.context = 20
    assert "may go beyond" not in upo(*arguments).stderr
    fake.context = 19
    told = " ".join(upo(*arguments).stderr.split())
    assert "A prompt of 8 tokens and --max-tokens 12 may go beyond the 19 tokens that the model was made for. Lower --max-tokens to 11, or use a model" in told
    fake.context = 8
    assert "Shorten the prompt, or use" in " ".join(upo(*arguments).stderr.split())


def test_several_prompts_are_told_apart(fake):
    result = upo("--model", "m", "--prompt", "ab", "--prompt", "cd", "-q")
    assert result.stdout == "### ab\nba:resu\n\n### cd\ndc:resu\n"


def test_json_is_one_object_a_line(fake):
    result = upo("--model", "m", "--prompt", "ab", "--prompt", "ü", "--json")
    assert [json.loads(text) for text in result.stdout.splitlines()] == [
        {"prompt": "ab", "completion": "ba:resu", "tokens": 7},
        {"prompt": "ü", "completion": "ü:resu", "tokens": 6},
    ]


def test_prompts_from_files_and_standard_input(fake):
    Path("p.txt").write_text("one\n\ntwo\n")
    Path("p.jsonl").write_text('{"prompt": "three"}\n"four"\n{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]}\n')
    assert upo("--model", "m", "--prompt", "zero", "--file", "p.txt").exit_code == 0
    assert [p[0]["content"] for p in fake.prompts] == ["zero", "one", "two"]
    fake.prompts.clear()
    assert upo("--model", "m", "--file", "p.jsonl", "--system", "Be brief.").exit_code == 0
    assert all(p[0] == {"role": "system", "content": "Be brief."} for p in fake.prompts)
    assert [[m["content"] for m in p[1:]] for p in fake.prompts] == [["three"], ["four"], ["x", "y", "z"]]
    fake.prompts.clear()
    assert upo("--model", "m", input="five\nsix\n").exit_code == 0
    assert upo("--model", "m", "--file", "-", input='{"prompt": "seven"}\n').exit_code == 0
    assert [p[0]["content"] for p in fake.prompts] == ["five", "six", "seven"]


def test_only_a_line_break_ends_a_line(fake):
    """Not the separators that str.splitlines knows besides, which JSON leaves as they are within a text; and no byte order mark is a prompt's."""
    Path("p.jsonl").write_text('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c\x85d"}\n', newline="")
    Path("p.txt").write_text("\ufeffe\x0bf\r\ng\n", newline="")
    assert upo("--model", "m", "--file", "p.jsonl").exit_code == upo("--model", "m", "--file", "p.txt").exit_code == 0
    assert [p[0]["content"] for p in fake.prompts] == ["a\u2028b", "c\x85d", "e\x0bf", "g"]


def test_without_a_chat_template_the_prompt_is_plain_text(fake):
    fake.has_template = False
    result = upo("--model", "m", "--prompt", "ab")
    assert result.stdout == "ba\n" and "no chat template" in result.stderr
    fake.has_template = True
    assert upo("--model", "m", "--prompt", "ab", "--plain").stdout == "ba\n"
    result = upo("--model", "m", "--prompt", "ab", "--plain", "--system", "s")
    assert result.exit_code == 1 and "--plain: the prompt has 2 turns (system, user)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prompt", "a"], 2, "Name a run or a model: upo generate RUN, or upo generate --model M."),
        (["nothing", "--prompt", "a"], 2, "nothing is no run (it has no config.yaml). For a model: --model nothing"),
        (["--model", "m", "--adapter", "none", "--prompt", "a"], 1, "none: no such adapter folder."),
        (["--model", "m", "--file", "none.txt"], 1, "none.txt: cannot be read"),
        (["--model", "m", "--file", "empty.txt"], 1, "empty.txt: no prompt in it."),
        (["--model", "m", "--file", "bad.jsonl"], 1, "bad.jsonl:2: not valid JSON"),
        (["--model", "m", "--file", "wrong.jsonl"], 1, "wrong.jsonl:1: no prompt here."),
        (["--model", "m", "--file", "turns.jsonl"], 1, 'turns.jsonl:1: "content" of "prompt[0]" is null; only text is supported.'),
        (["--model", "m", "--file", "half.jsonl"], 1, 'half.jsonl:1: "prompt" holds half of a surrogate pair'),
        (["--model", "m", "--file", "deep.jsonl"], 1, "deep.jsonl:1: not valid JSON"),
        (["--model", "m", "--file", "answered.jsonl"], 1, "answered.jsonl:1: the prompt ends in an assistant turn; end it with a user turn."),
        (["--model", "m", "--prompt", "a", "--prompt", " "], 1, "--prompt 2: the prompt is empty."),
        (["--model", "m", "--prompt", "a", "--top-p", "0"], 2, "--top-p"),
        (["--model", "m", "--prompt", "a", "--max-tokens", "0"], 2, "--max-tokens"),
        (["--model", "m"], 1, "standard input: no prompt in it."),
    ],
)
def test_wrong_input(fake, arguments, code, words):
    Path("empty.txt").write_text("\n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    Path("wrong.jsonl").write_text('{"question": "a"}\n')
    Path("turns.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    Path("half.jsonl").write_text('{"prompt": "a \\ud800"}\n')
    Path("deep.jsonl").write_text("[" * 100_000)
    Path("answered.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    result = upo(*arguments)
    assert result.exit_code == code and result.stdout == ""
    assert words in result.stderr
    assert fake.configs == []


def test_a_run_that_has_not_ended(fake, run):
    import shutil

    shutil.rmtree("run/adapter")
    Path("run/checkpoints").mkdir()
    result = upo("run", "--prompt", "a")
    assert result.exit_code == 1 and "this run has no finished adapter" in result.stderr


def test_other_ranks_print_nothing(fake, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert upo("--model", "m", "--prompt", "a").output == ""


def test_the_placeholder_is_not_read():
    """A configuration names rows; `-` is no file, so a backend that read them would fail."""
    assert load_config({"model": "m", "data": {"train": "-"}}).data.train == "-"
