"""The learner: scores, gradients and one optimizer step of a batch, on MLX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upo import adapters
from upo.backend import Comm, ModelInfo, Outcome, Sampling
from upo.config import RunConfig, ValueConfig
from upo.data.batch import Batch, with_scored
from upo.data.forest import Forest, Layout, Tokens
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
from upo_mlx import device, generate, selfcheck, value
from upo_mlx.device import MlxComm, mx, to_numpy
from upo_mlx.logps import collisions, token_logps, token_logps_only
from upo_mlx.model import LoRA, Model
from upo_mlx.ops import ops
from upo_mlx.shared import PaddedRows, Rows
from upo_mlx.state import Optimizer, clip, export_arrays, import_arrays

Array = mx.array
Arrays = dict[str, Array]
TokenLogps = Callable[[Any, Array, Array], Array]
HEAD = "value_head."


class MlxLearner:
    """`upo.backend.Learner` on MLX."""

    def __init__(
        self, config: RunConfig, comm: MlxComm, model: Model, rows: Rows, policy: LoRA, references: Sequence[LoRA], info: ModelInfo, folder: Path
    ) -> None:
        self.config, self.model, self.rows, self.info, self.folder = config, model, rows, info, folder
        self.comm: Comm = comm
        self.policy, self.references = policy, references
        self.objective = config.objective.build()
        self.running = self.objective.initial_state()
        self.names = scored_names(self.objective.needs)
        chosen = config.optimizer
        self.optimizer = Optimizer(chosen.name, policy.arrays, chosen.eps, chosen.weight_decay)
        self.head: Arrays = {}
        if {"value", "token_value"} & set(self.names):
            width = int(model.hidden(mx.zeros((1, 1), mx.int32)).shape[-1])
            self.head = value.initial_head(width, 0.0, config.train.seed)
        self.head_optimizer = Optimizer("adamw", self.head)
        self._stops: tuple[int, ...] | None = None

    # --- Scores -------------------------------------------------------------------------------------------------------------------

    def check_sharing(self, row: Forest) -> None:
        """Padded rows from here on, with a note, if this row of the data is not scored alike with its prompt shared. Collective."""
        if self.info.layout != "padded":
            note = selfcheck.unlike_on(self.model, self.policy, self.rows, row, self.config.train, self.info.dtype, self.comm)
            if note is not None:
                self.rows, self.info = PaddedRows(), replace(self.info, layout="padded", notes=(*self.info.notes, note))

    def logps(self, forest: Forest, *, reference: int | None = None, tokens: bool = False) -> np.ndarray:
        """[N] float32 log-probs of completions, or [M] of their tokens, without gradient; under a reference if asked."""
        with self.model.using(self.policy if reference is None else self.references[reference]):
            layout = self.rows.lay(forest)
            found = self._tokens(layout, self.rows.hidden(self.model, layout), token_logps_only)
            return np.array(found if tokens else self._sums(found, layout, len(forest.completions)))

    def prompt_states(self, forest: Forest, *, reference: int | None = None) -> np.ndarray:
        """[R, H] float32 hidden states at the last prompt tokens, under the policy or a reference."""
        layout = self.rows.lay(Forest(forest.prompts, (), np.zeros(0, np.int64)))
        with self.model.using(self.policy if reference is None else self.references[reference]):
            return to_numpy(self.rows.hidden(self.model, layout)[mx.array(layout.value_src)])

    def score(self, batch: Batch) -> Outcome:
        """What the objective needs of a batch under the policy, shared between the ranks (every rank must call it)."""
        whole = self._score_parts(batch, parts_of(batch, self.comm, self.info))
        return outcome_of(whole, self._partner_logps(batch), self.running)

    def _scores(self, batch: Batch, head: Arrays, score: TokenLogps) -> Arrays:
        """What the objective needs of a micro-batch, by name (`upo.data.batch.SCORED`)."""
        layout, n, m = self.rows.lay(batch.scored), batch.size("logp"), batch.size("token_logp")
        hidden = self.rows.hidden(self.model, layout)
        tokens = self._tokens(layout, hidden, score)
        sums = self._sums(tokens, layout, len(batch.scored.completions))  # the completions, then the anchors
        makers: dict[str, Callable[[], Array]] = {
            "logp": lambda: sums[:n],
            "anchor_logp": lambda: sums[n:],
            "token_logp": lambda: tokens[:m],
            "collision": lambda: ops.segment_sum(collisions(self.model.head, hidden[mx.array(layout.src[:m])]), mx.array(layout.own[:m]), n),
            "value": lambda: value.value(head, hidden[mx.array(layout.value_src)]),
            "token_value": lambda: value.value(head, hidden[mx.array(layout.src[:m])]),
        }
        return {name: makers[name]() for name in self.names}

    def _tokens(self, layout: Layout, hidden: Array, score: TokenLogps) -> Array:
        return score(self.model.head, hidden[mx.array(layout.src)], mx.array(layout.tgt))

    def _sums(self, tokens: Array, layout: Layout, completions: int) -> Array:
        return ops.segment_sum(tokens, mx.array(layout.own), completions)

    def _score_parts(self, batch: Batch, parts: Sequence[Part]) -> Scored:
        """Whole-step scores, without gradient."""
        whole = blank(batch, self.names)
        with self.model.using(self.policy):
            for part in parts:
                fill(whole, part.places, {name: np.array(x) for name, x in self._scores(part.batch, self.head, token_logps_only).items()})
        return sum_over_ranks(self.comm, whole)

    def _partner_logps(self, batch: Batch) -> np.ndarray | None:
        """Whole-step log-probs [N] of KTO's partners, without gradient, in micro-batches of their own: their lengths are others."""
        if batch.partners is None:
            return None
        whole = blank(batch, ["logp"])
        for part in parts_of(partners_of(batch), self.comm, self.info):
            fill(whole, part.places, {"logp": self.logps(part.batch.forest)})
        return sum_over_ranks(self.comm, whole)["logp"]

    # --- Training -----------------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, lr: float) -> Outcome:
        """One optimizer step on the whole batch. Raises NonFiniteError before any weight has changed."""
        partner_logp = self._partner_logps(batch)
        partner = partner_logratio(batch, partner_logp)
        parts = parts_of(batch, self.comm, self.info)
        weights, running = self._coefficients(batch, parts, partner_logp) if self.objective.coupled else (None, self.running)
        for scale in loss_scales(self.info.dtype):
            whole = blank(batch, self.names)
            total = {name: mx.zeros_like(p) for name, p in {**self.policy.arrays, **self._head_params()}.items()}
            for part in parts:
                found, grads = self._gradient(part, partner, weights, scale)
                total = {name: total[name] + grads[name] for name in total}
                mx.eval(total, found)
                fill(whole, part.places, {name: np.array(x) for name, x in found.items()})
            total, whole = self._sum_over_ranks(total, whole)
            if scale != 1.0:
                total = {name: grad * (1.0 / scale) for name, grad in total.items()}
            adapter, norm = clip({name: total[name] for name in self.policy.arrays}, self.config.optimizer.clip)
            head, head_norm = clip({name: total[HEAD + name] for name in self.head}, self._value_config().clip) if self.head else ({}, mx.array(0.0))
            norms = float(np.array(norm)), float(np.array(head_norm))
            if math.isfinite(sum(norms)):
                break
        check_finite(batch, whole, norms)

        self.policy = replace(self.policy, arrays=self.optimizer.update(self.policy.arrays, adapter, lr))
        if self.head:
            self.head = self.head_optimizer.update(self.head, head, self._value_config().lr)
        mx.eval(dict(self.policy.arrays), self.head, self.optimizer.moments, self.head_optimizer.moments)
        self.running = running
        return outcome_of(whole, partner_logp, running, norms)

    def _gradient(self, part: Part, partner: np.ndarray | None, weights: Scored | None, scale: float) -> tuple[Arrays, Arrays]:
        """The scores of this micro-batch, and the gradient of its share of the step's loss, times `scale`, by parameter name.

        With `weights`, the coefficients of the step's scores that a coupled loss has already been reduced to.
        """
        fixed = self._fixed_scores(part.batch, partner)

        def loss(params: Arrays) -> tuple[Array, Arrays]:
            adapter = LoRA({name: params[name] for name in self.policy.arrays}, self.policy.scale)
            head = {name: params[HEAD + name] for name in self.head}
            with self.model.using(adapter), self.model.recomputing(self.config.train.gradient_checkpointing):
                found = self._scores(part.batch, head, token_logps)
            if weights is not None:
                shares = [mx.sum(mx.array(w[part.places.of(name)]) * found[name]) for name, w in weights.items()]
                share = sum(shares[1:], shares[0])
            else:
                share = self.objective(ops, with_scored(ops, fixed, found))["loss"]
            return share * scale, found

        (_, found), grads = mx.value_and_grad(loss)({**self.policy.arrays, **self._head_params()})
        return found, grads

    def _coefficients(self, batch: Batch, parts: Sequence[Part], partner_logp: np.ndarray | None) -> tuple[Scored, dict[str, float]]:
        """Gradient of a coupled objective with respect to the step's scores, after a first pass over all micro-batches; and its running
        statistics with this step taken in."""
        whole = self._score_parts(batch, parts)
        check_finite(batch, whole)
        running = advanced(self.objective, batch, outcome_of(whole, partner_logp, self.running))
        fixed = self._fixed_scores(batch, partner_logratio(batch, partner_logp), running)
        constants = {name: mx.array(vector) for name, vector in whole.items() if name not in LEAVES}

        def loss(leaves: Arrays) -> Array:
            return self.objective(ops, with_scored(ops, fixed, {**constants, **leaves}))["loss"]

        grads = mx.grad(loss)({name: mx.array(vector) for name, vector in whole.items() if name in LEAVES})
        return {name: np.array(g) for name, g in grads.items()}, running

    def _head_params(self) -> Arrays:
        return {HEAD + name: array for name, array in self.head.items()}

    def _sum_over_ranks(self, grads: Arrays, whole: Scored) -> tuple[Arrays, Scored]:
        """One sum for everything a step shares."""
        if self.comm.size == 1:
            return grads, whole
        summed = sum_over_ranks(self.comm, {**{f"grad {name}": np.array(g).ravel() for name, g in grads.items()}, **whole})
        return {name: mx.array(summed[f"grad {name}"].reshape(g.shape)) for name, g in grads.items()}, {name: summed[name] for name in whole}

    # --- Value head ---------------------------------------------------------------------------------------------------------------

    def fit_value(self, states: np.ndarray, prompt: np.ndarray, reward: np.ndarray) -> dict[str, float]:
        """Start the head anew at the mean reward and fit it (`value.fit`)."""
        chosen = self._value_config()
        head = value.initial_head(states.shape[1], float(np.mean(reward)), self.config.train.seed)
        self.head, loss = value.fit(head, states, prompt, reward, self.objective.expectile, chosen.fit_steps, chosen.fit_lr)
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
        with self.model.using(self.policy):
            return generate.generate(self.model, prompts, sampling, self._stops)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Adapter, value head and optimizer as float32 NumPy, in PEFT's and torch's names and layouts."""
        moments = self.optimizer.state() | (self.head_optimizer.state(HEAD) if self.head else {})
        sections = {"adapter": export_arrays(self.policy.arrays), "optimizer": moments}
        running = {name: np.array(v, np.float64) for name, v in self.running.items()}
        return sections | ({"value_head": export_arrays(self.head)} if self.head else {}) | ({"losses": running} if running else {})

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Inverse of `state`; refuses missing, unexpected or differently shaped arrays by name."""
        check_like(state, self.state())
        moments = state["optimizer"]
        self.policy = replace(self.policy, arrays=import_arrays(state["adapter"]))
        self.optimizer.load_state({name: a for name, a in moments.items() if not name.startswith(HEAD)})
        if self.head:
            self.head = import_arrays(state["value_head"])
            self.head_optimizer.load_state(moments, HEAD)
        self.running = {name: float(state["losses"][name]) for name in self.running}

    def _fixed_scores(self, batch: Batch, partner: np.ndarray | None, state: Mapping[str, float] | None = None) -> Scores:
        """The scores of a batch as MLX arrays, all but what the model finds."""
        scores = batch.scores(np.zeros(len(batch.label), np.float32), None, partner, state=self.running if state is None else state)
        return scores.map(mx.array, mx.array)

    def adapter_config(self) -> dict[str, Any]:
        """PEFT's adapter_config.json."""
        rank = next(a.shape[1] for name, a in self.policy.arrays.items() if name.endswith(".lora_A.weight"))
        return adapters.peft_config(self.config.model, rank, self.policy.scale * rank, adapters.modules_of(self.policy.arrays), len(self.model.layer_paths))

    def peak_memory_gb(self) -> float:
        return device.peak_memory_gb(self.info.device)
