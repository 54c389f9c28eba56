"""From a configuration to a learner: device, model, adapters, and the layout in which it computes."""

from __future__ import annotations

import numpy as np
import torch

from upo import adapters, models, sharing
from upo.backend import ModelInfo
from upo.config import RunConfig
from upo.data.forest import Forest, padded
from upo.data.packed import packed
from upo.targets import policy_adapter, reference_adapters
from upo_torch import device
from upo_torch.attention import Unshareable
from upo_torch.device import TorchComm
from upo_torch.logps import token_logps
from upo_torch.model import Model, family_notes, has_experts, load_base, parameter_count
from upo_torch.state import to_numpy
from upo_torch.step import TorchLearner


def load_learner(config: RunConfig) -> TorchLearner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks. Raises ModelError, ConfigError or BackendError."""
    comm = TorchComm()
    device.share_threads(comm.local_size)
    where = device.choose_device(config.device, comm.local_rank, comm.local_size)
    device.limit_memory(config.train, where)
    dtype, notes = device.choose_dtype(config.dtype, where)
    comm.start(where)
    folder = models.resolve(config.model, config.revision)
    net, repaired = load_base(folder, dtype, where, config.quantize)
    parameters = parameter_count(net)
    model = Model(net, where)
    model.check()
    started = add_adapters(config, model)
    layout, fallen = choose_layout(config, model, comm)
    info = ModelInfo(
        name=config.model,
        dtype=str(dtype).removeprefix("torch."),
        device=str(where),
        parameters=parameters,
        trainable=sum(p.numel() for p in model.policy.values()),
        targets=tuple(sorted({path.rpartition(".")[2] for path in adapters.modules_of(model.policy)})),
        weights_hash=models.weights_hash(folder),
        notes=(*notes, *repaired, *family_notes(model), *started, *fallen),
        layout=layout,
    )
    return TorchLearner(config, comm, model, info, folder)


def add_adapters(config: RunConfig, model: Model) -> list[str]:
    """The adapter to train, and the references; returns notes."""
    dims = model.dims()
    start, notes = policy_adapter(config, dims)
    model.add_policy(start)
    for reference in reference_adapters(config, dims, start):
        model.add_reference(reference)
    return notes


def choose_layout(config: RunConfig, model: Model, comm: TorchComm) -> tuple[str, list[str]]:
    """`packed` where prompts may be shared and the configuration wants it, else `padded`; and a note on why not."""
    if config.train.prefix_sharing == "off":
        return "padded", []
    why = why_not_shared(model)
    if comm.all_sum(np.array([why is not None], np.float32))[0] == 0:
        return "packed", []
    return "padded", [f"train.prefix_sharing: each completion is computed with a prompt of its own: {why or 'another rank has to'}."]


@torch.no_grad()
def why_not_shared(model: Model) -> str | None:
    """The reason why this model must not compute a prompt once for all its completions; None if it may."""

    def plain(forest: Forest) -> np.ndarray:
        return _scored(model, forest, shared=False)

    def shared(forest: Forest) -> np.ndarray:
        return _scored(model, forest, shared=True)

    name = type(model.net).__name__
    try:
        shared(sharing.example(model.head.width))
        if (calls := sum(plan.calls for plan in model.attention.plans)) != model.layers:
            return f"{calls} of the {model.layers} layers of {name} look at other tokens through attention alone"
        return sharing.why_not(plain, shared, model.head.width, str(model.net.dtype).removeprefix("torch."), has_experts(model))
    except Unshareable as error:
        return f"{name}: {error}"
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, AssertionError) as error:
        return f"{name} does not run on shared prompts ({' '.join(str(error).split())[:200] or type(error).__name__})"


def _scored(model: Model, forest: Forest, shared: bool) -> np.ndarray:
    layout = packed(forest) if shared else padded(forest)
    src, tgt = (torch.from_numpy(a).to(model.device) for a in (layout.src, layout.tgt))
    return to_numpy(token_logps(model.head, model.head.width, model.hidden_of(layout)[src], tgt))
