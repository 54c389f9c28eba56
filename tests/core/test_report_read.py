"""Reading run folders in every state, and making what they hold fit to be shown."""

from __future__ import annotations

import json

import pytest
from report_runs import HOSTILE, make_run, measured

from upo.errors import RunError
from upo.report.evaluation import Goal, Interval, Measure
from upo.report.plain import Portable, clean, number
from upo.report.read import read_run


def test_a_finished_run(tmp_path):
    run = read_run(make_run(tmp_path / "run", evaluation=measured()))
    assert (run.name, run.done, run.total, run.finished, run.notes) == ("run", 20, 20, True, [])
    assert len(run.steps) == 20 and [r["step"] for r in run.evals] == [0, 20]
    assert run.held_out("before")["accuracy"] == 0.5 and run.held_out("after")["accuracy"] == 0.75
    assert run.warnings == ["/home/someone/secret client/train.jsonl:7: 3 rows dropped."]
    assert run.config is not None and run.config.model == "owner/base"
    found = run.evaluation
    assert (found.file, found.step, found.prompts, found.samples, found.rows) == ("eval.json", 20, 9, 2, 60)
    assert found.goals["readability"] == Goal(Measure(0.2, 0.32, Interval(0.12, 0.05, 0.19)), 0.7)
    assert found.measures["accuracy"] == Measure(0.5, 0.75, Interval(0.25, 0.1, 0.4)) and found.measures["words"] == Measure(30.25, 22.0, None)
    assert found.win_rate.judge == "readability" and found.win_rate.rate == Interval(0.55, 0.45, 0.65)
    assert found.answers[3].prompt == "Question 3?" and found.answers[3].after == ["after 3", "other"]


def test_what_the_quickstart_wrote(tmp_path):
    """Its one reward is readability; it is a goal only of a run that was trained towards it."""
    canned = {
        "steps": 20, "prompts": 40, "samples": 8, "before": {"reward": 0.2, "grade": 9.5, "accuracy": 0.5}, "after": {"reward": 0.3, "grade": 8.0, "accuracy": None},
        "reward_change": {"mean": 0.1, "low": 0.0, "high": 0.2}, "answers": [{"prompt": "q", "before": ["b"], "after": ["a"]}], "seconds": {"total": 9.0, "odd": None},
    }  # fmt: skip
    for name, objective, weight in (("upo", None, 0.7), ("dpo", {"preference": {"loss": "dpo"}}, None)):
        folder = make_run(tmp_path / name, objective=objective)
        (folder / "quickstart.json").write_text(json.dumps(canned))
        found = read_run(folder).evaluation
        assert found.goals == {"readability": Goal(Measure(0.2, 0.3, Interval(0.1, 0.0, 0.2)), weight)}
        assert found.measures["accuracy"] == Measure(0.5, None, None) and found.seconds == {"total": 9.0} and found.samples == 8
        (folder / "eval.json").write_text(json.dumps(measured()))
        assert read_run(folder).evaluation.file == "eval.json"


def test_a_goal_is_what_the_run_was_trained_towards(tmp_path):
    """`upo eval --goal` gives any scorer a weight of 1; what counts is the run's own configuration, where it can be read."""
    goals = {name: {"weight": 1.0, "before": 0.1, "after": 0.2} for name in ("length", "length#2", "readability")}
    twice = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "length", "weight": 0.5, "high": 80}, {"scorer": "length", "weight": -2.0}, {"scorer": "column", "column": "readability_score"}]}}
    folder = make_run(tmp_path / "run", objective=twice, evaluation=measured(goals=goals))
    assert {name: goal.weight for name, goal in read_run(folder).evaluation.goals.items()} == {"length": 0.5, "length#2": -2.0, "readability": None}
    config = (folder / "config.yaml").read_text()
    for odd in ("function: 7", "function: nothing", "other: 1"):
        (folder / "config.yaml").write_text(config.replace("high: 80", odd).replace("scorer: length", "scorer: python"))
        told = read_run(folder)
        assert told.config is None and "is not one that this version of upo reads" in told.notes[0] and told.evaluation.goals["length"].weight == 1.0
    (folder / "config.yaml").unlink()
    assert {goal.weight for goal in read_run(folder).evaluation.goals.values()} == {1.0}


