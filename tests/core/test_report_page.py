"""The page: the figures of the run in the right place, nothing of the model's text taken for markup, nothing loaded, readable colours."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from report_runs import HASH, HOSTILE, Page, make_run, measured

from upo.errors import RunError
from upo.report import charts, figures, seeds
from upo.report.evaluation import Interval
from upo.report.page import HERE, render, write_report
from upo.report.read import read_run
from upo.training.inputs import Inputs, write_inputs


def page(*folders) -> Page:
    return Page(render([read_run(folder) for folder in folders]))


def test_the_figures_of_one_run(tmp_path):
    found = page(make_run(tmp_path / "run", evaluation=measured()))
    assert found.words("sentence-1") == "The goal readability rose, as wanted: +0.120, 95 % interval +0.050 to +0.190 (9 prompts, 2 answers each)."
    assert found.words("sentence-2") == "No change of length is shown: −0.050, 95 % interval −0.110 to +0.010, which includes 0 (9 prompts, 2 answers each)."
    assert found.words("goal-1") == "+0.120" and found.words("goal-2") == "−0.050"
    assert found.words("accuracy") == "0.50 → 0.75" and found.words("time") == "2 min 10 s"
    table = found.words("measures")
    for expected in ("readability (weight 0.7) 0.200 0.320 +0.120 rose", "length (weight -0.3) 0.500 0.450 −0.050 not shown", "words per answer 30.2 22.0", "empty answers 0 1"):
        assert expected in table, table
    assert "win rate, after against before (judge: readability) 0.55 0.45 to 0.65 not shown" in table
    assert "3 rows dropped" in found.words("warnings-A")
    assert f"training train.jsonl 120 240 {HASH}" in found.words() and "1-20 by torch on cpu" in found.words() and "1.50 GB" in found.words()
    assert "upo train runs/run/config.yaml --out runs/run-again" in found.words()
    assert "Question 0?" in found.text and "after 8" in found.text and "5 of 9 prompts" in found.words() and "The other 4 prompts" in found.words()
    assert "Up: more length (less is wanted), with its" in found.words("tradeoff-2") and "wanted" not in found.words("tradeoff-1")
    assert "tokens per second of the steps 1,234" in found.words() and "not computed again 25.6%" in found.words() and "peak arithmetic" not in found.words()
    assert "2,000" in found.words()  # tokens: 20 steps of 2 s at 50 a second


def test_a_run_that_ended_early(tmp_path):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": 20, "ended_early": {"metric": "accuracy", "of_steps": 40}}))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "steps": 40}))
    assert "20 of 40 steps, ended early as accuracy no longer became better" in page(folder).words() and "20 of 40 ended early" in page(folder, folder).words("comparison")


def test_what_the_data_were_worth(tmp_path):
    folder = make_run(tmp_path / "run")
    write_inputs(folder, Inputs(rewards={"train": np.arange(11.0), "eval": np.array([0.5, 0.5])}))
    text = page(folder).words()
    assert "Reward of the completions in the data, training: mean 5.000, the middle 80 % from 1.000 to 9.000." in text and "held out: mean 0.500" in text


def test_no_path_of_the_machine_is_shown(tmp_path):
    """Neither where the data lay nor where the run lies, in whichever field."""
    html = render([read_run(make_run(tmp_path / "run", evaluation=measured(), adapter={"start": "/home/someone/old run/adapter"})), read_run(make_run(tmp_path / "two", done=3))])
    for secret in ("/home", "someone", "secret client", "old run", str(tmp_path), tmp_path.parent.name):
        assert secret not in html
    assert "train.jsonl:7: 3 rows dropped." in html


def test_several_runs_are_compared(tmp_path):
    one = make_run(tmp_path / "upo", evaluation=measured())
    two = make_run(tmp_path / "dpo", objective={"preference": {"loss": "dpo"}}, evaluation=measured((-0.1, -0.2, -0.05), goals={"readability": {"before": 0.2, "after": 0.1, "change": {"mean": -0.1, "low": -0.2, "high": -0.05}}}))
    found = page(one, two)
    table = found.words("comparison")
    assert "A upo +0.120 rose +0.050 to +0.190 −0.050 not shown −0.110 to +0.010 0.50 → 0.75 2 min 10 s 20 kto (beta 0.1) + goals 0.7 readability, -0.3 length" in table
    assert "B dpo −0.100 fell −0.200 to −0.050 – 0.50 → 0.75 2 min 10 s 20 dpo (beta 0.1)" in table
    assert "readability 0.200 → 0.320 weight 0.7 0.200 → 0.100 measured only" in found.words("measures")
    assert "objective.preference.0.loss kto dpo" in found.words() and "train.steps" not in found.words("comparison")
    assert "No other run here is better in both: A" in found.words("tradeoff-1")
    assert len([a for a in found.of("svg") if a["class"] == "chart"]) == len(found.of("title")) - 1


def seeded(folder, seed, change=(0.12, 0.05, 0.19), **more):
    return make_run(folder, evaluation=measured(change, **more) if change else None, train={"steps": 20, "seed": seed})


def test_seeds_are_pooled_over_prompts_and_seeds(tmp_path):
    """Three seeds asked the same 9 prompts: means .10 .16 .13, half intervals .0392 .0588 .0196, so standard errors .02 .03 .01.

    By hand: mean .13; over seeds var .0009 / 3 = .0003; over prompts (.0004 + .0009 + .0001) / 3 = .000466667; degrees of freedom
    .000766667^2 / (.0003^2 / 2 + .000466667^2 / 8) = 8.131, for which t is 2.2996 (between 2.3060 at 8 and 2.2622 at 9); half .063672.
    Of length, in every run -.05 with a half interval of .06: no spread of seeds, so t of 8 degrees, 2.3060, times .06 / 1.96.
    """
    changes = [(0.10, 0.0608, 0.1392), (0.16, 0.1012, 0.2188), (0.13, 0.1104, 0.1496)]
    runs = [seeded(tmp_path / f"s{i}", i, change) for i, change in enumerate(changes)]
    found = page(*runs)
    assert found.words("pooled-1") == "3 seeds pooled A B C +0.130 rose +0.066 to +0.194 −0.050 not shown −0.121 to +0.021 0.50 → 0.75 after: 0.75 to 0.75"
    interval = seeds.over_seeds([Interval(*change) for change in changes], 9)
    assert interval.high - interval.mean == pytest.approx(0.063672, abs=2e-5) and interval.mean - interval.low == pytest.approx(interval.high - interval.mean)  # 2e-5: t by hand
    assert "Pooled: means of the runs that differ in train.seed alone" in found.words() and "An interval of one run covers" in found.words()


def test_seeds_with_prompts_of_their_own(tmp_path):
    """The spread of the means holds the prompts' part already: .03 / sqrt(3) times t of 2 degrees, 4.3027."""
    changes = [Interval(0.10, 0.0608, 0.1392), Interval(0.16, 0.1012, 0.2188), Interval(0.13, 0.1104, 0.1496)]
    interval = seeds.over_seeds(changes, None)
    assert (interval.low, interval.high) == (pytest.approx(0.13 - 0.074525, abs=1e-6), pytest.approx(0.13 + 0.074525, abs=1e-6))
    runs = [seeded(tmp_path / f"s{i}", i, (c.mean, c.low, c.high), samples=[{"prompt": f"{i}", "before": ["a"], "after": ["b"]}]) for i, c in enumerate(changes)]
    assert "+0.130 rose +0.055 to +0.205" in page(*runs).words("pooled-1")


