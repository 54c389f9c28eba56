"""Rewards of the user's own, in Python. Code named by a configuration never runs unless it was allowed on the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from upo.errors import ConfigError, UpoError
from upo.rewards.base import TextScorer


@dataclass(frozen=True)
class Python(TextScorer):
    """A function of prompts and completions (lists of strings) to as many numbers: `{scorer: python, function: "my_rewards.py:score"}`.

    `function` is FILE.py:NAME or MODULE:NAME. It is called once with every distinct prompt and completion. Nothing is cached on disk,
    since what it depends on cannot be known. Needs --allow-code.
    """

    function: str = ""

    name: ClassVar[str] = "python"
    version: ClassVar[str] = "1"
    range: ClassVar[tuple[float, float] | None] = None
    card: ClassVar[str] = "A Python function of your own; needs --allow-code."
    uses_prompt: ClassVar[bool] = True
    cached: ClassVar[bool] = False

    def __post_init__(self) -> None:
        module, colon, name = self.function.rpartition(":")
        if not colon or not module or not name.isidentifier():
            raise ConfigError(f'python: function must be FILE.py:NAME or MODULE:NAME (got "{self.function}").')

    @property
    def label(self) -> str:
        return self.function.rpartition(":")[2]

    def check(self) -> None:
        self.load()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        function = self.load()
        try:
            result: Sequence[float] = function(list(prompts), list(completions))
        except Exception as error:  # whatever the user's code raises is for the user, in one line
            raise UpoError(f"scorer {self.function}: raised {_cause(error)}.") from error
        return result

    def load(self) -> Callable[..., Any]:
        """The function. Raises ConfigError if there is none, UpoError if importing it fails."""
        source, _, name = self.function.rpartition(":")
        try:
            module = _from_file(Path(source).expanduser()) if source.endswith(".py") else importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or source.endswith(".py") or not (source + ".").startswith(error.name + "."):
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
