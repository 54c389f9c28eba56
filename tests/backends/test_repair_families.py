"""Models saved by transformers, opened by mlx-lm: the same logits after the repair of config.json, other ones or none before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

from interpreters import mlx_lm_is_old
from tiny_families import DENSE, HALF, IDS, LOST, MIXTURES, ROPE, Family, reopened, write

from upo.convert.families import SAME
from upo.errors import ModelError
from upo.models import model_config
from upo.repair import CLOSED_TO_MLX, WRONG_ON_MLX, for_mlx, for_torch
from upo_mlx.device import mx
from upo_mlx.model import load_base

FAMILIES = {**DENSE, **MIXTURES}
LINEAR = {**ROPE, "rope_type": "linear", "factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def _on_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def stock(folder: Path, config: dict[str, Any] | None = None) -> np.ndarray:
    """Logits by mlx-lm's own loader."""
    from mlx_lm.utils import load_model

    net, _ = load_model(folder, model_config=config)
    return logits(net)


def logits(net: Any) -> np.ndarray:
    return np.array(net(mx.array(IDS)).astype(mx.float32))


def test_the_table_is_as_wide_as_promised() -> None:
    assert len(DENSE) >= 15 and len(MIXTURES) >= 3
    assert sum(family.raw != "right" for family in FAMILIES.values()) >= 30
    assert set(LOST) == set(WRONG_ON_MLX) | set(CLOSED_TO_MLX)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_the_same_in_both_libraries_once_repaired(kind: str, tmp_path: Path) -> None:
    if kind in ("gemma2", "lfm2", "qwen3") and mlx_lm_is_old():
        pytest.skip("docs/models.md: this line of the table holds from mlx-lm 0.32 on")
    family = FAMILIES[kind]
    want = write(kind, family, tmp_path)
    assert np.abs(want).max() > 0.5, "logits too small to tell anything"
    far = max(0.02, 5 * family.tolerance)
    if family.raw == "closed":
        with pytest.raises((TypeError, ValueError, IndexError, KeyError)):
            stock(tmp_path)
    else:
        gap = np.abs(stock(tmp_path) - want).max()
        assert gap > far if family.raw == "wrong" else gap < family.tolerance
    net, _ = load_base(tmp_path, mx.float32, IDS.shape[1])
    np.testing.assert_allclose(logits(net), want, atol=family.tolerance, rtol=0)
    # Written to disk, the repaired configuration serves both stock loaders.
    config, _ = model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(stock(tmp_path), want, atol=family.tolerance, rtol=0)
    np.testing.assert_array_equal(reopened(tmp_path), want)


@pytest.mark.parametrize("kind", LOST)
def test_a_family_that_is_refused_is_still_lost(kind: str, tmp_path: Path) -> None:
    """When one of these begins to agree, it belongs into the table above."""
    if kind == "ernie4_5_moe" and mlx_lm_is_old():
        pytest.skip("docs/models.md: lost from mlx-lm 0.32 on")
    want = write(kind, LOST[kind], tmp_path)
    config, _ = model_config(tmp_path)
    if kind in WRONG_ON_MLX:
        with pytest.raises(ModelError, match=f"model_type {kind}: .*--backend torch"):
            for_mlx(config, 24)
        with pytest.raises(ModelError, match=f"model_type {kind}"):
            load_base(tmp_path, mx.float32, 24)
        try:
            gap = np.abs(stock(tmp_path, config) - want).max()
        except SystemExit:  # mlx-lm's olmo ends the program
            return
        assert gap > 0.02
    else:
        with pytest.raises(ModelError, match="mlx-lm cannot load"):
            load_base(tmp_path, mx.float32, 24)


