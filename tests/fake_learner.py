"""A learner without a framework: a bigram table with a low-rank adapter, real gradients, and a linear value head. Milliseconds per step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from upo import random
from upo.backend import ModelInfo, Outcome, Sampling
from upo.config import RunConfig, load_config
from upo.data.batch import FEW_TOKENS, Batch, Example
from upo.data.forest import Forest, Tokens
from upo.errors import NonFiniteError
from upo.losses import Objective
from upo.numpy_ops import ops
from upo.sampling import uniforms

VOCAB, RANK = 12, 2
A, B = (f"base_model.model.table.lora_{side}.weight" for side in "AB")


class Alone:
    """One rank."""

    rank, size = 0, 1

    def all_sum(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


class ThreadComm:
    """Rank of a run whose ranks are threads; `ThreadComm.make(n)` makes all of them."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.shared, self.barrier = rank, size, shared, barrier
        self.calls = 0

    @classmethod
    def make(cls, size: int) -> list[ThreadComm]:
        shared: list[Any] = [None] * size
        barrier = threading.Barrier(size, timeout=20)
        return [cls(rank, size, shared, barrier) for rank in range(size)]

    def all_sum(self, array: np.ndarray) -> np.ndarray:
        self.calls += 1
        self.shared[self.rank] = array.copy()
        self.barrier.wait()
        assert len({part.shape for part in self.shared}) == 1, "ranks must sum arrays of one shape"
        total = sum(self.shared[1:], self.shared[0])
        self.barrier.wait()
        return total


def tokens_of(config: RunConfig) -> int:
    """`train.micro_batch_tokens`; `auto` as on a CPU."""
    given = config.train.micro_batch_tokens
    return FEW_TOKENS if given == "auto" else given


class FakeLearner:
    """`upo.backend.Learner` on NumPy: log p(next | previous) = log_softmax(table + B A)[previous], V(x) = w[last prompt token] + b."""

    def __init__(self, config: RunConfig, comm: Any = None, weights: str = "w0") -> None:
        self.config, self.comm = config, comm or Alone()
        self.objective: Objective = config.objective.build()
        self.table = random.uniform((VOCAB, VOCAB), 1.0, 7, "fake", weights).astype(np.float64)
        self.adapter = {A: random.uniform((RANK, VOCAB), 1.0, 0, "fake", "a"), B: np.zeros((VOCAB, RANK), np.float32)}
        self.head = {"4.weight": np.zeros((1, VOCAB), np.float32), "4.bias": np.zeros(1, np.float32)} if self.objective.auxiliary else {}
        self.moments = {f"{name}.exp_avg": np.zeros_like(value) for name, value in self._trained()}
        self.info = ModelInfo("fake", "float32", "cpu", VOCAB * VOCAB, 2 * RANK * VOCAB, ("table",), weights, micro_batch_tokens=tokens_of(config))
        self.scored = 0  # completions scored by this rank under the reference
        self.steps: list[int] = []
        self.lrs: list[float] = []
        self.before_step: Callable[[int], None] = lambda step: None
        self.reference_offset = 0.0

    def _trained(self) -> list[tuple[str, np.ndarray]]:
        return [*self.adapter.items(), *((f"value_head.{k}", v) for k, v in self.head.items())]

    def _table(self, reference: bool = False) -> np.ndarray:
        logits = self.table if reference else self.table + self.adapter[B].astype(np.float64) @ self.adapter[A].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def _steps_of(self, forest: Forest, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.concatenate([forest.prompts[int(forest.owner[i])][-1:], forest.completions[i]])
        return tokens[:-1], tokens[1:]

    def check_sharing(self, row: Forest) -> None:
        self.tried = row

    def logps(self, forest: Forest, *, reference: int | None = None, tokens: bool = False) -> np.ndarray:
        table = self._table(reference is not None)
        by_token = [table[self._steps_of(forest, i)] for i in range(len(forest.completions))]
        logp = np.concatenate(by_token).astype(np.float32) if tokens else np.array([t.sum() for t in by_token], np.float32)
        self.scored += len(forest.completions) if reference is not None else 0
        return logp + (np.float32(0) if reference is None else np.float32(self.reference_offset * (reference + 1)))

    def prompt_states(self, forest: Forest, *, reference: int | None = None) -> np.ndarray:
        return np.eye(VOCAB, dtype=np.float32)[[int(p[-1]) for p in forest.prompts]]

    def fit_value(self, states: np.ndarray, prompt: np.ndarray, reward: np.ndarray) -> dict[str, float]:
        self.head["4.bias"] = np.array([reward.mean()], np.float32)
        for state in range(VOCAB):  # mean reward of each last token
            mine = reward[states[prompt][:, state] > 0]
            if len(mine):
                self.head["4.weight"][0, state] = mine.mean() - reward.mean()
        residual = reward - (states @ self.head["4.weight"][0])[prompt] - self.head["4.bias"][0]
        return {"value/fit_loss": float(np.mean(residual**2))}

    def _value(self, forest: Forest) -> np.ndarray | None:
        if not self.head:
            return None
        return (self.prompt_states(forest) @ self.head["4.weight"][0] + self.head["4.bias"][0]).astype(np.float32)

    def score(self, batch: Batch) -> Outcome:
        partner = None if batch.partners is None else self.logps(batch.partners)
        return Outcome(self.logps(batch.forest), self._value(batch.forest), partner)

    def step(self, batch: Batch, lr: float) -> Outcome:
        self.before_step(batch.step)
        outcome = self.score(batch)
        if not np.isfinite(outcome.logp).all():
            raise NonFiniteError(f"step {batch.step + 1}: scores that are not finite, in rows {batch.origins[0]}.")
        partner = None if outcome.partner_logp is None or batch.partner_ref_logp is None else outcome.partner_logp - batch.partner_ref_logp
        value = None if outcome.value is None else outcome.value.astype(np.float64)

        def loss(logp: np.ndarray, value: np.ndarray | None) -> float:
            return float(self.objective(ops, batch.scores(logp, value, partner))["loss"])

        coefficient = _slope(lambda x: loss(x, value), outcome.logp.astype(np.float64))
        policy, slope = np.exp(self._table()), np.zeros((VOCAB, VOCAB))
        for i, c in enumerate(coefficient):
            for source, target in zip(*self._steps_of(batch.forest, i), strict=True):
                slope[source] -= c * policy[source]
                slope[source, target] += c
        low, up = (self.adapter[name].astype(np.float64) for name in (A, B))
        gradient = {A: up.T @ slope, B: slope @ low.T}
        norm, head_norm = (np.sqrt(sum(float((g**2).sum()) for g in gradient.values())), 0.0)
        if value is not None:
            by_prompt = _slope(lambda v: loss(outcome.logp.astype(np.float64), v), value)
            head = {"4.weight": (by_prompt @ self.prompt_states(batch.forest))[None], "4.bias": np.array([by_prompt.sum()])}
            head_norm = np.sqrt(sum(float((g**2).sum()) for g in head.values()))
            gradient |= {f"value_head.{name}": g for name, g in head.items()}
        for name, old in self._trained():
            moment = self.moments[f"{name}.exp_avg"] = (0.5 * self.moments[f"{name}.exp_avg"] + gradient[name]).astype(np.float32)
            rate = lr if name in self.adapter else 0.1 * lr
            new = (old - rate * moment).astype(np.float32)
            if name in self.adapter:
                self.adapter[name] = new
            else:
                self.head[name.removeprefix("value_head.")] = new
        self.steps.append(batch.step)
        self.lrs.append(lr)
        return Outcome(outcome.logp, outcome.value, outcome.partner_logp, norm, head_norm)

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Tokens]:
        """At temperature 1; token 0 ends a text."""
        reached = np.cumsum(np.exp(self._table()), axis=1)
        made = []
        for i, prompt in enumerate(prompts):
            tokens = [int(prompt[-1])]
            for uniform in uniforms(sampling, i):
                tokens.append(min(int(np.searchsorted(reached[tokens[-1]], uniform)), VOCAB - 1))
                if tokens[-1] == 0:
                    tokens.pop()
                    break
            made.append(np.array(tokens[1:], np.int32))
        return made

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        return {"adapter": dict(self.adapter), "value_head": dict(self.head), "optimizer": dict(self.moments)}

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        assert {part: sorted(arrays) for part, arrays in state.items()} == {part: sorted(arrays) for part, arrays in self.state().items()}
        self.adapter, self.head, self.moments = (dict(state[part]) for part in ("adapter", "value_head", "optimizer"))

    def adapter_config(self) -> dict[str, Any]:
        return {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["table"], "base_model_name_or_path": "fake"}

    def peak_memory_gb(self) -> float:
        return 0.25


