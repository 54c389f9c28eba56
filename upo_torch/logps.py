"""Log-probs of completion tokens from hidden states, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states [m, H] -> float32 logits [m, V]; its weights are frozen

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MB in float32, times the few temporaries of a chunk
LEAST_ROWS = 16  # below this a product with the vocabulary is too narrow to be fast


def token_logps(head: Head, width: int, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[M] float32 log-probs of targets [M] given hidden states [M, H]; differentiable with respect to `hidden` alone. `width` is V.

    The gradient of a token's log-prob with respect to its own hidden state does not depend on the loss. It is made together with the
    value, chunk by chunk, and the backward pass is one scaling of it: two products with the vocabulary per token in all, nothing is
    recomputed. Without gradient only the values are made, at half the cost.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _TokenLogps.apply(hidden, targets, head, width)
    with torch.no_grad():
        return torch.cat([_gather(logits := head(h), t) - torch.logsumexp(logits, -1) for h, t in _chunks(hidden, targets, width)])


@torch.no_grad()
def collisions(head: Head, width: int, hidden: torch.Tensor) -> torch.Tensor:
    """[M] float32 log sum_v p(v)^2 over the vocabulary at each hidden state [M, H]: how often two draws would agree. Constants."""
    parts = [torch.logsumexp(2 * (logits := head(h)), -1) - 2 * torch.logsumexp(logits, -1) for h in _rows(hidden, width)]
    return torch.cat(parts)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, width: int) -> torch.Tensor:
        logps, slope = [], torch.empty_like(hidden)
        for (h, t), out in zip(_chunks(hidden, targets, width), _rows(slope, width), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                logits = head(h)
            values = logits.detach()
            residual = torch.softmax(values, -1)
            largest, at = residual.max(-1)  # at least 1 / V, so its logarithm is exact, and costs less than a logsumexp over all logits
            logps.append(_gather(values, t) - _gather(values, at) + largest.log())
            residual[torch.arange(len(t), device=t.device), t] -= 1  # d log-prob / d logits = onehot - softmax
            torch.neg(torch.autograd.grad(logits, h, residual)[0], out=out)
        ctx.save_for_backward(slope)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (upstream[0][:, None] * slope.float()).to(slope.dtype), None, None, None


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(_rows(hidden, width), _rows(targets, width), strict=True)


def _rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    return x.split(max(LEAST_ROWS, CHUNK_ELEMENTS // width))


def _gather(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, targets[:, None])[:, 0]