@pytest.mark.parametrize("rope", [LINEAR, YARN, LLAMA3], ids=["linear", "yarn", "llama3"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3"])
def test_scaling_is_carried_over(kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
    want = write(kind, FAMILIES[kind], tmp_path, rope_parameters=rope)
    net, _ = load_base(tmp_path, mx.float32, IDS.shape[1])
    np.testing.assert_allclose(logits(net), want, atol=2e-5, rtol=0)


IGNORED = [(kind, rope) for kind in ("cohere", "gemma", "gemma2", "helium", "mixtral", "phi", "qwen3_moe", "stablelm", "starcoder2") for rope in (LINEAR, LLAMA3)]


@pytest.mark.parametrize(("kind", "rope"), IGNORED, ids=lambda v: v if isinstance(v, str) else v["rope_type"])
def test_a_scaling_that_mlx_lm_ignores_is_refused(kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
    want = write(kind, FAMILIES[kind], tmp_path, rope_parameters=rope)
    config, _ = model_config(tmp_path)
    assert np.abs(stock(tmp_path, config) - want).max() > 0.1  # silently wrong in mlx-lm itself
    with pytest.raises(ModelError, match=f"ignores the rotary scaling .*{kind}"):
        load_base(tmp_path, mx.float32, 24)


def test_a_partial_factor_that_mlx_lm_ignores_is_refused(tmp_path: Path) -> None:
    """GLM's own models rotate half of each head."""
    want = write("glm", FAMILIES["glm"], tmp_path, rope_parameters=HALF)
    config, _ = model_config(tmp_path)
    assert np.abs(stock(tmp_path, config) - want).max() > 0.1
    with pytest.raises(ModelError, match=r"rotates whole heads of a glm model, config\.json says 0\.5"):
        load_base(tmp_path, mx.float32, 24)


def test_a_base_that_mlx_lm_ignores_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import upo_mlx.model

    write("llama", FAMILIES["llama"], tmp_path)
    monkeypatch.setattr(upo_mlx.model, "for_mlx", lambda config, tokens: ({**config, "rope_theta": 1e4}, []))
    real = upo_mlx.model.check_rope
    monkeypatch.setattr(upo_mlx.model, "check_rope", lambda folder, net, config: real(folder, net, {**config, "rope_theta": 5e5}))
    with pytest.raises(ModelError, match=r"rotary base of 10000 .* config\.json says 500000"):
        load_base(tmp_path, mx.float32, 24)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "starcoder2", "qwen2"])
def test_a_sliding_window_that_mlx_lm_ignores_is_told(kind: str, tmp_path: Path) -> None:
    changes = {"use_sliding_window": True, "max_window_layers": 0} if kind == "qwen2" else {}
    want = write(kind, FAMILIES[kind], tmp_path, sliding_window=8, **changes)
    net, notes = load_base(tmp_path, mx.float32, 24)
    assert np.abs(logits(net) - want).max() > 0.1 and any("sliding_window 8 is not applied" in note for note in notes)
    np.testing.assert_allclose(logits(net)[:, :8], want[:, :8], atol=max(2e-5, FAMILIES[kind].tolerance), rtol=0)
    assert not any("sliding_window" in note for note in load_base(tmp_path, mx.float32, 8)[1])


@pytest.mark.parametrize("kind", ["olmo3", "gemma3_text"])
def test_a_sliding_window_that_is_applied_is_not_told(kind: str, tmp_path: Path) -> None:
    write(kind, FAMILIES[kind], tmp_path)
    assert not any("sliding_window" in note and "applied" in note for note in load_base(tmp_path, mx.float32, 24)[1])


def test_odd_layer_types_are_refused(tmp_path: Path) -> None:
    family = Family({**DENSE["cohere2"].options, "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2})
    write("cohere2", family, tmp_path)
    with pytest.raises(ModelError, match="every n-th layer"):
        load_base(tmp_path, mx.float32, 24)


def test_longrope_has_the_short_factors_below_its_limit(tmp_path: Path) -> None:
    """mlx-lm always applies the long ones."""
    long = {"rope_type": "longrope", "rope_theta": 5e5, "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [9.0, 8.0, 7.0, 6.0]}
    want = write("phi3", FAMILIES["phi3"], tmp_path, rope_parameters=long, original_max_position_embeddings=64, max_position_embeddings=512)
    net, notes = load_base(tmp_path, mx.float32, 64)
    np.testing.assert_allclose(logits(net), want, atol=3e-5, rtol=0)
    assert not any("long rotary factors" in note for note in notes)
    net, notes = load_base(tmp_path, mx.float32, 65)
    assert np.abs(logits(net) - want).max() > 0.1 and any("long rotary factors" in note for note in notes)


def test_on_torch_the_factors_do_not_depend_on_what_stands_beside(tmp_path: Path) -> None:
    """transformers takes those of the longest text of a batch. Beyond the limit both backends have the long ones, for every text."""
    import torch

    from upo_torch.model import load_base as load_on_torch

    long = {"rope_type": "longrope", "rope_theta": 5e5, "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [9.0, 8.0, 7.0, 6.0]}
    want = write("phi3", FAMILIES["phi3"], tmp_path, rope_parameters=long, original_max_position_embeddings=64, max_position_embeddings=512)
    ids = torch.tensor(np.array(IDS))
    beside = torch.cat([ids, ids[:, :1].expand(-1, 70 - ids.shape[1])], 1)  # tokens that come after do not reach back, but make it long

    def of(tokens: int, given: torch.Tensor) -> tuple[np.ndarray, list[str]]:
        net, notes = load_on_torch(tmp_path, torch.float32, torch.device("cpu"), tokens=tokens)
        with torch.no_grad():
            return net(given).logits[:, : ids.shape[1]].numpy(), [note for note in notes if "long rotary factors" in note]

    short, none = of(64, ids)
    np.testing.assert_allclose(short, want, atol=3e-5, rtol=0)
    assert not none and np.abs(of(64, beside)[0] - want).max() > 0.1, "the fault of which this is the remedy"
    alone, told = of(65, ids)
    np.testing.assert_allclose(alone, of(65, beside)[0], atol=3e-5, rtol=0)
    net, notes = load_base(tmp_path, mx.float32, 65)
    np.testing.assert_allclose(alone, logits(net), atol=3e-5, rtol=0)
    assert told == [note for note in notes if "long rotary factors" in note] and "above 64" in told[0]


def test_factors_that_grow_with_the_batch_are_refused_on_torch() -> None:
    config = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
    assert for_torch(config, 64) == (config, [])
    with pytest.raises(ModelError, match=r"beyond 64 tokens\. Set train\.max_length: 64\."):
        for_torch(config, 65)
    assert for_torch({"rope_parameters": {"rope_type": "llama3"}, "max_position_embeddings": 64}, 65)[1] == []


def test_the_documentation_has_every_family() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    for kind in FAMILIES:
        cells = [cell.strip() for cell in rows[f"`{kind}`"].split("|")[2:5]]
        assert (cells[0] == "right") is (FAMILIES[kind].raw == "right") and (cells[0] == "does not open") is (FAMILIES[kind].raw == "closed")
        assert float(cells[1]) < FAMILIES[kind].tolerance and cells[2] == ("yes" if kind in SAME else "no"), kind
    assert {f"`{kind}`" for kind in LOST} <= set(rows)
