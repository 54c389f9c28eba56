"""How often a run calls its model: UPO's rewards cost no call that KTO does not make, in the reference pass, in a step and in an evaluation.

(Before the first step, the value head is fitted on one pass over the prompts.)
"""

from __future__ import annotations

from collections import Counter

import pytest
from learner_runs import UPO, configure, examples

from upo.backend import get_backend
from upo.data.batch import collate, micro_batches
from upo.learner import partners_of
from upo.training.metrics import evaluate
from upo.training.reference import with_reference
from upo.training.reporter import Silent

LIMIT = 60  # cuts eight rows into several micro-batches in any layout
KTO, DPO, AOT = ({"preference": {"loss": name}} for name in ("kto", "dpo", "aot"))


def watched(learner) -> Counter:
    """Counts passes of the decoder from now on, by direction and token slots."""
    calls: Counter = Counter()
    if learner.config.backend == "torch":

        def seen(module, args, kwargs, output):
            slots = kwargs["input_ids"].numel()
            calls["forward", slots] += 1
            if output[0].requires_grad:
                output[0].register_hook(lambda _: calls.update([("backward", slots)]))

        learner.model.decoder.register_forward_hook(seen, with_kwargs=True)
        return calls
    import mlx.core as mx

    own = learner.model.hidden

    def hidden(ids, cache=None):
        slots = ids.size
        calls["forward", slots] += 1

        @mx.custom_function
        def same(h):
            return h

        @same.vjp
        def back(primals, cotangents, outputs):
            calls["backward", slots] += 1
            return cotangents

        return same(own(ids, cache))

    learner.model.hidden = hidden
    return calls


def calls_of(backend: str, folder, objective: object, sharing: str, cache, monkeypatch) -> dict[str, Counter]:
    """The calls of each part of a run of one step; nothing is in the cache."""
    monkeypatch.setenv("UPO_CACHE", str(cache))
    config = configure(folder, objective, backend=backend, device="cpu", train={"prefix_sharing": sharing, "micro_batch_tokens": LIMIT})
    learner = get_backend(backend).load(config)
    rows, found = examples(), {}
    calls = watched(learner)
    rows = with_reference(config, learner, backend, rows, "train", Silent()).examples
    found["reference"] = calls.copy()
    calls.clear()
    batch = collate(rows)
    learner.step(batch, 1e-3)
    found["step"] = calls.copy()
    calls.clear()
    evaluate(learner, config.objective.build(), batch, 1)
    found["evaluation"] = calls.copy()
    assert found["step"] != found["reference"] and all(found.values())
    return found


def passes(calls: Counter, direction: str) -> int:
    return sum(n for (way, _), n in calls.items() if way == direction)


@pytest.mark.parametrize("sharing", ["off", "auto"])
def test_upo_calls_the_model_as_kto_does(backend, tiny_llama, sharing, tmp_path, monkeypatch):
    kto, upo = (calls_of(backend, tiny_llama, o, sharing, tmp_path / name, monkeypatch) for name, o in (("kto", KTO), ("upo", UPO)))
    assert upo == kto
    assert passes(kto["reference"], "backward") == passes(kto["evaluation"], "backward") == 0

    batch, layout = collate(examples()), {"off": "padded", "auto": {"torch": "packed", "mlx": "two_phase"}[backend]}[sharing]
    parts, partners = (len(micro_batches(b, LIMIT, layout=layout, device="cpu")) for b in (batch, partners_of(batch)))
    assert parts > 1
    each = 2 if layout == "two_phase" else 1  # calls of the decoder a micro-batch takes: one for prompts, one for completions
    assert passes(kto["step"], "forward") == each * (parts + partners), "partners once, without gradient; completions once"
    assert passes(kto["step"], "backward") == each * parts
    assert passes(kto["reference"], "forward") == each * 2 * parts


def test_the_count_sees_a_further_pass(backend, tiny_llama, tmp_path, monkeypatch):
    """A loss that couples the whole step scores it once before, without gradient."""
    dpo, aot = (calls_of(backend, tiny_llama, o, "off", tmp_path / name, monkeypatch)["step"] for name, o in (("dpo", DPO), ("aot", AOT)))
    assert passes(aot, "backward") == passes(dpo, "backward") > 1
    assert passes(aot, "forward") == passes(dpo, "forward") + passes(dpo, "backward")
