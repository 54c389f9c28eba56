"""The learner: scores, gradients and one optimizer step of a batch, on PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from upo import adapters
from upo.backend import ModelInfo, Outcome, Sampling
from upo.config import RunConfig, ValueConfig
from upo.data.batch import Batch, with_scored
from upo.data.forest import Forest, Layout, Tokens, padded
from upo.data.packed import packed
from upo.learner import (
    Part,
    Scored,
    advanced,
    blank,
    check_finite,
    check_like,
    fill,
    loss_scales,
    outcome_of,
    partner_logratio,
    partners_of,
    parts_of,
    scored_names,
    sum_over_ranks,
)
from upo.losses.base import LEAVES, Scores
from upo_torch import device, generate, selfcheck, value
from upo_torch.device import TorchComm
from upo_torch.logps import collisions, token_logps
from upo_torch.model import Model
from upo_torch.ops import ops
from upo_torch.state import Optimizer, export_arrays, import_arrays, to_numpy

HEAD = "value_head."
Method = TypeVar("Method", bound=Callable[..., Any])


def quick(method: Method) -> Method:
    """A learner's method that computes without denormal numbers."""

    @wraps(method)
    def inner(learner: TorchLearner, *args: Any, **named: Any) -> Any:
        with device.without_denormals(learner.model.device):
            return method(learner, *args, **named)

    return cast("Method", inner)


