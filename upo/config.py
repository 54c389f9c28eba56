"""The one declaration of every option. `docs/configuration.md` and the JSON schema are made from it; unknown keys are errors."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upo.errors import ConfigError, did_you_mean
from upo.losses import Auxiliary, Objective, build_loss

Positive = Field(gt=0)


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Where the rows come from."""

    train: str = Field(description="JSON lines, Parquet or CSV file, or a hub dataset id (owner/name, owner/name:split)")
    eval: float | str = Field(0.0, description="held-out share of the training rows (split by prompt), or a file or dataset of its own; 0: none")
    layout: Literal["auto", "preference", "unpaired", "transcript", "group"] = Field("auto", description="how rows are read; auto detects it and says so")
    revision: str | None = Field(None, description="revision of a hub dataset")


class AdapterConfig(Section):
    """What is trained."""

    type: Literal["lora", "full"] = Field("lora", description="lora; full fine-tuning is refused for now")
    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: str | tuple[str, ...] = Field("all-linear", description="all-linear: every decoder linear but head and embeddings; or module names")
    dropout: float = Field(0.0, description="must be 0: dropout under gradient checkpointing is wrong on MLX")
    start: str | None = Field(None, description="folder of an adapter (PEFT layout) to start from")


class PreferenceConfig(BaseModel):
    """One preference loss: `{loss: kto, beta: 0.1}`. Options are those of the loss (`upo losses NAME`)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    loss: str
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _known(self) -> PreferenceConfig:
        build_loss(self.loss, **(self.model_extra or {}))
        return self


class RewardConfig(BaseModel):
    """One goal: `{scorer: readability, weight: 0.3}`. Other keys are options of the scorer."""

    model_config = ConfigDict(extra="allow", frozen=True)
    scorer: str
    weight: float = 1.0


class ValueConfig(Section):
    """The value head V(x)."""

    lr: float = Field(1e-4, gt=0)
    clip: float = Field(0.1, gt=0, description="largest gradient norm of the head")
    fit_steps: int = Field(60, ge=0, description="full-batch steps before step 0; 0 keeps the mean reward as the start")
    fit_lr: float = Field(1e-3, gt=0)


class AuxiliaryConfig(Section):
    """Advantage-weighted likelihood on scored completions (UPO)."""

    rewards: tuple[RewardConfig, ...] = ()
    gamma: float = Field(3.0, ge=0, description="weight of the actor term")
    temperature: float = Field(5.0, ge=0, description="lambda: how sharply the weights follow the advantage; 0 is plain likelihood")
    value_coef: float = Field(0.1, ge=0)
    expectile: float = Field(0.7, gt=0, lt=1)
    actor_warmup_steps: int = Field(0, ge=0, description="optimizer steps without the actor term")
    value: ValueConfig = ValueConfig()


PRESETS: dict[str, dict[str, Any]] = {
    "upo": {"preference": {"loss": "kto", "beta": 0.1}, "auxiliary": {}},
    "paper": {"preference": {"loss": "kto", "beta": 0.1}, "auxiliary": {"gamma": 0.5, "actor_warmup_steps": 100}},
}


class ObjectiveConfig(Section):
    """What is optimised: a preference loss (or a weighted list of them) and, optionally, auxiliary rewards."""

    preset: Literal["upo", "paper"] | None = Field(None, description="fills in what is not given: upo for laptop-sized runs, paper for the paper's numbers")
    preference: tuple[PreferenceConfig, ...] = ()
    auxiliary: AuxiliaryConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        preset = PRESETS.get(data.get("preset") or "", {})
        if isinstance(data.get("preference"), str):
            data["preference"] = {"loss": data["preference"]}
        if "preference" in preset and data.get("preference") is None:
            data["preference"] = preset["preference"]
        if isinstance(data.get("preference"), Mapping):
            data["preference"] = [data["preference"]]
        if data.get("preference") is None:
            data.pop("preference", None)
        if "auxiliary" in preset and isinstance(data.get("auxiliary") or {}, Mapping):
            data["auxiliary"] = {**preset["auxiliary"], **(data.get("auxiliary") or {})}
        return data

    @model_validator(mode="after")
    def _something(self) -> ObjectiveConfig:
        if not self.preference and self.auxiliary is None:
            raise ValueError("nothing to optimise: give objective.preference, objective.auxiliary or objective.preset")
        if self.auxiliary is not None and not self.auxiliary.rewards:
            raise ValueError("objective.auxiliary.rewards is empty: name at least one goal, e.g. [{scorer: readability, weight: 1.0}]")
        return self

    def build(self) -> Objective:
        """The executable objective."""
        aux = self.auxiliary
        return Objective(
            preference=tuple((build_loss(p.loss, **(p.model_extra or {})), p.weight) for p in self.preference),
            auxiliary=None
            if aux is None
            else Auxiliary(
                gamma=aux.gamma,
                temperature=aux.temperature,
                value_coef=aux.value_coef,
                expectile=aux.expectile,
                actor_warmup_steps=aux.actor_warmup_steps,
            ),
        )


class OptimizerConfig(Section):
    """AdamW (0.9, 0.999) with bias correction, or RMSprop (0.99, eps outside the root): the same on both backends."""

    name: Literal["adamw", "rmsprop"] = "adamw"
    lr: float = Field(5e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="after the warm-up: constant, or down to 0")
    warmup_steps: int = Field(5, ge=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm of the adapter")
    weight_decay: float = Field(0.0, ge=0)
    eps: float = Field(1e-8, gt=0)


class TrainConfig(Section):
    """How long, in which portions, and what is kept."""

    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, gt=0, description="optimizer steps; overrides epochs")
    batch_size: int = Field(8, gt=0, description="rows per optimizer step, over all ranks")
    micro_batch_tokens: int = Field(8192, gt=0, description="padded tokens computed at once; changes memory, not the result")
    max_length: int = Field(1024, gt=1, description="tokens of prompt and completion together")
    overflow: Literal["drop", "cut"] = Field("drop", description="rows too long after whole turns of the prompt were removed: drop, or cut both completions alike")
    seed: int = Field(0, ge=0)
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    save_every: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints kept")


class RunConfig(Section):
    """A whole run. `RunConfig(model=..., data=..., objective=...)` in Python, or one YAML file."""

    model: str = Field(description="hub id or folder of a causal language model in HF layout")
    revision: str | None = Field(None, description="revision of a hub model")
    backend: Literal["auto", "mlx", "torch"] = Field("auto", description="auto: mlx on Apple silicon, torch elsewhere")
    device: str = Field("auto", description="auto, cpu, gpu, cuda, cuda:1 or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the frozen base; auto: bfloat16 on GPUs, float32 on CPUs")
    quantize: Literal["none", "nf4"] = Field("none", description="nf4: 4-bit base by bitsandbytes (CUDA). MLX 4-bit folders need no option")
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    reference: str = Field("base", description="base (adapters off), start (adapter.start), or a folder with an adapter")
    objective: ObjectiveConfig = Field(default_factory=lambda: ObjectiveConfig.model_validate({"preference": {"loss": "dpo"}}))
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _supported(self) -> RunConfig:
        if self.adapter.type == "full":
            raise ValueError("adapter.type: full fine-tuning is not supported yet; use lora (a high rank on all-linear comes close)")
        if self.adapter.dropout != 0:
            raise ValueError("adapter.dropout: must be 0 for now; it is wrong under gradient checkpointing on MLX, and both backends must agree")
        return self

    def dump(self) -> str:
        """YAML that loads to the same configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or a mapping) and apply overrides like `optimizer.lr=1e-5`.

    Raises ConfigError with the key, what is wrong with it and, for an unknown key, the nearest known one.
    """
    if isinstance(source, Mapping):
        name, data = "config", dict(source)
    else:
        name, data = str(source), _read_yaml(Path(source))
    for override in overrides:
        _apply(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. `upo quickstart --write-config {path}` writes one to start from.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys; this is {'empty' if data is None else type(data).__name__}.")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    """Set a dotted key; the value is read as YAML, so lists and mappings work: objective.preference={loss: kto}."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f'--set {override}: write KEY=VALUE, e.g. --set "optimizer.lr=1e-5".')
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: the value is not valid YAML.") from None
    *parents, last = key.strip().split(".")
    node: Any = data
    for parent in parents:
        if isinstance(node, dict):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if isinstance(node, list) and len(node) == 1:
            node = node[0]  # `objective.preference.beta` where the file lists one loss
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {parent} is not a mapping in the configuration.")
    node[last] = value


def _explain(error: Any) -> str:
    location = [part for part in error["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _section(location[:-1])
        return f"{key}: unknown key.{did_you_mean(location[-1], known.model_fields) if known else ''}"
    if error["type"] == "missing":
        return f"{key}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    got = error.get("input")
    shown = f" (got {got!r})" if isinstance(got, (str, int, float, bool)) and not message.startswith(key) else ""
    return (message if not key or message.startswith(key) else f"{key}: {message}") + shown


def _section(path: Sequence[str]) -> type[BaseModel] | None:
    """The section class at a path of keys, or None where there is none."""
    section: type[BaseModel] = RunConfig
    for key in path:
        if key not in section.model_fields:
            return None
        inner = [a for a in _leaves(section.model_fields[key].annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not inner:
            return None
        section = inner[0]
    return section


def _leaves(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return [leaf for arg in typing.get_args(annotation) for leaf in _leaves(arg)]
    return [annotation]
