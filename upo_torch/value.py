"""The value head V(x): three layers on the hidden state at the last prompt token, in float32, in torch's names and layouts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn import functional as F

from upo import random
from upo.losses.auxiliary import expectile_loss
from upo_torch.ops import ops
from upo_torch.state import Optimizer

NORM_EPS = 1e-5


def initial_head(width: int, bias: float, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Parameters for hidden states of this width; V is `bias` everywhere."""
    return {name: torch.from_numpy(array).to(device).requires_grad_() for name, array in random.value_head(width, bias, seed).items()}


def value(head: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """[R] float32 from hidden states [R, H] after the final norm, which get no gradient."""
    x = F.layer_norm(states.detach().float(), states.shape[-1:], eps=NORM_EPS)
    x = torch.relu(F.linear(x, head["0.weight"], head["0.bias"]))
    x = torch.relu(F.linear(x, head["2.weight"], head["2.bias"]))
    return F.linear(x, head["4.weight"], head["4.bias"])[:, 0]


def fit(head: Mapping[str, torch.Tensor], states: np.ndarray, prompt: np.ndarray, reward: np.ndarray, expectile: float, steps: int, lr: float) -> float:
    """Full-batch AdamW, in place, on mean expectile(reward - V) over all completions; returns the last loss.

    states [R, H], prompt [N] index into states, reward [N].
    """
    device = head["4.bias"].device
    x, target = (torch.from_numpy(np.asarray(a, np.float32)).to(device) for a in (states, reward))
    owner = torch.from_numpy(np.asarray(prompt, np.int64)).to(device)

    def loss() -> torch.Tensor:
        return expectile_loss(ops, target - value(head, x)[owner], expectile).mean()

    optimizer = Optimizer("adamw", head)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(lr)
    with torch.no_grad():
        return float(loss())
