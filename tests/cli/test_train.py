"""`upo train`: what it asks of the loop, what it shows, and where."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from upo_cli.main import main
from upo_cli.progress import PlainReporter, RichReporter, duration, line, number, reporting

from upo import backend
from upo.config import RunConfig
from upo.training.reporter import Reporter, Silent

SUMMARY = {
    "rows": 1038,
    "steps": 5,
    "total_s": 83.2,
    "rows_per_s": 1.25,
    "peak_memory_gb": 1.4,
    "eval": {
        "before": {"step": 0, "eval": True, "loss": 0.5, "accuracy": 0.25, "seconds": 1.0},
        "after": {"step": 5, "eval": True, "loss": 0.4375, "accuracy": 0.75, "seconds": 1.0},
    },
    "odd": float("nan"),
}


class Fake:
    """Stands for the loop and the plan; keeps what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, RunConfig, Path | None, bool, bool]] = []

    def train(self, config, out, *, resume=False, reschedule=False, allow_code=False, reporter=None):
        self.calls.append(("train", config, out, resume, allow_code))
        reporter.warn("3 rows dropped: too long.")
        reporter.start("train", 5, "steps")
        reporter.metrics({"step": 1, "loss": 0.5, "accuracy": 0.5, "lr": 1e-4})
        reporter.advance(1)
        return SUMMARY

    def plan(self, config, *, allow_code=False, reporter=None):
        self.calls.append(("plan", config, None, False, allow_code))
        return {"rows": {"train": 38, "eval": 2}, "steps": 5, "reference_s": 61.0, "notes": ["a", "b"], "memory_gb": 1.23456}


@pytest.fixture
def loop(monkeypatch, tmp_path):
    fake = Fake()
    for name, attribute in (("upo.training.loop", "train"), ("upo.training.plan", "plan")):
        module = types.ModuleType(name)
        setattr(module, attribute, getattr(fake, attribute))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backend, "installed", lambda name: True)
    monkeypatch.setattr(backend, "has_mlx_build", lambda: True)
    for name in ("RANK", "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("model: m\ndata: {train: rows.jsonl}\noptimizer: {lr: 1e-5}\n")
    return fake


def upo(*arguments: str):
    return CliRunner().invoke(main, ["train", *arguments], catch_exceptions=False)


def test_it_trains_and_says_what_came_out(loop):
    result = upo("my.yaml")
    assert result.exit_code == 0
    ((kind, config, out, resume, allow_code),) = loop.calls
    assert (kind, out, resume, allow_code) == ("train", Path("runs/my"), False, False)
    assert config.optimizer.lr == 1e-5
    assert result.stdout.splitlines() == [
        "Held-out rows, before and after:",
        "          before  after",
        "loss      0.5000  0.4375",
        "accuracy  0.2500  0.7500",
        "",
        "rows             1,038",
        "steps            5",
        "time             1 min 23 s",
        "rows per second  1.25",
        "peak memory, GB  1.4",
        "adapter          runs/my/adapter",
        "",
        "Next:",
        '  upo generate runs/my --prompt "..."',
        "  upo report runs/my    one page to look at, or to show",
        "  upo train my.yaml --out DIR --set KEY=VALUE    the same with something changed",
    ]
    messages = result.stderr.splitlines()
    assert messages[:3] == ["Run folder: runs/my", "Warning: 3 rows dropped: too long.", "train: 5 steps"]
    assert messages[3].startswith("step 1/5  loss 0.5000  accuracy 0.50  lr 1.0e-04") and len(messages) == 4


def test_without_evaluation_there_is_no_table_of_it(loop, monkeypatch):
    monkeypatch.setitem(SUMMARY, "eval", {"before": None, "after": None})
    result = upo("my.yaml")
    assert result.exit_code == 0 and "before" not in result.stdout and "runs/my/adapter" in result.stdout


def test_the_best_checkpoint_is_named(loop, monkeypatch):
    """It is not what `adapter/` holds."""
    monkeypatch.setitem(SUMMARY, "best", {"checkpoint": "elsewhere/checkpoints/step-000003", "step": 3, "loss": 0.4})
    lines = upo("my.yaml").stdout.splitlines()
    assert lines[lines.index("adapter          runs/my/adapter") + 1] == "best checkpoint  runs/my/checkpoints/step-000003"


def test_options_reach_the_loop(loop):
    result = upo("my.yaml", "--backend", "mlx", "--out", "here", "--set", "train.seed=3", "--set", "optimizer.lr=2e-5", "--allow-code", "--quiet")
    assert result.exit_code == 0 and result.stdout == "" and result.stderr == "Warning: 3 rows dropped: too long.\n"
    ((_, config, out, _, allow_code),) = loop.calls
    assert (config.backend, config.train.seed, config.optimizer.lr, out, allow_code) == ("mlx", 3, 2e-5, Path("here"), True)


def test_json_has_stdout_to_itself(loop):
    result = upo("my.yaml", "--json")
    assert json.loads(result.stdout) == {**SUMMARY, "odd": None}
    assert "Warning: 3 rows dropped" in result.stderr


def test_dry_run(loop):
    result = upo("my.yaml", "--dry-run")
    assert [call[0] for call in loop.calls] == ["plan"]
    assert result.stdout.splitlines() == [
        "rows train   38",
        "rows eval    2",
        "steps        5",
        "reference s  1 min 01 s",
        "notes        a, b",
        "memory gb    1.235",
    ]
    assert not Path("runs").exists()
    assert json.loads(upo("my.yaml", "--dry-run", "--json").stdout)["rows"] == {"train": 38, "eval": 2}


def test_resume_uses_the_configuration_of_the_run(loop):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model: of-the-run\ndata: {train: rows.jsonl}\ntrain: {steps: 7}\n")
    assert upo("--resume", "--out", "run", "--set", "train.micro_batch_tokens=99").exit_code == 0
    ((_, config, out, resume, _),) = loop.calls
    assert (config.model, config.train.micro_batch_tokens, out, resume) == ("of-the-run", 99, Path("run"), True)
    assert upo("my.yaml", "--resume").exit_code == 0
    assert loop.calls[1][1].model == "m" and loop.calls[1][2:4] == (Path("runs/my"), True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Name a configuration file, or go on with a run: upo train --resume --out RUN."),
        (["--resume"], 2, "Name a configuration file, or go on with a run"),
        (["--resume", "--out", "nothing"], 2, "nothing holds no run (config.yaml is missing)"),
        (["."], 2, ". is a folder, not a configuration file. To go on with the run in it: upo train --resume --out ."),
        (["none.yaml"], 1, "none.yaml: no such file. Start from one of the files in examples/"),
        (["my.yaml", "--set", "optimizer.lrr=1"], 1, '--set optimizer.lrr: unknown key. Did you mean "lr"?'),
        (["my.yaml", "--backend", "jax"], 2, "'jax' is not one of 'auto', 'mlx', 'torch'"),
        (["my.yaml", "--resum"], 2, "--resume"),
    ],
)
def test_wrong_input(loop, arguments, code, words):
    result = upo(*arguments)
    assert result.exit_code == code and result.stdout == ""
    assert words in result.stderr
    assert loop.calls == []


