"""Where MLX computes: the BLAS on Linux CPUs, device and dtype, the ranks. The other modules take `mx` and `nn` from here."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upo import memory
from upo.errors import BackendError

if TYPE_CHECKING:
    from upo.config import TrainConfig

REAL_BLAS = 20.0  # GFLOP/s in float32 per process; the wheel's reference BLAS reaches 5 to 8, any real one above 50


def _use_fast_blas() -> str:
    """Put a real BLAS before the wheel's reference one; returns what is in use, for messages.

    MLX's Linux CPU wheel calls `cblas_*` in a library of its own. Symbols of a library loaded earlier with RTLD_GLOBAL take precedence,
    so this must run before `import mlx.core`. In order of measured speed on two cores: OpenBLAS 236 GFLOP/s, MKL 194, torch's 123.
    """
    if sys.platform != "linux" or not _has("mlx-cpu"):
        return "of the platform"
    if _has_blas(ctypes.CDLL(None)):
        return "loaded before this program (LD_PRELOAD)"
    if "mlx.core" in sys.modules:
        return "reference BLAS of the wheel: mlx was imported before upo_mlx"
    for path in _blas_candidates():
        try:
            if _has_blas(ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)):
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
                return path
        except OSError:
            continue
    return "reference BLAS of the wheel"


def _has_blas(library: ctypes.CDLL) -> bool:
    """Under plain names; the Fortran one will do (torch has only that), as the wheel's `cblas_sgemm` calls it."""
    return hasattr(library, "cblas_sgemm") or hasattr(library, "sgemm_")


def _blas_candidates() -> Iterator[str]:
    """Libraries that are not the reference BLAS, which a plain libblas.so.3 may be. One after the other, as torch's list of files is long."""
    machine = f"{platform.machine()}-linux-gnu"
    yield from (f"/usr/lib/{machine}/openblas-pthread/libblas.so.3", "libopenblas.so.0", str(Path(sys.prefix, "lib", "libopenblas.so.0")))
    if _has("mkl"):
        yield from (os.path.normpath(str(f.locate())) for f in metadata.files("mkl") or [] if f.name.startswith("libmkl_rt.so"))
    if _has("torch"):
        yield from (os.path.normpath(str(f.locate())) for f in metadata.files("torch") or [] if f.name == "libtorch_cpu.so")


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


BLAS = _use_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

__all__ = ["BLAS", "MlxComm", "check_quantize", "choose_device", "choose_dtype", "device_report", "limit_memory", "matmul_rate", "mx", "nn", "peak_memory_gb", "share_threads", "to_numpy"]


def has_gpu() -> bool:
    """Whether this build and machine have a GPU that MLX can use."""
    return bool(mx.metal.is_available() or mx.cuda.is_available())


def choose_device(name: str) -> str:
    """Make a device the default and return its name: cpu, metal or cuda.

    `auto` is the GPU if there is one. Raises BackendError for a device that is not there, naming what is.
    """
    kind, _, index = name.partition(":")
    gpu = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else ""
    wanted = {"auto": gpu or "cpu", "cpu": "cpu", "gpu": gpu, "cuda": "cuda" * (gpu == "cuda"), "mps": "metal" * (gpu == "metal")}.get(kind)
    if wanted is None:
        raise BackendError(f"device: unknown device {name!r}. Known: auto, cpu, gpu, cuda, cuda:N, mps.")
    if not wanted or (index and not index.isdigit()):
        raise BackendError(f"device: MLX has no {name} here, only {gpu or 'cpu'}. Use device: auto, or --backend torch.")
    mx.set_default_device(mx.cpu if wanted == "cpu" else mx.Device(mx.gpu, int(index or 0)))
    if wanted == "cpu" and sys.platform == "linux":
        mx.disable_compile()  # it would start a C++ compiler for every fused kernel, 20 s before the first step, and fail without one
    return wanted


def choose_dtype(name: str, device: str) -> tuple[Any, list[str]]:
    """The dtype of the frozen base, and warnings to show. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    slow = device == "cpu" and sys.platform == "linux" and name != "float32"
    notes = [f"dtype: MLX multiplies {name} on a Linux CPU about 30 times slower than float32; use dtype: float32"] if slow else []
    return getattr(mx, name), notes


def check_quantize(name: str) -> None:
    """Raises BackendError for a quantisation, which in MLX is the model folder's."""
    if name != "none":
        raise BackendError(f"quantize: {name} needs bitsandbytes on CUDA (--backend torch). For MLX give a model folder quantised by mlx-lm.")


def fast_dtype() -> str:
    """What `auto` is: MLX multiplies 16 bits on a GPU only."""
    return str(choose_dtype("auto", "metal" if has_gpu() else "cpu")[0]).rpartition(".")[2]


