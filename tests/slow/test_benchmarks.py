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


def answered(answers):
    return "\n\n".join(answer_section(i, WORK, a) for i, a in enumerate(answers, start=1))


def through_tokens(chat, texts, cut=None):
    """The texts as a rollout gives them: tokens, then EOS, decoded."""
    rows = chat.tokenizer.encode_batch(texts, add_special_tokens=False)
    return decode(chat, [row.ids[:cut] + chat.eos_ids[:1] for row in rows])


def test_right_answers_earn_all_and_others_nothing(chat, groups):
    """A problem does not reach the model as it is written; a right answer earns nothing, or a try
    while thinking overrides it; a right number under the wrong problem counts, or the cut has no
    effect (\\boxed{12 of \\boxed{123}) or takes away what precedes it."""
    golds = [[problem["answer"] for problem in group] for group in groups]

    def check(texts):
        return np.array([score(text, group) for text, group in zip(texts, golds)])  # (P, N)

    prompts = [batch_prompt(group) for group in groups]
    for prompt in prompts:
        ids = encode_chat(chat, prompt)
        assert prompt in chat.tokenizer.decode(ids) and len(ids) < 8192
    assert not check(prompts).any()

    right = [answered(group) for group in golds]
    wrong = answered(["-98765.4321"] * len(golds[0]))
    for before in ("", f"<think>\n{wrong}\n\nWait, no.\n</think>\n\n", f"Hmm. {wrong}</think>\n\n"):
        assert check(through_tokens(chat, [before + text for text in right])).all()
    assert not check([f"<think>\n{text}\n</think>\n\n{wrong}" for text in right]).any()

    cut = check(through_tokens(chat, right, -1))  # before the last box closes
    assert not cut[:, -1].any() and cut[:, :-1].all()

    neighbours = golds[1:] + golds[:1]
    correct = check(through_tokens(chat, [answered(group) for group in neighbours]))
    for gold, other, mark in zip(np.ravel(golds), np.ravel(neighbours), correct.flat):
        pair = {gold.strip(" $"), other.strip(" $")}
        assert mark == (len(pair) == 1 or pair in EQUAL), pair
