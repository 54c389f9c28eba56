"""A step's scores as the papers write them, in numbers of the tape. Imports nothing of the library.

A case is a dict of plain lists. For N completions: logp, ref_logp, length, label (+1, -1, 0), owner (index of the prompt), reward, value,
collision, quantile, ref_rewards, and in `columns` numeric columns; chosen, rejected: indices of the P pairs; ref_logps [Q][N];
token_logp, ref_token_logp, token_value: completion after completion, `length` of them each; anchor_logp, anchor_ref_logp [P];
distance [C][L] between completions labelled above and below 0, in order; partner_logratio: log-ratios of KTO's mismatched completions;
state: running statistics before the step, by loss; step: optimizer steps done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mpmath as mp
from oracle.tape import Number

LEAVES = ("logp", "value", "token_logp", "token_value", "anchor_logp")
CONSTANTS = ("ref_logp", "length", "reward", "collision", "quantile", "ref_rewards", "ref_token_logp", "anchor_ref_logp", "partner_logratio")


class Step:
    """The numbers of one case: those a gradient is wanted of are leaves, the others constants."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        for name in LEAVES:
            setattr(self, name, [Number(x) for x in case.get(name, ())])
        for name in CONSTANTS:
            setattr(self, name, [mp.mpf(x) for x in case.get(name, ())])
        self.label, self.owner = case["label"], case.get("owner", ())
        self.pairs = list(zip(case["chosen"], case["rejected"], strict=True))
        self.positive = [i for i, label in enumerate(self.label) if label > 0]
        self.negative = [i for i, label in enumerate(self.label) if label < 0]
        self.columns = {name: [mp.mpf(x) for x in column] for name, column in case.get("columns", {}).items()}
        self.distance = [[mp.mpf(x) for x in row] for row in case.get("distance", ())]
        self.ref_logps = [[mp.mpf(x) for x in row] for row in case.get("ref_logps", ())]
        self.state = {loss: {name: mp.mpf(x) for name, x in state.items()} for loss, state in case.get("state", {}).items()}
        self.number = case.get("step", 0)

    def leaves(self) -> dict[str, list[Number]]:
        return {name: getattr(self, name) for name in LEAVES if getattr(self, name)}

    def all(self) -> range:
        return range(len(self.logp))

    def g(self, i: int) -> Number:
        """log pi(y) - log ref(y), sums over the tokens."""
        return self.logp[i] - self.ref_logp[i]

    def margin(self, w: int, l: int) -> Number:
        """D."""
        return self.g(w) - self.g(l)

    def ap(self, i: int) -> Number:
        """log pi(y) / |y|."""
        return self.logp[i] / self.length[i]

    def ar(self, i: int) -> Any:
        return self.ref_logp[i] / self.length[i]

    def nll(self, w: int, by: str) -> Number:
        """Of a chosen completion: the mean over its tokens; or scaled so that the mean over the pairs is the mean over all their
        chosen tokens, which is what one cross-entropy over the flattened chosen half of a batch gives."""
        if by == "sequence":
            return -self.ap(w)
        tokens = sum(self.length[chosen] for chosen, _ in self.pairs)
        return -self.logp[w] * len(self.pairs) / tokens

    def tokens(self, i: int, name: str) -> list[Any]:
        """`token_logp`, `ref_token_logp` or `token_value` of one completion."""
        start = int(sum(self.length[:i]))
        return getattr(self, name)[start : start + int(self.length[i])]
