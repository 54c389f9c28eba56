"""Damaged and hostile adapters of both formats: one clear error, no partial target, an untouched source."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_cases import TARGETS, mlx_folder, peft_folder, snapshot

from upo import tensors
from upo.convert.run import convert
from upo.errors import UpoError

SEEDS = 25  # of each kind of damage and each format: 14 * 25 * 2 = 700 files
PATHS = TARGETS[:2]


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + rest


def a_name(rng: np.random.Generator, header: dict[str, Any]) -> str:
    return str(rng.choice([name for name in header if name != "__metadata__"]))


# Every one of these must be refused, whatever the seed.


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def extend(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 64)))


def huge_length(data: bytes, rng: np.random.Generator) -> bytes:
    return int(rng.integers(len(data), 2**63)).to_bytes(8, "little") + data[8:]


def garbage(data: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(0, 4096)))


def offsets(data: bytes, rng: np.random.Generator) -> bytes:
    """Out of range, overlapping, negative, too many, of another type."""
    header, rest = header_of(data)
    begin, end = header[(name := a_name(rng, header))]["data_offsets"]
    values = [[begin, end + 4], [begin + 4, end + 4], [-4, end], [end, begin], [begin], [begin, end, end], "ab", None, [2**70, 2**71], [begin, 1e9], [0.5, end], [True, end]]
    header[name]["data_offsets"] = values[rng.integers(len(values))]
    return with_header(header, rest)


def shape(data: bytes, rng: np.random.Generator) -> bytes:
    header, rest = header_of(data)
    entry = header[a_name(rng, header)]
    a, b = entry["shape"]
    values = [[a, b, 2], [a * b], [b + 1, a], [-a, -b], [0, 2**62], [2**62, 0], [1] * 70 + [a, b], [], "x", {"0": 1}, None, [a * 1.0, b], [a * b, 1], [2**40, 2**40]]
    entry["shape"] = values[rng.integers(len(values))]
    return with_header(header, rest)


def dtype(data: bytes, rng: np.random.Generator) -> bytes:
    header, rest = header_of(data)
    values = ["F64", "BF16", "I32", "U32", "F8_E4M3", "BOOL", "f4", "", None, 4, ["F32"], "\ud800"]
    header[a_name(rng, header)]["dtype"] = values[rng.integers(len(values))]
    return with_header(header, rest)


def duplicate(data: bytes, rng: np.random.Generator) -> bytes:
    header, rest = header_of(data)
    name = a_name(rng, header)
    text = json.dumps(header)
    return with_header((text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode(), rest)


def renamed(data: bytes, rng: np.random.Generator) -> bytes:
    """A name that leads nowhere, out of the folder, or to the screen."""
    header, rest = header_of(data)
    old = a_name(rng, header)
    names = ["../../etc/passwd", "/abs", "", "\x1b[31m", "\ud800", "x" * 10_000, old + ".weight", old[1:], "lora_a", ".lora_a", "m", old.replace("lora", "lara"), old + "\n"]
    header = {names[rng.integers(len(names))] if name == old else name: entry for name, entry in header.items()}
    return with_header(header, rest)


def lost(data: bytes, rng: np.random.Generator) -> bytes:
    """One tensor fewer, its bytes too."""
    header, rest = header_of(data)
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    if rng.integers(2):
        return with_header({n: e for n, e in header.items() if n != name}, rest[: header[name]["data_offsets"][0]])
    return with_header({n: e for n, e in header.items() if n != name}, rest)


def not_finite(data: bytes, rng: np.random.Generator) -> bytes:
    header, rest = header_of(data)
    place = header[a_name(rng, header)]["data_offsets"][0]
    value = np.float32([np.nan, np.inf, -np.inf][rng.integers(3)]).tobytes()
    return with_header(header, rest[:place] + value + rest[place + 4 :])


def header_json(data: bytes, rng: np.random.Generator) -> bytes:
    header, rest = header_of(data)
    raw = json.dumps(header)
    values = [b"[]", b"null", b"7", b"{" * 100_000, b"[" * 100_000 + b"]" * 100_000, b"\xff\xfe" + raw.encode(), raw[:-1].encode(), raw.encode("utf-16"), b'{"__metadata__": 3}', json.dumps({**header, "__metadata__": []}).encode() + b"x"]
    return with_header(values[rng.integers(len(values))], rest)


WEIGHTS: list[Callable[[bytes, np.random.Generator], bytes]] = [truncate, extend, huge_length, garbage, offsets, shape, dtype, duplicate, renamed, lost, not_finite, header_json]


def config_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """The file itself is no JSON mapping."""
    values = [data[: rng.integers(len(data) - 1)], b"[]", b"null", b'"x"', b"{" * 100_000, b"\xff" + data, rng.bytes(64), data.decode().encode("utf-16"), b"", data + data]
    return values[rng.integers(len(values))]


def config_value(data: bytes, rng: np.random.Generator) -> bytes:
    """An option that decides what the arrays mean, of another type or size."""
    config = json.loads(data)
    odd: list[Any] = [None, "", "x", [], {}, [[]], {"a": {}}, -1, 0, 2**200, -1e308, 1e308, float("nan"), float("inf"), True, [None] * 9, "\ud800", "a" * 100_000]
    inner = config.get("lora_parameters")
    key = rng.choice(["rank", "scale"] if inner else ["r", "lora_alpha", "peft_type"])
    kept = {"rank", "r"} & {key}
    value = odd[rng.integers(len(odd))]
    if key in ("scale", "lora_alpha") and value in (-1, 0) and not isinstance(value, bool):
        value = None  # as numbers they are odd, but say what is meant
    assert kept or key in ("scale", "lora_alpha", "peft_type")
    (inner if inner else config)[key] = value
    return json.dumps(config).encode()


CASES = [("weights", change) for change in WEIGHTS] + [("config", config_bytes), ("config", config_value)]


@pytest.mark.parametrize("kind", ["peft", "mlx"])
@pytest.mark.parametrize(("file", "change"), CASES, ids=[change.__name__ for _, change in CASES])
def test_damaged_adapters_are_refused(tmp_path: Path, kind: str, file: str, change: Callable[[bytes, np.random.Generator], bytes]) -> None:
    sound = peft_folder(tmp_path / "sound", PATHS) if kind == "peft" else mlx_folder(tmp_path / "sound", PATHS)
    to = "mlx" if kind == "peft" else "peft"
    convert(sound, to, tmp_path / "control")  # undamaged, it is accepted
    shutil.rmtree(tmp_path / "control")
    name = "adapter_config.json" if file == "config" else next(sound.glob("*.safetensors")).name
    original = (sound / name).read_bytes()
    for seed in range(SEEDS):
        damaged = change(original, np.random.default_rng([seed, CASES.index((file, change))]))
        assert damaged != original
        (sound / name).write_bytes(damaged)
        before, began = snapshot(sound), time.monotonic()
        with pytest.raises(UpoError) as caught:
            convert(sound, to, tmp_path / "out")
        message = str(caught.value)
        assert len(message) < 1500 and "\x1b" not in message, message[:200]
        assert time.monotonic() - began < 5
        assert snapshot(sound) == before and [p.name for p in tmp_path.iterdir()] == ["sound"], seed


@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_flipped_bytes_are_refused_or_are_other_numbers(tmp_path: Path, kind: str) -> None:
    """A single flipped byte may make another valid file; then what is written is exactly that other adapter."""
    sound = peft_folder(tmp_path / "sound", PATHS) if kind == "peft" else mlx_folder(tmp_path / "sound", PATHS)
    to = "mlx" if kind == "peft" else "peft"
    refused = 0
    for name in ("adapter_config.json", next(sound.glob("*.safetensors")).name):
        original = (sound / name).read_bytes()
        for seed in range(60):
            rng = np.random.default_rng(seed)
            damaged = bytearray(original)
            damaged[rng.integers(min(len(original), 700))] ^= 1 << rng.integers(8)  # header and configuration, mostly
            (sound / name).write_bytes(bytes(damaged))
            before = snapshot(sound)
            try:
                result = convert(sound, to, tmp_path / "out")
            except UpoError:
                refused += 1
            else:
                assert result.difference < 1e-6
                shutil.rmtree(tmp_path / "out")
            assert snapshot(sound) == before and [p.name for p in tmp_path.iterdir()] == ["sound"]
        (sound / name).write_bytes(original)
    assert refused >= 40


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = peft_folder(tmp_path / "a", PATHS)
    path = source / "adapter_model.safetensors"
    header = tensors.read_header(path)
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(tensors, "read_header", lambda _: header)
    with pytest.raises(UpoError, match="cut short"):
        convert(source, "mlx", tmp_path / "b")
