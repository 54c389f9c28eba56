"""A Llama-shaped model of random weights with a tokenizer of made-up words. `python make_model.py FOLDER SHAPE`, SHAPE as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

END = "</s>"


def make(folder: Path, shape: dict) -> None:
    """In bfloat16; the size of the tokenizer's vocabulary is that of `words`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([END, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(**shape, max_position_embeddings=16384, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="5GB")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)


def words() -> list[str]:
    return [f"w{i}" for i in range(256)]


if __name__ == "__main__":
    make(Path(sys.argv[1]), json.loads(sys.argv[2]))
