"""The options of what is optimised: losses, goals, value head, presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from upo.config_section import Section, as_number, listed
from upo.errors import ConfigError
from upo.losses import Auxiliary, Objective, Term, build_loss


class PreferenceConfig(Section):
    """One preference loss: `{loss: kto, beta: 0.1}`. Other keys are options of the loss (`upo losses NAME`)."""

    model_config = ConfigDict(extra="allow")
    loss: str = Field(description="name of the loss (`upo losses`)")
    weight: float = Field(1.0, gt=0, description="factor of this term")
    weight_column: str | None = Field(None, description="numeric column of the rows by which each value of the loss is multiplied; a pair's is its chosen side's")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"loss": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _known(self) -> PreferenceConfig:
        self.term()
        return self

    def term(self) -> Term:
        """The executable term. Raises ValueError naming what is wrong with it."""
        return Term(build_loss(self.loss, **(self.model_extra or {})), self.weight, self.weight_column)


class RewardConfig(Section):
    """One goal: `{scorer: readability, weight: 0.3}`. Other keys are options of the scorer."""

    model_config = ConfigDict(extra="allow")
    scorer: str = Field(description="name of the scorer")
    weight: float = Field(1.0, description="factor of this goal in the total reward; negative for something to avoid")
    normalise: Literal["none", "zscore", "quantile"] = Field(
        "none", description="before weighting: `zscore`, or `quantile` (0 to 1), fitted on the training rows and saved in manifest.json"
    )
    clip: tuple[float, float] | None = Field(None, description="lowest and highest value after that; what lies outside is set to the nearer one")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"scorer": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _known(self) -> RewardConfig:
        from upo.rewards.registry import make_scorer  # whose modules import the configuration

        try:
            make_scorer(self.scorer, self.model_extra or {})
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @field_validator("clip", mode="before")
    @classmethod
    def _bounds(cls, value: Any) -> Any:
        if value is None:
            return None
        bounds = [as_number(v) for v in value] if isinstance(value, (list, tuple)) else []
        if len(bounds) != 2 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < float("inf") for v in bounds) or bounds[0] >= bounds[1]:
            raise ValueError("must be two numbers, the lower one first, e.g. [-3, 3]")
        return tuple(bounds)


class ValueConfig(Section):
    """The value head V(x)."""

    lr: float = Field(1e-4, gt=0, description="learning rate of the head")
    clip: float = Field(0.1, gt=0, description="largest gradient norm of the head")
    fit_steps: int = Field(60, ge=0, description="full-batch steps before step 0; 0 keeps the mean reward as the start")
    fit_lr: float = Field(1e-3, gt=0, description="learning rate of that fit")


class AuxiliaryConfig(Section):
    """Advantage-weighted likelihood on scored completions (UPO)."""

    rewards: tuple[RewardConfig, ...] = Field((), validate_default=True, description="the goals; their weighted sum is the reward R")
    gamma: float = Field(0.3, ge=0, description="weight of the actor term: how much the goals count beside the preferences")
    temperature: float = Field(5.0, ge=0, description="lambda: how sharply the weights follow the advantage; 0 is plain likelihood")
    value_coef: float = Field(0.1, ge=0, description="weight of the value term")
    expectile: float = Field(0.7, gt=0, lt=1, description="tau: 0.5 makes V the mean reward of a prompt, above it an optimistic one")
    actor_warmup_steps: int = Field(0, ge=0, description="optimizer steps without the actor term")
    value: ValueConfig = Field(ValueConfig(), description="the value head")

    @field_validator("rewards", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        value = listed(value)
        if value is None or (isinstance(value, (list, tuple)) and not value):
            raise ValueError("name at least one goal, e.g. [{scorer: readability, weight: 1.0}]")
        return value


PRESETS: dict[str, dict[str, Any]] = {
    "upo": {"preference": {"loss": "kto", "beta": 0.1}, "auxiliary": {}},
    "paper": {"preference": {"loss": "kto", "beta": 0.1}, "auxiliary": {"gamma": 0.5, "actor_warmup_steps": 100}},
}


class ObjectiveConfig(Section):
    """What is optimised: a preference loss (or a weighted list of them) and, optionally, auxiliary rewards."""

    preset: Literal["upo", "paper"] | None = Field(None, description="fills in what is not given: `upo` for laptop-sized runs, `paper` for the paper's numbers")
    preference: tuple[PreferenceConfig, ...] = Field((), description="one loss or a list of them")
    auxiliary: AuxiliaryConfig | None = Field(None, description="goals of your own")
    rewards: tuple[RewardConfig, ...] = Field(
        (), description="goals for preference losses that use rewards (modpo, exo_reward, a_lol, ...), where there is no `auxiliary`, whose goals they share"
    )
    value: ValueConfig = Field(ValueConfig(), description="the value head of such losses, where there is no `auxiliary`")

    @field_validator("rewards", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return listed(value)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        preset = PRESETS.get(str(data.get("preset")), {})
        preference, auxiliary = data.pop("preference", None), data.get("auxiliary")
        if preference is None:
            preference = preset.get("preference")
        elif isinstance(preference, Mapping) and "loss" not in preference:
            preference = {**preset.get("preference", {}), **preference}
        if preference is not None:
            data["preference"] = [preference] if isinstance(preference, (str, Mapping)) else preference
        if "auxiliary" in preset and (auxiliary is None or isinstance(auxiliary, Mapping)):
            data["auxiliary"] = {**preset["auxiliary"], **(auxiliary or {})}
        return data

    @model_validator(mode="after")
    def _something(self) -> ObjectiveConfig:
        if not self.preference and self.auxiliary is None:
            raise ValueError("nothing to optimise: give objective.preference, objective.auxiliary or objective.preset")
        if self.auxiliary is not None and (self.rewards or self.value != ValueConfig()):
            raise ValueError("objective.rewards and objective.value are for runs without objective.auxiliary; all losses share the goals and the head given there")
        wanting = [p.loss for p in self.preference if "rewards" in p.term().loss.requires()]
        if wanting and not self.goals:
            raise ValueError(f"{wanting[0]} needs rewards; name goals in objective.rewards, e.g. [{{scorer: column, column: score}}]")
        if self.rewards and not wanting:
            raise ValueError("objective.rewards: no loss of objective.preference uses rewards; to train on goals as UPO does, name them in objective.auxiliary.rewards")
        return self

    @property
    def goals(self) -> tuple[RewardConfig, ...]:
        """The goals whose weighted sum is the reward R."""
        return self.auxiliary.rewards if self.auxiliary else self.rewards

    @property
    def goals_key(self) -> str:
        """Where they stand in the configuration."""
        return "objective.auxiliary.rewards" if self.auxiliary else "objective.rewards"

    @property
    def value_head(self) -> ValueConfig:
        """Options of the value head."""
        return self.auxiliary.value if self.auxiliary else self.value

    def build(self) -> Objective:
        """The executable objective."""
        aux = self.auxiliary
        return Objective(
            preference=tuple(p.term() for p in self.preference),
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
