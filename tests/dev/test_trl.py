"""DPO and KTO equal TRL 1.16's own code on the same per-token log-probs, value and gradient.

TRL's trainers are driven through their unbound loss methods with a stub for a model, which returns the log-probs it is given. Nothing
of the formula is repeated here.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="TRL needs torch: pip install torch")
pytest.importorskip("trl", reason="the outside oracle is not installed: pip install trl==1.16.0")

import torch
from trl import DPOTrainer, KTOTrainer

from upo.losses import DPO, KTO, Objective, Scores
from upo_torch.ops import ops

pytestmark = pytest.mark.dev

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "losses.json").read_text())
PROMPT, PAIRS, WIDTH = 3, 4, 9


def model(*answers: torch.Tensor) -> Any:
    """A model that returns these per-token log-probs, one after the other, as TRL's fused head would."""
    queue = list(answers)

    def forward(**inputs: Any) -> SimpleNamespace:
        logps = queue.pop(0)
        return SimpleNamespace(log_probs=logps, entropy=0 * logps, mean_logits=0 * logps, is_top1=logps < 0)

    return forward


def trainer(cls: Any, **settings: Any) -> SimpleNamespace:
    same = lambda x: x  # noqa: E731
    self = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    if hasattr(cls, "_compute_kl_logps"):
        self._compute_kl_logps = functools.partial(cls._compute_kl_logps, self)
    return self


