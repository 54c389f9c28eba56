"""How a framework's threads wait for one another on a CPU: it depends on whether something else runs on this machine."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from pathlib import Path

LOOKS, APART = 4, 0.005  # seconds


def choose_waiting(environment: MutableMapping[str, str], loads: Path = Path("/proc/loadavg")) -> None:
    """Let idle threads sleep (`OMP_WAIT_POLICY=PASSIVE`) unless this program has the machine to itself, or the user has chosen.

    Threads that spin a while first are faster by a fifth (torch) to two fifths (MLX) on two cores, but wait out the time slices of whatever
    else wants a core, many times in a layer: with one other busy process they took more than three times as long. Must be called before a
    framework is loaded.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys() and _others_run(loads):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def _others_run(loads: Path) -> bool:
    """Whether other threads were ready to run each time one looked; where that cannot be known, yes."""
    try:
        for look in range(LOOKS):
            time.sleep(APART if look else 0)
            if int(loads.read_text(encoding="ascii").split()[3].partition("/")[0]) <= 1:  # this one
                return False
    except (OSError, ValueError, IndexError):
        pass
    return True
