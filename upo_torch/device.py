"""Where PyTorch computes: device and dtype, threads, memory, the ranks."""

from __future__ import annotations

import atexit
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from upo import memory
from upo.errors import BackendError

if TYPE_CHECKING:
    from upo.config import TrainConfig


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device of this process. `auto`: CUDA, else MPS, else the CPU; `gpu`: CUDA or MPS. Ranks of one machine take one GPU each.

    Raises BackendError for a device that is not there, naming what is.
    """
    kind, _, index = name.partition(":")
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
    wanted = {"auto": gpu or "cpu", "cpu": "cpu", "gpu": gpu, "cuda": "cuda" * (gpu == "cuda"), "mps": "mps" * (gpu == "mps")}.get(kind)
    if wanted is None or (index and (kind != "cuda" or not index.isdigit())):
        raise BackendError(f"device: unknown device {name!r}. Known: auto, cpu, gpu, cuda, cuda:N, mps.")
    if not wanted:
        raise BackendError(f"device: PyTorch has no {name} here, only {gpu or 'cpu'}. Use device: auto; `upo doctor` says what is missing.")
    if wanted == "mps" and local_size > 1:
        raise BackendError("device: several processes cannot share one MPS device. Use one process, or device: cpu.")
    if wanted != "cuda":
        return torch.device(wanted)
    if index and local_size > 1:
        raise BackendError(f"device: {name} names one GPU for {local_size} processes. Use device: cuda, which gives each its own.")
    chosen, there = int(index) if index else local_rank, torch.cuda.device_count()
    if chosen >= there:
        raise BackendError(f"device: GPU number {chosen} is asked for, and there are {there} (numbered from 0). Name another, or start at most {there} processes here.")
    torch.cuda.set_device(chosen)
    return torch.device("cuda", chosen)


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The dtype of the frozen base, and notes to show. `auto`: bfloat16 on a GPU that has it, float32 elsewhere."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name], []
    if device.type == "cpu":
        return torch.float32, []
    if _has_bfloat16(device):
        return torch.bfloat16, []
    return torch.float32, ["dtype: this GPU does not compute in bfloat16, so float32 is used; it takes twice the memory."]


def limit_memory(train: TrainConfig, device: torch.device) -> None:
    """Hold this process to `memory_limit_gb` of its GPU. Raises BackendError for the limits that only MLX has, and off CUDA."""
    mlx_only = [name for name in ("cache_limit_gb", "wired_limit_gb") if getattr(train, name) is not None]
    if mlx_only:
        raise BackendError(f"train.{mlx_only[0]}: is MLX's. PyTorch's allocator is configured by the environment variable PYTORCH_CUDA_ALLOC_CONF.")
    if train.memory_limit_gb is None:
        return
    if device.type != "cuda":
        raise BackendError(f"train.memory_limit_gb: PyTorch has no limit on {device.type}, only on CUDA. Lower train.micro_batch_tokens instead.")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, train.memory_limit_gb * 1e9 / total), device)


def check_quantize(name: str, device: torch.device) -> None:
    """Raises BackendError for a quantisation that cannot be had on this device."""
    if name == "none":
        return
    if device.type != "cuda":  # on CPUs bitsandbytes repacks the weights for inference, and then returns a wrong gradient without an error
        raise BackendError(f"quantize: {name} needs CUDA, and this is {device.type}. Use quantize: none, or on MLX a model folder quantised by mlx-lm.")
    if find_spec("bitsandbytes") is None:
        raise BackendError(f'quantize: {name} needs bitsandbytes: pip install "upo[quantized]"')


def fast_dtype() -> str:
    """What `auto` is on a GPU; bfloat16 on a Linux CPU with instructions for it (measured 2.2 times faster a step), else float32."""
    device = choose_device("auto")
    if device.type != "cpu":
        return str(choose_dtype("auto", device)[0]).removeprefix("torch.")
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        x = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((x @ x).sum().item() == 8)
    except (RuntimeError, TypeError):  # before macOS 14
        return False


def share_threads(local_size: int) -> None:
    """Divide the cores among the ranks of one machine, unless the user chose a number.

    torchrun sets OMP_NUM_THREADS=1 by itself, which is safe; threads of several processes on the same cores slow one another up to a
    hundredfold.
    """
    if local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // local_size))


@contextmanager
def without_denormals(device: torch.device) -> Iterator[None]:
    """On a CPU, numbers below 1.2e-38 are zero inside the block. torch's attention also computes on what is left in its buffers beside the
    last rows; with numbers of that kind among it, one backward pass took 65 ms instead of 4 (267 queries, 311 keys, 9 heads), at the same
    results. It is a state of the process, so it is put back.
    """
    if device.type != "cpu" or torch.tensor([1e-40]).mul(1.0).item() == 0.0:
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def start_threads(device: torch.device) -> None:
    """On a CPU, start torch's threads `without_denormals`, which they inherit and keep: they run nothing but torch's own loops. Where they
    have been started already, the block holds for the calling thread alone.
    """
    with without_denormals(device):
        if device.type == "cpu":
            torch.zeros(2**15 * torch.get_num_threads()).add_(1.0)  # a thread takes at least 2^15 numbers


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device, local_size: int = 1) -> int:
    """Bytes that this process can still take on its device: of a GPU's own, of what Metal recommends, of the ranks' share of the machine's."""
    if device.type == "cuda":  # what torch keeps for reuse is free for this process
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return memory.available() // local_size


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: of torch's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # bytes on macOS, KiB on Linux


