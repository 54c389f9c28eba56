"""The seam between the shared loop and a framework: what `upo_mlx` and `upo_torch` implement, and how they are found."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from upo.data.batch import FEW_TOKENS, Batch
from upo.data.forest import Forest, Tokens
from upo.errors import BackendError
from upo.flops import Sizes

if TYPE_CHECKING:
    from upo.config import RunConfig


@dataclass(frozen=True)
class Outcome:
    """What one optimizer step (or one evaluation) found out: whole-step NumPy vectors, equal on every rank."""

    logp: np.ndarray  # [N] float32, before the update
    value: np.ndarray | None = None  # [R] V(x) per prompt, before the update
    partner_logp: np.ndarray | None = None  # [N]
    grad_norm: float = 0.0  # of the adapter, before clipping
    value_grad_norm: float = 0.0  # of the value head, before clipping
    others: Mapping[str, np.ndarray] = field(default_factory=dict)  # further vectors of scores, by name (`upo.data.batch.SCORED`)
    state: Mapping[str, float] = field(default_factory=dict)  # running statistics of the losses, this step's included


@dataclass(frozen=True)
class Sampling:
    """How to generate. temperature 0 is greedy. Every end-of-turn token of the generation config stops a sequence."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 16
    place: int = 0  # of the first prompt among all that are answered, and the step to the next: ranks and parts of a list draw as the
    stride: int = 1  # whole list would


class Comm(Protocol):
    """Ranks of a data-parallel run. With one rank everything is the identity."""

    rank: int
    size: int

    def all_sum(self, array: np.ndarray) -> np.ndarray:
        """Sum over ranks of a float array that has the same shape on each."""
        ...


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded, for the manifest and for messages."""

    name: str  # as given: hub id or folder
    dtype: str  # of the base weights while computing
    device: str
    parameters: int  # of the base
    trainable: int  # of the adapter
    targets: tuple[str, ...]  # module names that carry an adapter, e.g. ("q_proj", "v_proj")
    weights_hash: str  # identifies base weights (file hashes, not a full read of huge files)
    notes: tuple[str, ...] = field(default=())  # what was repaired or fell back, to be shown
    chip: str = ""  # the device by its maker's name, e.g. "NVIDIA L4"; empty where that says nothing about its speed
    sizes: Sizes | None = None  # for the count of arithmetic, where the family allows one
    layout: str = "padded"  # how token rows are laid out (`upo.data.batch.SIZES`): log-probs in 16 bits move with it
    micro_batch_tokens: int = FEW_TOKENS  # token slots computed at once, as configured or decided


class Learner(Protocol):
    """A model with a trainable adapter, its optimizer and, if the objective asks for one, its value head."""

    info: ModelInfo
    comm: Comm

    def check_sharing(self, row: Forest) -> None:
        """Score a row of the data, with its gradient, with a shared prompt and without; where the two differ by more than rounding, go on
        with padded rows, which `info` then says with a note (`upo.sharing`). Before anything else is scored; collective.
        """
        ...

    def logps(self, forest: Forest, *, reference: int | None = None, tokens: bool = False) -> np.ndarray:
        """[N] float32 summed log-probs of the completions, or with `tokens` [M] one for each of their tokens; without gradient.

        Under the policy, or under the reference of this index. Local: no collective.
        """
        ...

    def prompt_states(self, forest: Forest, *, reference: int | None = None) -> np.ndarray:
        """[R, H] float32: the hidden state after the final norm at each prompt's last token, under the policy or a reference. Local."""
        ...

    def fit_value(self, states: np.ndarray, prompt: np.ndarray, reward: np.ndarray) -> dict[str, float]:
        """Fit the value head before step 0: states [R, H], and for each of N completions its prompt [N] and reward [N].

        Full-batch AdamW on mean expectile(reward - V). Returns what to log, e.g. {"value/fit_loss": ...}. Every rank is given the same
        data and gets the same head.
        """
        ...

    def step(self, batch: Batch, lr: float) -> Outcome:
        """One optimizer step on the whole batch, in micro-batches of the configured size over all ranks.

        Raises NonFiniteError, before any weight has changed, if a score or the gradient is not finite.
        """
        ...

    def score(self, batch: Batch) -> Outcome:
        """The policy's scores of a batch without gradient: what the objective needs, partner_logp if the batch has partners."""
        ...

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Tokens]:
        """Sampled continuations, without the end-of-turn token. Same seed, same backend: same text."""
        ...

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Everything that training changes, as NumPy: {"adapter": ..., "value_head": ..., "optimizer": ..., "losses": ...}.

        Names and layouts are PEFT's and torch's on either backend: `base_model.model.<path>.lora_A.weight` [r, in], `.lora_B.weight`
        [out, r]; value head `0.weight`, `0.bias`, `2.weight`, ...; optimizer `<name>.exp_avg`, `.exp_avg_sq`, `.square_avg`, `.step`;
        `losses` (float64, where a loss has any): running statistics by `Objective.initial_state`'s names.
        """
        ...

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Inverse of `state`; refuses missing, unexpected or differently shaped arrays by name."""
        ...

    def adapter_config(self) -> dict[str, Any]:
        """PEFT's adapter_config.json for this adapter."""
        ...

    def peak_memory_gb(self) -> float:
        """Largest memory in use so far: of the device where it has its own, else of the process."""
        ...


