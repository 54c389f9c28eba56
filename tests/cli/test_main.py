"""The `upo` group: finding commands, and the edge where errors become one line and an exit code."""

from __future__ import annotations

import errno
import subprocess
import sys
import types
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from upo_cli.main import COMMANDS, main
from upo_cli.options import echo_json, echo_table, rank

import upo
from upo.errors import DataError

ROOT = Path(__file__).parents[2]


def upo_process(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "upo_cli", *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture
def probe(monkeypatch):
    """`probe(action)` makes `upo probe` run the action."""

    def install(action):
        module = types.ModuleType("upo_cli_probe")
        module.probe = click.command("probe")(lambda: action())
        monkeypatch.setitem(sys.modules, "upo_cli_probe", module)
        monkeypatch.setitem(COMMANDS, "probe", ("upo_cli_probe:probe", "A probe."))
        return CliRunner().invoke(main, ["probe"], catch_exceptions=False)

    return install


def fail(error: BaseException):
    def action():
        raise error

    return action


def test_help_lists_every_command_with_its_line():
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(main, [flag], catch_exceptions=False)
        assert result.exit_code == 0 and result.stderr == ""
        shown = " ".join(result.stdout.split())
        for name, (_, text) in COMMANDS.items():
            assert f"{name} {text}" in shown


def test_help_needs_none_of_the_commands(monkeypatch):
    monkeypatch.setitem(COMMANDS, "train", ("no_such_module:train", "Fine-tune."))
    assert CliRunner().invoke(main, ["--help"], catch_exceptions=False).exit_code == 0


def test_without_a_command_it_shows_the_help():
    result = CliRunner().invoke(main, [], catch_exceptions=False)
    assert result.exit_code == 2 and "upo quickstart" in result.output


def test_version():
    assert CliRunner().invoke(main, ["--version"], catch_exceptions=False).stdout == f"upo, version {upo.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(main, [name, flag], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"Usage: upo {name}") and len(result.stdout.splitlines()) > 6


@pytest.mark.parametrize(
    ("word", "hint"),
    [("trian", 'Did you mean "train"?'), ("loss", 'Did you mean "losses"?'), ("zzz", "There are: quickstart, train,")],
)
def test_unknown_command(word, hint):
    result = CliRunner().invoke(main, [word], catch_exceptions=False)
    assert result.exit_code == 2 and result.stdout == ""
    assert f'Error: No such command "{word}". {hint}' in result.stderr


def test_unknown_option():
    result = CliRunner().invoke(main, ["--nope"], catch_exceptions=False)
    assert result.exit_code == 2 and "No such option" in result.stderr


def test_an_error_in_the_input_is_one_line(probe):
    result = probe(fail(DataError("rows.jsonl:3: no prompt.")))
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: rows.jsonl:3: no prompt.\n")


def test_an_error_names_its_rank(probe, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    assert probe(fail(DataError("gone"))).stderr == "Error: [rank 2] gone\n"


def test_a_full_disk_is_not_a_bug(probe):
    result = probe(fail(OSError(errno.ENOSPC, "No space left on device", "/data/x")))
    assert (result.exit_code, result.stderr) == (1, "Error: /data/x: No space left on device\n")


def test_a_bug_shows_itself(probe):
    with pytest.raises(ZeroDivisionError):
        probe(lambda: 1 / 0)
    with pytest.raises(OSError, match="odd"):
        probe(fail(OSError(errno.EINVAL, "odd")))


def test_what_a_dependency_announces_is_not_shown(probe, recwarn):
    probe(lambda: warnings.warn("will change", FutureWarning, stacklevel=1))
    assert [w for w in recwarn if w.category is FutureWarning] == []


def test_interrupted(probe):
    result = probe(fail(KeyboardInterrupt()))
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_as_a_module():
    done = upo_process("losses", "dppo")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Usage: upo losses") and 'Did you mean "dpo"?' in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    """`upo losses | head -1`, with the pipe closed before anything is written."""
    code = "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nfrom upo_cli.main import main\nmain(['train', '--schema'])"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.stderr == "" and done.returncode != 0


@pytest.mark.parametrize("variable", ["RANK", "MLX_RANK", "OMPI_COMM_WORLD_RANK"])
def test_rank(monkeypatch, variable):
    for name in ("RANK", "MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert rank() == 0
    monkeypatch.setenv(variable, "3")
    assert rank() == 3


def test_json_and_tables(capsys):
    import numpy as np

    echo_json({"a": np.float32(0.5), "b": [float("nan"), np.int64(3)], "c": Path("x"), "d": "ü", "e": {1: float("-inf")}})
    assert capsys.readouterr().out == '{\n  "a": 0.5,\n  "b": [\n    null,\n    3\n  ],\n  "c": "x",\n  "d": "ü",\n  "e": {\n    "1": null\n  }\n}\n'
    echo_table([("a", "long"), ("bbb", "x", "y"), ()])
    assert capsys.readouterr().out == "a    long\nbbb  x     y\n\n"


def test_the_readme_and_the_docs_mention_every_command():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"## upo {name}" in text
