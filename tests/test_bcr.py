"""Advantages, loss, gradient, the training loop and its reports: the parts of bcr.py one by one."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bcr
from bcr import Row, Settings, accumulate_gradient, group_advantages, policy_loss, token_logprobs
from conftest import REPO, metrics_of, random_model
from data.files import UserError
from data.reports import write_group
from data.runs import checkpoints
from distributed import micro_batches
from rollout import Completion


def test_groups_of_equal_rewards_are_exactly_zero_and_others_can_be_normalized():
    """Rounding, in the mean of thirds or in sums of another order, is trained on, and
    --normalize-std, which should give deviation 1, enlarges it to full size."""
    sums = [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.2 + 0.3 + 0.1, 0.6]
    assert len(set(sums)) > 1
    rewards = np.array([sums, [1 / 3 + 0.1] * 4, [1.0, 0.0, 0.0, 0.0]])
    plain = group_advantages(rewards)
    scaled = group_advantages(rewards, normalize_std=True)
    assert not plain[:2].any() and not scaled[:2].any()
    assert scaled[2].std() == pytest.approx(1, abs=1e-4)


def test_the_loss_is_the_clipped_objective():
    """A sign is wrong, a clip is on the wrong side, or a mean stands where the constant belongs.
    Ratios 2 and 0.5, with both signs of the advantage, against values worked out by hand."""
    old = torch.zeros(4)
    new = torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(new, old, advantages, constant=10, clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-(1.28 - 2.0 + 0.5 - 0.8) / 10)


def test_more_than_one_update_clips_against_the_sampler():
    """The ratio is not taken against the sampler's logprobs, so --updates above 1 is never clipped.
    These tokens are already far likelier than when they were sampled: nothing is left to push."""
    row = Row([5, 6], [7, 8, 0], torch.full((3,), -50.0), np.ones(3))
    for updates in (1, 2):
        model = random_model()
        accumulate_gradient(model, list(model.parameters()), [row], 1, Settings(updates=updates))
        assert any(p.grad.any() for p in model.parameters()) == (updates == 1)


def test_micro_batches_hold_every_row_once_and_keep_their_size():
    """Rows are lost or trained twice, a pass needs more memory than was asked for, or completions
    are computed after another prompt."""
    rows = [Row([1, 2], [3] * length, None, None) for length in (5, 80, 3, 40, 41, 9, 200)]
    rows += [Row([1, 3], [3] * length, None, None) for length in (6, 4)]
    lengths = [[len(row.tokens) for row in batch] for batch in micro_batches(rows, 100)]
    assert lengths == [[3, 5, 9], [40, 41], [80], [200], [4, 6]]


@pytest.fixture
def rows():
    """Five rows for a small model. Two share a prompt, one has an advantage for each token. All
    end in EOS, which is 0 and also the padding; one has it in the middle, too."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(2, 64, (count,), generator=generator).tolist()

    shared = tokens(9)
    prompts = [tokens(3), shared, shared, tokens(1), tokens(7)]
    completions = [[*tokens(count), 0] for count in (20, 3, 40, 11, 1)]
    completions[2][5] = 0
    advantages = [np.full(len(c), a) for c, a in zip(completions, (0.5, -0.25, 0.25, -0.75, 0.25))]
    advantages[2] = np.linspace(-1, 0.9, 41)
    return [Row(prompt, completion, torch.full((len(completion),), -2.0), values)
            for prompt, completion, values in zip(prompts, completions, advantages)]


def textbook_logprobs(model, row, temperature):
    """One forward pass over one row, one softmax over all its logits."""
    logits = model(torch.tensor([row.prompt + row.tokens]))[0, len(row.prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)[range(len(row.tokens)), row.tokens]


@pytest.mark.parametrize("family, checkpointing",
                         [("qwen2", False), ("qwen3", True), ("llama", False)])
def test_logprobs_and_gradient_are_those_of_the_textbook(rows, family, checkpointing):
    """Logprobs are shifted by one, prompt tokens are in the loss, EOS is not, the temperature is
    missing, a chunk's boundary or padding leaks, or part of the gradient is lost."""
    model = random_model(family)
    expected = [textbook_logprobs(model, row, 0.8) for row in rows]
    gains = [(logprobs * torch.tensor(row.advantages)).sum()
             for logprobs, row in zip(expected, rows)]
    (-sum(gains) / 1000).backward()
    textbook = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpointing = checkpointing
    expected = torch.cat(expected)
    for logits in (1, 500, 2**26):
        found = [token_logprobs(model, batch, 0.8, logits) for batch in micro_batches(rows, 10**6)]
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-5)
    s = Settings(micro_tokens=60, temperature=0.8)
    stats = accumulate_gradient(model, list(model.parameters()), rows, 1000, s)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, textbook[name], rtol=1e-4, atol=1e-6)
    gaps = (expected.detach() + 2).abs()  # the sampler's logprobs are -2
    assert stats["logprob_gap"] == pytest.approx(gaps.mean().item(), rel=1e-4)
    assert stats["logprob_gap_max"] == pytest.approx(gaps.max().item(), rel=1e-4)


