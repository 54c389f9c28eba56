"""What every section of a configuration shares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from upo.config_file import leaves

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 reads 1e-5 as text: it wants 1.0e-5


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = leaves(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("true and false (yes, no, on, off) mean nothing here; text needs quotes")
        return as_number(value) if float in kinds or int in kinds else value


def listed(value: Any) -> Any:
    """One item written without its list's brackets, as a list."""
    return [value] if isinstance(value, (str, Mapping)) else value


def as_number(value: Any) -> Any:
    """A number in scientific notation that YAML has read as text, as the number it is."""
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value
