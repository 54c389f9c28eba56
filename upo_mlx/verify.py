"""Logits of a model without and with an adapter, by stock mlx-lm: `python -m upo_mlx.verify BASE ADAPTER IDS OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from upo import tensors
from upo.models import model_config
from upo_mlx.device import mx


def main(base: str, adapter: str, ids: str, out: str) -> None:
    """Write the float32 logits [T, V] `plain` and `adapted` of the token ids [T] in a safetensors file to another one.

    The adapter is loaded as `mlx_lm.load(adapter_path=...)` does; the model's configuration is repaired first, as mlx-lm reads no
    `rope_parameters`.
    """
    from mlx_lm import load

    config, _ = model_config(base)
    tokens = mx.array(tensors.read(ids)["ids"].astype(np.int32))[None]
    logits = {}
    for name, path in (("plain", None), ("adapted", adapter)):
        net = load(base, adapter_path=path, model_config=config)[0]
        net.set_dtype(mx.float32)
        net.eval()
        logits[name] = np.array(net(tokens)[0].astype(mx.float32))
    tensors.write(Path(out), logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
