"""
Every problem of every benchmark file through what a run does with it: groups of N, the prompt in
the tokens of a real model, a scripted completion in tokens and back in text, and the checker. The
files are not in this repository.
"""

import numpy as np
import pytest

from conftest import REPO
from data.chat import decode, encode_chat, load_chat
from data.problems import answer_section, batch_prompt, evaluation_groups, load_problems
from reward import score

BENCHMARKS = REPO.parent / "shared/benchmarks"
FILES = sorted(path.stem for path in BENCHMARKS.glob("*.jsonl"))
pytestmark = pytest.mark.skipif(not FILES, reason=f"there are no benchmark files in {BENCHMARKS}")
# Answers to neighbouring problems that are written differently and are equal.
EQUAL = [{"4,000", "4000"}, {"k=3", "3"}]
WORK = "First we look at what is given. Then it follows that $x_1 = 3 \\cdot 4$, so we are done.\n"


@pytest.fixture(scope="module")
def chat(smollm2):
    """The Chat of a real model. Its tokenizer is byte-level, so it can write any text."""
    return load_chat(smollm2)


@pytest.fixture(params=[(file, n) for file in FILES for n in (1, 3, 8)], ids=str)
def groups(request):
    """All problems of a file in at most 700 groups of N."""
    file, n = request.param
    problems = load_problems(BENCHMARKS / f"{file}.jsonl")
    indices, _ = evaluation_groups(problems, n, seed=0)
    return [[problems[i] for i in group] for group in indices[:700]]


def golds_of(groups):
    return [[problem["answer"] for problem in group] for group in groups]


def answered(answers):
    return "\n\n".join(answer_section(i, WORK, a) for i, a in enumerate(answers, start=1))


def encode(chat, text):
    return chat.tokenizer.encode(text, add_special_tokens=False).ids


def check(chat, texts, golds):
    """Marks (P, N) of the texts as a rollout gives them: tokens, then EOS, decoded."""
    texts = decode(chat, [encode(chat, text) + chat.eos_ids[:1] for text in texts])
    return np.array([score(text, group) for text, group in zip(texts, golds)])


def test_prompts_hold_the_problems_and_earn_nothing(chat, groups):
    """A problem does not reach the model as it is written, or repeating the prompt earns
    something."""
    for group in groups:
        prompt = encode_chat(chat, batch_prompt(group))
        text = chat.tokenizer.decode(prompt, skip_special_tokens=False)
        for i, problem in enumerate(group, start=1):
            assert f"\nProblem {i}: {problem['problem']}" in text
        assert len(prompt) < 8192 and not any(score(text, golds_of([group])[0]))


def test_right_answers_earn_all_also_after_thinking(chat, groups):
    """A right answer earns nothing: results are too low, and training pushes the wrong way; or what
    a model tries while thinking overrides its answer."""
    golds = golds_of(groups)
    wrong = answered(["-98765.4321"] * len(golds[0]))
    for before in ("", f"<think>\n{wrong}\n\nWait, no.\n</think>\n\n", f"Hmm. {wrong}</think>\n\n"):
        assert check(chat, [before + answered(group) for group in golds], golds).all()
    texts = [f"<think>\n{answered(group)}\n</think>\n\n{wrong}" for group in golds]
    assert not check(chat, texts, golds).any()


def test_answers_to_the_neighbours_problem_earn_nothing(chat, groups):
    """A right number under the wrong problem counts, so a model may learn to answer out of order,
    or different answers are equal to the checker."""
    golds = golds_of(groups)
    neighbours = golds[1:] + golds[:1]
    correct = check(chat, [answered(group) for group in neighbours], golds)
    for gold, other, right in zip(np.ravel(golds), np.ravel(neighbours), correct.flat):
        gold, other = gold.strip(" $"), other.strip(" $")
        assert right == (gold == other) or {gold, other} in EQUAL, (gold, other)


def test_the_cut_takes_the_last_answer_alone(chat, groups):
    """The budget has no effect: half an answer (\\boxed{12 of \\boxed{123}) earns something, or the
    cut takes away what precedes it."""
    golds = golds_of(groups)
    texts = decode(chat, [encode(chat, answered(group))[:-1] for group in golds])
    correct = np.array([score(text, group) for text, group in zip(texts, golds)])
    assert not correct[:, -1].any() and correct[:, :-1].all()
