"""Our losses equal TRL 1.16's own code on the same per-token log-probs, value and gradient.

TRL's trainers are driven through their unbound loss methods with a stub for a model, which returns the log-probs it is given. Nothing
of the formulas is repeated here, only what a loss is called there and where conventions differ:

- `sppo_hard` leaves out the official code's 1/2, so ours counts twice.
- `sft` is the mean over all chosen tokens of the batch; ours is the mean over completions, equal for equal lengths. The same NLL inside
  `cpo`, `cpo_simpo`, `orpo` and `rpo` is our option nll: token.
- `orpo` there takes the NLL over prompt and completion; with an empty prompt nothing but the completion is left.
- simpo_gamma there is beta * gamma_beta_ratio here; f-divergences there keep constants which cancel; use_weighting is our wpo, not clamped.
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
from loss_objectives import build
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from upo.losses import Scores
from upo_torch.ops import ops

pytestmark = pytest.mark.dev

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "losses.json").read_text())
PROMPT, PAIRS, WIDTH = 3, 4, 9
TERMS = list[dict[str, Any]]


def model(*answers: torch.Tensor, collision: torch.Tensor | None = None) -> Any:
    """A model that returns these per-token log-probs, one after the other, as TRL's fused head would."""
    queue = list(answers)

    def forward(**inputs: Any) -> SimpleNamespace:
        logps = queue.pop(0)
        return SimpleNamespace(log_probs=logps, entropy=0 * logps, mean_logits=0 * logps, is_top1=logps < 0, log_sum_sq_probs=collision)

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


def make_logps(seed: int, rows: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token log-probs [rows, WIDTH - 1], 0 outside the completions, and the completion mask [rows, WIDTH]."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(rows, WIDTH, dtype=torch.long)
    for row, length in enumerate(rng.integers(1, WIDTH - PROMPT + 1, rows)):
        mask[row, PROMPT : PROMPT + length] = 1
    logps = torch.tensor(-np.abs(rng.normal(2, 2, (rows, WIDTH - 1))), dtype=dtype) * mask[:, 1:]
    return logps, mask


def inputs_for(mask: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask, **more}


def trl_dpo(
    logps: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor, loss: str = "sigmoid", collision: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """TRL's DPO loss; rows are the chosen completions, then the rejected ones; ref is summed [rows], or per token as another model's."""
    settings = {"beta": 0.1, "label_smoothing": 0.0, "loss_types": [loss], "loss_weights": [1.0], "ld_alpha": None, "use_weighting": False}
    settings |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "args": SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05))}
    self = trainer(DPOTrainer, **{**settings, **options})
    if ref.ndim == 1:
        inputs = inputs_for(mask, **dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref.chunk(2), strict=True)))
    else:
        inputs, self.precompute_ref_logps, self.ref_model = inputs_for(mask), False, model(ref)
        self.args.gradient_checkpointing_kwargs = None
        self.model = torch.nn.Identity()
        self.model.is_gradient_checkpointing = False
    return DPOTrainer._compute_loss(self, model(logps, collision=collision), inputs, False)


def trl_kto(logps: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, kl_ref: torch.Tensor, **options: Any) -> torch.Tensor:
    """TRL's KTO loss; kl [rows, WIDTH - 1] per-token log-probs of the mismatched completions, kl_ref [rows] summed."""
    self = trainer(KTOTrainer, **{"loss_type": "kto", "calculate_KL": True, **options})
    inputs = inputs_for(mask, label=desirable, ref_logps=ref, ref_KL_logps=kl_ref)
    inputs |= {"KL_input_ids": torch.ones_like(mask), "KL_attention_mask": torch.ones_like(mask), "KL_completion_mask": mask}
    answers = (kl, logps) if self.calculate_KL else (logps,)
    return KTOTrainer._compute_loss(self, model(*answers), inputs, False)


