"""The configuration: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from upo.config import RunConfig, load_config
from upo.config_file import walk
from upo.config_schema import config_schema
from upo.errors import ConfigError
from upo.losses import DPO, KTO, LOSSES, SFT, Term
from upo.rewards import SCORERS

MINIMAL = {"model": "m", "data": {"train": "rows.jsonl"}}
GOAL = {"rewards": [{"scorer": "readability"}]}
EXAMPLES = sorted(path for path in (Path(__file__).parents[2] / "examples").glob("*.yaml") if path.stem != "sweep")  # whose points are configurations


def test_a_file_may_be_named_like_a_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "5%").touch()
    assert load_config({**MINIMAL, "data": {"train": "rows.jsonl", "eval": "5%"}}).data.eval == "5%"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(source, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def test_defaults():
    config = load_config(MINIMAL)
    assert (config.backend, config.reference, config.adapter.rank, config.adapter.alpha) == ("auto", "base", 16, 32.0)
    assert (config.optimizer.name, config.optimizer.lr, config.train.batch_size, config.train.max_length) == ("adamw", 2e-4, 8, 1024)
    assert config.objective.build().preference == (Term(DPO(beta=0.1)),)
    assert config.objective.build().auxiliary is None


def test_a_full_file(tmp_path):
    """The example of the documentation, with a number that YAML 1.1 reads as text."""
    path = write(
        tmp_path,
        """
        model: m
        data: {train: a.jsonl, eval: 5e-2}
        objective:
          preset: upo
          preference: {loss: kto, beta: 2e-1, desirable_weight: 1.5}
          auxiliary: {rewards: [{scorer: length, weight: 3e-1, high: 80}], gamma: 2}
        optimizer: {lr: 1e-5}
        train: {steps: 1e2}
        """,
    )
    config = load_config(path)
    assert config.data.eval == 0.05 and config.optimizer.lr == 1e-5 and config.train.steps == 100
    objective = config.objective.build()
    assert objective.preference == (Term(KTO(beta=0.2, desirable_weight=1.5)),)
    assert (objective.auxiliary.gamma, objective.auxiliary.temperature, objective.auxiliary.actor_warmup_steps) == (2.0, 5.0, 0)
    reward = config.objective.auxiliary.rewards[0]
    assert (reward.scorer, reward.weight, reward.model_extra) == ("length", 0.3, {"high": 80})


def test_presets():
    upo = load_config({**MINIMAL, "objective": {"preset": "upo", "auxiliary": GOAL}}).objective.build()
    paper = load_config({**MINIMAL, "objective": {"preset": "paper", "auxiliary": GOAL}}).objective.build()
    assert upo.preference == paper.preference == (Term(KTO(beta=0.1)),)
    assert (upo.auxiliary.gamma, upo.auxiliary.actor_warmup_steps) == (0.3, 0)
    assert (paper.auxiliary.gamma, paper.auxiliary.actor_warmup_steps) == (0.5, 100)
    for objective in (upo, paper):
        assert (objective.auxiliary.temperature, objective.auxiliary.value_coef, objective.auxiliary.expectile) == (5.0, 0.1, 0.7)


def test_a_preset_gives_way_to_what_is_given():
    data = {"preset": "paper", "preference": {"loss": "dpo"}, "auxiliary": {**GOAL, "gamma": 1}}
    objective = load_config({**MINIMAL, "objective": data}).objective.build()
    assert objective.preference == (Term(DPO(beta=0.1)),)
    assert (objective.auxiliary.gamma, objective.auxiliary.actor_warmup_steps) == (1.0, 100)


def test_shorthands():
    text = load_config({**MINIMAL, "objective": {"preference": ["dpo", {"loss": "sft", "weight": 0.2}], "auxiliary": {"rewards": "length"}}}).objective
    assert text.build().preference == (Term(DPO()), Term(SFT(), 0.2))
    assert [r.scorer for r in text.auxiliary.rewards] == ["length"]
    # options without a name change those of the preset's loss
    beta = load_config({**MINIMAL, "objective": {"preset": "upo", "preference": {"beta": 0.3}, "auxiliary": GOAL}}).objective
    assert beta.build().preference == (Term(KTO(beta=0.3)),)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_dump_loads_to_the_same(path):
    config = load_config(path)
    assert load_config(yaml.safe_load(config.dump())) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1}, 'lr: unknown key. Did you mean objective.auxiliary.value.lr or objective.value.lr or optimizer.lr?'),
        ({"model": ""}, "model: must not be empty (got '')"),
        ({"optimiser": {}}, 'optimiser: unknown key. Did you mean "optimizer"?'),
        ({"optimizer": {"lrr": 1}}, 'optimizer.lrr: unknown key. Did you mean "lr"?'),
        ({"objective": {"auxiliary": {**GOAL, "value": {"fit_step": 3}}}}, 'objective.auxiliary.value.fit_step: unknown key. Did you mean "fit_steps"?'),
        ({"objective": {"preset": "upo", "auxiliary": {**GOAL, "gama": 3}}}, 'objective.auxiliary.gama: unknown key. Did you mean "gamma"?'),
        ({"objective": {"preference": "dppo"}}, 'objective.preference: unknown loss "dppo". Did you mean "dpo"?'),
        ({"objective": {"preference": {"loss": "kto", "betta": 1}}}, 'objective.preference: kto has no option "betta". Did you mean "beta"?'),
        ({"objective": {"preference": ["kto", {"loss": "dpo", "betta": 1}]}}, 'objective.preference.1: dpo has no option "betta". Did you mean "beta"?'),
        ({"objective": {"preference": {"loss": "dpo", "beta": 0}}}, "objective.preference: dpo: beta must be above 0"),
        ({"objective": {"preference": {"loss": "dpo", "beta": True}}}, "objective.preference: dpo: beta must be a number (got True)"),
        ({"objective": {"preference": {"loss": "dpo", "beta": float("inf")}}}, "objective.preference: dpo: beta must be"),
        ({"objective": {"preference": {"loss": "dpo", "beta": "big"}}}, "dpo: beta must be a number (got 'big')"),
        ({"objective": {"preference": {"beta": 1}}}, "objective.preference.loss: required, but not given"),
        ({"objective": {"preset": ["upo"], "preference": "dpo"}}, "objective.preset: must be 'upo' or 'paper'"),
        ({"objective": {}}, "objective: nothing to optimise"),
        ({"objective": {"preset": "upo"}}, "objective.auxiliary.rewards: name at least one goal"),
        ({"objective": {"preset": "upo", "auxiliary": {"rewards": [{"scorerr": "length"}]}}}, 'rewards.0.scorer: required, but not given (is it "scorerr"?)'),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: must be a number (got 'fast')"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr: must be above 0.0 (got -1)"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: must be"),
        ({"optimizer": {"clip": float("inf")}}, "optimizer.clip: must be finite (got inf)"),
        ({"optimizer": {"schedule": "cosin"}}, "optimizer.schedule: must be 'constant', 'linear' or 'cosine' (got 'cosin')"),
        ({"optimizer": 3}, "optimizer: must be a mapping of keys (name, lr, schedule, warmup_steps, clip, weight_decay, eps)"),
        ({"train": {"steps": 2.5}}, "train.steps: must be a whole number (got 2.5)"),
        ({"train": {"batch_size": True}}, "train.batch_size: true and false (yes, no, on, off) mean nothing here"),
        ({"train": {"gradient_checkpointing": "maybe"}}, "train.gradient_checkpointing: must be auto, true or false (got 'maybe')"),
        ({"data": {"train": "a", "eval": 1}}, "data.eval: as a number it is the held-out share"),
        ({"data": {"train": "a", "eval": "5%"}}, "data.eval: there is no file of this name; as a share write 0.05 (got '5%')"),
        ({"data": {"train": "a", "eval": "12.5 %"}}, "data.eval: there is no file of this name; as a share write 0.125 (got '12.5 %')"),
        ({"data": {"train": "a", "eval": [1]}}, "data.eval: must be a share below 1, or the name of a file"),
        ({"data": {}}, "data.train: required, but not given"),
        ({"adapter": {"targets": []}}, "adapter.targets: must be all-linear or a list of module names"),
        ({"adapter": {"type": "full"}}, "adapter.type: full fine-tuning is not supported yet; use lora"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout: must be 0 for now"),
        ({"revision": 1234567}, "revision: must be text; put it in quotes (got 1234567)"),
        ({"reference": "start"}, "reference: start needs adapter.start"),
    ],
)
def test_what_is_refused(change, words):
    message = refused({**MINIMAL, **change})
    assert words in message
    assert "\n" not in message


def test_every_fault_has_a_line_of_its_own(tmp_path):
    path = write(tmp_path, "model: m\ndata:\n  train: a\n  evall: 0.1\noptimizer:\n  lr: -1\nlosses: dpo\n")
    assert refused(path).splitlines() == [
        f'{path}:4: data.evall: unknown key. Did you mean "eval"?',
        f"{path}:6: optimizer.lr: must be above 0.0 (got -1)",
        f'{path}:7: losses: unknown key. Known: adapter, backend, data, device, dtype, evaluation, log, model, objective, optimizer, quantize, reference, revision, train.',
    ]


def test_a_scorer_is_refused_at_its_line(tmp_path):
    """Its name and its options, of the objective's goals and of those of the evaluation, wherever they come from."""
    goals = "objective:\n  preset: upo\n  auxiliary:\n    rewards:\n      - length\n      - {scorer: lenght}\n      - scorer: length\n        hi: 3\nevaluation:\n  goals: [{scorer: length, high: many}, {scorer: python}]\n"
    path = write(tmp_path, "model: m\ndata: {train: a}\n" + goals)
    assert refused(path).splitlines() == [
        f'{path}:8: objective.auxiliary.rewards.1: unknown scorer "lenght". Did you mean "length"?',
        f'{path}:9: objective.auxiliary.rewards.2: scorer length has no option "hi". Did you mean "high"?',
        f"{path}:12: evaluation.goals.0: scorer length: high must be a number (got 'many').",
        f'{path}:12: evaluation.goals.1: python: function must be FILE.py:NAME, MODULE:NAME or an entry point of upo.scorers (got "").',
    ]
    assert refused(MINIMAL, "evaluation.goals=[lenght]") == '--set evaluation.goals.0: unknown scorer "lenght". Did you mean "length"?'


