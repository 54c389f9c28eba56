"""A step under UPO and a step under KTO on the same rows, alternating in one process. `python upo_objective.py JOB RESULT`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from stopwatch import Stopwatch, contend
from upo_run import Listener, configuration

from upo import load_config
from upo.backend import get_backend
from upo.data.batch import Batch
from upo.training.session import Session

KTO = "objective={preference: {loss: kto, beta: 0.1}}"
UPO = "objective={preset: upo, auxiliary: {rewards: [{scorer: length}]}}"


def run(job: dict[str, Any]) -> Stopwatch:
    """A run under UPO; before or after each of its steps another learner takes the same step under KTO."""
    settings = job["settings"]["set"]
    watch = Stopwatch()
    session = Session(load_config(configuration(job), [*settings, UPO]), Path(job["out"]), reporter=Listener(watch))
    config = load_config(configuration(job), [*settings, KTO])
    other = get_backend(config.backend).load(config)
    calls = count_calls(config.backend)
    upo, seconds, counts = session.learner.step, {"upo": [], "kto": []}, {"upo": [], "kto": []}

    def timed(name: str, step: Any, batch: Batch, lr: float) -> Any:
        before, began = calls(), time.perf_counter()
        outcome = step(batch, lr)
        seconds[name].append(time.perf_counter() - began)
        counts[name].append(calls() - before)
        return outcome

    def both(batch: Batch, lr: float) -> Any:
        if len(seconds["upo"]) % 2:  # which of them comes first alternates too
            outcome = timed("upo", upo, batch, lr)
            timed("kto", other.step, batch, lr)
            return outcome
        timed("kto", other.step, batch, lr)
        return timed("upo", upo, batch, lr)

    session.learner.step = both
    session.run()
    watch.found["objective"] = {"seconds": seconds, "calls": counts}
    return watch


def count_calls(backend: str) -> Any:
    """A function that says how often a model's attention has been called so far, in all its layers."""
    count = 0
    if backend == "torch":
        from torch.nn.modules.module import register_module_forward_hook

        def hook(module: Any, args: Any, output: Any) -> None:
            nonlocal count
            count += type(module).__name__.endswith("Attention")

        register_module_forward_hook(hook)
    else:
        from upo_mlx.device import mx

        original = mx.fast.scaled_dot_product_attention

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        mx.fast.scaled_dot_product_attention = counted
    return lambda: count


if __name__ == "__main__":
    contend(run)
