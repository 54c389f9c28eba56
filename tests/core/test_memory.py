"""What a run needs and what there is: sizes worked out by hand, and the choice that follows from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from threading import Thread

import pytest
from fake_learner import ThreadComm, configure

from upo.memory import Choice, Estimate, Shapes, available, choose, decided, estimate, model_shapes

LLAMA = Shapes(1_000_000, 4_000_000, {}, hidden=64, layers=2, heads=4, queries=64, keys=32, inner=128, capped=False)


def test_shapes_of_a_folder(tiny_llama):
    found = model_shapes(tiny_llama)
    assert replace(found, parameters=0, stored=0, linears={}) == replace(LLAMA, parameters=0, stored=0)
    assert not found.packed and replace(found, stored=found.parameters // 2).packed


def test_sizes_under_other_names(tiny_llama, tmp_path):
    """A width for each layer (Gemma 3n), and layers that the configuration calls otherwise (GPT-Neo): counted in the files."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert model_shapes(folder).layers == config.pop("num_hidden_layers") == 2
    for old, new in (("num_attention_heads", "num_heads"), ("hidden_size", "d_model")):
        config[new] = config.pop(old)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": [128, 160]}))
    assert model_shapes(folder) == replace(model_shapes(tiny_llama), inner=160)


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


def auto(**train):
    return configure(None, train={"gradient_checkpointing": "auto", **train})


def needs(tokens: int) -> Estimate:
    """2 MB a token, an eighth of it recomputed."""
    return Estimate(base=1e9, adapter=1e8, activations=2e6 * tokens, recomputed=2.5e5 * tokens)


def test_the_choice_on_a_cpu():
    """2048 tokens, of half of what is free; a pair of the longest texts is one micro-batch."""
    assert choose(auto(), needs, 10.5e9, "cpu") == Choice(2048, False, ("train.gradient_checkpointing: off (about 5.2 GB; 10.5 GB free, of which 50% may be taken).",))
    on = "train.gradient_checkpointing: on (about 1.6 GB instead of 5.2 GB; 10.3 GB free, of which 50% may be taken)."
    assert choose(auto(), needs, 10.3e9, "cpu") == Choice(2048, True, (on,))
    assert choose(auto(max_length=1500), needs, 14.1e9, "cpu").recompute and not choose(auto(max_length=1500), needs, 14.3e9, "cpu").recompute
    assert choose(auto(), needs, 1.0, "metal").tokens == 2048


def test_the_choice_on_cuda():
    """As many tokens as fit without recomputing, else as many as fit with it, else the fewest."""
    for free, tokens, recompute in ((200e9, 65536, False), (165.3e9, 65536, False), (165.1e9, 32768, False), (7e9, 2048, False), (6.4e9, 8192, True), (1e9, 2048, True)):
        found = choose(auto(), needs, free, "cuda")
        assert (found.tokens, found.recompute) == (tokens, recompute), free
    both = "train.micro_batch_tokens: 16384, train.gradient_checkpointing: off (about 33.9 GB; 50.0 GB free, of which 80% may be taken)."
    assert choose(auto(), needs, 50e9, "cuda").notes == (both,)
    unable = choose(auto(), needs, 1e9, "cuda", unable="BloomForCausalLM does not support it")
    off = "train.micro_batch_tokens: 2048, train.gradient_checkpointing: off"
    assert unable == Choice(2048, False, (f"{off} (BloomForCausalLM does not support it; about 5.2 GB; 1.0 GB free, of which 80% may be taken).",))


def test_a_limit_counts_as_what_is_free():
    """5.2 GB are more than half of a limit of 10.3 GB, whatever the device has."""
    on = "train.gradient_checkpointing: on (about 1.6 GB instead of 5.2 GB; 10.3 GB by train.memory_limit_gb, of which 50% may be taken)."
    assert choose(auto(memory_limit_gb=10.3), needs, 99e9, "cpu") == Choice(2048, True, (on,))
    assert choose(auto(memory_limit_gb=10.3), needs, 10.1e9, "cpu").notes[0].count("10.1 GB free") == 1
    assert not choose(auto(memory_limit_gb=10.5), needs, 99e9, "cpu").recompute


def test_what_is_given_is_taken():
    for given in (True, False):
        found = choose(configure(None, train={"gradient_checkpointing": given, "micro_batch_tokens": 512}), needs, 1e9, "cuda")
        assert found == Choice(512, given)
        assert choose(configure(None, train={"gradient_checkpointing": given}), needs, 40e9, "cuda").tokens == (65536 if given else 8192)
    only = choose(configure(None, train={"gradient_checkpointing": False}), needs, 40e9, "cuda")
    assert only.notes == ("train.micro_batch_tokens: 8192 (about 17.5 GB; 40.0 GB free, of which 80% may be taken).",)
    train = decided(auto(), Choice(4096, True)).train
    assert (train.micro_batch_tokens, train.gradient_checkpointing) == (4096, True)


def test_ranks_agree():
    found = {}

    def rank(comm, free):
        found[comm.rank] = choose(auto(), needs, free, "cuda", comm)

    threads = [Thread(target=rank, args=(comm, free)) for comm, free in zip(ThreadComm.make(2), (1e11, 6.4e9), strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all((found[r].tokens, found[r].recompute) == (8192, True) for r in (0, 1))
    assert found[0].notes[0].endswith("100.0 GB free, of which 80% may be taken; another rank has less).")
    assert found[1].notes[0].endswith("6.4 GB free, of which 80% may be taken).")


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
