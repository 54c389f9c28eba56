"""Token ids: prompts as inference makes them, completions up to the token that ends their turn, for several kinds of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from upo.data.tokenizer import load_tokenizer
from upo.errors import ModelError

# Of the tiny tokenizer: specials 0, 1, 2 = <|endoftext|>, <|im_start|>, <|im_end|>; bytes in their printable order from 3; then merges.
START, END, NEWLINE = 1, 2, 201
USER, ASSISTANT, THE, YOU, ANSWER, TH = 261, 269, 277, 285, 307, 276
H, I, T, O, W, A, E = 74, 75, 86, 81, 89, 67, 71


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def change(folder: Path, name: str, **values) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


def test_conversation(tokenizer):
    prompt = [user("hi the")]
    assert tokenizer.prompt_ids(prompt).tolist() == [START, USER, NEWLINE, H, I, THE, END, NEWLINE, START, ASSISTANT, NEWLINE]
    completion = tokenizer.completion_ids(prompt, says("to you"))
    assert completion.tolist() == [T, O, YOU, END], "the line break after the end of turn is not the model's to write"
    assert completion.dtype == "int32"
    assert tokenizer.decode(completion) == "to you"


def test_string(tokenizer):
    assert tokenizer.prompt_ids("what the").tolist() == [W, H, A, T, THE]
    assert tokenizer.completion_ids("what the", " answer").tolist() == [ANSWER, END]


def test_merge_across_the_border_never_changes_the_prompt(tokenizer):
    assert tokenizer.prompt_ids("what th").tolist() == [W, H, A, T, TH]
    assert tokenizer.completion_ids("what th", "e").tolist() == [E, END]


def test_string_that_spells_out_its_end_gets_no_second_one(tokenizer):
    assert tokenizer.completion_ids("what the", " answer<|im_end|>").tolist() == [ANSWER, END]


def test_end_tokens(tokenizer, make_tiny_llama):
    assert (tokenizer.eos_ids, tokenizer.turn_end, tokenizer.eos, tokenizer.pad_id) == ((0, 2), END, END, 0)
    folder = change(make_tiny_llama(), "tokenizer_config.json", eos_token="<|endoftext|>")
    (folder / "generation_config.json").unlink()
    change(folder, "config.json", eos_token_id=0)
    other = load_tokenizer(folder)  # a base model's end of text, and a template that ends turns otherwise: generation must stop at both
    assert (other.eos_ids, other.turn_end, other.eos) == ((0, 2), END, 0)
    assert other.completion_ids([user("hi")], says("to")).tolist() == [T, O, END]
    assert other.completion_ids("hi", "to").tolist() == [T, O, 0]


def test_bos_in_front_of_strings_and_nothing_behind_them(make_tiny_llama):
    folder = make_tiny_llama()
    special = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}]
    ids = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<|im_start|>", START), ("<|im_end|>", END))}
    change(folder, "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": special, "pair": special, "special_tokens": ids})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.prompt_ids("hi").tolist() == [START, H, I]
    assert tokenizer.completion_ids("hi", " the").tolist() == [THE, END]
    assert tokenizer.prompt_ids([user("hi")])[:2].tolist() == [START, USER], "the template writes its own beginning"


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + prefix }}{% endif %}"
)


@pytest.mark.parametrize("prefix", ["", "<think>\n"])
def test_template_that_strips_thinking_does_not_strip_the_completion(make_tiny_llama, prefix):
    template = THINKING.replace("prefix", repr(prefix))
    tokenizer = load_tokenizer(change(make_tiny_llama(), "tokenizer_config.json", chat_template=template))
    completion = tokenizer.completion_ids([user("hi")], says("I</think>the"))
    assert completion[-1] == END
    assert tokenizer.decode(completion) == "I</think>the"


@pytest.mark.parametrize(
    ("after", "turn_end", "ids"),
    [
        (" <|endoftext|>", 0, [T, O, 223, 0]),  # Llama 2 writes a space before its end
        ("<|im_end|>\n<|endoftext|>", END, [T, O, END]),
        ("", END, [T, O, END]),  # no end in the template: the tokenizer's end of text
    ],
)
def test_end_of_turn_is_read_from_the_template(make_tiny_llama, after, turn_end, ids):
    template = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + " + repr(after) + " }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    tokenizer = load_tokenizer(change(make_tiny_llama(), "tokenizer_config.json", chat_template=template))
    assert tokenizer.turn_end == turn_end
    assert tokenizer.completion_ids([user("hi")], says("to")).tolist() == ids


def test_a_template_that_writes_the_date_always_writes_the_same(make_tiny_llama):
    template = "\n{{ strftime_now('%d %b %Y, %Y-%m-%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = load_tokenizer(change(make_tiny_llama(), "tokenizer_config.json", chat_template=template))
    assert tokenizer.decode(tokenizer.prompt_ids([user(" hi")])) == "\n26 Jul 2024, 2024-07-26 hi"


def test_tools_reach_the_template(make_tiny_llama):
    template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = load_tokenizer(change(make_tiny_llama(), "tokenizer_config.json", chat_template=template))
    tools = [{"name": "search"}]
    assert tokenizer.decode(tokenizer.prompt_ids([user(" hi")], tools)) == "search hi"
    assert tokenizer.decode(tokenizer.prompt_ids([user(" hi")])) == " hi", "the remembered prompt is another one"
    assert tokenizer.completion_ids([user(" hi")], says("to"), tools).tolist() == [T, O, END]


def test_tool_call_that_the_template_leaves_out_is_refused(tokenizer):
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]
    with pytest.raises(ModelError, match="nothing of the completion is left in tokens; its chat template may leave out tool calls"):
        tokenizer.completion_ids([user("hi")], call)


def test_sentencepiece_fragment_begins_without_a_space(tmp_path, tiny_llama):
    """"a b" + "cd" where "bc" would merge: the completion is "cd", not " cd"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {t: i for i, t in enumerate(["</s>", "▁", "a", "b", "c", "d", "\n", "bc"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c")]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prompt_ids("a b").tolist() == [1, 2, 1, 3]
    assert tokenizer.completion_ids("a b", "cd").tolist() == [4, 5, 0]
    assert tokenizer.completion_ids("a b", " cd").tolist() == [1, 4, 5, 0]


def test_hash_follows_what_changes_tokens_and_nothing_else(make_tiny_llama):
    same = [load_tokenizer(make_tiny_llama()).hash for _ in range(2)]
    assert same[0] == same[1]
    assert load_tokenizer(change(make_tiny_llama(), "tokenizer_config.json", local_files_only=False)).hash == same[0]
    others = [
        change(make_tiny_llama(), "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}"),
        change(make_tiny_llama(), "generation_config.json", eos_token_id=2),
        change(make_tiny_llama(), "tokenizer.json", normalizer={"type": "Lowercase"}),
    ]
    assert len({same[0], *(load_tokenizer(folder).hash for folder in others)}) == 4


def test_no_chat_template(make_tiny_llama):
    tokenizer = load_tokenizer(change(make_tiny_llama(), "tokenizer_config.json", chat_template=None))
    assert not tokenizer.has_template
    assert tokenizer.completion_ids("hi", "to").tolist() == [T, O, END]
    with pytest.raises(ModelError, match=r"no chat template, but the data holds conversations\. Use the model's instruct version, put a chat_template\.jinja"):
        tokenizer.prompt_ids([user("hi")])


def test_template_that_refuses(make_tiny_llama):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = load_tokenizer(change(make_tiny_llama(), "tokenizer_config.json", chat_template=template))
    with pytest.raises(ModelError, match=r"its chat template refuses turns of user, user \(roles must alternate\); change the rows or the model\."):
        tokenizer.prompt_ids([user("a"), user("b")])


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_with_code_is_refused(make_tiny_llama):
    (folder := make_tiny_llama()).joinpath("x.py").write_text("raise SystemExit('this code was run')")
    assert load_tokenizer(change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "x.Y"]})).has_template  # transformers has its class
    change(folder, "tokenizer_config.json", tokenizer_class="Own")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: asks for code of its own \(auto_map\), which is never run"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("name", "message"), [("tokenizer.json", "the tokenizer cannot be loaded"), ("tokenizer_config.json", "not readable as JSON")])
def test_broken_files(make_tiny_llama, name, message):
    folder = make_tiny_llama()
    (folder / name).write_text('{"a": ')
    with pytest.raises(ModelError, match=message):
        load_tokenizer(folder)


def test_no_end_of_text_token(make_tiny_llama):
    folder = change(make_tiny_llama(), "tokenizer_config.json", eos_token=None)
    change(folder, "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"no end-of-text token in tokenizer_config\.json, generation_config\.json or config\.json; add eos_token"):
        load_tokenizer(folder)


def test_instruct_model(smollm2):
    tokenizer = load_tokenizer(smollm2)
    prompt = [user("Hi")]
    text = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\nuser\nHi\nassistant\n"
    assert tokenizer.decode(tokenizer.prompt_ids(prompt)) == text
    assert tokenizer.completion_ids(prompt, says("Hello you")).tolist() == [19556, 346, 2]
