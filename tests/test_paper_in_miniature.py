"""The paper's ordering in miniature: what it trains, what it measures and how sure it is. Nothing is trained here."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from upo.errors import DataError, RunError
from upo.evaluation.change import change
from upo.rewards import Answer
from upo.rewards.grades import flesch_kincaid

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from paper_in_miniature import intervals, jobs, report, run, split, table
from paper_in_miniature.measure import measure, most_unsafe, violations
from paper_in_miniature.methods import METHODS, Settings, configuration

SETTINGS = Settings(model="m", backend="torch", dtype="float32", train="train.jsonl", heldout="heldout.jsonl", rows=28, steps=7)


# --- What is trained ---------------------------------------------------------------------------------------------------------------


def test_all_methods_have_the_same_steps_batches_schedule_and_adapter_and_their_own_objective():
    configs = {name: configuration(name, 3, SETTINGS) for name in METHODS}
    one = configs["kto"]
    for name, config in configs.items():
        assert (config.train, config.optimizer, config.adapter, config.data.train) == (one.train, one.optimizer, one.adapter, "train.jsonl"), name
    assert (one.train.steps, one.train.seed, one.optimizer.lr) == (7, 3, 3e-4)
    assert len({config.objective.model_dump_json() for config in configs.values()}) == len(METHODS)


def test_goals_are_those_of_the_method():
    weights = {name: [(g.scorer, g.weight) for g in configuration(name, 0, SETTINGS).objective.goals] for name in METHODS}
    label, full, half = ("column", 1.0), [("readability", 0.05), ("profanity", 0.95)], [("readability", 0.025), ("profanity", 0.475)]
    none: list = []
    assert weights == {
        "upo": full, "upo_mean": full, "kto": none, "dpo": none, "sft": none, "csft": none, "offline_ppo": [label], "modpo": half,
        "a_lol": [label, *full], "aoppo": [label, *full], "dro_v": [label, *full],
    }  # fmt: skip


def test_upos_actor_is_on_from_the_first_step_and_gamma_is_the_options():
    config = configuration("upo", 0, replace(SETTINGS, gamma=0.7))
    assert config.objective.auxiliary.actor_warmup_steps == 0
    assert config.objective.auxiliary.gamma == 0.7


def test_a_constant_v_gets_no_gradient_and_no_fit():
    constant, usual = (configuration(name, 0, SETTINGS).objective.auxiliary for name in ("upo_mean", "upo"))
    assert (constant.value_coef, constant.value.fit_steps) == (0, 0) and usual.value_coef > 0 and usual.value.fit_steps > 0
    assert (constant.temperature, constant.gamma) == (20, 0.03)


def test_seeds_belong_to_the_compared_methods():
    made = jobs.jobs_of(["upo", "sft", "kto"], 2, Path("out"))
    assert [job.name for job in made] == ["base-0", "base-1", "upo-0", "sft-0", "kto-0", "upo-1", "kto-1"]


def test_jobs_go_on_where_they_were_and_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    called = []

    def call(job, what, arguments, at_once):
        called.append((job.name, what, at_once, "--resume" in arguments))
        if job.method == "sft":
            raise RunError("out of luck.")
        if what == "train":
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "summary.json").write_text("{}")
        else:
            job.answers.write_text("{}")

    monkeypatch.setattr(jobs, "_call", call)
    made = jobs.jobs_of(["upo", "sft", "dpo"], 2, tmp_path)
    assert jobs.run_jobs(made, SETTINGS, tmp_path, 2) == {"sft-0": "out of luck."}
    rest = [("base-0", "answers"), ("base-1", "answers"), ("sft-0", "train")]
    rest += [(f"{name}-{seed}", what) for name in ("upo", "dpo") for what in ("train", "answers") for seed in (0, 1)]
    assert sorted(called) == sorted((*job, 2, False) for job in rest)
    called.clear()
    for name in ("config.yaml", "manifest.json"):  # a training that was stopped
        (tmp_path / "runs" / "sft-0").mkdir(exist_ok=True)
        (tmp_path / "runs" / "sft-0" / name).write_text("")
    assert jobs.run_jobs(made, SETTINGS, tmp_path, 1) == {"sft-0": "out of luck."}
    assert called == [("sft-0", "train", 1, True)]
    assert (tmp_path / "runs" / "sft-0.jobs").read_text() == "2\n"  # its first steps were not alone


# --- Rows --------------------------------------------------------------------------------------------------------------------------


def row(first: str, then: str = "") -> dict:
    later = [{"role": "user", "content": then}] if then else []
    return {"prompt": [{"role": "user", "content": first}, *later], "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}


def test_no_conversation_is_on_both_sides_and_none_is_held_out_twice():
    rows = [row(f"q{i // 2}", f"then {i}") for i in range(40)]  # each opening twice
    train, heldout = split.split(rows, 10, 8)
    assert len(train) == 10 and len(heldout) == 8
    trained, held = ({split.opening(r) for r in side} for side in (train, heldout))
    assert not trained & held and len(held) == 8
    assert split.split(rows, 10, 8) == (train, heldout)
    assert train != rows[:10]  # drawn, not the first ones


def test_too_few_rows_and_bad_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="leaves 6 other conversations"):
        split.split([row(f"q{i}") for i in range(10)], 4, 7)
    with pytest.raises(DataError, match="not there"):
        split.read_rows(tmp_path / "none.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(row("q")) + "\n" + json.dumps({"prompt": "plain", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:2: not a row"):
        split.read_rows(bad)


def test_a_folder_of_other_settings_is_refused_but_not_one_that_moved(tmp_path):
    record = {"settings": asdict(SETTINGS), "short": False, "train rows": "0", "held-out rows": "1"}
    file = tmp_path / "settings.json"
    run.begin(file, record)
    run.begin(file, {**record, "settings": asdict(replace(SETTINGS, model="elsewhere/m", train="elsewhere/train.jsonl"))})
    for other in ({**record, "train rows": "2"}, {**record, "settings": asdict(replace(SETTINGS, lr=1e-3))}):
        with pytest.raises(RunError, match=r"(train rows|lr): .* there, .* now"):
            run.begin(file, other)


# --- Intervals ---------------------------------------------------------------------------------------------------------------------


def test_interval_over_prompts_and_seeds_is_that_of_all_equally_likely_draws():
    apart = np.array([[0.0, 1.0], [4.0, 9.0]])  # [seeds, prompts]
    draws = [apart[np.ix_(s, p)].mean() for s in itertools.product((0, 1), repeat=2) for p in itertools.product((0, 1), repeat=2)]
    low, high = np.quantile(draws * 1000, [0.025, 0.975])  # each of the 16 is drawn with probability 1/16, beyond 2.5 %
    found = intervals.difference(apart + 5, np.full((2, 2), 5.0))
    assert (found.mean, found.low, found.high) == (3.5, low, high) == (3.5, 0.0, 9.0)


def test_interval_spreads_as_prompts_and_seeds_do():
    """Where the difference is a seed's part plus a prompt's, the draws' variance is known: each part's over its number."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(5), rng.standard_normal(80) * 2
    found = intervals.difference(a[:, None] + b[None, :], np.zeros((5, 80)))
    deviation = np.sqrt(a.var() / 5 + b.var() / 80)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.04)  # 10,000 draws, and five seeds are not quite normal
    only_prompts = 2 * 1.96 * np.sqrt(b.var() / 80)
    assert found.high - found.low > 1.2 * only_prompts


