"""The learner: scores, gradients and one optimizer step of a batch, on MLX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upo import adapters, models
from upo.backend import Comm, ModelInfo, Outcome, Sampling
from upo.config import RunConfig
from upo.data.batch import Batch
from upo.data.forest import Forest, Tokens, padded
from upo.errors import BackendError, ConfigError
from upo.learner import Part, check_finite, check_like, partner_logratio, partners_of, parts_of
from upo.losses.base import Scores
from upo.targets import policy_adapter, reference_adapter
from upo_mlx import device, generate, value
from upo_mlx.device import MlxComm, mx, to_numpy
from upo_mlx.logps import token_logps, token_logps_only
from upo_mlx.model import BASE, LoRA, Model, family_notes, load_base, lora_from
from upo_mlx.ops import ops
from upo_mlx.state import Optimizer, clip, export_arrays, import_arrays

Array = mx.array
Arrays = dict[str, Array]
HEAD = "value_head."


def load_learner(config: RunConfig) -> MlxLearner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks. Raises ModelError, ConfigError or BackendError."""
    if config.quantize != "none":
        raise BackendError(f"quantize: {config.quantize} needs bitsandbytes on CUDA (--backend torch). For MLX give a model folder quantised by mlx-lm.")
    where = device.choose_device(config.device)
    dtype, notes = device.choose_dtype(config.dtype, where)
    comm = MlxComm()
    device.share_threads(comm.size)
    folder = models.resolve(config.model, config.revision)
    net, repaired = load_base(folder, dtype, config.train.max_length)
    model = Model(net)
    dims = model.dims()
    start, started = policy_adapter(config, dims)
    reference = reference_adapter(config, dims, start)
    for adapter in (start, reference):
        model.add_loras(adapter.targets if adapter else ())
    policy = lora_from(start)
    model.check()
    info = ModelInfo(
        name=config.model,
        dtype=str(dtype).rpartition(".")[2],
        device=where,
        parameters=parameter_count(net),
        trainable=sum(a.size for a in policy.arrays.values()),
        targets=tuple(sorted({path.rpartition(".")[2] for path in start.targets})),
        weights_hash=models.weights_hash(folder),
        notes=(*notes, *device.blas_notes(where), *repaired, *family_notes(model), *started),
    )
    return MlxLearner(config, comm, model, policy, lora_from(reference) if reference else BASE, info, folder)


def parameter_count(net: Any) -> int:
    """Weights of the network before adapters, packed quantised ones counted singly."""
    from mlx_lm.utils import get_total_parameters

    loras = sum(a.size for name, a in _flat(net) if name.endswith(("lora_a", "lora_b")))
    return int(get_total_parameters(net)) - loras


