"""`upo report`, `upo card` and `upo push` on the command line, and the report in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import HOSTILE, Page, make_run, measured
from upo_cli.main import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_run_and_several(here: Path) -> None:
    make_run(here / "one", evaluation=measured())
    make_run(here / "two", done=5)
    done = invoke("report", "one")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "Report: one/report.html\n", "")
    assert "replaces the earlier one" in invoke("report", "one").stdout
    done = invoke("report", "one", "two")
    assert done.stdout == "Report: report.html\n" and done.stderr.startswith("Note: two: This run has not ended: 5 of 20 steps") and done.stderr.count("\n") == 1
    told = json.loads(invoke("report", "one", "--out", "x/y.html", "--json").stdout)
    assert told == {"report": "x/y.html", "replaced": False, "notes": []} and (here / "x" / "y.html").is_file()


@pytest.mark.parametrize(("arguments", "code", "message"), [([], 2, "Missing argument"), (["nowhere"], 1, "nowhere: no such folder"), (["one", "--out", "mine.html"], 1, "--force")])
def test_bad_requests_of_a_report(here: Path, arguments: list[str], code: int, message: str) -> None:
    make_run(here / "one")
    (here / "mine.html").write_text("mine")
    done = invoke("report", *arguments)
    assert done.exit_code == code and message in done.stderr and "Traceback" not in done.stderr and (here / "mine.html").read_text() == "mine"


def test_a_card_is_not_overwritten(here: Path) -> None:
    make_run(here / "one", evaluation=measured())
    done = invoke("card", "one", "--license", "mit")
    assert (done.stdout, done.stderr) == ("Card: one/README.md\n", "") and "license: mit" in (here / "one" / "README.md").read_text()
    (here / "one" / "README.md").write_text("edited")
    done = invoke("card", "one")
    assert done.exit_code == 1 and "exists already. Add --force" in done.stderr and (here / "one" / "README.md").read_text() == "edited"
    assert invoke("card", "one", "--force").stdout == "Card: one/README.md (replaces the one that was there)\n"
    assert invoke("card", "one", "--out", "-").stdout == (here / "one" / "README.md").read_text()


def test_a_card_without_a_base_says_so(here: Path) -> None:
    make_run(here / "one", model="/models/base")
    done = invoke("card", "one", "--out", "-")
    assert "base_model" not in done.stdout.split("---")[1] and "Add --base owner/name" in done.stderr


def test_a_push_is_a_dry_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    make_run(here / "one", evaluation=measured())
    done = invoke("push", "one", "me/new")
    assert done.exit_code == 0 and done.stdout.startswith("Would upload to me/new (private):\n")
    assert re.search(r"adapter_model.safetensors +10 bytes", done.stdout) and "  base_model: owner/base\n" in done.stdout
    assert done.stdout.endswith("Nothing was uploaded. To do it, add --yes.\n")
    assert json.loads(invoke("push", "one", "me/new", "--json").stdout)["url"] is None
    done = invoke("push", "one", "nobody")
    assert done.exit_code == 1 and "owner/name" in done.stderr


# --- In a browser -----------------------------------------------------------------------------------------------------------------


def chromium(tmp_path: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a network; what scripts or the policy complain of comes on stderr."""
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
def test_the_report_in_a_browser(here: Path) -> None:
    """Right figures in the DOM, no complaint of the console; a page with a script and a picture from elsewhere does draw complaints."""
    evaluation = measured(samples=[{"prompt": HOSTILE, "before": [HOSTILE], "after": [HOSTILE]}])
    make_run(here / "one", evaluation=evaluation)
    make_run(here / "two", evaluation=measured((0.01, -0.02, 0.04)))
    assert invoke("report", "one").exit_code == 0
    done = chromium(here, here / "one" / "report.html", "--dump-dom")
    assert complaints(done) == []
    found = Page(done.stdout)
    assert found.words("goal-1") == "+0.120" and found.words("accuracy") == "0.50 → 0.75" and found.words("time") == "2 min 10 s"
    assert found.words("sentence-1").startswith("The goal readability rose, as wanted: +0.120, 95 % interval +0.050 to +0.190")
    assert found.of("script") == [] and found.of("img") == [] and "</script><script>alert(1)</script>" in found.text
    assert len([a for a in found.of("svg") if a.get("class") == "chart"]) >= 6

    assert invoke("report", "one", "two", "--out", "both.html").exit_code == 0
    done = chromium(here, here / "both.html", "--dump-dom")
    assert complaints(done) == [] and "B two +0.010 not shown −0.020 to +0.040" in Page(done.stdout).words("comparison")

    broken = (here / "both.html").read_text().replace("<main>", '<main><script>document.title = "run"</script><img src="https://example.org/x.png" style="color: red">')
    (here / "broken.html").write_text(broken)
    done = chromium(here, here / "broken.html", "--dump-dom")
    assert len(complaints(done)) >= 3 and "<title>run" not in done.stdout


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window(here: Path, width: int) -> None:
    """No part of the page is wider than the window, phone or desktop: what is wide scrolls inside itself. Long words, paths and tables included."""
    evaluation = measured(samples=[{"prompt": "x" * 300, "before": ["y" * 500], "after": ["z" * 500]}])
    names = ("alpha", "beta-", "gamma", "delta")
    runs = [make_run(here / (name * 12), evaluation=evaluation, train={"steps": 20, "seed": seed}) for seed, name in enumerate(names)]
    assert invoke("report", *runs, "--out", "page.html").exit_code == 0
    # A window has a least width, a frame has not; the page has no script, so the one that measures stands around a copy without the policy.
    assert 'id="pooled-1"' in (here / "page.html").read_text()
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (here / "page.html").read_text())
    measure = (
        "const w = f.contentWindow, parts = [...w.document.querySelectorAll('main *')].filter(e => !e.parentElement.closest('.scroll, pre, svg, details:not([open])'));"
        "const wide = parts.filter(e => e.getBoundingClientRect().right > w.innerWidth + 0.5).map(e => e.tagName + '.' + e.className);"
        "document.title = JSON.stringify([w.innerWidth, w.document.documentElement.scrollWidth, parts.length, wide.slice(0, 20)])"
    )
    frame = f'<title id="title">none</title><iframe id="f" srcdoc="{escape(html)}" style="width: {width}px; height: 900px; border: 0" onload="{escape(measure)}"></iframe>'
    (here / "probe.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}")
    done = chromium(here, here / "probe.html", "--dump-dom", "--window-size=1400,1000")
    inner, scroll, parts, wide = json.loads(Page(done.stdout).words("title"))
    assert (inner, wide) == (width, []) and scroll <= width and parts > 100

    picture = here / "picture.png"
    chromium(here, here / "page.html", f"--screenshot={picture}", f"--window-size={width},900")
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, 900)