@pytest.mark.parametrize(
    ("weight", "interval", "verdict"),
    [
        (1.0, Interval(0.1, 0.01, 0.2), ("rose", "good")),
        (1.0, Interval(-0.1, -0.2, -0.01), ("fell", "bad")),
        (-1.0, Interval(0.1, 0.01, 0.2), ("rose", "bad")),
        (-1.0, Interval(-0.1, -0.2, -0.01), ("fell", "good")),
        (1.0, Interval(0.1, 0.0, 0.2), ("not shown", "plain")),
        (1.0, Interval(-0.1, -0.2, 0.0), ("not shown", "plain")),
        (None, Interval(0.1, 0.01, 0.2), ("rose", "plain")),
        (1.0, None, ("no interval", "plain")),
    ],
)
def test_a_change_is_claimed_only_where_the_interval_excludes_zero(weight, interval, verdict):
    assert Goal(Measure(0.0, 0.1, interval), weight).verdict() == verdict


def test_an_unfinished_run_says_what_was_kept_and_how_to_go_on(tmp_path):
    folder = make_run(tmp_path / "run", done=7)
    assert read_run(folder).notes == [f"This run has not ended: 7 of 20 steps are in its metrics, no checkpoint was written yet. Go on with: upo train --resume --out {folder}"]
    (folder / "checkpoints" / "step-000005").mkdir()
    run = read_run(folder)
    assert "the newest checkpoint is of step 5" in run.notes[0] and not run.finished and run.warnings == []
    assert run.held_out("before")["accuracy"] == 0.5 and run.held_out("after") == {}


def test_damaged_files_are_named_and_the_rest_is_kept(tmp_path):
    folder = make_run(tmp_path / "run", evaluation=measured())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss"\n[1]\n{"step": true}\n{"step": "7"}\n{"step": 21, "loss": NaN}\n')
    (folder / "manifest.json").write_text('{"steps": "many"}')
    (folder / "eval.json").write_text("[]")
    (folder / "config.yaml").write_text("model: [\n")
    run = read_run(folder)
    told = "\n".join(run.notes)
    assert "metrics.jsonl: 5 lines could not be read and are left out; 22 are kept." in told
    assert "manifest.json is not a manifest" in told and "eval.json is not an object" in told and "config.yaml is not one that this version of upo reads" in told
    assert run.config is None and run.config_text == "model: [\n" and run.manifest == {} and run.evaluation is None and run.total is None and len(run.steps) == 20


@pytest.mark.parametrize("content", ["{}", '{"goals": [], "samples": {}, "win_rate": 3}', '{"goals": {"x": 7, "y": {"before": true, "change": {"mean": 1e999}}}, "prompts": -1, "samples": [1, {"prompt": 2}, {"prompt": "p", "after": [1, "a"]}]}'])
def test_an_evaluation_from_anywhere(tmp_path, content):
    folder = make_run(tmp_path / "run")
    (folder / "eval.json").write_text(content)
    found = read_run(folder).evaluation
    assert found.prompts is None and all(goal.measure == Measure(None, None, None) for goal in found.goals.values()) and found.win_rate is None
    assert [a.after for a in found.answers] in ([], [["a"]])


def test_no_run_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "summary.json").write_text("{}")
    make_run(tmp_path / "runs" / "one")
    for name, message in (("file", "is a file"), ("nowhere", "no such folder"), ("foreign", "found summary.json"), ("runs", "It holds runs: ")):
        with pytest.raises(RunError, match=message) as caught:
            read_run(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1 and name in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data/train.jsonl:7: bad", "train.jsonl:7: bad"),
        ("see ~/x/y.yaml, /a/b/ and C:\\Users\\me\\z.txt.", "see y.yaml, b and z.txt."),
        ("https://host/a/b owner/name:train 3/4 runs/first and/or", "https://host/a/b owner/name:train 3/4 runs/first and/or"),
        ("/jobs/secret client/train.jsonl and /jobs/secret client", "train.jsonl and secret client"),
        ("(/a/b/c.py:name)", "(c.py:name)"),
        ("/jobs/secret client/deep/er.txt, /jobshop/a/b", "er.txt, b"),
        ("/home/x y/z/t.jsonl:3, /home/x ylophone/a", "t.jsonl:3, x ylophone/a"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, expected):
    assert Portable(["/jobs/secret client/train.jsonl", "/jobs/secret client", "/home/x y", "relative/kept", "0.05", ""])(text) == expected


def test_values_are_made_safe():
    assert [number(v) for v in (1, 2.5, True, None, "3", float("nan"), float("inf"), 10**400)] == [1.0, 2.5, None, None, None, None, None, None]
    assert clean("a\r\nb\tc\x00\x1b[31m\ud800\u202e") == "a\nb\tc\ufffd\ufffd[31m\ufffd\ufffd"
    clean(HOSTILE).encode()
