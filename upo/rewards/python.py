"""Rewards of the user's own, in Python. Code named by a configuration never runs unless it was allowed on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from upo.errors import ConfigError, UpoError, did_you_mean
from upo.losses.options import option
from upo.rewards.base import Answer, Card, TextScorer

GROUP = "upo.scorers"  # of entry points


@dataclass(frozen=True)
class Python(TextScorer):
    """A function of prompts and completions (lists of strings) to as many numbers: `{scorer: python, function: "my_rewards.py:score"}`.

    function: FILE.py:NAME, MODULE:NAME, or the name of an entry point of the group upo.scorers that an installed package brings. It is called
    in a process of its own with up to 64 answers at a time, which must not influence one another: a few are scored again, alone, and a
    difference is told. A call that takes longer than `limit` seconds is stopped, and the row is named.

    What a function depends on cannot be known, so nothing is kept on disk, unless `remember` gives it a version of your choice ("1"): its
    scores are then kept under that, and a run that was stopped goes on. Change it whenever the function changes. Needs --allow-code.
    """

    function: str = option("", optional=True)
    remember: str = option("", optional=True)
    limit: float = option(300.0, above=0)

    name: ClassVar[str] = "python"
    version: ClassVar[str] = "1"
    card: ClassVar[Card] = Card(
        measures="Whatever your own Python function measures; needs --allow-code.",
        range=None,
        higher="whatever the function says",
        speed="that of the function, in one process",
        licence="that of your code",
        offline="yes, if the function is",
    )
    reads: ClassVar[tuple[str, ...]] = ("prompt", "text")
    volatile: ClassVar[frozenset[str]] = frozenset({"limit"})
    batch: ClassVar[int] = 64
    isolated: ClassVar[bool] = True
    one_process: ClassVar[bool] = True
    spot_check: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        module, colon, name = self.function.rpartition(":")
        if not self.function or (colon and (not module or not name.isidentifier())):
            raise ConfigError(f'python: function must be FILE.py:NAME, MODULE:NAME or an entry point of {GROUP} (got "{self.function}").')

    @property
    def title(self) -> str:
        return self.function.rpartition(":")[2]

    @property
    def remembered(self) -> bool:
        return bool(self.remember)

    def check(self) -> None:
        self.load()

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        function = self.load()
        try:
            result: Sequence[float] = function([a.prompt for a in answers], [a.text for a in answers])
        except Exception as error:  # whatever the user's code raises is for the user, in one line
            raise UpoError(f"scorer {self.function}: raised {_cause(error)}.") from error
        return result

    def load(self) -> Callable[..., Any]:
        """The function. Raises ConfigError if there is none, UpoError if importing it fails."""
        source, colon, name = self.function.rpartition(":")
        try:
            if not colon:
                return _entry_point(name)
            module = _from_file(Path(source).expanduser()) if source.endswith(".py") else importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or not colon or source.endswith(".py") or not (source + ".").startswith(error.name + "."):
                raise UpoError(f"scorer {self.function}: importing it raised {_cause(error)}.") from error
            raise ConfigError(
                f"python: function: no module named {source}. For a file write its path: {source.replace('.', '/')}.py:{name}"
            ) from None
        except ConfigError:
            raise
        except Exception as error:
            raise UpoError(f"scorer {self.function}: importing it raised {_cause(error)}.") from error
        function = getattr(module, name, None)
        if not callable(function):
            raise ConfigError(f"python: function: {source} has no function {name}.")
        return function


def _entry_point(name: str) -> Any:
    """The function that an installed package registers under this name."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        there = did_you_mean(name, found) if found else f" No installed package has entry points of {GROUP}."
        raise ConfigError(f'python: function: no entry point "{name}".{there} For a file write FILE.py:NAME.')
    function = found[name].load()
    if not callable(function):
        raise ConfigError(f"python: function: the entry point {name} is no function.")
    return function


def _from_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"python: function: {path}: no such file.")
    name = f"upo_scorer_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickles look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _cause(error: Exception) -> str:
    """`ValueError: too short (my_rewards.py:12)`: the first line of the message and the innermost frame."""
    message = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' + message if message else ''}{where}"
