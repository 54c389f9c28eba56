"""`upo eval` on a tiny model: from the run to eval.json and the table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from judge_server import Server, says
from upo_cli import eval as eval_command
from upo_cli.main import main

from upo.data.tokenizer import load_tokenizer
from upo.report.facts import signed

PAIRS = [{"prompt": f"What is {i} and {i}?", "chosen": f"The answer is {2 * i}.", "rejected": f"I do not know {i}."} for i in range(1, 13)]
FEW = ("--max-tokens", "6", "--samples", "2")


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_llama):
    """A configuration whose run is evaluated while it trains, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    Path("run.yaml").write_text(
        f"model: {tiny_llama}\ndevice: cpu\ndtype: float32\ndata: {{train: pairs.jsonl, eval: 0.25}}\nadapter: {{rank: 2}}\n"
        "objective: {preset: upo, auxiliary: {rewards: [{scorer: length, low: 3, high: 9}], value: {fit_steps: 2}}}\n"
        "optimizer: {warmup_steps: 0, lr: 2.0e-2}\ntrain: {batch_size: 2, steps: 4, eval_every: 2, keep_best: goal/length}\n"
        "evaluation: {prompts: 2, samples: 2, max_tokens: 6}\n"
    )
    return tmp_path


def upo(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False, env={"COLUMNS": "120"})


def test_a_run_from_training_to_its_evaluation(here, backend):
    done = upo("train", "run.yaml", "--backend", backend, "--out", "run", "-q")
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if line.get("eval")}
    assert sorted(found) == [0, 2, 4] and all(0 <= line["goal/length"] <= 1 and line["answers/words"] >= 0 for line in found.values())
    done = upo("eval", "run", "--judge", "length", *FEW)
    assert done.exit_code == 0, done.stderr
    result = json.loads(Path("run/eval.json").read_text())
    assert (result["backend"], result["checkpoint"], result["step"], result["run"]) == (backend, "latest", 4, "run")
    assert result["prompts"] == result["rows"] == len(result["samples"]) and all(len(s["before"]) == len(s["after"]) == 2 for s in result["samples"])
    for name in ("accuracy", "margin", "kl", "perplexity"):
        # the same rows in other micro-batches, in float32
        assert result[name]["before"] == pytest.approx(found[0][name], rel=1e-4, abs=1e-4)
        assert result[name]["after"] == pytest.approx(found[4][name], rel=1e-4, abs=1e-4)
    assert abs(result["kl"]["after"]) > 1e-2, "the trained adapter was loaded"
    assert result["win_rate"]["judge"] == "length" and sum(result["win_rate"][n] for n in ("wins", "losses", "ties")) == 2 * result["prompts"]
    shown = " ".join(done.stdout.split())
    assert "preference accuracy" in shown and "goal length" in shown and "Win rate by length" in shown and "Next:" in shown
    assert upo("report", "run").exit_code == 0  # what it shows is what was measured
    page, change = Path("run/report.html").read_text(), result["goals"]["length"]["change"]
    assert f'id="goal-1">{signed(change["mean"])}<' in page and f"{signed(change['low'])} to {signed(change['high'])}" in page
    assert "goal/length over the optimizer steps" in page and result["samples"][0]["prompt"] in page and "(judge: length)" in page
    again = upo("eval", "run", *FEW)
    assert again.exit_code == 1 and "--out run/eval.json: exists already" in again.stderr and again.stdout == ""
    done = upo("eval", "run", "--checkpoint", "best", "--force", "--json", *FEW)
    assert json.loads(done.stdout)["checkpoint"] == "best" and "Replaced run/eval.json" in done.stderr


def test_prompts_and_goals_of_ones_own(here, backend):
    assert upo("train", "run.yaml", "--backend", backend, "--out", "run", "-q").exit_code == 0
    Path("questions.txt").write_text("What is rain?\nWho are you?\n")
    Path("mine.py").write_text("def vowels(prompts, texts):\n    return [sum(c in 'aeiou' for c in t) for t in texts]\ndef judge(prompt, a, b):\n    return 'maybe'\n")
    arguments = ("eval", "run", "--prompts", "questions.txt", "--goal", "python:function=mine.py:vowels", "--goal", "readability", "--json", "--out", "e.json", *FEW)
    assert "--allow-code" in upo(*arguments).stderr and not Path("e.json").exists()
    done = upo(*arguments, "--allow-code", "--judge", "python:mine.py:judge")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert [s["prompt"] for s in result["samples"]] == ["What is rain?", "Who are you?"] and set(result["goals"]) == {"vowels", "readability"}
    told = [sum(c in "aeiou" for c in text) for sample in result["samples"] for text in sample["after"]]
    assert result["goals"]["vowels"]["after"] == pytest.approx(sum(told) / 4)
    assert result["win_rate"]["mean"] is None and "answered 'maybe'; a verdict is 0, 1 or None" in done.stderr
    Path("pairs.jsonl").unlink()
    done = upo("eval", "run", "--prompts", "questions.txt", "--out", "f.json", "--json", *FEW)
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"] == 0
    assert "The held-out rows cannot be read, so accuracy, margin, KL and perplexity are left out" in done.stderr
    assert upo("eval", "run", "--out", "g.json", *FEW).exit_code == 1


