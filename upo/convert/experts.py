"""Mixture-of-experts weights: peft adapts one stacked parameter of gate and up, mlx-lm (and peft before transformers 5) each on its own.

peft stores [E, r, in] as [r * E, in], experts outermost, and [E, out, r] as [out, r * E], experts innermost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from upo.convert.adapter import Module, Tensor, joined, rescaled, zeros_like
from upo.convert.base import Base
from upo.convert.families import EXPERTS, Experts
from upo.errors import ModelError

FUSED = ("gate_up_proj", "down_proj")  # peft's order, inside out
_OLD_NAMES = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ONE_EXPERT = re.compile(r"(?P<layer>.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(?P<index>\d+)\.(?P<name>\w+)")


def layout(where: str, base: Base) -> Experts:
    """Where the base keeps its experts. Raises ModelError for a family that cannot be carried, or an unknown one."""
    if base.model_type is None:
        raise ModelError(f"{where}: adapts mixture-of-experts weights, whose names and arrangement depend on the model. Name it: --base MODEL.")
    if base.model_type not in EXPERTS:
        raise ModelError(f"{where}: adapts the experts of {base.model_type}, which cannot be carried; those of {', '.join(sorted(EXPERTS))} can.")
    return EXPERTS[base.model_type]


def is_router(path: str, base: Base) -> bool:
    """Whether this module of transformers is a router, whose weight peft takes as a bare parameter."""
    found = EXPERTS.get(base.model_type or "")
    return found is not None and found.hf_router is not None and path.endswith(f".{found.hf_router}")


def from_peft(
    where: str, stacked: Mapping[str, Mapping[str, Tensor]], targets: Sequence[str], of: Callable[[str, str], tuple[int, float]], base: Base
) -> dict[str, Module]:
    """Modules gate_proj, up_proj and down_proj of the parameters that `target_parameters` names.

    `stacked` has the tensors by path; two parameters of one module are nested, `<path>` around `<path>.base_layer`.
    """
    modules: dict[str, Module] = {}
    for path in sorted({path.removesuffix(".base_layer") for path in stacked}):
        place = layout(f"{where}: {path}", base)
        if not path.endswith(f".{place.hf}"):
            raise ModelError(f"{where}: {path}: {base.model_type} keeps no experts there. It cannot be carried.")
        names = [name for name in FUSED if any(f".{path}.{name}".endswith(f".{target}") for target in targets)]
        nested = [stacked[p] for p in (f"{path}.base_layer", path) if p in stacked]
        if len(names) != len(nested):
            raise ModelError(f"{where}: {path}: target_parameters names {len(names)} of its parameters ({', '.join(names) or 'none'}), the weights are for {len(nested)}.")
        for name, parts in zip(names, nested, strict=True):
            if set(parts) != {"A", "B"}:
                raise ModelError(f"{where}: {path}.{name}: needs lora_A and lora_B, has {', '.join(sorted(parts))}.")
            rank, scale = of(where, f"{path}.{name}")
            module = _unstacked(f"{where}: {path}.{name}", parts["A"], parts["B"], rank, scale, base)
            width = module.a.shape[-1] if name == "gate_up_proj" else module.b.shape[1]
            if base.hidden is not None and width != base.hidden:
                raise ModelError(f"{where}: {path}.{name}: A {list(parts['A'].shape)} and B {list(parts['B'].shape)} do not fit a model of width {base.hidden}. Older versions of peft had the two the other way round; today's cannot load such a file either.")
            modules |= _halves(f"{where}: {path}", path, module) if name == "gate_up_proj" else {f"{path}.{name}": module}
    return modules


def _unstacked(where: str, a: Tensor, b: Tensor, rank: int, scale: float, base: Base) -> Module:
    count, rest = divmod(a.shape[0], rank)
    if len(a.shape) != 2 or len(b.shape) != 2 or rest or b.shape[1] != a.shape[0] or (base.experts is not None and count != base.experts):
        raise ModelError(f"{where}: A {list(a.shape)} and B {list(b.shape)} do not fit rank {rank} and {base.experts or 'any number of'} experts.")
    into, out = a.shape[1], b.shape[0]
    return Module("experts", a.moved(lambda x: x.reshape(count, rank, into)), b.moved(lambda x: x.reshape(out, rank, count).transpose(2, 0, 1)), scale)


def _halves(where: str, path: str, fused: Module) -> dict[str, Module]:
    """gate and up of a fused parameter. They share A, unless the columns of B fall into two blocks: then each has its own part."""
    half, rest = divmod(fused.b.shape[1], 2)
    if rest:
        raise ModelError(f"{where}.gate_up_proj: B has {fused.b.shape[1]} rows for gate and up together; that is an odd number.")
    gate, up = (fused.b.moved(lambda x, part=part: x[:, part]) for part in (slice(0, half), slice(half, None)))  # type: ignore[misc]
    used = [np.flatnonzero(part.raw.any(axis=(0, 1))) for part in (gate, up)]
    a = (fused.a, fused.a)
    if len(used[0]) and len(used[1]) and used[0][-1] < used[1][0]:
        middle = fused.rank // 2
        cut = middle if used[0][-1] < middle <= used[1][0] else int(used[0][-1]) + 1
        a = (fused.a.moved(lambda x: x[:, :cut]), fused.a.moved(lambda x: x[:, cut:]))
        gate, up = gate.moved(lambda x: x[..., :cut]), up.moved(lambda x: x[..., cut:])
    return {f"{path}.gate_proj": replace(fused, a=a[0], b=gate), f"{path}.up_proj": replace(fused, a=a[1], b=up)}


def fused(modules: Mapping[str, Module]) -> dict[str, Module]:
    """The experts among these modules as peft's parameters `<path>.gate_up_proj` and `<path>.down_proj`.

    Where gate and up have an A of their own, the fused rank is the sum of theirs and B block-diagonal.
    """
    result: dict[str, Module] = {}
    for path in sorted({path.rpartition(".")[0] for path, module in modules.items() if module.kind == "experts"}):
        gate, up = modules.get(f"{path}.gate_proj"), modules.get(f"{path}.up_proj")
        if gate or up:
            result[f"{path}.gate_up_proj"] = _stacked(gate, up)
        if down := modules.get(f"{path}.down_proj"):
            result[f"{path}.down_proj"] = down
    return result


def _stacked(gate: Module | None, up: Module | None) -> Module:
    first = gate or up
    assert first is not None
    second = rescaled(up if gate and up else first, first.scale)
    if first.a.same(second.a):
        nothing = zeros_like(first.b, first.b.shape)
        return replace(first, b=joined([gate.b if gate else nothing, second.b if up else nothing], 1))
    upper = joined([first.b, zeros_like(first.b, (*first.b.shape[:2], second.rank))], -1)
    lower = joined([zeros_like(second.b, (*second.b.shape[:2], first.rank)), second.b], -1)
    return replace(first, a=joined([first.a, second.a], -2), b=joined([upper, lower], 1))


def to_peft(parameters: Mapping[str, Module]) -> dict[str, Tensor]:
    """Tensors of fused experts by peft's name, nested as peft nests them."""
    arrays = {}
    for path, module in parameters.items():
        owner, _, name = path.rpartition(".")
        if name == "gate_up_proj" and f"{owner}.down_proj" in parameters:
            owner += ".base_layer"
        arrays[f"{owner}.lora_A.weight"] = module.a.moved(lambda x: x.reshape(-1, x.shape[-1]))
        arrays[f"{owner}.lora_B.weight"] = module.b.moved(lambda x: x.transpose(1, 2, 0).reshape(x.shape[1], -1))
    return arrays


