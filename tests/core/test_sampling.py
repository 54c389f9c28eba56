"""Choosing a token: the nucleus against a plain full sort, ties and flat distributions included."""

from __future__ import annotations

import numpy as np
import pytest

from upo.backend import Sampling
from upo.sampling import LIKELY, distinct, pick, uniforms


def plainly(logits: np.ndarray, temperature: float, top_p: float, uniform: float) -> int:
    """One row, token by token, from the definition."""
    probability = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    probability /= probability.sum()
    kept, mass = set(), 0.0
    for p in sorted(set(probability), reverse=True):  # ties come and go together
        if mass >= top_p - 1e-7:
            break
        same = np.flatnonzero(probability == p)
        kept |= set(same.tolist())
        mass += p * len(same)
    total = sum(probability[t] for t in kept)
    reached = 0.0
    for token in range(len(logits)):
        reached += probability[token] / total if token in kept else 0.0
        if reached > uniform:
            return token
    return max(kept)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 12.0])
def test_equals_the_definition(temperature: float, top_p: float, scale: float) -> None:
    rng = np.random.default_rng(int(scale * 10 + top_p * 100))
    logits = np.round(rng.normal(0, 1, (12, 200)) * scale, 1).astype(np.float32)  # rounded: many ties
    uniform = rng.random(12)
    found = pick(logits, temperature, top_p, uniform)
    assert found.tolist() == [plainly(row, temperature, top_p, u) for row, u in zip(logits, uniform, strict=True)]


def test_a_nucleus_of_unlikely_tokens_is_found_by_the_full_sort() -> None:
    """One token of weight 1 and ten thousand of half LIKELY: together they outweigh it, so the nucleus reaches into them."""
    logits = np.full((1, 10_001), np.log(LIKELY / 2), np.float32)
    logits[0, 7] = 0.0
    chosen = {int(pick(logits, 1.0, 0.9, np.array([u]))[0]) for u in (0.0, 0.3, 0.9999)}
    assert 0 in chosen and 7 in chosen and max(chosen) > 9_000  # 1 / 1.5 of the mass is token 7's, at its place among the others
    assert pick(logits, 1.0, 0.5, np.array([0.9999]))[0] == 7  # its own mass is enough


def test_greedy_and_streams() -> None:
    logits = np.array([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]], np.float32)
    assert pick(logits, 0, 0.9, np.array([0.5, 0.5])).tolist() == [1, 0]
    first, second = (uniforms(Sampling(max_tokens=500, seed=3), prompt) for prompt in (0, 1))
    assert first.shape == (500,) and (first >= 0).all() and (first < 1).all()
    assert abs(first.mean() - 0.5) < 0.06 and abs(np.corrcoef(first, second)[0, 1]) < 0.15  # 4 and 3 standard errors of 500 draws


def test_a_share_of_the_prompts_draws_as_the_whole_list_would():
    whole = [uniforms(Sampling(max_tokens=3, seed=4), i) for i in range(7)]
    for rank in range(3):
        share = [uniforms(Sampling(max_tokens=3, seed=4, place=rank, stride=3), i) for i in range(len(whole[rank::3]))]
        np.testing.assert_array_equal(share, whole[rank::3])


def test_prompts_without_repetition() -> None:
    a, b, c = (np.array(tokens, np.int32) for tokens in ([5, 6], [7], [5, 6, 0]))
    asked, which = distinct([b, a, a.copy(), c, b])
    assert [p.tolist() for p in asked] == [[7], [5, 6], [5, 6, 0]]
    assert which.tolist() == [0, 1, 1, 2, 0]
