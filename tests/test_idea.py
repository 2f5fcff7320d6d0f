"""What BCR is, in nine claims about the parts that run. Read this first of all tests."""

import numpy as np
import pytest
import torch

import bcr
from bcr import Row, Settings, accumulate_gradient, group_advantages
from conftest import QUICK, TINY, metrics_of, outcome, random_model, start, wait_for
from data.chat import decode, encode_chat
from data.problems import answer_section, batch_prompt, load_problems
from reward import score
from rollout import generate

PROBLEMS = load_problems(TINY / "heldout.jsonl")[:4]
GOLDS = [problem["answer"] for problem in PROBLEMS]
SOLVED = "\n\n".join(answer_section(i, "Easy.\n", gold) for i, gold in enumerate(GOLDS, start=1))


def one_step(out, **changes):
    """Trains the shipped model for one step and returns its metrics."""
    small = dict(n=(4,), budget=(120,), steps=1, groups=4, samples=4, eval_n=(1,), eval_problems=1,
                 eval_budget=(1000,), out=str(out))
    bcr.train(Settings(**small | changes))
    return metrics_of(out)[0]


def test_the_reward_is_the_share_of_right_answers():
    """One prompt holds N problems. Each is marked by itself, whatever its length and its
    neighbours."""
    assert all(problem["problem"] in batch_prompt(PROBLEMS) for problem in PROBLEMS)
    assert list(score(SOLVED, GOLDS)) == [1, 1, 1, 1]
    assert list(score(SOLVED.replace("Easy.", "Wait. " * 50), GOLDS)) == [1, 1, 1, 1]
    assert list(score(SOLVED, [GOLDS[0], "-999", GOLDS[2], "-999"])) == [1, 0, 1, 0]


def test_the_cut_takes_what_the_budget_did_not_reach_and_nothing_else(shipped):
    """Problems share the budget: those before the cut keep their mark, those after it earn
    nothing."""
    _, chat = shipped
    ids = chat.tokenizer.encode(SOLVED, add_special_tokens=False).ids
    marks = [list(score(text, GOLDS))
             for text in decode(chat, [ids[:cut] for cut in range(len(ids) + 1)])]
    totals = [sum(row) for row in marks]
    assert all(row == sorted(row, reverse=True) for row in marks)
    assert totals == sorted(totals) and set(totals) == {0, 1, 2, 3, 4}


def test_the_baseline_is_the_mean_of_the_group():
    """Completions of a prompt are compared with each other, and with nothing else."""
    rewards = np.array([[1.0, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.25, 0.0, 0.0, 0.25]])
    expected = [[0.5, 0, 0, -0.5], [0, 0, 0, 0], [0.125, -0.125, -0.125, 0.125]]
    assert np.array_equal(group_advantages(rewards), expected)


def test_the_loss_divides_by_a_constant(tmp_path, monkeypatch):
    """A token weighs the same in a short completion as in a long one: the denominator is P G B."""
    seen, loss = set(), bcr.policy_loss
    monkeypatch.setattr(bcr, "policy_loss", lambda *given: seen.add(given[3]) or loss(*given))
    one_step(tmp_path / "out", n=(1,), budget=(60,))
    assert seen == {4 * 4 * 60}
    for length in (3, 30):
        logprobs = torch.zeros(length, requires_grad=True)
        loss(logprobs, torch.zeros(length), torch.full((length,), 0.5), 100, 0.2, 0.28).backward()
        assert torch.allclose(logprobs.grad, torch.tensor(-0.5 / 100))


def test_stopping_is_learned():
    """EOS is a token like any other: a completion that is EOS alone pushes EOS up."""
    model = random_model("llama", tie_word_embeddings=False)
    row = Row([5, 6], [0], torch.zeros(1), np.ones(1))
    accumulate_gradient(model, list(model.parameters()), [row], constant=1, s=Settings())
    gradient = model.lm_head.weight.grad.norm(dim=1)
    assert gradient[0] > 0.1 * gradient.sum()  # pushing EOS up pushes all others down


def test_truncated_completions_are_learned_from(tmp_path):
    """The cut is the pressure. Where every completion is truncated, there is still a gradient."""
    m = one_step(tmp_path / "out", n=(8,), budget=(150,))
    assert m["truncated"] == 1 and 0 < m["accuracy"] < 0.8 and m["grad_norm"] > 0


def test_tokens_follow_the_softmax_with_nothing_cut_off():
    """What is sampled is the distribution that is trained: no top-k, no top-p."""
    model = random_model()
    logits = model(torch.tensor([[5, 6, 7]]))[0, -1]
    expected = 20000 * torch.softmax(logits, -1).double()
    tokens = [c.tokens[0]
              for c in generate(model, [[5, 6, 7]], 20000, 1, eos_ids=[0], max_rows=20000)]
    seen = torch.bincount(torch.tensor(tokens), minlength=len(expected))
    z = (seen - expected) / expected.sqrt()
    assert z.abs().max() < 4.5 and (z ** 2).mean() < 1.7
    assert seen[expected.argsort()[:8]].min() > 0  # the least likely tokens, too


def test_a_token_depends_on_nothing_but_its_place(shipped):
    """The seed, the step, the prompt, the sample and the position decide it; batch and order do
    not."""
    model, chat = shipped
    prompts = [encode_chat(chat, batch_prompt([problem])) for problem in PROBLEMS]
    options = dict(eos_ids=chat.eos_ids, seed=3, step=7)
    together = generate(model, prompts, 3, 40, **options)
    alone = generate(model, prompts[2:3], 3, 40, prompt_keys=[2], max_rows=1, **options)
    assert [c.tokens for c in alone] == [c.tokens for c in together[6:9]]
    other = generate(model, prompts[2:3], 3, 40, prompt_keys=[2], **options | {"step": 8})
    assert [c.tokens for c in other] != [c.tokens for c in alone]


@pytest.mark.slow
def test_processes_and_kills_do_not_change_a_byte(finished, tmp_path):
    """Three processes, killed and resumed as two, write what one process writes."""
    out = tmp_path / "out"
    run = start("bcr.py", *QUICK, "--processes", 3, "--out", out)
    wait_for("step 3/5", run)
    run.kill()
    run.communicate()
    resumed = start("bcr.py", "--resume", out, "--processes", 2)
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert outcome(out) == outcome(finished[0])
