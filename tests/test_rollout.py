"""The sampler: what is sampled, what is recorded of it, and what it must not depend on."""

import numpy as np
import pytest
import torch

import rollout
from conftest import PROMPTS, random_model, tokens_of
from rollout import generate, uniforms

EOS = [0, 1]


def full_logits(model, prompt, tokens):
    """Logits (T, V) for the tokens of a completion, from one forward pass without a cache."""
    return model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_equal_a_full_forward_pass(kind, temperature):
    """The cache, a position or a mask is wrong, or the logprobs are not those of the distribution
    that was sampled from. Training would push on the wrong tokens."""
    model = random_model(kind)
    completions = generate(model, PROMPTS, 4, 40, eos_ids=EOS, temperature=temperature, max_rows=7)
    for r, completion in enumerate(completions):
        logits = full_logits(model, PROMPTS[r // 4], completion.tokens) / temperature
        tokens = torch.tensor(completion.tokens)[:, None]
        full = torch.log_softmax(logits, -1).gather(1, tokens)[:, 0]
        torch.testing.assert_close(completion.logprobs, full, atol=1e-4, rtol=0)


def test_tokens_depend_neither_on_the_batch_size_nor_on_the_neighbours(monkeypatch):
    """Draws depend on rows or refills, or a cache leaks into another row: a run would not repeat on
    another machine. With few rows they are refilled many times. On a CPU whose products are rounded
    up to `row_multiple` rows, not a bit of the logprobs differs."""
    model = random_model()
    options = dict(eos_ids=EOS, seed=3, step=5)
    expected = generate(model, PROMPTS, 6, 100, max_rows=64, **options)
    alone = [generate(model, [prompt], 6, 100, prompt_keys=[p], **options)
             for p, prompt in enumerate(PROMPTS)]
    crowded = generate(model, PROMPTS, 6, 100, max_rows=7, **options)
    for completions in (sum(alone, []), crowded):
        assert tokens_of(completions) == tokens_of(expected)
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(completions, expected))
    monkeypatch.setattr(rollout, "row_multiple", lambda device: 1)  # more refills
    refilled = generate(model, PROMPTS, 6, 100, max_rows=3, **options)
    assert tokens_of(refilled) == tokens_of(expected)


def test_samples_of_a_prompt_differ():
    """The samples of a group are equal, so every advantage is 0. Equal prompts differ, too, and so
    do steps and seeds."""
    rows = []
    for where in ({}, {"step": 1}, {"seed": 1}):
        rows += generate(random_model(), [PROMPTS[0]] * 2, 8, 40, eos_ids=[], **where)
    assert len(set(map(tuple, tokens_of(rows)))) == 48


def test_greedy_takes_the_likeliest_token():
    """Temperature 0 samples, or divides by zero."""
    model = random_model()
    for prompt, c in zip(PROMPTS, generate(model, PROMPTS, 1, 20, eos_ids=EOS, temperature=0)):
        assert c.tokens == full_logits(model, prompt, c.tokens).argmax(-1).tolist()


def test_eos_ends_a_completion_and_belongs_to_it():
    """EOS is dropped, so stopping has no gradient and is not learned. A completion whose last
    affordable token is EOS is not truncated."""
    completions = generate(random_model(), PROMPTS, 16, 12, eos_ids=EOS)
    for c in completions:
        assert not set(c.tokens[:-1]) & set(EOS)
        assert c.truncated == (c.tokens[-1] not in EOS)
        assert len(c.tokens) == 12 or not c.truncated
    last = {c.truncated for c in completions if len(c.tokens) == 12}
    assert last == {True, False} and any(len(c.tokens) < 12 for c in completions)


def test_logits_that_are_not_finite_are_no_error():
    """A broken model ends in an index error, where three skipped steps should say what is wrong."""
    model = random_model()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    assert generate(model, PROMPTS[:1], 1, 5, eos_ids=EOS)[0].truncated


@pytest.mark.parametrize("rows", [3, 64])
def test_prompts_are_computed_once_and_finished_rows_not_at_all(monkeypatch, rows):
    """Work is wasted. Each prompt goes through the model once for all its samples, also if they are
    sampled in several waves, and a row costs one token per step until it ends. Each end is reported
    once."""
    model = random_model()
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]  # one token alone needs no prefill
    prefilled, decoded, ended = [], [], []
    original = model.hidden

    def counting(tokens, rotation=None, attention=None):
        (prefilled if rotation is None else decoded).append(len(tokens))
        return original(tokens, rotation, attention)

    monkeypatch.setattr(model, "hidden", counting)
    monkeypatch.setattr(rollout, "row_multiple", lambda device: 1)
    completions = generate(model, prompts, 4, 30, eos_ids=EOS, max_rows=rows,
                           on_finished=lambda: ended.append(1))
    assert sum(prefilled) == len(prompts) and len(ended) == len(completions)
    assert sum(decoded) == sum(len(c.tokens) for c in completions) and max(decoded) <= rows


def test_random_numbers_are_a_function_of_their_place():
    """Numbers change with how many are drawn, or two samples share them."""
    assert np.array_equal(uniforms(1, 2, 3, 4, 10), uniforms(1, 2, 3, 4, 1000)[:10])
    places = [(1, 2, 3, 4), (2, 1, 3, 4), (1, 2, 4, 3), (1, 2, 3, 5)]
    values = np.concatenate([uniforms(*place, 100) for place in places])
    assert len(set(values)) == 400
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.05


