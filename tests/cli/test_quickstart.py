"""`upo quickstart`: folders, messages and figures with a canned run, and the whole of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from upo_cli.main import main
from upo_cli.quickstart import verdict

import upo.quickstart.run as quickstart_run
from upo.errors import ModelError
from upo.quickstart.recipe import HELDOUT, TRAIN
from upo.report.facts import signed

RESULT: dict[str, Any] = {
    "model": "folder",
    "backend": "torch",
    "device": "cpu",
    "dtype": "float32",
    "seed": 0,
    "steps": 60,
    "prompts": 40,
    "samples": 3,
    "before": {"reward": 0.331, "grade": 7.97, "words": 39.5, "repetition": 0.008, "empty": 0, "accuracy": 0.5},
    "after": {"reward": 0.534, "grade": 5.5, "words": 31.0, "repetition": 0.016, "empty": 0, "accuracy": 0.625},
    "reward_change": {"mean": 0.203, "low": 0.131, "high": 0.275},
    "example": {"prompt": "Why [so]?", "before": "Long words.", "after": "Short ones."},
    "seconds": {"model": 1.0, "prepare": 20.0, "answers": 30.0, "train": 120.0, "total": 171.0},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks for, instead of a run."""
    made: list[dict[str, Any]] = []

    def canned(out: Path, **options: Any) -> dict[str, Any]:
        made.append({"out": out, **options})
        return RESULT

    monkeypatch.setattr(quickstart_run, "run_quickstart", canned)
    return made


def upo(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["quickstart", *arguments], env={"COLUMNS": "110"})


def test_result_is_shown_with_its_interval_and_what_to_do_next(here: Path, calls: list[dict[str, Any]]) -> None:
    done = upo()
    assert done.exit_code == 0, done.output
    lines = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:4]] for line in done.stdout.splitlines() if line.count("│") == 4}
    assert lines["auxiliary reward (readability, 0 to 1)"] == ["0.331", "0.534"]
    assert lines["preference accuracy on held-out pairs"] == ["0.50", "0.62"]
    assert lines["repeated word trigrams"] == ["0.8%", "1.6%"]
    assert lines["empty answers"] == ["0", "0"]
    assert "The auxiliary reward rose: +0.203, 95 % interval +0.131 to +0.275." in done.stdout
    assert "Why [so]?" in done.stdout and "Long words." in done.stdout and "Short ones." in done.stdout
    assert "torch on cpu in float32, 2 min 51 s" in done.stdout
    assert "Report: runs/quickstart/report.html" in done.stdout
    assert "upo generate runs/quickstart --prompt" in done.stdout and "upo train examples/upo.yaml" in done.stdout


def test_options_reach_the_run(here: Path, calls: list[dict[str, Any]]) -> None:
    assert upo("--backend", "mlx", "--out", "there", "--seed", "2", "--steps", "3", "--model", "m", "--set", "a=1", "--set", "b=2").exit_code == 0
    (call,) = calls
    assert {k: v for k, v in call.items() if k != "reporter"} == {
        "out": Path("there"),
        "backend": "mlx",
        "seed": 2,
        "steps": 3,
        "model": "m",
        "overrides": ("a=1", "b=2"),
    }


def test_default_folder_is_the_first_free_one_and_said(here: Path, calls: list[dict[str, Any]]) -> None:
    for name in ("quickstart", "quickstart-2"):
        (here / "runs" / name).mkdir(parents=True)
    done = upo()
    assert calls[0]["out"] == Path("runs/quickstart-3")
    assert "Run folder: runs/quickstart-3" in done.stderr


def test_folder_that_exists_is_refused_untouched(here: Path, calls: list[dict[str, Any]]) -> None:
    (here / "mine").mkdir()
    done = upo("--out", "mine")
    assert done.exit_code == 1 and calls == []
    assert done.stderr.strip() == "Error: --out mine: exists already, and nothing is overwritten. Name another folder."
    assert list((here / "mine").iterdir()) == []


def test_json_is_all_of_stdout(here: Path, calls: list[dict[str, Any]]) -> None:
    assert json.loads(upo("--json").stdout) == RESULT


def test_bad_options_are_found_before_anything_is_fetched(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart_run, "model_folder", lambda _: pytest.fail("fetched"))
    done = upo("--set", "objective.auxilary.gamma=1")
    assert done.exit_code == 1 and "auxilary" in done.stderr and "auxiliary" in done.stderr
    assert not (here / "runs").exists()


def test_model_that_cannot_be_had_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: object) -> Path:
        raise ModelError("quickstart model: neither the hub nor PyPI gave it (x).")

    monkeypatch.setattr(quickstart_run, "model_folder", nowhere)
    monkeypatch.setattr(quickstart_run, "get_backend", lambda _: SimpleNamespace(fast_dtype=lambda: "float32"))
    done = upo()
    assert done.exit_code == 1 and done.stderr.splitlines()[-1] == "Error: quickstart model: neither the hub nor PyPI gave it (x)."
    assert not (here / "runs").exists()


def test_verdict_claims_a_change_only_where_the_interval_excludes_zero() -> None:
    assert verdict({"mean": 0.1, "low": 0.01, "high": 0.2}).startswith("The auxiliary reward rose: +0.100")
    assert verdict({"mean": -0.1, "low": -0.2, "high": -0.01}).startswith("The auxiliary reward fell: -0.100")
    assert verdict({"mean": 0.1, "low": -0.01, "high": 0.2}).startswith("No change")
    assert verdict({"mean": 0.1, "low": 0.0, "high": 0.2}).startswith("No change")


def test_whole_of_it_on_a_tiny_model(here: Path, tiny_llama: Path, backend: str) -> None:
    for source in (TRAIN, HELDOUT):
        rows = source.read_text(encoding="utf-8").splitlines()[:6]
        (here / source.name).write_text("\n".join(rows), encoding="utf-8")
    data = (f"--set=data.{key}={source.name}" for key, source in (("train", TRAIN), ("eval", HELDOUT)))
    done = upo("--backend", backend, "--model", str(tiny_llama), "--steps", "2", "--out", "tiny", *data)
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((here / "tiny" / "quickstart.json").read_text(encoding="utf-8"))
    assert (result["backend"], result["steps"], result["prompts"], len(result["answers"])) == (backend, 2, 40, 40)
    assert all(len(a["before"]) == len(a["after"]) == 8 for a in result["answers"])
    assert result["before"]["accuracy"] == 0.5  # the untrained adapter changes nothing: every pair is a tie
    margins = [json.loads(line)["margin"] for line in (here / "tiny" / "metrics.jsonl").read_text().splitlines() if '"eval": true' in line]
    assert margins[0] == 0 and margins[1] != 0
    summary = json.loads((here / "tiny" / "summary.json").read_text())
    assert summary["eval"]["after"]["accuracy"] == result["after"]["accuracy"]
    low, high = result["reward_change"]["low"], result["reward_change"]["high"]
    assert low <= result["after"]["reward"] - result["before"]["reward"] <= high
    assert (here / "tiny" / "adapter" / "adapter_model.safetensors").is_file()
    report = (here / "tiny" / "report.html").read_text(encoding="utf-8")
    assert f'id="goal-1">{signed(result["reward_change"]["mean"])}<' in report and str(here) not in report and "preference accuracy" in report