def test_two_seeds_that_differ_show_little():
    """Means 0 and .2: .1 +- 12.7062 * .1, whatever the prompts say of each."""
    interval = seeds.over_seeds([Interval(0.0, -0.001, 0.001), Interval(0.2, 0.199, 0.201)], None)
    assert (interval.low, interval.high) == (pytest.approx(0.1 - 1.27062, abs=1e-5), pytest.approx(0.1 + 1.27062, abs=1e-5))
    assert seeds.over_seeds([Interval(0.1, 0.1, 0.1)] * 2, 5) == Interval(0.1, 0.1, 0.1)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1e6, 1.9600)])
def test_quantiles_of_student(freedom, t):
    """Against the printed table, to its four digits."""
    assert seeds.student(freedom) == pytest.approx(t, abs=5e-5)


def test_seeds_without_an_interval_show_their_range(tmp_path):
    """One run was not evaluated, another has a goal without an interval: means of what there is, from least to greatest, and how many seeds."""
    bare = {"readability": {"weight": 0.7, "before": 0.2, "after": 0.3}, "length": {"weight": -0.3, "before": 0.5, "after": 0.45, "change": {"mean": -0.05, "low": -0.11, "high": 0.01}}}
    runs = [seeded(tmp_path / "a", 1), seeded(tmp_path / "b", 2, None), seeded(tmp_path / "c", 3, goals=bare, accuracy={"before": 0.5, "after": 0.6})]
    found = page(*runs)
    assert found.words("pooled-1") == (
        "3 seeds pooled A B C +0.110 range of 2 seeds +0.100 to +0.120 −0.050 range of 2 seeds −0.050 to −0.050 0.50 → 0.70 after: 0.60 to 0.75"
    )
    assert page(*runs[:2]).words("pooled-1") == "2 seeds pooled A B – – 0.50 → 0.75 after: 0.75 to 0.75"


