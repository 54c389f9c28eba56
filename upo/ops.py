"""The few array functions a loss may call, with their values and gradients as a contract.

A loss is written once and interpreted by NumPy (float64), PyTorch and MLX. The frameworks agree on ordinary points and disagree where
preference training starts: with LoRA's B = 0 the policy equals its reference, so every example sits at a tie. The contract therefore
fixes the gradient there too; `tests/backends/test_ops_contract.py` holds every interpreter to it.

Arithmetic, comparison and indexing by slices are the arrays' own operators; nothing else may be called in a loss.
"""

from __future__ import annotations

from typing import Any, Protocol

Array = Any  # numpy.ndarray, torch.Tensor or mlx.core.array


class Ops(Protocol):
    """Interpreter of the loss specification. `x` is a float array of any shape unless a shape is given."""

    name: str

    def exp(self, x: Array) -> Array:
        """e^x."""
        ...

    def log(self, x: Array) -> Array:
        """Natural logarithm, x > 0."""
        ...

    def log_sigmoid(self, x: Array) -> Array:
        """log(1 / (1 + e^-x)), finite for all finite x; slope sigmoid(-x), so 0.5 at 0."""
        ...

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e^-x); slope s(1 - s)."""
        ...

    def log1mexp(self, x: Array) -> Array:
        """log(1 - e^x) for x < 0, accurate near 0 and near -inf; -inf at 0."""
        ...

    def relu(self, x: Array) -> Array:
        """max(0, x); slope 0 at 0."""
        ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """x where the condition holds, else y; the branch not taken gets gradient 0 (its value and slope must be finite). A float may stand for one of them."""
        ...

    def sum(self, x: Array, axis: int | None = None) -> Array:
        """Sum over all elements, or over one axis."""
        ...

    def logsumexp(self, x: Array, axis: int | None = None) -> Array:
        """log(sum(e^x)); slope softmax(x), shared equally at ties."""
        ...

    def stop_gradient(self, x: Array) -> Array:
        """x, as a constant."""
        ...

    def take(self, x: Array, index: Array) -> Array:
        """x[index] along the first axis; index [M] of integers. Repeated indices add their gradients."""
        ...

    def argsort_stable(self, x: Array) -> Array:
        """Indices [N] that sort x [N] ascending; ties keep their order. No gradient."""
        ...

    def segment_sum(self, x: Array, segment: Array, count: int) -> Array:
        """[count]: sum of x [N] over the elements of each segment; segment [N] of integers < count. Empty segments give 0."""
        ...

    def segment_logsumexp(self, x: Array, segment: Array, count: int) -> Array:
        """[count]: logsumexp of x [N] over each segment, shared equally at ties. Every segment has an element."""
        ...

    def reverse_scan(self, x: Array, decay: Array) -> Array:
        """y [T] with y[t] = x[t] + decay[t] * y[t + 1] and y[T] = 0: discounted sums from the end. decay carries no gradient."""
        ...
