"""The learner: scores, gradients and one optimizer step of a batch, on PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upo import adapters, models
from upo.backend import ModelInfo, Outcome, Sampling
from upo.config import RunConfig
from upo.data.batch import Batch
from upo.data.forest import Forest, Layout, Tokens, padded
from upo.errors import ConfigError
from upo.learner import Part, check_finite, check_like, partner_logratio, partners_of, parts_of
from upo.losses.base import Scores
from upo.targets import policy_adapter, reference_adapter
from upo_torch import device, generate, value
from upo_torch.device import TorchComm
from upo_torch.logps import token_logps
from upo_torch.model import Model, family_notes, load_base, parameter_count
from upo_torch.ops import ops
from upo_torch.state import Optimizer, export_arrays, import_arrays, to_numpy

HEAD = "value_head."


def load_learner(config: RunConfig) -> TorchLearner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks. Raises ModelError, ConfigError or BackendError."""
    comm = TorchComm()
    device.share_threads(comm.local_size)
    where = device.choose_device(config.device, comm.local_rank, comm.local_size)
    dtype, notes = device.choose_dtype(config.dtype, where)
    comm.start(where)
    folder = models.resolve(config.model, config.revision)
    net, repaired = load_base(folder, dtype, where, config.quantize)
    parameters = parameter_count(net)
    model = Model(net, where)
    model.check()
    started = add_adapters(config, model)
    info = ModelInfo(
        name=config.model,
        dtype=str(dtype).removeprefix("torch."),
        device=str(where),
        parameters=parameters,
        trainable=sum(p.numel() for p in model.policy.values()),
        targets=tuple(sorted({path.rpartition(".")[2] for path in adapters.modules_of(model.policy)})),
        weights_hash=models.weights_hash(folder),
        notes=(*notes, *repaired, *family_notes(model), *started),
    )
    return TorchLearner(config, comm, model, info, folder)


def add_adapters(config: RunConfig, model: Model) -> list[str]:
    """The adapter to train and, unless it is the base, the reference; returns notes."""
    dims = model.dims()
    start, notes = policy_adapter(config, dims)
    model.add_policy(start)
    if reference := reference_adapter(config, dims, start):
        model.add_reference(reference)
    return notes


