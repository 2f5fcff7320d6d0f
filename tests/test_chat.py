"""The tokenizer side of a model: templates, token ids, problems that fit, and the Hub's cache."""

import datetime
import shutil

import huggingface_hub
import pytest
from tokenizers import Tokenizer

from conftest import TINY, prompt_of_transformers
from data.chat import decode, encode_chat, fitting_problems, load_chat
from data.files import UserError, find_model, read_json, write_json
from data.problems import batch_prompt

TEMPLATES = {
    "loopcontrols":
        "{% for m in messages[::-1] %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    "generation":
        "{% for m in messages %}{{ m.content }}{% generation %}{{ m.role }}<|end|>"
        "{% endgeneration %}{% endfor %}{%- generation -%} said {% endgeneration %}",
    "tojson":
        "{{ messages | tojson }} {{ '<é&\\'\"你>' | tojson }} {{ messages | tojson(indent=2) }}"
        "{{ {'b': '<é>', 'a': [1, none, true, 0.5]} | tojson(sort_keys=true, ensure_ascii=true) }}",
    "undefined names":
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}{% if documents is not none %}"
        "{{ documents | length }}{% endif %}{% if tools is defined %}tools{% endif %}"
        "{{ bos_token }}|{% if unk_token is defined %}unk{% endif %}|"
        "{% if add_bos_token is defined %}add{% endif %}|"
        "{% if enable_thinking is defined %}think{% endif %}|{{ eos_token }}"
        "{{ messages[0].content }}",
    "spaces and lines":
        "  {% for m in messages %}  \n    {%- if true %}\n  a  {{- m.content }}\n   {% endif %}\n "
        "{#- no -#}\n{% endfor %}\n\n{{ '  x  ' | trim }}\n"}


@pytest.mark.parametrize("name", ["shipped", *TEMPLATES])
def test_prompts_equal_those_of_transformers(tmp_path, name):
    """Prompts are rendered or tokenized in another way than in the engines that serve the model;
    special tokens that transformers 4 writes as objects appear as their Python text; or a tokenizer
    that was saved with truncation and padding on cuts or pads."""
    path = shutil.copytree(TINY / "model", tmp_path / "model")
    if name != "shipped":
        begin = {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "normalized": True,
                 "rstrip": False, "single_word": False}
        # add_bos_token is true in DeepSeek's files, unk_token is null in Qwen's.
        settings = {"bos_token": begin, "add_bos_token": True, "unk_token": None}
        config = read_json(path / "tokenizer_config.json")
        write_json(path / "tokenizer_config.json", config | settings)
        (path / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=200)
        tokenizer.save(str(path / "tokenizer.json"))
    message = "  What is <b> & 'é' in \"你好\"?\n\nA. one a.\n"
    ids = encode_chat(load_chat(path), message)
    assert len(ids) > 8 and ids == prompt_of_transformers(path, message)


def chat_directory(path, template=None, in_config=None, eos=0, more_eos=None, eos_token="<|end|>"):
    """A copy of the shipped tokenizer with other files around it."""
    shutil.copy(TINY / "model/tokenizer.json", path)
    write_json(path / "config.json", {"eos_token_id": eos})
    write_json(path / "generation_config.json", {"eos_token_id": more_eos})
    settings = {"eos_token": eos_token, "chat_template": in_config}
    write_json(path / "tokenizer_config.json", settings)
    if template:
        (path / "chat_template.jinja").write_text(template)
    return path


def rendered(path, **files):
    chat = load_chat(chat_directory(path, **files))
    return chat.tokenizer.decode(encode_chat(chat, "17"), skip_special_tokens=False)


