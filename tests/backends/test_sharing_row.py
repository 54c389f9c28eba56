"""A row of the data is scored with its prompt shared and without, on the loaded model, before a run relies on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from learner_runs import configure, examples

from upo.backend import get_backend
from upo.data.batch import collate
from upo.sharing import row_of

LONG = 40  # tokens of prompt; those of the check at loading are shorter


def load(backend: str, folder, sharing: str = "auto", **sections):
    return get_backend(backend).load(configure(folder, backend=backend, device="cpu", train={"prefix_sharing": sharing, **sections}))


def rows():
    """Short rows, and one with a long prompt."""
    long = replace(examples(1, seed=9)[0], prompt=np.arange(3, 3 + LONG, dtype=np.int32), origin="long")
    return [*examples(3), long]


def blind_beyond(backend: str, monkeypatch) -> None:
    """A fault that only long prompts show: completions go on at the position of another, or see what follows."""
    if backend == "torch":
        from upo.data.packed import Tree

        own = Tree.positions
        monkeypatch.setattr(Tree, "positions", lambda tree: np.arange(tree.tokens) if tree.prompt > 30 else own(tree))
    else:
        from upo_mlx import shared

        mask = shared.Ground.mask
        late = lambda ground: replace(ground, offset=ground.offset + 1) if ground.keys.shape[1] > 30 else ground  # noqa: E731
        monkeypatch.setattr(shared.Ground, "mask", lambda ground, window: mask(late(ground), window))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_row_that_is_scored_alike(backend, tiny_llama, checkpointing):
    learner = load(backend, tiny_llama, gradient_checkpointing=checkpointing)
    before = learner.info
    learner.check_sharing(row_of(rows()))
    assert learner.info == before and before.layout != "padded"
    padded = load(backend, tiny_llama, "off")
    before = padded.info
    padded.check_sharing(row_of(rows()))
    assert padded.info == before and before.layout == "padded"


def test_a_fault_of_long_rows_falls_back(backend, tiny_llama, monkeypatch):
    blind_beyond(backend, monkeypatch)
    learner, padded = load(backend, tiny_llama), load(backend, tiny_llama, "off")
    assert learner.info.layout != "padded", "the check at loading does not see it"
    learner.check_sharing(row_of(rows()[:3]))
    assert learner.info.layout != "padded", "nor do short rows"
    batch = collate(rows())
    assert np.abs(learner.logps(batch.forest) - padded.logps(batch.forest)).max() > 1e-2
    learner.check_sharing(row_of(rows()))
    assert learner.info.layout == "padded"
    note = learner.info.notes[-1]
    assert note.startswith("train.prefix_sharing: each completion is computed with a prompt of its own: with ")
    assert "on a row of the data, a prompt computed once gives log-probs that differ by" in note
    np.testing.assert_array_equal(learner.logps(batch.forest), padded.logps(batch.forest))
    again = learner.info
    learner.check_sharing(row_of(rows()))  # nothing is left to fall back from
    assert learner.info == again


def test_an_error_on_a_long_row_falls_back(backend, tiny_llama, monkeypatch):
    learner = load(backend, tiny_llama)
    module = pytest.importorskip(f"upo_{backend}.{'attention' if backend == 'torch' else 'shared'}")

    def broken(*_, **__):
        raise RuntimeError("no kernel\nfor this shape")

    monkeypatch.setattr(module, "_fused", broken) if backend == "torch" else monkeypatch.setattr(module.Ground, "join", broken)
    learner.check_sharing(row_of(rows()))
    assert learner.info.layout == "padded" and "it does not run on shared prompts (no kernel for this shape)" in learner.info.notes[-1]
