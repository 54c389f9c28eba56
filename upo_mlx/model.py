"""A frozen mlx-lm model with LoRA layers of our own: loading, targets, hidden states, head, recomputation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_map_with_path

from upo.adapters import Adapter, lora_name
from upo.errors import ModelError
from upo.models import NOT_FINITE, model_config
from upo.repair import for_mlx
from upo_mlx.device import mx, nn
from upo_mlx.exp import quick_silu
from upo_mlx.family import check_rope, window_notes
from upo_mlx.recompute import Recomputed, lend
from upo_mlx.state import import_arrays

Array = mx.array
EXPERTS = ("SwitchLinear", "QuantizedSwitchLinear")  # mlx-lm's layers of all experts of a block, each in a module of that block
ROUTERS = ("gate", "router", "router.layer")  # what a block calls the layer that chooses among them
HEADS = {"lm_head", "embed_out", "output"}  # names of an output layer, where a family keeps it inside the decoder


class LoRALinear(nn.Module):
    """y = W x + scale * B (A x), with mlx-lm's attribute names. Without matrices it is the plain layer.

    Scaled and added inside the second product, which saves two passes over an array of the size of y, and two in the backward pass.
    The float32 masters are cast to the dtype of x for the products; mlx-lm's own layer computes in float32, at 1.4 times the memory.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a: Array | None = None  # [in, r]
        self.lora_b: Array | None = None  # [r, out]
        self.scale = 0.0

    def __call__(self, x: Array) -> Array:
        y = self.linear(x)
        if self.lora_a is None or self.lora_b is None:
            return y
        return mx.addmm(y, x @ self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype), alpha=self.scale)

    @property
    def dims(self) -> tuple[int, int]:
        """(in, out) of the wrapped layer, quantised or not."""
        out, columns = self.linear.weight.shape
        return (columns * 32 // self.linear.bits if "scales" in self.linear else columns), out


@dataclass(frozen=True)
class LoRA:
    """Arrays of an adapter by PEFT parameter name, in MLX's orientation ([in, r], [r, out]), and its scale. Empty: the base."""

    arrays: Mapping[str, Array]
    scale: float


BASE = LoRA({}, 0.0)


class Model:
    """The network: `net` as mlx-lm built it, `inner` its decoder (ids -> hidden states after the final norm), `loras` by module path.

    Adapter weights are never kept in the layers: `using` lends them for a while, so one network serves policy and reference, and a
    gradient is taken with respect to arrays that are arguments.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.loras: dict[str, LoRALinear] = {}
        layers = list(net.layers)
        paths = {id(module): path for path, module in net.named_modules()}
        self.layer_paths = [paths.get(id(layer), "") for layer in layers]
        stem = self.layer_paths[0].rpartition(".")[0]
        self._inner_path, _, self._list_name = stem.rpartition(".")
        if not self._inner_path or self.layer_paths != [f"{stem}.{i}" for i in range(len(layers))]:
            raise ModelError(f"model: the decoder of {net.__class__.__module__} has a structure that the MLX backend does not know. Use --backend torch.")
        parent, _, self._inner_name = self._inner_path.rpartition(".")
        self._parent = _at_path(net, parent)
        self.inner: nn.Module = self._parent[self._inner_name]

    def linears(self) -> dict[str, nn.Module]:
        """Every linear layer of the decoder but head, embeddings and routers, by path; of a wrapped one, the layer beneath.

        A router is a linear layer in mlx-lm, in transformers it is none, so PEFT does not count it among them.
        """
        found: dict[str, nn.Module] = {}
        modules = dict(self.net.named_modules())
        blocks = {path.rsplit(".", 2)[0] for path, module in modules.items() if type(module).__name__ in EXPERTS}
        routers = {f"{block}.{name}" for block in blocks for name in ROUTERS}
        for path, module in modules.items():
            head = path.rpartition(".")[2] in HEADS and not path.startswith(f"{self._inner_path}.{self._list_name}.")
            if path.startswith(f"{self._inner_path}.") and not head and path not in routers and isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                outer = path.removesuffix(".linear")
                found[outer if outer in self.loras else path] = module
        return dict(sorted(found.items()))

    def dims(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every linear layer of the decoder layers, by path."""
        return {path: LoRALinear(layer).dims for path, layer in self.linears().items()}

    def add_loras(self, paths: Sequence[str]) -> None:
        """Wrap the linear layers at these paths, where they are not wrapped yet."""
        linears = self.linears()
        for path in paths:
            if path not in self.loras:
                parent, _, name = path.rpartition(".")
                layer = LoRALinear(linears[path])
                layer.freeze()
                _put(_at_path(self.net, parent), name, layer)
                self.loras[path] = layer

    @contextmanager
    def using(self, adapter: LoRA) -> Iterator[None]:
        """Compute with this adapter inside the block; the layers it does not name are plain."""
        before = [(layer, layer.lora_a, layer.lora_b, layer.scale) for layer in self.loras.values()]
        try:
            for path, layer in self.loras.items():
                lend(layer, adapter.arrays.get(lora_name(path, "A")), adapter.arrays.get(lora_name(path, "B")), adapter.scale)
            with quick_silu():
                yield
        finally:
            for state in before:
                lend(*state)

    @contextmanager
    def recomputing(self, on: bool = True) -> Iterator[None]:
        """Gradient checkpointing inside the block, if `on`: each decoder layer keeps its input and is run again in the backward pass."""
        if not on:
            yield
            return
        layers = self.inner[self._list_name]
        owned = [[lora for path, lora in self.loras.items() if path.startswith(f"{layer}.")] for layer in self.layer_paths]
        try:
            self.inner[self._list_name] = [Recomputed(layer, loras) for layer, loras in zip(layers, owned, strict=True)]
            yield
        finally:
            self.inner[self._list_name] = layers

    def hidden(self, ids: Array, cache: Any = None) -> Array:
        """[B, T, H] after the final norm, for token ids [B, T] under a causal mask."""
        return self.inner(ids, cache=cache)

    def head(self, hidden: Array) -> Array:
        """float32 logits [m, V] of hidden states [m, H]: the family's own head, with its soft cap or scale, tied or not, quantised or not."""
        given = _Given(self.inner)
        try:
            self._parent[self._inner_name] = given
            return self.net(hidden[None])[0].astype(mx.float32)
        finally:
            self._parent[self._inner_name] = self.inner

    def check(self) -> None:
        """Raise ModelError unless decoder and head put together give the network's own logits on a short sequence."""
        ids = mx.arange(2, 9)[None]
        try:
            own = self.net(ids)[0].astype(mx.float32)
            ours = self.head(self.hidden(ids)[0])
            difference, size = (float(np.array(mx.abs(x).max())) for x in (own - ours, own))
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise ModelError(f"model: {self.net.__class__.__module__} cannot be split into decoder and head ({error}). Use --backend torch.") from None
        if not np.isfinite(size):
            raise ModelError(f"model: {NOT_FINITE}")
        if not difference <= 1e-3 * max(size, 1.0):
            raise ModelError(
                f"model: self-check failed: the logits of {self.net.__class__.__module__} differ by {difference:.2g} from those of its decoder "
                f"and head put together (largest logit {size:.2g}). Use --backend torch."
            )


class _Given:
    """Stands for the decoder while the head is computed: returns the hidden states it is given."""

    def __init__(self, inner: nn.Module) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, hidden: Array, *args: Any, **kwargs: Any) -> Array:
        return hidden


