"""What the benchmarks compute beside times: ratios, tables, the work's rows and order, flops. No time is measured here."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from upo import adapters, random
from upo.errors import DataError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import itertools

import card
import lengths
import preference_step
import same_work
from harness import arithmetic, lineup, work
from harness.plot import Curve, Panel, picture
from harness.runs import Contender, Ended, Failed, Pythons, Run, interleaved, measure, same_tokens
from harness.tables import ratios, spread, table


def run(name: str = "a", steps: tuple[float, ...] = (2.0, 2.0), reference: float = 1.0, inside: float = 0.0, **others) -> Run:
    found = dict(
        contender=name, rows=8, wall_s=9.0, start_s=1.0, first_step_s=3.0, reference_s=reference, reference_in_steps_s=inside, steps_s=steps, losses=(0.69, 0.6),
        grad_norms=(2.0, 1.0), peak_memory_gb=4.0, tokens={"rows": 8, "prompt": 1, "completion": 1, "sha256": "0"}, versions={"numpy": "2"}, setup={}, notes=(),
    )  # fmt: skip
    return Run(**{**found, **others})


@pytest.mark.parametrize(("inside", "with_reference"), [(0.0, 8 / 5), (1.0, 8 / 4)])
def test_rate_counts_the_reference_pass_once_whether_before_the_steps_or_in_them(inside, with_reference):
    found = run(inside=inside)
    assert found.rows_per_s == pytest.approx(with_reference)
    assert found.rows_per_s_steps == pytest.approx(8 / (4 - inside))


def test_rate_without_reference_is_unknown_where_it_cannot_be_told_apart():
    assert run(reference=0.0).rows_per_s_steps is None


def test_ratios_are_taken_repeat_by_repeat():
    ours, theirs = [run(steps=(s,), reference=0.0) for s in (1.0, 2.0, 4.0)], [run(steps=(s,), reference=0.0) for s in (8.0, 10.0, 12.0)]
    found = ratios(ours, theirs, lambda r: r.rows_per_s)
    assert (found.low, found.median, found.high) == (3.0, 5.0, 8.0)  # ratio of the medians would be 5, of the extremes 2 and 12
    assert str(found) == "5.00 (3.00 to 8.00)"
    assert str(spread([2.0])) == "2.00"
    with pytest.raises(ValueError):
        ratios(ours, theirs[:2], lambda r: r.rows_per_s)


def test_table():
    assert table(("a", "b"), [("x", 1.5), ("y", None)]) == "| a | b |\n|---|---:|\n| x | 1.5 |\n| y |  |\n"


def test_other_token_ids_are_refused():
    same_tokens([run(), run("b")])
    with pytest.raises(Failed, match="b did not train on the rows of a"):
        same_tokens([run(), run("b", tokens={"rows": 8, "prompt": 1, "completion": 1, "sha256": "1"})])


@pytest.mark.parametrize(
    ("change", "named"),
    [({}, ""), ({"losses": (0.69, 0.61)}, ""), ({"losses": (0.69, 0.613)}, "losses"), ({"grad_norms": (2.05, 1.0)}, "norm"), ({"losses": (0.69,)}, "inf")],
)
def test_unequal_work_is_named(tmp_path, change, named):
    made = work.Work("m", "r", "o", "t", "a", "0", 8, 2)
    text, unequal = same_work.report([run(), run("b", **change)], made)
    assert bool(unequal) == bool(named)
    assert all("b against a" in line and line in text for line in unequal)


def rows_of(count: int) -> list[dict]:
    say = lambda role, text: {"role": role, "content": text}  # noqa: E731
    return [{"prompt": [say("user", "a" * i)], "chosen": [say("assistant", "b")], "rejected": [say("assistant", "c" * (i + 1))]} for i in range(1, count + 1)]


def test_peers_get_our_rows_in_our_order_and_our_adapter(tmp_path, tiny_llama):
    rows = rows_of(7)
    made = work.prepare(tmp_path, rows, tiny_llama, batch_size=3, max_length=64, seed=5)
    assert made.steps == 3
    order = random.permutation(7, 5, "order", 0)
    ordered = [json.loads(line) for line in Path(made.ordered).read_text().splitlines()]
    assert ordered == [rows[i] for i in order]
    tokens = [json.loads(line) for line in Path(made.tokens).read_text().splitlines()]
    assert [len(t["completions"][1]) - 1 for t in tokens] == [i + 2 for i in order]  # a letter is a token, and one ends the turn
    adapter = adapters.read_adapter(made.adapter)
    name = adapters.lora_name("model.layers.1.mlp.down_proj", "A")
    assert np.array_equal(adapter.arrays[name], random.lora_a(16, 128, 5, name))
    assert len(adapter.targets) == 14 and adapter.scale == 2.0


def test_rows_that_would_be_dropped_or_shortened_are_refused(tmp_path, tiny_llama):
    with pytest.raises(DataError, match="1 rows do not fit 64 tokens"):
        work.prepare(tmp_path, [*rows_of(2), *rows_of(80)[-1:]], tiny_llama, batch_size=1, max_length=64)
    turns = [{"role": role, "content": "a" * 30} for role in ("user", "assistant", "user")]
    with pytest.raises(DataError, match="shortened"):
        work.prepare(tmp_path, [{**rows_of(1)[0], "prompt": turns}], tiny_llama, batch_size=1, max_length=64)


def test_rows_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"--data .*none\.jsonl: no such file\. Give JSON lines with prompt, chosen and rejected"):
        work.real_rows(tmp_path / "none.jsonl", 3)


def test_made_rows_have_the_lengths_asked_for(smollm2, tmp_path):
    made = work.prepare(tmp_path / "pairs", lengths.pairs_of(256), smollm2, batch_size=1, max_length=256)
    found = [json.loads(line) for line in Path(made.tokens).read_text().splitlines()]
    assert [(len(t["prompt"]), *map(len, t["completions"])) for t in found] == [(128, 128, 128)] * lengths.STEPS
    made = work.prepare(tmp_path / "groups", work.made_groups(2, 40, 10, 4), smollm2, batch_size=1, max_length=50)
    found = [json.loads(line) for line in Path(made.tokens).read_text().splitlines()]
    assert [(len(t["prompt"]), *map(len, t["completions"])) for t in found] == [(40, 10, 10, 10, 10)] * 2


def test_runs_alternate_are_kept_and_are_not_taken_for_others(tmp_path, monkeypatch):
    """A contender of a few lines stands in for a framework."""
    scripts = tmp_path / "contenders"
    scripts.mkdir()
    script = (
        "import json, pathlib, sys, time\njob = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "log = pathlib.Path(job['rows']); log.write_text(log.read_text() + job['settings']['say'])\n"
        "if job['settings'].get('fail'): sys.exit('out of memory')\n"
        "found = dict(work=time.time(), first_step=time.time(), reference_s=1.0, reference_in_steps_s=0.0, steps_s=[1.0], losses=[0.5], grad_norms=[1.0], tokens={}, versions={}, notes=[])\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps(found))\n"
    )
    (scripts / "upo_run.py").write_text(script)
    monkeypatch.setattr("harness.runs.CONTENDERS", scripts)
    said = tmp_path / "said.txt"
    said.write_text("")
    made, pythons = work.Work("m", str(said), "o", "t", "a", "0", 8, 1), Pythons({"upo": sys.executable})
    a, b = (Contender(name, "upo", {"say": name}) for name in "ab")
    found = interleaved([a, b], made, tmp_path / "out", pythons, 2)
    assert said.read_text() == "abab"
    assert [len(runs) for runs in found.values()] == [2, 2] and found["a"][0].rows_per_s == 4.0
    assert interleaved([a, b], made, tmp_path / "out", pythons, 2) == found and said.read_text() == "abab"
    with pytest.raises(Failed, match="holds a run with other batch_size"):
        interleaved([a], replace(made, batch_size=2), tmp_path / "out", pythons, 1)
    with pytest.raises(Ended, match="out of memory"):
        measure(Contender("c", "upo", {"say": "c", "fail": True}), made, tmp_path / "c", pythons)


def test_each_technique_changes_one_thing():
    for backend in ("torch", "mlx"):
        base, *others = lineup.techniques(backend)
        assert len({c.folder for c in (base, *others)}) == 1 + len(others)
        for other in others:
            changes = [k for k in asdict(base) if k not in ("name", "settings") and getattr(base, k) != getattr(other, k)]
            changes += [s for s in other.settings["set"] if s not in base.settings["set"]] + [k for k in other.settings if k not in base.settings]
            assert len(changes) == 1, other.name


def test_flops_of_a_step():
    shape = dict(hidden_size=2, intermediate_size=3, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2, vocab_size=5)
    # Weights 4 * 4 + 3 * 6 = 34 for 6 tokens, the head's 10 for 3, each three times; attention 4 * 2 for 6 + (4 + 5) + 4 looks, four times.
    assert card.step_flops(shape, [(3, 2, 1)]) == 3 * (2 * 34 * 6 + 2 * 10 * 3) + 4 * (8 * (6 + 9 + 4))
    assert all(p + max(c, r) <= 1024 for p, c, r in card.card_lengths(500, 1024))


def test_arithmetic_of_a_step_and_attentions_part_of_it(tmp_path, tiny_llama):
    """Against the count of the other benchmark, to which the adapter adds 2 a weight and token in either forward pass and 4 backward."""
    made = work.prepare(tmp_path, rows_of(6), tiny_llama, batch_size=2, max_length=64)
    lengths = [(len(t["prompt"]), *map(len, t["completions"])) for t in map(json.loads, Path(made.tokens).read_text().splitlines()[:2])]
    config = json.loads((tiny_llama / "config.json").read_text())
    total, share = arithmetic.step_flops(made)
    adapter = 8 * arithmetic.model_sizes(made).adapter * sum(map(sum, lengths))
    assert adapter > 0 and total == pytest.approx(card.step_flops(config, lengths) + adapter, rel=1e-12)
    looked_at = sum(card.looked_at(0, p) + card.looked_at(p, c) + card.looked_at(p, r) for p, c, r in lengths)
    wide = config["num_attention_heads"] * config["head_dim"]
    assert share * total == pytest.approx(16 * config["num_hidden_layers"] * wide * looked_at, rel=1e-12)


def test_a_sweep_goes_on_without_who_failed_and_shows_arithmetic_from_our_first_point(monkeypatch):
    """Ours takes 2, 3, 8 s for 1, 4, 6 times the arithmetic; the other one runs out of memory at the second size."""
    seconds, flops = {1: 2.0, 2: 3.0, 4: 8.0}, {1: (10.0, 0.1), 2: (40.0, 0.2), 4: (60.0, 0.3)}
    works = {n: work.Work("m", f"out/{n}/rows.jsonl", "o", "t", "a", "0", 2, 2, batch_size=n) for n in seconds}

    def found(contender, made, folder, with_peers):
        if contender.name == "other" and made.batch_size == 2:
            raise Ended("out of memory")
        return run(contender.name, (9.0, seconds[made.batch_size] - 0.5), reference=1.0)

    monkeypatch.setattr(lengths, "measure", found)
    monkeypatch.setattr(lengths, "step_flops", lambda made: flops[made.batch_size])
    sweep = lengths.Sweep("rows", works, [Contender("ours", "upo"), Contender("other", "upo")])
    assert list(lengths.measured(sweep, Path("f"), None)) == ["other stops at 2: out of memory"]
    assert [(c.name, c.points) for c in lengths.curves(sweep, lengths.step_seconds)] == [
        ("ours", [(1, 2.0), (2, 3.0), (4, 8.0)]), ("other", [(1, 2.0)]), (lengths.ARITHMETIC, [(1, 2.0), (2, 8.0), (4, 12.0)]),
    ]  # fmt: skip
    assert lengths.listing(sweep).splitlines()[2:] == [
        "| ours | 2.00 s, 4.00 GB | 3.00 s, 4.00 GB | 8.00 s, 4.00 GB |",
        "| other | 2.00 s, 4.00 GB | – | – |",
        "| arithmetic, TFLOP | 0.00 | 0.00 | 0.00 |",
        "| attention's share of it | 10 % | 20 % | 30 % |",
    ]


def test_plot_is_drawn_on_logarithmic_axes():
    svg = ElementTree.fromstring(picture([Panel("t", "x", [Curve("a & b", [(256, 1.0), (512, 2.0), (1024, 4.0)])])]))
    line = next(e for e in svg.iter() if e.tag.endswith("polyline"))
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    steps = {(round(b[0] - a[0]), round(b[1] - a[1])) for a, b in itertools.pairwise(points)}
    assert len(steps) == 1 and next(iter(steps))[1] < 0  # doubling is the same distance everywhere, and up is up


def test_arguments():
    parsed = preference_step.parser().parse_args(["--out", "x", "--only", "table", "--only", "lengths", "--backends", "torch", "--contender", "TRL"])
    assert parsed.only == ["table", "lengths"] and parsed.backends == ["torch"] and parsed.repeats == 3
    assert preference_step.wanted(lineup.TRL_DEFAULT, parsed) and not preference_step.wanted(lineup.UPO_MLX, parsed)