def test_with_one_seed_it_is_the_interval_over_prompts():
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((2, 1, 60))
    found, known = intervals.difference(ours, theirs), change(theirs[0], ours[0])
    assert found.mean == pytest.approx(known.mean)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.004)  # other draws; an interval of 0.2
    with pytest.raises(ValueError, match="same seeds and prompts"):
        intervals.difference(ours, theirs[:, :50])


# --- What is measured --------------------------------------------------------------------------------------------------------------


def test_violations_are_answers_less_safe_than_the_chosen_one_by_more_than_eps():
    scores = np.array([[0.9, 0.8, 0.95], [0.5, 0.4999, 0.2]])
    allowed = np.array([[0.9], [0.5]])
    assert violations(scores, allowed, 1e-3).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert violations(scores, allowed, 0.15).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_most_unsafe_prompts_have_the_lowest_scores():
    assert most_unsafe(np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.6, 0.5, 0.4, 0.95, 0.3])).tolist() == [1, 3]
    assert most_unsafe(np.array([0.9, 0.1])).tolist() == [1]


class Marks:
    """Stands in for a scorer: 1 less 0.1 for each x in the text."""

    def score(self, answers: list[Answer]) -> list[float]:
        return [1 - 0.1 * answer.text.count("x") for answer in answers]


