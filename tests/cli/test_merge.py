"""`upo merge` on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from upo_cli.main import main

from upo import tensors
from upo.adapters import lora_name, peft_config, write_adapter

PATH = "model.layers.0.self_attn.q_proj"


def make_adapter(folder: Path, base: str | None) -> Path:
    rng = np.random.default_rng(0)
    arrays = {lora_name(PATH, side): rng.normal(0, 0.1, shape).astype(np.float32) for side, shape in (("A", (2, 64)), ("B", (64, 2)))}
    write_adapter(folder, arrays, peft_config(base, 2, 4.0, [PATH]))
    return folder


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["merge", *map(str, arguments)])


def test_merge_a_run(tmp_path: Path, tiny_llama: Path) -> None:
    """The base comes from the run's configuration."""
    make_adapter(tmp_path / "run" / "adapter", None)
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": str(tiny_llama), "data": {"train": "x"}}))
    result = invoke(tmp_path / "run", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}: hf model, {(tmp_path / 'out' / 'model.safetensors').stat().st_size / 1e6:.1f} MB, float32; 1 modules merged\n"


def test_json_and_warnings(tmp_path: Path, tiny_llama: Path) -> None:
    arrays = tensors.read(tiny_llama / "model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_llama.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors.write(base / "model.safetensors", arrays, dtypes=dict.fromkeys(arrays, "BF16"))
    adapter = make_adapter(tmp_path / "adapter", "elsewhere")
    result = invoke(adapter, "--out", tmp_path / "out", "--base", base, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["layout"], told["dtype"], told["modules"], told["bits"]) == ("hf", "bfloat16", 1, None)
    assert told["base"] == str(base) and 0 < told["rounding"] < 0.5 and told["warnings"] == []
    plain = invoke(adapter, "--out", tmp_path / "two", "--base", base)
    assert f"rounding to bfloat16 took {told['rounding']:.1%} of the size of the adapter's change" in plain.stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 1, "exists already"),
        (["--out", "new", "--bits", "4"], 2, "add --to mlx"),
        (["--out", "new", "--bits", "5"], 2, "Invalid value for '--bits'"),
        (["--out", "new", "--to", "gguf"], 2, "Invalid value for '--to'"),
        (["--out", "new", "--base", "./nowhere"], 1, "no such folder"),
    ],
)
def test_bad_requests(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(tmp_path / "adapter", str(tiny_llama))
    (tmp_path / "out").mkdir()
    result = invoke(adapter, *(options or ["--out", "out"]))
    assert result.exit_code == code and message in result.stderr and "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_no_framework_is_needed(tmp_path: Path, tiny_llama: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", str(tiny_llama))
    program = (
        "import sys\n"
        "for name in ('torch', 'mlx', 'mlx_lm', 'peft', 'transformers', 'safetensors'): sys.modules[name] = None\n"
        "from upo_cli.main import main\n"
        f"main(['merge', {str(adapter)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    done = subprocess.run([sys.executable, "-c", program.replace("'--out'", "'--to', 'mlx', '--out'").replace("/out'", "/mlx'")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "mlx" in done.stderr and "pip install" in done.stderr and not (tmp_path / "mlx").exists()
