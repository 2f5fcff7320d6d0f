"""
Real models: a real chat model gives the same tokens and logits here and in transformers; chat templates as
published models have them give the same prompts; the shapes that the paper trains (without their weights) are
built as in transformers.
"""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.chat import decode, encode_chat, load_chat
from data.files import UserError
from data.problems import batch_prompt
from model import Config, Transformer, join_parts, split_parts
from rollout import generate

# ----------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct: our tokens and transformers'

PROBLEMS = [{"problem": "What is 3/4 - 1/4, as a fraction?"},
            {"problem": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts "
                        "in total does it take?"}]
MESSAGES = ["What is the capital of France?",
            "Write a short poem about the sea.",
            "What is 12345 + 67890? Think step by step.",
            "Explain what a prime number is to a child of eight.",
            "def add(a, b):\n    return a + b\n\nWrite a test for this function.",
            "Übersetze ins Englische: „Der Fuchs springt über den Zaun.“ 你好 🦊",
            batch_prompt(PROBLEMS[:1]),
            batch_prompt(PROBLEMS)]
BUDGET = 64


@pytest.fixture(scope="module")
def ours(smollm2):
    return Transformer.from_pretrained(smollm2), load_chat(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2):
    """The model and tokenizer of transformers."""
    model, report = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model, AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def greedy(ours):
    """The prompts, and our most likely completions."""
    model, chat = ours
    prompts = [encode_chat(chat, message) for message in MESSAGES]
    return prompts, generate(model, prompts, 1, BUDGET, eos_ids=chat.eos_ids, temperature=0)


def rendered_by_transformers(tokenizer, message):
    return tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True,
                                         return_dict=False)


def test_prompts_of_a_real_model_equal_transformers(ours, theirs):
    """The model is prompted with other tokens than it was trained on, so every figure of it is wrong."""
    for message in MESSAGES + [batch_prompt(PROBLEMS * 4)]:
        expected = rendered_by_transformers(theirs[1], message)
        assert encode_chat(ours[1], message) == expected
        assert message in theirs[1].decode(expected)
    assert ours[1].eos_ids == [2]
    # The tokenizer that the tests reconstruct splits numbers into digits, as SmolLM2's does.
    assert ours[1].tokenizer.encode("It cost 12345 dollars", add_special_tokens=False).tokens == [
        "It", "Ġcost", "Ġ", "1", "2", "3", "4", "5", "Ġdollars"]


def test_greedy_tokens_equal_transformers(ours, theirs, greedy):
    """The sampler (cache, positions, masks, refilling, ending at EOS) or the model differs from transformers
    on real weights. Only ties may differ: two tokens whose logits are equal up to rounding."""
    model, tokenizer = theirs
    prompts, completions = greedy
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    generated = model.generate(**batch, do_sample=False, max_new_tokens=BUDGET)
    generated = generated[:, batch["input_ids"].shape[1]:].tolist()
    ties = 0
    for prompt, completion, expected in zip(prompts, completions, generated):
        row = completion.tokens
        if tokenizer.eos_token_id in expected:
            expected = expected[:expected.index(tokenizer.eos_token_id) + 1]
        if row != expected:
            at = next((t for t, (a, b) in enumerate(zip(row, expected)) if a != b), None)
            assert at is not None, (tokenizer.decode(row), tokenizer.decode(expected))  # only one stopped
            with torch.no_grad():
                logits = model(torch.tensor([prompt + expected[:at]])).logits[0, -1]
            assert sorted(logits.topk(2).indices.tolist()) == sorted((row[at], expected[at]))
            assert abs(logits[row[at]] - logits[expected[at]]) < 1e-4
            ties += 1
    assert ties <= 1
    assert {c.truncated for c in completions} == {True, False}
    assert all(c.truncated <= (len(c.tokens) == BUDGET) for c in completions)
    # The weights are put together correctly (both sides read the same file).
    assert "Paris" in decode(ours[1], [completions[0].tokens])[0]


