"""The arithmetic of a step against the matrix products that torch computes."""

from __future__ import annotations

import numpy as np
import pytest
from learner_runs import configure

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import upo_torch  # noqa: E402
from upo.data.batch import Example, collate  # noqa: E402
from upo.flops import backward_flops, forward_flops  # noqa: E402
from upo.training.work import forest_work  # noqa: E402


class Products(TorchDispatchMode):
    """FLOPs of the plain matrix products; those of attention lie inside its fused kernel."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


def products(function) -> int:
    with Products() as mode:
        function()
    return mode.flops


def test_linear_layers_adapter_and_head(tiny_llama):
    learner = upo_torch.load(configure(tiny_llama, {"preference": {"loss": "sft"}}, backend="torch", device="cpu", train={"prefix_sharing": "off"}))
    tokens = lambda n: np.arange(3, 3 + n, dtype=np.int32)  # noqa: E731
    batch, sizes = collate([Example("t:1", "pair", tokens(20), (tokens(9), tokens(9)), (1, -1))]), learner.info.sizes
    assert sizes is not None and sizes.adapter == learner.info.trainable
    work = forest_work(batch.scored, "padded")
    assert (work.slots, work.tokens) == (58, 58)
    attention = 4 * sizes.attention * work.pairs
    learner.logps(batch.forest)  # what is made once
    assert products(lambda: learner.logps(batch.forest)) == forward_flops(sizes, work) - attention
    # No gradient reaches the embeddings: the first layer's q, k and v need none with respect to their inputs.
    lowest = {path: size for path, size in learner.model.dims().items() if ".layers.0.self_attn." in path and "o_proj" not in path}
    spared = sum(2 * i * o + 2 * 4 * i for i, o in lowest.values()) * work.tokens
    assert products(lambda: learner.step(batch, 0.0)) == forward_flops(sizes, work) + backward_flops(sizes, work) - 3 * attention - spared
