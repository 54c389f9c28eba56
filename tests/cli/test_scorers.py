"""`upo scorers` and `upo data profile`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from upo_cli.main import main

from upo.rewards import SCORERS


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def upo(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments], catch_exceptions=False)


def write(*rows: dict) -> None:
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


PAIRS = [
    {"prompt": "Why?", "chosen": "w " * 80, "rejected": "w " * 30, "q_chosen": 2.0, "q_rejected": 1.0},
    {"prompt": "How?", "chosen": "w " * 60, "rejected": "w " * 20, "q_chosen": 4.0, "q_rejected": 1.0},
]


def test_list_and_explanation() -> None:
    listed = upo("scorers")
    assert listed.exit_code == 0 and all(f"\n{name}" in f"\n{listed.stdout}" for name in SCORERS)
    assert all(len(line) <= 100 for line in listed.stdout.splitlines())
    one = upo("scorers", "repetition").stdout
    assert "distinct-n" in one and "at least 1" in one and "our own code" in one and "rewards: [{scorer: repetition, n: 3, weight: 1.0}]" in one
    entries = {entry["name"]: entry for entry in json.loads(upo("scorers", "--json").stdout)}
    assert entries["sentiment"]["card"]["range"] == [-1.0, 1.0] and entries["length"]["options"] == {"low": 20.0, "high": 100.0}
    wrong = upo("scorers", "sentment")
    assert wrong.exit_code == 2 and 'Did you mean "sentiment"?' in wrong.stderr


def test_profile_of_columns_and_of_named_goals() -> None:
    write(*PAIRS)
    plain = upo("data", "profile", "d.jsonl", "--json")
    (goal,) = json.loads(plain.stdout)["goals"]
    assert (goal["label"], goal["agreeing"], goal["conflicts"], goal["mean"]) == ("q", 2, 0, 2.0)
    both = upo("data", "profile", "d.jsonl", "--reward", "length", "--reward", "column:column=q")
    assert both.exit_code == 0
    rows = [line.split() for line in both.stdout.splitlines()]
    assert rows[0] == ["goal", "weight", "mean", "sd", "min", "max", "preference", "agree", "tied", "conflict"]
    # length: 80 -> 0.25, 30 -> 0.875, 60 -> 0.5, 20 -> 1
    assert rows[1][:6] == ["length", "1", "0.656", "0.298", "0.250", "1.000"] and rows[1][7:] == ["0%", "0%", "100%"]
    assert rows[2][0] == "q" and rows[3][0] == "total"
    assert "rejected much better: d.jsonl:1 (by 0.625), d.jsonl:2 (by 0.5)" in both.stdout
    assert "Rank correlation between goals:" in both.stdout and "#" * 40 in both.stdout


def test_profile_of_a_configuration() -> None:
    write(*PAIRS)
    Path("run.yaml").write_text(
        "model: m\ndata: {train: d.jsonl}\nobjective:\n  preset: upo\n  auxiliary:\n"
        "    rewards: [{scorer: length, weight: -1.0}, {scorer: column, column: q, weight: 0.5, normalise: zscore}]\n"
    )
    done = upo("data", "profile", "d.jsonl", "--config", "run.yaml", "--json")
    result = json.loads(done.stdout)
    assert [(g["label"], g["weight"], g["conflicts"]) for g in result["goals"]] == [("length", -1.0, 0), ("q", 0.5, 0)]
    assert result["goals"][1]["mean"] == pytest.approx(0.0) and result["goals"][1]["deviation"] == pytest.approx(1.0)


def test_profile_of_what_cannot_be() -> None:
    write({"prompt": "Why?", "chosen": "a", "rejected": "b"})
    nothing = upo("data", "profile", "d.jsonl")
    assert nothing.exit_code == 1 and "has no numeric columns. Name goals: --reward readability" in nothing.stderr
    assert upo("data", "profile", "d.jsonl", "--reward", "length", "--config", "x.yaml").exit_code == 2
    unknown = upo("data", "profile", "d.jsonl", "--reward", "lenght")
    assert unknown.exit_code == 1 and 'Did you mean "length"?' in unknown.stderr


def test_a_reward_may_be_written_as_in_a_configuration() -> None:
    write(PAIRS[0])
    done = upo("score", "d.jsonl", "--reward", '{scorer: pattern, pattern: "w{20,}|w w, x|(w ){70}"}', "--out", "o.jsonl")
    assert done.exit_code == 0, done.stderr
    row = json.loads(Path("o.jsonl").read_text())
    assert (row["pattern_chosen"], row["pattern_rejected"]) == (1.0, 0.0)
    for reward, message in (
        ("{scorer: length, weight: 2}", "weight belongs to training"),
        ("{scorer: length", "is no YAML mapping"),
        ("{high: 3}", "scorer: Field required"),
        ("length:normalise=zscore", "normalise belongs to training"),
    ):
        refused = upo("score", "d.jsonl", "--reward", reward, "--out", "p.jsonl")
        assert refused.exit_code == 1 and message in refused.stderr, refused.stderr
