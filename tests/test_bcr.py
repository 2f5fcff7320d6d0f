"""Advantages, loss, gradient, the training loop and its reports: the parts of bcr.py one by one."""

import re

import numpy as np
import pytest
import torch

import bcr
from bcr import Row, Settings, accumulate_gradient, group_advantages, policy_loss, token_logprobs
from conftest import REPO, lines_of, metrics_of, random_model
from data.reports import write_group
from distributed import micro_batches
from model import Transformer
from reward import score
from rollout import Completion

# ----------------------------------------------------------------------------------------------
# Advantages


def test_normalized_advantages_have_deviation_1():
    """--normalize-std divides by something else, or blows up a group without a spread."""
    rewards = np.array([[0.0, 1.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    scaled = group_advantages(rewards, normalize_std=True)
    assert np.allclose(scaled[[0, 2]].std(axis=1), 1, atol=1e-4) and not scaled[1].any()


@pytest.mark.parametrize("normalize_std", [False, True])
def test_a_group_of_equal_rewards_is_exactly_zero(normalize_std):
    """Rounding, in the mean of thirds or in sums of another order, is trained on, and
    --normalize-std enlarges it to full size."""
    sums = [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.2 + 0.3 + 0.1, 0.6]
    assert len(set(sums)) > 1
    for rewards in ([1 / 3 + 0.1] * 7, sums):
        assert not group_advantages(np.array([rewards]), normalize_std).any()


# ----------------------------------------------------------------------------------------------
# Loss and gradient


def test_the_loss_is_the_clipped_objective():
    """A sign is wrong, a clip is on the wrong side, or a mean stands where the constant belongs.
    Ratios 2 and 0.5, with both signs of the advantage, against values worked out by hand."""
    old, new = torch.zeros(4), torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(new, old, advantages, constant=10, clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(-(1.28 - 2.0 + 0.5 - 0.8) / 10)


@pytest.fixture
def rows():
    """Five rows for a small model; two share a prompt, one has an advantage for each token. EOS is
    0."""
    torch.manual_seed(1)
    prompts = [torch.randint(2, 64, (length,)).tolist() for length in (3, 9, 9, 1, 7)]
    prompts[2] = prompts[1]
    completions = [torch.randint(2, 64, (length,)).tolist() + [0] for length in (20, 3, 40, 11, 1)]
    advantages = [np.full(len(c), a) for c, a in zip(completions, (0.5, -0.25, 0.25, -0.75, 0.25))]
    advantages[2] = np.linspace(-1, 0.9, len(completions[2]))
    return [Row(p, c, torch.full((len(c),), -2.0), a) for p, c,
            a in zip(prompts, completions, advantages)]


def gradients(rows, **changes):
    model = random_model("qwen2", tie_word_embeddings=False)
    stats = accumulate_gradient(model, list(model.parameters()), rows, constant=1000,
                                s=Settings(**changes))
    return stats["loss"], {name: p.grad for name, p in model.named_parameters()}


def test_micro_batches_hold_every_row_once_and_keep_their_size():
    """Rows are lost or trained twice, a pass needs more memory than was asked for, or completions
    are computed after another prompt."""
    rows = [Row([1, 2], [3] * length, None, None) for length in (5, 80, 3, 40, 41, 9, 200)]
    rows += [Row([1, 3], [3] * length, None, None) for length in (6, 4)]
    lengths = [[len(row.tokens) for row in batch] for batch in micro_batches(rows, 100)]
    assert lengths == [[3, 5, 9], [40, 41], [80], [200], [4, 6]]
    assert micro_batches([], 100) == []


def test_more_than_one_update_clips_against_the_sampler():
    """The ratio is not taken against the sampler's logprobs, so --updates above 1 is never clipped.
    These tokens are already far likelier than when they were sampled: nothing is left to push."""
    for updates in (1, 2):
        model = random_model()
        row = Row([5, 6], [7, 8, 0], torch.full((3,), -50.0), np.ones(3))
        accumulate_gradient(model, list(model.parameters()), [row], constant=1,
                            s=Settings(updates=updates))
        pushed = any(p.grad is not None and p.grad.any() for p in model.parameters())
        assert pushed == (updates == 1)


def textbook_logprobs(model, row, temperature):
    """One forward pass over one row, one softmax over all its logits."""
    logits = model(torch.tensor([row.prompt + row.tokens]))[0,
                                                            len(row.prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(len(row.tokens)), row.tokens]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logprobs_and_gradient_are_those_of_the_textbook(rows, family, checkpointing):
    """Logprobs are shifted by one, prompt tokens are in the loss, the temperature is missing, a
    chunk's boundary or padding leaks, or part of the gradient is lost."""
    model = random_model(family)
    expected = [textbook_logprobs(model, row, 0.8) for row in rows]
    gains = [(logprobs * torch.tensor(row.advantages)).sum() for logprobs,
             row in zip(expected, rows)]
    (-sum(gains) / 1000).backward()
    textbook = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpointing, expected = checkpointing, torch.cat(expected)
    for logits in (1, 500, 2**26):
        found = torch.cat([token_logprobs(model, batch, 0.8, logits)
                           for batch in micro_batches(rows, 10**6)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    s = Settings(micro_tokens=60, temperature=0.8)
    stats = accumulate_gradient(model, list(model.parameters()), rows, 1000, s)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, textbook[name], rtol=1e-4, atol=1e-6)
    gaps = (expected.detach() + 2).abs()  # the sampler's logprobs are -2
    assert stats["logprob_gap"] == pytest.approx(gaps.mean().item(), rel=1e-4)
    assert stats["logprob_gap_max"] == pytest.approx(gaps.max().item(), rel=1e-4)


def test_bfloat16_gradients_are_summed_in_float32(rows):
    """Master weights do not get the gradient, or get it rounded after each micro-batch."""
    model = random_model("qwen2", tie_word_embeddings=False).to(torch.bfloat16)
    master = [p.detach().float().requires_grad_() for p in model.parameters()]
    accumulate_gradient(model, master, rows, constant=1000, s=Settings(micro_tokens=60))
    assert all(p.grad is None for p in model.parameters())
    for weight, (name, exact) in zip(master, gradients(rows)[1].items()):
        assert weight.grad.dtype == torch.float32
        assert torch.cosine_similarity(weight.grad.flatten(), exact.flatten(), dim=0) > 0.98, name
    bcr.copy_weights([weight + 1 for weight in master], model)
    assert all(torch.equal(p, (weight + 1).bfloat16()) for p,
               weight in zip(model.parameters(), master))


# ----------------------------------------------------------------------------------------------
# The training loop


def train(out, **changes):
    """Trains the shipped model for a few small steps. Returns its weights and the metrics."""
    small = dict(n=(2,), budget=(60,), steps=1, groups=2, samples=4, eval_n=(1,), eval_problems=1,
                 eval_budget=(1000,), out=str(out))
    s = Settings(**small | changes)
    bcr.train(s)
    weights = [p.detach().flatten()
               for p in Transformer.from_pretrained(out / "model").parameters()]
    return torch.cat(weights), metrics_of(out)


def test_n_and_budget_take_turns(tmp_path):
    """--n 2,4 trains on one of them, or with the wrong budget."""
    train(tmp_path / "out", n=(2, 4), budget=(90, 170), steps=3, samples=2)
    assert [(m["n"], m["budget"], len(m["accuracy_by_position"]))
            for m in metrics_of(tmp_path / "out")] == [
        (2, 90, 2), (4, 170, 4), (2, 90, 2)]


def test_the_length_penalty_lowers_the_reward_by_its_formula(tmp_path):
    """The penalty is not --length-penalty * tokens / budget."""
    (m,) = train(tmp_path / "out", budget=(400,), length_penalty=0.5)[1]
    assert m["reward"] == pytest.approx(m["accuracy"] - 0.5 * m["tokens_per_problem"] * 2 / 400)


def test_token_advantages_is_the_function_to_replace(tmp_path, monkeypatch):
    """A fork replaces bcr.token_advantages, and the update stays the same. AdamW's first step has
    the sign of the gradient, so negated advantages make the opposite step, and zeros none."""
    start, original = train(tmp_path / "0", lr=0.0)[0], bcr.token_advantages
    step = train(tmp_path / "1")[0] - start
    assert step.abs().max() == pytest.approx(1e-4, rel=0.01)
    for factor in (-1, 0):
        monkeypatch.setattr(bcr, "token_advantages",
                            lambda *a, f=factor: [f * row for row in original(*a)])
        other = train(tmp_path / f"factor{factor}")[0] - start
        torch.testing.assert_close(other, factor * step, rtol=0, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped(tmp_path, monkeypatch):
    """NaN weights are trained on and saved. The second step has NaN advantages: it leaves weights
    and AdamW's state as they were, so the run ends where a run without that step does."""
    original, calls = bcr.token_advantages, []

    def spoiled(*arguments):
        calls.append(1)
        factor = float("nan") if len(calls) == 2 else 1
        return [factor * row for row in original(*arguments)]

    one, _ = train(tmp_path / "one")
    monkeypatch.setattr(bcr, "token_advantages", spoiled)
    two, metrics = train(tmp_path / "two", steps=2)
    assert torch.equal(one, two)
    assert [m["skipped"] for m in metrics] == [False, True]
    text = (tmp_path / "two/metrics.jsonl").read_text()
    assert "NaN" not in text and lines_of(tmp_path / "two/metrics.jsonl")[1]["grad_norm"] is None


def test_the_shown_group_agrees_with_itself_and_with_the_metrics(tmp_path):
    """The file in samples/ shows numbers of another group, or of another completion. With one group
    in a step, its numbers are those of the step."""
    _, (m,) = train(tmp_path / "out", groups=1, samples=6, n=(3,), budget=(110,))
    text = (tmp_path / "out/samples/step-000001.txt").read_text()
    assert text.startswith("step 1: one group of 6 samples, N = 3\n")
    golds = re.search(r"^Answers: (.*)\. Mean reward \(the baseline\): ([0-9.]+)$", text,
                      re.MULTILINE)
    heads = re.findall(r"^---- sample (\d): (\d+) tokens(, truncated)?; ([a-z ]+); "
                       r"reward ([0-9.]+); "
                       r"advantage ([+-][0-9.]+)\n(.*?)\n(?=\n----|\n?\Z)", text,
                       re.MULTILINE | re.DOTALL)
    assert [head[0] for head in heads] == list("123456")
    marks = [[mark == "right" for mark in head[3].split()] for head in heads]
    assert marks == [score(head[6], golds[1].split(", ")) for head in heads]
    rewards = [float(head[4]) for head in heads]
    assert rewards == pytest.approx(np.mean(marks, axis=1), abs=6e-4) and len(set(rewards)) > 1
    assert float(golds[2]) == pytest.approx(m["reward"], abs=6e-4)
    assert np.mean(rewards) == pytest.approx(m["reward"], abs=6e-4)
    assert [float(head[5]) for head in heads] == pytest.approx(np.array(rewards) - m["reward"],
                                                               abs=1e-3)
    assert np.mean([int(head[1]) for head in heads]) == pytest.approx(3 * m["tokens_per_problem"])
    assert np.mean([bool(head[2]) for head in heads]) == m["truncated"]
    assert all(int(head[1]) == 110 for head in heads if head[2])


def test_the_shown_group_is_one_with_different_rewards(tmp_path):
    """The shown group is one in which every advantage is 0, although others are more
    instructive."""
    completions = [Completion([5, 0], torch.zeros(2), False) for _ in range(4)]
    problems = [[{"problem": name, "answer": "1"}] for name in ("first", "second")]
    correct = np.array([[[1.0], [1.0]], [[0.0], [1.0]]])
    rollout = bcr.Rollout(problems, [[1], [2]], completions, list("abcd"), correct,
                          correct.mean(axis=2))
    advantages = bcr.token_advantages(rollout, None, Settings())
    advantages[3] = np.array([0.5, 0.25])  # a fork may give each token its own
    write_group(tmp_path, 7, rollout, advantages)
    text = (tmp_path / "samples/step-000007.txt").read_text()
    assert "Problem 1: second" in text and "first" not in text
    assert "advantage +0.250 to +0.500\nd" in text


def step(**changes):
    return dict(truncated=0.1, accuracy=0.5, zero_variance=0.2, entropy=0.5) | changes


@pytest.mark.parametrize("name, metrics", [
    (None, []), (None, [step()] * 12), (None, [step(truncated=0.99)] * 9),
                                           (None, [step(entropy=None)]),
    ("truncated", [step(truncated=0.99, accuracy=0.05)]), ("equal", [step(zero_variance=0.95)] * 3),
    ("collapse", [step(), step(entropy=0.04)])])
def test_each_way_of_learning_nothing_is_named(name, metrics):
    """A run that learns nothing ends without a warning, or a good run has one."""
    assert list(bcr.training_warnings(metrics)) == ([name] if name else [])


def test_weight_decay_is_for_matrices(tmp_path):
    """Norms and biases decay towards 0. Without a gradient (lr times decay alone) they stay as they
    are."""
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = bcr.make_optimizer(weights, Settings(lr=0.1, weight_decay=0.5))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weights[0].max() < 1 and torch.equal(weights[1].detach(), torch.ones(2))


def test_links_of_the_readme_point_to_the_lines_that_they_name():
    """An edit of bcr.py moves the four places, and README sends its readers elsewhere."""
    lines = (REPO / "bcr.py").read_text().splitlines()
    linked = re.findall(r"\[([^]]*)\]\(bcr\.py#L(\d+)\)", (REPO / "README.md").read_text())
    words = ["The budget bites here", "A problem earns its reward here", "The baseline is the mean",
             "divided by a constant"]
    assert len(linked) == 4
    for (_, number), word in zip(linked, words):
        assert word in lines[int(number) - 1]
