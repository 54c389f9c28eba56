"""`upo score`: the same rows with scores beside them, and nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from upo_cli.main import main

PAIRS = [
    {
        "prompt": "Why?",
        "chosen": "The sun is warm. It is a big ball of fire.",
        "rejected": "Thermonuclear fusion constitutes the predominant energetic mechanism.",
        "id": "ä1",
    },
    {"prompt": "How?", "chosen": "w " * 60, "rejected": "", "id": "2"},
]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def upo_score(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["score", *arguments], catch_exceptions=False)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_pairs() -> None:
    write("d.jsonl", [{**PAIRS[0]}, {**PAIRS[1], "rejected": "w " * 100}])
    result = upo_score("d.jsonl", "--reward", "readability", "--reward", "length:low=20,high=100", "--out", "o.jsonl", "--json")
    assert result.exit_code == 0, result.output
    rows = lines("o.jsonl")
    assert rows[0] == {
        **PAIRS[0],
        "readability_chosen": 1.0,
        "readability_rejected": 0.0,
        "length_chosen": 1.0,
        "length_rejected": 1.0,
    }
    assert (rows[1]["length_chosen"], rows[1]["length_rejected"]) == (0.5, 0.0)
    summary = json.loads(result.stdout)
    assert summary["rows"] == 2 and summary["out"] == "o.jsonl"
    length = summary["rewards"]["length"]
    assert length == {
        "completions": 4, "mean": 0.625, "min": 0.0, "max": 1.0, "at_0": 0.25, "at_1": 0.5,
        "chosen": 0.75, "rejected": 0.5, "chosen_higher": 0.5, "tied": 0.5,
    }  # fmt: skip
    assert "Wrote o.jsonl" in result.stderr


def test_the_columns_can_be_trained_on() -> None:
    from upo.data.read import read
    from upo.data.rows import parse_rows

    write("d.jsonl", [PAIRS[0]])
    assert upo_score("d.jsonl", "--reward", "readability", "--out", "o.jsonl").exit_code == 0
    (row,) = parse_rows(read("o.jsonl")).rows
    assert row.columns["readability"] == (1.0, 0.0)


def test_groups_and_unpaired() -> None:
    write("g.jsonl", [{"prompt": "p", "completions": ["one two three", "w " * 100]}])
    assert upo_score("g.jsonl", "--reward", "length", "--out", "g2.jsonl").exit_code == 0
    assert lines("g2.jsonl")[0]["length"] == [1.0, 0.0]
    write(
        "u.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "w " * 60}],
                "label": True,
            }
        ],
    )
    result = upo_score("u.jsonl", "--reward", "length", "--out", "u2.jsonl")
    assert lines("u2.jsonl")[0]["length"] == 0.5
    head, numbers = result.stdout.splitlines()
    assert head.split()[:4] == ["reward", "mean", "min", "max"] and numbers.split() == [
        "length",
        "0.500",
        "0.500",
        "0.500",
        "0%",
        "0%",
        "-",
        "-",
        "-",
        "-",
    ]


def test_a_function_of_ones_own() -> None:
    write("d.jsonl", [PAIRS[0]])
    Path("mine.py").write_text("def shorter(prompts, completions):\n    return [-len(c) for c in completions]\n")
    arguments = ("d.jsonl", "--reward", "python:function=mine.py:shorter", "--out", "o.jsonl")
    refused = upo_score(*arguments)
    assert refused.exit_code == 1 and "--allow-code" in refused.stderr and not Path("o.jsonl").exists()
    assert upo_score(*arguments, "--allow-code").exit_code == 0
    assert lines("o.jsonl")[0]["shorter_chosen"] == -len(PAIRS[0]["chosen"])


def test_nothing_is_overwritten() -> None:
    write("d.jsonl", [PAIRS[0]])
    write("o.jsonl", [{"mine": 1}])
    before = Path("o.jsonl").read_bytes()
    refused = upo_score("d.jsonl", "--reward", "length", "--out", "o.jsonl")
    assert refused.exit_code == 1 and "exists already" in refused.stderr and "--force" in refused.stderr
    itself = upo_score("d.jsonl", "--reward", "length", "--out", "./d.jsonl", "--force")
    assert itself.exit_code == 1 and "is the input file" in itself.stderr and lines("d.jsonl") == [PAIRS[0]]
    assert Path("o.jsonl").read_bytes() == before
    assert upo_score("d.jsonl", "--reward", "length", "--out", "o.jsonl", "--force").exit_code == 0
    assert lines("o.jsonl")[0]["length_chosen"] == 1.0
    again = upo_score("o.jsonl", "--reward", "length", "--out", "p.jsonl")
    assert again.exit_code == 1 and 'o.jsonl:1: the row has a field "length_chosen" already' in again.stderr
    assert sorted(p.name for p in Path().iterdir()) == ["cache", "d.jsonl", "o.jsonl"]  # nothing temporary stays


@pytest.mark.parametrize(
    ("reward", "out", "message"),
    [
        ("readabilty", "o.jsonl", 'unknown scorer "readabilty". Did you mean "readability"?'),
        ("length:hi=3", "o.jsonl", '--reward length:hi=3: scorer length has no option "hi"'),
        ("length:3", "o.jsonl", "write options as SCORER:OPTION=VALUE"),
        ("length:high=x", "o.jsonl", "high must be a number"),
        ("length", "o.parquet", "ends in .jsonl"),
        ("length", "none/o.jsonl", "there is no folder none"),
        ("column:column=x", "o.jsonl", 'd.jsonl:1: no number in column "x"'),
    ],
)
def test_bad_options_are_one_line(reward: str, out: str, message: str) -> None:
    write("d.jsonl", [PAIRS[0]])
    result = upo_score("d.jsonl", "--reward", reward, "--out", out)
    assert result.exit_code == 1 and message in result.stderr
    assert [p.name for p in Path().iterdir() if p.suffix != ""] == ["d.jsonl"]


def test_bad_data_is_named_by_its_line() -> None:
    Path("d.jsonl").write_text(json.dumps(PAIRS[0]) + "\n{broken\n{broken too\n")
    result = upo_score("d.jsonl", "--reward", "length", "--out", "o.jsonl")
    assert result.exit_code == 1 and "d.jsonl:2: broken JSON" in result.stderr and "1 more" in result.stderr
    assert not Path("o.jsonl").exists()
    missing = upo_score("none.jsonl", "--reward", "length", "--out", "o.jsonl")
    assert missing.exit_code == 1 and "none.jsonl: no such file" in missing.stderr


def test_usage() -> None:
    assert upo_score("d.jsonl", "--out", "o.jsonl").exit_code == 2
    text = upo_score("--help").output
    assert "readability" in text and "--allow-code" in text
