"""Every option is declared here, those of the objective in `upo.config_objective`. `docs/configuration.md` and the JSON schema are made from it; unknown
keys are errors."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from upo.config_file import Source, apply_override, explain, read_yaml
from upo.config_objective import PRESETS, AuxiliaryConfig, ObjectiveConfig, PreferenceConfig, RewardConfig, ValueConfig
from upo.config_section import Section, listed
from upo.errors import ConfigError, did_you_mean

__all__ = ["PRESETS", "AuxiliaryConfig", "ObjectiveConfig", "PreferenceConfig", "RewardConfig", "RunConfig", "ValueConfig", "load_config"]


class DataConfig(Section):
    """Where the rows come from."""

    train: str = Field(description="JSON lines, Parquet or CSV file, or a hub dataset id (`owner/name`, `owner/name:split`)")
    eval: float | str = Field(0.0, description="held-out share of the training rows (split by prompt), or a file or dataset of its own; 0: none")
    layout: Literal["auto", "preference", "unpaired", "transcript", "group"] = Field("auto", description="how rows are read; `auto` detects it and says so")
    revision: str | None = Field(None, description="revision of a hub dataset")
    control: tuple[str, str] | None = Field(None, description='texts before good and bad answers, e.g. ["<|good|>", "<|bad|>"]: for the loss csft')

    @field_validator("control")
    @classmethod
    def _two_texts(cls, value: tuple[str, str] | None) -> tuple[str, str] | None:
        if value is not None and (not all(value) or value[0] == value[1]):
            raise ValueError("must be two different texts, for good and for bad answers")
        return value

    @field_validator("eval", mode="before")
    @classmethod
    def _share_or_file(cls, value: Any) -> Any:
        if not isinstance(value, (int, float, str)):
            raise ValueError("must be a share below 1, or the name of a file or dataset")
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError("as a number it is the held-out share of the rows, from 0 (none) to below 1")
        if isinstance(value, str) and (share := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)) and not Path(value).exists():
            raise ValueError(f"there is no file of this name; as a share write {float(share[1]) / 100:g}")
        return value


class AdapterConfig(Section):
    """What is trained."""

    type: Literal["lora", "full"] = Field("lora", description="`lora`; full fine-tuning is refused for now")
    rank: int = Field(16, gt=0, description="inner size of the low-rank update")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: str | tuple[str, ...] = Field("all-linear", description="`all-linear`: every decoder linear but head and embeddings; or a list of module names")
    dropout: float = Field(0.0, description="must be 0: dropout under gradient checkpointing is wrong on MLX")
    start: str | None = Field(None, description="folder of an adapter (PEFT layout) to start from")

    @field_validator("type")
    @classmethod
    def _lora(cls, value: str) -> str:
        if value == "full":
            raise ValueError("full fine-tuning is not supported yet; use lora (a high rank on all-linear comes close)")
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str) and value:
            return value
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v for v in value):
            raise ValueError("must be all-linear or a list of module names, e.g. [q_proj, v_proj]")
        return tuple(value)

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError("must be 0 for now; dropout is wrong under gradient checkpointing on MLX, and both backends must agree")
        return value


class OptimizerConfig(Section):
    """AdamW (0.9, 0.999) with bias correction, or RMSprop (0.99, eps outside the root): the same on both backends."""

    name: Literal["adamw", "rmsprop"] = Field("adamw", description="update rule")
    lr: float = Field(2e-4, gt=0, description="largest learning rate of the adapter; the preset `upo` does well with 5e-4 on small models, at which DPO alone breaks them")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="after the warm-up: constant, or down to 0")
    warmup_steps: int = Field(5, ge=0, description="optimizer steps over which the learning rate rises")
    clip: float = Field(1.0, gt=0, description="largest gradient norm of the adapter")
    weight_decay: float = Field(0.0, ge=0, description="decoupled from the gradient under AdamW, added to it under RMSprop")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")


WATCHED = ("loss", "loss/preference", "loss/auxiliary", "accuracy", "margin", "logp/chosen", "perplexity", "kl", "goals")


def watched(name: str) -> str:
    """The name of a metric by which evaluations can be compared. Raises ValueError for another."""
    if name not in WATCHED and not (name.startswith("goal/") and len(name) > len("goal/")):
        raise ValueError(f'no such metric of an evaluation.{did_you_mean(name, [*WATCHED, "goal/NAME"])}')
    return name


class EarlyStoppingConfig(Section):
    """Ends a run that no longer gets better. Metrics: `loss`, `loss/preference`, `loss/auxiliary`, `perplexity` and `kl`, of which lower is better;
    `accuracy`, `margin`, `logp/chosen`, `goals` and `goal/<name>` (lower for a negative weight), of which higher is."""

    metric: str = Field(description="of the held-out rows, or of the answers sampled to their prompts (`evaluation`)")
    patience: int = Field(3, gt=0, description="evaluations in a row without a better value after which the run ends")
    min_delta: float = Field(0.0, ge=0, description="by how much a value must be better than the best before it to count")

    @field_validator("metric")
    @classmethod
    def _watched(cls, value: str) -> str:
        return watched(value)


class TrainConfig(Section):
    """How long, in which portions, and what is kept."""

    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    steps: int | None = Field(None, gt=0, description="optimizer steps; when given, `epochs` is not used")
    batch_size: int = Field(8, gt=0, description="rows per optimizer step, over all ranks")
    micro_batch_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="token slots computed at once; changes memory and speed, not the result. `auto`: 2048; on CUDA as many as memory allows, by an estimate"
    )
    max_length: int = Field(1024, gt=1, description="tokens of prompt and completion together")
    overflow: Literal["drop", "cut"] = Field("drop", description="rows too long after whole turns of the prompt were removed: drop, or cut both completions alike")
    seed: int = Field(0, ge=0, description="of order, splits, partners and initial weights")
    prefix_sharing: Literal["auto", "off"] = Field(
        "auto", description="`auto`: compute each prompt once for all its completions where the model allows it, checked at the start; `off`: padded rows"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="recompute activations in the backward pass: less memory, more time; `auto`: where memory would not do without, by an estimate"
    )
    memory_limit_gb: float | None = Field(None, gt=0, description="GB a process may take on its device: MLX, there a guideline, and PyTorch on CUDA")
    cache_limit_gb: float | None = Field(None, ge=0, description="GB of freed memory that MLX keeps for reuse; 0: none")
    wired_limit_gb: float | None = Field(None, gt=0, description="GB that MLX keeps resident on Metal (macOS 15 or newer)")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    save_every: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints kept")
    keep_best: str | None = Field(None, description="metric by which the best evaluated checkpoint is kept as well (below); needs `eval_every`")
    early_stopping: EarlyStoppingConfig | None = Field(None, description="end the run when a metric no longer gets better; needs `eval_every`")

    @field_validator("prefix_sharing", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # which is how YAML reads a bare off

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        if value != "auto" and not isinstance(value, bool):
            raise ValueError("must be auto, true or false")
        return value

    @field_validator("keep_best")
    @classmethod
    def _watched(cls, value: str | None) -> str | None:
        return value if value is None else watched(value)


class EvaluationConfig(Section):
    """Answers to held-out prompts, sampled at every evaluation and scored by the goals: metrics `goal/<name>`, `goals` and `answers/...`."""

    prompts: int = Field(0, ge=0, description="held-out prompts that are answered, the first ones; 0: none")
    samples: int = Field(1, gt=0, description="answers to each")
    max_tokens: int = Field(128, gt=0, description="longest answer; what is cut off counts up to its last complete sentence")
    temperature: float = Field(0.7, ge=0, description="of sampling; 0 takes the likeliest token. The draws are the same at every evaluation")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus to sample from")
    goals: tuple[RewardConfig, ...] = Field((), description="scorers of the answers, without `normalise`; if not given, the objective's goals")

    @field_validator("goals", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("goals")
    @classmethod
    def _as_scored(cls, value: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        if any(goal.normalise != "none" for goal in value):
            raise ValueError("normalise is fitted on scores of the training rows, which these goals do not have; leave it out")
        return value


class TrackerConfig(Section):
    """One experiment tracker."""

    project: str = Field("upo", min_length=1, description="name of the project there")
    name: str | None = Field(None, min_length=1, description="name of the run there; by default the folder's, with a part of the run's id")


class LogConfig(Section):
    """Where metrics go besides metrics.jsonl, which is always written. A tracker that fails is warned about once; training goes on without it."""

    trackio: TrackerConfig | None = Field(None, description="a local dashboard: `log: {trackio: {project: mine}}`; needs `upo[trackio]`")
    wandb: TrackerConfig | None = Field(None, description="Weights & Biases; needs `upo[wandb]` and `wandb login`, or WANDB_MODE=offline")


class RunConfig(Section):
    """A whole run. `RunConfig(model=..., data=..., objective=...)` in Python, or one YAML file."""

    model: str = Field(min_length=1, description="hub id or folder of a causal language model in HF layout")
    revision: str | None = Field(None, description="revision of a hub model")
    backend: Literal["auto", "mlx", "torch"] = Field("auto", description="`auto`: mlx on Apple silicon, torch elsewhere, or whichever is installed")
    device: str = Field("auto", description="auto, cpu, gpu, cuda, cuda:1 or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the frozen base; `auto`: bfloat16 on GPUs, float32 on CPUs. In float16 the gradient is scaled by 1024, less where it overflows")
    quantize: Literal["none", "nf4"] = Field("none", description="`nf4`: 4-bit base by bitsandbytes (CUDA). MLX 4-bit folders need no option")
    data: DataConfig = Field(description="where the rows come from")
    adapter: AdapterConfig = Field(AdapterConfig(), description="what is trained")
    reference: str | tuple[str, ...] = Field(
        "base", description="`base` (adapters off), `start` (adapter.start), or a folder with an adapter; a list of them for losses that compare several (mrpo)"
    )
    objective: ObjectiveConfig = Field(
        default_factory=lambda: ObjectiveConfig.model_validate({"preference": {"loss": "dpo"}}), description="what is optimised; DPO if not given"
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how the adapter is updated")
    train: TrainConfig = Field(TrainConfig(), description="how long, in which portions, and what is kept")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="answers that are sampled and scored while it trains")
    log: LogConfig = Field(LogConfig(), description="where metrics go besides metrics.jsonl")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if not self.references or not all(self.references):
            raise ValueError("reference: must name at least one: base, start or a folder with an adapter")
        if len(set(self.references)) < len(self.references):
            raise ValueError("reference: names the same one twice")
        if "start" in self.references and self.adapter.start is None:
            raise ValueError("reference: start needs adapter.start; without a start adapter the reference is base")
        if (self.data.control is not None) != ("control" in self.objective.build().needs):
            raise ValueError('data.control: goes with the loss csft, and that with it, e.g. data.control: ["<|good|>", "<|bad|>"]')
        for preference in self.objective.preference:
            preference.term().loss.check_run(len(self.references), self.train.batch_size)
        if len(self.references) > 1 and "references" not in self.objective.build().needs:
            raise ValueError("reference: is a list, but no loss of objective.preference uses more than one (mrpo does)")
        return self

    @property
    def references(self) -> tuple[str, ...]:
        """The references; the first is the one that losses with a single reference use."""
        return (self.reference,) if isinstance(self.reference, str) else self.reference

    def dump(self) -> str:
        """YAML that loads to the same configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or a mapping) and apply overrides like `optimizer.lr=1e-5`.

    Raises ConfigError with file and line, the key, what is wrong with it and, for an unknown key, the nearest known one; one line for
    each thing that is wrong. Paths in the configuration are relative to the current directory, not to the file.
    """
    read = Source(copy.deepcopy(dict(source))) if isinstance(source, Mapping) else read_yaml(Path(source))
    for override in overrides:
        apply_override(read, override)
    try:
        return RunConfig.model_validate(read.data)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(e, RunConfig, read) for e in error.errors())) from None
