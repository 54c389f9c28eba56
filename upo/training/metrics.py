"""The numbers of a run: one table of names, computed once for both backends from a step's scores.

Everything is evaluated in float64 on the vectors of the whole step (or the whole evaluation split), so a metric does not depend on the
backend's arithmetic after the log-probs, nor on micro-batches, batch size of the evaluation, or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from upo.backend import Learner, Outcome
from upo.data.batch import Batch, micro_batches
from upo.errors import NonFiniteError
from upo.learner import blank, fill, outcome_of, scored_names, scored_of, scores_of
from upo.losses import Loss, Objective, Scores
from upo.numpy_ops import ops

NAMES: dict[str, str] = {
    "step": "optimizer steps done; a training line belongs to the last of them and shows the scores before its update",
    "eval": "true on a line about the evaluation split; absent on training lines",
    "epoch": "passes over the training rows done so far",
    "loss": "the objective: preference + gamma * auxiliary + value_coef * value",
    "loss/preference": "weighted sum of the preference losses",
    "loss/auxiliary": "advantage-weighted likelihood, before gamma; 0 during the actor warm-up",
    "loss/value": "expectile regression of the value head, before value_coef",
    "accuracy": "share of pairs whose chosen completion has the higher implicit reward (first preference loss); a tie (margin within 1e-4) counts one half",
    "margin": "mean implicit reward of chosen minus rejected completions (first preference loss)",
    "kl": "mean log-ratio of policy to reference over the completions at hand, in nats per completion; on data, not on samples, so it may be negative",
    "perplexity": "of chosen or desirable completions under the policy, per token: exp of minus their summed log-prob over their number of tokens",
    "goals": "weighted sum of the goals on answers sampled to held-out prompts (`evaluation`)",
    "goal/": "followed by a goal's name: its mean on those answers",
    "answers/words": "words per sampled answer",
    "answers/repetition": "share of an answer's word trigrams that it has used before, mean over sampled answers",
    "answers/empty": "share of sampled answers without a word",
    "logp/chosen": "mean summed log-prob of chosen or desirable completions",
    "logp/rejected": "mean summed log-prob of rejected or undesirable completions",
    "reward/mean": "mean total auxiliary reward of the completions",
    "value/mean": "mean V(x) over the completions",
    "weight/mean": "mean of the actor's weights exp(temperature * (R - V))",
    "weight/p95": "95th percentile of the actor's weights",
    "weight/max": "largest of the actor's weights",
    "weight/ess": "effective sample size of the actor's weights as a share of the completions: (sum w)^2 / (n sum w^2)",
    "lr": "learning rate of the adapter",
    "grad_norm": "gradient norm of the adapter before clipping",
    "value_grad_norm": "gradient norm of the value head before clipping",
    "rows_per_s": "rows per second of this step or evaluation",
    "tokens_per_s": "tokens per second of the rows at hand, each row's prompt counted once whatever is computed; KTO's partners are not counted",
    "slots": "token slots computed: prompts, completions, KTO's partners and padding, over all ranks; passes that are done again (gradient "
    "checkpointing, the first pass of a coupled loss) are counted once",
    "padding": "share of the slots that hold no token",
    "shared_tokens": "tokens of prompts that were not computed again for a further completion, as a share of the tokens with a prompt for each",
    "mfu": "arithmetic of the tokens computed (padding and recomputation are none) as a share of what the devices could do at their peak in this "
    "dtype; absent where the device's peak or the family's arithmetic is not known",
    "peak_memory_gb": "largest memory in use so far",
    "seconds": "wall time of this step or evaluation",
}

TIE = 1e-4  # margins this small are rounding: before the first update every pair is a tie


def step_metrics(objective: Objective, batch: Batch, outcome: Outcome) -> dict[str, float]:
    """What the scores of a step say: losses, accuracy, margin, kl, log-probs, rewards and weights. Only what applies is present."""
    scores = scores_of(batch, outcome)
    record = {name: float(value) for name, value in objective(ops, scores).items()}
    record |= score_metrics(objective.preference[0].loss if objective.preference else None, scores)
    if scores.reward is not None:
        record["reward/mean"] = float(np.mean(scores.reward))
    if scores.value is not None:
        record["value/mean"] = float(np.mean(scores.value))
    if objective.auxiliary is not None:
        record.update(_weights(objective.auxiliary.weight(ops, scores)))
    return record


def score_metrics(loss: Loss | None, scores: Scores) -> dict[str, float]:
    """What follows from log-probs alone: accuracy and margin (of `loss`), kl, log-probs and perplexity. Only what applies is present."""
    record: dict[str, float] = {}
    if loss is not None and len(scores.chosen):
        margin = margins(loss, scores)
        record |= {"accuracy": float(np.mean(credit(margin))), "margin": float(np.mean(margin))}
    if scores.ref_logp is not None:
        record["kl"] = float(np.mean(scores.logratio()))
    for name, side in (("logp/chosen", scores.label > 0), ("logp/rejected", scores.label < 0)):
        if side.any():
            record[name] = float(np.mean(scores.logp[side]))
    if (scores.label > 0).any():
        record["perplexity"] = perplexity(scores.logp[scores.label > 0], scores.length[scores.label > 0])
    return record


def margins(loss: Loss, scores: Scores) -> np.ndarray:
    """[P] implicit reward of each pair's chosen completion less that of its rejected one."""
    worth = loss.implicit_reward(scores)
    return np.asarray(worth[scores.chosen] - worth[scores.rejected], np.float64)


