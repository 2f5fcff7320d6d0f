"""A real chat model gives the same tokens and logits here and in transformers, and is trained; the
shapes that the paper trains are computed as in transformers."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bcr
from conftest import metrics_of, prompt_of_transformers, status_of
from data.chat import decode, encode_chat, load_chat
from data.files import write_json, write_lines
from model import Config, Transformer
from rollout import generate
from tests.bench.scale import CONFIGS

MESSAGES = ["What is the capital of France?",
            "def add(a, b):\n    return a + b\n\nWrite a test for this function.",
            "Übersetze ins Englische: „Der Fuchs springt über den Zaun.“ 你好 🦊"]
BUDGET = 48


@torch.no_grad()
def test_a_real_model_answers_as_in_transformers(smollm2):
    """The model is prompted with other tokens than it was trained on; the sampler (cache,
    positions, masks, ending at EOS) or the forward pass differs on real weights, whose activations
    are far from those of random ones; or the sampler's logprobs are not those of a complete forward
    pass. Only ties may differ: two tokens with equal logits."""
    model = Transformer.from_pretrained(smollm2)
    chat = load_chat(smollm2)
    other, report = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()) and chat.eos_ids == [2]
    prompts = [encode_chat(chat, message) for message in MESSAGES]
    assert prompts == [prompt_of_transformers(smollm2, message) for message in MESSAGES]
    completions = generate(model, prompts, 1, BUDGET, eos_ids=chat.eos_ids, temperature=0)
    assert {completion.truncated for completion in completions} == {True, False}
    assert "Paris" in decode(chat, [completions[0].tokens])[0]
    for prompt, c in zip(prompts, completions):
        tokens = torch.tensor([prompt + c.tokens])
        logits = model(tokens)
        expected = other(tokens).logits
        assert expected.std() > 1 and (logits - expected).abs().max() < 1e-4
        logits = expected[0, len(prompt) - 1 : -1]
        taken = torch.tensor(c.tokens)[:, None]
        assert (logits.max(-1).values - logits.gather(1, taken)[:, 0]).max() < 1e-4  # the likeliest
        logprobs = torch.log_softmax(logits, -1).gather(1, taken)[:, 0]
        assert (c.logprobs - logprobs).abs().max() < 1e-4


# The model rarely solves a problem within a few tokens. This reward differs between samples.
REWARD = """
def score(completion, golds):
    return [min(1.0, sum(map(str.isdigit, completion)) / 20)] * len(golds)
"""


def test_a_training_step_of_a_real_chat_model(smollm2, tmp_path):
    """--model with another checkpoint than the shipped one: prompts, end tokens, gradients or the
    saved model fail."""
    problems = [{"problem": f"Mia has {a} apples and buys 4 more. How many apples has she?",
                 "answer": str(a + 4)} for a in range(3, 12)]
    write_lines(tmp_path / "data.jsonl", problems)
    (tmp_path / "mine.py").write_text(REWARD)
    out = tmp_path / "out"
    assert status_of(
        bcr.main, "--model", smollm2, "--data", tmp_path / "data.jsonl", "--reward",
        tmp_path / "mine.py", "--n", 2, "--budget", 40, "--steps", 1, "--groups", 1, "--samples", 4,
        "--eval-data", tmp_path / "data.jsonl", "--eval-n", 2, "--eval-problems", 2,
        "--eval-budget", 40, "--out", out) == 0
    (m,) = metrics_of(out)
    assert 0 < m["reward"] < 1 and m["grad_norm"] > 0 and m["logprob_gap_max"] < 1e-3
    before, after = (load_file(path / "model.safetensors") for path in (smollm2, out / "model"))
    assert before.keys() == after.keys()
    assert any((before[name].float() - after[name].float()).abs().max() > 1e-6 for name in before)
    assert AutoTokenizer.from_pretrained(out / "model").chat_template


WINDOW = {"hidden_act": "silu", "use_sliding_window": False, "rms_norm_eps": 1e-06}
SHAPES = {  # of the models that the paper trains, and of Llama 3.2: (parameters, config.json)
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1_777_088_000, CONFIGS[
        "hbx/JustRL-DeepSeek-1.5B"] | WINDOW | {"rope_theta": 10000, "sliding_window": 4096}),
    "Qwen/Qwen3-4B-Thinking-2507": (4_022_468_096, CONFIGS[
        "Qwen/Qwen3-4B-Thinking-2507"] | WINDOW | {"rope_theta": 5000000, "sliding_window": None}),
    "meta-llama/Llama-3.2-1B-Instruct": (1_235_814_400, {
        "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": True, "vocab_size": 128256})}


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
    write_json(tmp_path / "config.json", small)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    for p in theirs.parameters():
        scale = 1 if p.dim() == 1 else p.shape[-1] ** -0.5
        torch.nn.init.uniform_(p, -scale, scale)
    theirs.save_pretrained(tmp_path / "theirs")
    write_json(tmp_path / "theirs/config.json", small)  # as it is published
    mine = Transformer.from_pretrained(tmp_path / "theirs")
    last = hf["max_position_embeddings"]
    tokens = torch.randint(4096, (2, 48))
    positions = torch.stack((torch.arange(48), torch.arange(last - 48, last)))
    with torch.no_grad():
        logits = mine.head(mine.hidden(tokens, mine.rotations(positions)))
        expected = theirs(tokens, position_ids=positions).logits
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()