def test_what_is_not_pooled(tmp_path):
    """Another option, other data under the same name, an unfinished run, a seed again; and each configuration has a pool of its own."""
    a, b = seeded(tmp_path / "a", 1), seeded(tmp_path / "b", 2)
    other = make_run(tmp_path / "c", evaluation=measured(), train={"steps": 20, "seed": 3}, optimizer={"lr": 1e-3})
    moved = seeded(tmp_path / "d", 4)
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "identity": {**manifest["identity"], "data.train": "00" * 32}}))
    going = make_run(tmp_path / "e", done=6, train={"steps": 20, "seed": 5})
    again = seeded(tmp_path / "f", 2)
    other_too = make_run(tmp_path / "g", evaluation=measured(), train={"steps": 20, "seed": 1}, optimizer={"lr": 1e-3})
    told = [read_run(folder) for folder in (a, b, other, moved, going, again, other_too)]
    assert [pool.runs for pool in seeds.pools(told)] == [[0, 1], [2, 6]]
    assert seeds.pools(told[:1]) == seeds.pools([told[0], told[3]]) == [] and "pooled" not in Page(render([told[0], told[2]])).words("comparison")


def test_rows_held_out_by_the_seed_do_not_keep_runs_apart(tmp_path):
    folders = [make_run(tmp_path / f"{seed}", data={"train": "rows.jsonl", "eval": 0.1}, train={"steps": 20, "seed": seed}) for seed in (1, 2)]
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    (folders[1] / "manifest.json").write_text(json.dumps({**manifest, "identity": {**manifest["identity"], "data.train": "00" * 32}}))
    assert [pool.runs for pool in seeds.pools([read_run(folder) for folder in folders])] == [[0, 1]]


def test_an_unfinished_run_is_reported_as_far_as_it_is(tmp_path):
    found = page(make_run(tmp_path / "run", done=6))
    assert "Not finished" in found.words("notes-A") and "6 of 20 steps" in found.words("notes-A") and "upo train --resume --out run" in found.words("notes-A")
    assert "No goal was measured on answers of this model" in found.words()
    assert "6 of 20 steps" in found.words() and "accuracy" in [c["name"] for c in figures.curves([read_run(tmp_path / "run")])]


def test_a_folder_with_a_configuration_alone(tmp_path):
    folder = make_run(tmp_path / "run", done=0)
    for name in ("manifest.json", "metrics.jsonl"):
        (folder / name).unlink()
    found = page(folder)
    assert "manifest.json is missing" in found.words("notes-A") and "Not known: manifest.json says nothing of it." in found.words() and found.of("svg") == []