def test_the_line_of_a_missing_key_is_its_section(tmp_path):
    assert refused(write(tmp_path, "model: m\n\ndata:\n  eval: 0.1\n")) == f"{tmp_path}/run.yaml:3: data.train: required, but not given"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this file is empty"),
        ("# nothing\n", "this file is empty"),
        ("- model: m\n", "this file is a list"),
        ("model\n", "this file is a line of text"),
        ("model: m\ndata: {train: a}\nmodel: n\n", ":3: model is given twice (first on line 1)"),
        ("model: m\ntrain:\n  seed: 1\n  seed: 2\n", ":4: seed is given twice (first on line 3)"),
        ("model: m\non: 3\n", ':2: the key "on" is not text'),
        ("model: m\ndata: {train: [\n", ":3: not valid YAML"),
        ("model: m\n\tdata: 1\n", ":2: not valid YAML"),
        ("model: !!python/object/apply:os.system [ls]\n", ":1: not valid YAML (could not determine a constructor"),
        ("model: 2024-99-99\n", "not valid YAML (month must be in 1..12"),
        ("a: " + "[" * 3000, "not valid YAML"),
        ("model: m\n---\nmodel: n\n", ":2: not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, words):
    path = write(tmp_path, text)
    message = refused(path)
    assert message.startswith(str(path)) and words in message


def test_files_that_cannot_be_read(tmp_path):
    assert refused(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file. Start from one of the files in examples/, or see `upo quickstart`."
    assert "cannot be read" in refused(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(binary)


def test_anchors_are_not_duplicates(tmp_path):
    path = write(tmp_path, "model: m\ndata: &d {train: a}\nobjective:\n  preference:\n    - &one {loss: dpo, beta: 0.3}\n    - {<<: *one, weight: 2}\n")
    assert load_config(path).objective.build().preference == (Term(DPO(beta=0.3)), Term(DPO(beta=0.3), 2.0))


def test_a_bare_off_is_the_word(tmp_path):
    """YAML reads it as false."""
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: a}\nobjective: {preference: dpo}\ntrain: {prefix_sharing: off}\n")
    assert load_config(path).train.prefix_sharing == load_config(path, ["train.prefix_sharing=off"]).train.prefix_sharing == "off"
    assert "mean nothing here" in refused(path, "train.prefix_sharing=on")


def test_overrides():
    data = {**MINIMAL, "objective": {"preference": {"loss": "kto", "beta": 0.1}}}
    config = load_config(data, ["optimizer.lr=1e-5", "objective.preference.beta=0.2", "data.eval=other.jsonl", "adapter.targets=[q_proj, v_proj]"])
    assert config.optimizer.lr == 1e-5 and config.data.eval == "other.jsonl" and config.adapter.targets == ("q_proj", "v_proj")
    assert config.objective.build().preference == (Term(KTO(beta=0.2)),)
    assert data["objective"]["preference"]["beta"] == 0.1, "the caller's mapping stays as it was"
    assert "optimizer" not in data


@pytest.mark.parametrize(
    ("preference", "override", "expected"),
    [
        ([{"loss": "dpo"}, {"loss": "sft"}], "objective.preference.0.beta=0.4", (Term(DPO(beta=0.4)), Term(SFT()))),
        ([{"loss": "dpo"}, {"loss": "sft"}], "objective.preference.1=kto", (Term(DPO()), Term(KTO()))),
        ([{"loss": "dpo"}], "objective.preference.beta=0.4", (Term(DPO(beta=0.4)),)),
        ("dpo", "objective.preference.beta=0.4", (Term(DPO(beta=0.4)),)),
        ("dpo", "objective.preference=kto", (Term(KTO()),)),
        (None, "objective.preference={loss: sft, weight: 2}", (Term(SFT(), 2.0),)),
    ],
)
def test_overrides_of_losses(preference, override, expected):
    data = {**MINIMAL, "objective": {"preference": preference}} if preference else MINIMAL
    assert load_config(data, [override]).objective.build().preference == expected


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr", "--set optimizer.lr: write KEY=VALUE"),
        ("=3", "write KEY=VALUE"),
        ("a..b=3", "write KEY=VALUE"),
        ("model.name=x", "--set model.name: model is not a mapping"),
        ("optimizer.lr=[1", "--set optimizer.lr: the value [1 is not valid YAML"),
        ("objective.preference.2.beta=1", '--set objective.preference.2.beta: "2" is not a position in a list of 2'),
        ("objective.preference.first.beta=1", '"first" is not a position in a list of 2'),
        ("optimizer.lrr=3", '--set optimizer.lrr: unknown key. Did you mean "lr"?'),
        ("train.seed=x", "--set train.seed: must be a whole number (got 'x')"),
    ],
)
def test_overrides_that_are_refused(tmp_path, override, words):
    path = write(tmp_path, "model: m\ndata: {train: a}\nobjective: {preference: [dpo, sft]}\n")
    assert words in refused(path, override)