BY = {name: Marks() for name in ("readability", "profanity", "coleman_liau", "sentiment")}


def record(*answers: list[str], margins: list[float] = [1.0, -1.0, 0.0]) -> dict:  # noqa: B006
    prompts = ["ask xxx", "ask", "ask x", "ask xx", "ask "]
    chosen = ["x one two", "one", "one two three", "x", "one two"]
    samples = [{"prompt": p, "chosen": c, "answers": a} for p, c, a in zip(prompts, chosen, answers, strict=True)]
    return {"backend": "torch", "device": "cpu", "dtype": "float32", "settings": asdict(SETTINGS), "margins": margins, "samples": samples}


ANSWERS = (["xx b c", "b"], ["The cat sat.", ""], ["a b a b a b", "x"], ["", ""], ["a", "a"])


def test_numbers_per_prompt():
    found = measure(record(*ANSWERS), BY)
    assert found["profanity"] == pytest.approx([0.9, 1, 0.95, 1, 1])
    assert found["R"] == pytest.approx(found["profanity"])  # weights of 0.3 and 0.7, of one scorer here
    assert found["violations/all/0.001"].tolist() == [0.5, 0, 0.5, 0, 0]
    assert found["violations/top/0.001"].tolist() == [0.5]  # of five prompts the one with most marks
    assert found["words"].tolist() == [2, 1.5, 3.5, 0, 1]
    assert found["words/chosen"].tolist() == [3, 1, 3, 1, 2]
    assert found["empty"].tolist() == [0, 0.5, 0, 1, 0]
    assert found["repetition"].tolist() == [0, 0, 0.25, 0, 0]  # aba bab aba bab: two of four said before, and the other answer repeats nothing
    assert found["grade"][1] == pytest.approx(flesch_kincaid("The cat sat.")) and np.isnan(found["grade"][3])  # empty answers have none
    assert found["accuracy"].tolist() == [1, 0, 0.5]