def _slope(function: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-4) -> np.ndarray:
    """Gradient by central differences."""
    out = np.zeros_like(x)
    for i in range(len(x)):
        up, down = x.copy(), x.copy()
        up[i], down[i] = x[i] + h, x[i] - h
        out[i] = (function(up) - function(down)) / (2 * h)
    return out


class Words:
    """A tokenizer that only reads: token 0 is `a`."""

    def decode(self, tokens: Tokens) -> str:
        return " ".join(chr(ord("a") + int(token)) for token in tokens)


class Rows:
    """Stands in for what `load_data` returns."""

    def __init__(self, train: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        self.train, self.eval = tuple(train), tuple(held_out)


def pairs(count: int, seed: int = 0, name: str = "train") -> list[Example]:
    """Pairs of distinct prompts: the chosen completion repeats token 3, the rejected token 4; a column `goal` prefers the rejected one."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        prompt = np.array([*rng.integers(5, VOCAB, rng.integers(2, 6)), *np.unravel_index(i + seed * 100, (VOCAB, VOCAB, VOCAB))], np.int32)
        chosen, rejected = (np.array([token] * rng.integers(1, 6), np.int32) for token in (3, 4))
        rows.append(
            Example(f"{name}.jsonl:{i + 1}", "pair", prompt, (chosen, rejected), (1, -1), texts=("c", "r"), prompt_text="p", columns={"goal": (0.2, 0.8)})
        )
    return rows


def unpaired(count: int, labels: Sequence[int] = (1, -1)) -> list[Example]:
    """Single completions with alternating labels."""
    kind = "unpaired" if 0 not in labels else "group"
    return [Example(e.origin, kind, e.prompt, e.completions[:1], (labels[i % len(labels)],)) for i, e in enumerate(pairs(count))]


def configure(objective: Any = None, **sections: Any) -> RunConfig:
    """A configuration of a few steps; sections are merged into it."""
    base: dict[str, Any] = {
        "model": "fake",
        "backend": "torch",
        "data": {"train": "train.jsonl"},
        "objective": objective or {"preference": {"loss": "dpo"}},
        "optimizer": {"lr": 0.5, "warmup_steps": 0, "schedule": "constant"},
        "train": {"batch_size": 4, "epochs": 2, "save_every": 0},
    }
    for key, value in sections.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return load_config(base)


UPO = {"preset": "upo", "auxiliary": {"rewards": [{"scorer": "column", "column": "goal"}]}}
