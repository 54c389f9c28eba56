"""What another adapter was taught to prefer: the implicit reward of its DPO training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from upo.errors import BackendError, DataError
from upo.losses.options import option
from upo.models import resolve, weights_hash
from upo.rewards.base import Answer, Card, Ready, TextScorer
from upo.training.reporter import Reporter

if TYPE_CHECKING:
    from upo.backend import Learner
    from upo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Implicit(TextScorer):
    """Implicit reward of an adapter that was trained on preferences (DPO, KTO, ...), of its base model or another one than the run's:

        r(x, y) = beta (log pi_adapter(y|x) - log pi_base(y|x))

    per: `completion` as it stands, or `token`, divided by the number of tokens of y. model: hub id or folder of the base; adapter: folder in
    PEFT's layout. A plain prompt is a user's turn under the chat template, or text where the model has none. What is longer than `max_length`
    tokens loses leading turns; a row that is still too long is refused by name. Runs on this machine's backend, MLX or PyTorch.
    Source: Rafailov et al. 2023, "Direct preference optimization", equation 5 without its prompt term.
    """

    model: str = ""
    adapter: str = ""
    revision: str = option("", optional=True)
    beta: float = option(0.1, above=0)
    per: str = option("completion", choices=("completion", "token"))
    max_length: int = option(1024, least=2)
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16", "float16"))
    backend: str = option("auto", choices=("auto", "mlx", "torch"))

    name: ClassVar[str] = "implicit"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="What the other adapter's training preferred, with all that it learned by accident. Long answers differ more, either way.",
        range=None,
        higher="more as that adapter answers",
        speed="two passes of the model an answer",
        licence="that of the model and the adapter",
        offline="from folders, or once the model is in the hub's cache; needs a backend",
    )
    reads: ClassVar[tuple[str, ...]] = ("turns", "text")
    volatile: ClassVar[frozenset[str]] = frozenset({"backend"})
    batch: ClassVar[int] = 8

    def check(self) -> None:
        from upo.adapters import read_adapter

        read_adapter(self.adapter)
        if any(os.environ.get(name, "").isdigit() for name in ("RANK", "MLX_RANK")):
            raise BackendError("scorer implicit cannot score within a run of several processes. Score the data first, with `upo score`, and use its column.")

    def identity(self) -> str:
        from upo.training.reference import adapter_hash

        return f"{super().identity()} {weights_hash(self._folder)} {adapter_hash(self.adapter)}"

    @cached_property
    def _folder(self) -> Path:
        return resolve(self.model, self.revision or None)

    @contextmanager
    def ready(self, count: int, reporter: Reporter) -> Iterator[Ready]:
        from upo.backend import get_backend
        from upo.config import load_config
        from upo.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self._folder)
        config = load_config(
            {
                "model": str(self._folder),
                "dtype": self.dtype,
                "data": {"train": "unused"},
                "adapter": {"start": self.adapter},
                "reference": "base",
            }
        )
        learner = get_backend(self.backend).load(config)
        reporter.info(f"Scorer implicit: {self.adapter} on {learner.info.device}, {learner.info.dtype}.")
        yield Ready(lambda answers: self._rewards(learner, tokenizer, answers))

    def _rewards(self, learner: Learner, tokenizer: Tokenizer, answers: Sequence[Answer]) -> list[float]:
        from upo.data.forest import Forest

        prompts, completions = zip(*(self._tokens(tokenizer, answer) for answer in answers), strict=True)
        forest = Forest(prompts, completions, np.arange(len(answers)))
        ratio = learner.logps(forest).astype(np.float64) - learner.logps(forest, reference=0)
        return [float(r) for r in self.beta * (ratio / forest.lengths if self.per == "token" else ratio)]

    def _tokens(self, tokenizer: Tokenizer, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        from upo.data.encode import encode
        from upo.data.notes import Notes
        from upo.data.rows import Row

        turns = [dict(turn) for turn in answer.turns]
        row = Row(answer.origin, "unpaired", turns, ([{"role": "assistant", "content": answer.text}],), (1,))
        if not tokenizer.has_template:
            row = Row(answer.origin, "unpaired", answer.prompt, (answer.text,), (1,))
        example = encode(row, tokenizer, self.max_length, "drop", Notes())
        if example is None:
            raise DataError(f"{answer.origin}: scorer implicit: longer than {self.max_length} tokens. Raise its option max_length, or drop the row.")
        return example.prompt, example.completions[0]