@torch.no_grad()
def test_logits_of_a_real_model_equal_transformers(ours, theirs, greedy):
    """The forward pass differs on real weights, whose activations are far from those of random ones, or the
    sampler's logprobs are not those of a complete forward pass."""
    for prompt, completion in list(zip(*greedy))[1::2]:
        tokens = torch.tensor([prompt + completion.tokens])
        mine, expected = ours[0](tokens), theirs[0](tokens).logits
        assert expected.std() > 1 and (mine - expected).abs().max() < 1e-4
        logprobs = torch.log_softmax(mine[0, len(prompt) - 1 : -1], -1)
        logprobs = logprobs.gather(1, tokens[0, len(prompt):, None])[:, 0]
        assert (completion.logprobs - logprobs).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------
# Chat templates, rendered by us and by transformers

LOOP = ("{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
        "{% endfor %}")
ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TEMPLATES = {
    "loopcontrols":
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}" + ASK,
    "namespace":
        "{%- set ns = namespace(last=0, seen=false) %}{% for m in messages[::-1] %}"
        "{% if m.role == 'user' and not ns.seen %}{% set ns.seen = true %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }} {{ ns.seen }}" + LOOP + ASK,
    "generation":
        "{% for m in messages %}{{ m.content }}{% generation %}{{ m.role }}<|end|>{% endgeneration %}"
        "{% endfor %}{%- if add_generation_prompt -%}{%- generation -%} said {% endgeneration %}"
        "{% endif %}",
    "raise_exception in another branch":
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + LOOP,
    "strftime_now":
        "{% if strftime_now is defined %}Today: {{ strftime_now('%d %B %Y') }}{% endif %}" + LOOP,
    "tojson":
        "{{ messages | tojson }} {{ '<é&\\'\"你>' | tojson }} {{ messages | tojson(indent=2) }}{{ {'b': "
        "'<é>', 'a': [1, none, true, 0.5]} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', "
        "':')) }}{{ {'b': 'é'} | tojson(true) }}",
    "undefined names":
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}{% if documents is not none %}"
        "{{ documents | length }}{% endif %}{% if tools is defined %}tools{% endif %}{{ bos_token }}|"
        "{% if unk_token is defined %}unk{% endif %}|{% if add_bos_token is defined %}add{% endif %}|"
        "{% if enable_thinking is defined %}think{% endif %}|{{ eos_token }}" + LOOP,
    "spaces and lines":
        "  {% for m in messages %}  \n    {%- if true %}\n  a  {{- m.content }}\n   {% endif %}\n "
        "{#- no -#}\n{% endfor %}\n\n{{ '  x  ' | trim }}\n",
    "strings and dicts":
        "{% set d = dict(a=1) %}{{ d.a }}{% for k, v in messages[0].items() %}{{ k }}={{ v }};"
        "{% endfor %}{% for m in messages %}{{ m.content.split('.')[-1].strip('\\n ').upper() }}"
        "{{ m['content'] | replace('a', 'b') }}{{ m.content is string }}"
        "{{ m.content.startswith('What') }}{{ m.tool_calls }}{{ m is mapping }}{% endfor %}"
        "{{ (messages | length - 1) ~ 'x' * 3 }}{{ messages | map(attribute='role') | join(',') }}",
    "macro":
        "{% macro turn(m, first=false) %}{{ '' if first else '\\n' }}<|start|>{{ m.role }}: "
        "{{ caller() if caller else m.content | trim }}<|end|>{% endmacro %}{% for m in messages %}"
        "{{ turn(m, loop.first) }}{% endfor %}" + ASK,
    # After those of DeepSeek-R1-Distill and Qwen3-Thinking-2507, whose prompts open the thinking part.
    "deepseek":
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
        "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
        "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
        "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
        "{% set content = message['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + content }}"
        "{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}"
        "{% endif %}",
    "qwen3":
        "{%- if tools %}\n    {{- 'tools' }}\n{%- endif %}\n"
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    "
        "{%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if ns.multi_step_tool and "
        "message.role == \"user\" and message.content is string and "
        "not(message.content.startswith('<tool_response>')) %}\n        "
        "{%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    "
        "{%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    "
        "{%- if message.content is string %}\n        {%- set content = message.content %}\n    "
        "{%- else %}\n        {%- set content = '' %}\n    {%- endif %}\n    "
        "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"
        "\n",
}


