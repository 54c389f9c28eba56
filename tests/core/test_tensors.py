"""Safetensors on NumPy: exact, deterministic, and distrustful of headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upo import tensors
from upo.errors import ModelError


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_round_trip_of_every_dtype(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        str(np.dtype(d)): rng.integers(0, 2, (3, 5)).astype(d)
        for d in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    }
    arrays |= {"scalar": np.float32(1.5), "empty": np.zeros((0, 4), np.float32), "strided": np.arange(12.0).reshape(3, 4).T}
    tensors.write(tmp_path / "a.safetensors", arrays, metadata={"format": "pt"})
    back = tensors.read(tmp_path / "a.safetensors", upcast=False)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == np.asarray(array).dtype and back[name].shape == np.shape(array)
        np.testing.assert_array_equal(back[name], array)
    assert tensors.read_header(tmp_path / "a.safetensors").metadata == {"format": "pt"}


def test_same_arrays_same_bytes_whatever_their_order(tmp_path: Path) -> None:
    a, b = np.ones(3, np.float32), np.ones(5, np.uint8)
    tensors.write(tmp_path / "1", {"a": a, "b": b}, {"x": "1", "y": "2"})
    tensors.write(tmp_path / "2", {"b": b, "a": a}, {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]  # no temporary file stays


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    tensors.write(
        tmp_path / "a", {"a": np.ones(3, np.uint8), "b": np.ones(5, np.float32), "c": np.ones(3, np.float16), "d": np.ones(1)}
    )
    for found in tensors.read_header(tmp_path / "a").entries.values():
        assert found.begin % np.dtype(tensors.DTYPES[found.dtype]).itemsize == 0


def test_only_the_named_tensors_are_read(tmp_path: Path) -> None:
    tensors.write(tmp_path / "a", {"a": np.zeros(2), "b": np.ones(2)})
    assert list(tensors.read(tmp_path / "a", ["b"])) == ["b"]
    with pytest.raises(ModelError, match="has no tensor c"):
        tensors.read(tmp_path / "a", ["c"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    tensors.write(tmp_path / "a", {"a": np.zeros(2)})
    with pytest.raises(TypeError, match="complex128"):
        tensors.write(tmp_path / "a", {"a": np.zeros(2, complex)})
    np.testing.assert_array_equal(tensors.read(tmp_path / "a")["a"], np.zeros(2))


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (0.0, 0x0000), (-0.0, 0x8000), (1.0, 0x3F80), (-2.0, 0xC000), (float("inf"), 0x7F80),
        (1 + 2**-8, 0x3F80),  # a tie: to the even neighbour below
        (1 + 3 * 2**-8, 0x3F82),  # a tie: to the even neighbour above
        (1 + 2**-8 + 2**-20, 0x3F81),  # just above a tie
        (3.4e38, 0x7F80),  # beyond the largest bfloat16
        (1e-45, 0x0000),
    ],
)  # fmt: skip
def test_bf16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert tensors.bf16_from_float32(np.float32(value)) == bits


def test_bf16_keeps_nan_and_is_exact_back() -> None:
    nans = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(tensors.float32_from_bf16(tensors.bf16_from_float32(nans))).all()
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    floats = tensors.float32_from_bf16(bits)
    number = ~np.isnan(floats)
    np.testing.assert_array_equal(tensors.bf16_from_float32(floats)[number], bits[number])


def test_bf16_and_f16_on_disk(tmp_path: Path) -> None:
    x = np.array([[1.0, -2.5], [3.140625, 1e30]], np.float32)
    tensors.write(
        tmp_path / "a",
        {"rounded": x, "bits": tensors.bf16_from_float32(x), "half": x[:1].astype(np.float16)},
        dtypes={"rounded": "BF16", "bits": "BF16"},
    )
    entries = tensors.read_header(tmp_path / "a").entries
    assert {name: e.dtype for name, e in entries.items()} == {"rounded": "BF16", "bits": "BF16", "half": "F16"}
    back = tensors.read(tmp_path / "a")
    assert all(array.dtype == np.float32 for array in back.values())
    np.testing.assert_array_equal(back["rounded"], back["bits"])
    np.testing.assert_array_equal(back["rounded"][:, :1], x[:, :1])
    assert tensors.read(tmp_path / "a", ["bits"], upcast=False)["bits"].dtype == np.uint16


def test_the_reference_reader_agrees(tmp_path: Path) -> None:
    torch, st = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    x = np.linspace(-3, 3, 35, dtype=np.float32).reshape(5, 7)
    tensors.write(tmp_path / "a", {"x": x, "b": x, "odd": np.ones(3, np.uint8)}, dtypes={"b": "BF16"})
    loaded = st.load_file(tmp_path / "a")
    assert torch.equal(loaded["x"], torch.tensor(x)) and torch.equal(loaded["b"], torch.tensor(x).to(torch.bfloat16))
    st.save_file({"y": loaded["b"], "z": loaded["x"].half()}, tmp_path / "c")
    back = tensors.read(tmp_path / "c")
    np.testing.assert_array_equal(back["y"], loaded["b"].float().numpy())
    np.testing.assert_array_equal(back["z"], loaded["x"].half().float().numpy())


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 10, "not a safetensors file"),
        (b"{}", b"", 2**63, "not a safetensors file"),
        (b"{nonsense", b"", None, "header is damaged"),
        (b"[1]", b"", None, "not a mapping"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', b"1234", None, "a name occurs twice"),
        ({"a": entry([2], 0, 4)}, b"1234", None, r"tensor a: 4 bytes do not make F32 \[2\]"),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456", None, "tensor b overlaps another"),
        ({"a": entry([1], 4, 8)}, b"12345678", None, "leaves a gap"),
        ({"a": entry([1], 0, 4)}, b"12", None, "cut short or damaged"),
        ({"a": entry([1], 0, 4)}, b"12345", None, "cut short or damaged"),
        ({"a": entry([-1], -4, 0)}, b"", None, "missing or malformed"),
        ({"a": entry([True], 0, 4)}, b"1234", None, "missing or malformed"),
        ({"a": {"dtype": "F32"}}, b"", None, "missing or malformed"),
        ({"__metadata__": [1]}, b"", None, "metadata"),
    ],
)
def test_a_damaged_header_is_refused_by_name(tmp_path: Path, header: Any, data: bytes, length: int | None, message: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ModelError, match=message) as caught:
        tensors.read(path)
    assert "bad.safetensors" in str(caught.value)


def test_missing_file_and_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        tensors.read(tmp_path / "none")
    path = raw_file(tmp_path / "f8", {"a": entry([4], 0, 4, "F8_E4M3")}, b"1234")
    assert tensors.read_header(path).entries["a"].dtype == "F8_E4M3"
    with pytest.raises(ModelError, match="F8_E4M3, which is not supported"):
        tensors.read(path)
