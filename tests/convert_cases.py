"""Adapter folders of both formats made with NumPy alone, and the deltas they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from upo import tensors
from upo.convert.adapter import Tensor, from_values

PREFIX = "base_model.model."
SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}  # of conftest's Llama
TARGETS = [f"model.layers.{layer}.{name}" for layer in range(2) for name in SHAPES]


def shape_of(path: str) -> tuple[int, int]:
    """(out, in); for the embedding (dim, vocab)."""
    return {"lm_head": (384, 64), "model.embed_tokens": (64, 384)}.get(path) or SHAPES[path.split(".", 3)[3]]


def draw(rng: np.random.Generator, *shape: int, dtype: str = "F32") -> Tensor:
    return from_values(rng.normal(size=shape) / 4, dtype)


def save(folder: Path, weights: str, arrays: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    tensors.write(folder / weights, {n: t.raw for n, t in arrays.items()}, dtypes={n: t.dtype for n, t in arrays.items()})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_folder(
    folder: Path, paths: list[str] | None = None, ranks: dict[str, int] | None = None, dtype: str = "F32", dora: bool = False, seed: int = 0, **config: Any
) -> Path:
    """A PEFT adapter of rank 4 and alpha 8 on these modules (TARGETS); `ranks` by path."""
    rng, arrays = np.random.default_rng(seed), {}
    for path in paths or TARGETS:
        rank, (out, into) = (ranks or {}).get(path, 4), shape_of(path)
        sides = ("lora_embedding_A", "lora_embedding_B") if "embed" in path else ("lora_A.weight", "lora_B.weight")
        arrays[f"{PREFIX}{path}.{sides[0]}"] = draw(rng, rank, into, dtype=dtype)
        arrays[f"{PREFIX}{path}.{sides[1]}"] = draw(rng, out, rank, dtype=dtype)
        if dora:
            arrays[f"{PREFIX}{path}.lora_magnitude_vector"] = from_values(rng.uniform(0.5, 1.5, out), dtype)
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted({p.rpartition(".")[2] for p in paths or TARGETS}), "use_dora": dora}
    return save(folder, "adapter_model.safetensors", arrays, {**base, **config})


def mlx_folder(folder: Path, paths: list[str] | None = None, rank: int = 4, scale: float = 20.0, dtype: str = "F32", dora: bool = False, **config: Any) -> Path:
    """An mlx-lm adapter on these modules (TARGETS), named by full path."""
    rng, arrays = np.random.default_rng(0), {}
    for path in paths or TARGETS:
        out, into = shape_of(path)  # [in, r] and [r, out]; the embedding is [vocab, r] and [r, dim]
        arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"] = draw(rng, into, rank, dtype=dtype), draw(rng, rank, out, dtype=dtype)
        if dora:
            arrays[f"{path}.m"] = draw(rng, out, dtype=dtype)
    base = {"fine_tune_type": "dora" if dora else "lora", "num_layers": -1, "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": paths or TARGETS}}
    return save(folder, "adapters.safetensors", arrays, {**base, **config})


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor as it is stored, from the one weights file of a folder."""
    (path,) = folder.glob("*.safetensors")
    return {n: Tensor(e.dtype, tensors.read(path, [n], upcast=False)[n]) for n, e in tensors.read_header(path).entries.items()}


def same_bits(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(a[name].same(b[name]) for name in a)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
