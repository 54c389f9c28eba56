"""Attention over a packed forest, for stock transformers models: a token sees its own prompt and its own completion, nothing else.

transformers lets one register an attention function and the function that makes its masks, by name. Ours is put in force for one
forward pass (and its recomputation) at a time, so generation and padded rows keep the model's own. The mask function is given what a
layer may see as a function of two positions (causal, sliding window, chunks) and returns a `Plan` in place of a tensor, which the model
hands to its layers as it would a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from upo.data.packed import Packed, Tree

try:
    from torch.nn.attention.varlen import varlen_attn

    _options = set(signature(varlen_attn).parameters)
    if "window_size" not in _options:
        varlen_attn = None
except ImportError:  # an older torch
    varlen_attn, _options = None, set()
try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional: upo[flash]
    flash_attn_varlen_func = None

NAME = "upo_forest"
PART = 512  # queries: a masked call computes all of its scores, so of a completion as long as its prompt a quarter would be for nothing
Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # positions [q, 1] and [1, k] -> bool [q, k], for tokens of one text


class Unshareable(Exception):
    """A model asks for something that the packed layout does not honour; the message says what."""


@dataclass(frozen=True)
class Block:
    """Queries of a tree, next in order, and what they see."""

    queries: int
    keys: tuple[int, ...]  # indices into the tree's segments (prompt, completions), side by side; the first of them, if the mask has fewer
    mask: torch.Tensor | None  # [queries, keys] float32, 0 or -inf; None: square and causal


@dataclass
class Plan:
    """How to attend in one kind of layer."""

    lay: Callable[[], list[tuple[tuple[int, ...], list[Block]]]]
    varlen: Varlen | None
    calls: int = 0

    @cached_property
    def trees(self) -> list[tuple[tuple[int, ...], list[Block]]]:
        """For each tree its segments' lengths and its blocks; made where no kernel takes all segments at once."""
        return self.lay()


@dataclass(frozen=True)
class Varlen:
    """The same for a kernel that takes all segments at once: queries in their order, keys gathered."""

    keys: torch.Tensor  # [K] places of the keys
    ends_q: torch.Tensor  # [segments + 1] int32
    ends_k: torch.Tensor
    longest: tuple[int, int]
    window: tuple[int, int]  # positions seen to the left and right; -1: all


# --- What is seen ---------------------------------------------------------------------------------------------------------------------


def plan(trees: tuple[Tree, ...], sees: Sees, window: int | None, device: torch.device) -> Plan:
    """The plan for layers in which a token sees what `sees` says of its own text. `window` is the kind of layer's, if it has one."""
    line = torch.arange(max(tree.prompt + max(tree.completions, default=0) for tree in trees), dtype=torch.int32, device=device)
    seen, distance = sees(line[:, None], line[None]), line[:, None] - line
    kind = "other"
    if window is not None and bool((seen == (distance >= 0) & (distance < window)).all()):
        kind = "window"
    if bool((seen == (distance >= 0)).all()):
        kind = "causal"

    def blocks(tree: Tree) -> list[Block]:  # without the tables above, which grow with the square of the length
        own = line[: tree.prompt + max(tree.completions, default=0)]
        causal = kind == "causal" or bool((sees(own[:, None], own[None]) == (own[:, None] >= own[None])).all())
        return _blocks(tree, sees, causal, device)

    return Plan(
        lambda: [((tree.prompt, *tree.completions), blocks(tree)) for tree in trees],
        _varlen(trees, kind, window, device) if device.type == "cuda" else None,
    )


