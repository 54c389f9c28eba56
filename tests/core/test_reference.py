"""Reference log-probs: right values, scored once, a key for everything they depend on, shared between ranks."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fake_learner import A, B, FakeLearner, ThreadComm, configure, pairs

from upo.adapters import write_adapter
from upo.cache import cache_dir
from upo.data.batch import collate
from upo.data.forest import Forest
from upo.data.partners import assign_partners
from upo.errors import ModelError
from upo.training import reference
from upo.training.logp_store import Store, text_keys
from upo.training.reference import adapter_hash, check_reference, logps_of, reference_key, with_reference
from upo.training.reporter import Silent

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


def files() -> list:
    return sorted(cache_dir("reference").glob("*/*"))


def passed(rows, config=CONFIG, learner=None, **info):
    """One pass with a learner of its own: what it found, and how many completions it scored, the spot check's included."""
    learner = learner or FakeLearner(config)
    learner.info, before = replace(learner.info, **info), learner.scored
    found = with_reference(config, learner, "fake", rows, "train", Silent())
    return found, learner.scored - before


def test_scored_once(rows):
    """The second time, one micro-batch is scored again and compared."""
    first, scored = passed(rows)
    again, checked = passed(rows)
    assert (first.scored, scored, again.scored) == (4 * len(rows), 4 * len(rows), 0)
    assert 0 < checked <= 8
    np.testing.assert_array_equal(logps_of(again.examples), logps_of(first.examples))
    assert len(files()) == 2, "one of the rows' own, one of partners; what was there is not written again"


TOKENS = configure({"preference": {"loss": "ld_dpo"}}, train={"micro_batch_tokens": 40})


def test_reused_over_losses_seeds_and_rows(rows):
    """A loss without partners and then one with; another seed, so other partners; a subset, in another order, with other micro-batches."""
    bare = [replace(e, partners=None) for e in rows]
    assert passed(bare)[0].scored == 18
    own = {(e.prompt.tobytes(), c.tobytes()) for e in rows for c in e.completions}
    partners = [(e.prompt.tobytes(), p.tobytes()) for e in rows for p in e.partners]
    kto, _ = passed(rows)
    assert 0 < kto.scored == sum(text not in own for text in partners), "partners that say what a completion says are known too"
    reseeded = assign_partners(bare, 1, 64)
    others = [(e.prompt.tobytes(), p.tobytes()) for e in reseeded for p in e.partners]
    assert 0 < passed(reseeded)[0].scored == sum(text not in own | set(partners) for text in others) < 18
    some, scored = passed(rows[5:2:-1], configure(train={"micro_batch_tokens": 99}))
    assert some.scored == 0 and scored <= 6
    np.testing.assert_array_equal(logps_of(some.examples), logps_of([kto.examples[i] for i in (5, 4, 3)]))
    more, _ = passed([*rows[:4], *assign_partners(pairs(3, seed=5), 0, 64)])
    assert 6 <= more.scored <= 12 and [e.ref_logp for e in more.examples[:4]] == [e.ref_logp for e in kto.examples[:4]]


def test_numbers_of_tokens_serve_as_sums(rows):
    bare = [replace(e, partners=None) for e in rows]
    tokens, _ = passed(bare, TOKENS)
    assert tokens.scored == 18 and all(len(v) == len(c) for e in tokens.examples for v, c in zip(e.ref_token_logp, e.completions, strict=True))
    sums, _ = passed(bare)
    assert sums.scored == 0
    np.testing.assert_allclose(logps_of(sums.examples), FakeLearner(CONFIG).logps(collate(rows).forest, reference=0), rtol=1e-6)
    for path in files():
        path.unlink()
    passed(bare)
    assert passed(bare, TOKENS)[0].scored == 18, "a sum does not say what its tokens are"


