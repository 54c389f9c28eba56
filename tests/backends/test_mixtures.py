"""Where adapters sit in mixtures of experts: the same layers on both backends, or a refusal by name."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

from tiny_families import IDS, LOST, MIXTURES, write  # noqa: E402

import upo_mlx.model  # noqa: E402
import upo_torch.model  # noqa: E402
from upo.adapters import Adapter  # noqa: E402
from upo.errors import ModelError  # noqa: E402
from upo.targets import expand_targets, fresh_arrays  # noqa: E402
from upo_mlx.device import mx  # noqa: E402

REWRITTEN = {"deepseek_v3", "dots1", "glm4_moe", "solar_open"}  # PEFT takes their gate_proj, up_proj and down_proj for the experts'


def on_torch(folder):
    net, _ = upo_torch.model.load_base(folder, torch.float32, torch.device("cpu"))
    return upo_torch.model.Model(net, torch.device("cpu"))


def adapter(dims, targets) -> Adapter:
    paths = tuple(expand_targets(dims, targets))
    return Adapter(2, 4, 2.0, paths, fresh_arrays(dims, paths, 2, 0), "m", {})


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_same_layers_on_both_backends(kind, tmp_path):
    """mlx-lm cuts DeepSeek's kv_b_proj in two; all else is equal, and no router is among it."""
    write(kind, MIXTURES[kind], tmp_path)
    theirs = on_torch(tmp_path).dims()
    with mx.stream(mx.cpu):
        ours = upo_mlx.model.Model(upo_mlx.model.load_base(tmp_path, mx.float32)[0]).dims()
    assert ours == {path: size for path, size in theirs.items() if not path.endswith("kv_b_proj")}
    assert any("self_attn" in path for path in ours) and not [path for path in ours if path.endswith((".gate", "router", "router.layer"))]


@pytest.mark.parametrize("kind", MIXTURES)
def test_layers_that_peft_gives_no_adapter_are_refused_by_name(kind, tmp_path):
    write(kind, MIXTURES[kind], tmp_path)
    model = on_torch(tmp_path)
    if kind not in REWRITTEN:
        model.add_policy(adapter(model.dims(), "all-linear"))
        assert len(model.policy) == 2 * len(model.dims())
        return
    with pytest.raises(ModelError, match=r"^adapter\.targets: PEFT puts no adapter on model\.layers\.\d\.mlp\.") as caught:
        model.add_policy(adapter(model.dims(), "all-linear"))
    names = str(caught.value).partition("adapter.targets: [")[2].rstrip("]").split(", ")
    assert {"o_proj"} <= set(names) and not {"gate_proj", "up_proj", "down_proj"} & set(names)
    again = on_torch(tmp_path)
    again.add_policy(adapter(again.dims(), names))  # what the message says works
    assert len(again.policy) == 2 * len(expand_targets(again.dims(), names))


def test_a_router_that_is_a_linear_layer_gets_no_adapter(tmp_path):
    """Phi-MoE's returns a tuple. The new adapter changes nothing yet, so the logits are those of the plain model."""
    logits = write("phimoe", LOST["phimoe"], tmp_path)
    model = on_torch(tmp_path)
    assert [path for path in model.dims() if "mlp" in path] == [] and "model.layers.0.self_attn.q_proj" in model.dims()
    model.add_policy(adapter(model.dims(), "all-linear"))
    with torch.no_grad():
        assert abs(model.net(torch.tensor(IDS)).logits.numpy() - logits).max() < 2e-5  # float32 round-off, as for the other families
