"""Values from files that may have come from anywhere, made safe to show: numbers that are numbers, text without control characters, no paths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# Control characters but tab and newline; lone halves of a character; marks that turn the direction of all that follows.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufeff]")
_PART = r"[^\s\\/:*?\"'<>|(),;]+"
# An absolute path in running text, or one from the home folder; not the path of an address (https://host/path).
_PATH = re.compile(rf"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[\\/]{_PART}(?:[\\/]{_PART})+[\\/]?")


def number(value: Any) -> float | None:
    """A finite number, else None. True and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond any float
        return None


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def clean(text: str) -> str:
    """Text with what cannot be shown, or would turn round what follows it, replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n"))


class Portable:
    """Replaces the paths of this machine by their last part: what is shown elsewhere need not say where it lay here.

    `known` are paths that may contain blanks, which running text does not delimit.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        paths = {path for path in known if _is_absolute(path)} | {str(Path(path).resolve()) for path in known if _is_absolute(path)}
        longest_first = sorted((re.escape(path.rstrip("/\\")) for path in paths if len(path) > 3), key=len, reverse=True)
        self.known = re.compile(rf"(?:{'|'.join(longest_first)})(?![\w-])(?:[\\/]{_PART})*[\\/]?") if longest_first else None

    def __call__(self, text: str) -> str:
        if self.known is not None:
            text = self.known.sub(lambda found: _last(found.group()), text)
        return _PATH.sub(lambda found: _last(found.group()), text)


def _is_absolute(path: str) -> bool:
    return path.startswith("~") or PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
