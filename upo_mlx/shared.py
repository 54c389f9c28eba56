"""How token rows are laid out and computed: padded, or each prompt once through the key/value cache of stock mlx-lm models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from upo.data.forest import Forest, Layout, padded
from upo.data.two_phase import TwoPhase, two_phase
from upo_mlx.device import mx
from upo_mlx.model import Model
from upo_mlx.recompute import Carrier

Array = mx.array


class Rows(Protocol):
    """A layout by its name in `upo.data.forest.SIZES`, and the hidden states it points into."""

    name: str

    def lay(self, forest: Forest) -> Any:
        """The forest's token rows and the places of its scores."""
        ...

    def hidden(self, model: Model, layout: Any) -> Array:
        """[slots, H] after the final norm; differentiable."""
        ...


class PaddedRows:
    """One row per completion, prompt included."""

    name = "padded"

    def lay(self, forest: Forest) -> Layout:
        return padded(forest)

    def hidden(self, model: Model, layout: Layout) -> Array:
        return _flat(model.hidden(mx.array(layout.ids)))


@dataclass
class SharedPrompts:
    """Prompts first; then the completions, each reading the keys and values of its prompt.

    `axes` is the number of axes of the attention scores: 4, or 5 in a family that gives query heads of one key head an axis of their
    own. `asked` collects the windows for which the model has asked for a mask of completions (None: no window).
    """

    axes: int = 4
    asked: set[int | None] = field(default_factory=set)
    name = "two_phase"

    def lay(self, forest: Forest) -> TwoPhase:
        return two_phase(forest)

    def hidden(self, model: Model, layout: TwoPhase) -> Array:
        prompts = [PromptCache() for _ in model.layer_paths]
        h = _flat(model.hidden(mx.array(layout.ids), prompts))
        if not layout.rows.size:
            return h
        ground = Ground(mx.array(layout.offset), mx.array(layout.keys), layout.rows.shape[1], self)
        completions = [CompletionCache(cache.arrays, ground) for cache in prompts]
        return mx.concatenate([h, _flat(model.hidden(mx.array(layout.rows), completions))])


class PromptCache(Carrier):
    """In place of a layer's cache while prompts are computed: hands keys and values through and keeps them.

    It has no `make_mask`, so the mask is the model's own for a batch without a cache: causal, padding on the right needs no other.
    """

    offset = 0

    def update_and_fetch(self, keys: Array, values: Array) -> tuple[Array, Array]:
        self.arrays = keys, values
        return keys, values


@dataclass(frozen=True)
class Ground:
    """What the completions of a batch stand on, equal in every layer."""

    offset: Array  # [N] tokens of the prompt
    keys: Array  # [N, W] slots that a completion attends to (`TwoPhase.keys`)
    width: int  # T, the width of the completions
    shared: SharedPrompts

    def mask(self, window: int | None) -> Array:
        """[N, 1, T, W] bool: a token sees itself and what is before it, of that only the last `window` positions, if given."""
        position = self.offset[:, None] + mx.arange(self.width)[None]
        past = position[:, :, None] - mx.arange(self.keys.shape[1])[None, None]
        mask = past >= 0
        if window is not None:
            mask = mask & (past < window)
        return mask.reshape(mask.shape[0], *(1,) * (self.shared.axes - 3), *mask.shape[1:])

    def join(self, prompts: Array, completions: Array) -> Array:
        """[N, heads, W, d]: what each completion attends to, from keys or values of prompts [R, heads, L, d] and of completions [N, heads, T, d]."""
        heads, size = completions.shape[1], completions.shape[3]
        slots = mx.concatenate([a.transpose(0, 2, 1, 3).reshape(-1, heads, size) for a in (prompts, completions)])
        return slots[self.keys].transpose(0, 2, 1, 3)


class CompletionCache(Carrier):
    """In place of a layer's cache while completions are computed: puts each one's prompt before its keys and values.

    Written to by nothing, so that a layer which is run again sees the same. `offset` is one position per row, as in mlx-lm's caches for
    batched generation. A prompt is copied for its completions inside the layer, and not kept.
    """

    def __init__(self, arrays: tuple[Array, ...], ground: Ground) -> None:
        self.arrays, self.ground, self.offset = arrays, ground, ground.offset

    def update_and_fetch(self, keys: Array, values: Array) -> tuple[Array, Array]:
        return self.ground.join(self.arrays[0], keys), self.ground.join(self.arrays[1], values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Array:
        self.ground.shared.asked.add(window_size)
        return self.ground.mask(window_size)


def _flat(hidden: Array) -> Array:
    return hidden.reshape(-1, hidden.shape[-1])
