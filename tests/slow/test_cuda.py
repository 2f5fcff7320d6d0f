"""What runs on a CUDA device (skipped without one): the completions of the CPU, CUDA graphs that
change nothing, and a training step of the paper's shape in the memory that README names."""

import numpy as np
import pytest
import torch

import bcr
import rollout
from conftest import random_model
from model import Config, Transformer
from rollout import generate
from tests.bench.scale import CONFIGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PROMPTS = [[5, 9, 60, 2, 8], [7] * 9, [3], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [4, 40]]


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def master_weights(model):
    if model.dtype == torch.float32:
        return list(model.parameters())
    return [p.detach().float().requires_grad_() for p in model.parameters()]


def rows_of(prompts, completions):
    """Rows to learn from, with a different advantage for each completion."""
    samples, values = len(completions) // len(prompts), np.linspace(-1, 1, len(completions))
    return [bcr.Row(prompts[r // samples], c.tokens, c.logprobs, np.full(len(c.tokens), values[r]))
            for r, c in enumerate(completions)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_the_cpu(kind):
    """A kernel computes something else than the CPU's: masks, rounding of shapes, graphs."""
    model = random_model(kind)
    expected = generate(model, PROMPTS, 2, 60, eos_ids=[0], temperature=0)
    ours = generate(model.to("cuda"), PROMPTS, 2, 60, eos_ids=[0], temperature=0, max_rows=7)
    assert tokens_of(ours) == tokens_of(expected)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-3, rtol=1e-3)


def test_graphs_change_nothing(monkeypatch):
    """A graph was recorded with another step's sizes, or writes where the step does not."""
    model = random_model().to("cuda")
    settings = dict(eos_ids=[3, 5], temperature=1.0, seed=5, max_rows=64)
    with_graphs = generate(model, PROMPTS, 16, 80, **settings)
    monkeypatch.setitem(rollout.WRAPPERS, "cuda", lambda step: step)
    assert tokens_of(with_graphs) == tokens_of(generate(model, PROMPTS, 16, 80, **settings))


@pytest.mark.parametrize("dtype, gap", [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_the_trainer_sees_the_distribution_that_was_sampled(dtype, gap):
    """Attention one token at a time and attention over complete rows, two kernels, do not agree."""
    model = random_model().to("cuda", dtype)
    master = master_weights(model)
    completions = generate(model, PROMPTS, 8, 60, eos_ids=[0], seed=1)
    rows = rows_of(PROMPTS, completions)
    stats = bcr.accumulate_gradient(model, master, rows, 1000, bcr.Settings())
    assert stats["logprob_gap_max"] < gap
    assert all(torch.isfinite(weight.grad).all() for weight in master)


@pytest.mark.parametrize("longest", [55, 63, 119, 191])
def test_gradients_are_finite_at_every_length(longest):
    """cuDNN's attention is used: its gradients are NaN where keys end in half a tile of 128 and the
    scores of a row are far below zero. Some of these rows have 64 tokens modulo 128."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    model = random_model("qwen2", head_dim=64, max_position_embeddings=1024)
    for layer in model.model.layers:  # scores of hundreds
        torch.nn.init.constant_(layer.self_attn.q_proj.bias, 4.0)
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, -4.0)
    model = model.to("cuda", torch.bfloat16)
    master = master_weights(model)
    prompts = [list(range(2, 2 + length)) for length in (2, 9, 10, 17)]
    rows = []
    for prompt, advantage in zip(prompts, (1, -1, 0.5, -0.5)):
        tokens = torch.randint(2, 60, (longest,)).tolist()
        rows.append(bcr.Row(prompt, tokens, torch.zeros(longest), np.full(longest, advantage)))
    for micro_tokens in (16384, 1):  # all rows in one padded pass, and one row in each
        bcr.accumulate_gradient(model, master, rows, 1000, bcr.Settings(micro_tokens=micro_tokens))
    assert all(torch.isfinite(weight.grad).all() for weight in master)


def test_a_second_device_samples_as_the_first():
    """Graphs are captured on another device than the model's: they are empty, and rows never
    end."""
    if torch.cuda.device_count() < 2:
        pytest.skip("only one CUDA device")
    model, expected = random_model(), None
    for device in ("cuda:0", "cuda:1"):
        torch.cuda.set_device(device)
        out = tokens_of(generate(model.to(device), PROMPTS, 2, 60, eos_ids=[0], temperature=0))
        assert expected in (None, out)
        expected = out


def test_a_training_step_of_the_15b_shape_fits():
    """The paper-scale command for 80 GB runs out of memory: N = 3, a budget of 5,120, random
    weights of the shape of DeepSeek-R1-Distill-Qwen-1.5B."""
    if torch.cuda.get_device_properties(0).total_memory < 75e9:
        pytest.skip("a GPU with 80 GB is needed")
    config = Config.from_hf(CONFIGS["hbx/JustRL-DeepSeek-1.5B"])
    with torch.device("cuda"):
        model = Transformer(config).to(torch.bfloat16)
    master = master_weights(model)
    optimizer = torch.optim.AdamW(master, lr=1e-6, foreach=False)
    prompts = [torch.randint(10, 150000, (700,)).tolist() for _ in range(2)]
    rows = rows_of(prompts, generate(model, prompts, 8, 5120, eos_ids=[-1], max_rows=16))
    bcr.accumulate_gradient(model, master, rows, 16 * 5120, bcr.Settings(micro_tokens=8192))
    optimizer.step()
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    assert torch.cuda.max_memory_allocated() < 75e9
