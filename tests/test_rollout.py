"""The sampler: what is sampled, what is recorded of it, and what it must not depend on."""

import numpy as np
import pytest
import torch

import rollout
from conftest import random_model
from rollout import LENGTH_MULTIPLE, LOOK_EVERY, generate, uniforms

PROMPTS = [[5, 9, 60, 2, 8], [7] * 9, [3], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [4, 40]]
EOS = [0, 1]


def tokens_of(completions):
    return [completion.tokens for completion in completions]


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
    another machine. With few rows they are refilled many times; then each prompt is sampled alone
    under its key. On a CPU whose products are rounded up to `row_multiple` rows, not a bit of the
    logprobs differs."""
    model, options = random_model(), dict(eos_ids=EOS, seed=3, step=5)
    together = generate(model, PROMPTS, 12, 150, max_rows=64, **options)
    crowded = [generate(model, PROMPTS, 12, 150, max_rows=rows, **options) for rows in (1, 7, 20)]
    alone = [generate(model, [prompt], 12, 150, prompt_keys=[p], **options)
             for p, prompt in enumerate(PROMPTS)]
    for completions in (*crowded, sum(alone, [])):
        assert tokens_of(completions) == tokens_of(together)
        assert [c.truncated for c in completions] == [c.truncated for c in together]
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(completions, together))
    monkeypatch.setattr(rollout, "row_multiple", lambda device: 1)  # more refills
    for rows in (1, 5, 7):
        again = generate(model, PROMPTS, 12, 150, max_rows=rows, **options)
        assert tokens_of(again) == tokens_of(together)


def test_samples_of_a_prompt_differ():
    """The samples of a group are equal, so every advantage is 0. Equal prompts differ, too, and so
    do steps and seeds."""
    model, rows = random_model(), []
    for where in ({}, {"step": 1}, {"seed": 1}):
        rows += map(tuple, tokens_of(generate(model, [PROMPTS[0]] * 2, 8, 40, eos_ids=[], **where)))
    assert len(set(rows)) == len(rows) == 48


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_from_the_softmax(temperature):
    """Tokens are sampled from another distribution than the reported one. 20,000 draws of one
    token: the chi-square statistic of 63 degrees of freedom is above 120 once in 50,000 times."""
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.3)  # flatter, so that many tokens are expected often enough
    completions = generate(model, [PROMPTS[1]], 20000, 1, eos_ids=EOS, temperature=temperature,
                           max_rows=20000)
    logits = model(torch.tensor([PROMPTS[1]]))[0, -1].detach().double()
    p = torch.softmax(logits / temperature, -1).numpy()
    expected, seen = 20000 * p, np.bincount(np.ravel(tokens_of(completions)), minlength=64)
    often = expected >= 5
    statistic = ((seen - expected)[often] ** 2 / expected[often]).sum()
    assert often.sum() > 20 and statistic < 120


def test_greedy_takes_the_likeliest_token():
    """Temperature 0 samples, or divides by zero."""
    model = random_model()
    for prompt, c in zip(PROMPTS, generate(model, PROMPTS, 1, 20, eos_ids=EOS, temperature=0)):
        assert c.tokens == full_logits(model, prompt, c.tokens).argmax(-1).tolist()


def test_eos_ends_a_completion_and_belongs_to_it():
    """EOS is dropped, so stopping has no gradient and is not learned. A completion whose last
    affordable token is EOS is not truncated."""
    completions, ended_in_time = generate(random_model(), PROMPTS, 16, 12, eos_ids=EOS), 0
    for c in completions:
        assert not set(c.tokens[:-1]) & set(EOS)
        assert c.truncated == (c.tokens[-1] not in EOS)
        assert len(c.tokens) == 12 or not c.truncated
        ended_in_time += len(c.tokens) == 12 and not c.truncated
    assert 0 < sum(c.truncated for c in completions) < len(completions) and ended_in_time


def test_prompts_are_computed_once_and_finished_rows_not_at_all(monkeypatch):
    """Work is wasted. Each prompt goes through the model once for all its samples, also if they are
    sampled in several waves, and a row costs one token per step until it ends. Each end is reported
    once."""
    model, prefilled, decoded, ended = random_model(), [], [], []
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]  # one token alone needs no prefill
    original = model.hidden

    def counting(tokens, rotation=None, attention=None):
        (prefilled if rotation is None else decoded).append(tokens.shape[0])
        return original(tokens, rotation, attention)

    monkeypatch.setattr(model, "hidden", counting)
    monkeypatch.setattr(rollout, "row_multiple", lambda device: 1)
    for rows in (3, 8, 64):
        prefilled.clear(), decoded.clear(), ended.clear()
        completions = generate(model, prompts, 4, 30, eos_ids=EOS, max_rows=rows,
                               on_finished=lambda: ended.append(1))
        assert sum(prefilled) == len(prompts) and sum(ended) == len(completions)
        assert sum(decoded) == sum(len(c.tokens) for c in completions)
        assert max(decoded) <= rows


def test_random_numbers_are_a_function_of_their_place():
    """Numbers change with how many are drawn, or two samples share them."""
    assert np.array_equal(uniforms(1, 2, 3, 4, 10), uniforms(1, 2, 3, 4, 1000)[:10])
    places = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4),
              (1, 2, 4, 3)]
    values = np.concatenate([uniforms(*place, 100) for place in places])
    assert len(set(values)) == 100 * len(places)
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.05


def test_rows_that_ended_between_two_looks_leave_no_trace(monkeypatch):
    """On a GPU the host looks at the rows only now and then, and shapes are rounded up. What a row
    does after its EOS, or a free row does at all, changes the result. The CPU runs at the same pace
    here."""
    model, options = random_model(), dict(eos_ids=[3, 5], temperature=1.3, seed=5, max_rows=7)
    expected = generate(model, PROMPTS, 3, 20, **options)
    for look_every, rows, length_multiple in ((8, 4, 16), (3, 7, 64), (50, 2, 1)):
        monkeypatch.setitem(LOOK_EVERY, "cpu", look_every)
        monkeypatch.setitem(LENGTH_MULTIPLE, "cpu", length_multiple)
        monkeypatch.setattr(rollout, "row_multiple", lambda device, rows=rows: rows)
        for ours, theirs in zip(generate(model, PROMPTS, 3, 20, **options), expected, strict=True):
            assert ours.tokens == theirs.tokens and ours.truncated == theirs.truncated
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)
    assert {c.truncated for c in expected} == {True, False}
    assert len({len(c.tokens) for c in expected}) > 5