def test_prompts_with_and_without_the_template(tmp_path, tiny_llama):
    file = tmp_path / "questions.txt"
    file.write_text("What is rain?\n")
    tokenizer = load_tokenizer(tiny_llama)
    bare, templated = tokenizer.prompt_ids("What is rain?"), tokenizer.prompt_ids([{"role": "user", "content": "What is rain?"}])
    for plain, expected in ((True, bare), (False, templated)):
        [question] = eval_command._questions(file, tokenizer, None, plain)
        assert question.tokens.tolist() == expected.tolist()
    assert bare.tolist() != templated.tolist()


def test_an_adapter_on_its_model(here, backend, tiny_llama, monkeypatch):
    """And judged by a model that takes the longer answer: in text, the counts are those of the samples."""
    monkeypatch.setenv("UPO_CACHE", str(here / "cache"))
    assert upo("train", "run.yaml", "--backend", backend, "--out", "run", "-q").exit_code == 0
    server = Server()
    server.reply = lambda request: says(f"Longer.\n{1 + (len(request['given']['answer_2']) > len(request['given']['answer_1']))}")
    judge = f"endpoint:url={server.url},model=judge-1,per_minute=1e6"
    done = upo("eval", "--adapter", "run/adapter", "--model", str(tiny_llama), "--backend", backend, "--data", "pairs.jsonl", "--goal", "length:high=50", "--judge", judge, "--json", *FEW)
    server.http.shutdown()
    server.http.server_close()
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["run"], result["rows"], result["accuracy"]["before"], result["kl"]["before"]) == (None, 12, 0.5, 0.0)
    assert abs(result["kl"]["after"]) > 1e-2 and set(result["goals"]) == {"length"}
    texts = [(a, b) for sample in result["samples"] for a, b in zip(sample["before"], sample["after"], strict=True)]
    longer, shorter = sum(len(b) > len(a) for a, b in texts), sum(len(b) < len(a) for a, b in texts)
    rate = result["win_rate"]
    assert (rate["judge"], rate["wins"], rate["losses"], rate["failed"]) == ("judge-1", longer, shorter, 0) and longer + shorter > 0
    assert rate["ties"] == len(texts) - longer - shorter and rate["inconsistent"] == sum(len(a) == len(b) and a != b for a, b in texts)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Name a run, an adapter or a model"),
        (["none"], 2, "none is no run (it has no config.yaml). For an adapter: --adapter none"),
        (["half"], 1, "neither a result nor a checkpoint yet"),
        (["half", "--adapter", "x"], 2, "Give RUN or --adapter, not both"),
        (["--adapter", "none"], 1, "none: no such adapter folder"),
        (["--model", "m", "--goal", "redability"], 1, '--goal redability: unknown scorer "redability". Did you mean "readability"?'),
        (["--model", "m", "--goal", "column:column=x"], 1, "--goal: x stands in the data and cannot score sampled answers"),
        (["--model", "m", "--goal", "length:high"], 1, "--goal length:high: write options as SCORER:OPTION=VALUE"),
        (["--model", "m", "--judge", "endpoint:url=https://a.b/v1"], 1, "--judge endpoint:url=https://a.b/v1: endpoint: model must be given."),
        (["--model", "m", "--judge", "{scorer: endpoint, url: 'http://a.b', model: m}"], 1, "endpoint: url 'http://a.b' must begin with https://"),
        (["--model", "m", "--judge", "length", "--judge-timeout", "5"], 2, "--judge-timeout is for --judge python:FILE.py:NAME only; an endpoint has an option, timeout=SECONDS."),
        (["--adapter", "a", "--checkpoint", "best"], 2, "--checkpoint chooses one of a run's. For an adapter give --adapter RUN/checkpoints/step-N alone."),
        (["--model", "m", "--plain"], 2, "--plain goes with --prompts; held-out rows are asked as they were written."),
        (["--model", "m", "--judge", "length", "--limit", "0"], 2, "--judge compares answers, and --limit 0 asks for none."),
        (["--model", "m", "--judge", "python:j.py:f"], 1, "--judge python:j.py:f: runs code of yours. If you trust it, add --allow-code"),
    ],
)
def test_what_is_refused(here, arguments, code, words):
    Path("half/checkpoints").mkdir(parents=True)
    Path("half/config.yaml").write_text(Path("run.yaml").read_text())
    done = upo("eval", *arguments)
    assert done.exit_code == code and done.stdout == "" and words in " ".join(done.stderr.replace("│", " ").split())
