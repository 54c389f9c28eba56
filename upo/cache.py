"""Where things that can be made again are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`UPO_CACHE`, else `$XDG_CACHE_HOME/upo`, else `~/.cache/upo`; not made."""
    root = os.environ.get("UPO_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "upo")
    return Path(root)


def cache_dir(*parts: str) -> Path:
    """A folder under `cache_root()`, made if missing."""
    folder = cache_root().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