def _blocks(tree: Tree, sees: Sees, causal: bool, device: torch.device) -> list[Block]:
    positions, branches = (torch.from_numpy(a).to(device) for a in (tree.positions(), tree.branches()))

    def block(rows: slice, segments: tuple[int, ...]) -> Block:
        columns = torch.isin(branches, torch.tensor(segments, device=device))
        if causal:
            columns[rows.stop :] = False
        seen = sees(positions[rows, None], positions[None, columns])
        seen &= (branches[None, columns] == 0) | (branches[None, columns] == branches[rows, None])
        mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
        return Block(rows.stop - rows.start, segments, mask)

    prompt, tokens, n = tree.prompt, tree.tokens, len(tree.completions)
    if n <= 1 and causal:
        return [Block(tokens, tuple(range(n + 1)), None)]
    first = Block(prompt, (0,), None) if causal else block(slice(0, prompt), (0,))
    if n == 0:
        return [first]
    # All completions in one call compute scores between them for nothing. Where those outweigh half of the scores with the prompt, a
    # call for each is faster (measured on a CPU: 1.3 times for 4 completions of 200 tokens; 0.8 times for 2 of 40 after 300).
    answers = tokens - prompt
    if answers**2 - sum(c * c for c in tree.completions) <= answers * prompt / 2:
        return [first, block(slice(prompt, tokens), tuple(range(n + 1)))]
    ends = [*accumulate(tree.completions, initial=prompt)]
    return [first, *(block(rows, (0, i + 1)) for i, (a, b) in enumerate(pairwise(ends)) for rows in _parts(a, b))]


def _parts(start: int, stop: int) -> list[slice]:
    """The queries of a completion in parts, none of which need the keys of a later one."""
    return [slice(a, min(a + PART, stop)) for a in range(start, stop, PART)]


def _varlen(trees: tuple[Tree, ...], kind: str, window: int | None, device: torch.device) -> Varlen | None:
    """Segments [prompt, first completion], then each further completion, whose keys are the prompt's and its own.

    None where a layer sees otherwise than causally, perhaps through one window. A causal kernel lines up the last query with the last key.
    """
    if kind == "other":
        return None
    keys, queries, sizes, at = [], [], [], 0
    for tree in trees:
        head = tree.prompt + sum(tree.completions[:1])
        keys.append(torch.arange(at, at + head))
        queries.append(head)
        sizes.append(head)
        end = at + head
        for n in tree.completions[1:]:
            keys += [torch.arange(at, at + tree.prompt), torch.arange(end, end + n)]
            queries.append(n)
            sizes.append(tree.prompt + n)
            end += n
        at = end
    ends = [torch.tensor([0, *accumulate(s)], dtype=torch.int32, device=device) for s in (queries, sizes)]
    left = window - 1 if window is not None and kind == "window" else -1
    return Varlen(torch.cat(keys).to(device), ends[0], ends[1], (max(queries), max(sizes)), (left, 0))


# --- Attending ------------------------------------------------------------------------------------------------------------------------

# What layers pass on that changes nothing here: the first two are in the mask already, positions in queries and keys.
HARMLESS = {"sliding_window", "is_causal", "position_ids", "position_embeddings"}
# Queries in the mean block of a tree from which 16 bits are no slower than float32 on a CPU: forward they are 2 to 3 times as fast at any
# length, backward one block of 40 queries and 155 keys takes 3 times as long, 256 and 512 the same, 1024 and 2048 four fifths.
LONG_BLOCK = 256


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D], contiguous.

    Raises Unshareable for an argument that would change the result and is not known here.
    """
    if not isinstance(attention_mask, Plan):
        raise Unshareable(f"{type(module).__name__} makes an attention mask of its own")
    unknown = [name for name, given in others.items() if name not in HARMLESS and given is not None and given is not False]
    if unknown or dropout:
        raise Unshareable(f"{type(module).__name__} passes {', '.join(unknown or ['dropout'])} to its attention")
    attention_mask.calls += 1
    dtype, plain = value.dtype, softcap is None and s_aux is None
    if s_aux is None and (kernel := _kernel(attention_mask, query, value, softcap)):
        return _by_kernel(kernel, attention_mask, query, key, value, scaling, softcap), None
    sizes = [sum(segments) for segments, _ in attention_mask.trees]
    out = []
    for (segments, blocks), q, k, v in zip(attention_mask.trees, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        if query.device.type == "cpu" and sum(segments) < LONG_BLOCK * len(blocks):
            q, k, v = q.float(), k.float(), v.float()
        ks, vs = k.split(segments, 2), v.split(segments, 2)
        for block, part in zip(blocks, q.split([b.queries for b in blocks], 2), strict=True):
            whole = len(block.keys) == len(segments)
            keys, values = (k, v) if whole else (_beside(ks, block.keys), _beside(vs, block.keys))
            if block.mask is not None:
                keys, values = (x[:, :, : block.mask.shape[1]] for x in (keys, values))
            if plain:
                out.append(_fused(part, keys, values, block.mask, scaling))
            else:
                out.append(_by_hand(part, keys, values, block.mask, scaling, softcap, s_aux))
    return torch.cat([part.to(dtype) for part in out], 2).transpose(1, 2).contiguous(), None


def _beside(parts: tuple[torch.Tensor, ...], chosen: tuple[int, ...]) -> torch.Tensor:
    return parts[chosen[0]] if len(chosen) == 1 else torch.cat([parts[i] for i in chosen], 2)


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    # On GPUs a mask together with grouped heads means the slow kernel. On a CPU the backward pass gives each thread whole key heads, of which
    # there may be fewer than threads: of long rows (16 bits) 3 key heads for 9 took 16 % longer than 9, of short ones 15 % less.
    if query.device.type != "cpu" or query.dtype != torch.float32:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    grouped, mask = query.shape[1] != key.shape[1], None if mask is None else mask.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)


def _by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """With a soft cap on the scores, or a sink for each head that takes its share of the softmax; memory grows with the square of the length."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.full(scores.shape[2:], -torch.inf, device=scores.device).triu(1)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(scores, -1)[..., : key.shape[2]].to(value.dtype) @ value


