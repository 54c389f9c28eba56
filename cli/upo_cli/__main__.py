"""`python -m upo_cli` is `upo`."""

from __future__ import annotations

from upo_cli.main import main

if __name__ == "__main__":
    main(prog_name="upo")
