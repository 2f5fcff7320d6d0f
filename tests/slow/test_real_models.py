"""
Real models: a real chat model gives the same tokens and logits here and in transformers; chat
templates as published models have them give the same prompts; the shapes that the paper trains are
computed as in transformers.
"""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.chat import decode, encode_chat, load_chat
from data.problems import batch_prompt
from model import Config, Transformer
from rollout import generate

# ----------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct: our tokens and transformers'

PROBLEMS = [{"problem": "What is 3/4 - 1/4, as a fraction?"},
            {"problem": "A robe takes 2 bolts of blue fiber and half that of white.  How many?"}]
MESSAGES = ["What is the capital of France?",
            "What is 12345 + 67890? Think step by step.",
            "def add(a, b):\n    return a + b\n\nWrite a test for this function.",
            "Übersetze ins Englische: „Der Fuchs springt über den Zaun.“ 你好 🦊",
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
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False)


def test_prompts_of_a_real_model_equal_transformers(ours, theirs):
    """The model is prompted with other tokens than it was trained on, so every figure is wrong."""
    for message in MESSAGES:
        assert encode_chat(ours[1], message) == rendered_by_transformers(theirs[1], message)
    assert ours[1].eos_ids == [2]


@torch.no_grad()
def test_greedy_tokens_equal_transformers(ours, theirs, greedy):
    """The sampler (cache, positions, masks, refilling, ending at EOS) or the model differs from
    transformers on real weights. Only ties may differ: two tokens with equal logits."""
    ties = 0
    for prompt, completion in zip(*greedy):
        tokens = torch.tensor([prompt])
        expected = theirs[0].generate(tokens, do_sample=False, max_new_tokens=BUDGET)
        expected = expected[0, len(prompt):].tolist()
        assert completion.truncated == (expected[-1] != 2)
        if completion.tokens != expected:
            pairs = zip(completion.tokens, expected)
            at, pair = next((t, pair) for t, pair in enumerate(pairs) if pair[0] != pair[1])
            logits = theirs[0](torch.tensor([prompt + expected[:at]])).logits[0, -1]
            assert sorted(logits.topk(2).indices.tolist()) == sorted(pair)
            assert abs(logits[pair[0]] - logits[pair[1]]) < 1e-4
            ties += 1
    assert ties <= 1
    assert {completion.truncated for completion in greedy[1]} == {True, False}
    assert "Paris" in decode(ours[1], [greedy[1][0].tokens])[0]


@torch.no_grad()
def test_logits_of_a_real_model_equal_transformers(ours, theirs, greedy):
    """The forward pass differs on real weights, whose activations are far from those of random
    ones, or the sampler's logprobs are not those of a complete forward pass."""
    for prompt, completion in list(zip(*greedy))[::2]:
        tokens = torch.tensor([prompt + completion.tokens])
        mine = ours[0](tokens)
        expected = theirs[0](tokens).logits
        assert expected.std() > 1 and (mine - expected).abs().max() < 1e-4
        logprobs = torch.log_softmax(mine[0, len(prompt) - 1 : -1], -1)
        logprobs = logprobs.gather(1, tokens[0, len(prompt):, None])[:, 0]
        assert (completion.logprobs - logprobs).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------------
# Chat templates, rendered by us and by transformers

LOOP = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TEMPLATES = {
    "loopcontrols":
        "{% for m in messages[::-1] %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}" + ASK,
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
        "{% if enable_thinking is defined %}think{% endif %}|{{ eos_token }}" + LOOP,
    "spaces and lines":
        "  {% for m in messages %}  \n    {%- if true %}\n  a  {{- m.content }}\n   {% endif %}\n "
        "{#- no -#}\n{% endfor %}\n\n{{ '  x  ' | trim }}\n",
    # After that of DeepSeek-R1-Distill, whose prompts open the thinking part.
    "deepseek":
        "{% set ns = namespace(system_prompt='') %}{%- for m in messages %}"
        "{%- if m['role'] == 'system' %}{% set ns.system_prompt = m['content'] %}{%- endif %}"
        "{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for m in messages %}"
        "{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{%- endif %}"
        "{%- if m['role'] == 'assistant' and m['content'] is not none %}"
        "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] }}{%- endif %}{%- endfor -%}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
}


def byte_directory(path, **settings):
    """The tokenizer side of a model directory: one token per byte, and a few special ones. The file
    was saved with truncation and padding on, as those of fine-tuned models often are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|start|>", "<|end|>", "<|begin|>", "<think>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(path / "tokenizer.json"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(tmp_path, name):
    """A model whose template uses this does not load, or is prompted in a form it was not trained
    on; special tokens that transformers 4 writes as objects appear as their Python text."""
    begin = {"__type": "AddedToken", "content": "<|begin|>", "lstrip": False, "normalized": True,
             "rstrip": False, "single_word": False}
    # add_bos_token is true in DeepSeek's files, unk_token is null in Qwen's.
    byte_directory(tmp_path, bos_token=begin, add_bos_token=True, unk_token=None)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    message = "  What is <b> & 'é' in \"你好\"?\n\nA. one a.\n"
    expected = rendered_by_transformers(AutoTokenizer.from_pretrained(tmp_path), message)
    assert len(expected) > 30 and encode_chat(load_chat(tmp_path), message) == expected


# ----------------------------------------------------------------------------------------------
# Published shapes: config.json of the models that the paper trains, and of their families

QWEN2_1_5B = {  # what two of them share
    "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960, "model_type": "qwen2",
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "use_sliding_window": False, "vocab_size": 151936}
SHAPES = {  # name on the Hub: (parameters, config.json)
    # JustRL-DeepSeek-1.5B has the same.
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1_777_088_000, QWEN2_1_5B | {
        "max_position_embeddings": 131072, "rope_theta": 10000, "sliding_window": 4096,
        "tie_word_embeddings": False}),
    "Qwen/Qwen3-4B-Thinking-2507": (4_022_468_096, {
        "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
        "intermediate_size": 9728, "max_position_embeddings": 262144, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936}),
    "Qwen/Qwen2.5-1.5B-Instruct": (1_543_714_304, QWEN2_1_5B | {
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True}),
    "meta-llama/Llama-3.2-1B-Instruct": (1_235_814_400, {
        "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": True, "vocab_size": 128256}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_equal_transformers(tmp_path, name):
    """A model that the paper trains, or one of its family, is refused, built in another shape, or
    computes something else than in transformers: two layers of the full width, at the first and
    last positions, with a vocabulary of 4,096, which only removes rows."""
    parameters, hf = SHAPES[name]
    with torch.device("meta"):  # shapes without numbers
        model = Transformer(Config.from_hf(hf))
    assert sum(p.numel() for p in model.parameters()) == parameters
    small = hf | {"num_hidden_layers": 2, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(small))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    for p in theirs.parameters():
        scale = 1 if p.dim() == 1 else p.shape[-1] ** -0.5
        torch.nn.init.uniform_(p, -scale, scale)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text(json.dumps(small))  # as it is published
    mine = Transformer.from_pretrained(tmp_path / "theirs")
    last = hf["max_position_embeddings"]
    tokens = torch.randint(4096, (2, 48))
    positions = torch.stack((torch.arange(48), torch.arange(last - 48, last)))
    with torch.no_grad():
        logits = mine.head(mine.hidden(tokens, mine.rotations(positions)))
        expected = theirs(tokens, position_ids=positions).logits
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()