@pytest.mark.parametrize("name", ["manifest.json", "summary.json", "eval.json", "quickstart.json"])
def test_files_from_anywhere_never_break_the_page(tmp_path, name):
    """Each part of each file in turn is something else: the page is made all the same, or the folder refused in one line."""
    quickstart = {"before": {"reward": 0.1, "words": 3.0}, "after": {"reward": 0.2, "words": 2.0}, "seconds": {"train": 1.0, "total": 2.0}, "reward_change": {"mean": 0.1, "low": 0, "high": 1}}
    folder = make_run(tmp_path / "run", evaluation=measured() if name == "eval.json" else None)
    (folder / "quickstart.json").write_text(json.dumps({**quickstart, "answers": [{"prompt": "p", "before": ["b"], "after": ["a"]}]}))
    whole = json.loads((folder / name).read_text())

    values = itertools.cycle((None, "x", [1], {"a": {}}, -1, True))

    def variants(node):
        """Copies of a JSON value, each with one part replaced."""
        yield next(values)
        items = node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ()
        for key, value in items:
            for other in variants(value):
                copy = dict(node) if isinstance(node, dict) else list(node)
                copy[key] = other
                yield copy

    made = 0
    for variant in (*variants(whole), *variants(whole)):
        (folder / name).write_text(json.dumps(variant))
        made += "</html>" in render([read_run(folder)])
    assert made > 20


def test_text_of_a_model_is_text(tmp_path):
    """In answers, prompts, goals, warnings, the names of metrics and of the folder: no tag of it becomes one, and the page is valid UTF-8."""
    evaluation = measured(samples=[{"prompt": HOSTILE, "before": [HOSTILE], "after": [HOSTILE]}], goals={HOSTILE: {"weight": 1, "before": 0, "after": 1, "change": {"mean": 1, "low": 1, "high": 1}}})
    folder = make_run(tmp_path / "<b>run", evaluation=evaluation)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "<i>odd": 1.0}) + "\n")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "warnings": [HOSTILE]}))
    html = render([read_run(folder), read_run(make_run(tmp_path / "other", evaluation=evaluation))])
    html.encode()
    found = Page(html)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "img", "b", "i", "iframe", "link", "object", "base", "form"})
    assert found.text.count("</script><script>alert(1)</script>") >= 6 and "{{ 7*7 }}" in found.text and "\u202e" not in html and "<b>run" in found.text
    assert all(not name.startswith("on") and name != "style" for _, attributes in found.tags for name in attributes)


