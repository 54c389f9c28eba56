"""Several answers to one prompt: it is computed once, and each answer is the one that the prompt gets alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_families import DENSE, LOST, write

from upo.backend import Sampling, get_backend
from upo.config import load_config

pytest.importorskip("torch")  # transformers writes the models
FAMILIES = {**DENSE, **LOST}
SAMPLING = Sampling(max_tokens=14, temperature=1.0, top_p=0.9, seed=3, batch_size=8)
PLAIN = ("llama", "qwen3", "gpt_neox", "phi", "olmo2")  # keys and values of all tokens, in either framework
WINDOWED = ("gemma3_text", "cohere2", "olmo3")  # mlx-lm keeps the last ones of a window, of which rows cannot be taken
OTHERS = ("lfm2",)  # the state of a convolution


def learner_of(backend: str, kind: str, folder):
    write(kind, FAMILIES[kind], folder)
    adapter = {"rank": 4, "alpha": 8}
    learner = get_backend(backend).load(load_config({"model": str(folder), "data": {"train": "none.jsonl"}, "adapter": adapter, "dtype": "float32", "device": "cpu"}))
    learner._stops = (1, 2, 5, 9, 17, 33)  # many, so that answers end at different times
    return learner


def counting(learner, monkeypatch) -> list[int]:
    """Token slots of each call of the decoder from here on."""
    slots: list[int] = []
    if hasattr(learner.model, "decoder"):
        learner.model.decoder.register_forward_pre_hook(lambda _, args, kwargs: slots.append((*args, kwargs.get("input_ids"))[0].numel()), with_kwargs=True)
    else:
        hidden = learner.model.hidden
        monkeypatch.setattr(learner.model, "hidden", lambda ids, cache=None: slots.append(ids.size) or hidden(ids, cache))
    return slots


def prompts(counts: tuple[int, ...], lengths: tuple[int, ...]) -> list[np.ndarray]:
    """Each prompt as often as it is asked, mixed up."""
    rng = np.random.default_rng(1)
    each = [rng.integers(3, 96, n).astype(np.int32) for n in lengths]
    found = [prompt for prompt, count in zip(each, counts, strict=True) for _ in range(count)]
    return [found[i] for i in rng.permutation(len(found))]


def assert_as_alone(learner, asked: list[np.ndarray], together: list[np.ndarray]) -> None:
    for i, (prompt, answer) in enumerate(zip(asked, together, strict=True)):
        np.testing.assert_array_equal(answer, learner.generate([prompt], replace(SAMPLING, place=i))[0])


@pytest.mark.parametrize("kind", [*PLAIN, *WINDOWED, *OTHERS])
def test_each_answer_is_that_of_the_prompt_alone(backend, kind, tmp_path, monkeypatch):
    learner = learner_of(backend, kind, tmp_path)
    asked = prompts((4, 1, 3, 5), (11, 6, 11, 9))
    slots = counting(learner, monkeypatch)
    together = learner.generate(asked, SAMPLING)
    first = slots[0]
    assert_as_alone(learner, asked, together)
    lengths = {len(answer) for answer in together}
    assert len(lengths) > 3 and max(lengths) == 14, lengths
    assert len({answer.tobytes() for answer in together}) > 10  # each has random numbers of its own
    if kind in PLAIN:  # the first 8 are the prompt of 6 tokens, five of 9 and two of 11: three prompts, of which torch leaves the last token
        assert first == (33 if backend == "mlx" else 30)


def test_a_prompt_of_one_token(backend, tmp_path):
    learner = learner_of(backend, "llama", tmp_path)
    asked = [np.array([7], np.int32)] * 3
    assert_as_alone(learner, asked, learner.generate(asked, SAMPLING))


def test_answers_that_have_ended_are_no_longer_computed(tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm")
    learner = learner_of("mlx", "llama", tmp_path)
    asked = prompts((4, 4), (11, 6))
    slots = counting(learner, monkeypatch)
    lengths = np.array([len(answer) for answer in learner.generate(asked, SAMPLING)])
    rows = slots[1:]  # after the prompts, a token for each row
    for step, computed in enumerate(rows, 1):
        running = np.count_nonzero(lengths >= step)
        assert running <= computed < 2 * running
    assert rows[0] > rows[-1]
