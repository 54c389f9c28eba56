"""`upo data check`: every fact it promises, for people and as JSON, and one line for a file that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from upo_cli.main import main


def pair(prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, **more}


ROWS = [
    pair("p1", "a b c", "d", score_chosen=2, score_rejected=1, id="x"),
    pair("p2", "same", "same"),
    pair("p1", "e", "f"),
    pair("p3", "g " * 40, "h"),
    pair("p4", "", "i"),
    {"prompt": "p5"},
]


@pytest.fixture
def check(tmp_path):
    """Run the command on rows (or lines) in a file; returns the exit code, stdout and stderr."""

    def run(rows: list, *options: str, name: str = "pairs.jsonl"):
        (tmp_path / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        result = CliRunner().invoke(main, ["data", "check", str(tmp_path / name), *options], catch_exceptions=False)
        return result.exit_code, result.stdout.replace(f"{tmp_path}/", ""), result.stderr.replace(f"{tmp_path}/", "")

    return run


def test_json_holds_every_fact(check, tiny_llama, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps(pair("p3", "x", "y")) + "\n" + json.dumps(pair("new", "x", "y")) + "\n")
    code, out, err = check(ROWS, "--json", "--model", str(tiny_llama), "--max-length", "60", "--overflow", "cut", "--eval", str(tmp_path / "eval.jsonl"))
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert report["lengths"]["prompt"]["median"] == len(["<|im_start|>", "user", "\n", "p", "1", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"])
    assert report["lengths"]["chosen"] == {  # 2, 5, 6 and 50 tokens
        "count": 4, "minimum": 2, "median": 5, "p95": 50, "maximum": 50, "edges": [0, 8, 16, 24, 32, 40, 48, 56], "counts": [3, 0, 0, 0, 0, 0, 1],
    }  # fmt: skip
    assert report["lengths"]["row"]["maximum"] == 60
    del report["lengths"]
    assert report == {
        "ok": False,
        "file": "pairs.jsonl",
        "layout": "preference",
        "shape": "explicit prompt, conversations",
        "records": 6,
        "rows": 4,
        "completions": 8,
        "errors": [
            'pairs.jsonl:5: "chosen" is empty; give it a text, or remove the row.',
            'pairs.jsonl:6: "chosen" is missing; each row of this layout needs it (`data.layout` forces another layout).',
        ],
        "notes": {"wrapped": [f"pairs.jsonl:{i}" for i in (1, 2, 3, 4)], "identical": ["pairs.jsonl:2"], "cut": ["pairs.jsonl:4"]},
        "unit": "tokens",
        "max_length": 60,
        "labels": {"desirable": 4, "undesirable": 4, "none": 0},
        "columns": {"score": {"rows": 1, "min": 1.0, "mean": 1.5, "max": 2.0}},
        "gaps": {"score": ["pairs.jsonl:2", "pairs.jsonl:3", "pairs.jsonl:4"]},
        "ignored": ["id"],
        "prompts": 3,
        "duplicate_prompts": [["pairs.jsonl:1", "pairs.jsonl:3"]],
        "no_end": ["pairs.jsonl:4"],
        "turn_end": "<|im_end|>",
        "eval_file": "eval.jsonl",
        "overlap": ["eval.jsonl:1"],
    }


def test_text_names_what_to_look_at(check, tiny_llama):
    code, out, _ = check(ROWS, "--model", str(tiny_llama), "--max-length", "60")
    assert code == 1
    for line in (
        "layout    preference: explicit prompt, conversations",
        "rows      3 of 6 can be trained on, with 6 completions",
        "labels    3 desirable, 3 undesirable",
        "prompts   2 different, 1 in several rows",
        "column    score: in 1 row, 1 to 2, mean 1.5",
        "not used  id",
        "turn end  <|im_end|> on every completion",
        "Lengths in tokens (at most 60 for a row: prompt and longest completion)",
        "1 row dropped: longer than train.max_length, even without the leading turns of the prompt (pairs.jsonl:4). "
        "Remedy: raise train.max_length, or set train.overflow: cut.",
        "1 row whose chosen and rejected completions are the same: no preference to learn (pairs.jsonl:2). Remedy: check how the pairs were made.",
        "2 rows with one prompt (pairs.jsonl:1, 3).",
        'pairs.jsonl:5: "chosen" is empty; give it a text, or remove the row.',
    ):
        assert line in out.splitlines()


def test_rows_without_a_number_in_a_column_are_named(check):
    """NaN, infinity, nothing and text, which a `column` scorer would stop at; a column that is whole has no such line."""
    rows = [{**pair(f"p{i}", "x", "y"), "n": i} for i in range(6)]
    for row, value in zip(rows, (0.5, float("nan"), float("inf"), None, "high"), strict=False):
        row["score"] = value
    code, out, _ = check(rows)
    assert code == 0 and "column    score: in 1 row, 0.5 to 0.5, mean 0.5" in out.splitlines() and "column n" not in out
    assert "5 rows without a finite number in column score (pairs.jsonl:2, 3, 4, 5, 6)." in out.splitlines()


def test_without_a_model_lengths_are_words_and_nothing_is_dropped(check):
    code, out, _ = check([{"prompt": "what is it", "chosen": "a b", "rejected": "c"}, {"prompt": "x", "chosen": "y", "rejected": "z"}])
    assert code == 0
    assert "Lengths in words" in out.splitlines()
    assert "turn end" not in out
    assert [line.split() for line in out.splitlines() if line.startswith(("prompt ", "row "))] == [["prompt", "1", "1", "3", "3"], ["row", "2", "2", "5", "5"]]
    bar = "#" * 40
    assert [line.rstrip() for line in out.splitlines() if line.endswith((" 1", " 0")) and line[0].isdigit()] == [
        f"2  {bar} 1", f"3  {'':40} 0", f"4  {'':40} 0", f"5  {bar} 1",
    ]  # fmt: skip


def test_good_file_of_groups(check):
    code, out, _ = check([{"prompt": "a", "completions": ["b", "c c"], "scores": [1, 0.5]}])
    assert code == 0
    assert "layout    group: plain strings" in out
    assert "labels    2 none" in out
    assert "column    scores: in 1 row, 0.5 to 1, mean 0.75" in out


def test_labels_of_one_kind_are_pointed_out(check):
    one = {"prompt": "a", "completion": "b", "label": True}
    sentence = "All labels are the same: kto has nothing to tell apart; sft can learn from desirable completions."
    assert sentence in check([one, {**one, "completion": "c"}])[1]
    assert sentence not in check([one, {**one, "label": False}])[1]


def test_many_errors_and_duplicates_are_counted(check):
    rows = [pair(f"p{i % 6}", "a", f"b{i}") for i in range(12)] + [pair("p", "", "x")] * 25
    _, out, _ = check(rows)
    assert out.count('"chosen" is empty') == 20
    assert "5 more rows that cannot be used; --json lists all." in out
    assert out.count("rows with one prompt") == 3
    assert "3 more prompts in several rows; --json lists all." in out
    assert len(json.loads(check(rows, "--json")[1])["errors"]) == 25


def test_nothing_left_to_train_on(check, tiny_llama):
    code, out, _ = check(ROWS[:1], "--model", str(tiny_llama), "--max-length", "5")
    assert code == 1
    assert "1 row dropped: the prompt alone fills train.max_length, even without its leading turns (pairs.jsonl:1). Remedy: raise train.max_length." in out
    assert "No row is left to train on." in out


def test_forced_layout(check):
    code, out, _ = check([{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}], "--layout", "unpaired")
    assert code == 0
    assert "layout    unpaired: plain strings" in out


def test_text_is_never_markup(check):
    _, out, _ = check([{"prompt": "a", "chosen": "b", "rejected": "c", "[red]x": "y"}])
    assert "not used  [red]x" in out


@pytest.mark.parametrize(
    ("name", "lines", "options", "message"),
    [
        ("pairs.jsonl", [], [], "Error: pairs.jsonl: the file is empty; it needs at least one row."),
        ("pairs.jsonl", ["", ""], [], "Error: pairs.jsonl: no rows; it needs at least one."),
        ("pairs.txt", ["x"], [], "Error: pairs.txt: unknown kind of file;"),
        ("pairs.jsonl", [ROWS[0]], ["--eval", "no.jsonl"], "Error: no.jsonl: no such file."),
        ("pairs.jsonl", [ROWS[0]], ["--model", "./no-model"], "Error: model: "),
    ],
)
def test_one_line_and_exit_code_1_for_what_cannot_be_read(check, name, lines, options, message):
    code, out, err = check(lines, *options, name=name)
    assert (code, out) == (1, "")
    assert err.startswith(message) and err.count("\n") == 1


def test_row_that_the_template_refuses_is_an_error_of_the_file(check, make_tiny_llama):
    folder = make_tiny_llama()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% if messages[0]['content'] == 'p2' %}{{ raise_exception('no p2') }}{% endif %}" + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    code, out, _ = check(ROWS[:3], "--model", str(folder))
    assert code == 1
    assert "rows      2 of 3 can be trained on, with 4 completions" in out
    assert "pairs.jsonl:2: " in out and "its chat template refuses turns of user (no p2)" in out


def test_real_pairs(harmless_pairs):
    result = CliRunner().invoke(main, ["data", "check", str(harmless_pairs), "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (report["layout"], report["rows"], report["prompts"], report["errors"]) == ("preference", 1400, 1400, [])
    assert sum(report["lengths"]["row"]["counts"]) == 1400


def test_help_and_a_check_in_words_import_no_framework():
    code = "import sys; from upo_cli.data import data; print(sorted({'numpy', 'rich', 'pydantic', 'yaml', 'torch', 'mlx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("option", [("--max-length", "60"), ("--overflow", "drop"), ("--revision", "main")])
def test_options_about_tokens_need_a_model(check, option):
    code, _, err = check(ROWS, *option)
    assert code == 2 and f"{option[0]} needs the model's tokens: add --model M." in err
