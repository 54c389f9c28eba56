"""Sequence classifiers and reward models, for scorers: texts or conversations in, logits out. MLX has no such models."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upo.errors import ModelError
from upo.models import model_config
from upo.targets import some
from upo_torch import device
from upo_torch.model import SAFELY, absent_of, attention_of, known_kind, loading

Messages = Sequence[Mapping[str, Any]]
UNLIMITED = 10**6  # tokenizers without a limit write a huge number


class Classifier:
    """A frozen transformers model with a classification head.

    `labels` are its outputs, in order; `kind` its problem_type, where it declares one; `cut` counts what was too long to be read whole.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.device = device.choose_device("auto", *device.local_place())
        self.tokenizer, self.net = _load(folder, getattr(torch, dtype), self.device)
        config = self.net.config
        self.labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        self.kind = str(config.problem_type or "")
        given = [n for n in (self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)) if n and n < UNLIMITED]
        self.limit = min(given, default=UNLIMITED)
        self.cut = 0

    def close(self) -> None:
        """Give the memory back: what is trained next asks the device how much is free."""
        self.net = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def texts(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """[N, labels] float32 logits of texts, or of two texts each. What is too long loses its end."""
        rows = [self._encode(text, None if pairs is None else pairs[i]) for i, text in enumerate(texts)]
        return self._logits(rows)

    def conversations(self, conversations: Sequence[Messages]) -> np.ndarray:
        """[N, labels] float32 logits of whole conversations under the chat template. What is too long loses its beginning."""
        if not self.tokenizer.chat_template:
            raise ModelError(f"{self.folder}: its tokenizer has no chat template. Use input: pair, or a reward model that has one.")
        rows = []
        for messages in conversations:
            try:
                text = self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
            except Exception as error:  # a template raises of any kind, e.g. about roles
                raise ModelError(f"{self.folder}: the chat template refuses a conversation ({str(error).splitlines()[0][:200]}).") from None
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.cut += len(ids) > self.limit
            rows.append({"input_ids": ids[-self.limit :]})
        return self._logits(rows)

    def _encode(self, text: str, pair: str | None) -> dict[str, list[int]]:
        row = self.tokenizer(text, pair, verbose=False)
        if len(row["input_ids"]) > self.limit:
            self.cut += 1
            row = self.tokenizer(text, pair, truncation=True, max_length=self.limit)
        return {name: row[name] for name in ("input_ids", "token_type_ids") if name in row}

    @torch.no_grad()
    def _logits(self, rows: Sequence[Mapping[str, list[int]]]) -> np.ndarray:
        filler = self._filler({token for row in rows for token in row["input_ids"]})
        width = max(len(row["input_ids"]) for row in rows)

        def padded(lists: Sequence[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*items, *[value] * (width - len(items))] for items in lists], device=self.device)

        inputs = {name: padded([row[name] for row in rows], filler if name == "input_ids" else 0) for name in rows[0]}
        inputs["attention_mask"] = padded([[1] * len(row["input_ids"]) for row in rows], 0)
        self.net.config.pad_token_id = filler  # by which decoders find each row's last token
        return np.asarray(self.net(**inputs).logits.float().cpu().numpy(), np.float32)

    def _filler(self, used: set[int]) -> int:
        """The padding token, or where a row holds it itself (an end of text, mostly) one that no row holds."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and pad not in used else next(i for i in range(len(used) + 1) if i not in used)


def _load(folder: Path, dtype: torch.dtype, where: torch.device) -> tuple[Any, Any]:
    from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer

    raw, _ = model_config(folder)
    kind = known_kind(folder, raw)
    with loading(folder, "this as a classifier"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        load: Any = AutoModelForSequenceClassification.from_pretrained
        config = CONFIG_MAPPING[kind].from_dict(raw)
        net, loaded = load(folder, config=config, dtype=dtype, **SAFELY, **attention_of(config))
    absent = absent_of(loaded)
    if absent:
        raise ModelError(f"{folder}: the weights lack {some(absent)}: this is no trained classifier or reward model. Use one.")
    return tokenizer, net.to(where).requires_grad_(False).eval()
