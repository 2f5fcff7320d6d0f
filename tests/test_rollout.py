"""The sampler: what is sampled, what is recorded of it, and what it must not depend on."""

import numpy as np
import pytest
import torch

from conftest import random_model
from model import UserError
from rollout import PACE, generate, uniforms

PROMPTS = [[5, 9, 60, 2, 8], [7] * 9, [3], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [4, 40]]
EOS = [0, 1]


def rows_of(rollout):
    return [row[:length].tolist() for row, length in zip(rollout.tokens, rollout.lengths)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_a_full_forward_pass(kind, temperature):
    """Broken cache, position or mask in decoding, or a logprob that is not of the distribution
    which was sampled from: training would push on the wrong tokens."""
    model = random_model(kind)
    rollout = generate(model, PROMPTS, 4, 40, eos_ids=EOS, temperature=temperature, rows=7)
    for r, completion in enumerate(rows_of(rollout)):
        prompt = PROMPTS[r // 4]
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].float() / temperature
        full = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[r, : len(completion)], full, atol=1e-4, rtol=0)


def test_same_tokens_whatever_the_batch_size():
    """Draws that depend on slots, waves or refills: runs would not repeat on another machine.
    With 1 and 7 rows, slots are refilled many times; with 64 all rows run at once."""
    model = random_model()
    sizes = {rows: generate(model, PROMPTS * 3, 4, 40, eos_ids=EOS, seed=3, step=5, rows=rows) for rows in (1, 7, 64)}
    assert rows_of(sizes[1]) == rows_of(sizes[7]) == rows_of(sizes[64])
    assert torch.equal(sizes[1].truncated, sizes[64].truncated)


def test_a_refilled_slot_leaves_the_other_rows_alone():
    """Caches that leak from a row to its neighbour: the rows of a crowded run must be those of
    each prompt sampled by itself under its own key."""
    model = random_model()
    together = rows_of(generate(model, PROMPTS, 4, 40, eos_ids=EOS, seed=1, rows=5))
    alone = [row for p, prompt in enumerate(PROMPTS)
             for row in rows_of(generate(model, [prompt], 4, 40, eos_ids=EOS, seed=1, prompt_keys=[p]))]
    assert together == alone


def test_samples_of_a_prompt_differ():
    """A group of equal samples: every advantage would be 0 and nothing would be learned. Equal
    prompts differ too, and so do steps and seeds."""
    model = random_model()

    def sample(**where):
        return [tuple(row) for row in rows_of(generate(model, [PROMPTS[0]] * 2, 8, 40, eos_ids=[], **where))]

    rows = sample() + sample(step=1) + sample(seed=1)
    assert len(set(rows)) == len(rows) == 48


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_from_the_softmax(temperature):
    """Sampling from another distribution than the one that is reported. 20,000 draws of one token:
    the chi-square statistic of 63 degrees of freedom is above 120 once in 50,000 times."""
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.3)  # flatter, so that many tokens are expected often enough
    rollout = generate(model, [PROMPTS[1]], 20000, 1, eos_ids=EOS, temperature=temperature, rows=20000)
    p = torch.softmax(model(torch.tensor([PROMPTS[1]]))[0, -1].double() / temperature, -1).detach().numpy()
    expected, seen = 20000 * p, np.bincount(rollout.tokens[:, 0], minlength=64)
    often = expected >= 5
    statistic = ((seen - expected)[often] ** 2 / expected[often]).sum()
    assert often.sum() > 20 and statistic < 120


def test_greedy_takes_the_likeliest_token():
    """Temperature 0 that samples, or divides by zero."""
    model = random_model()
    for prompt, completion in zip(PROMPTS, rows_of(generate(model, PROMPTS, 1, 20, eos_ids=EOS, temperature=0))):
        likeliest = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].argmax(-1)
        assert completion == likeliest.tolist()


def test_eos_ends_a_row_and_belongs_to_it():
    """A dropped EOS would get no gradient, so stopping would not be learned; a row whose last
    affordable token is EOS has ended by itself and was not cut."""
    model = random_model()
    rollout = generate(model, PROMPTS, 16, 12, eos_ids=EOS)
    ended_in_time = 0
    for completion, truncated in zip(rows_of(rollout), rollout.truncated.tolist()):
        assert not set(completion[:-1]) & set(EOS)
        assert truncated == (completion[-1] not in EOS)
        assert len(completion) == 12 or not truncated
        ended_in_time += len(completion) == 12 and not truncated
    assert 0 < rollout.truncated.sum() < len(rollout.truncated) and ended_in_time


def test_prompts_are_computed_once_and_finished_rows_not_at_all(monkeypatch):
    """Wasted work: each prompt goes through the model once for all its samples (also where its
    samples come in several waves), and a row costs one token a step until it ends, no longer."""
    model = random_model()
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]  # one token alone needs no prefill
    prefilled, decoded = [], []
    original = model.hidden

    def counting(tokens, positions=None, cache=None):
        (prefilled if positions is None else decoded).append(tokens.shape[0])
        return original(tokens, positions, cache)

    monkeypatch.setattr(model, "hidden", counting)
    for rows in (3, 8, 64):
        prefilled.clear(), decoded.clear()
        rollout = generate(model, prompts, 4, 30, eos_ids=EOS, rows=rows)
        assert sum(prefilled) == len(prompts)
        assert sum(decoded) == rollout.lengths.sum()
        assert max(decoded) <= rows


def test_random_numbers_are_a_function_of_their_place():
    """Numbers that change with how many are drawn, or that two samples share."""
    assert np.array_equal(uniforms(1, 2, 3, 4, 10), uniforms(1, 2, 3, 4, 1000)[:10])
    places = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4), (1, 2, 4, 3)]
    firsts = {tuple(uniforms(*place, 100)) for place in places}
    values = np.concatenate([np.array(f) for f in firsts])
    assert len(firsts) == len(places) and len(set(values)) == 100 * len(places)
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.05


def test_a_budget_beyond_the_models_positions_is_refused():
    """Positions that the model never saw would be sampled from silently."""
    with pytest.raises(UserError, match="256 positions"):
        generate(random_model(), PROMPTS, 1, 250, eos_ids=EOS)


def test_rows_that_ended_between_two_looks_stand_still(monkeypatch):
    """On a GPU the host looks at the rows only now and then, and shapes are rounded up: what a row
    does after its EOS, or a free row at all, must leave no trace. The same pace on the CPU."""
    model = random_model()
    settings = dict(eos_ids=[3, 5], temperature=1.3, seed=5, rows=7)
    expected = generate(model, PROMPTS, 3, 20, **settings)
    for pace in ((8, 4, 16), (3, 7, 64), (50, 2, 1)):
        monkeypatch.setitem(PACE, "cpu", pace)
        ours = generate(model, PROMPTS, 3, 20, **settings)
        assert torch.equal(ours.tokens, expected.tokens) and torch.equal(ours.truncated, expected.truncated)
        torch.testing.assert_close(ours.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    assert expected.truncated.any() and not expected.truncated.all() and len(set(expected.lengths.tolist())) > 5
