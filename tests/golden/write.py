"""Writes losses.json: golden values and gradients of every loss on one small step, from the mpmath oracle.

    python tests/golden/write.py

`published` is what somebody else's code gave for the same arrays, named in `source`; a test compares the two. `changes` replaces parts of
the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from oracle.step import objective  # noqa: E402

STEP: dict[str, Any] = {
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
SECOND = [-15, -16, -7, -12, -19, -10]  # log-probs under an external reference
REWARDS = [3, 1, 2, 1, 2, 0]
EMBEDDINGS = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
REF_REWARDS = [[0.1, 0.3, 0.25, 0.05], [0.95, 0.2, 0.5, 0.7], [0.6, 0.4, 0.7, 0.1]]
CHOSEN = {
    **{name: STEP[name][:3] for name in ("logp", "ref_logp", "length", "label", "reward")},
    **{"value": [0.4] * 3, "chosen": [], "rejected": []},
    "quantile": [sum(r <= reward for r in row) / 4 for reward, row in zip(STEP["reward"], REF_REWARDS, strict=False)],
    "ref_rewards": [4.0] * 3,
}
TOKENS = {
    "token_logp": [x / n for x, n in zip(STEP["logp"], STEP["length"], strict=True) for _ in range(n)],
    "ref_token_logp": [x / n for x, n in zip(STEP["ref_logp"], STEP["length"], strict=True) for _ in range(n)],
    "token_value": [v - 0.01 * t for v, n in zip(STEP["value"], STEP["length"], strict=True) for t in range(n)],
}
UPO = {"gamma": 0.5, "temperature": 5.0, "value_coef": 0.1, "expectile": 0.7}
TRL = "TRL 1.16 ({}), run on these arrays; tests/dev/test_trl.py repeats it"
OWN = "oracle only"


def ran(name: str) -> str:
    return f"{name}, run on these arrays"


def alpha_state(**state: float) -> dict[str, Any]:
    return {"state": {"alpha_dpo": {"steps": 1, "spread_steps": 1, **state}}}


def batch_statistics() -> dict[str, Any]:
    """Running statistics that this step leaves as they are, as they are its own."""
    a, r = ([x / n for x, n in zip(STEP[name], STEP["length"], strict=True)] for name in ("logp", "ref_logp"))
    m = [a[i] - a[i + 3] - r[i] + r[i + 3] for i in range(3)]
    mean = sum(m) / 3
    return alpha_state(mean=mean, deviation=(sum((x - mean) ** 2 for x in m) / 2) ** 0.5)


# name, loss (its own name by default) and options, published value, source, changes of the step
PUBLISHED: list[tuple[str, dict[str, Any], float, str, dict[str, Any]]] = [
    ("dpo", {}, 0.68202634, TRL.format("sigmoid"), {}),
    ("cdpo", {"loss": "dpo", "label_smoothing": 0.1}, 0.68452634, ran("TRL 0.19 (sigmoid with label smoothing)"), {}),
    ("robust", {}, 0.67890134, TRL.format("robust"), {}),
    ("ipo-sum", {"loss": "ipo", "average": "sum"}, 23.60416667, ran("eric-mitchell/direct-preference-optimization (ipo)"), {}),
    ("ipo", {}, 24.3326865, TRL.format("ipo"), {}),
    ("hinge", {}, 0.975, TRL.format("hinge"), {}),
    ("exo", {}, 2.7195549, TRL.format("exo_pair"), {}),
    ("exo-code", {"loss": "exo", "target": "code", "epsilon": 4.5399929762484854e-05}, 4.24589543, "haozheji/exact-optimization, read; computed by hand with log epsilon = -10", {}),
    ("nca", {"beta": 0.1}, 1.38102063, TRL.format("nca_pair"), {}),
    ("bco_pair", {}, 1.37465352, TRL.format("bco_pair"), {}),
    ("sppo", {"beta": 0.1}, 24.09375, ran("uclaml/SPPO; TRL's sppo_hard is twice as large"), {}),
    ("aot", {"beta": 0.1}, 0.68202634, TRL.format("aot"), {}),
    ("aot_unpaired", {"beta": 0.1}, 0.68077738, TRL.format("aot_unpaired"), {}),
    ("apo_zero", {}, 0.99375683, TRL.format("apo_zero"), {}),
    ("apo_down", {}, 0.99584393, TRL.format("apo_down"), {}),
    ("discopop", {"beta": 0.1}, 0.83361061, TRL.format("discopop"), {}),
    ("dpo_norm", {}, 0.68971879, TRL.format("sigmoid_norm"), {}),
    ("simpo", {}, 0.80491699, ran("princeton-nlp/SimPO"), {}),
    ("orpo", {"odds_weight": 1.0}, 1.9 + 0.60602495, ran("TRL (odds-ratio term)") + "; plus the NLL 1.9", {}),
    ("cpo", {"alpha": 0.0}, 0.69347614, TRL.format("CPO sigmoid"), {}),
    ("minor_dpo", {}, 0.69817287, "a third party's code, computed by hand", {}),
    ("kto", {}, 0.49687756, TRL.format("kto"), {}),
    ("f_dpo-js", {"loss": "f_dpo", "divergence": "js"}, 0.68829318, TRL.format("js_divergence"), {}),
    ("f_dpo-forward_kl", {"loss": "f_dpo", "divergence": "forward_kl"}, 0.68428227, TRL.format("forward_kl"), {}),
    ("f_dpo-alpha", {"loss": "f_dpo", "divergence": "alpha"}, 0.6836032, TRL.format("alpha_divergence"), {}),
    ("alpha_dpo-code", {"loss": "alpha_dpo", "form": "code", "gamma": 0.6, "alpha": 0.2}, 3.50343304, ran("junkangwu/alpha-DPO (its first step, our second)"), alpha_state()),
    ("alpha_dpo-own", {"loss": "alpha_dpo", "form": "code", "gamma": 0.6, "alpha": 0.2}, 1.40695448, "computed by hand with the batch's own z-scores", batch_statistics()),
    ("mrpo", {}, 0.68861923, ran("thaihungle/MRPO"), {"ref_logps": [STEP["ref_logp"], SECOND]}),
    ("mrpo-paper", {"loss": "mrpo", "pairing": "paper"}, 0.69313059, "computed by hand from the paper", {"ref_logps": [STEP["ref_logp"], SECOND]}),
    ("relative_po", {}, 0.68985747, ran("yinyueqin/relative-preference-optimization"), {"distance": [[1 - sum(a * b for a, b in zip(x, y, strict=True)) for y in EMBEDDINGS] for x in EMBEDDINGS]}),
    ("ada_dpo", {}, 0.65276371, ran("IlgeeHong/Adaptive-Preference-Scaling"), {}),
    ("modpo", {}, 1.44063592, ran("ZHZisZZ/modpo"), {"reward": [r / 2 for r in REWARDS]}),
    ("nemo_rpo", {}, 0.20119742, "NVIDIA/NeMo-Aligner, read; computed by hand", {"reward": REWARDS}),
    ("nemo_rpo-forward", {"loss": "nemo_rpo", "form": "forward_kl"}, 0.26012485, "NVIDIA/NeMo-Aligner, read; computed by hand", {"reward": REWARDS}),
    ("nemo_rpo-squared", {"loss": "nemo_rpo", "form": "squared"}, 2.44416667, "NVIDIA/NeMo-Aligner, read; computed by hand", {"reward": REWARDS}),
    ("qrpo", {}, 0.16323314, ran("CLAIRE-Labo/quantile-reward-policy-optimization"), CHOSEN),
    ("qrpo-identity", {"loss": "qrpo", "transform": "identity"}, 0.06584091, ran("CLAIRE-Labo/quantile-reward-policy-optimization"), CHOSEN),
    ("dro_v", {}, 0.42708333, ran("b-faye/rpo (residual)"), CHOSEN),
]
UNPUBLISHED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "kto-weights": ([{"loss": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.7}], {}),
    "sft": ([{"loss": "sft"}], {}),
    "csft": ([{"loss": "csft"}], {}),
    "dpo+sft": ([{"loss": "dpo"}, {"loss": "sft", "weight": 0.25}], {}),
    "rosepo": ([{"loss": "rosepo"}], {"columns": {"epsilon": [0.1, 0.2, 0.3, 0, 0, 0]}}),
    "odpo": ([{"loss": "odpo"}], {"columns": {"margin": [0.5, 1.0, 1.5, 0, 0, 0]}}),
    "sppo-column": ([{"loss": "sppo", "targets": "column", "beta": 0.1}], {"columns": {"win_probability": [0.9, 0.6, 0.7, 0.2, 0.5, 0.1]}}),
    "bapo": ([{"loss": "bapo"}], {"anchor_logp": [-11.5, -21, -7], "anchor_ref_logp": [-11, -20, -7.5]}),
    "ld_dpo": ([{"loss": "ld_dpo"}], TOKENS),
    "wpo": ([{"loss": "wpo", "clamp": "none"}], {"collision": [-11, -19, -8, -13, -17.5, -8.5]}),
    "bco": ([{"loss": "bco"}], {"state": {"bco": {"sum": 1.5, "count": 10}}}),
    "exo_reward": ([{"loss": "exo_reward"}], {"owner": [0, 1, 2, 0, 1, 2]}),
    "offline_ppo": ([{"loss": "offline_ppo"}], TOKENS),
    "a_lol_sequence": ([{"loss": "a_lol_sequence"}], TOKENS),
    **{name: ([{"loss": name}], {}) for name in ("rpo", "cal_dpo", "dpop", "relative_po_diagonal", "cpo_simpo", "asft", "slic", "apo_zero_unpaired", "a_lol")},
}
BY_HAND = "the authors published no code; hand-written NumPy in float64, twice"


def entry(name: str, terms: list[dict[str, Any]], auxiliary: Any, published: dict[str, float], source: str, changes: dict[str, Any]) -> dict[str, Any]:
    found = objective({**STEP, **changes}, terms, auxiliary)
    found.pop("size")
    return {"name": name, "terms": terms, "auxiliary": auxiliary, "changes": changes, "published": published, "source": source, "expected": found}


def golden() -> dict[str, Any]:
    """The content of losses.json."""
    upo = {"loss": 4.83389690, "preference": 0.49687756, "auxiliary": 8.66390535, "value": 0.05066667}
    cases = [
        *(entry(name, [{"loss": name, **options}], None, {"loss": value}, source, changes) for name, options, value, source, changes in PUBLISHED),
        entry("upo", [{"loss": "kto"}], UPO, upo, BY_HAND, {}),
        entry("upo-warmup", [{"loss": "kto"}], {**UPO, "actor_warmup_steps": 1}, {}, OWN, {}),
        *(entry(name, terms, None, {}, OWN, changes) for name, (terms, changes) in UNPUBLISHED.items()),
    ]
    return {"made_by": "tests/golden/write.py (mpmath, 50 digits)", "step": STEP, "cases": cases}


if __name__ == "__main__":
    content = golden()
    lines = ",\n".join(json.dumps(case) for case in content.pop("cases"))
    (FOLDER / "losses.json").write_text(json.dumps(content)[:-1] + f', "cases": [\n{lines}\n]}}\n')
