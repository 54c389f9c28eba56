"""Where a run's metrics go besides metrics.jsonl: experiment trackers behind one small interface. None of them may end a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from upo.config import LogConfig, TrackerConfig
from upo.errors import ConfigError
from upo.training.reporter import Reporter


class Sink(Protocol):
    """Receives one run, or one stretch of it. Whatever it raises is said once, and it is not called again."""

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """The run begins, or goes on: `manifest` is that of the run's folder, and names the same run each time."""
        ...

    def log(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        ...

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """The end: what summary.json holds, or None where the run was stopped."""
        ...


class Trackio:
    """A local dashboard (`trackio show`), by trackio."""

    def __init__(self, options: TrackerConfig) -> None:
        self.options = options

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        import trackio

        self.run = trackio.init(project=self.options.project, name=run_name(self.options, manifest), config=dict(config), resume="allow", embed=False)

    def log(self, record: Mapping[str, Any]) -> None:
        self.run.log(numbers(record), step=int(record["step"]))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self.run.finish()


class Wandb:
    """Weights & Biases, by wandb, as `wandb login` or WANDB_MODE=offline says."""

    def __init__(self, options: TrackerConfig) -> None:
        self.options = options

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=self.options.project,
            name=run_name(self.options, manifest),
            id=run_id(manifest),
            config=dict(config),
            resume="allow",
            save_code=False,
            settings={"console": "off"},
        )
        # wandb drops a step below the last one it saw; a resumed run goes back to its checkpoint, so the step is a metric of its own.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        self.run.log({"step": int(record["step"]), **numbers(record)})

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.run.summary.update({name: value for name, value in summary.items() if _is_number(value)})
        self.run.finish(exit_code=0 if summary is not None else 1)


SINKS: dict[str, Callable[[TrackerConfig], Sink]] = {"trackio": Trackio, "wandb": Wandb}


class Sinks:
    """Those a configuration names. Raises ConfigError for one whose package is not installed."""

    def __init__(self, config: LogConfig, reporter: Reporter) -> None:
        self.reporter = reporter
        self.sinks: dict[str, Sink] = {}
        for name, make in SINKS.items():
            options = getattr(config, name)
            if options is None:
                continue
            if name not in sys.modules and find_spec(name) is None:
                raise ConfigError(f'log.{name}: the package {name} is not installed: pip install "upo[{name}]", or leave the key out (--set log.{name}=null).')
            self.sinks[name] = make(options)

    def start(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        self._each(lambda sink: sink.start(config, manifest))

    def log(self, record: Mapping[str, Any]) -> None:
        self._each(lambda sink: sink.log(record))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self._each(lambda sink: sink.finish(summary))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                    call(sink)
            except Exception as error:  # a tracker, its network or its server: whatever it is, the run is worth more
                del self.sinks[name]
                what = (str(error).strip().splitlines() or [""])[0][:200]
                self.reporter.warn(f"log.{name}: {type(error).__name__}: {what}. Nothing more is sent there; training goes on, and metrics.jsonl has everything.")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record but its step; those of an evaluation are named eval/..."""
    prefix = "eval/" if record.get("eval") else ""
    return {prefix + name: float(value) for name, value in record.items() if name != "step" and _is_number(value)}


def run_id(manifest: Mapping[str, Any]) -> str:
    """Twelve characters that stay with a run wherever its folder goes."""
    return hashlib.sha256(json.dumps([manifest.get("created"), manifest.get("identity")], sort_keys=True).encode()).hexdigest()[:12]


def run_name(options: TrackerConfig, manifest: Mapping[str, Any]) -> str:
    """The name asked for, else that of the folder when the run began, and a part of its id, as trackio knows runs by name."""
    return options.name or f"{manifest.get('name', 'run')}-{run_id(manifest)[:6]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
