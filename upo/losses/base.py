"""What every loss sees (`Scores`) and what every loss declares (`Loss`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from upo.losses.options import check_options
from upo.ops import Array, Ops

Unit = Literal["pair", "completion", "chosen", "group", "token"]
Data = Literal["pairs", "labels", "chosen", "scored", "any"]
State = Mapping[str, float]

INDICES = ("chosen", "rejected", "positive", "negative", "owner", "token_owner")
LEAVES = ("logp", "value", "token_logp", "token_value", "anchor_logp")  # what carries a gradient
ROUNDING = 1e-3  # nats: policy and reference may round this far apart where they are equal, as in a run's first step
CAP = 80.0  # e^80 is finite in float32, and so is its square root times anything


@dataclass(frozen=True)
class Scores:
    """Numbers per scored completion, for the whole optimizer step or for one micro-batch of it.

    N completions, P pairs, C desirable and L undesirable completions, R prompts, M completion tokens, K partners, Q references. `count`
    is always that of the *whole* optimizer step over all micro-batches and ranks, so that the terms of the micro-batches add up to the
    term of the step. `partner_logratio`, too, always holds the whole step's. All but the `LEAVES` are constants. What a loss does not
    declare in `needs` may be None. A completion is in one pair at most.
    """

    logp: Array  # [N] summed log-prob of each completion under the policy
    length: Array  # [N] number of scored tokens
    label: Array  # [N] +1 chosen or desirable, -1 rejected or undesirable, 0 neither
    chosen: Array  # [P] integer index into N
    rejected: Array  # [P] integer index into N
    positive: Array  # [C] integer index into N: label above 0, in order
    negative: Array  # [L] integer index into N: label below 0, in order
    owner: Array  # [N] integer index of the prompt
    groups: int  # R, prompts in this part
    count: Mapping[str, int]  # units in the whole step: pair, completion, chosen, group, token, chosen_token
    step: int = 0  # optimizer steps done before this one
    ref_logp: Array | None = None  # [N] summed log-prob under the reference (the first, if there are several)
    ref_logps: Array | None = None  # [Q, N] summed log-probs under every reference
    partner_logratio: Array | None = None  # [K] log pi - log ref of KTO's mismatched completions
    reward: Array | None = None  # [N] total reward R = sum_i w_i r_i
    value: Array | None = None  # [N] V(x) of each completion's prompt
    token_logp: Array | None = None  # [M] log-prob of each completion token, by completion, then by position; sums to logp
    token_owner: Array | None = None  # [M] integer index of the completion
    token_index: Array | None = None  # [M] position in the completion, from 0, as a float
    ref_token_logp: Array | None = None  # [M] under the reference
    token_value: Array | None = None  # [M] V of the state in which the token was chosen
    collision: Array | None = None  # [N] sum over tokens of log sum_v pi(v)^2, v over the vocabulary
    anchor_logp: Array | None = None  # [P] summed log-prob of each pair's anchor completion
    anchor_ref_logp: Array | None = None  # [P] under the reference
    distance: Array | None = None  # [C, L] cosine distance between the prompts of desirable and undesirable completions
    quantile: Array | None = None  # [N] share of the prompt's reference rewards that R reaches
    ref_rewards: Array | None = None  # [N] how many reference rewards the prompt has
    columns: Mapping[str, Array] = field(default_factory=dict)  # [N] numeric columns of the rows
    state: State = field(default_factory=dict)  # running statistics of a loss, this step's included

    def map(self, floats: Callable[[Any], Array], indices: Callable[[Any], Array]) -> Scores:
        """The same scores with float arrays and index arrays each converted, e.g. from NumPy to a framework."""
        changed: dict[str, Any] = {"columns": {name: floats(column) for name, column in self.columns.items()}}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in INDICES:
                changed[f.name] = None if value is None else indices(value)
            elif f.name not in ("count", "step", "groups", "columns", "state") and value is not None:
                changed[f.name] = floats(value)
        return replace(self, **changed)

    def given(self, name: str) -> Array:
        """An optional field that a loss needs. Raises ValueError where the scores do not bring it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the objective needs {name}, but the scores have none")
        return value

    def column(self, name: str) -> Array:
        """[N] a numeric column of the rows. Raises ValueError where they have none."""
        if name not in self.columns:
            raise ValueError(f'the objective needs the column "{name}", but the scores have none')
        return self.columns[name]

    def logratio(self) -> Array:
        """g(y) = log pi(y|x) - log ref(y|x), [N]."""
        return self.logp - self.given("ref_logp")

    def mean_logp(self) -> Array:
        """log pi(y|x) / |y|, [N]."""
        return self.logp / self.length


