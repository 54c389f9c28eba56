"""Answers that are JSON, of a given form."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from upo.errors import ConfigError, UpoError
from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n```", re.DOTALL)


@dataclass(frozen=True)
class Json(TextScorer):
    """1 for an answer that is JSON and, where `schema` names a file with a JSON schema, of that form; else 0.

    form: `bare` takes nothing but JSON; `fenced` also takes one Markdown code block that holds it. NaN and Infinity are not JSON. A schema
    may hold patterns that take forever, so this runs in a process of its own: after `limit` seconds it is stopped, and the row is named.
    References of a schema to other addresses are refused: nothing is fetched.
    """

    schema: str = option("", optional=True)
    form: str = option("bare", choices=("bare", "fenced"))
    limit: float = option(5.0, above=0)

    name: ClassVar[str] = "json"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Whether an answer is JSON of a given form. Says nothing about what it holds.",
        range=(0.0, 1.0),
        higher="valid",
        speed="fast: parsing, in a process of its own",
        licence="our own code (Apache-2.0); with a schema: jsonschema (MIT)",
        offline="yes",
    )
    volatile: ClassVar[frozenset[str]] = frozenset({"limit"})
    batch: ClassVar[int] = 64
    isolated: ClassVar[bool] = True

    def identity(self) -> str:
        return super().identity() + (json.dumps(self._schema, sort_keys=True) if self.schema else "")

    def check(self) -> None:
        if self.schema:
            _ = self._validator

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        return [float(self._valid(answer.text)) for answer in answers]

    def _valid(self, text: str) -> bool:
        text = text.strip()
        if self.form == "fenced" and (block := _FENCE.fullmatch(text)):
            text = block[1]
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        if not self.schema:
            return True
        try:
            return bool(self._validator.is_valid(value))
        except RecursionError:
            return False
        except Exception as error:  # a reference that leads nowhere: found only when it is followed
            raise UpoError(f"json: schema {self.schema}: cannot be applied ({' '.join(str(error).split())[:200]}).") from None

    @cached_property
    def _schema(self) -> Any:
        try:
            return json.loads(Path(self.schema).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"json: schema {self.schema}: cannot be read as JSON ({error}).") from None

    @cached_property
    def _validator(self) -> Any:
        try:
            import jsonschema
            import referencing
        except ImportError:
            raise UpoError('json: schema: jsonschema is not installed. Install it with: pip install "upo[rewards]"') from None
        schema = self._schema
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"json: schema {self.schema}: is no JSON schema ({error.message[:200]}).") from None
        return kind(schema, registry=referencing.Registry())  # an empty one fetches nothing


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
