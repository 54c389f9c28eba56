"""From a configuration to a learner: model, adapter, references, the layout of token rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upo import memory, models
from upo.backend import ModelInfo
from upo.config import RunConfig
from upo.flops import sizes_of
from upo.targets import policy_adapter, reference_adapters
from upo_mlx import device
from upo_mlx.device import MlxComm, mx
from upo_mlx.model import BASE, Model, family_notes, load_base, lora_from
from upo_mlx.selfcheck import choose_rows
from upo_mlx.step import MlxLearner

Array = mx.array


def load_learner(config: RunConfig) -> MlxLearner:
    """Model, adapter, reference and optimizer as configured; initialises the ranks. Raises ModelError, ConfigError or BackendError."""
    device.check_quantize(config.quantize)
    where = device.choose_device(config.device)
    device.limit_memory(config.train, where)
    dtype, notes = device.choose_dtype(config.dtype, where)
    comm = MlxComm()
    device.share_threads(comm.size)
    folder = models.resolve(config.model, config.revision)
    free = device.free_memory(where, comm.size)
    net, repaired = load_base(folder, dtype, config.train.max_length)
    model = Model(net)
    dims = model.dims()
    start, started = policy_adapter(config, dims)
    references = reference_adapters(config, dims, start)
    for adapter in (start, *references):
        model.add_loras(adapter.targets if adapter else ())
    policy = lora_from(start)
    model.check()
    parameters, trainable = parameter_count(net), sum(a.size for a in policy.arrays.values())
    shapes = memory.model_shapes(folder)
    needs = lambda tokens: memory.estimate(config, shapes, trainable, dtype.size, tokens, config.train.max_length, "mlx")  # noqa: E731
    choice = memory.choose(config, needs, free, where, comm)
    config = memory.decided(config, choice)
    rows, fallen_back = choose_rows(model, policy, config.train, str(dtype).rpartition(".")[2], comm)
    info = ModelInfo(
        name=config.model,
        dtype=str(dtype).rpartition(".")[2],
        device=where,
        parameters=parameters,
        trainable=trainable,
        targets=tuple(sorted({path.rpartition(".")[2] for path in start.targets})),
        weights_hash=models.weights_hash(folder),
        notes=(*notes, *device.blas_notes(where), *repaired, *family_notes(model), *fallen_back, *choice.notes, *started),
        chip=chip(where, dtype),
        sizes=sizes_of(models.model_config(folder)[0], dims, parameters, trainable, config.train.max_length),
        layout=rows.name,
        micro_batch_tokens=choice.tokens,
    )
    return MlxLearner(config, comm, model, rows, policy, [lora_from(r) if r else BASE for r in references], info, folder)


def chip(where: str, dtype: Any) -> str:
    """The GPU's name; none on a CPU, nor for float32 on CUDA, where MLX may multiply in TF32."""
    return str(mx.device_info().get("device_name", "")) if where == "metal" or (where == "cuda" and dtype != mx.float32) else ""


def parameter_count(net: Any) -> int:
    """Weights of the network before adapters, packed quantised ones counted singly."""
    from mlx_lm.utils import get_total_parameters

    loras = sum(a.size for name, a in _flat(net) if name.endswith(("lora_a", "lora_b")))
    return int(get_total_parameters(net)) - loras


def _flat(net: Any) -> Sequence[tuple[str, Array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(net.parameters())
