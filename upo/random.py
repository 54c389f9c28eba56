"""Seeded choices that never change: order, splits, partners and initial weights, equal on every backend, platform and NumPy version.

NumPy promises the raw words of a bit generator but not the streams of its distributions, so only raw 64-bit Philox words are used and
scaling and sorting are our own. A stream is named by (seed, purpose, name), so that adding one consumer never shifts another.
"""

from __future__ import annotations

import hashlib

import numpy as np


def words(n: int, seed: int, purpose: str, name: str | int = "") -> np.ndarray:
    """[n] uint64 words of the stream (seed, purpose, name)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
    return np.random.Philox(key=key).random_raw(n).astype(np.uint64)


def uniform(shape: tuple[int, ...], bound: float, seed: int, purpose: str, name: str | int = "") -> np.ndarray:
    """float32 array, uniform in [-bound, bound)."""
    unit = (words(int(np.prod(shape)), seed, purpose, name) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((2 * unit - 1) * bound).astype(np.float32).reshape(shape)


def permutation(n: int, seed: int, purpose: str, name: str | int = "") -> np.ndarray:
    """A permutation of range(n), [n] int64."""
    return np.argsort(words(n, seed, purpose, name), kind="stable")


def lora_a(rank: int, inputs: int, seed: int, name: str) -> np.ndarray:
    """LoRA's A [rank, inputs] for the adapter parameter of this PEFT name: uniform within 1 / sqrt(inputs), as PEFT's Kaiming init."""
    return uniform((rank, inputs), 1 / inputs**0.5, seed, "lora", name)


def value_head(width: int, bias: float, seed: int) -> dict[str, np.ndarray]:
    """Initial value head: Linear - ReLU - Linear - ReLU - Linear in torch's names and layouts; the last weight 0, the last bias given."""
    bound = 1 / width**0.5
    shapes = {"0.weight": (width, width), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    head = {name: uniform(shape, bound, seed, "value_head", name) for name, shape in shapes.items()}
    return {**head, "4.weight": np.zeros((1, width), np.float32), "4.bias": np.full(1, bias, np.float32)}