def gathered(where: str, modules: Mapping[str, Module], base: Base) -> dict[str, Module]:
    """With adapters on single experts, as transformers had them before 5, stacked."""
    result: dict[str, Module] = {}
    groups: dict[str, dict[int, Module]] = {}
    for path, module in modules.items():
        match = _ONE_EXPERT.fullmatch(path)
        if match and match["name"] in _OLD_NAMES:
            place = layout(f"{where}: {path}", base)
            groups.setdefault(f"{match['layer']}.{place.hf}.{_OLD_NAMES[match['name']]}", {})[int(match["index"])] = module
        else:
            result[path] = module
    for path, group in groups.items():
        first = group[min(group)]
        count = base.experts or len(group)
        alike = all((m.a.shape, m.b.shape, m.scale, m.a.dtype, m.b.dtype) == (first.a.shape, first.b.shape, first.scale, first.a.dtype, first.b.dtype) for m in group.values())
        if sorted(group) != list(range(count)) or not alike or any(m.magnitude is not None for m in group.values()):
            raise ModelError(f"{where}: {path}: adapters on single experts can be carried where all {count} have one, plain and of the same shape and scale; here {len(group)} have.")
        a, b = (Tensor(t.dtype, np.stack([getattr(group[i], side).raw for i in range(count)])) for side, t in (("a", first.a), ("b", first.b)))
        result[path] = Module("experts", a, b, first.scale)
    return result
