"""Batched sampling with transformers' `generate`: left padding, a key/value cache that answers to one prompt share, our own choice of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upo.backend import Sampling
from upo.data.forest import Tokens
from upo.sampling import distinct, pick, uniforms
from upo_torch.model import Model
from upo_torch.state import to_numpy

if TYPE_CHECKING:
    from transformers import DynamicCache


@torch.no_grad()
def generate(model: Model, prompts: Sequence[Tokens], sampling: Sampling, stops: Sequence[int]) -> list[Tokens]:
    """Continuations in the order of the prompts, each without the stop token that ended it.

    Prompts of like length share a batch, equal ones side by side. Each prompt has a stream of random numbers of its own, named by its place in `prompts`, so a
    text does not depend on which others share its batch (but for rounding). torch's own generators are not touched.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i].tobytes()))
    done: dict[int, Tokens] = {}
    for start in range(0, len(order), sampling.batch_size):
        batch = order[start : start + sampling.batch_size]
        uniform = np.stack([uniforms(sampling, i) for i in batch])
        done |= zip(batch, _generate(model, [prompts[i] for i in batch], sampling, stops, uniform), strict=True)
    return [done[i] for i in range(len(prompts))]


def _generate(model: Model, prompts: Sequence[Tokens], sampling: Sampling, stops: Sequence[int], uniform: np.ndarray) -> list[Tokens]:
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    asked, which = distinct(prompts)
    rows, masks = (np.zeros((len(asked), width), np.int64) for _ in range(2))
    for row, prompt in enumerate(asked):
        rows[row, width - len(prompt) :], masks[row, width - len(prompt) :] = prompt, 1
    ids, mask = (torch.from_numpy(array).to(model.device) for array in (rows, masks))
    index = torch.from_numpy(which).to(model.device)
    cache = _computed(model, ids[:, :-1], mask[:, :-1], index) if len(asked) < len(prompts) and width > 1 else None
    net: Any = model.net
    net.generation_config = GenerationConfig(  # what a model folder adds here (repetition penalties, ...) is not ours to apply
        do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=list(stops) or None, pad_token_id=0, return_dict_in_generate=False
    )
    # The head gets the last position of each prompt as a strided view, for which torch's bfloat16 product on a CPU takes 600 times as long.
    dense = net.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        output = net.generate(
            input_ids=ids[index],
            attention_mask=mask[index],
            past_key_values=cache,  # but for the last tokens
            logits_processor=[_Choose(sampling, uniform, width)],
        )
    finally:
        dense.remove()
    return [_cut(row, stops) for row in output[:, width:].cpu().numpy()]


def _computed(model: Model, ids: torch.Tensor, mask: torch.Tensor, which: torch.Tensor) -> DynamicCache | None:
    """The keys and values of these prompts [U, T], for the rows `which` [B]; None for a model that keeps something else of them."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    takes = signature(model.decoder.forward).parameters
    cache = DynamicCache(config=model.net.config)
    if "past_key_values" not in takes or not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None  # subclasses also keep states, of which rows would not be taken
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if "position_ids" in takes else {}  # some families find them in the mask
    model.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions)
    cache.batch_select_indices(which)
    return cache


def _cut(tokens: np.ndarray, stops: Sequence[int]) -> Tokens:
    ends = np.flatnonzero(np.isin(tokens, np.asarray(stops)))
    return tokens[: ends[0] if len(ends) else len(tokens)].astype(np.int32)


class _Choose:
    """Leaves one token with a finite score, the sampled one, so that greedy decoding takes it."""

    def __init__(self, sampling: Sampling, uniform: np.ndarray, width: int) -> None:
        self.sampling, self.uniform, self.width = sampling, uniform, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.sampling.temperature == 0:
            return scores
        drawn = self.uniform[:, input_ids.shape[1] - self.width]
        chosen = pick(to_numpy(scores), self.sampling.temperature, self.sampling.top_p, drawn)
        return torch.full_like(scores, -torch.inf).scatter(-1, torch.from_numpy(chosen).to(scores.device)[:, None], 0.0)