def _kernel(plan: Plan, query: torch.Tensor, value: torch.Tensor, softcap: float | None) -> str:
    """Which kernel takes all segments at once: `torch`'s own, else `flash`-attn's where it is installed, which knows soft caps; "" for none.

    Both ask for 16 bits, heads of one size and an Ampere GPU or a later one.
    """
    size = query.shape[-1]
    if plan.varlen is None or query.dtype == torch.float32 or not size == value.shape[-1] <= 256:
        return ""
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return ""
    if varlen_attn is not None and softcap is None and size % 8 == 0:
        return "torch"
    return "" if flash_attn_varlen_func is None else "flash"


def _by_kernel(
    kernel: str, plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, softcap: float | None = None
) -> torch.Tensor:
    at = plan.varlen
    assert at is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    segments = q.contiguous(), k[at.keys], v[at.keys], at.ends_q, at.ends_k, *at.longest
    if kernel == "torch":
        grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _options else {}
        if not grouped:  # torch 2.11: every query head wants a key head of its own
            segments = q.contiguous(), *(x[at.keys].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)), *segments[3:]
        out = varlen_attn(*segments, scale=scale, window_size=at.window, **grouped)
    else:
        out = flash_attn_varlen_func(*segments, softmax_scale=scale, causal=True, window_size=at.window, softcap=softcap or 0.0)
    return out[None].contiguous()


# --- In force -------------------------------------------------------------------------------------------------------------------------


class Attention:
    """Switches a decoder to `attend` for the passes over a packed forest."""

    def __init__(self, decoder: nn.Module) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self._configs: list[Any] = list({id(c): c for m in decoder.modules() if (c := getattr(m, "config", None)) is not None}.values())
        self._trees: tuple[Tree, ...] | None = None
        self.plans: list[Plan] = []
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, _mask)

    @contextmanager
    def over(self, forest: Packed) -> Iterator[None]:
        """One forward pass over this forest inside the block; `plans` are the ones it has made, afterwards."""
        global _now
        self._trees, self.plans = forest.trees, []
        before, _now = _now, self
        try:
            with self._switched():
                yield
        finally:
            self._trees, _now = None, before

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: around a layer's forward pass, and around its recomputation in the backward pass."""
        return nullcontext(), nullcontext() if self._trees is None else self._switched()

    @contextmanager
    def _switched(self) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = NAME
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name

    def plan(self, sees: Sees, window: int | None, device: torch.device) -> Plan:
        assert self._trees is not None
        self.plans.append(plan(self._trees, sees, window, device))
        return self.plans[-1]


_now: Attention | None = None


def _mask(*, mask_function: Any, device: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **_: Any) -> Plan:
    """transformers' mask interface. A mask that depends on more than two positions of one text is refused."""
    if _now is None or not allow_is_causal_skip:
        raise Unshareable("its attention mask depends on more than positions")
    zero = torch.zeros((), dtype=torch.long, device=device)
    return _now.plan(lambda q, k: mask_function(zero, zero, q, k), local_size, torch.device(device))