def _at_path(module: Any, path: str) -> Any:
    for part in path.split(".") if path else []:
        module = module[int(part)] if isinstance(module, list) else module[part]
    return module


def _put(parent: Any, name: str, layer: nn.Module) -> None:
    parent[int(name) if isinstance(parent, list) else name] = layer


def load_base(folder: Path, dtype: Any, tokens: int = 0) -> tuple[nn.Module, list[str]]:
    """The frozen network of a folder that `upo.models.resolve` has checked, with its rope configuration repaired for sequences of up to
    `tokens`; and notes.

    Every float array is cast to `dtype`, but for those a family keeps in float32; scales of quantised layers too, as MLX computes in
    their dtype. Raises ModelError.
    """
    from mlx_lm.utils import load_model

    config, notes = model_config(folder)
    config, rope_notes = for_mlx(config, tokens)
    try:
        net, _ = load_model(folder, model_config=config)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        misfit = "Is the download complete, and config.json this model's? If so, u" if reason.startswith(("Missing ", "Expected shape ")) else "U"
        raise ModelError(f"{folder}: mlx-lm cannot load this model ({reason}). {misfit}se --backend torch, or another model.") from None
    check_rope(folder, net, config)
    castable = getattr(net, "cast_predicate", lambda path: True)
    net.update(tree_map_with_path(lambda path, a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) and castable(path) else a, net.parameters()))
    net.freeze()
    net.eval()
    mx.eval(net.parameters())
    return net, [*notes, *rope_notes, *window_notes(net, config, tokens)]


def has_experts(model: Model) -> bool:
    """Whether tokens are sent to experts, each a slice of one three-dimensional weight."""
    return any(type(m).__name__ in EXPERTS for _, m in model.net.named_modules())


def family_notes(model: Model) -> list[str]:
    """What a user should know about where the adapter sits."""
    notes = []
    if not model.layer_paths[0].startswith("model.layers."):
        notes.append(f"adapter: decoder layers are called {model.layer_paths[0]} in mlx-lm; other tools may expect other names for this family.")
    if has_experts(model):
        notes.append("adapter: the experts of this mixture-of-experts model and what chooses among them carry no adapter; its other linear layers do.")
    return notes


def lora_from(adapter: Adapter) -> LoRA:
    """An adapter read from disk, for `Model.using`."""
    return LoRA(import_arrays(adapter.arrays), adapter.scale)