@dataclass(frozen=True)
class Loss:
    """A term of the objective: its fields are its options, its docstring is its documentation.

    Calling it returns one value per unit present in `scores`, unreduced; the objective sums them and divides once by the step's count
    of that unit. A `coupled` loss mixes units of a step beyond what `partner_logratio` and `count` carry, so it is given the whole
    step at once and its gradient is taken with respect to the vectors of scores.
    """

    name: ClassVar[str]
    unit: ClassVar[Unit]
    data: ClassVar[Data]  # the least a row must bring
    needs: ClassVar[frozenset[str]] = frozenset()  # of NEEDS, below
    coupled: ClassVar[bool] = False
    source: ClassVar[str]  # paper, equation and identifier

    def __post_init__(self) -> None:
        check_options(self, self.name)

    def __call__(self, ops: Ops, scores: Scores) -> Array:
        raise NotImplementedError

    def implicit_reward(self, scores: Scores) -> Array:
        """[N], constants for the metrics `accuracy` and `margin`: what this loss takes the completions to be worth."""
        return getattr(self, "beta", 1.0) * scores.logratio()

    def requires(self) -> frozenset[str]:
        """What these options need, where that is less than the class declares."""
        return self.needs

    def columns(self) -> tuple[str, ...]:
        """Numeric columns that the rows must bring."""
        return ()

    def check_run(self, references: int, batch_size: int) -> None:
        """Raise ValueError, beginning with the configuration's key, where a run of this many references and rows per step cannot serve."""

    def initial_state(self) -> dict[str, float]:
        """Running statistics before the first step; empty for a loss without them."""
        return {}

    def advance(self, scores: Scores) -> dict[str, float]:
        """The running statistics with this step's whole scores (NumPy, float64) taken in; `scores.state` holds those before."""
        return dict(scores.state)


NEEDS = {
    "reference": "a reference",
    "references": "several references",
    "partners": "mismatched completions",
    "rewards": "rewards",
    "value": "a value head",
    "tokens": "log-probs per token",
    "token_values": "a value head, per token",
    "collision": "the policy's distribution over the vocabulary",
    "anchors": 'an "anchor" completion in each row',
    "distance": "distances between prompts",
    "quantiles": 'a list "ref_rewards" in each row',
    "control": "control texts before the completions (data.control)",
}


def capped_exp(ops: Ops, x: Array) -> Array:
    """e^min(x, 80): no overflow in float32; the slope above the cap is 0."""
    return ops.exp(ops.where(x > CAP, CAP, x))  # NaN stays NaN


def beyond_rounding(ops: Ops, x: Array) -> Array:
    """max(0, x) for a difference of policy and reference, with what rounding explains counted as 0.

    In the first step both are equal. Without this, rounding would decide there which completions get a slope, and no two backends, sizes
    of micro-batches or numbers of ranks would agree.
    """
    return ops.where(x <= ROUNDING, 0.0, x)  # NaN stays NaN


def sides(ops: Ops, scores: Scores, x: Array) -> tuple[Array, Array]:
    """x [N] of each pair's chosen and of its rejected completion, [P] each."""
    return ops.take(x, scores.chosen), ops.take(x, scores.rejected)


def bradley_terry(ops: Ops, z: Array, label_smoothing: float = 0.0) -> Array:
    """-(1 - e) log s(z) - e log s(-z): the preference agrees with the sign of z, except for a share e of flipped labels."""
    return -(1 - label_smoothing) * ops.log_sigmoid(z) - label_smoothing * ops.log_sigmoid(-z)


def chosen_nll(ops: Ops, scores: Scores, by: str) -> Array:
    """[P] negative log-likelihood of the chosen completions: `sequence` is the mean over a completion's tokens; `token` weighs all
    chosen tokens of the step alike (the mean over pairs of these values is the mean over tokens)."""
    logp = ops.take(scores.logp, scores.chosen)
    if by == "sequence":
        return -logp / ops.take(scores.length, scores.chosen)
    return -logp * (scores.count["pair"] / max(scores.count["chosen_token"], 1))
