"""Gradient checkpointing: a decoder layer keeps its inputs and is run again in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mlx.utils import tree_map

from upo_mlx.device import mx, nn
from upo_mlx.exp import quick_silu

Array = mx.array


class Carrier:
    """An argument of a decoder layer that holds arrays which take part in the gradient: given to the layer, or filled in by it."""

    arrays: tuple[Array, ...] = ()


class Recomputed:
    """Stands for a decoder layer.

    `mx.checkpoint` gives captured arrays no gradient, so everything that may need one is an argument: the LoRA matrices, every float
    array the decoder hands to the layer, and those in a carrier. In the same way what the layer leaves in a carrier is a result.
    """

    def __init__(self, layer: nn.Module, loras: Sequence[Any]) -> None:
        self._layer, self._loras = layer, loras

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        empty = _empty_carriers(args, kwargs)
        args, kwargs = tree_map(lambda v: _with_arrays(v, _arrays(v)), (args, kwargs))  # `call` must find them empty when it is run again
        floats: list[Array] = []
        tree_map(lambda v: floats.extend(_arrays(v)), (args, kwargs))
        scales = [lora.scale for lora in self._loras]

        def call(matrices: list[tuple[Any, Any]], x: Array, floats: list[Array]) -> Any:
            before = [(lora, lora.lora_a, lora.lora_b, lora.scale) for lora in self._loras]
            given = iter(floats)
            own_args, own_kwargs = tree_map(lambda v: _with_arrays(v, [next(given) for _ in _arrays(v)]), (args, kwargs))
            filled = _empty_carriers(own_args, own_kwargs)
            try:
                for lora, (a, b), scale in zip(self._loras, matrices, scales, strict=True):
                    lend(lora, a, b, scale)
                with quick_silu():  # the layer is run again after the block that it was run in
                    return self._layer(x, *own_args, **own_kwargs), [carrier.arrays for carrier in filled]
            finally:
                for state in before:
                    lend(*state)

        result, left = mx.checkpoint(call)([(lora.lora_a, lora.lora_b) for lora in self._loras], x, floats)
        for carrier, arrays in zip(empty, left, strict=True):
            carrier.arrays = tuple(arrays)
        return result


def lend(layer: Any, a: Array | None, b: Array | None, scale: float) -> None:
    """Let a LoRA layer compute with these matrices."""
    layer.lora_a, layer.lora_b, layer.scale = a, b, scale


def _arrays(value: Any) -> Sequence[Array]:
    """The arrays in an argument that may need a gradient."""
    if isinstance(value, Carrier):
        return value.arrays
    return [value] if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating) else []


def _with_arrays(value: Any, arrays: Sequence[Array]) -> Any:
    """The argument with these arrays in place of its own; of a carrier a copy, as layers write to it."""
    if not isinstance(value, Carrier):
        return arrays[0] if arrays else value
    other = copy.copy(value)
    other.arrays = tuple(arrays)
    return other


def _empty_carriers(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Carrier]:
    return [v for v in (*args, *kwargs.values()) if isinstance(v, Carrier) and not v.arrays]