def make_logps(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token log-probs [rows, WIDTH - 1] in float64, 0 outside the completions, and the completion mask [rows, WIDTH]."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(rows, WIDTH, dtype=torch.long)
    for row, length in enumerate(rng.integers(1, WIDTH - PROMPT + 1, rows)):
        mask[row, PROMPT : PROMPT + length] = 1
    logps = torch.tensor(-np.abs(rng.normal(2, 2, (rows, WIDTH - 1)))) * mask[:, 1:]
    return logps, mask


def inputs_for(mask: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask, **more}


def trl_dpo(logps: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor, beta: float, loss: str = "sigmoid", smoothing: float = 0.0) -> torch.Tensor:
    """TRL's DPO loss; rows are the chosen completions, then the rejected ones; ref [rows] is summed."""
    self = trainer(
        DPOTrainer,
        beta=beta,
        label_smoothing=smoothing,
        loss_types=[loss],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    chosen, rejected = ref.chunk(2)
    return DPOTrainer._compute_loss(self, model(logps), inputs_for(mask, ref_chosen_logps=chosen, ref_rejected_logps=rejected), False)


def trl_kto(logps: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, kl_ref: torch.Tensor, **options: float) -> torch.Tensor:
    """TRL's KTO loss; kl [rows, WIDTH - 1] per-token log-probs of the mismatched completions, kl_ref [rows] summed."""
    self = trainer(KTOTrainer, loss_type="kto", calculate_KL=True, **options)
    inputs = inputs_for(mask, label=desirable, ref_logps=ref, ref_KL_logps=kl_ref)
    inputs |= {"KL_input_ids": torch.ones_like(mask), "KL_attention_mask": torch.ones_like(mask), "KL_completion_mask": mask}
    return KTOTrainer._compute_loss(self, model(kl, logps), inputs, False)


def our_scores(logps: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor, label: torch.Tensor, partners: torch.Tensor | None = None) -> Scores:
    rows = len(logps)
    return Scores(
        logp=logps.sum(1),
        length=mask.sum(1).double(),
        label=label.double(),
        chosen=torch.nonzero(label > 0)[:, 0],
        rejected=torch.nonzero(label < 0)[:, 0],
        count={"pair": rows // 2, "completion": rows, "chosen": int((label > 0).sum())},
        ref_logp=ref,
        partner_logratio=partners,
    )


def gradient(loss: torch.Tensor, logps: torch.Tensor) -> np.ndarray:
    return torch.autograd.grad(loss, logps)[0].numpy()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, logps: torch.Tensor) -> None:
    """Both are float64: only the order of a few additions differs."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    found, expected = gradient(ours, logps), gradient(theirs, logps)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
    assert np.abs(expected).max() > 1e-4


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo(seed: int, beta: float) -> None:
    logps, mask = make_logps(seed, 2 * PAIRS)
    ref = logps.sum(1) + torch.tensor(np.random.default_rng(seed + 9).normal(0, 3, 2 * PAIRS))
    logps.requires_grad_()
    label = torch.tensor([1] * PAIRS + [-1] * PAIRS)
    ours = Objective(((DPO(beta=beta), 1.0),))(ops, our_scores(logps, mask, ref, label))["loss"]
    assert_same(ours, trl_dpo(logps, mask, ref, beta), logps)


def test_dpo_at_the_reference() -> None:
    """The first step of a LoRA run."""
    logps, mask = make_logps(2, 2 * PAIRS)
    ref = logps.sum(1)
    logps.requires_grad_()
    ours = Objective(((DPO(beta=0.1), 1.0),))(ops, our_scores(logps, mask, ref, torch.tensor([1] * PAIRS + [-1] * PAIRS)))["loss"]
    assert_same(ours, trl_dpo(logps, mask, ref, 0.1), logps)


def test_label_smoothing() -> None:
    """TRL's `sigmoid` has none; its `aot` has our form, and with a single pair there is nothing to transport."""
    for seed in range(3):
        logps, mask = make_logps(seed, 2)
        ref = logps.sum(1) + torch.tensor([1.5, -2.0])
        logps.requires_grad_()
        ours = Objective(((DPO(beta=0.3, label_smoothing=0.2), 1.0),))(ops, our_scores(logps, mask, ref, torch.tensor([1, -1])))["loss"]
        assert_same(ours, trl_dpo(logps, mask, ref, 0.3, "aot", 0.2), logps)


@pytest.mark.parametrize(("desirable_weight", "undesirable_weight"), [(1.0, 1.0), (1.33, 0.5)])
@pytest.mark.parametrize("shift", [-3.0, 2.0])  # z0 above 0, and cut off at 0
def test_kto(shift: float, desirable_weight: float, undesirable_weight: float) -> None:
    logps, mask = make_logps(3, 7)
    rng = np.random.default_rng(4)
    ref = logps.sum(1) + torch.tensor(rng.normal(0, 3, 7))
    kl, _ = make_logps(5, 7)
    kl_ref = kl.sum(1) + shift + torch.tensor(rng.normal(0, 1, 7))
    logps.requires_grad_()
    desirable = torch.tensor([True, False, True, True, False, True, True])
    theirs = trl_kto(logps, mask, ref, desirable, kl, kl_ref, beta=0.1, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    loss = KTO(beta=0.1, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    given = our_scores(logps, mask, ref, torch.where(desirable, 1, -1), kl.sum(1) - kl_ref)
    assert_same(Objective(((loss, 1.0),))(ops, given)["loss"], theirs, logps)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_golden_values_are_trl_s(name: str) -> None:
    """The golden numbers, value and gradient, by TRL's code on the golden arrays."""
    step = GOLDEN["step"]
    (expected,) = [case["expected"] for case in GOLDEN["cases"] if case["name"] == name]
    rows = len(step["logp"])
    logps = torch.tensor(step["logp"], dtype=torch.float64)[:, None].requires_grad_()
    mask, ref = torch.tensor([[0, 1]] * rows), torch.tensor(step["ref_logp"], dtype=torch.float64)
    if name == "dpo":
        theirs = trl_dpo(logps, mask, ref, 0.1)
    else:
        kl = torch.full((rows, 1), step["partner_logratio"][0], dtype=torch.float64)
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        theirs = trl_kto(logps, mask, ref, torch.tensor(step["label"]) > 0, kl, 0 * ref, beta=0.1, **weights)
    assert theirs.item() == pytest.approx(expected["loss"], rel=1e-12)
    np.testing.assert_allclose(gradient(theirs, logps)[:, 0], expected["gradient"]["logp"], rtol=1e-10)