def byte_directory(path, **settings):
    """The tokenizer side of a model directory: one token per byte, and a few special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|start|>", "<|end|>", "<|begin|>", "<think>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")


MESSAGE = "  What is <b> & 'é' in \"你好\"?\n\nA. one a.\n"


def assert_rendered_alike(path):
    expected = rendered_by_transformers(AutoTokenizer.from_pretrained(path), MESSAGE)
    assert expected and encode_chat(load_chat(path), MESSAGE) == expected


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(tmp_path, name, place):
    """A model whose template uses this does not load, or is prompted in a form it was not trained on. A
    template in a file of its own replaces the one in tokenizer_config.json."""
    template, in_file = TEMPLATES[name], place == "chat_template.jinja"
    # bos_token is null in Qwen's files, add_bos_token is true in DeepSeek's.
    byte_directory(tmp_path, bos_token=None, add_bos_token=True, unk_token=None,
                   chat_template="old" + LOOP if in_file else template)
    if in_file:
        (tmp_path / place).write_text(template, encoding="utf-8")
    assert_rendered_alike(tmp_path)


def test_special_tokens_as_objects_and_named_templates(tmp_path):
    """Special tokens that transformers 4 writes as objects appear as their Python text, or another template
    than the default one of several is used."""
    token = {"__type": "AddedToken", "content": "<|begin|>", "lstrip": False, "normalized": True,
             "rstrip": False, "single_word": False}
    default = "{{ bos_token }}" + LOOP + "{{ eos_token }}" + ASK
    byte_directory(tmp_path, bos_token=token, eos_token=token | {"content": "<|end|>"}, unk_token=None,
                   chat_template=[{"name": "tool_use", "template": "tool" + LOOP},
                                  {"name": "default", "template": default}])
    assert_rendered_alike(tmp_path)


@pytest.mark.parametrize("template, word", [
    ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
    *((template, "template") for template in (
        "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for %}", "{{ messages[0].x.y }}",
        "{{ 'a' + none }}", "{{ 1 // 0 }}", "{% for i in range(1000000000) %}{% endfor %}"))])
def test_template_that_fails(tmp_path, template, word):
    """A downloaded template reaches Python's internals or changes our data, or a broken one ends in a
    traceback."""
    byte_directory(tmp_path, chat_template=template)
    with pytest.raises(UserError, match=word):
        encode_chat(load_chat(tmp_path), MESSAGE)


def test_truncation_and_padding_in_tokenizer_json_are_off(tmp_path):
    """A tokenizer.json that was saved with truncation or padding on, as fine-tuned models often are, silently
    cuts or fills every prompt."""
    byte_directory(tmp_path, chat_template=LOOP + ASK)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert_rendered_alike(tmp_path)


# ----------------------------------------------------------------------------------------------
# Published shapes: config.json of the models that the paper trains, and of their families

QWEN2_1_5B = {  # what two of them share
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936}
SHAPES = {  # name: (parameters, config.json)
    # huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B; JustRL-DeepSeek-1.5B has its architecture
    "DeepSeek-R1-Distill-Qwen-1.5B": (1_777_088_000, QWEN2_1_5B | {
        "eos_token_id": 151643, "max_position_embeddings": 131072, "rope_theta": 10000,
        "sliding_window": 4096, "tie_word_embeddings": False, "transformers_version": "4.44.0",
        "use_mrope": False}),
    # huggingface.co/Qwen/Qwen3-4B-Thinking-2507
    "Qwen3-4B-Thinking-2507": (4_022_468_096, {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
        "max_position_embeddings": 262144, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 5000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936}),
    # huggingface.co/Qwen/Qwen2.5-1.5B-Instruct
    "Qwen2.5-1.5B-Instruct": (1_543_714_304, QWEN2_1_5B | {
        "eos_token_id": 151645, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "transformers_version": "4.43.1"}),
    # huggingface.co/meta-llama/Llama-3.2-1B-Instruct
    "Llama-3.2-1B": (1_235_814_400, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": True,
        "vocab_size": 128256}),
}


def transformers_config(path, hf):
    """transformers' reading of a config.json."""
    (path / "config.json").write_text(json.dumps(hf))
    return AutoConfig.from_pretrained(path)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(tmp_path, name):
    """A model that the paper trains, or one of its family, is refused or built in another shape than its
    checkpoint's (on the meta device: shapes without numbers)."""
    parameters, hf = SHAPES[name]
    with torch.device("meta"):
        model = Transformer(Config.from_hf(hf))
        expected = AutoModelForCausalLM.from_config(transformers_config(tmp_path, hf)).state_dict()
    assert sum(p.numel() for p in model.parameters()) == parameters
    if hf["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert {n: p.shape for n, p in split_parts(model).items()} == {n: p.shape for n, p in expected.items()}


def random_weights(model, rng):
    """Uniform weights, far from 0 in biases and from 1 in norms."""
    weights = {}
    for name, p in split_parts(model).items():
        scale = p.shape[-1] ** -0.5 if p.dim() > 1 and "embed" not in name else 1
        spread = 3**0.5 * scale if p.dim() > 1 else 0.5
        weights[name] = torch.from_numpy(rng.random(p.shape, dtype=np.float32)).sub_(0.5).mul_(2 * spread)
        if name.endswith("norm.weight"):
            weights[name] += 1
    return weights


@pytest.mark.parametrize("name", SHAPES)
def test_slices_of_published_shapes_equal_transformers(tmp_path, name):
    """Two layers of the full width (with the published head sizes, epsilon and RoPE, at the first and last
    positions) compute something else than in transformers. The vocabulary is reduced to 4,096, which only
    removes rows of the embedding and the head."""
    hf = SHAPES[name][1] | {"num_hidden_layers": 2, "vocab_size": 4096}
    config = transformers_config(tmp_path, hf)
    with torch.device("meta"):
        model = Transformer(Config.from_hf(hf))
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = np.random.default_rng(0)
    weights = random_weights(model, rng)
    model.load_state_dict(dict(join_parts(weights.items())), strict=True, assign=True)
    if hf["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # not on the meta device
    length, last = 48, hf["max_position_embeddings"]
    tokens = torch.from_numpy(rng.integers(hf["vocab_size"], size=(2, length)))
    positions = torch.stack((torch.arange(length), torch.arange(last - length, last)))
    with torch.no_grad():
        mine = model(tokens, positions=positions)
        expected = theirs.eval()(tokens, position_ids=positions).logits
    scale = expected.std()
    assert scale > 0.1 and not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert (mine - expected).abs().max() / scale < 1e-4


@pytest.mark.parametrize("words, changes", [
    *((("model_type", kind), {"model_type": kind}) for kind in ("mistral", "qwen3_moe", "gemma2", "phi3")),
    # Qwen's own model card recommends this for long texts.
    (("RoPE", "yarn"), {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 32768}}),
    (("RoPE", "dynamic"), {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    (("RoPE", "longrope"), {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64,
                                             "long_factor": [2.0] * 64}}),
    (("sliding",), {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}),
    (("sliding",), {"sliding_window": 4096,
                    "layer_types": ["full_attention"] * 28 + ["sliding_attention"] * 8})])
def test_published_kinds_that_are_refused(words, changes):
    """A model of a published kind that is not supported runs with wrong logits and without an error."""
    with pytest.raises(UserError) as caught:
        Config.from_hf(SHAPES["Qwen3-4B-Thinking-2507"][1] | changes)
    assert all(word in str(caught.value) for word in words), caught.value