def test_the_policy_allows_this_style_and_nothing_else(tmp_path):
    html = render([read_run(make_run(tmp_path / "run", evaluation=measured()))])
    found = Page(html)
    (policy,) = [a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert html.index("Content-Security-Policy") < html.index("<style>") < html.index("<body>")
    links = [a.get("href") for a in found.of("a")]
    assert links and all(link.startswith("#") and link[1:] in found.ids for link in links)
    assert "url(" not in style and "@" not in style.replace("@media", "")
    assert not [name for _, attributes in found.tags for name in attributes if name in ("src", "srcset", "data", "action", "poster", "ping", "xlink:href")]
    assert [a["content"] for a in found.of("meta") if a.get("name") == "viewport"] == ["width=device-width, initial-scale=1"]


def test_colours_can_be_read():
    """Contrast by WCAG 2: 4.5 for text, 3 for lines and points, on the page and on panels, light and dark."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (HERE / "style.css").read_text().split("@media (prefers-color-scheme: dark)")[:2])
    assert set(light) == set(dark) and len([name for name in light if re.fullmatch(r"c\d", name)]) == charts.COLOURS
    for mode in (light, dark):
        for name in ("text", "soft", "good", "bad", "c0", *(f"c{i}" for i in range(charts.COLOURS))):
            for ground in ("bg", "panel"):
                assert contrast(mode[name], mode[ground]) >= 4.5, (name, ground, contrast(mode[name], mode[ground]))
        assert contrast(mode["note"], mode["note-bg"]) >= 4.5 and contrast(mode["text"], mode["note-bg"]) >= 4.5


# --- Charts -----------------------------------------------------------------------------------------------------------------------


def test_points_stand_where_their_numbers_say():
    axes = charts.Axes((0.0, 10.0), (-1.0, 1.0))
    assert float(axes.x(0)) == charts.LEFT and float(axes.x(10)) == charts.WIDTH - charts.RIGHT
    assert float(axes.y(-1)) == charts.HEIGHT - charts.BOTTOM and float(axes.y(1)) == charts.TOP
    drawn = charts.intervals("t", [("A", 0, Interval(0.2, 0.1, 0.4)), ("B", 1, Interval(-0.2, -0.3, 0.0))])
    bars = [[float(v) for v in re.search(r'x1="([\d.]+)" x2="([\d.]+)".*class="bar c' + str(c), part).groups()] for c, part in enumerate(re.findall(r"<line[^>]*bar[^>]*>", drawn))]
    points = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    zero = float(re.findall(r'<line x1="([\d.]+)"[^>]*class="zero"', drawn)[0])
    assert bars[1][0] < points[1] < bars[1][1] == zero < bars[0][0] < points[0] < bars[0][1]
    assert (points[0] - zero) / (bars[0][1] - zero) == pytest.approx(0.5, abs=1e-3)  # 0.2 of 0.4, to the six digits that are written


def test_letters_of_runs_that_came_out_alike_stand_beside_each_other():
    points = [charts.Point(key, i, x, Interval(0.1, 0.0, 0.2)) for i, (key, x) in enumerate((("A", 0.6), ("B", 0.6), ("C", 0.601), ("D", 0.9)))]
    drawn = charts.tradeoff("t", points, [(0, 0.5)])
    x = {key: float(at) for at, key in re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="key">(\w)</text>', drawn)}
    assert sorted(x) == ["A", "B", "C", "D"] and x["B"] == x["A"] + 11 and x["C"] > x["B"] + 11 - 1e-6 and x["D"] > x["C"] + 11
    assert "class=\"key\"" not in charts.tradeoff("t", points[:1], [])


def test_curves_leave_gaps_and_keep_every_mean():
    steps, values = np.arange(1, 1001.0), np.arange(1, 1001.0)
    values[499] = np.nan
    line = charts.Line("A", 0, steps, values, np.array([0.0]), np.array([5.0]))
    drawn = charts.curves("t", [line])
    assert drawn.count("<polyline") == 2 and max(p.count(",") for p in re.findall(r'points="([^"]*)"', drawn)) <= charts.MOST_POINTS
    assert drawn.count("dot hollow") == 1 and "NaN" not in drawn and "nan" not in drawn
    gap = charts.Line("A", 0, steps[:5], np.array([1, np.nan, 3, 4, 5.0]), np.zeros(0), np.zeros(0))
    assert charts.curves("t", [gap]).count("<polyline") == 4  # each step and the running mean, in two pieces
    assert charts.curves("t", [charts.Line("A", 0, steps[:3], np.full(3, np.nan), np.zeros(0), np.zeros(0))]).count("<polyline") == 0
    assert list(charts._mean(np.array([1.0, 2, 6, 7]), 3)) == [1.5, 3, 5, 6.5]


def test_the_front_holds_what_nothing_beats():
    assert figures._front([(0.5, 0.2), (0.6, 0.1), (0.5, 0.1), (0.6, 0.1)]) == [True, True, False, True]


# --- The file ---------------------------------------------------------------------------------------------------------------------


def test_only_a_report_is_replaced(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "new" / "report.html"
    assert not write_report([run], out).replaced
    before = out.read_text()
    assert write_report([run], out).replaced and len(out.read_text()) == len(before)
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(RunError, match="is no report of upo"):
        write_report([run], other)
    assert other.read_text() == "<p>mine</p>"
    assert write_report([run], other, force=True).replaced and "upo report" in other.read_text()


def test_nothing_is_written_if_one_folder_is_no_run(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "report.html"
    with pytest.raises(RunError, match="no such folder"):
        write_report([run, tmp_path / "nowhere"], out)
    assert not out.exists()