def _flat(net: Any) -> Sequence[tuple[str, Array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(net.parameters())


class MlxLearner:
    """`upo.backend.Learner` on MLX."""

    def __init__(self, config: RunConfig, comm: MlxComm, model: Model, policy: LoRA, reference: LoRA, info: ModelInfo, folder: Path) -> None:
        self.config, self.model, self.info, self.folder = config, model, info, folder
        self.comm: Comm = comm
        self.policy, self.reference = policy, reference
        self.objective = config.objective.build()
        chosen = config.optimizer
        self.optimizer = Optimizer(chosen.name, policy.arrays, chosen.eps, chosen.weight_decay)
        self.head: Arrays = {}
        if "value" in self.objective.needs:
            width = int(model.hidden(mx.zeros((1, 1), mx.int32)).shape[-1])
            self.head = value.initial_head(width, 0.0, config.train.seed)
        self.head_optimizer = Optimizer("adamw", self.head)
        self._stops: tuple[int, ...] | None = None

    # --- Scores -------------------------------------------------------------------------------------------------------------------

    def logps(self, forest: Forest, *, reference: bool = False) -> np.ndarray:
        """[N] float32, without gradient; under the reference if asked."""
        with self.model.using(self.reference if reference else self.policy):
            return np.array(self._scores(forest, token_logps_only)[0])

    def prompt_states(self, forest: Forest) -> np.ndarray:
        """[R, H] float32 hidden states at the last prompt tokens, under the policy."""
        alone = Forest(forest.prompts, (), np.zeros(0, np.int64))
        layout = padded(alone)
        with self.model.using(self.policy):
            hidden = self.model.hidden(mx.array(layout.ids))
            return to_numpy(_rows(hidden)[mx.array(layout.value_src)])

    def score(self, batch: Batch) -> Outcome:
        """logp, partner_logp and value of a batch under the policy, shared between the ranks (every rank must call it)."""
        parts = parts_of(batch, self.config.train.micro_batch_tokens, self.comm)
        logp, v = self._score_parts(batch, parts)
        return Outcome(logp, v, self._partner_logps(batch))

    def _scores(self, forest: Forest, score: Callable[[Any, Array, Array], Array]) -> tuple[Array, Array]:
        """Summed log-probs [N] and the hidden states at the last prompt tokens [R, H]."""
        layout = padded(forest)
        hidden = _rows(self.model.hidden(mx.array(layout.ids)))
        tokens = score(self.model.head, hidden[mx.array(layout.src)], mx.array(layout.tgt))
        return ops.segment_sum(tokens, mx.array(layout.own), len(forest.completions)), hidden[mx.array(layout.value_src)]

    def _score_parts(self, batch: Batch, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray | None]:
        """Whole-step logp [N] and value [R], without gradient."""
        logp, v = np.zeros(len(batch.label), np.float32), np.zeros(len(batch.origins), np.float32)
        with self.model.using(self.policy):
            for part in parts:
                scores, states = self._scores(part.batch.forest, token_logps_only)
                logp[part.completions] = np.array(scores)
                if self.head:
                    v[part.rows] = np.array(value.value(self.head, states))
        logp, v = np.split(self.comm.all_sum(np.concatenate([logp, v])), [len(logp)])
        return logp, v if self.head else None

    def _partner_logps(self, batch: Batch) -> np.ndarray | None:
        """Whole-step log-probs [N] of KTO's partners, without gradient."""
        if batch.partners is None:
            return None
        logp = np.zeros(len(batch.label), np.float32)
        with self.model.using(self.policy):
            for part in parts_of(partners_of(batch), self.config.train.micro_batch_tokens, self.comm):
                logp[part.completions] = np.array(self._scores(part.batch.forest, token_logps_only)[0])
        return self.comm.all_sum(logp)

    # --- Training -----------------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, lr: float) -> Outcome:
        """One optimizer step on the whole batch. Raises NonFiniteError before any weight has changed."""
        parts = parts_of(batch, self.config.train.micro_batch_tokens, self.comm)
        partner_logp = self._partner_logps(batch)
        partner = partner_logratio(batch, partner_logp)

        weights = self._coefficients(batch, parts, partner) if self.objective.coupled else None
        logp, v = np.zeros(len(batch.label), np.float32), np.zeros(len(batch.origins), np.float32)
        total = {name: mx.zeros_like(p) for name, p in {**self.policy.arrays, **self._head_params()}.items()}
        for part in parts:
            part_logp, part_value, grads = self._gradient(part, partner, weights)
            total = {name: total[name] + grads[name] for name in total}
            mx.eval(total, part_logp, part_value)
            logp[part.completions], v[part.rows] = np.array(part_logp), np.array(part_value)
        total, logp, v = self._sum_over_ranks(total, logp, v)

        adapter, norm = clip({name: total[name] for name in self.policy.arrays}, self.config.optimizer.clip)
        head, head_norm = clip({name: total[HEAD + name] for name in self.head}, self._head_clip()) if self.head else ({}, mx.array(0.0))
        outcome = Outcome(logp, v if self.head else None, partner_logp, float(np.array(norm)), float(np.array(head_norm)))
        check_finite(batch, logp=logp, value=outcome.value, gradient=np.array([outcome.grad_norm, outcome.value_grad_norm]))

        self.policy = replace(self.policy, arrays=self.optimizer.update(self.policy.arrays, adapter, lr))
        if self.head:
            self.head = self.head_optimizer.update(self.head, head, self._value_config().lr)
        mx.eval(dict(self.policy.arrays), self.head, self.optimizer.moments, self.head_optimizer.moments)
        return outcome

    def _gradient(self, part: Part, partner: np.ndarray | None, weights: tuple[np.ndarray, np.ndarray] | None) -> tuple[Array, Array, Arrays]:
        """logp [n], value [r] and the gradient of this micro-batch's share of the step's loss by parameter name.

        With `weights`, the coefficients of the step's logp and value that a coupled loss has already been reduced to.
        """
        fixed = _fixed_scores(part.batch, partner)
        owner = mx.array(part.batch.forest.owner)

        def loss(params: Arrays) -> tuple[Array, Array, Array]:
            adapter = LoRA({name: params[name] for name in self.policy.arrays}, self.policy.scale)
            with self.model.using(adapter), self._checkpointing():
                logp, states = self._scores(part.batch.forest, token_logps)
            head = {name: params[HEAD + name] for name in self.head}
            v = value.value(head, states) if head else mx.zeros(len(part.rows))
            if weights is not None:
                share = mx.sum(mx.array(weights[0][part.completions]) * logp) + mx.sum(mx.array(weights[1][part.rows]) * v)
            else:
                scores = replace(fixed, logp=logp, value=mx.take(v, owner) if head else None)
                share = self.objective(ops, scores)["loss"]
            return share, logp, v

        (_, logp, v), grads = mx.value_and_grad(loss)({**self.policy.arrays, **self._head_params()})
        return logp, v, grads

    def _coefficients(self, batch: Batch, parts: Sequence[Part], partner: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Gradient of a coupled objective with respect to the step's logp [N] and value [R]: a first pass over all micro-batches."""
        logp, v = self._score_parts(batch, parts)
        check_finite(batch, logp=logp, value=v)
        fixed, owner = _fixed_scores(batch, partner), mx.array(batch.forest.owner)

        def loss(logp: Array, v: Array) -> Array:
            return self.objective(ops, replace(fixed, logp=logp, value=mx.take(v, owner) if self.head else None))["loss"]

        start = mx.array(logp), mx.array(np.zeros(len(batch.origins), np.float32) if v is None else v)
        by_logp, by_value = mx.grad(loss, argnums=(0, 1))(*start)
        return np.array(by_logp), np.array(by_value)

    def _checkpointing(self) -> AbstractContextManager[None]:
        return self.model.recomputing() if self.config.train.gradient_checkpointing else nullcontext()

    def _head_params(self) -> Arrays:
        return {HEAD + name: array for name, array in self.head.items()}

    def _sum_over_ranks(self, grads: Arrays, logp: np.ndarray, v: np.ndarray) -> tuple[Arrays, np.ndarray, np.ndarray]:
        """One sum for everything a step shares."""
        if self.comm.size == 1:
            return grads, logp, v
        flat = [*(np.array(g).ravel() for g in grads.values()), logp, v]
        summed = np.split(self.comm.all_sum(np.concatenate(flat)), np.cumsum([a.size for a in flat])[:-1])
        return {name: mx.array(a.reshape(g.shape)) for (name, g), a in zip(grads.items(), summed[:-2], strict=True)}, summed[-2], summed[-1]

    # --- Value head ---------------------------------------------------------------------------------------------------------------

    def fit_value(self, states: np.ndarray, prompt: np.ndarray, reward: np.ndarray) -> dict[str, float]:
        """Start the head anew at the mean reward and fit it (`value.fit`)."""
        chosen, auxiliary = self._value_config(), self.objective.auxiliary
        assert auxiliary is not None
        head = value.initial_head(states.shape[1], float(np.mean(reward)), self.config.train.seed)
        self.head, loss = value.fit(head, states, prompt, reward, auxiliary.expectile, chosen.fit_steps, chosen.fit_lr)
        self.head_optimizer = Optimizer("adamw", self.head)
        return {"value/fit_loss": loss}

    def _value_config(self) -> Any:
        auxiliary = self.config.objective.auxiliary
        if auxiliary is None:
            raise ConfigError("objective.auxiliary: a value head needs auxiliary rewards.")
        return auxiliary.value

    def _head_clip(self) -> float:
        return float(self._value_config().clip)

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
        return sections | ({"value_head": export_arrays(self.head)} if self.head else {})

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Inverse of `state`; refuses missing, unexpected or differently shaped arrays by name."""
        check_like(state, self.state())
        moments = state["optimizer"]
        self.policy = replace(self.policy, arrays=import_arrays(state["adapter"]))
        self.optimizer.load_state({name: a for name, a in moments.items() if not name.startswith(HEAD)})
        if self.head:
            self.head = import_arrays(state["value_head"])
            self.head_optimizer.load_state(moments, HEAD)

    def adapter_config(self) -> dict[str, Any]:
        """PEFT's adapter_config.json."""
        rank = next(a.shape[1] for name, a in self.policy.arrays.items() if name.endswith(".lora_A.weight"))
        return adapters.peft_config(self.config.model, rank, self.policy.scale * rank, adapters.modules_of(self.policy.arrays), len(self.model.layer_paths))

    def peak_memory_gb(self) -> float:
        return device.peak_memory_gb(self.info.device)


def _fixed_scores(batch: Batch, partner: np.ndarray | None) -> Scores:
    """The scores of a batch as MLX arrays, all but logp and value."""
    return batch.scores(np.zeros(len(batch.label), np.float32), None, partner).map(mx.array, mx.array)


def _rows(hidden: Array) -> Array:
    return hidden.reshape(-1, hidden.shape[-1])

