"""Reference log-probs: right values, scored once, a key for everything they depend on, shared between ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fake_learner import A, B, FakeLearner, ThreadComm, configure, pairs

from upo.adapters import write_adapter
from upo.cache import cache_dir
from upo.data.batch import collate
from upo.data.partners import assign_partners
from upo.errors import ModelError
from upo.train.reference import adapter_hash, cache_path, check_reference, logps_of, reference_key, with_reference
from upo.train.reporter import Silent

CONFIG = configure(train={"micro_batch_tokens": 40})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows():
    return assign_partners(pairs(9), 0, 64)


def test_values_are_those_of_the_reference(rows):
    learner = FakeLearner(CONFIG)
    learner.adapter[B] = np.ones_like(learner.adapter[B])  # the policy has moved; its reference has not
    found = with_reference(CONFIG, learner, "fake", rows, "train", Silent())
    batch = collate(found.examples)
    np.testing.assert_array_equal(batch.ref_logp, learner.logps(collate(rows).forest, reference=0))
    np.testing.assert_array_equal(batch.partner_ref_logp, learner.logps(collate(rows).partners, reference=0))
    assert np.abs(batch.ref_logp - learner.logps(batch.forest)).max() > 0.1
    assert [replace(e, ref_logp=None, partner_ref_logp=None).origin for e in found.examples] == [e.origin for e in rows]


def test_rows_without_partners(rows):
    bare = [replace(e, partners=None) for e in rows]
    found = with_reference(CONFIG, FakeLearner(CONFIG), "fake", bare, "train", Silent()).examples
    assert all(len(e.ref_logp) == 2 and e.partner_ref_logp is None for e in found)


def test_scored_once(rows):
    learner = FakeLearner(CONFIG)
    first = with_reference(CONFIG, learner, "fake", rows, "train", Silent())
    again = with_reference(CONFIG, learner, "fake", rows, "train", Silent())
    assert (first.cached, again.cached, learner.scored) == (False, True, 4 * len(rows))
    np.testing.assert_array_equal(logps_of(again.examples), logps_of(first.examples))


@pytest.mark.parametrize("damage", ["cut", "shape", "nan", "pickle"])
def test_a_damaged_cache_is_scored_again(rows, damage):
    learner = FakeLearner(CONFIG)
    first = with_reference(CONFIG, learner, "fake", rows, "train", Silent())
    path = cache_path(first.key)
    right = np.load(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "pickle":
        np.save(path, np.array([{}], object), allow_pickle=True)
    else:
        np.save(path, right[:-1] if damage == "shape" else np.where(np.arange(len(right)) == 2, np.nan, right).astype(np.float32))
    again = with_reference(CONFIG, learner, "fake", rows, "train", Silent())
    assert not again.cached
    np.testing.assert_array_equal(np.load(path), right)
    assert [p.name for p in cache_dir("reference").iterdir()] == [path.name]  # no temporary file stays


def start_adapter(folder, scale=1.0):
    learner = FakeLearner(CONFIG)
    arrays = {A: learner.adapter[A], B: np.full_like(learner.adapter[B], scale)}
    write_adapter(folder, arrays, learner.adapter_config())
    return str(folder)


def test_the_key_names_everything(rows, tmp_path):
    info = FakeLearner(CONFIG).info
    one, other = start_adapter(tmp_path / "one"), start_adapter(tmp_path / "other", 2.0)
    same = start_adapter(tmp_path / "moved")
    token = replace(rows[0], prompt=np.append(rows[0].prompt[:-1], rows[0].prompt[-1] ^ 1).astype(np.int32))
    partner = replace(rows[0], partners=(rows[0].partners[1], rows[0].partners[0]))
    with_start = lambda folder, **k: configure(adapter={"start": folder}, **k)  # noqa: E731
    keys = {
        "plain": reference_key(CONFIG, info, "fake", rows),
        "weights": reference_key(CONFIG, replace(info, weights_hash="w1"), "fake", rows),
        "dtype": reference_key(CONFIG, replace(info, dtype="bfloat16"), "fake", rows),
        "device": reference_key(CONFIG, replace(info, device="cuda:0"), "fake", rows),
        "backend": reference_key(CONFIG, info, "other", rows),
        "adapter": reference_key(configure(reference=one), info, "fake", rows),
        "adapter's weights": reference_key(configure(reference=other), info, "fake", rows),
        "token": reference_key(CONFIG, info, "fake", [token, *rows[1:]]),
        "partners": reference_key(CONFIG, info, "fake", [partner, *rows[1:]]),
        "order": reference_key(CONFIG, info, "fake", rows[::-1]),
        "fewer": reference_key(CONFIG, info, "fake", rows[:-1]),
    }
    assert len(set(keys.values())) == len(keys)
    assert reference_key(with_start(one), info, "fake", rows) == keys["plain"]  # the base does not depend on where the policy starts
    assert reference_key(with_start(one, reference="start"), info, "fake", rows) == keys["adapter"]
    assert reference_key(configure(reference=same), info, "fake", rows) == keys["adapter"]
    assert reference_key(CONFIG, replace(info, device="cuda:1"), "fake", rows) == keys["device"]
    assert adapter_hash(one) == adapter_hash(same) != adapter_hash(other)


def test_log_probs_that_are_not_finite(rows):
    learner = FakeLearner(CONFIG)
    learner.table[4, 4] = np.nan
    with pytest.raises(ModelError, match=r"reference: log-probs that are not finite \(float32\) in train\.jsonl:1, .* and \d more"):
        with_reference(CONFIG, learner, "fake", rows, "train", Silent())
    assert not list(cache_dir("reference").iterdir())


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_ranks_share_the_work(rows, ranks):
    """With more ranks than rows some have none; all end with the same numbers as one rank alone, and rank 0 alone writes."""
    alone = logps_of(with_reference(CONFIG, FakeLearner(CONFIG, weights="alone"), "fake", rows, "train", Silent()).examples)
    learners = [FakeLearner(CONFIG, comm) for comm in ThreadComm.make(ranks)]
    for learner in learners:
        learner.table = FakeLearner(CONFIG, weights="alone").table
    with ThreadPoolExecutor(ranks) as pool:
        for cached in (False, True):
            found = list(pool.map(lambda learner: with_reference(CONFIG, learner, "fake", rows, "train", Silent()), learners))
            assert [f.cached for f in found] == [cached] * ranks
            for f in found:
                np.testing.assert_array_equal(logps_of(f.examples), alone)
    assert sum(learner.scored for learner in learners) == 4 * len(rows)
    assert max(learner.scored for learner in learners) < 4 * len(rows)


def test_bad_references(tmp_path):
    with pytest.raises(ModelError, match=r"^reference: bse: .*Known besides folders: base, start"):
        check_reference(configure(reference="bse"))
    with pytest.raises(ModelError, match=r"^adapter\.start: .*nowhere"):
        check_reference(configure(adapter={"start": str(tmp_path / "nowhere")}))
    check_reference(configure(reference="start", adapter={"start": start_adapter(tmp_path / "one")}))