class TorchLearner:
    """`upo.backend.Learner` on PyTorch."""

    def __init__(self, config: RunConfig, comm: TorchComm, model: Model, info: ModelInfo, folder: Path) -> None:
        self.config, self.comm, self.model, self.info, self.folder = config, comm, model, info, folder
        self.objective = config.objective.build()
        self.running = self.objective.initial_state()
        self.names = scored_names(self.objective.needs)
        chosen = config.optimizer
        self.optimizer = Optimizer(chosen.name, model.policy, chosen.eps, chosen.weight_decay)
        self.head: dict[str, torch.Tensor] = {}
        if {"value", "token_value"} & set(self.names):
            width = int(model.hidden(torch.zeros(1, 1, dtype=torch.long, device=model.device)).shape[-1])
            self.head = value.initial_head(width, 0.0, config.train.seed, model.device)
        self.head_optimizer = Optimizer("adamw", self.head) if self.head else None
        self._stops: tuple[int, ...] | None = None

    # --- Scores -------------------------------------------------------------------------------------------------------------------

    def check_sharing(self, row: Forest) -> None:
        """Padded rows from here on, with a note, if this row of the data is not scored alike with its prompt shared. Collective."""
        if self.info.layout != "padded":
            with self._checkpointing():
                note = selfcheck.unlike_on(self.model, row, self.comm)
            if note is not None:
                self.info = replace(self.info, layout="padded", notes=(*self.info.notes, note))

    @quick
    @torch.no_grad()
    def logps(self, forest: Forest, *, reference: int | None = None, tokens: bool = False) -> np.ndarray:
        """[N] float32 log-probs of completions, or [M] of their tokens, without gradient; under a reference if asked."""
        with nullcontext() if reference is None else self.model.reference(reference):
            layout = self._layout(forest)
            found = self._tokens(layout, self.model.hidden_of(layout))
            return to_numpy(found if tokens else self._sums(found, layout, len(forest.completions)))

    @torch.no_grad()
    def prompt_states(self, forest: Forest, *, reference: int | None = None) -> np.ndarray:
        """[R, H] float32 hidden states at the last prompt tokens, under the policy or a reference."""
        layout = self._layout(Forest(forest.prompts, (), np.zeros(0, np.int64)))
        with nullcontext() if reference is None else self.model.reference(reference):
            return to_numpy(self.model.hidden_of(layout)[self._indices(layout.value_src)])

    @quick
    @torch.no_grad()
    def score(self, batch: Batch) -> Outcome:
        """What the objective needs of a batch under the policy, shared between the ranks (every rank must call it)."""
        whole = self._score_parts(batch, parts_of(batch, self.comm, self.info))
        return outcome_of(whole, self._partner_logps(batch), self.running)

    def _scores(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the objective needs of a micro-batch, by name (`upo.data.batch.SCORED`)."""
        layout, n, m = self._layout(batch.scored), batch.size("logp"), batch.size("token_logp")
        hidden = self.model.hidden_of(layout)
        tokens, head = self._tokens(layout, hidden), self.model.head
        sums = self._sums(tokens, layout, len(batch.scored.completions))  # the completions, then the anchors
        makers: dict[str, Callable[[], torch.Tensor]] = {
            "logp": lambda: sums[:n],
            "anchor_logp": lambda: sums[n:],
            "token_logp": lambda: tokens[:m],
            "collision": lambda: ops.segment_sum(collisions(head, head.width, hidden[self._indices(layout.src[:m])]), self._indices(layout.own[:m]), n),
            "value": lambda: value.value(self.head, hidden[self._indices(layout.value_src)]),
            "token_value": lambda: value.value(self.head, hidden[self._indices(layout.src[:m])]),
        }
        return {name: makers[name]() for name in self.names}

    def _tokens(self, layout: Layout, hidden: torch.Tensor) -> torch.Tensor:
        head = self.model.head
        return token_logps(head, head.width, hidden[self._indices(layout.src)], self._indices(layout.tgt))

    def _sums(self, tokens: torch.Tensor, layout: Layout, completions: int) -> torch.Tensor:
        return ops.segment_sum(tokens, self._indices(layout.own), completions)

    def _layout(self, forest: Forest) -> Layout:
        return packed(forest) if self.info.layout == "packed" else padded(forest)

    @torch.no_grad()
    def _score_parts(self, batch: Batch, parts: Sequence[Part]) -> Scored:
        """Whole-step scores, without gradient."""
        whole = blank(batch, self.names)
        for part in parts:
            fill(whole, part.places, {name: to_numpy(x) for name, x in self._scores(part.batch).items()})
        return sum_over_ranks(self.comm, whole)

    @torch.no_grad()
    def _partner_logps(self, batch: Batch) -> np.ndarray | None:
        """Whole-step log-probs [N] of KTO's partners, without gradient, in micro-batches of their own: their lengths are others."""
        if batch.partners is None:
            return None
        whole = blank(batch, ["logp"])
        for part in parts_of(partners_of(batch), self.comm, self.info):
            fill(whole, part.places, {"logp": self.logps(part.batch.forest)})
        return sum_over_ranks(self.comm, whole)["logp"]

    # --- Training -----------------------------------------------------------------------------------------------------------------

    @quick
    def step(self, batch: Batch, lr: float) -> Outcome:
        """One optimizer step on the whole batch. Raises NonFiniteError before any weight has changed."""
        partner_logp = self._partner_logps(batch)
        partner = partner_logratio(batch, partner_logp)
        parts = parts_of(batch, self.comm, self.info)
        weights, running = self._coefficients(batch, parts, partner_logp) if self.objective.coupled else (None, self.running)
        optimizers = [self.optimizer] + ([self.head_optimizer] if self.head_optimizer else [])
        for scale in loss_scales(self.info.dtype):
            for optimizer in optimizers:
                optimizer.zero_grad()
            whole = blank(batch, self.names)
            for part in parts:
                fill(whole, part.places, self._backward(part, partner, weights, scale))
            whole = self._sum_over_ranks(whole)
            if scale != 1.0:
                for optimizer in optimizers:
                    optimizer.grads.mul_(1.0 / scale)
            norm = self.optimizer.clip(self.config.optimizer.clip)
            head_norm = self.head_optimizer.clip(self._value_config().clip) if self.head_optimizer else 0.0
            if math.isfinite(norm + head_norm):
                break
        check_finite(batch, whole, [norm, head_norm])

        self.optimizer.step(lr)
        if self.head_optimizer:
            self.head_optimizer.step(self._value_config().lr)
        self.running = running
        return outcome_of(whole, partner_logp, running, (norm, head_norm))

    def _backward(self, part: Part, partner: np.ndarray | None, weights: Scored | None, scale: float) -> Scored:
        """Add the gradient of this micro-batch's share of the step's loss, times `scale`; returns its scores.

        With `weights`, the coefficients of the step's scores that a coupled loss has already been reduced to.
        """
        with self._checkpointing():
            found = self._scores(part.batch)
            if weights is not None:
                share = sum((self._floats(w[part.places.of(name)]) * found[name]).sum() for name, w in weights.items())
            else:
                share = self.objective(ops, with_scored(ops, self._fixed_scores(part.batch, partner), found))["loss"]
            if isinstance(share, torch.Tensor):  # a plain 0.0 if every term is switched off
                (share * scale).backward()
        return {name: to_numpy(x) for name, x in found.items()}

    def _coefficients(self, batch: Batch, parts: Sequence[Part], partner_logp: np.ndarray | None) -> tuple[Scored, dict[str, float]]:
        """Gradient of a coupled objective with respect to the step's scores, after a first pass over all micro-batches; and its running
        statistics with this step taken in."""
        whole = self._score_parts(batch, parts)
        check_finite(batch, whole)
        running = advanced(self.objective, batch, outcome_of(whole, partner_logp, self.running))
        found = {name: self._floats(vector) for name, vector in whole.items()}
        leaves = {name: found[name].requires_grad_() for name in self.names if name in LEAVES}
        fixed = self._fixed_scores(batch, partner_logratio(batch, partner_logp), running)
        self.objective(ops, with_scored(ops, fixed, found))["loss"].backward()
        return {name: np.zeros(x.shape, np.float32) if x.grad is None else to_numpy(x.grad) for name, x in leaves.items()}, running

    def _checkpointing(self) -> AbstractContextManager[None]:
        return self.model.recomputing() if self.config.train.gradient_checkpointing else nullcontext()

    def _sum_over_ranks(self, whole: Scored) -> Scored:
        """One sum for everything a step shares: the gradients, in place, and the scores."""
        if self.comm.size == 1:
            return whole
        grads = [self.optimizer.grads, *([self.head_optimizer.grads] if self.head_optimizer else [])]
        vectors = [*grads, *(self._floats(v) for v in whole.values())]
        summed = self.comm.all_sum_tensor(torch.cat(vectors)).split([len(v) for v in vectors])
        for grad, total in zip(grads, summed, strict=False):
            grad.copy_(total)
        return {name: to_numpy(total) for name, total in zip(whole, summed[len(grads) :], strict=True)}

    # --- Value head ---------------------------------------------------------------------------------------------------------------

    def fit_value(self, states: np.ndarray, prompt: np.ndarray, reward: np.ndarray) -> dict[str, float]:
        """Start the head anew at the mean reward and fit it (`value.fit`)."""
        chosen = self._value_config()
        self.head = value.initial_head(states.shape[1], float(np.mean(reward)), self.config.train.seed, self.model.device)
        loss = value.fit(self.head, states, prompt, reward, self.objective.expectile, chosen.fit_steps, chosen.fit_lr)
        self.head_optimizer = Optimizer("adamw", self.head)
        return {"value/fit_loss": loss}

    def _value_config(self) -> ValueConfig:
        return self.config.objective.value_head

    # --- Generation and state -----------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Tokens]:
        """Sampled continuations under the policy, without the stop token."""
        if self._stops is None:
            from upo.data.tokenizer import load_tokenizer

            self._stops = load_tokenizer(self.folder).eos_ids
        return generate.generate(self.model, prompts, sampling, self._stops)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Adapter, value head and optimizer as float32 NumPy, in PEFT's and torch's names and layouts."""
        moments = self.optimizer.state() | (self.head_optimizer.state(HEAD) if self.head_optimizer else {})
        sections = {"adapter": export_arrays(self.model.policy), "optimizer": moments}
        running = {name: np.array(v, np.float64) for name, v in self.running.items()}
        return sections | ({"value_head": export_arrays(self.head)} if self.head else {}) | ({"losses": running} if running else {})

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Inverse of `state`; refuses missing, unexpected or differently shaped arrays by name."""
        check_like(state, self.state())
        import_arrays(self.model.policy, state["adapter"])
        self.optimizer.load_state(state["optimizer"])
        if self.head_optimizer:
            import_arrays(self.head, state["value_head"])
            self.head_optimizer.load_state(state["optimizer"], HEAD)
        self.running = {name: float(state["losses"][name]) for name in self.running}

    def adapter_config(self) -> dict[str, Any]:
        """PEFT's adapter_config.json."""
        rank = next(p.shape[0] for name, p in self.model.policy.items() if name.endswith(".lora_A.weight"))
        return adapters.peft_config(self.config.model, rank, self.model.scale * rank, adapters.modules_of(self.model.policy), self.model.layers)

    def peak_memory_gb(self) -> float:
        return device.peak_memory_gb(self.model.device)

    # --- To the device ------------------------------------------------------------------------------------------------------------

    def _floats(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.float32)).to(self.model.device)

    def _indices(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.int64)).to(self.model.device)

    def _fixed_scores(self, batch: Batch, partner: np.ndarray | None, state: Mapping[str, float] | None = None) -> Scores:
        """The scores of a batch as tensors, all but what the model finds."""
        scores = batch.scores(np.zeros(len(batch.label), np.float32), None, partner, state=self.running if state is None else state)
        return scores.map(self._floats, self._indices)
