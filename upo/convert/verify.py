"""Whether two adapter folders do the same to a model: logits on real text, each with the stock loader of its own library.

Every library runs in a process of its own, so that neither meets the other's BLAS, threads or memory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upo import tensors
from upo.backend import PACKAGES, installed
from upo.errors import BackendError, ModelError
from upo.models import is_quantized_mlx, read_json

TEXT = (
    "The tide had gone out further than anyone in the village could remember. Where the harbour had been there was a plain of wet sand, "
    "ribbed like corduroy, and on it lay eleven boats, each leaning on its side. Mrs. Okafor counted them twice (once aloud): 3 blue, 7 white, "
    '1 red. "It will come back," said the boy; she was not so sure. By 4.30 p.m. the first clouds had reached the headland.'
)
TOLERANCE = 1e-3  # of the largest logit: the two libraries' own float32 differences are 1e-6 to 1e-4 of it, a wrong scale far more
SHARE = 0.05  # of what the adapter does: two adapters that agree are much closer than that, whatever the size of their effect


@dataclass(frozen=True)
class Verdict:
    """Largest absolute differences of logits over `tokens` positions."""

    tokens: int
    base: float  # between the two libraries without adapter
    adapted: float  # between them with it
    effect: float  # between with and without, in the source's library
    limit: float  # that `adapted` had to keep


def verify(base: Path, source: tuple[str, Path], target: tuple[str, Path]) -> Verdict:
    """Compare two adapter folders, given as (peft or mlx, folder), on a model. Raises ModelError if they differ, BackendError if a library
    is missing or cannot load them."""
    names = ["mlx" if kind == "mlx" else "torch" for kind, _ in (source, target)]
    for name in names:
        if not installed(name):
            raise BackendError(f'--verify: needs {name}, which is not installed: pip install "upo[{name}]". Without --verify nothing but NumPy is needed.')
    if is_quantized_mlx(read_json(base / "config.json")) and "torch" in names:
        raise BackendError(f"--verify: {base} is an MLX quantised model, which PyTorch cannot read. Give the original one.")
    from upo.data.tokenizer import load_tokenizer

    ids = np.asarray(load_tokenizer(base).prompt_ids(TEXT), np.int64)
    plain, adapted = zip(*(_logits(name, base, folder, ids) for name, (_, folder) in zip(names, (source, target), strict=True)), strict=True)
    gap = [float(np.abs(one - other).max()) for one, other in (plain, adapted)]
    effect = float(np.abs(adapted[0] - plain[0]).max())
    size = float(np.abs(adapted[0]).max())
    limit = TOLERANCE * max(1.0, size)
    if effect > limit:
        limit = min(limit, SHARE * effect)
    verdict = Verdict(len(ids), gap[0], gap[1], effect, limit)
    if not gap[1] <= limit:
        blame = "The models differ without adapter already, so look there first." if gap[0] > limit else "Please report it."
        raise ModelError(
            f"--verify: logits differ by {gap[1]:.3g} (at most {limit:.3g} is allowed; {gap[0]:.3g} without adapter, which moves them by {effect:.3g}). "
            f"Nothing was written. {blame}"
        )
    return verdict


def _logits(name: str, base: Path, adapter: Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[tokens, V] without and with the adapter."""
    with tempfile.TemporaryDirectory(prefix="upo-verify-") as folder:
        given, out = Path(folder) / "ids.safetensors", Path(folder) / "logits.safetensors"
        tensors.write(given, {"ids": ids})
        command = [sys.executable, "-m", f"{PACKAGES[name][0]}.verify", str(base), str(adapter), str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not out.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise BackendError(f"--verify: {name} could not load {adapter} on {base} ({lines[-1][:300]}). Nothing was written.")
        found = tensors.read(out)
    return found["plain"], found["adapted"]
