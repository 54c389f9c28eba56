"""Scorers that ask a classifier or a reward model: tiny models written here, with outputs known from their biases or computed apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs torch: pip install "upo[torch]"')

from conftest import write_tokenizer  # noqa: E402

from upo.errors import BackendError, ConfigError, ModelError  # noqa: E402
from upo.rewards import Answer, build_scorer  # noqa: E402
from upo.training.reporter import Silent  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "you", "are", "a", "kind", "nasty", "person", "what", "is", "it"]
TOXIC = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]  # those of unitary/toxic-bert


class Listener(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPO_CACHE", str(tmp_path / "cache"))


def answers(*texts: str, prompt: str = "what is it") -> list[Answer]:
    return [Answer(f"d.jsonl:{i}", prompt, text, turns=({"role": "user", "content": prompt},)) for i, text in enumerate(texts, 1)]


def write_bert(folder: Path, labels: Sequence[str], biases: Sequence[float] | None = None, kind: str | None = None, seed: int = 0) -> Path:
    """A tiny BERT classifier. With `biases` its head has no weights, so that these are its logits whatever the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16, initializer_range=0.5,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}, problem_type=kind,
    )  # fmt: skip
    net = BertForSequenceClassification(config)
    with torch.no_grad():
        net.classifier.weight.mul_(0.0 if biases is not None else 1.0)
        net.classifier.bias.copy_(torch.tensor(biases if biases is not None else [0.0] * len(labels)))
    net.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16, "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def bert_logits(folder: Path, ids: list[int], types: list[int]) -> np.ndarray:
    """By transformers alone, one row, no padding."""
    from transformers import BertForSequenceClassification

    net = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return net(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0].double().numpy()


def test_toxicity_is_one_minus_the_worst_label(tmp_path: Path) -> None:
    biases = [-3.0, -6.0, -4.0, -5.0, -1.0, -7.0]  # sigmoid(-1) = 0.26894142 is the worst
    folder = write_bert(tmp_path / "m", TOXIC, biases)
    assert build_scorer("toxicity", model=str(folder)).score(answers("you are kind", "a")) == [pytest.approx(1 - 0.2689414214)] * 2


def test_toxicity_refuses_a_model_that_chooses_one_label(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "m", ["neutral", "toxic"], kind="single_label_classification")
    with pytest.raises(ConfigError, match=r"toxicity: .* chooses one of its labels \(neutral, toxic\)\. Use \{scorer: classifier"):
        build_scorer("toxicity", model=str(folder)).score(answers("a"))


def test_toxicity_without_its_weights_names_the_stand_in() -> None:
    with pytest.raises(ModelError, match=r"unitary/toxic-bert.*scorer: profanity"):
        build_scorer("toxicity").score(answers("a"))  # the hub is out of reach in tests


def test_classifier_values(tmp_path: Path) -> None:
    folder = str(write_bert(tmp_path / "m", ["negative", "positive"], [0.0, np.log(3.0)]))
    assert build_scorer("classifier", model=folder, label="positive").score(answers("a")) == [pytest.approx(0.75)]
    assert build_scorer("classifier", model=folder, label="negative").score(answers("a")) == [pytest.approx(0.25)]
    folder = str(write_bert(tmp_path / "n", ["negative", "positive"], [0.0, np.log(3.0)], kind="multi_label_classification"))
    assert build_scorer("classifier", model=folder, label="negative").score(answers("a")) == [pytest.approx(0.5)]


def test_classifier_batches_and_pairs_agree_with_transformers(tmp_path: Path) -> None:
    """Rows of different lengths in one batch, and both texts in their places: 1e-6 is float32 rounding of other shapes."""
    folder = write_bert(tmp_path / "m", ["bad", "good"])
    texts = ["you are a kind person", "nasty", "you"]
    ids = [[2, *(WORDS.index(w) for w in text.split()), 3] for text in texts]
    expected = [bert_logits(folder, row, [0] * len(row)) for row in ids]
    found = build_scorer("classifier", model=str(folder), label="good").score(answers(*texts))
    assert found == pytest.approx([1 / (1 + np.exp(z[0] - z[1])) for z in expected], abs=1e-6)
    assert max(found) - min(found) > 0.05, "the texts differ"
    prompt = [2, 10, 11, 12, 3]
    expected = [bert_logits(folder, [*prompt, *row[1:]], [0] * 5 + [1] * (len(row) - 1)) for row in ids]
    found = build_scorer("classifier", model=str(folder), label="good", input="pair").score(answers(*texts))
    assert found == pytest.approx([1 / (1 + np.exp(z[0] - z[1])) for z in expected], abs=1e-6)


def test_a_label_that_the_classifier_lacks(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "m", ["negative", "positive"])
    with pytest.raises(ConfigError, match=r'has no label "postive"\. Did you mean "positive"\?'):
        build_scorer("classifier", model=str(folder), label="postive").score(answers("a"))
    with pytest.raises(ConfigError, match="label must be given"):
        build_scorer("classifier", model=str(folder))
    with pytest.raises(ConfigError, match="model must be given"):
        build_scorer("classifier", label="x")


