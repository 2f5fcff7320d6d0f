"""What runs on a CUDA device, on small models (skipped without one). cuda_report.py has the rest:
graphs, the shapes of the paper, memory and speed."""

import numpy as np
import pytest
import torch

import bcr
from conftest import PROMPTS, random_model, tokens_of
from rollout import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_the_cpu(kind):
    """A kernel computes something else than the CPU's: masks, rounding of shapes, graphs; or graphs
    are captured on another device than the model's, and rows never end."""
    model = random_model(kind)
    options = dict(eos_ids=[0], temperature=0, max_rows=7)
    expected = generate(model, PROMPTS, 2, 60, **options)
    for number in range(torch.cuda.device_count()):
        torch.cuda.set_device(number)
        ours = generate(model.to(f"cuda:{number}"), PROMPTS, 2, 60, **options)
        assert tokens_of(ours) == tokens_of(expected)
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("longest", [55, 63, 119, 191])
def test_gradients_are_finite_at_every_length(longest):
    """cuDNN's attention is used: its gradients are NaN where keys end in half a tile of 128 and the
    scores of a row are far below zero. Some of these rows have 64 tokens modulo 128."""
    model = random_model("qwen2", head_dim=64, max_position_embeddings=1024)
    for layer in model.model.layers:  # scores of hundreds
        torch.nn.init.constant_(layer.self_attn.q_proj.bias, 4.0)
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, -4.0)
    model = model.to("cuda", torch.bfloat16)
    master = bcr.master_weights(model)
    rows = []
    for length, advantage in ((2, 1), (9, -1), (10, 0.5), (17, -0.5)):
        tokens = torch.randint(2, 60, (longest,)).tolist()
        prompt = list(range(2, 2 + length))
        rows.append(bcr.Row(prompt, tokens, torch.zeros(longest), np.full(longest, advantage)))
    for micro_tokens in (16384, 1):  # all rows in one padded pass, and one row in each
        bcr.accumulate_gradient(model, master, rows, 1000, bcr.Settings(micro_tokens=micro_tokens))
        assert all(torch.isfinite(weight.grad).all() for weight in master)
