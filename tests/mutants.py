"""Small wrong changes of a Python module's syntax tree, for mutate_losses.py."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from typing import Any

Change = Callable[[ast.AST], ast.AST]  # a copy of a node to what takes its place
OPPOSITE: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
TURNED: dict[type, type] = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SWAPPED = {"chosen": "rejected", "rejected": "chosen", "positive": "negative", "negative": "positive", "sigmoid": "log_sigmoid", "log_sigmoid": "sigmoid"}
TAKEN_AWAY = ("stop_gradient", "relu", "log1mexp")


def mutants(tree: ast.Module, skipped: tuple[str, ...]) -> Iterator[tuple[str, str, str, Callable[[ast.Module], None]]]:
    """(class or function, function, what is changed, the change) for every change of every function that is not skipped."""
    for top, node in enumerate(tree.body):
        functions = [(k, f) for k, f in enumerate(node.body) if isinstance(f, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        if isinstance(node, ast.FunctionDef):
            functions = [(-1, node)]
        options = numbers(node) if isinstance(node, ast.ClassDef) else []
        for k, function in functions:
            if function.name in skipped:
                continue
            for place, found in enumerate(ast.walk(function)):
                for what, change in changes(found, options):
                    described = f"{ast.unparse(found)}  ->  {what}"
                    yield node.name, function.name, described, apply(top, k, place, change)  # type: ignore[attr-defined]


def apply(top: int, member: int, place: int, change: Change) -> Callable[[ast.Module], None]:
    """The change, made in a fresh copy of the tree."""

    def mutate(tree: ast.Module) -> None:
        function: Any = tree.body[top] if member < 0 else tree.body[top].body[member]  # type: ignore[attr-defined]
        target = list(ast.walk(function))[place]
        new = change(copy.deepcopy(target))
        for parent in ast.walk(function):
            for name, value in ast.iter_fields(parent):
                if value is target:
                    setattr(parent, name, new)
                elif isinstance(value, list):
                    setattr(parent, name, [new if item is target else item for item in value])

    return mutate


def numbers(node: ast.ClassDef) -> list[str]:
    """Names of a class's numeric options."""
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    return [f.target.id for f in fields if ast.unparse(f.annotation) == "float"]  # type: ignore[union-attr]


def changes(node: ast.AST, options: list[str]) -> Iterator[tuple[str, Change]]:
    """(the new source, the change) for one node."""
    for change in candidates(node, options):
        new = change(copy.deepcopy(node))
        yield ast.unparse(new), change


def candidates(node: ast.AST, options: list[str]) -> Iterator[Change]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda n: n.operand  # type: ignore[attr-defined]
    if isinstance(node, ast.BinOp):
        if type(node.op) in OPPOSITE:
            yield lambda n: with_(n, op=OPPOSITE[type(n.op)]())  # type: ignore[attr-defined]
            yield lambda n: n.left  # type: ignore[attr-defined]
        if not isinstance(node.op, ast.BitOr):
            yield lambda n: n.right  # type: ignore[attr-defined]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
        yield lambda n: with_(n, ops=[TURNED[type(n.ops[0])]()])  # type: ignore[attr-defined]
    if isinstance(node, ast.IfExp):
        yield lambda n: with_(n, body=n.orelse, orelse=n.body)  # type: ignore[attr-defined]
    if isinstance(node, ast.If):
        yield lambda n: with_(n, test=ast.UnaryOp(ast.Not(), n.test))  # type: ignore[attr-defined]
    if isinstance(node, ast.Attribute) and node.attr in SWAPPED:
        yield lambda n: with_(n, attr=SWAPPED[n.attr])  # type: ignore[attr-defined]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in options:
        for other in [option for option in options if option != node.attr][:2]:
            yield lambda n, other=other: with_(n, attr=other)  # type: ignore[misc]
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and len(node.targets[0].elts) == 2:
        yield lambda n: with_(n, targets=[with_(n.targets[0], elts=n.targets[0].elts[::-1])])  # type: ignore[attr-defined]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in TAKEN_AWAY:
            yield lambda n: n.args[0]  # type: ignore[attr-defined]
        if node.func.attr == "where":
            yield lambda n: with_(n, args=[n.args[0], n.args[2], n.args[1]])  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield lambda n: with_(n, value=2 * n.value or 1)  # type: ignore[attr-defined]


def with_(node: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        setattr(node, name, value)
    return node
