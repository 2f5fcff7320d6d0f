"""The tokenizer side of a model: chat templates, token ids, the Hub's cache, and damaged files."""

import json
import shutil

import pytest

from conftest import TINY
from data.chat import decode, encode_chat, load_chat
from data.files import UserError, find_model
from data.problems import batch_prompt

MESSAGE = batch_prompt([{"problem": "What is 1 + 2?"}, {"problem": "What is 3/4 - 1/4?"}])


def test_prompts_equal_those_of_transformers(shipped):
    """Prompts are rendered or tokenized in another way than in every other engine that serves the model."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY / "model").apply_chat_template(
        [{"role": "user", "content": MESSAGE}], add_generation_prompt=True, return_dict=False)
    assert encode_chat(shipped[1], MESSAGE) == theirs


def chat_directory(path, template=None, in_config=None, eos=0, generation_eos=None, eos_token="<|end|>"):
    """A copy of the shipped tokenizer with other files around it."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_bytes((TINY / "model/tokenizer.json").read_bytes())
    (path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    settings = {"eos_token": eos_token} | ({"chat_template": in_config} if in_config else {})
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (path / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    return path


def test_the_template_is_found_in_each_of_its_places(tmp_path):
    """A template is missed, and the model gets prompts in a form that it was not trained on. The tag
    {% generation %} of training templates is text; a special token is the template's own to write."""
    text = ("{% for m in messages %}A {% generation %}{{ m.content }}{% endgeneration %} "
            "{{ eos_token }}{% endfor %}")
    named = [{"name": "default", "template": text}]
    places = [dict(template=text), dict(in_config=text), dict(in_config=named),
              dict(template=text, in_config="not this one"), {}]
    prompts = []
    for k, place in enumerate(places):
        chat = load_chat(chat_directory(tmp_path / str(k), **place))
        prompts.append(chat.tokenizer.decode(encode_chat(chat, "17"), skip_special_tokens=False))
    assert prompts == ["A 17 <|end|>"] * 4 + ["17\n\n"]


def test_eos_ids_are_the_union_of_three_files(tmp_path):
    """An id that only one file names is missed, and completions continue past their end."""
    chat = load_chat(chat_directory(tmp_path, eos=[0, 7], generation_eos=[9, 7],
                                    eos_token={"content": "<|user|>"}))
    assert chat.eos_ids == sorted({0, 7, 9, chat.tokenizer.token_to_id("<|user|>")})
    assert decode(chat, [chat.tokenizer.encode("17 Wait,").ids + [0]]) == ["17 Wait,"]


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('false') }}",
    "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{{ undefined_function() }}", "{% if %}",
    "{% for m in messages %}", "{{ 1/0 }}", "{{ nothing.at.all }}", "{{ messages[7].content }}", "\ud800",
    "{% for i in range(10**9) %}a{% endfor %}", "{% include '/etc/passwd' %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
def test_a_bad_template_is_one_sentence(tmp_path, template):
    """Code in a downloaded template runs outside the sandbox, or its errors are a traceback."""
    with pytest.raises(UserError, match="^the chat template in [^\n]*$"):
        encode_chat(load_chat(chat_directory(tmp_path, template=template)), "17")


JSON_TEXTS = ("", "{", "[]", "null", "5", '"text"', "\x00", "\ud800", "[" * 100000, '{"a":' * 50000)
TOKENIZER = (TINY / "model/tokenizer.json").read_text()
DAMAGED = [(name, text) for text in JSON_TEXTS for name in (
    "tokenizer.json", "config.json", "tokenizer_config.json", "generation_config.json")]
DAMAGED += [("tokenizer.json", TOKENIZER[:cut]) for cut in (1, 100, len(TOKENIZER) // 2, len(TOKENIZER) - 3)]
DAMAGED += [("generation_config.json", json.dumps({"eos_token_id": value})) for value in (
    "x", [1.5], True, {}, [-3], [None, "0"])]


@pytest.mark.parametrize("name, content", DAMAGED, ids=lambda value: value[:20])
def test_a_damaged_file_is_one_sentence(tmp_path, name, content):
    """A damaged download raises a traceback or is used."""
    path = chat_directory(tmp_path)
    (path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="^[^\n]+$"):
        load_chat(path)


def test_a_missing_tokenizer_or_eos_is_one_sentence(tmp_path):
    """Completions could not end, or a directory that is not a model raises a traceback."""
    with pytest.raises(UserError, match="names no eos_token"):
        load_chat(chat_directory(tmp_path, eos=None, eos_token=None))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_chat(tmp_path)


def test_a_model_comes_from_the_hub_once_it_was_downloaded(tmp_path, monkeypatch):
    """--model owner/name ignores the cache of huggingface_hub, whose layout this is; or a model that is
    neither there nor on the Hub raises a traceback."""
    import huggingface_hub

    snapshot = tmp_path / "models--bcr--tiny/snapshots/0123456789012345678901234567890123456789"
    shutil.copytree(TINY / "model", snapshot)
    (tmp_path / "models--bcr--tiny/refs").mkdir()
    (tmp_path / "models--bcr--tiny/refs/main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_model("bcr/tiny") == snapshot
    with pytest.raises(UserError, match="^--model nobody/nothing is not a directory[^\n]*$"):
        find_model("nobody/nothing")


def test_a_template_that_renders_nothing_is_refused(tmp_path):
    """The model is asked nothing, and its completions are scored as answers."""
    chat = load_chat(chat_directory(tmp_path, template="{% if false %}{{ messages }}{% endif %}"))
    with pytest.raises(UserError, match="renders nothing"):
        encode_chat(chat, "17")
