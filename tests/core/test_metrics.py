"""The metrics of a step, against hand computation, and their independence of how a split is scored."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fake_learner import UPO, VOCAB, FakeLearner, configure, pairs, unpaired

from upo.backend import Outcome
from upo.data.batch import collate
from upo.data.partners import assign_partners
from upo.errors import NonFiniteError
from upo.rewards import score_examples
from upo.training.metrics import NAMES, evaluate, plain, step_metrics
from upo.training.reference import with_reference
from upo.training.reporter import Silent


def batch_of(kind: str = "pair", **numbers):
    """Two pairs or four unpaired rows, with these numbers per completion."""
    batch = collate(pairs(2) if kind == "pair" else unpaired(4), step=3)
    return replace(batch, **{name: np.array(value, np.float32) for name, value in numbers.items()})


def test_dpo_pairs_by_hand():
    """beta 0.1, log-ratios chosen 2, -1 and rejected 1, -1: margins 0.1 and 0 (a tie)."""
    batch = batch_of(ref_logp=[-4, -5, -6, -7])
    found = step_metrics(configure().objective.build(), batch, Outcome(np.array([-2, -4, -7, -8], np.float32)))
    loss = (math.log1p(math.exp(-0.1)) + math.log(2)) / 2
    expected = {"loss": loss, "loss/preference": loss, "accuracy": 0.75, "margin": 0.05, "kl": 0.25, "logp/chosen": -4.5, "logp/rejected": -6.0}
    expected["perplexity"] = math.exp((2 + 7) / (batch.forest.lengths[0] + batch.forest.lengths[2]))
    assert found == pytest.approx(expected, rel=1e-12)


def test_upo_weights_and_losses_by_hand():
    """R .2 .8 .2 .8, V .5 and .6, lambda 5, tau .7, gamma .3, c_v .1, all log-ratios 0."""
    reward, v, logp = np.array([0.2, 0.8, 0.2, 0.8]), np.array([0.5, 0.5, 0.6, 0.6]), np.array([-2.0, -4, -7, -8])
    batch = batch_of(ref_logp=logp, reward=reward, partner_ref_logp=[0, 0, 0, 0])
    length = batch.forest.lengths
    outcome = Outcome(logp.astype(np.float32), np.array([0.5, 0.6], np.float32), np.array([1, 1, -1, 3], np.float32))
    found = step_metrics(configure(UPO).objective.build(), batch, outcome)
    weight = np.exp(5 * (reward - v))
    residual = reward - v
    value = np.mean(np.where(residual < 0, 0.3, 0.7) * residual**2)
    actor = np.mean(-weight * logp / length)
    distance = 0.1 * (0 - 1.0)  # z0 = mean of the partners' log-ratios
    kto = np.mean([1 / (1 + math.exp(label * distance)) for label in (1, -1, 1, -1)])
    expected = {
        "loss": kto + 0.3 * actor + 0.1 * value,
        "loss/preference": kto,
        "loss/auxiliary": actor,
        "loss/value": value,
        "accuracy": 0.5,
        "margin": 0.0,
        "kl": 0.0,
        "logp/chosen": -4.5,
        "logp/rejected": -6.0,
        "perplexity": math.exp(9 / (length[0] + length[2])),
        "reward/mean": 0.5,
        "value/mean": 0.55,
        "weight/mean": weight.mean(),
        "weight/p95": np.sort(weight)[2] + 0.85 * (np.sort(weight)[3] - np.sort(weight)[2]),
        "weight/max": weight.max(),
        "weight/ess": weight.sum() ** 2 / (4 * (weight**2).sum()),
    }
    assert found == pytest.approx(expected, rel=1e-6)  # rewards and V enter in float32


def test_only_what_applies_is_there():
    """Unpaired rows under SFT: no accuracy, no margin, no kl; the loss is the mean token log-prob of the desirable ones."""
    batch = batch_of("unpaired")
    logp = np.array([-2, -3, -4, -5], np.float32)
    found = step_metrics(configure({"preference": {"loss": "sft"}}).objective.build(), batch, Outcome(logp))
    n = batch.forest.lengths
    assert found["loss"] == pytest.approx((2 / n[0] + 4 / n[2]) / 2, rel=1e-12)
    assert sorted(found) == ["logp/chosen", "logp/rejected", "loss", "loss/preference", "perplexity"]
    assert (found["logp/chosen"], found["logp/rejected"]) == (-3.0, -4.0)


def test_rounding_is_a_tie():
    batch = batch_of(ref_logp=[-4, -5, -6, -7])
    found = step_metrics(configure().objective.build(), batch, Outcome(np.array([-3.9991, -5, -5.998, -7], np.float32)))
    assert found["accuracy"] == 0.75  # 0.00009 counts one half, 0.0002 counts


def test_completions_without_a_label_are_on_neither_side():
    batch = collate(unpaired(4, labels=(1, 0)))
    found = step_metrics(configure({"preference": {"loss": "sft"}}).objective.build(), batch, Outcome(np.array([-2, -3, -4, -5], np.float32)))
    assert found["logp/chosen"] == -3.0 and "logp/rejected" not in found


def test_huge_weights_do_not_overflow_the_sample_size():
    batch = batch_of(ref_logp=[0, 0, 0, 0], reward=[60, 60, 0, 0], partner_ref_logp=[0, 0, 0, 0])
    outcome = Outcome(np.full(4, -1, np.float32), np.zeros(2, np.float32), np.zeros(4, np.float32))
    found = step_metrics(configure(UPO).objective.build(), batch, outcome)
    assert found["weight/max"] == pytest.approx(math.exp(300), rel=1e-9)
    assert found["weight/ess"] == pytest.approx(0.5)


def test_plain_records():
    record = plain({"loss": math.inf, "step": 2, "eval": True, "accuracy": 0.5})
    assert json.dumps(record, allow_nan=False) == '{"step": 2, "eval": true, "loss": null, "accuracy": 0.5}'
    with pytest.raises(KeyError, match="los"):
        plain({"los": 1.0})
    assert list(plain({"answers/words": 1.0, "goal/b": 2.0, "goals": 3.0, "perplexity": math.inf})) == ["perplexity", "goals", "goal/b", "answers/words"]
    assert all(text and not text.endswith(".") and "\n" not in text for text in NAMES.values())


@pytest.fixture(scope="module")
def scored():
    """(learner, objective, held-out rows with everything UPO needs)."""
    config = configure(UPO)
    learner = FakeLearner(config)
    learner.adapter = {name: np.full_like(value, 0.1 * i + 0.3) for i, (name, value) in enumerate(learner.adapter.items())}
    learner.head["4.weight"] = np.linspace(0, 1, VOCAB, dtype=np.float32)[None]
    rows, _ = score_examples(assign_partners(pairs(13, seed=1), 0, 64), config.objective.auxiliary.rewards)
    return learner, config.objective.build(), with_reference(config, learner, "fake", rows, "eval", Silent()).examples


@pytest.mark.parametrize("limit", [1, 25, 60, 200])
def test_the_evaluation_does_not_depend_on_batch_size(scored, limit):
    """Same sums in every partition, to the last bit: rows are put back in their places before anything is added up."""
    learner, objective, rows = scored
    batch = collate(rows)
    found = []
    for tokens in (10**6, limit):
        learner.info = replace(learner.info, micro_batch_tokens=tokens)
        found.append(evaluate(learner, objective, batch, 5))
    whole = found[0]
    assert found[1] == whole
    assert len(set(np.round(list(whole.values()), 6))) > 10  # and the numbers are not all the same
    direct = step_metrics(objective, batch, learner.score(batch))
    assert whole == direct


def test_a_score_that_is_not_finite_stops_the_evaluation(scored):
    _, objective, rows = scored
    broken = FakeLearner(configure(UPO))
    broken.table[3, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"^step 5: the evaluation .* in train\.jsonl:1, .* and \d+ more\."):
        evaluate(broken, objective, collate(rows), 5)
