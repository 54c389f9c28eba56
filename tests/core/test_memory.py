"""What a run needs and what there is: sizes worked out by hand, and the choice that follows from them."""

from __future__ import annotations

from dataclasses import replace
from threading import Thread

import pytest
from fake_learner import ThreadComm, configure

from upo.memory import Estimate, Shapes, available, choose_recomputing, decided, estimate, largest, model_shapes

LLAMA = Shapes(1_000_000, 4_000_000, {}, hidden=64, layers=2, heads=4, queries=64, keys=32, inner=128, capped=False)
NEEDS = Estimate(base=1e9, adapter=1e8, activations=4e9, recomputed=5e8)


def test_shapes_of_a_folder(tiny_llama):
    found = model_shapes(tiny_llama)
    assert replace(found, parameters=0, stored=0, linears={}) == replace(LLAMA, parameters=0, stored=0)
    assert not found.packed and replace(found, stored=found.parameters // 2).packed


def test_activations_by_hand():
    """100 tokens in 2 layers. In float32: norm inputs 512 bytes, their outputs 512, q, attention twice, k, v 3 * 256 + 2 * 128, MLP 4 * 512."""
    config = configure(None)
    ends = 3 * 2**26 + 3 * 100 * 256
    found = estimate(config, LLAMA, 1000, 4, 100, 50, "torch")
    assert (found.base, found.adapter) == (4e6, 16e3)
    assert found.activations == 2 * 100 * (512 + 512 + 1024 + 2048) + ends
    assert found.recomputed == 2 * 100 * 256 + 100 * 4096 + ends
    assert found.total(False) - found.total(True) == found.activations - found.recomputed
    # MLX's attention has no fused backward pass: 4 heads, 50 scores for each token; torch's only with a soft cap, in three arrays
    assert estimate(config, LLAMA, 1000, 4, 100, 50, "mlx").activations == found.activations + 2 * 100 * 4 * 50 * 4
    assert estimate(config, replace(LLAMA, capped=True), 1000, 4, 100, 50, "torch").activations == found.activations + 2 * 100 * 4 * 50 * 10
    # in 16 bits the inputs of norms stay in float32
    half = estimate(config, LLAMA, 1000, 2, 100, 50, "torch")
    assert half.activations == 2 * 100 * (512 + 256 + 512 + 1024) + 3 * 2**26 + 3 * 100 * 128 and half.base == 2e6


def test_weights():
    of = lambda **changes: estimate(configure(None, **changes), LLAMA, 1000, 2, 100, 50, "torch")  # noqa: E731
    assert of(optimizer={"name": "rmsprop"}).adapter == 12e3
    assert of(quantize="nf4").base == 5e5
    assert estimate(configure(None), replace(LLAMA, stored=600_000), 1000, 2, 100, 50, "mlx").base == 600_000


def test_the_largest_micro_batch():
    assert largest(configure(None, train={"micro_batch_tokens": 9000})) == 9000
    assert largest(configure(None, train={"micro_batch_tokens": 64, "max_length": 100})) == 200


def auto(**changes):
    return configure(None, train={"gradient_checkpointing": "auto"}, **changes)


def test_the_choice():
    """5.1 GB are needed: of 80 % of a GPU's free memory, of half of a CPU's."""
    assert choose_recomputing(auto(), NEEDS, 6.4e9, "cuda") == (
        False,
        ["train.gradient_checkpointing: off (about 5.1 GB; 6.4 GB free, of which 80% may be taken)."],
    )
    assert choose_recomputing(auto(), NEEDS, 6.3e9, "cuda") == (
        True,
        ["train.gradient_checkpointing: on (about 1.6 GB instead of 5.1 GB; 6.3 GB free, of which 80% may be taken)."],
    )
    assert [choose_recomputing(auto(), NEEDS, free, "cpu")[0] for free in (10.1e9, 10.3e9)] == [True, False]
    on, notes = choose_recomputing(auto(), NEEDS, 1e9, "cuda", able="BloomForCausalLM does not support it")
    assert not on and notes == ["train.gradient_checkpointing: off (BloomForCausalLM does not support it; about 5.1 GB; 1.0 GB free, of which 80% may be taken)."]
    for given in (True, False):
        config = configure(None, train={"gradient_checkpointing": given})
        assert choose_recomputing(config, NEEDS, 6.3e9, "cuda") == (given, [])
    assert decided(auto(), True).train.gradient_checkpointing is True


def test_ranks_agree():
    found = {}

    def rank(comm, free):
        found[comm.rank] = choose_recomputing(auto(), NEEDS, free, "cuda", comm)

    threads = [Thread(target=rank, args=(comm, free)) for comm, free in zip(ThreadComm.make(2), (1e10, 1e9), strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found[0][0] and found[1][0]
    assert found[0][1][0].endswith("10.0 GB free, of which 80% may be taken; another rank has less).")


@pytest.fixture
def machine(tmp_path):
    def made(cgroup: str, **files: str):
        for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n", "proc/self/cgroup": cgroup, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return available(tmp_path)

    return made


def test_available_memory(machine):
    assert machine("0::/\n") == 4_096_000


def test_limits_of_control_groups(machine):
    """Of version 2, on the group or one above it; cached files are given back."""
    inner = {"sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "5\n", "sys/fs/cgroup/a/b/memory.stat": "inactive_file 0\n"}
    outer = {"sys/fs/cgroup/a/memory.max": "3000000\n", "sys/fs/cgroup/a/memory.current": "1000000\n", "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 400000\n"}
    assert machine("0::/a/b\n", **inner) == 4_096_000
    assert machine("0::/a/b\n", **inner, **outer) == 3_000_000 - 1_000_000 + 400_000


def test_limits_of_version_1(machine):
    """Where the machine's folder is the container's own, the group's path leads nowhere below it."""
    place = "sys/fs/cgroup/memory"
    files = {f"{place}/memory.limit_in_bytes": "2000000\n", f"{place}/memory.usage_in_bytes": "500000\n", f"{place}/memory.stat": "total_inactive_file 100\n"}
    assert machine("4:cpu,cpuacct:/x\n3:memory:/docker/1\n", **files) == 1_500_100


def test_a_system_that_does_not_say(tmp_path):
    assert available(tmp_path) > 1e8