def matmul_rate(size: int = 512) -> float:
    """GFLOP/s of a float32 matrix product on the CPU, best of three."""
    a = mx.ones((size, size), mx.float32)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(mx.matmul(a, a, stream=mx.cpu))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def blas_notes(device: str) -> list[str]:
    """What to show if products on this CPU are slow: measured, as finding a library does not prove that it is used."""
    if device != "cpu" or sys.platform != "linux" or (rate := matmul_rate()) >= REAL_BLAS:
        return []
    return [f"BLAS: MLX multiplies at {rate:.0f} GFLOP/s ({BLAS}); {BLAS_REMEDY}"]


BLAS_REMEDY = "pip install mkl (x86-64) or apt install libopenblas0-pthread makes it 20 times faster"


def device_report() -> dict[str, Any]:
    """What `upo doctor` shows about MLX here."""
    gpu = has_gpu()
    info: dict[str, Any] = dict(mx.device_info())
    devices = ["metal" if mx.metal.is_available() else "cuda"] * gpu + ["cpu"]
    report: dict[str, Any] = {
        "version": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "devices": devices,
        "device": info.get("device_name") or platform.machine(),
        "memory_gb": round(info.get("memory_size", _ram()) / 1e9, 1),
        "missing": [],
    }
    if not gpu:
        rate = matmul_rate()
        report |= {"blas": BLAS, "gflops_float32": round(rate, 1)}
        if sys.platform == "linux" and rate < REAL_BLAS:
            report["missing"].append(f"a fast BLAS: {BLAS_REMEDY}")
    if report["mlx-lm"] is None:
        report["missing"].append("mlx-lm: pip install mlx-lm")
    if sys.platform == "linux" and not gpu and shutil.which("nvidia-smi"):
        report["missing"].append('MLX for CUDA: pip install "upo[mlx-cuda]"')
    return report


def _version(distribution: str) -> str | None:
    return metadata.version(distribution) if _has(distribution) else None


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: str, ranks: int = 1) -> int:
    """Bytes that this process can still take on its device: of what Metal recommends, of a GPU's own, of the ranks' share of the machine's."""
    info: dict[str, Any] = dict(mx.device_info())
    of_gpu = next((info[key] for key in ("max_recommended_working_set_size", "free_memory", "total_memory", "memory_size") if key in info), None)
    return memory.available() // ranks if device == "cpu" or of_gpu is None else int(of_gpu) - int(mx.get_active_memory())


def peak_memory_gb(device: str) -> float:
    """Largest memory so far: of MLX's allocator on a GPU, of the process on a CPU."""
    if device != "cpu":
        return float(mx.get_peak_memory()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # bytes on macOS, KiB on Linux


def limit_memory(train: TrainConfig, device: str) -> None:
    """Set MLX's limits where the configuration has them. Raises BackendError for a wired limit where there is none, or a larger one than the system's."""
    if train.memory_limit_gb is not None:
        mx.set_memory_limit(int(train.memory_limit_gb * 1e9))
    if train.cache_limit_gb is not None:
        mx.set_cache_limit(int(train.cache_limit_gb * 1e9))
    if train.wired_limit_gb is not None:
        if device != "metal":  # MLX takes the number elsewhere and does nothing with it
            raise BackendError("train.wired_limit_gb: memory is wired on Metal only. Remove the option; train.memory_limit_gb works on every device.")
        try:
            mx.set_wired_limit(int(train.wired_limit_gb * 1e9))
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"train.wired_limit_gb: {error} (sudo sysctl iogpu.wired_limit_mb=... raises the system's limit)") from None


def to_numpy(array: Any) -> np.ndarray:
    """A float32 NumPy copy of an MLX array (NumPy has no bfloat16)."""
    return np.array(array.astype(mx.float32))


class MlxComm:
    """The ranks started by `mlx.launch` (or mpirun); one process is rank 0 of 1 and every sum is the identity."""

    VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

    def __init__(self) -> None:
        launched = any(name in os.environ for name in self.VARIABLES)
        if not launched and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise BackendError("backend: torchrun starts processes for PyTorch; MLX's are started with mlx.launch -n N -- upo train ...")
        self._group = mx.distributed.init(strict=True) if launched else None
        self.rank = self._group.rank() if self._group else 0
        self.size = self._group.size() if self._group else 1

    def all_sum(self, array: np.ndarray) -> np.ndarray:
        """Sum over ranks of a float array of the same shape on each; float32 between the ranks."""
        if self.size == 1:
            return array
        # NCCL sums on the GPU alone; the others on the CPU, where a collective never waits inside a command buffer (watchdog).
        stream = None if mx.cuda.is_available() else mx.cpu
        total = mx.distributed.all_sum(mx.array(array.astype(np.float32)), group=self._group, stream=stream)
        return np.array(total).astype(array.dtype)


def share_threads(ranks: int) -> None:
    """Divide the cores among the ranks of this machine, unless the user chose a number.

    Threads of several processes on the same cores slow one another up to a hundredfold. The BLAS is loaded already, so it is told.
    """
    if ranks == 1 or any(name in os.environ for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ("openblas_set_num_threads", "MKL_Set_Num_Threads"):
        if hasattr(library := ctypes.CDLL(None), name):
            getattr(library, name)(max(1, cores // ranks))
