"""From a configuration to a learner: device, model, adapters, and the layout in which it computes."""

from __future__ import annotations

from pathlib import Path

import torch

from upo import adapters, memory, models
from upo.backend import ModelInfo
from upo.config import RunConfig
from upo.flops import sizes_of
from upo.targets import policy_adapter, reference_adapters
from upo_torch import device
from upo_torch.device import TorchComm
from upo_torch.model import Model, family_notes, load_base, parameter_count
from upo_torch.selfcheck import choose_layout
from upo_torch.step import TorchLearner


def load_learner(config: RunConfig) -> TorchLearner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks. Raises ModelError, ConfigError or BackendError."""
    comm = TorchComm()
    device.share_threads(comm.local_size)
    where = device.choose_device(config.device, comm.local_rank, comm.local_size)
    device.start_threads(where)
    device.limit_memory(config.train, where)
    dtype, notes = device.choose_dtype(config.dtype, where)
    comm.start(where)
    folder = models.resolve(config.model, config.revision)
    free = device.free_memory(where, comm.local_size)
    net, repaired = load_base(folder, dtype, where, config.quantize, config.train.max_length)
    parameters = parameter_count(net)
    model = Model(net, where)
    model.check()
    started = add_adapters(config, model)
    choice = choose_memory(config, model, folder, free, comm)
    config = memory.decided(config, choice)
    layout, fallen = choose_layout(model, config.train, comm)
    trainable = sum(p.numel() for p in model.policy.values())
    info = ModelInfo(
        name=config.model,
        dtype=str(dtype).removeprefix("torch."),
        device=str(where),
        parameters=parameters,
        trainable=trainable,
        targets=tuple(sorted({path.rpartition(".")[2] for path in adapters.modules_of(model.policy)})),
        weights_hash=models.weights_hash(folder),
        notes=(*notes, *repaired, *family_notes(model), *started, *fallen, *choice.notes),
        chip=torch.cuda.get_device_name(where) if where.type == "cuda" else "",
        sizes=sizes_of(models.model_config(folder)[0], model.dims(), parameters, trainable, config.train.max_length),
        layout=layout,
        micro_batch_tokens=choice.tokens,
    )
    return TorchLearner(config, comm, model, info, folder)


def choose_memory(config: RunConfig, model: Model, folder: Path, free: int, comm: TorchComm) -> memory.Choice:
    """Size of micro-batches and recomputation, from what the model needs and the device has. `free`: bytes before loading."""
    shapes, adapter = memory.model_shapes(folder), sum(p.numel() for p in model.policy.values())

    def needs(tokens: int) -> memory.Estimate:
        return memory.estimate(config, shapes, adapter, model.net.dtype.itemsize, tokens, config.train.max_length, "torch")

    unable = None if model.recomputable() else f"{type(model.net).__name__} does not support it"
    return memory.choose(config, needs, free, model.device.type, comm, unable)


def add_adapters(config: RunConfig, model: Model) -> list[str]:
    """The adapter to train, and the references; returns notes."""
    dims = model.dims()
    start, notes = policy_adapter(config, dims)
    model.add_policy(start)
    for reference in reference_adapters(config, dims, start):
        model.add_reference(reference)
    return notes
