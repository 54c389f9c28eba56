"""Whether a model may share prompts: a few tokens, then a row of the data, scored and differentiated with shared prompts and without."""

from __future__ import annotations

from collections.abc import Callable

import torch

from upo import sharing
from upo.backend import Comm
from upo.config import TrainConfig
from upo.data.forest import Forest, padded
from upo.data.packed import packed
from upo.sharing import Measured
from upo_torch.attention import Unshareable
from upo_torch.logps import token_logps
from upo_torch.model import Model, has_experts
from upo_torch.state import to_numpy


def choose_layout(model: Model, train: TrainConfig, comm: Comm) -> tuple[str, list[str]]:
    """`packed` where prompts may be shared and the configuration wants it, else `padded` and a note that says why. Collective."""
    if train.prefix_sharing == "off":
        return "padded", []
    note = sharing.agreed(comm, _name(model), why_not_shared(model))
    return ("packed", []) if note is None else ("padded", [note])


def unlike_on(model: Model, row: Forest, comm: Comm) -> str | None:
    """A note if a row of the data is not scored alike with its prompt shared. Collective."""
    reason = _tried(lambda: sharing.unlike(lambda f: measure(model, f, False), lambda f: measure(model, f, True), row, _dtype(model)))
    return sharing.agreed(comm, _name(model), reason, " on a row of the data")


def why_not_shared(model: Model) -> str | None:
    """The reason why this model must not compute a prompt once for all its completions; None if it may."""

    def shared(forest: Forest) -> Measured:
        found = measure(model, forest, True)
        if (calls := sum(plan.calls for plan in model.attention.plans)) != model.layers:
            raise Unshareable(f"{calls} of the {model.layers} layers look at other tokens through attention alone")
        return found

    return _tried(lambda: sharing.why_not(lambda f: measure(model, f, False), shared, model.head.width, _dtype(model), has_experts(model)))


def measure(model: Model, forest: Forest, shared: bool) -> Measured:
    """Log-probs and gradient of the policy in this layout, of gradients kept nothing."""
    layout, params = packed(forest) if shared else padded(forest), list(model.policy.values())
    src, tgt, signs = (torch.from_numpy(a).to(model.device) for a in (layout.src, layout.tgt, sharing.signs(len(layout.tgt))))
    with torch.enable_grad():
        logps = token_logps(model.head, model.head.width, model.hidden_of(layout)[src], tgt)
        grads = torch.autograd.grad((logps * signs).sum(), params, allow_unused=True) if params else ()
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    return Measured(to_numpy(logps.detach()), to_numpy(torch.cat([torch.zeros(0, device=model.device), *(g.flatten() for g in found)])))


def _tried(check: Callable[[], str | None]) -> str | None:
    try:
        return sharing.tried(check)
    except Unshareable as error:
        return str(error)


def _name(model: Model) -> str:
    return type(model.net).__name__


def _dtype(model: Model) -> str:
    return str(model.net.dtype).removeprefix("torch.")
