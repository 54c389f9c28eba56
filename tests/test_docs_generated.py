"""What docs/generate.py writes says what the code says."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def pages():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PAGES


PAGES = pages()


@pytest.mark.parametrize("name", PAGES)
def test_in_step(name):
    if name == "cli.md" and not metadata.version("click").startswith("8.5"):
        pytest.skip(f"click {metadata.version('click')} lays help out differently; docs/cli.md is made with the version in constraints.txt")
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "run: python docs/generate.py"