def test_bfloat16_gradients_are_summed_in_float32(rows):
    """Master weights do not get the gradient, or get it rounded after each micro-batch."""
    exact = random_model("qwen2", tie_word_embeddings=False)
    accumulate_gradient(exact, list(exact.parameters()), rows, 1000, Settings())
    model = random_model("qwen2", tie_word_embeddings=False).to(torch.bfloat16)
    master = bcr.master_weights(model)
    accumulate_gradient(model, master, rows, 1000, Settings(micro_tokens=60))
    for weight, parameter, other in zip(master, model.parameters(), exact.parameters()):
        assert weight.grad.dtype == torch.float32 and parameter.grad is None
        assert torch.cosine_similarity(weight.grad.flatten(), other.grad.flatten(), dim=0) > 0.98
    bcr.copy_weights([weight + 1 for weight in master], model)
    for weight, parameter in zip(master, model.parameters()):
        assert torch.equal(parameter, (weight + 1).bfloat16())


def test_weight_decay_is_for_matrices():
    """Norms and biases decay towards 0. Without a gradient (lr times decay alone) they stay as they
    are."""
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = bcr.make_optimizer(weights, Settings(lr=0.1, weight_decay=0.5))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weights[0].max() < 1 and torch.equal(weights[1].detach(), torch.ones(2))


def train(out, **changes):
    """Trains the shipped model for a few small steps. Returns the metrics."""
    small = dict(n=(2,), budget=(60,), steps=1, groups=2, samples=4, eval_n=(1,), eval_problems=1,
                 eval_budget=(1000,), out=str(out))
    bcr.train(Settings(**small | changes))
    return metrics_of(out)


def test_n_and_budget_take_turns_and_the_penalty_has_its_formula(tmp_path):
    """--n 2,4 trains on one of them or with the wrong budget, or the penalty is not
    --length-penalty * tokens / budget."""
    metrics = train(tmp_path / "out", n=(2, 4), budget=(90, 170), steps=3, length_penalty=0.5)
    assert [(m["n"], m["budget"]) for m in metrics] == [(2, 90), (4, 170), (2, 90)]
    for m in metrics:
        tokens = m["tokens_per_problem"] * m["n"]
        assert m["reward"] == pytest.approx(m["accuracy"] - 0.5 * tokens / m["budget"])
        assert len(m["accuracy_by_position"]) == m["n"]


def test_steps_that_are_not_finite_are_skipped_and_three_end_the_run(tmp_path, monkeypatch):
    """NaN is trained on and saved over the last good weights. The second step and those after it
    have NaN advantages: weights and AdamW's state are those of a run of one step."""
    out = tmp_path / "out"
    train(tmp_path / "one")
    original = bcr.token_advantages

    def spoiled(rollout, chat, s):
        factor = np.nan if checkpoints(out) else 1
        return [factor * row for row in original(rollout, chat, s)]

    monkeypatch.setattr(bcr, "token_advantages", spoiled)
    with pytest.raises(UserError, match="steps 2 to 4"):
        train(out, steps=9, save_every=1)
    for name in ("model.safetensors", "adamw.safetensors"):
        good = load_file(tmp_path / "one/checkpoint-000001" / name)
        kept = load_file(out / "checkpoint-000003" / name)
        assert all(torch.equal(kept[key], tensor) for key, tensor in good.items())
    assert [m["skipped"] for m in metrics_of(out)] == [False, True, True, True]
    assert "NaN" not in (out / "metrics.jsonl").read_text()  # JSON has none
    assert not (out / "model").exists()


def test_the_shown_group_is_the_first_that_is_learned_from(tmp_path):
    """samples/ shows a group in which every advantage is 0, or the numbers of another
    completion."""
    groups = [[{"problem": name, "answer": "7"}] for name in ("first", "second")]
    completions = [Completion([5] * length, torch.zeros(length), length == 3)
                   for length in (9, 9, 2, 3)]
    correct = np.array([[[1.0], [1.0]], [[0.0], [1.0]]])
    rollout = bcr.Rollout(groups, [[1], [2]], completions, list("abcd"), correct,
                          correct.mean(axis=2))
    advantages = [np.zeros(1), np.zeros(1), np.array([-0.5]), np.array([0.25, 0.5])]
    write_group(tmp_path, 7, rollout, advantages)
    text = (tmp_path / "samples/step-000007.txt").read_text()
    assert text.startswith("step 7: one group of 2 samples, N = 1\n") and "first" not in text
    assert "Problem 1: second\n\nAnswers: 7. Mean reward (the baseline): 0.500\n" in text
    assert text.endswith(
        "---- sample 1: 2 tokens; wrong; reward 0.000; advantage -0.500\nc\n\n"
        "---- sample 2: 3 tokens, truncated; right; reward 1.000; advantage +0.250 to +0.500\nd\n")


def step(**changes):
    return dict(truncated=0.1, accuracy=0.5, zero_variance=0.2, entropy=0.5) | changes


@pytest.mark.parametrize("name, metrics", [
    (None, [step()] * 12),
    (None, [step(truncated=0.99)] * 9),  # as wanted: much is right
    ("truncated", [step(truncated=0.99, accuracy=0.05)]),
    ("equal", [step(zero_variance=0.95)] * 3),
    ("collapse", [step(), step(entropy=0.04)])])
def test_each_way_of_learning_nothing_is_named(name, metrics):
    """A run that learns nothing ends without a warning, or a good run has one."""
    assert list(bcr.training_warnings(metrics)) == ([name] if name else [])


def test_links_of_the_readme_point_to_the_lines_that_they_name():
    """An edit of bcr.py moves the four places, and README sends its readers elsewhere."""
    lines = (REPO / "bcr.py").read_text().splitlines()
    linked = re.findall(r"\]\(bcr\.py#L(\d+)\)", (REPO / "README.md").read_text())
    words = ["The budget bites here", "A problem earns its reward here", "The baseline is the mean",
             "divided by a constant"]
    for number, word in zip(linked, words, strict=True):
        assert word in lines[int(number) - 1]
