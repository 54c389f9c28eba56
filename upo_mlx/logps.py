"""Log-probs of completion tokens from hidden states, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from upo_mlx.device import mx
from upo_mlx.exp import exp

Array = mx.array
Head = Callable[[Array], Array]  # hidden states [m, H] -> float32 logits [m, V]; its weights are frozen

BLOCK = 64  # first level of a sum over the vocabulary
CHUNK_ELEMENTS = 2**23  # logits held at once: 32 MB in float32, times the few temporaries of a chunk and the chunks in flight


def token_logps(head: Head, hidden: Array, targets: Array) -> Array:
    """[M] float32 log-probs of targets [M] given hidden states [M, H]; differentiable with respect to `hidden` alone.

    The gradient of a token's log-prob with respect to its own hidden state does not depend on the loss. It is made together with the
    value, chunk by chunk, and the backward pass is one scaling of it: two products with the vocabulary per token in all, nothing is
    recomputed. Nothing is evaluated here: arrays evaluated while a gradient is traced are all kept for the backward pass, needed or not
    (measured on a 135M model: 2.3 times the memory, twice the time).

    `mx.fast.cross_entropy` (fused on Metal and CUDA) is not used: the slope needs the softmax anyway, which is all that it would save.
    """

    @mx.custom_function
    def scored(hidden: Array, targets: Array) -> tuple[Array, Array]:
        parts: list[tuple[Array, Array]] = []
        for h, t in _chunks(head, hidden, targets):
            if parts:
                h = mx.depends([h], [*parts[-1]])[0]  # else MLX computes the logits of many chunks before the slope of the first
            logp, residual = _score(head(h), t)
            slope: Array = mx.vjp(head, [h], [residual])[1][0]
            parts.append((logp, slope))
        return mx.concatenate([logp for logp, _ in parts]), mx.concatenate([slope for _, slope in parts])

    @scored.vjp
    def backward(primals: tuple[Array, Array], cotangents: tuple[Array, Array], outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        slope = outputs[1]
        return (cotangents[0][:, None] * slope.astype(mx.float32)).astype(slope.dtype), mx.zeros_like(primals[1])

    return scored(hidden, targets)[0]  # type: ignore[index]


def token_logps_only(head: Head, hidden: Array, targets: Array) -> Array:
    """The same values without the gradient, at half the cost."""
    parts = []
    for h, t in _chunks(head, hidden, targets):
        logits = head(h)
        parts.append((_at(logits, t) - _log_partition(logits)[0])[:, 0])
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def collisions(head: Head, hidden: Array) -> Array:
    """[M] float32 log sum_v p(v)^2 over the vocabulary at each hidden state [M, H]: how often two draws would agree. Constants."""
    parts = []
    for h, _ in _chunks(head, hidden, hidden):
        logits = head(h)
        parts.append((_log_partition(2 * logits)[0] - 2 * _log_partition(logits)[0])[:, 0])
    return mx.stop_gradient(mx.concatenate(parts))


def _chunks(head: Head, hidden: Array, targets: Array) -> Iterator[tuple[Array, Array]]:
    width = head(hidden[:1]).shape[-1]  # only its shape is used, so nothing is computed
    size = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, hidden.shape[0], size):
        yield hidden[start : start + size], targets[start : start + size]


def _score(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Log-probs [m], and their gradient with respect to the logits: onehot - softmax, [m, V]."""
    log_partition, softmax = _log_partition(logits)
    residual = mx.put_along_axis(-softmax, targets[:, None], 1 - _at(softmax, targets), axis=-1)
    return (_at(logits, targets) - log_partition)[:, 0], residual


def _log_partition(logits: Array) -> tuple[Array, Array]:
    """log(sum(e^logits)) [m, 1] and softmax [m, V] (computed only if used).

    The sum goes over blocks of 64 and then over the blocks: MLX's flat float32 sum over a vocabulary of 49k is biased on CPUs by about
    1e-4 of its value, which is as many nats for every token.
    """
    top = mx.max(logits, axis=-1, keepdims=True)
    exps = exp(logits - top)
    rows, width = exps.shape
    whole = width - width % BLOCK
    total = mx.sum(mx.sum(exps[:, :whole].reshape(rows, -1, BLOCK), axis=-1), axis=-1, keepdims=True)
    if whole < width:
        total = total + mx.sum(exps[:, whole:], axis=-1, keepdims=True)
    return top + mx.log(total), exps / total


def _at(x: Array, targets: Array) -> Array:
    return mx.take_along_axis(x, targets[:, None], axis=-1)