def test_in_16_bits_whole_micro_batches_count(rows):
    bare = [replace(e, partners=None) for e in rows]
    assert passed(bare, dtype="bfloat16")[0].scored == 18
    assert passed(bare, dtype="bfloat16")[0].scored == 0
    assert 0 < passed(rows, dtype="bfloat16")[0].scored <= 18, "only partners"
    wide = configure(train={"micro_batch_tokens": 1000})
    assert [passed(r, wide, dtype="bfloat16")[0].scored for r in (bare, bare, bare[:-1])] == [18, 0, 16], "other rows beside each"


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_pass_goes_on(rows, ranks):
    """Ctrl-C in the third micro-batch: what the others found is kept, and the pass ends with the same numbers."""
    whole = logps_of(with_reference(CONFIG, FakeLearner(CONFIG, weights="alone"), "fake", rows, "train", Silent()).examples)
    for path in files():
        path.unlink()

    class Interrupted(FakeLearner):
        calls = 0

        def logps(self, forest, **how):
            self.calls += 1
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().logps(forest, **how)

    class Lone:
        """A rank whose fellows never come."""

        def __init__(self, rank):
            self.rank, self.size = rank, ranks

        def all_sum(self, array):
            return array * ranks if array.shape == (1,) else array

    kept = 0
    for rank in range(ranks):
        stopped = Interrupted(CONFIG, Lone(rank), weights="alone")
        with pytest.raises(KeyboardInterrupt):
            with_reference(CONFIG, stopped, "fake", rows, "train", Silent())
        kept += stopped.scored
    found, _ = passed(rows, learner=FakeLearner(CONFIG, weights="alone"))
    assert 0 < kept == 4 * len(rows) - found.scored
    np.testing.assert_array_equal(logps_of(found.examples), whole)