# --- The tables --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two seeds of UPO and KTO and one of SFT, all as files written by hand."""
    made = {
        "base-0": (ANSWERS, None), "base-1": (ANSWERS, None),
        "upo-0": ((["a b"] * 2,) * 5, (9.0, 2.0, 4.0)), "upo-1": ((["a b c d"] * 2,) * 5, (9.0, 50.0, 50.0)),
        "kto-0": ((["x a"] * 2,) * 5, (9.0, 1.0, 2.0)), "kto-1": ((["xxx a"] * 2,) * 5, (9.0, 1.0, 2.0)), "sft-0": ((["xx"] * 2,) * 5, (9.0, 8.0, 8.0)),
    }  # fmt: skip
    for job in jobs.jobs_of(["upo", "kto", "sft"], 2, tmp_path):
        answers, steps = made[job.name]
        job.answers.parent.mkdir(exist_ok=True)
        job.answers.write_text(json.dumps(record(*answers, margins=[1.0] if job.method == "upo" else [-1.0])))
        if steps:
            job.folder.mkdir(parents=True)
            lines = [{"eval": True, "seconds": 5}, *({"seconds": s} for s in steps), {"eval": True, "seconds": 5}]
            (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            job.log.parent.mkdir(exist_ok=True)
            job.log.write_text("tokenise\nWarning: 1 row dropped.\nWarning: 1 row dropped.\n" if job.method == "kto" else "tokenise\n")
            job.beside.write_text("3\n" if job.name in ("sft-0", "upo-1") else "1\n")
    return tmp_path


def cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_a_few_runs(folder):
    made = jobs.jobs_of(["upo", "kto", "sft"], 2, folder)
    text = report.report(made, {}, folder, BY, short=False)
    assert (folder / "table.md").read_text() == text and "FAILED" not in text and "too small" not in text
    upo, kto, sft = cells(text, "UPO"), cells(text, "KTO"), cells(text, "SFT*")
    assert upo[1:6] == ["1.000"] * 5 and kto[1] == "0.800" and sft[1] == "0.800"
    # chosen answers score 0.9, 1, 1, 0.9, 1: answers of 0.9 violate three of five, those of 0.7 all; prompt 0 is the most unsafe one
    assert [kto[i] for i in (7, 9)] == ["80.0", "50.0"] and [upo[i] for i in (7, 9)] == ["0.0", "0.0"]
    assert (upo[10], kto[10]) == ("1.000", "0.000")
    assert (upo[11], upo[12]) == ("3.0", "1.50")  # 2 and 4 words; chosen answers have 2 on average
    assert upo[15:] == ["3", "+100.0 %"]  # steps but the first of the seed that was alone: 2, 4 against 1, 2
    assert sft[15:] == ["~8", "–"]  # other runs were beside it
    assert cells(text, "R, the goals together")[1] == "+0.200 [+0.100, +0.300]"  # by seed 0.1 and 0.3, the same for all prompts
    assert cells(text, "violations, most unsafe 20 %, points")[1] == "-50.0 [-100.0, +0.0]"
    assert "UPO - DPO" not in text
    beside = text[text.index("## Beside the paper") :]
    assert cells(beside, "KTO")[1:5] == ["0.51 / 0.27 = 1.89", "1.000 / 0.800 = 1.25", "29.6 / 43.9 = 0.67", "0.0 / 50.0 = 0.00"]
    assert text.endswith("\n- kto-0, kto-1: 1 row dropped.\n")
    numbers = json.loads((folder / "table.json").read_text())
    assert numbers["methods"]["upo"]["seeds"] == [0, 1] and len(numbers["methods"]["upo"]["R"]) == 2
    assert numbers["methods"]["base"]["grade"][0][3] is None


def test_a_method_that_failed_is_named_and_the_short_run_says_so(folder):
    made = jobs.jobs_of(["upo", "kto", "dpo"], 2, folder)
    text = report.report(made, {"kto-1": "train ended with code 1", "dpo-0": "out of memory", "dpo-1": "out of memory"}, folder, BY, short=True)
    assert "too small to conclude" in text and "| DPO: FAILED |" in text and "dpo-0 FAILED: out of memory" in text
    assert cells(text, "KTO*")[1] == "0.900"  # its other seed counts
    assert cells(text, "R, the goals together")[1].startswith("+0.100")


def test_answers_to_other_prompts_are_refused(folder):
    made = jobs.jobs_of(["upo", "kto"], 1, folder)
    other = record(*ANSWERS)
    other["samples"][0]["prompt"] = "something else"
    made[-1].answers.write_text(json.dumps(other))
    with pytest.raises(RunError, match="not the prompts and pairs of the other runs"):
        report.report(made, {}, folder, BY, short=False)


def test_means_are_zero_division_proof():
    assert table._ratio(0.5, 0.0, 1) == "0.5 / 0.0 = –"
