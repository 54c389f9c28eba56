"""What the paper reports (UPO, arXiv 2405.17956 as HPO; averages over its five models of 1.4B to 13B parameters)."""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    """A line of its table 2."""

    violations: float  # per cent, on the 20 % most unsafe prompts
    r1: float
    grade: float


PAPER = {
    "upo": Reported(29.6, 0.51, 7.46),
    "kto": Reported(43.9, 0.27, 9.09),
    "dpo": Reported(46.8, 0.31, 8.68),
    "sft": Reported(35.6, 0.49, 7.60),
    "csft": Reported(34.3, 0.47, 8.01),
    "offline_ppo": Reported(35.3, 0.40, 8.14),
    "modpo": Reported(47.9, 0.32, 8.71),
    "a_lol": Reported(70.6, 0.39, 9.16),
    "aoppo": Reported(36.2, 0.41, 8.27),
}
OVERHEAD = 0.4  # per cent of a KTO step, at most
