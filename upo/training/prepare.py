"""From a configuration to rows that can be trained on: everything that needs no model, cheapest checks first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upo.config import RunConfig
from upo.data.batch import Example
from upo.data.load import load_data
from upo.data.order import step_rows, steps_per_epoch, total_steps
from upo.data.partners import assign_partners
from upo.data.tokenizer import Tokenizer, load_tokenizer
from upo.errors import DataError
from upo.losses import Objective
from upo.models import model_config, resolve
from upo.rewards import Goal, score_examples, validate_rewards
from upo.training.checks import check_context, check_length, check_rows
from upo.training.reference import check_reference
from upo.training.reporter import Reporter


@dataclass(frozen=True)
class Prepared:
    """A run before its model: the objective, and the rows it asks for with partners and rewards."""

    config: RunConfig
    objective: Objective
    folder: Path | None  # of the model; None where the rows were given
    tokenizer: Tokenizer | None
    data: Any
    train: list[Example]
    eval: list[Example]
    total: int  # optimizer steps
    goals: tuple[Goal, ...] = ()  # of the rewards, as they were scored

    def rows_of(self, step: int) -> list[Example]:
        """The training rows of an optimizer step."""
        train = self.config.train
        return [self.train[i] for i in step_rows(len(self.train), train.batch_size, train.seed, step)]

    def rows_before(self, step: int) -> int:
        """Training rows in the steps before this one."""
        n, size = len(self.train), self.config.train.batch_size
        epoch, index = divmod(step, steps_per_epoch(n, size))
        return epoch * n + index * size


def prepare(config: RunConfig, *, allow_code: bool, reporter: Reporter, data: Any = None, score: bool = True) -> Prepared:
    """Check the configuration, read the data, and give the rows what the objective needs, in this order: rewards known, model folder,
    tokenizer, rows, their fit to the objective, length of the run, partners, rewards scored (unless `score` is False).

    `data` stands for reading files, and then no model folder is looked at. Raises an UpoError.
    """
    objective = config.objective.build()
    goals = config.objective.goals
    validate_rewards(goals, allow_code=allow_code, key=config.objective.goals_key)
    check_reference(config)
    folder = tokenizer = None
    if data is None:
        folder = resolve(config.model, config.revision)
        tokenizer = load_tokenizer(folder)
        data = load_data(config, tokenizer, reporter)
        check_context(model_config(folder)[0], [*data.train, *data.eval], reporter)
    splits = {"data.train": list(data.train), "data.eval": list(data.eval)}
    for name, examples in splits.items():
        if examples:
            check_rows(objective, examples, name)
    total = total_steps(config.train, len(splits["data.train"]))
    check_length(config, objective, total, reporter)
    fitted: list[Goal] | None = None
    for name, examples in splits.items():
        if "anchors" not in objective.needs:  # what a row brings in vain would be scored all the same
            splits[name] = examples = [e if e.anchor is None else replace(e, anchor=None) for e in examples]
        if examples and "partners" in objective.needs:
            splits[name] = _with_partners(config, name, examples)
        if examples and goals and score:  # the training rows come first: normalisation is fitted on them
            splits[name], fitted = score_examples(
                splits[name], goals, fitted=fitted, allow_code=allow_code, reporter=reporter, key=config.objective.goals_key
            )
        elif examples and (columns := [goal for goal in goals if goal.scorer == "column"]):  # whether they are there can be said at once
            score_examples(examples, columns, reporter=reporter, key=config.objective.goals_key)
    return Prepared(config, objective, folder, tokenizer, data, splits["data.train"], splits["data.eval"], total, tuple(fitted or ()))


def _with_partners(config: RunConfig, name: str, examples: list[Example]) -> list[Example]:
    try:
        return assign_partners(examples, config.train.seed, config.train.max_length)
    except DataError as error:
        more = " Or raise data.eval, so that more prompts are held out." if name == "data.eval" and not isinstance(config.data.eval, str) else ""
        raise DataError(f"{name}: {error}{more}") from None
