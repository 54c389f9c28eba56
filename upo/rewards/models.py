"""What scorers share that ask a classifier or a reward model: where it comes from, and for how long it is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from upo.backend import get_backend, installed
from upo.errors import BackendError
from upo.losses.options import option
from upo.models import resolve, weights_hash
from upo.rewards.base import Answer, Ready, TextScorer
from upo.training.reporter import Reporter

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelScorer(TextScorer):
    """A scorer that asks a transformers model with a classification head, by PyTorch. Remembered scores are those of its weights."""

    model: str = ""
    revision: str = option("", optional=True)
    dtype: str = option("float32", choices=DTYPES)

    batch: ClassVar[int] = 16
    lost: ClassVar[str] = "their end"  # of answers that are too long

    def check(self) -> None:
        if not installed("torch"):
            raise BackendError(f'scorer {self.name} needs PyTorch, also beside MLX. Install it with: pip install "upo[torch]"')

    def identity(self) -> str:
        return f"{super().identity()} {weights_hash(self.folder)}"

    @cached_property
    def folder(self) -> Path:
        """Of the model, downloaded if need be. Raises ModelError."""
        return resolve(self.model, self.revision or None)

    def judge(self, classifier: Any) -> Callable[[Sequence[Answer]], Sequence[float]]:
        """The function that scores with a loaded model. Raises ConfigError if it is not what this scorer needs."""
        raise NotImplementedError

    @contextmanager
    def ready(self, count: int, reporter: Reporter) -> Iterator[Ready]:
        backend: Any = get_backend("torch")
        classifier = backend.classifier(self.folder, self.dtype)
        reporter.info(f"Scorer {self.title}: {self.model} on {classifier.device}, {self.dtype}.")
        try:
            yield Ready(self.judge(classifier))
        finally:
            classifier.close()
        if classifier.cut:
            reporter.warn(
                f"Scorer {self.title}: {classifier.cut:,} of {count:,} answers have more than the {classifier.limit:,} tokens that {self.model} reads; "
                f"{self.lost} was not scored."
            )