class TorchLearner:
    """`upo.backend.Learner` on PyTorch."""

    def __init__(self, config: RunConfig, comm: TorchComm, model: Model, info: ModelInfo, folder: Path) -> None:
        self.config, self.comm, self.model, self.info, self.folder = config, comm, model, info, folder
        self.objective = config.objective.build()
        chosen = config.optimizer
        self.optimizer = Optimizer(chosen.name, model.policy, chosen.eps, chosen.weight_decay)
        self.head: dict[str, torch.Tensor] = {}
        if "value" in self.objective.needs:
            width = int(model.hidden(torch.zeros(1, 1, dtype=torch.long, device=model.device)).shape[-1])
            self.head = value.initial_head(width, 0.0, config.train.seed, model.device)
        self.head_optimizer = Optimizer("adamw", self.head) if self.head else None
        self._stops: tuple[int, ...] | None = None

    # --- Scores -------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logps(self, forest: Forest, *, reference: bool = False) -> np.ndarray:
        """[N] float32, without gradient; under the reference if asked."""
        with self.model.reference() if reference else nullcontext():
            return to_numpy(self._scores(forest)[0])

    @torch.no_grad()
    def prompt_states(self, forest: Forest) -> np.ndarray:
        """[R, H] float32 hidden states at the last prompt tokens, under the policy."""
        layout = padded(Forest(forest.prompts, (), np.zeros(0, np.int64)))
        return to_numpy(self._hidden(layout)[self._indices(layout.value_src)])

    @torch.no_grad()
    def score(self, batch: Batch) -> Outcome:
        """logp, partner_logp and value of a batch under the policy, shared between the ranks (every rank must call it)."""
        logp, v = self._score_parts(batch, parts_of(batch, self.config.train.micro_batch_tokens, self.comm))
        return Outcome(logp, v, self._partner_logps(batch))

    def _scores(self, forest: Forest) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probs [N] and the hidden states at the last prompt tokens [R, H]."""
        layout = padded(forest)
        hidden, head = self._hidden(layout), self.model.head
        tokens = token_logps(head, head.width, hidden[self._indices(layout.src)], self._indices(layout.tgt))
        return ops.segment_sum(tokens, self._indices(layout.own), len(forest.completions)), hidden[self._indices(layout.value_src)]

    def _hidden(self, layout: Layout) -> torch.Tensor:
        return self.model.hidden(self._indices(layout.ids))

    @torch.no_grad()
    def _score_parts(self, batch: Batch, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray | None]:
        """Whole-step logp [N] and value [R], without gradient."""
        logp, v = np.zeros(len(batch.label), np.float32), np.zeros(len(batch.origins), np.float32)
        for part in parts:
            scores, states = self._scores(part.batch.forest)
            logp[part.completions] = to_numpy(scores)
            if self.head:
                v[part.rows] = to_numpy(value.value(self.head, states))
        logp, v = np.split(self.comm.all_sum(np.concatenate([logp, v])), [len(logp)])
        return logp, v if self.head else None

    @torch.no_grad()
    def _partner_logps(self, batch: Batch) -> np.ndarray | None:
        """Whole-step log-probs [N] of KTO's partners, without gradient, in micro-batches of their own: their lengths are others."""
        if batch.partners is None:
            return None
        logp = np.zeros(len(batch.label), np.float32)
        for part in parts_of(partners_of(batch), self.config.train.micro_batch_tokens, self.comm):
            logp[part.completions] = to_numpy(self._scores(part.batch.forest)[0])
        return self.comm.all_sum(logp)

    # --- Training -----------------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, lr: float) -> Outcome:
        """One optimizer step on the whole batch. Raises NonFiniteError before any weight has changed."""
        partner_logp = self._partner_logps(batch)
        partner = partner_logratio(batch, partner_logp)
        parts = parts_of(batch, self.config.train.micro_batch_tokens, self.comm)
        weights = self._coefficients(batch, parts, partner) if self.objective.coupled else None
        optimizers = [self.optimizer] + ([self.head_optimizer] if self.head_optimizer else [])
        for optimizer in optimizers:
            optimizer.zero_grad()
        logp, v = np.zeros(len(batch.label), np.float32), np.zeros(len(batch.origins), np.float32)
        for part in parts:
            logp[part.completions], v[part.rows] = self._backward(part, partner, weights)
        logp, v = self._sum_over_ranks(logp, v)

        norm = self.optimizer.clip(self.config.optimizer.clip)
        head_norm = self.head_optimizer.clip(self._value_config().clip) if self.head_optimizer else 0.0
        outcome = Outcome(logp, v if self.head else None, partner_logp, norm, head_norm)
        check_finite(batch, logp=logp, value=outcome.value, gradient=np.array([norm, head_norm]))

        self.optimizer.step(lr)
        if self.head_optimizer:
            self.head_optimizer.step(self._value_config().lr)
        return outcome

    def _backward(self, part: Part, partner: np.ndarray | None, weights: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        """Add the gradient of this micro-batch's share of the step's loss; returns its logp [n] and value [r].

        With `weights`, the coefficients of the step's logp and value that a coupled loss has already been reduced to.
        """
        with self._checkpointing():
            logp, states = self._scores(part.batch.forest)
            v = value.value(self.head, states) if self.head else torch.zeros(len(part.rows), device=self.model.device)
            if weights is not None:
                share = (self._floats(weights[0][part.completions]) * logp).sum() + (self._floats(weights[1][part.rows]) * v).sum()
            else:
                scores = replace(self._fixed_scores(part.batch, partner), logp=logp, value=self._per_completion(part.batch, v))
                share = self.objective(ops, scores)["loss"]
            if isinstance(share, torch.Tensor):  # a plain 0.0 if every term is switched off
                share.backward()
        return to_numpy(logp), to_numpy(v)

    def _coefficients(self, batch: Batch, parts: Sequence[Part], partner: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Gradient of a coupled objective with respect to the step's logp [N] and value [R]: a first pass over all micro-batches."""
        scored, values = self._score_parts(batch, parts)
        check_finite(batch, logp=scored, value=values)
        logp = self._floats(scored).requires_grad_()
        v = self._floats(np.zeros(len(batch.origins), np.float32) if values is None else values).requires_grad_()
        scores = replace(self._fixed_scores(batch, partner), logp=logp, value=self._per_completion(batch, v))
        self.objective(ops, scores)["loss"].backward()
        return tuple(np.zeros(x.shape, np.float32) if x.grad is None else to_numpy(x.grad) for x in (logp, v))  # type: ignore[return-value]

    def _checkpointing(self) -> AbstractContextManager[None]:
        return self.model.recomputing() if self.config.train.gradient_checkpointing else nullcontext()

    def _sum_over_ranks(self, logp: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One sum for everything a step shares: the gradients, in place, and the scores."""
        if self.comm.size == 1:
            return logp, v
        grads: list[Any] = [p.grad for p in (*self.model.policy.values(), *self.head.values())]
        flat = torch.cat([*(g.flatten() for g in grads), self._floats(logp), self._floats(v)])
        *summed, total_logp, total_v = self.comm.all_sum_tensor(flat).split([*(g.numel() for g in grads), len(logp), len(v)])
        for grad, total in zip(grads, summed, strict=True):
            grad.copy_(total.view_as(grad))
        return to_numpy(total_logp), to_numpy(total_v)

    # --- Value head ---------------------------------------------------------------------------------------------------------------

    def fit_value(self, states: np.ndarray, prompt: np.ndarray, reward: np.ndarray) -> dict[str, float]:
        """Start the head anew at the mean reward and fit it (`value.fit`)."""
        chosen, auxiliary = self._value_config(), self.objective.auxiliary
        assert auxiliary is not None
        self.head = value.initial_head(states.shape[1], float(np.mean(reward)), self.config.train.seed, self.model.device)
        loss = value.fit(self.head, states, prompt, reward, auxiliary.expectile, chosen.fit_steps, chosen.fit_lr)
        self.head_optimizer = Optimizer("adamw", self.head)
        return {"value/fit_loss": loss}

    def _value_config(self) -> Any:
        auxiliary = self.config.objective.auxiliary
        if auxiliary is None:
            raise ConfigError("objective.auxiliary: a value head needs auxiliary rewards.")
        return auxiliary.value

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
        return sections | ({"value_head": export_arrays(self.head)} if self.head else {})

    def load_state(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Inverse of `state`; refuses missing, unexpected or differently shaped arrays by name."""
        check_like(state, self.state())
        import_arrays(self.model.policy, state["adapter"])
        self.optimizer.load_state(state["optimizer"])
        if self.head_optimizer:
            import_arrays(self.head, state["value_head"])
            self.head_optimizer.load_state(state["optimizer"], HEAD)

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

    def _fixed_scores(self, batch: Batch, partner: np.ndarray | None) -> Scores:
        """The scores of a batch as tensors, all but logp and value."""
        return batch.scores(np.zeros(len(batch.label), np.float32), None, partner).map(self._floats, self._indices)

    def _per_completion(self, batch: Batch, v: torch.Tensor) -> torch.Tensor | None:
        return v[self._indices(batch.forest.owner)] if self.head else None