def test_every_key_is_described():
    for keys, info, _ in walk(RunConfig):
        assert info.description, f"{'.'.join(keys)} has no description"


def test_the_schema_knows_sections_and_loss_options():
    schema = config_schema()
    assert schema["title"] == "upo configuration" and schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["$defs"]["OptimizerConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
    names, *losses = schema["$defs"]["PreferenceConfig"]["anyOf"]
    assert names["enum"] == list(LOSSES)
    kto = next(loss for loss in losses if loss["title"] == "kto")
    assert kto["properties"]["undesirable_weight"] == {"type": "number", "default": 1.0}
    assert kto["properties"]["loss"] == {"const": "kto"} and kto["additionalProperties"] is False
    names, *scorers = schema["$defs"]["RewardConfig"]["anyOf"]
    assert names["enum"] == list(SCORERS)
    length = next(scorer for scorer in scorers if scorer["title"] == "length")
    assert length["properties"]["high"] == {"type": "number", "default": 100.0} and "weight" in length["properties"]


def test_examples_are_what_they_say():
    found = {path.stem: load_config(path) for path in EXAMPLES}
    assert {"dpo", "kto", "sft", "upo", "upo_paper"} <= set(found)
    for name in ("dpo", "kto", "sft"):
        objective = found[name].objective.build()
        assert [term.loss.name for term in objective.preference] == [name] and objective.auxiliary is None
    paper, train = found["upo_paper"], found["upo_paper"].train
    assert paper.objective.preset == "paper" and paper.objective.build().auxiliary.actor_warmup_steps == 100
    assert (paper.optimizer.name, paper.optimizer.lr, paper.optimizer.warmup_steps, paper.optimizer.schedule) == ("rmsprop", 5e-7, 150, "constant")
    assert train.batch_size == 32
    assert found["upo"].objective.preset == "upo"