def test_the_template_is_found_in_each_of_its_places(tmp_path):
    """A template is missed, and the model gets prompts in a form that it was not trained on; named
    templates without a default were sent as plain text (llama.cpp#6484)."""
    text = "{{ messages[0].content }} A {{ eos_token }}"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    assert rendered(tmp_path) == "17\n\n"
    for template in (text, named):
        assert rendered(tmp_path, in_config=template) == "17 A <|end|>"
    with pytest.raises(UserError, match="none is called default"):
        rendered(tmp_path, in_config=named[:1])
    assert rendered(tmp_path, template=text, in_config="not this one") == "17 A <|end|>"


def test_the_date_of_a_template_is_that_of_the_run(tmp_path):
    """A run that is resumed tomorrow continues with other prompts (sglang#3296)."""
    path = chat_directory(tmp_path, template="{{ strftime_now('%d %B %Y') }}")
    chat = load_chat(path, datetime.datetime(2024, 7, 26))
    assert decode(chat, [encode_chat(chat, "17")]) == ["26 July 2024"]
    assert rendered(path, template="{{ strftime_now('%Y') }}") == f"{datetime.date.today():%Y}"


def test_template_options_reach_the_template(tmp_path):
    """--template-options '{"enable_thinking": false}' is not passed on, or is refused with a
    traceback when it is no JSON object."""
    path = chat_directory(tmp_path, template="{% if not thinking %}short{% endif %}{{ eos_token }}")
    for options, text in (("", "short"), ('{"thinking": true}', "")):
        chat = load_chat(path, options=options)
        assert decode(chat, [encode_chat(chat, "17")]) == [text]
    for options in ("thinking=false", "[1]", "{"):
        with pytest.raises(UserError, match="^--template-options should be a JSON object[^\n]*$"):
            load_chat(path, options=options)


def test_eos_ids_are_the_union_of_three_files(tmp_path):
    """An id that only one file names is missed, and completions continue past their end."""
    chat = load_chat(chat_directory(
        tmp_path, eos=[0, 7], more_eos=[9, 7], eos_token={"content": "<|user|>"}))
    assert chat.eos_ids == sorted({0, 7, 9, chat.tokenizer.token_to_id("<|user|>")})
    assert decode(chat, [chat.tokenizer.encode("17 Wait,").ids + [0]]) == ["17 Wait,"]
    with pytest.raises(UserError, match="names no eos_token"):
        load_chat(chat_directory(tmp_path, eos=None, eos_token=None))


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}", "{% if %}"])
def test_a_bad_template_is_one_sentence(tmp_path, template):
    """Code in a downloaded template runs outside the sandbox, or its errors are a traceback."""
    with pytest.raises(UserError, match="^the chat template in [^\n]*$"):
        rendered(tmp_path, template=template)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_what_does_not_fit_is_found_before_anything_is_sampled(shipped, n):
    """A run ends in the middle at one long prompt, or leaves out problems that fit. Prompts of any
    N that are kept fit, and one position less would be too few."""
    chat = shipped[1]
    problems = [{"problem": "1 + " * i + "1", "where": f"line {i}"} for i in range(50)][::-1]
    longest = len(encode_chat(chat, batch_prompt(problems[10 : 10 + n])))  # 39, 38, ... terms
    sizes = [(1, 100), (n, 100)]
    kept = fitting_problems(chat, problems, sizes, longest + 100, skip_long=True)
    assert kept == problems[10:]
    with pytest.raises(UserError, match="^line 39: .* budget of 100 and .* --skip-long$"):
        fitting_problems(chat, kept, sizes, longest + 99, skip_long=False)


def test_a_model_comes_from_the_hub_once_it_was_downloaded(tmp_path, monkeypatch):
    """--model owner/name ignores the cache of huggingface_hub, whose layout this is; or a model
    that is neither there nor on the Hub raises a traceback."""
    cached = tmp_path / "models--bcr--tiny"
    snapshot = shutil.copytree(TINY / "model", cached / "snapshots" / ("0123456789" * 4))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_model("bcr/tiny") == snapshot
    with pytest.raises(UserError, match="^--model nobody/nothing is not a directory[^\n]*$"):
        find_model("nobody/nothing")
