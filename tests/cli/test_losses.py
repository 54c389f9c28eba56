"""`upo losses`: what is shown is what the classes say."""

from __future__ import annotations

import json

import pytest
import yaml
from click.testing import CliRunner
from upo_cli.main import main

from upo.config import load_config
from upo.losses import LOSSES, Auxiliary, Term, loss_options


def upo(*arguments: str):
    return CliRunner().invoke(main, ["losses", *arguments], catch_exceptions=False)


def test_the_list():
    result = upo()
    assert result.exit_code == 0 and result.stderr == ""
    shown = " ".join(result.stdout.split())
    for name, loss in {**LOSSES, "auxiliary": Auxiliary}.items():
        assert f"{name} {' '.join(loss.__doc__.partition(chr(10) * 2)[0].split())}" in shown
        assert " ".join(loss.source.split()) in shown
    assert "Data: pairs (chosen, rejected). Needs: a reference. Rafailov" in shown
    assert "Data: pairs (chosen, rejected). Needs: several references. Le et al." in shown
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize("name", [*LOSSES, "auxiliary"])
def test_one_loss(name):
    loss = Auxiliary if name == "auxiliary" else LOSSES[name]
    result = upo(name)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{name}\n\n{loss.__doc__.splitlines()[0]}")
    for formula in (text.strip() for text in loss.__doc__.splitlines() if " = " in text):
        assert formula in result.stdout
    assert loss.source in result.stdout
    example = yaml.safe_load(result.stdout.partition("In a configuration:\n")[2])
    objective = load_config({"model": "m", "data": {"train": "a"}, **example}).objective.build()
    assert objective.auxiliary == Auxiliary() if name == "auxiliary" else objective.preference == (Term(LOSSES[name]()),)
    for option, default in loss_options(loss).items():
        assert f"{option}: {default}" in result.stdout.partition("In a configuration:")[2]


def test_upo_is_the_auxiliary_term():
    assert upo("upo").stdout == upo("AUXILIARY").stdout == upo("auxiliary").stdout


def test_unknown():
    result = upo("kot")
    assert result.exit_code == 2 and result.stdout == ""
    assert 'There is no loss "kot". Did you mean "kto"?' in result.stderr


def test_json():
    entries = json.loads(upo("--json").stdout)
    assert [entry["name"] for entry in entries] == [*LOSSES, "auxiliary"]
    kto = json.loads(upo("kto", "--json").stdout)
    assert kto == next(entry for entry in entries if entry["name"] == "kto")
    assert (kto["unit"], kto["needs"], kto["options"]["beta"]) == ("completion", ["partners", "reference"], 0.1)
    assert entries[-1]["needs"] == ["rewards", "value"]