def test_a_missing_backend_is_said_first(loop, monkeypatch):
    monkeypatch.setattr(backend, "installed", lambda name: False)
    result = upo("my.yaml", "--backend", "torch")
    assert (result.exit_code, result.stdout) == (1, "") and loop.calls == []
    assert result.stderr == 'Error: backend: torch is not installed. Install it with: pip install "upo[torch]"\n'
    assert upo("my.yaml", "--backend", "torch", "--dry-run").exit_code == 0, "a plan needs no backend"


def test_what_is_not_used_is_said(loop):
    Path("both.yaml").write_text("model: m\ndata: {train: a}\ntrain: {epochs: 2, steps: 7}\n")
    assert "the run takes 7 steps and train.epochs is not used" in upo("both.yaml").stderr
    Path("one.yaml").write_text("model: m\ndata: {train: a}\ntrain: {steps: 7}\n")
    assert "train.epochs" not in upo("one.yaml").stderr


@pytest.mark.parametrize("variable", ["RANK", "MLX_RANK"])
def test_other_ranks_are_silent(loop, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    for arguments in (["my.yaml"], ["my.yaml", "--json"], ["my.yaml", "--dry-run"]):
        result = upo(*arguments)
        assert (result.exit_code, result.output) == (0, "")


def test_schema_needs_no_configuration(loop):
    result = upo("--schema")
    assert result.exit_code == 0 and json.loads(result.stdout)["title"] == "upo configuration"


# --- Progress ---------------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(quiet: bool = False) -> tuple[PlainReporter, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return PlainReporter(stream, quiet, clock=clock), stream, clock


def steps(reporter: Reporter, clock: Clock, first: int, last: int, seconds: float = 1.0) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        reporter.metrics({"step": step, "loss": step / 10})
        reporter.advance(1)


def test_plain_lines_every_ten_steps():
    reporter, stream, clock = plain()
    reporter.start("train", 25, "steps")
    steps(reporter, clock, 1, 25)
    reporter.close()
    assert stream.getvalue().splitlines() == [
        "train: 25 steps",
        "step 1/25  loss 0.1000  24 s left",
        "step 10/25  loss 1.0000  15 s left",
        "step 20/25  loss 2.0000  5 s left",
        "step 25/25  loss 2.5000",
    ]


def test_plain_lines_when_steps_are_slow():
    reporter, stream, clock = plain()
    reporter.start("train", 100, "steps")
    steps(reporter, clock, 1, 4, seconds=8.0)
    assert stream.getvalue().splitlines() == [
        "train: 100 steps",
        "step 1/100  loss 0.1000  13 min 12 s left",
        "step 3/100  loss 0.3000  12 min 56 s left",
    ]
    reporter.close()  # the last step is shown even if it was not due
    assert stream.getvalue().splitlines()[-1] == "step 4/100  loss 0.4000  12 min 48 s left"


def test_a_resumed_phase_is_the_rest_of_the_run():
    reporter, stream, clock = plain()
    reporter.start("train", 20, "steps")
    steps(reporter, clock, 41, 50, seconds=2.0)
    assert stream.getvalue().splitlines()[-1] == "step 50/60  loss 5.0000  20 s left"


def test_plain_phases_without_metrics():
    reporter, stream, clock = plain()
    reporter.start("reference", 400, "rows")
    for _ in range(4):
        clock.now += 10
        reporter.advance(100)
    reporter.start("train", 1, "steps")
    assert stream.getvalue().splitlines() == ["reference: 400 rows", "reference: 200/400 rows  20 s left", "train: 1 steps"]


def test_evaluations_are_shown_at_once():
    reporter, stream, _ = plain()
    reporter.metrics({"step": 20, "eval": True, "loss": 0.25, "accuracy": 1.0, "reward/mean": None, "weight/mean": 1.5})
    assert stream.getvalue() == "step 20  evaluation  loss 0.2500  accuracy 1.00  weight 1.50\n"


@pytest.mark.parametrize("make", ["plain", "rich"])
def test_warnings_come_once_and_again_when_they_have_scrolled_away(make, monkeypatch):
    stream = io.StringIO()
    if make == "plain":
        reporter = PlainReporter(stream)
    else:
        reporter = RichReporter(console=Console(file=stream, highlight=False))
    reporter.warn("far [1/2] away")
    reporter.warn("far [1/2] away")
    for i in range(11):
        reporter.info(f"line {i}")
    reporter.warn("near")
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Warning: far [1/2] away" and lines[-2:] == ["Warnings of this run:", "  - far [1/2] away"]
    assert sum("far" in text for text in lines) == 2 and sum("near" in text for text in lines) == 1


def test_quiet_shows_warnings_alone():
    reporter, stream, clock = plain(quiet=True)
    reporter.info("hello")
    reporter.start("train", 3, "steps")
    reporter.warn("careful")
    steps(reporter, clock, 1, 3)
    reporter.close()
    assert stream.getvalue() == "Warning: careful\n"


def test_the_live_display():
    stream = io.StringIO()
    reporter = RichReporter(console=Console(file=stream, force_terminal=True, width=100, highlight=False, color_system=None))
    reporter.start("reference", 4, "rows")
    reporter.advance(4)
    reporter.start("train", 3, "steps")
    for step in (1, 2, 3):
        reporter.metrics({"step": step, "loss": 0.5, "accuracy": 0.75, "weight/mean": 1.25, "lr": 1e-4, "rows_per_s": 3.0})
        reporter.advance(1)
    reporter.metrics({"step": 3, "eval": True, "loss": 0.125})
    reporter.warn("careful")
    reporter.close()
    text = stream.getvalue()
    assert "step 3  evaluation  loss 0.1250" in text and "Warning: careful" in text
    assert text.index("4/4 rows") < text.index("3/3 steps") < text.index("evaluation")
    assert "step 3  loss 0.5000  accuracy 0.75  weight 1.25  lr 1.0e-04  rows/s 3.0" in text
    assert text.index("\x1b[?25h") < text.index("3/3 steps"), "the cursor is given back between phases"
    assert text.count("\x1b[?25h") == 2


def test_which_reporter(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MLX_RANK", raising=False)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with reporting() as reporter:
        assert isinstance(reporter, PlainReporter) and reporter.stream is stream
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with reporting() as reporter:
        assert isinstance(reporter, RichReporter)
    monkeypatch.setenv("MLX_RANK", "1")
    with reporting() as reporter:
        assert isinstance(reporter, Silent)


def test_numbers_for_people():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 3599, 7500)] == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "2 h 05 min"]
    assert [number(v, ".3f") for v in (-0.0, -0.0004, -0.0006, 0.0)] == ["0.000", "0.000", "-0.001", "0.000"]
    assert line({"step": 3, "loss": 0.5, "lr": 2e-5}) == "step 3  loss 0.5000  lr 2.0e-05"
