"""Writes losses.json: golden values and gradients of every loss on one small step, from the mpmath oracle.

    python tests/golden/write.py

`published` is what somebody else's code gave for the same arrays, named in `source`; a test compares the two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from oracle.step import objective  # noqa: E402

STEP = {
    "logp": [-12, -20.5, -8.25, -14, -18, -9],
    "ref_logp": [-13, -20, -8, -13.5, -18.5, -8.5],
    "length": [6, 10, 5, 7, 9, 4],
    "label": [1, 1, 1, -1, -1, -1],
    "chosen": [0, 1, 2],
    "rejected": [3, 4, 5],
    "partner_logratio": [0.2],
    "reward": [0.2, 0.9, 0.5, 0.6, 0.1, 0.5],
    "value": [0.4, 0.3, 0.5, 0.4, 0.3, 0.5],
}
UPO = {"gamma": 0.5, "temperature": 5.0, "value_coef": 0.1, "expectile": 0.7}
CASES = [
    ("dpo", [{"loss": "dpo", "beta": 0.1}], None, {"loss": 0.68202634}, "TRL 1.16 (sigmoid), run on these arrays; tests/dev/test_trl.py repeats it"),
    ("cdpo", [{"loss": "dpo", "beta": 0.1, "label_smoothing": 0.1}], None, {"loss": 0.68452634}, "TRL 0.19 (sigmoid with label smoothing), run on these arrays"),
    ("kto", [{"loss": "kto", "beta": 0.1}], None, {"loss": 0.49687756}, "TRL 1.16 (kto), run on these arrays; tests/dev/test_trl.py repeats it"),
    (
        "upo",
        [{"loss": "kto", "beta": 0.1}],
        UPO,
        {"loss": 4.83389690, "preference": 0.49687756, "auxiliary": 8.66390535, "value": 0.05066667},
        "the authors published no code; hand-written NumPy in float64, twice",
    ),
    ("upo-warmup", [{"loss": "kto", "beta": 0.1}], {**UPO, "actor_warmup_steps": 1}, {}, "oracle only"),
    ("kto-weights", [{"loss": "kto", "beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7}], None, {}, "oracle only"),
    ("sft", [{"loss": "sft"}], None, {}, "oracle only"),
    ("dpo+sft", [{"loss": "dpo", "beta": 0.1}, {"loss": "sft", "weight": 0.25}], None, {}, "oracle only"),
]


def golden() -> dict[str, object]:
    """The content of losses.json."""
    cases = [
        {"name": name, "terms": terms, "auxiliary": aux, "published": published, "source": source, "expected": objective(STEP, terms, aux)}
        for name, terms, aux, published, source in CASES
    ]
    return {"made_by": "tests/golden/write.py (mpmath, 50 digits)", "step": STEP, "cases": cases}


if __name__ == "__main__":
    (FOLDER / "losses.json").write_text(json.dumps(golden(), indent=1) + "\n")
