"""Credit to go: the fork in data/study/credit_togo.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bcr import group_advantages
from conftest import metrics_of, start
from data.chat import decode
from data.problems import answer_section
from data.study.credit_togo import (
    section_advantages,
    section_starts,
    token_advantages,
    token_sections,
    unsure_share,
)
from reward import score

GOLDS = ["2", "4", "6"]
SOLVED = "\n\n".join(answer_section(i, f"{i} + {i} = {x}.\n", x)
                    for i, x in enumerate("247", start=1))


def tokens_of(chat, text):
    return chat.tokenizer.encode(text, add_special_tokens=False).ids + [chat.eos_ids[0]]


def test_each_token_belongs_to_the_section_it_stands_in(shipped):
    """Credit is shifted by a token or a section. EOS belongs to the last section, and the missing
    sections of a truncated completion are not an error."""
    _, chat = shipped
    tokens = tokens_of(chat, SOLVED)
    sections = token_sections(chat, tokens, section_starts(SOLVED, GOLDS, score))
    for i in range(3):
        [part] = decode(chat, [[token for token, j in zip(tokens, sections) if j == i]])
        assert part.startswith(f"### Problem {i + 1}") and part.count("###") == 1
        assert part.strip().endswith("}")
    assert sections[-1] == 2 and (np.diff(sections) >= 0).all()
    truncated = decode(chat, [tokens[:30]])[0]
    starts = section_starts(truncated, GOLDS, score)
    assert set(token_sections(chat, tokens[:30], starts)) == {0, 1}


@pytest.mark.parametrize("text", [
    "The answers are 2, 4 and 6.", SOLVED.replace("Problem 1", "Problem 2", 1),
    SOLVED.replace("Problem 3", "Problem 4"),
    SOLVED + "\n\n### Problem 4\nAnswer 4: \\boxed{8}",
    SOLVED + "\n### Problem 1\n",
    SOLVED + "\nAnswer 1: \\boxed{3}",  # section 3 makes the answer of section 1 wrong
    # section 3 makes the answer of section 2 right
    SOLVED.replace("{4}", "{5}") + "\nAnswer 2: \\boxed{4}"])
def test_sections_in_disorder_are_not_guessed(text):
    """Tokens lose the credit for a problem that they still change."""
    assert section_starts(text, GOLDS, score) is None
    assert unsure_share([text, SOLVED], [GOLDS, GOLDS]) == 0.5


def test_credit_to_go_has_the_same_expected_gradient_and_less_variance():
    """The derivation is wrong. The model can be summed exactly: four sections of one token, 0 or 1.
    The chance of a 1 depends on the tokens before; problem i is right if its token is 1."""
    torch.manual_seed(0)
    parameters = torch.randn(2, 4).numpy()  # logits: bias, weight of the ones before
    paths = np.array(list(np.ndindex(2, 2, 2, 2)), dtype=float)  # all 16 completions, (16, 4)
    before = paths.cumsum(axis=1) - paths
    chance = 1 / (1 + np.exp(-(parameters[0] + parameters[1] * before)))
    probability = np.where(paths == 1, chance, 1 - chance).prod(axis=1)
    scores = np.stack([paths - chance, (paths - chance) * before])  # d log pi / dp, (2, 16, 4)
    rng = np.random.default_rng(0)
    estimates = {"sequence": [], "togo": []}
    for _ in range(4000):
        rows = rng.choice(16, size=8, p=probability)  # one group
        correct = paths[None, rows]
        complete = group_advantages(correct.mean(axis=2))[0]
        togo = section_advantages(correct, correct.mean(axis=2))[0]  # (8, 4)
        assert np.allclose(togo[:, 0], complete)
        for name, advantages in (("sequence", complete[:, None]), ("togo", togo)):
            estimates[name].append((scores[:, rows] * advantages).sum(axis=1).ravel() / 7)
    exact = (scores * (probability * paths.mean(axis=1))[:, None]).sum(axis=1).ravel()
    variance = {}
    for name, values in estimates.items():
        mean = np.mean(values, axis=0)
        spread = np.var(values, axis=0)
        variance[name] = spread.sum()
        assert np.abs(mean - exact).max() < 4 * np.sqrt(spread.max() / 4000), name
    assert variance["togo"] < 0.9 * variance["sequence"]


def test_unknown_sections_keep_the_complete_credit_and_penalties_count(shipped):
    """Such completions have no credit, or length penalties are ignored."""
    _, chat = shipped
    texts = ["no sections", SOLVED, SOLVED.replace("{2}", "{0}"), SOLVED.replace("{7}", "{6}")]
    rollout = SimpleNamespace(
        groups=[[{"answer": gold} for gold in GOLDS]], texts=texts,
        completions=[SimpleNamespace(tokens=tokens_of(chat, text)) for text in texts],
        correct=np.array([[score(text, GOLDS) for text in texts]], dtype=float))  # (1, 4, 3)
    penalties = np.array([0.1, 0.2, 0.3, 0.0])
    rollout.rewards = rollout.correct.mean(axis=2) - penalties
    for normalize_std in (False, True):
        settings = SimpleNamespace(reward="", normalize_std=normalize_std)
        found = token_advantages(rollout, chat, settings)
        complete = group_advantages(rollout.rewards, normalize_std)[0]
        assert [len(row) for row in found] == [len(c.tokens) for c in rollout.completions]
        assert np.allclose(found[0], complete[0])
        assert np.allclose([row[0] for row in found], complete)
        last = group_advantages(rollout.correct[:, :, 2] / 3 - penalties, normalize_std)[0]
        assert np.allclose([row[-1] for row in found[1:]], last[1:])


@pytest.mark.slow
def test_the_fork_trains(tmp_path):
    """The example of a fork silently trains as bcr.py does, or not at all."""
    flags = ["--n", 4, "--budget", 120, "--steps", 1, "--groups", 2, "--samples", 4, "--eval-n", 1,
             "--eval-problems", 1]
    processes = {program: start(program, *flags, "--out", tmp_path / program)
                 for program in ("bcr.py", "data.study.credit_togo")}
    for process in processes.values():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    plain, fork = (tmp_path / program for program in processes)
    samples = [(out / "samples/step-000001.txt").read_text() for out in (plain, fork)]
    varies = [" to " in text.split("advantage", 1)[1] for text in samples]
    assert varies == [False, True]  # within a completion
    assert metrics_of(plain)[0]["reward"] == metrics_of(fork)[0]["reward"]
    assert metrics_of(plain)[0]["grad_norm"] != metrics_of(fork)[0]["grad_norm"]
