"""What every test shares: one thread, no network, a cache of its own, the installed backends, and small models.

`pytest --require=torch,mlx` fails at once when one of these cannot be imported, where its tests would otherwise be skipped.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before anything imports NumPy, torch or MLX: two busy processes with several threads each slow one another up to a hundredfold.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails instead of waiting for it
os.environ["MLX_DISABLE_COMPILE"] = "1"  # on a CPU, MLX would call the C++ compiler for every fused kernel

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside the tests: `oracle`, `interpreters`

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from interpreters import need_backend  # noqa: E402

from upo.backend import PACKAGES, installed  # noqa: E402
from upo.cache import cache_dir, cache_root  # noqa: E402

if installed("mlx"):  # on Linux its wheel brings the reference BLAS (5 GFLOP/s); this loads a real one before anything imports mlx.core
    importlib.import_module("upo_mlx.device")

USER_CACHE = Path(os.environ.setdefault("UPO_CACHE_OF_USER", str(cache_root())))  # the processes of `pytest -n` start with a cache of the tests
BACKENDS = ("torch", "mlx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require", default="", help="comma-separated backends or modules that must be there, e.g. torch,mlx")


def pytest_configure(config: pytest.Config) -> None:
    for name in filter(None, config.getoption("--require").split(",")):
        module = PACKAGES[name][1] if name in PACKAGES else name
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise pytest.UsageError(f"--require={name}: {module} cannot be imported ({error})") from error
    folder = tempfile.mkdtemp(prefix="upo-tests-")
    os.environ["UPO_CACHE"] = folder  # also for the processes that tests start
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True, scope="session")
def _own_cache() -> None:
    assert cache_dir() != USER_CACHE, "tests must not write to the user's cache"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn; skips the ones that are not installed (see --require)."""
    need_backend(request.param)
    return request.param


# --- Models -----------------------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("user", "assistant", "system", " the", " and", " that", " you", " is", " to", " of", " what", " how", " not", " with", " answer", "ing", "The", "I")
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 384, 64, 2, 4, 2, 128  # more rows than tokens, as in many real models


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with a merge chain for each of WORDS, and a ChatML template; the end of a turn is <|im_end|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = (symbols := word.replace(" ", "Ġ"))[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
            left += right
    assert len(vocab) <= VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_tiny_llama(folder: Path, tied: bool = False, seed: int = 0) -> Path:
    """A random Llama in HF layout, float32, with tokenizer and chat template, made without torch. Returns the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    head = HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": np.ones(HIDDEN, np.float32)}
    if not tied:
        weights["lm_head.weight"] = draw(VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = {
            "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            "self_attn.q_proj.weight": draw(HEADS * head, HIDDEN),
            "self_attn.k_proj.weight": draw(KV_HEADS * head, HIDDEN),
            "self_attn.v_proj.weight": draw(KV_HEADS * head, HIDDEN),
            "self_attn.o_proj.weight": draw(HIDDEN, HEADS * head),
            "mlp.gate_proj.weight": draw(INNER, HIDDEN),
            "mlp.up_proj.weight": draw(INNER, HIDDEN),
            "mlp.down_proj.weight": draw(HIDDEN, INNER),
        }
        weights |= {f"model.layers.{i}.{name}": w for name, w in layer.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    theta = 100000.0  # not the default, so that a loader which loses it gives other numbers
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return folder


@pytest.fixture(scope="session")
def make_tiny_llama(tmp_path_factory: pytest.TempPathFactory):
    """`make_tiny_llama(tied=False, seed=0)`: a fresh folder with a tiny random Llama, for tests that change its files."""

    def make(tied: bool = False, seed: int = 0) -> Path:
        return write_tiny_llama(tmp_path_factory.mktemp("llama"), tied, seed)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_llama) -> Path:
    """Folder of a tiny random Llama with an output head of its own. Shared: do not write to it."""
    return make_tiny_llama()


@pytest.fixture(scope="session")
def tiny_llama_tied(make_tiny_llama) -> Path:
    """The same with the output head tied to the embeddings. Shared: do not write to it."""
    return make_tiny_llama(tied=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: UPO_TEST_MODEL, or the one `upo quickstart` has cached for this user."""
    given = os.environ.get("UPO_TEST_MODEL")
    folder = Path(given) if given else USER_CACHE / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        if given:
            pytest.fail(f"UPO_TEST_MODEL={given} holds no config.json")
        pytest.skip(f"no model in {folder}: run `upo quickstart` once, or set UPO_TEST_MODEL to the folder of SmolLM2-135M-Instruct")
    return folder


@pytest.fixture(scope="session")
def harmless_pairs() -> Path:
    """1,400 real preference pairs kept beside the repository; offensive text, so no part of it."""
    path = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless.jsonl"
    if not path.exists():
        pytest.skip(f"real preference pairs are not at {path}")
    return path