class Backend(Protocol):
    """The module `upo_torch` or `upo_mlx`: `name`, `load`, `check`, `fast_dtype`, `free_memory` and `device_report` at module level."""

    name: str

    def load(self, config: RunConfig) -> Learner:
        """Model, adapter, reference and optimizer as configured; initialises the ranks."""
        ...

    def check(self, config: RunConfig) -> None:
        """Raises the BackendError that `load` would, for a device, a memory limit or a quantisation that cannot be had here; loads no model."""
        ...

    def fast_dtype(self) -> str:
        """The dtype that the default device multiplies fastest: what `auto` is on a GPU; on a CPU bfloat16 where it has it in hardware."""
        ...

    def free_memory(self, device: str) -> tuple[str, int]:
        """The device that a configuration's `device` is here, and the bytes free on it. Raises BackendError for one that is not there."""
        ...

    def device_report(self) -> dict[str, Any]:
        """What `upo doctor` shows: version, devices, memory, BLAS, what is missing and the command that mends it."""
        ...


PACKAGES = {"mlx": ("upo_mlx", "mlx.core"), "torch": ("upo_torch", "torch")}


def installed(name: str) -> bool:
    """Whether the framework behind a backend can be imported."""
    module = PACKAGES[name][1]
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def has_mlx_build() -> bool:
    """Whether MLX publishes a build for this platform at all."""
    machine = platform.machine()
    return (sys.platform == "darwin" and machine == "arm64") or (sys.platform == "linux" and machine in ("x86_64", "aarch64"))


def choose(name: str = "auto") -> str:
    """`auto` is MLX on Apple silicon and torch elsewhere, or whichever of the two is installed."""
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        preferred = ["mlx", "torch"] if apple else ["torch", "mlx"]
        return next((n for n in preferred if installed(n)), preferred[0])
    return name


def get_backend(name: str = "auto") -> Backend:
    """Import a backend, or say which command installs it."""
    name = choose(name)
    if name not in PACKAGES:
        raise BackendError(f'backend: unknown backend "{name}". Known: auto, mlx, torch.')
    if name == "mlx" and not has_mlx_build():
        raise BackendError(f"backend: MLX has no build for {sys.platform} on {platform.machine()}. Use --backend torch.")
    if not installed(name):
        raise BackendError(f'backend: {name} is not installed. Install it with: pip install "upo[{name}]"')
    return cast(Backend, importlib.import_module(PACKAGES[name][0]))
