"""What a run was made of and by whom it was computed."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import numpy as np

import upo
from upo.backend import Learner
from upo.training.prepare import Prepared

PACKAGES = {"torch": ("torch", "transformers", "peft"), "mlx": ("mlx", "mlx-lm", "transformers")}


def first_manifest(
    prepared: Prepared, learner: Learner, identity: Mapping[str, str], references: Mapping[str, str], value_fit: Mapping[str, float]
) -> dict[str, Any]:
    """The manifest of a new run, no session yet: versions, hashes, sizes."""
    info, config = learner.info, prepared.config
    return {
        "upo": upo.__version__,
        "created": _now(),
        "identity": dict(identity),
        "data": {
            "train": {"source": config.data.train, "rows": len(prepared.train), "completions": sum(len(e.completions) for e in prepared.train)},
            "eval": {"source": config.data.eval, "rows": len(prepared.eval), "completions": sum(len(e.completions) for e in prepared.eval)},
        },
        "model": {"name": info.name, "parameters": info.parameters, "trainable": info.trainable, "targets": list(info.targets)},
        "reference": {"spec": config.reference, "keys": dict(references)},
        "rewards": [goal.record() for goal in prepared.goals],
        "value_fit": dict(value_fit),
        "steps": prepared.total,
        "sessions": [],
    }


def session_entry(backend: str, learner: Learner, step: int) -> dict[str, Any]:
    """One stretch of a run on one backend: steps from_step + 1 to to_step, the latter filled in when it ends."""
    return {
        "backend": backend,
        "device": learner.info.device,
        "dtype": learner.info.dtype,
        "ranks": learner.comm.size,
        "from_step": step,
        "to_step": None,
        "started": _now(),
        "versions": {"upo": upo.__version__, "python": platform.python_version(), "numpy": np.__version__, **_versions(backend)},
    }


def cut_sessions(manifest: Mapping[str, Any], step: int) -> None:
    """Let the sessions end at `step`, from where another one goes on: steps that are done again are not theirs.

    The last of them did all that is between the others and `step`, even if it was killed before it could say so.
    """
    for session in manifest["sessions"]:
        session["from_step"] = min(step, session["from_step"])
        session["to_step"] = step if session["to_step"] is None else min(step, session["to_step"])
    for last in manifest["sessions"][-1:]:
        last["to_step"] = step


def done_by(manifest: Mapping[str, Any]) -> str:
    """Who did the steps so far: `1-40 by mlx on gpu, 41-60 by torch on cuda:0`."""
    stretches: list[tuple[str, int]] = []  # (who, last step); neighbours by the same are one
    for session in manifest["sessions"]:
        who = f"{session.get('backend')} on {session.get('device')}"
        if session["to_step"] > session["from_step"]:
            stretches[-1:] = [*[s for s in stretches[-1:] if s[0] != who], (who, session["to_step"])]
    firsts = [1, *(last + 1 for _, last in stretches)]
    return ", ".join(f"{first}-{last} by {who}" for first, (who, last) in zip(firsts, stretches, strict=False))


def is_manifest(content: Any) -> bool:
    """Whether everything in it that a resumed run reads is what it should be: it may have come from anywhere."""
    if not isinstance(content, dict) or type(content.get("steps")) is not int:
        return False
    identity, reference, sessions = content.get("identity"), content.get("reference"), content.get("sessions")
    if not isinstance(identity, dict) or not isinstance(reference, dict) or not isinstance(sessions, list):
        return False
    keys = reference.get("keys")
    return (
        isinstance(keys, dict)
        and all(isinstance(key, str) and re.fullmatch("[0-9a-f]+", key) for key in keys.values())  # they name files of the cache
        and re.fullmatch(r"step-\d{6,12}", str(content.get("latest", "step-000000"))) is not None
        and all(isinstance(s, dict) and _is_step(s.get("from_step")) and (s.get("to_step") is None or _is_step(s["to_step"])) for s in sessions)
    )


def strict_json(text: str) -> Any:
    """Parsed JSON that can be written again: no NaN, no half characters. Raises ValueError or RecursionError."""
    content = json.loads(text, parse_constant=_refuse)
    json.dumps(content, ensure_ascii=False).encode()
    return content


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0


def _versions(backend: str) -> dict[str, str]:
    found = {}
    for name in PACKAGES.get(backend, ()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
