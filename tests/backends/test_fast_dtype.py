"""The dtype a backend advises for quick runs is one that it then accepts for its default device."""

from __future__ import annotations

import importlib

import pytest

from upo.backend import get_backend


def test_advice_is_accepted(backend):
    dtype = get_backend(backend).fast_dtype()
    device = importlib.import_module(f"upo_{backend}.device")
    chosen, notes = device.choose_dtype(dtype, device.choose_device("auto"))
    assert str(chosen).rpartition(".")[2] == dtype
    assert notes == []


def test_mlx_advises_float32_on_a_cpu(monkeypatch):
    """16-bit products of MLX on a Linux CPU are 30 times slower."""
    pytest.importorskip("mlx.core")
    device = importlib.import_module("upo_mlx.device")
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert device.fast_dtype() == "float32"


def test_torch_reads_the_cpu_flags(monkeypatch):
    torch = pytest.importorskip("torch")
    device = importlib.import_module("upo_torch.device")
    monkeypatch.setattr(device, "choose_device", lambda name: torch.device("cpu"))
    for flags, expected in (("fpu avx512f avx512_bf16", "bfloat16"), ("fpu avx2", "float32"), ("fp asimd bf16", "bfloat16")):
        monkeypatch.setattr(device.Path, "read_text", lambda self, encoding, flags=flags: flags)
        monkeypatch.setattr(device.Path, "exists", lambda self: True)
        assert device.fast_dtype() == expected
