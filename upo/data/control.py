"""Control texts (CSFT): answers are trained behind a text that says whether they are good, and asked for with the good one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from upo.data.batch import Example
from upo.data.forest import Tokens
from upo.data.tokenizer import Tokenizer
from upo.errors import DataError


@dataclass(frozen=True)
class Control:
    """The tokens of `data.control`, for good and for bad answers."""

    good: Tokens
    bad: Tokens

    @classmethod
    def of(cls, texts: Sequence[str] | None, tokenizer: Tokenizer) -> Control | None:
        return None if texts is None else cls(*(tokenizer.text_ids(text) for text in texts))

    def room(self, labels: Sequence[int]) -> int:
        """Tokens that a row of these labels needs for its texts."""
        return max(len(self.good if label > 0 else self.bad) for label in labels)

    def before(self, example: Example) -> Example:
        """The row with the text of its label at the head of each completion. Raises DataError for one without a label."""
        if 0 in example.labels:
            raise DataError(f"{example.origin}: data.control needs a label for each completion, and this row has none.")
        sides = [self.good if label > 0 else self.bad for label in example.labels]
        return replace(example, completions=tuple(np.concatenate([text, c]) for text, c in zip(sides, example.completions, strict=True)))

    def after(self, prompt: Tokens) -> Tokens:
        """A prompt that asks for a good answer."""
        return np.concatenate([prompt, self.good])
