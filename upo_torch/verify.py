"""Logits of a model without and with an adapter, by transformers and stock peft: `python -m upo_torch.verify BASE ADAPTER IDS OUT`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from upo import tensors


def main(base: str, adapter: str, ids: str, out: str) -> None:
    """Write the float32 logits [T, V] `plain` and `adapted` of the token ids [T] in a safetensors file to another one.

    peft warns of weights it does not apply; here that is an error.
    """
    tokens = torch.from_numpy(tensors.read(ids)["ids"])[None]
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True)
    with torch.no_grad():
        plain = net.eval()(tokens, use_cache=False).logits[0]
        with warnings.catch_warnings():
            for text in (".*missing adapter keys.*", ".*unexpected.*"):
                warnings.filterwarnings("error", message=text)
            net = PeftModel.from_pretrained(net, adapter)
        adapted = net.eval()(tokens, use_cache=False).logits[0]
    tensors.write(Path(out), {"plain": plain.numpy(), "adapted": adapted.numpy()})


if __name__ == "__main__":
    main(*sys.argv[1:])
