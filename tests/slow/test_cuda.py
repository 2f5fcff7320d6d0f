"""What runs on a CUDA device: skipped plainly where there is none. The same completions as on the CPU,
CUDA graphs that change nothing, and a training step of the paper's shapes within its memory."""

import numpy as np
import pytest
import torch

import bcr
import rollout
from conftest import random_model
from model import Config, Transformer
from rollout import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PROMPTS = [[5, 9, 60, 2, 8], [7] * 9, [3], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [4, 40]]


def rows_of(out):
    return [row[:length].tolist() for row, length in zip(out.tokens, out.lengths)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_the_cpu(kind):
    """A kernel that computes something else than the CPU's: masks, rounding of shapes, graphs."""
    model = random_model(kind)
    expected = generate(model, PROMPTS, 2, 60, eos_ids=[0], temperature=0)
    ours = generate(model.to("cuda"), PROMPTS, 2, 60, eos_ids=[0], temperature=0, rows=7)
    assert rows_of(ours) == rows_of(expected)
    torch.testing.assert_close(ours.logprobs, expected.logprobs, atol=1e-3, rtol=1e-3)


def test_graphs_change_nothing(monkeypatch):
    """A graph that was recorded with another step's sizes, or that writes where the step does not."""
    model = random_model().to("cuda")
    settings = dict(eos_ids=[3, 5], temperature=1.0, seed=5, rows=64)
    with_graphs = generate(model, PROMPTS, 16, 80, **settings)
    monkeypatch.setattr(rollout, "captured", lambda step: step)
    eager = generate(model, PROMPTS, 16, 80, **settings)
    assert rows_of(with_graphs) == rows_of(eager)


@pytest.mark.parametrize("dtype, gap", [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_the_trainer_sees_the_distribution_that_was_sampled(dtype, gap):
    """Attention by two kernels, one token at a time and all at once, that do not agree."""
    model = random_model().to("cuda", dtype)
    out = generate(model, PROMPTS, 8, 60, eos_ids=[0], seed=1)
    completions, owners = rows_of(out), [row // 8 for row in range(len(out.lengths))]
    master = [p.detach().float().requires_grad_() if dtype != torch.float32 else p for p in model.parameters()]
    _, _, largest = bcr.accumulate_gradient(model, master, PROMPTS, owners, completions, [out.logprobs[r, : len(c)] for r, c in enumerate(completions)],
                                            np.linspace(-1, 1, len(owners)), constant=1000, s=bcr.Settings())
    assert largest < gap and all(torch.isfinite(weight.grad).all() for weight in master)


@pytest.mark.parametrize("longest", [55, 63, 119, 191])
def test_gradients_under_a_mask_are_finite_at_every_length(longest):
    """cuDNN's attention: NaN where keys end in half a tile of 128 and a row's scores are far below zero. Prompts of
    one token and more make keys of 64 modulo 128 among these."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    model = random_model("qwen2", num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024)
    for layer in model.model.layers:  # scores of hundreds
        torch.nn.init.constant_(layer.self_attn.q_proj.bias, 4.0)
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, -4.0)
    model = model.to("cuda", torch.bfloat16)
    master = [p.detach().float().requires_grad_() for p in model.parameters()]
    prompts = [list(range(2, 2 + length)) for length in (2, 9, 10, 17)]
    completions = [torch.randint(2, 60, (longest,)).tolist() for _ in prompts]
    bcr.accumulate_gradient(model, master, prompts, [0, 1, 2, 3], completions, [torch.zeros(longest)] * 4, np.array([1, -1, 0.5, -0.5]),
                            constant=1000, s=bcr.Settings())
    assert all(torch.isfinite(weight.grad).all() for weight in master)


def test_a_second_device_samples_as_the_first():
    """Graphs that are captured on another device than the model's: empty ones, and rows that never end."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    model, expected = random_model(), None
    for device in ("cuda:0", "cuda:1"):
        torch.cuda.set_device(device)
        out = rows_of(generate(model.to(device), PROMPTS, 2, 60, eos_ids=[0], temperature=0))
        assert expected in (None, out)
        expected = out


def test_a_training_step_of_the_15b_shape_fits():
    """The recipe's memory in README: N = 3, a budget of 5,120, random weights of DeepSeek-R1-Distill-Qwen-1.5B's shape."""
    if torch.cuda.get_device_properties(0).total_memory < 75e9:
        pytest.skip("a GPU with 80 GB is needed")
    config = Config.from_hf(dict(model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                 num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131072, tie_word_embeddings=False))
    with torch.device("cuda"):
        model = Transformer(config).to(torch.bfloat16)
    master = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(master, lr=1e-6)
    prompts = [torch.randint(10, 150000, (700,)).tolist() for _ in range(2)]
    out = generate(model, prompts, 8, 5120, eos_ids=[-1], rows=16)
    completions = rows_of(out)
    bcr.accumulate_gradient(model, master, prompts, [row // 8 for row in range(16)], completions, [out.logprobs[r] for r in range(16)],
                            np.linspace(-1, 1, 16), constant=16 * 5120, s=bcr.Settings(micro_tokens=8192))
    optimizer.step()
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    assert torch.cuda.max_memory_allocated() < 75e9