def credit(margin: np.ndarray) -> np.ndarray:
    """[P] 1 for a pair in the right order, one half for a tie, else 0."""
    return (margin > TIE) + 0.5 * (np.abs(margin) <= TIE)


def perplexity(logp: np.ndarray, length: np.ndarray) -> float:
    """Per token, of completions with these summed log-probs and numbers of tokens; infinite where it is beyond a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(-np.sum(logp) / np.sum(length)))


@np.errstate(all="ignore")  # an untrained V may make weights infinite while the actor is off
def _weights(weight: np.ndarray) -> dict[str, float]:
    largest = float(np.max(weight))
    relative = weight / largest if largest > 0 else np.ones_like(weight)  # squares of large weights would overflow
    return {
        "weight/mean": float(np.mean(weight)),
        "weight/p95": float(np.quantile(weight, 0.95)),
        "weight/max": largest,
        "weight/ess": float(np.sum(relative) ** 2 / (len(weight) * np.sum(relative**2))),
    }


def evaluate(learner: Learner, objective: Objective, batch: Batch, step: int) -> dict[str, float]:
    """Metrics of an evaluation split given as one batch, scored by all ranks together, a micro-batch for each at a time, and put together again.

    Raises NonFiniteError naming the rows whose score is not finite.
    """
    whole = blank(batch, scored_names(objective.needs))
    partner = None if batch.partners is None else np.zeros(len(batch.label), np.float32)
    state: Mapping[str, float] = {}
    info = learner.info
    for rows in micro_batches(batch, info.micro_batch_tokens * learner.comm.size, layout=info.layout, device=info.device):
        part, places = batch.select(rows)
        outcome = learner.score(part)
        fill(whole, places, {name: vector for name, vector in scored_of(outcome).items() if name in whole})
        if partner is not None and outcome.partner_logp is not None:
            partner[places.completions] = outcome.partner_logp
        state = outcome.state
    bad = bad_rows(batch, whole["logp"] if partner is None else whole["logp"] + partner)
    if bad:
        raise NonFiniteError(f"step {step}: the evaluation has log-probs that are not finite, in {name_rows(bad)}. Lower optimizer.lr, or look at these rows.")
    return step_metrics(objective, replace(batch, step=step), outcome_of(whole, partner, state))


def bad_rows(batch: Batch, logp: np.ndarray) -> list[str]:
    """Origins of the rows with a log-prob [N] that is not finite."""
    return sorted({batch.origins[int(batch.forest.owner[i])] for i in np.flatnonzero(~np.isfinite(logp))})


def name_rows(origins: Sequence[str], most: int = 5) -> str:
    """The first few origins, and how many more there are."""
    more = f" and {len(origins) - most} more" if len(origins) > most else ""
    return ", ".join(origins[:most]) + more


def plain(record: Mapping[str, float | int | bool]) -> dict[str, float | int | bool | None]:
    """The record for JSON, in the table's order: a number that is not finite becomes null. Raises KeyError for a name not in the table."""
    order = {name: i for i, name in enumerate(NAMES)}
    known = sorted(record, key=lambda name: order["goal/" if name.startswith("goal/") else name])
    return {name: None if isinstance(record[name], float) and not math.isfinite(record[name]) else record[name] for name in known}
