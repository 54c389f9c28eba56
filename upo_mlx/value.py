"""The value head V(x): three layers on the hidden state at the last prompt token, in float32, in torch's names and layouts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from upo import random
from upo.losses.auxiliary import expectile_loss
from upo_mlx.device import mx
from upo_mlx.ops import ops
from upo_mlx.state import Optimizer

Array = mx.array
NORM_EPS = 1e-5


def initial_head(width: int, bias: float, seed: int) -> dict[str, Array]:
    """Parameters for hidden states of this width; V is `bias` everywhere."""
    return {name: mx.array(array) for name, array in random.value_head(width, bias, seed).items()}


def value(head: Mapping[str, Array], states: Array) -> Array:
    """[R] float32 from hidden states [R, H] after the final norm, which get no gradient."""
    x = mx.fast.layer_norm(mx.stop_gradient(states).astype(mx.float32), None, None, NORM_EPS)
    x = mx.maximum(x @ head["0.weight"].T + head["0.bias"], 0.0)
    x = mx.maximum(x @ head["2.weight"].T + head["2.bias"], 0.0)
    return (x @ head["4.weight"].T + head["4.bias"])[:, 0]


def fit(head: dict[str, Array], states: np.ndarray, prompt: np.ndarray, reward: np.ndarray, expectile: float, steps: int, lr: float) -> tuple[dict[str, Array], float]:
    """Full-batch AdamW on mean expectile(reward - V) over all completions; the fitted head and its last loss.

    states [R, H], prompt [N] index into states, reward [N].
    """
    x, owner, target = mx.array(states.astype(np.float32)), mx.array(prompt), mx.array(reward.astype(np.float32))

    def loss(head: dict[str, Array]) -> Array:
        return mx.mean(expectile_loss(ops, target - mx.take(value(head, x), owner), expectile))

    optimizer = Optimizer("adamw", head)
    for _ in range(steps):
        head = optimizer.update(head, mx.grad(loss)(head), lr)
        mx.eval(head, optimizer.moments)
    return head, float(np.array(loss(head)))