def test_what_is_too_long_is_cut_and_told(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "m", ["bad", "good"])
    listener = Listener()
    scorer = build_scorer("classifier", model=str(folder), label="good")
    long, cut = "you are " * 20, "you are " * 7
    found = scorer.score(answers(long, cut, "nasty"), listener)
    assert found[0] == pytest.approx(found[1], abs=1e-6), "16 tokens are read: [CLS], 14 words, [SEP]"
    (warning,) = listener.warned
    assert "1 of 3 answers have more than the 16 tokens" in warning and "their end was not scored" in warning


def test_scores_are_remembered_for_these_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import upo_torch

    folder = write_bert(tmp_path / "m", ["bad", "good"], [0.0, 0.0])
    loads: list[Any] = []
    load = upo_torch.classifier
    monkeypatch.setattr(upo_torch, "classifier", lambda *arguments: (loads.append(arguments), load(*arguments))[1])
    for _ in range(2):
        assert build_scorer("classifier", model=str(folder), label="good").score(answers("a")) == [0.5]
    assert len(loads) == 1, "the second time the model is not even loaded"
    write_bert(folder, ["bad", "good"], [0.0, np.log(3.0)])
    assert build_scorer("classifier", model=str(folder), label="good").score(answers("a")) == [pytest.approx(0.75)]


def test_it_is_on_its_ranks_device_and_gone_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks each asks for its own GPU; what is trained next finds the memory free, also after an error."""
    import upo_torch
    import upo_torch.classify

    asked: list[tuple[Any, ...]] = []
    made: list[Any] = []
    load = upo_torch.classifier
    monkeypatch.setattr(upo_torch.classify.device, "choose_device", lambda *given: (asked.append(given), torch.device("cpu"))[1])
    monkeypatch.setattr(upo_torch, "classifier", lambda *arguments: (made.append(load(*arguments)), made[-1])[1])
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    scorer = build_scorer("classifier", model=str(write_bert(tmp_path / "m", ["bad", "good"], [0.0, 0.0])), label="good")
    assert scorer.score(answers("a")) == [0.5]
    assert asked == [("auto", 2, 4)] and made[0].net is None
    with pytest.raises(ZeroDivisionError), scorer.ready(1, Listener()):
        assert made[1].net is not None
        raise ZeroDivisionError
    assert made[1].net is None


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with one output, whose padding token is its end of turn, as in many real ones."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("rm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=256, num_labels=1, pad_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "<|im_end|>", "chat_template": settings["chat_template"].replace(" + '\n' }}{% endfor %}", " }}{% endfor %}")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_reward_model_values(reward_model: Path) -> None:
    """Head times last hidden state of the whole conversation, one row at a time; the last token is the end of turn, which also is the padding.

    What is longer than the 256 tokens that the model reads loses its beginning.
    """
    from tokenizers import Tokenizer
    from transformers import LlamaForSequenceClassification

    net = LlamaForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = Tokenizer.from_file(str(reward_model / "tokenizer.json"))
    texts = ["The answer is that you are not kind.", "I", "what is it? " * 5, "what is it? " * 60]
    expected = []
    for text in texts:
        ids = tokenizer.encode(f"<|im_start|>user\nwhat is it<|im_end|><|im_start|>assistant\n{text}<|im_end|>", add_special_tokens=False).ids
        assert ids[-1] == 2
        ids = ids[-256:]
        with torch.no_grad():
            expected.append(float(net.score(net.model(torch.tensor([ids])).last_hidden_state[0, -1])))
    listener = Listener()
    found = build_scorer("reward_model", model=str(reward_model)).score(answers(*texts), listener)
    assert found == pytest.approx(expected, abs=1e-5)  # float32 rounding of other shapes
    assert len({round(value, 3) for value in found}) == 4
    (warning,) = listener.warned
    assert "1 of 4 answers have more than the 256 tokens" in warning and "their beginning" in warning


def test_reward_model_sees_every_turn(reward_model: Path) -> None:
    scorer = build_scorer("reward_model", model=str(reward_model))
    turns = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "what is it"})
    alone, with_system = scorer.score([*answers("you"), Answer("d.jsonl:9", "what is it", "you", turns=turns)])
    assert abs(alone - with_system) > 1e-3


def test_what_is_no_reward_model_is_refused(tmp_path: Path, reward_model: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 outputs \(bad, good\), a reward model has one"):
        build_scorer("reward_model", model=str(write_bert(tmp_path / "m", ["bad", "good"]))).score(answers("a"))
    with pytest.raises(ModelError, match=r"has no chat template\. Use input: pair"):
        build_scorer("reward_model", model=str(write_bert(tmp_path / "one", ["r"], [1.5]))).score(answers("a"))
    assert build_scorer("reward_model", model=str(tmp_path / "one"), input="pair").score(answers("a")) == [1.5]
    with pytest.raises(ModelError, match=r"the weights lack score\.weight: this is no trained classifier"):
        build_scorer("classifier", model=str(tiny_llama), label="LABEL_0").score(answers("a"))


def test_code_and_pickles_are_refused(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "m", ["bad", "good"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelError, match="asks for code of its own"):
        build_scorer("classifier", model=str(folder), label="good").score(answers("a"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickle weights"):
        build_scorer("classifier", model=str(folder), label="good").score(answers("a"))


def test_without_torch_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upo.rewards.models.installed", lambda name: False)
    with pytest.raises(BackendError, match=r'scorer toxicity needs PyTorch, also beside MLX.*pip install "upo\[torch\]"'):
        build_scorer("toxicity")