def device_report() -> dict[str, Any]:
    """What `upo doctor` shows about PyTorch here."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = torch.backends.mps.is_available()
    report: dict[str, Any] = {
        "version": torch.__version__,
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "devices": [f"cuda:{i}" for i in range(len(gpus))] + ["mps"] * mps + ["cpu"],
        "device": gpus[0].name if gpus else platform.processor() or platform.machine(),
        "memory_gb": round((gpus[0].total_memory if gpus else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 1e9, 1),
        "threads": torch.get_num_threads(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or the platform's",
        "missing": [],
    }
    if gpus:
        report["bitsandbytes"] = _version("bitsandbytes") or 'not installed; quantize: nf4 needs it: pip install "upo[quantized]"'
    elif shutil.which("nvidia-smi"):
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        report["missing"].append(
            f"a GPU: nvidia-smi is there, but this torch ({build}) sees none. Install the build for your driver: https://pytorch.org/get-started/locally"
        )
    report["missing"] += [f'{package}: pip install "upo[torch]"' for package in ("transformers", "peft") if report[package] is None]
    return report


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def local_place() -> tuple[int, int]:
    """This process's rank on its machine, and how many there are, as torchrun says; 0 of 1 on its own."""
    here = os.environ
    return int(here.get("LOCAL_RANK", here.get("RANK", 0))), int(here.get("LOCAL_WORLD_SIZE", here.get("WORLD_SIZE", 1)))


class TorchComm:
    """The ranks started by torchrun; one process is rank 0 of 1 and every sum is the identity."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank, self.local_size = local_place()
        self._device = torch.device("cpu")
        if self.size == 1 and "MLX_RANK" in os.environ:
            raise BackendError("backend: mlx.launch starts processes for MLX; PyTorch's are started with torchrun --nproc-per-node N.")

    def start(self, device: torch.device) -> None:
        """Meet the other ranks: over NCCL on CUDA, over gloo elsewhere."""
        if self.size == 1:
            return
        self._device = device
        if not dist.is_initialized():
            on_gpu = device.type == "cuda"
            # A rank may wait for another to download a model, so the limit is long.
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2), device_id=device if on_gpu else None)
            atexit.register(_stop)

    def all_sum(self, array: np.ndarray) -> np.ndarray:
        """Sum over ranks of a float array of the same shape on each."""
        if self.size == 1:
            return array
        return self.all_sum_tensor(torch.from_numpy(array.copy()).to(self._device)).cpu().numpy()

    def all_sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same for a tensor on this process's device, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
