"""The oracle itself: it stands alone, and its gradients are those of difference quotients."""

from __future__ import annotations

import ast
from pathlib import Path

import mpmath as mp
import pytest
from loss_cases import CASES, fitted
from loss_objectives import OBJECTIVES
from oracle import step as oracle
from oracle.tape import Number, at_least, at_most, capped_exp, exp, gradient, log, log_softmax, plain, sigmoid


def test_the_oracle_is_independent() -> None:
    for file in (Path(__file__).parent.parent / "oracle").glob("*.py"):
        names = [n for node in ast.walk(ast.parse(file.read_text())) for n in imported(node)]
        assert {name.partition(".")[0] for name in names} <= {"__future__", "collections", "typing", "mpmath", "oracle"}, file


def imported(node: ast.AST) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []


def test_the_tape_differentiates() -> None:
    """Every operation, against mpmath's own derivative."""
    functions = [
        lambda x: (3 - x) * x / (1 + x * x) - 2 / x,
        lambda x: exp(-x) * log(x + 2) + x**3 - sigmoid(x / 3),
        lambda x: at_least(x, 0) * at_most(x, 5) + capped_exp(x) - -x,
        lambda x: log_softmax([x, 2 * x, Number(1)])[1],
    ]
    with mp.workdps(40):
        for f in functions:
            for at in (0.75, 2.5):
                leaf = Number(at)
                assert gradient(f(leaf), [leaf])[0] == pytest.approx(float(mp.diff(lambda x, f=f: plain(f(Number(x))), at)), rel=1e-12)


def test_the_tape_at_kinks_and_constants() -> None:
    leaf = Number(0.0)
    assert gradient(at_least(leaf, 0), [leaf]) == [0.0] and gradient(at_most(leaf, 0), [leaf]) == [0.0]
    assert gradient(leaf * plain(leaf) + leaf, [leaf]) == [1.0]
    assert gradient(capped_exp(leaf + 81), [leaf]) == [0.0] and gradient(mp.mpf(3), [leaf]) == [0.0]


# Without a constant for the gradient, and smooth on this case.
SMOOTH = ["dpo", "ipo", "discopop", "exo", "cal_dpo", "f_dpo-js-0.3", "ld_dpo", "aot", "relative_po", "cpo_simpo", "orpo", "mrpo", "exo_reward", "dro_v"]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_slopes(name: str) -> None:
    case, (terms, auxiliary) = fitted(name, CASES["below"]), OBJECTIVES[name]
    found = oracle.objective(case, terms, auxiliary)["gradient"]
    for leaf, slopes in found.items():
        for k in (0, 3):
            move = lambda h, leaf=leaf, k=k: {**case, leaf: [x + h * (n == k) for n, x in enumerate(case[leaf])]}  # noqa: E731
            up, down = (oracle.objective(move(h), terms, auxiliary)["loss"] for h in (2.0**-12, -(2.0**-12)))
            assert slopes[k] == pytest.approx((up - down) * 2.0**11, rel=1e-5, abs=1e-9)