def our_scores(logps: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor, label: torch.Tensor, **more: Any) -> Scores:
    rows, length = len(logps), mask.sum(1)
    inside = mask[:, 1:].bool()
    return Scores(
        logp=logps.sum(1),
        length=length.to(logps.dtype),
        label=label.to(logps.dtype),
        chosen=torch.nonzero(label > 0)[:, 0],
        rejected=torch.nonzero(label < 0)[:, 0],
        positive=torch.nonzero(label > 0)[:, 0],
        negative=torch.nonzero(label < 0)[:, 0],
        owner=torch.arange(rows) % max(rows // 2, 1),
        groups=max(rows // 2, 1),
        count={"pair": rows // 2, "completion": rows, "chosen": int((label > 0).sum()), "chosen_token": int(length[label > 0].sum())},
        ref_logp=ref,
        token_logp=logps[inside],
        token_owner=torch.nonzero(inside)[:, 0],
        token_index=(inside.cumsum(1)[inside] - 1).to(logps.dtype),
        **more,
    )


def ours(terms: TERMS, *given: Any, **more: Any) -> torch.Tensor:
    return build(terms, None)(ops, our_scores(*given, **more))["loss"]


def gradient(loss: torch.Tensor, logps: torch.Tensor) -> np.ndarray:
    return torch.autograd.grad(loss, logps)[0].numpy()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, logps: torch.Tensor, rel: float = 1e-12, mask: torch.Tensor | None = None) -> None:
    """Both are float64 (only the order of a few additions differs), or float32 where TRL insists on it. With a mask, only what is inside
    counts: a model's log-probs outside are 0, but TRL adds them."""
    assert ours.item() == pytest.approx(theirs.item(), rel=rel)
    inside = 1 if mask is None else mask[:, 1:].numpy()
    found, expected = gradient(ours, logps) * inside, gradient(theirs, logps) * inside
    np.testing.assert_allclose(found, expected, rtol=100 * rel, atol=rel * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-4


PAIRWISE: dict[str, tuple[TERMS, dict[str, Any]]] = {  # our terms, TRL's options
    "sigmoid": ([{"loss": "dpo", "beta": 0.3}], {"beta": 0.3}),
    "f_dpo": ([{"loss": "f_dpo", "beta": 0.3}], {"beta": 0.3}),
    "hinge": ([{"loss": "hinge", "beta": 0.3}], {"loss": "hinge", "beta": 0.3}),
    "ipo": ([{"loss": "ipo", "beta": 0.2}], {"loss": "ipo", "beta": 0.2}),
    "exo_pair": ([{"loss": "exo", "epsilon": 0.01}], {"loss": "exo_pair", "label_smoothing": 0.01}),
    "nca_pair": ([{"loss": "nca", "beta": 0.2}], {"loss": "nca_pair", "beta": 0.2}),
    "robust": ([{"loss": "robust", "label_smoothing": 0.2}], {"loss": "robust", "label_smoothing": 0.2}),
    "bco_pair": ([{"loss": "bco_pair", "beta": 0.3}], {"loss": "bco_pair", "beta": 0.3}),
    "sppo_hard": ([{"loss": "sppo", "beta": 0.05, "weight": 2.0}], {"loss": "sppo_hard", "beta": 0.05}),
    "aot": ([{"loss": "aot", "beta": 0.3, "label_smoothing": 0.1}], {"loss": "aot", "beta": 0.3, "label_smoothing": 0.1}),
    "aot_unpaired": ([{"loss": "aot_unpaired", "beta": 0.3, "label_smoothing": 0.1}], {"loss": "aot_unpaired", "beta": 0.3, "label_smoothing": 0.1}),
    "apo_zero": ([{"loss": "apo_zero", "beta": 0.3}], {"loss": "apo_zero", "beta": 0.3}),
    "apo_down": ([{"loss": "apo_down", "beta": 0.3}], {"loss": "apo_down", "beta": 0.3}),
    "discopop": ([{"loss": "discopop", "beta": 0.1, "temperature": 0.2}], {"loss": "discopop", "discopop_tau": 0.2}),
    "sigmoid_norm": ([{"loss": "dpo_norm", "beta": 2.0}], {"loss": "sigmoid_norm", "beta": 2.0}),
    "forward_kl": ([{"loss": "f_dpo", "divergence": "forward_kl"}], {"f_divergence_type": "forward_kl"}),
    "js": ([{"loss": "f_dpo", "divergence": "js", "beta": 0.5}], {"f_divergence_type": "js_divergence", "beta": 0.5}),
    "alpha-1": ([{"loss": "f_dpo", "divergence": "alpha", "alpha": 1.0}], {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    "ld": ([{"loss": "ld_dpo", "alpha": 0.3, "reference": "policy"}], {"ld_alpha": 0.3}),  # with precomputed reference sums TRL weighs the policy only
    "mpo": (
        [{"loss": "dpo", "weight": 0.8}, {"loss": "bco_pair", "weight": 0.2}],
        {"loss_types": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    ),
    "rpo": ([{"loss": "rpo", "nll": "token", "alpha": 0.7}], {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
}


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_losses(seed: int, name: str) -> None:
    terms, options = PAIRWISE[name]
    logps, mask = make_logps(seed, 2 * PAIRS)
    ref = logps.sum(1) + torch.tensor(np.random.default_rng(seed + 9).normal(0, 3, 2 * PAIRS))
    logps.requires_grad_()
    label = torch.tensor([1] * PAIRS + [-1] * PAIRS)
    # TRL takes exo's epsilon in float32
    assert_same(ours(terms, logps, mask, ref, label), trl_dpo(logps, mask, ref, **options), logps, 1e-7 if name == "exo_pair" else 1e-12, mask)


@pytest.mark.parametrize("name", [name for name in PAIRWISE if name not in ("ld", "hinge")])
def test_dpo_losses_at_the_reference(name: str) -> None:
    """The first step of a LoRA run."""
    terms, options = PAIRWISE[name]
    logps, mask = make_logps(2, 2 * PAIRS)
    ref = logps.sum(1)
    logps.requires_grad_()
    label = torch.tensor([1] * PAIRS + [-1] * PAIRS)
    assert_same(ours(terms, logps, mask, ref, label), trl_dpo(logps, mask, ref, **options), logps, 1e-7 if name == "exo_pair" else 1e-12, mask)


def test_ld_dpo() -> None:
    """With a reference that is not precomputed, TRL weighs its tokens alike: our reference = both."""
    logps, mask = make_logps(0, 2 * PAIRS)
    ref, _ = make_logps(0, 2 * PAIRS)
    ref = ref * torch.tensor(np.random.default_rng(5).uniform(0.5, 1.5, ref.shape))
    logps.requires_grad_()
    found = ours(
        [{"loss": "ld_dpo", "alpha": 0.3, "beta": 0.3}], logps, mask, ref.sum(1), torch.tensor([1] * PAIRS + [-1] * PAIRS), ref_token_logp=ref[mask[:, 1:].bool()]
    )
    assert_same(found, trl_dpo(logps, mask, ref, ld_alpha=0.3, beta=0.3), logps, 1e-12, mask)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_wpo(loss: str) -> None:
    """`use_weighting` without a clamp; only on `sigmoid` is it our wpo, so the others must differ."""
    logps, mask = make_logps(1, 2 * PAIRS)
    collision = -torch.rand(logps.shape, dtype=torch.float64) * 3 * mask[:, 1:]
    ref = logps.sum(1) + torch.tensor(np.random.default_rng(9).normal(0, 3, 2 * PAIRS))
    logps.requires_grad_()
    found = ours([{"loss": "wpo", "clamp": "none", "beta": 0.2}], logps, mask, ref, torch.tensor([1] * PAIRS + [-1] * PAIRS), collision=collision.sum(1))
    theirs = trl_dpo(logps, mask, ref, loss, collision, beta=0.2, use_weighting=True)
    if loss == "sigmoid":
        assert_same(found, theirs, logps, 1e-12, mask)
    else:
        assert abs(found.item() - theirs.item()) > 1e-3


@pytest.mark.parametrize(("alpha", "shift"), [(0.5, 1.0), (0.0, 1.0), (3.0, 1.0), (0.5, 60.0)])
def test_alpha_divergence(alpha: float, shift: float) -> None:
    """TRL computes this one in float32 and caps the exponent at 80, as we do; at 60 times the log-ratios the cap is reached."""
    logps, mask = make_logps(0, 2 * PAIRS, torch.float32)
    ref = logps.sum(1) + shift * torch.tensor(np.random.default_rng(9).normal(0, 3, 2 * PAIRS), dtype=torch.float32)
    logps.requires_grad_()
    found = ours([{"loss": "f_dpo", "divergence": "alpha", "alpha": alpha}], logps, mask, ref, torch.tensor([1] * PAIRS + [-1] * PAIRS))
    theirs = trl_dpo(logps, mask, ref, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
    assert_same(found, theirs, logps, 1e-5, mask)


def test_sft() -> None:
    """Equal lengths: the mean over tokens is the mean over completions."""
    logps, mask = make_logps(0, 2 * PAIRS)
    mask[:, PROMPT:], logps = 1, -torch.rand(logps.shape, dtype=torch.float64) * (torch.arange(WIDTH - 1) >= PROMPT - 1)
    logps.requires_grad_()
    found = ours([{"loss": "sft"}], logps, mask, logps.detach().sum(1), torch.tensor([1] * PAIRS + [-1] * PAIRS))
    assert_same(found, trl_dpo(logps, mask, logps.detach().sum(1), "sft"), logps, 1e-12, mask)


def test_label_smoothing() -> None:
    """TRL's `sigmoid` has none; its `aot` has our form, and with a single pair there is nothing to transport."""
    for seed in range(3):
        logps, mask = make_logps(seed, 2)
        ref = logps.sum(1) + torch.tensor([1.5, -2.0])
        logps.requires_grad_()
        found = ours([{"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2}], logps, mask, ref, torch.tensor([1, -1]))
        assert_same(found, trl_dpo(logps, mask, ref, "aot", beta=0.3, label_smoothing=0.2), logps, 1e-12, mask)


# --- KTO --------------------------------------------------------------------------------------------------------------------------


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
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    theirs = trl_kto(logps, mask, ref, desirable, kl, kl_ref, beta=0.1, **weights)
    label = torch.where(desirable, 1, -1)
    assert_same(ours([{"loss": "kto", **weights}], logps, mask, ref, label, partner_logratio=kl.sum(1) - kl_ref), theirs, logps, 1e-12, mask)


def test_apo_zero_unpaired() -> None:
    logps, mask = make_logps(3, 7)
    ref = logps.sum(1) + torch.tensor(np.random.default_rng(4).normal(0, 3, 7))
    logps.requires_grad_()
    desirable = torch.tensor([True, False, True, True, False, True, True])
    options = {"loss_type": "apo_zero_unpaired", "calculate_KL": False, "beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    theirs = trl_kto(logps, mask, ref, desirable, logps, ref, **options)
    assert_same(ours([{"loss": "apo_zero_unpaired", "beta": 0.3}], logps, mask, ref, torch.where(desirable, 1, -1)), theirs, logps, 1e-12, mask)


# --- CPO and ORPO: driven with logits ---------------------------------------------------------------------------------------------


VOCAB = 11


def batch_of_logits(seed: int, prompt: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [rows, WIDTH, VOCAB], token ids and completion mask; with prompt = 0 all but the first token is completion."""
    rng = np.random.default_rng(seed)
    ids = torch.tensor(rng.integers(0, VOCAB, (2 * PAIRS, WIDTH)))
    mask = torch.zeros(2 * PAIRS, WIDTH, dtype=torch.long)
    for row, length in enumerate(rng.integers(2, WIDTH - prompt, 2 * PAIRS)):
        mask[row, prompt : prompt + length] = 1
    return torch.tensor(rng.normal(0, 2, (2 * PAIRS, WIDTH, VOCAB))).requires_grad_(), ids, mask


def driven(cls: Any, logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The trainer's whole loss on these logits, through its own forward, NLL and reduction."""
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"concatenated_input_ids": ids, "concatenated_attention_mask": attention, "concatenated_labels": labels}
    self = trainer(cls, is_encoder_decoder=False, pad_token_id=0, padding_value=0, concatenated_inputs=lambda *a, **k: batch, **settings)
    self.get_batch_logps = cls.get_batch_logps
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, method):
            setattr(self, method, functools.partial(getattr(cls, method), self))
    run = lambda *a, **k: SimpleNamespace(logits=logits)  # noqa: E731
    return cls.get_batch_loss_metrics(self, run, {"chosen_labels": labels[:PAIRS]})[0]


def token_logps(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]


CPO: dict[str, tuple[TERMS, dict[str, Any]]] = {
    "sigmoid": ([{"loss": "cpo", "beta": 0.2, "alpha": 0.7}], {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 0.7}),
    "no-nll": ([{"loss": "cpo", "alpha": 0.0}], {"loss_type": "sigmoid", "cpo_alpha": 0.0}),
    "simpo": ([{"loss": "simpo", "gamma_beta_ratio": 0.25, "label_smoothing": 0.1}], {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0, "label_smoothing": 0.1}),
    "cpo_simpo": ([{"loss": "cpo_simpo", "alpha": 0.3}], {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.3}),
}


@pytest.mark.parametrize("name", CPO)
@pytest.mark.parametrize("seed", [0, 1])
def test_cpo_losses(seed: int, name: str) -> None:
    terms, options = CPO[name]
    logits, ids, mask = batch_of_logits(seed, PROMPT)
    settings = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0, **options}
    theirs = driven(CPOTrainer, logits, ids, mask, torch.ones_like(mask), **settings)
    logps = token_logps(logits, ids, mask)
    assert_same(ours(terms, logps, mask, logps.detach().sum(1), torch.tensor([1] * PAIRS + [-1] * PAIRS)), theirs, logits)


@pytest.mark.parametrize(("loss_type", "terms"), [("hinge", [{"loss": "hinge", "beta": 0.2}]), ("ipo", [{"loss": "ipo", "beta": 0.2}])])
def test_cpo_losses_are_ours_without_a_reference(loss_type: str, terms: TERMS) -> None:
    """CPO's `hinge` and `ipo` are ours with reference log-probs of 0."""
    logits, ids, mask = batch_of_logits(3, PROMPT)
    settings = {"beta": 0.2, "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0, "cpo_alpha": 0.0, "loss_type": loss_type}
    theirs = driven(CPOTrainer, logits, ids, mask, torch.ones_like(mask), **settings)
    logps = token_logps(logits, ids, mask)
    label = torch.tensor([1] * PAIRS + [-1] * PAIRS)
    assert_same(ours(terms, logps, mask, torch.zeros(2 * PAIRS, dtype=torch.float64), label), theirs, logits)


@pytest.mark.parametrize("seed", [0, 1])
def test_orpo(seed: int) -> None:
    """TRL computes the odds in float32."""
    logits, ids, mask = batch_of_logits(seed, 1)
    attention = mask.clone()
    attention[:, 0] = 1
    theirs = driven(ORPOTrainer, logits, ids, mask, attention, beta=0.4)
    logps = token_logps(logits, ids, mask)
    label = torch.tensor([1] * PAIRS + [-1] * PAIRS)
    found = ours([{"loss": "orpo", "odds_weight": 0.4, "nll": "token"}], logps, mask, logps.detach().sum(1), label)
    assert_same(found, theirs, logits, 1e-6)


# --- Golden values ----------------------------------------------------------------------------------------------------------------


GOLDEN_BY_TRL: dict[str, dict[str, Any]] = {
    **{name: {"loss": name} for name in ("ipo", "hinge", "bco_pair", "apo_zero", "apo_down")},
    **{name: {"loss": loss, "beta": 0.1} for name, loss in (("aot", "aot"), ("aot_unpaired", "aot_unpaired"), ("discopop", "discopop"), ("nca", "nca_pair"))},
    **{"dpo": {}, "exo": {"loss": "exo_pair", "label_smoothing": 1e-3}, "dpo_norm": {"loss": "sigmoid_norm"}},
    **{"f_dpo-js": {"f_divergence_type": "js_divergence"}, "f_dpo-forward_kl": {"f_divergence_type": "forward_kl"}, "robust": {"loss": "robust", "label_smoothing": 0.1}},
}


@pytest.mark.parametrize("name", ["kto", *GOLDEN_BY_TRL])
def test_golden_values_are_trl_s(name: str) -> None:
    """The golden numbers, value and gradient, by TRL's code on the golden arrays."""
    step = GOLDEN["step"]
    (expected,) = [case["expected"] for case in GOLDEN["cases"] if case["name"] == name]
    rows = len(step["logp"])
    logps = torch.zeros(rows, max(step["length"]), dtype=torch.float64)
    logps[:, 0] = torch.tensor(step["logp"])
    logps.requires_grad_()
    mask = torch.tensor([[0] + [1] * n + [0] * (max(step["length"]) - n) for n in step["length"]])
    ref = torch.tensor(step["ref_logp"], dtype=torch.float64)
    if name == "kto":
        kl = torch.full((rows, 1), step["partner_logratio"][0], dtype=torch.float64)
        kl = torch.cat([kl, torch.zeros(rows, logps.shape[1] - 1, dtype=torch.float64)], 1)
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        theirs = trl_kto(logps, mask, ref, torch.tensor(step["label"]) > 0, kl, 0 * ref, beta=0.1, **weights)
    else:
        theirs = trl_dpo(logps, mask, ref, **GOLDEN_BY_TRL[name])
    assert theirs.item() == pytest.approx(expected["loss"], rel=1e-7 if name == "exo" else 1e-12)  # TRL takes log(1 - e) in float32
    np.testing.assert_allclose(gradient(theirs, logps)[:, 0], expected["gradient"]["logp"], rtol=1e-7 if name == "exo" else 1e-10, atol=1e-15)
