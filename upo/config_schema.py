"""The JSON schema of a configuration file, made from `upo.config`, the losses and the scorers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from upo.config import RunConfig
from upo.losses import LOSSES
from upo.rewards import SCORERS


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors: every key, with the options of each loss and scorer."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    for item, key, classes in (("PreferenceConfig", "loss", LOSSES), ("RewardConfig", "scorer", SCORERS)):
        shared = {name: info for name, info in definitions[item]["properties"].items() if name != key}
        definitions[item] = {"anyOf": [{"enum": list(classes)}, *(_variant(key, name, kind, shared) for name, kind in classes.items())]}
    for section, key, item in (("ObjectiveConfig", "preference", "PreferenceConfig"), ("AuxiliaryConfig", "rewards", "RewardConfig"), ("EvaluationConfig", "goals", "RewardConfig")):
        one = {"$ref": f"#/$defs/{item}"}
        definitions[section]["properties"][key] = {
            "description": definitions[section]["properties"][key]["description"],
            "anyOf": [one, {"type": "array", "items": one}],
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "upo configuration"}


def _variant(key: str, name: str, kind: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one loss or scorer: its name, the shared keys, and its own options."""
    return {
        "type": "object",
        "title": name,
        "description": (kind.__doc__ or "").splitlines()[0],
        "properties": {
            key: {"const": name},
            **shared,
            **{f.name: _option(f) for f in dataclasses.fields(kind)},
        },
        "required": [key],
        "additionalProperties": False,
    }


def _option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    choices = field.metadata.get("choices")
    kind = {"enum": list(choices)} if choices else {"type": {float: "number", int: "integer", str: "string"}[type(field.default)]}
    return {**kind, "default": field.default}