def test_a_killed_pass_loses_what_it_did_last(rows, monkeypatch):
    """What is not caught: the work since the last time it was kept."""
    monkeypatch.setattr(reference, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(Store, "add", lambda store, entries, own=Store.add: (own(store, entries), counted.append(len(entries)))[0])
    counted: list[int] = []
    found, _ = passed(rows)
    assert sum(counted) == found.scored and len([n for n in counted if n]) > 3


class Warned(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize(("dtype", "offset", "said"), [("float32", 0.02, True), ("float32", 0.005, False), ("bfloat16", 0.5, False), ("bfloat16", 2.0, True)])
def test_cached_numbers_are_compared(rows, dtype, offset, said):
    """Beyond rounding, nothing that is cached counts any more."""
    passed(rows, dtype=dtype)
    learner, warned = FakeLearner(CONFIG), Warned()
    learner.info, learner.reference_offset = replace(learner.info, dtype=dtype), offset
    found = with_reference(CONFIG, learner, "fake", rows, "train", warned)
    assert (found.scored == 4 * len(rows)) == bool(warned.warnings) == said
    if said:
        assert f"cached log-probs differ by {offset:.3g} nats" in warned.warnings[0]
        np.testing.assert_array_equal(collate(found.examples).ref_logp, learner.logps(collate(rows).forest, reference=0))
        assert len(files()) == 2 and with_reference(CONFIG, learner, "fake", rows, "train", warned).scored == 0


@pytest.mark.parametrize("damage", ["cut", "bit", "pickle", "empty"])
def test_a_damaged_cache_is_scored_again(rows, damage):
    rows = [replace(e, partners=None) for e in rows]
    first, _ = passed(rows)
    (path,) = files()
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": bytes(content[:-3]), "bit": bytes(content), "pickle": b"\x80\x04N.", "empty": b""}[damage])
    again, _ = passed(rows)
    assert again.scored == 2 * len(rows)
    np.testing.assert_array_equal(logps_of(again.examples), logps_of(first.examples))
    assert [p.suffix for p in files()] == [".npz"], "the right content has the right name again; no temporary file stays"


def test_what_is_not_a_cache_of_log_probs():
    """A file whose name is that of its content, and which holds something else."""
    store = Store("ab")
    store.add({b"k" * 16: np.array([1.5], np.float32), b"l" * 16: np.array([1, 2], np.float32)})
    for content in (b"", b"PK", pickled()):
        (store.folder / f"{hashlib.sha256(content).hexdigest()}.npz").write_bytes(content)
    found = store.read([b"l" * 16, b"m" * 16])
    assert list(found) == [b"l" * 16] and found[b"l" * 16].tolist() == [1, 2]
    store.clear()
    assert store.read([b"l" * 16]) == {}


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, keys=np.array([{}], object), counts=np.ones(1), values=np.ones(1))
    return buffer.getvalue()


def start_adapter(folder, scale=1.0):
    learner = FakeLearner(CONFIG)
    arrays = {A: learner.adapter[A], B: np.full_like(learner.adapter[B], scale)}
    write_adapter(folder, arrays, learner.adapter_config())
    return str(folder)


def test_the_key_of_a_text_names_its_tokens_and_what_matters_beside_it():
    tokens = lambda *ids: np.array(ids, np.int32)  # noqa: E731
    forest = lambda prompts, completions, owner: Forest(tuple(map(lambda p: tokens(*p), prompts)), tuple(map(lambda c: tokens(*c), completions)), np.array(owner))  # noqa: E731
    keys = lambda f, by_token=False, alone=True: text_keys(f, tokens=by_token, alone=alone)  # noqa: E731
    one, two = keys(forest([[1, 2]], [[3], [3, 4]], [0, 0]))
    assert keys(forest([[9], [1, 2]], [[7], [3, 4], [3]], [0, 1, 1]))[1:] == [two, one]
    assert len({one, two, *keys(forest([[1], [1, 2, 3]], [[2, 3], [4], [3]], [0, 1, 1])), *keys(forest([[1, 2]], [[3]], [0]), True)}) == 6
    beside = keys(forest([[1, 2]], [[3], [3, 4]], [0, 0]), alone=False)
    assert beside != keys(forest([[1, 2]], [[3, 4], [3]], [0, 0]), alone=False)[::-1] and beside[0] != one
    assert beside == keys(forest([[1, 2]], [[3], [3, 4]], [0, 0]), alone=False)


def test_the_key_names_everything(tmp_path):
    info = FakeLearner(CONFIG).info
    one, other = start_adapter(tmp_path / "one"), start_adapter(tmp_path / "other", 2.0)
    same = start_adapter(tmp_path / "moved")
    with_start = lambda folder, **k: configure(adapter={"start": folder}, **k)  # noqa: E731
    keys = {
        "plain": reference_key(CONFIG, info, "fake"),
        "weights": reference_key(CONFIG, replace(info, weights_hash="w1"), "fake"),
        "dtype": reference_key(CONFIG, replace(info, dtype="bfloat16"), "fake"),
        "device": reference_key(CONFIG, replace(info, device="cuda:0"), "fake"),
        "backend": reference_key(CONFIG, info, "other"),
        "adapter": reference_key(configure(reference=one), info, "fake"),
        "adapter's weights": reference_key(configure(reference=other), info, "fake"),
    }
    assert len(set(keys.values())) == len(keys)
    assert reference_key(with_start(one), info, "fake") == keys["plain"]  # the base does not depend on where the policy starts
    assert reference_key(with_start(one, reference="start"), info, "fake") == keys["adapter"]
    assert reference_key(configure(reference=same), info, "fake") == keys["adapter"]
    assert reference_key(CONFIG, replace(info, device="cuda:1"), "fake") == keys["device"]
    assert adapter_hash(one) == adapter_hash(same) != adapter_hash(other)


def test_log_probs_that_are_not_finite(rows):
    learner = FakeLearner(CONFIG)
    learner.table[4, 4] = np.nan
    with pytest.raises(ModelError, match=r"reference: log-probs that are not finite \(float32\) in train\.jsonl:1, .* and \d more"):
        with_reference(CONFIG, learner, "fake", rows, "train", Silent())
    assert passed(rows)[0].scored > 0, "none of them counts as known"


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_ranks_share_the_work(rows, ranks):
    """With more ranks than rows some have none; all end with the same numbers as one rank alone, and rank 0 alone writes."""
    one = FakeLearner(CONFIG, weights="alone")
    alone = logps_of(with_reference(CONFIG, one, "fake", rows, "train", Silent()).examples)
    learners = [FakeLearner(CONFIG, comm) for comm in ThreadComm.make(ranks)]
    for learner in learners:
        learner.table = FakeLearner(CONFIG, weights="alone").table
    with ThreadPoolExecutor(ranks) as pool:
        for cached in (False, True):
            found = list(pool.map(lambda learner: with_reference(CONFIG, learner, "fake", rows, "train", Silent()), learners))
            assert [f.scored for f in found] == [0 if cached else 4 * len(rows)] * ranks
            for f in found:
                np.testing.assert_array_equal(logps_of(f.examples), alone)
    checked = learners[0].scored + sum(learner.scored for learner in learners[1:]) - 4 * len(rows)
    assert 0 < checked <= 8, "the second time rank 0 compares a micro-batch"
    assert max(learner.scored for learner in learners) < 4 * len(rows)


def test_bad_references(tmp_path):
    with pytest.raises(ModelError, match=r"^reference: bse: .*Known besides folders: base, start"):
        check_reference(configure(reference="bse"))
    with pytest.raises(ModelError, match=r"^adapter\.start: .*nowhere"):
        check_reference(configure(adapter={"start": str(tmp_path / "nowhere")}))
    check_reference(configure(reference="start", adapter={"start": start_adapter(tmp_path / "one")}))
