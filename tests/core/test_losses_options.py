"""Options of the losses: their ranges, and the messages for what is out of them."""

from __future__ import annotations

from typing import Any

import pytest
from interpreters import interpreter
from loss_cases import CASES, scores
from loss_objectives import VARIANTS, build

from upo.losses import LOSSES, Auxiliary, Term, build_loss, loss_options

POSITIVE = ("must be above 0 and finite (got {})", [0.0, -1.0, float("nan"), float("inf")])
WEIGHT = ("must be not negative and finite (got {})", [-0.5, float("nan"), float("inf")])
SMOOTHING = ("must be in [0, 0.5) (got {})", [0.5, -0.1, float("nan")])
OPEN_SHARE = ("must be in (0, 1) (got {})", [0.0, 1.0, float("nan")])
SHARE = ("must be in [0, 1] (got {})", [-0.1, 1.1, float("nan")])
RANGES: dict[str, tuple[str, list[float]]] = {  # by option, or by loss and option
    **dict.fromkeys(("beta", "rho", "tau_min", "tau_max", "tau", "eta", "reward_temperature"), POSITIVE),
    **dict.fromkeys(("gamma", "gamma_beta_ratio", "penalty", "odds_weight", "nll_weight", "kl_weight", "value_coef", "kl_coef"), WEIGHT),
    **dict.fromkeys(("alpha", "desirable_weight", "undesirable_weight"), WEIGHT),
    "label_smoothing": SMOOTHING,
    "exo.epsilon": ("must be in (0, 0.5) (got {})", [0.0, 0.5, -0.1, float("nan")]),
    "discopop.temperature": OPEN_SHARE,
    "mrpo.eta": OPEN_SHARE,
    "clip": OPEN_SHARE,
    "ld_dpo.alpha": SHARE,
    "diagonal": SHARE,
    "label_weight": ("must be in (0, 1] (got {})", [0.0, 1.1, float("nan")]),
    "trace": ("must be in (0, 1] (got {})", [0.0, 1.1, float("nan")]),
    "discount": ("must be in (0, 1] (got {})", [0.0, -0.1, 1.1, float("nan")]),
    "delta": ("must be finite (got {})", [float("nan"), float("-inf")]),
    "newton_steps": ("must be at least 1 and finite (got {})", [0, -3]),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, loss in LOSSES.items() for key in loss_options(loss)])
def test_options_out_of_range_are_refused(name: str, key: str) -> None:
    """The message names the loss, the option, the range and what was given."""
    default = loss_options(LOSSES[name])[key]
    if not isinstance(default, str):
        message, values = RANGES.get(f"{name}.{key}", RANGES.get(key, ("", [])))
        assert values, "an option without a known range"
        for value in values:
            with pytest.raises(ValueError) as error:
                build_loss(name, **{key: value})
            assert str(error.value) == f"{name}: {key} " + message.format(value if isinstance(default, int) else float(value))
        for wrong in ("strong", True, None, [1.0]):
            with pytest.raises(ValueError) as error:
                build_loss(name, **{key: wrong})
            kind = "a whole number" if isinstance(default, int) else "a number"
            assert str(error.value) == f"{name}: {key} must be {kind} (got {wrong!r})"
        assert getattr(build_loss(name, **{key: str(default)}), key) == default  # YAML reads 1e-1 as text
        return
    with pytest.raises(ValueError) as error:
        build_loss(name, **{key: 1.5})
    assert str(error.value) == f"{name}: {key} must be text (got 1.5)"
    wrong = "" if key in ("epsilon", "margin", "win_probability") else "nonsense"
    with pytest.raises(ValueError) as error:
        build_loss(name, **{key: wrong})
    choices = " or ".join(dict.fromkeys([default, *(v[key] for v in VARIANTS[name] if key in v)]))
    assert str(error.value) == (f"{name}: {key} must be {choices} (got {wrong!r})" if wrong else f"{name}: {key} must name a column")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dqo", {}, 'unknown loss "dqo". Did you mean "dpo"?'),
        ("dpo", {"bet": 0.1}, 'dpo has no option "bet". Did you mean "beta"?'),
        ("sft", {"beta": 0.1}, 'sft has no option "beta". Known: weight, weight_column.'),
        ("kto", {"desirable_weight": 0, "undesirable_weight": 0}, "kto: desirable_weight and undesirable_weight must not both be 0"),
        ("ada_dpo", {"tau_min": 2.0, "tau_max": 1.0}, "ada_dpo: tau_min must not be above tau_max (got 2.0 and 1.0)"),
        ("ada_dpo", {"newton_steps": 2.5}, "ada_dpo: newton_steps must be a whole number (got 2.5)"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_loss(name, **options)
    assert str(error.value) == message


def test_the_bounds_themselves_are_allowed() -> None:
    for name, options in (("ld_dpo", {"alpha": 0}), ("ld_dpo", {"alpha": 1}), ("relative_po_diagonal", {"diagonal": 1}), ("modpo", {"label_weight": 1})):
        build_loss(name, **options)
    build_loss("dpo", label_smoothing=0.4999)
    build_loss("ada_dpo", tau_min=1.0, tau_max=1.0)
    build_loss("kto", desirable_weight=0)
    build_loss("offline_ppo", discount=1, trace=1)


@pytest.mark.parametrize("name", LOSSES)
def test_a_column_weighs_rows_only(name: str) -> None:
    loss = build_loss(name)
    if loss.coupled or loss.unit in ("group", "token"):
        with pytest.raises(ValueError, match=f"{name}: weight_column does not work with it"):
            Term(loss, 1.0, "weight")
    else:
        assert Term(loss, 1.0, "weight").weight_column == "weight"


def test_columns() -> None:
    """Those of the losses and those that weigh, each once, in order."""
    terms = [{"loss": "rosepo"}, {"loss": "odpo", "margin": "gap", "weight_column": "trust"}, {"loss": "dpo", "weight_column": "gap"}]
    assert build(terms, None).columns == ("epsilon", "gap", "trust")
    assert build_loss("sppo").columns() == () and build_loss("sppo", targets="column").columns() == ("win_probability",)


@pytest.mark.parametrize(("references", "pairing", "message"), [(1, "code", "several references"), (1, "paper", "several references"), (3, "code", "use pairing: paper")])
def test_mrpo_refuses_the_wrong_number_of_references(references: int, pairing: str, message: str) -> None:
    i, case = interpreter("numpy"), CASES["random"]
    given = scores(i, {**case, "ref_logps": case["ref_logps"][:references]})
    with pytest.raises(ValueError, match=message):
        build([{"loss": "mrpo", "pairing": pairing}], None)(i.ops, given)


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"temperature": float("inf")}, {"value_coef": float("nan")}, {"expectile": 1.0}, {"expectile": 0.0}])
def test_bad_auxiliary_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"auxiliary: {next(iter(options))} must be"):
        Auxiliary(**options)
