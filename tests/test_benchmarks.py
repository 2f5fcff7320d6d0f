"""
Every benchmark file, problem by problem, through what a run does with it: groups of N, the prompt in
a real model's tokens, a completion (written by the test, for no model is asked) in tokens and back in
text, and the checker. Right answers must earn all, wrong and missing ones nothing.

The files are read where they lie and are not part of this repository.
"""

import json
import random

import numpy as np
import pytest

import bcr
from conftest import REPO

BENCHMARKS = REPO.parent / "shared" / "benchmarks"
FILES = sorted(path.stem for path in BENCHMARKS.glob("*.jsonl")) if BENCHMARKS.is_dir() else []
pytestmark = pytest.mark.skipif(not FILES, reason=f"there are no benchmark files in {BENCHMARKS}")
NS = [1, 3, 8]
MOST = 1400  # groups of a file in the slower tests: all of them but for gsm8k_train
# What neighbours may answer in two spellings. Each was looked at, and is worth the same.
WORTH_THE_SAME = [{"4,000", "4000"}, {"k=3", "3"}]


@pytest.fixture(scope="module")
def chat(smollm2):
    """The tokenizer side of a real model: byte-level, so that it can write any text."""
    return bcr.load_chat(smollm2)


def groups_of(file, n, most=10**6):
    """Groups of n problems that have every problem of the file in them (or the first `most` of
    those groups), as (problems, golds)."""
    problems = bcr.load_problems(BENCHMARKS / f"{file}.jsonl")
    size = len(problems) // n
    # The few that do not divide by n sit out an epoch, so there is a last group of them and others.
    groups = bcr.draw_groups(problems, n, seed=0, first=0, count=size).tolist()
    if left := sorted(set(range(len(problems))) - {i for group in groups for i in group}):
        groups.append((left + groups[0])[:n])
    groups = groups[:most]
    return [[problems[i]["problem"] for i in group] for group in groups], [
        [problems[i]["answer"] for i in group] for group in groups]


def section(i, answer, working="First we look at what is given. Then it follows that $x_1 = 3 \\cdot 4$, so we are done."):
    """An answer in the format that bcr.batch_prompt asks for."""
    return f"### Problem {i}\n{working}\nAnswer {i}: \\boxed{{{answer}}}"


def answered(answers):
    return "\n\n".join(section(i, answer) for i, answer in enumerate(answers, start=1))


def through_tokens(chat, texts):
    """The texts as a rollout would give them: tokens, an EOS behind, and decoded by bcr.decode."""
    rows = [encoding.ids + chat.eos_ids[:1] for encoding in chat.tokenizer.encode_batch(texts, add_special_tokens=False)]
    back = bcr.decode(chat, rows)
    assert back == texts
    return back


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_prompts_hold_the_problems(chat, file, n):
    """If it fails, a problem does not reach the model as it was written, or a prompt and the paper's
    budget do not fit into the model that the paper trains."""
    problems, _ = groups_of(file, n, MOST)
    prompts = [bcr.encode_chat(chat, bcr.batch_prompt(group)) for group in problems]
    for group, text in zip(problems, chat.tokenizer.decode_batch(prompts, skip_special_tokens=False)):
        for i, problem in enumerate(group, start=1):
            assert f"\nProblem {i}: {problem}" in text
    assert max(map(len, prompts)) < 8192


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_right_answers_earn_all(chat, file, n):
    """If it fails, a model that answers right is told that it is wrong: every figure of this
    benchmark is too low, and training pushes the wrong way."""
    _, golds = groups_of(file, n)
    if n == 1:
        listed = next(entry["count"] for entry in json.loads((BENCHMARKS / "SOURCES.json").read_text())
                      if entry["file"] == f"{file}.jsonl")
        assert len(golds) == listed
    correct = bcr.check(through_tokens(chat, [answered(group) for group in golds]), golds)
    assert correct.shape == (len(golds), n)
    assert correct.all(), [group[i] for group, row in zip(golds, correct) for i in range(n) if not row[i]][:5]


def wrong(group):
    """An answer to each of a group's problems that is right for none: a number no file has."""
    return ["-98765.4321"] * len(group)


THINKING = {  # what stands before the answer, of a model that thinks first
    "empty": lambda group: "<think>\n\n</think>\n\n",
    "words": lambda group: "<think>\nOkay, so there are problems. Wait, is \\boxed{7} right? Let me see: Problem 1 ...\n</think>\n\n",
    "wrong answers": lambda group: f"<think>\n{answered(wrong(group))}\n\nWait, that is wrong.\n</think>\n\n",
    # The prompt ends in <think>, so only the end of the part is in the completion.
    "opened by the prompt": lambda group: f"Okay. {answered(wrong(group))}\n\nHmm.\n</think>\n\n",
}


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_right_answers_after_thinking_earn_all(chat, file, n):
    """If it fails, what a model tried while thinking counts for more than its answer."""
    _, golds = groups_of(file, n, 120)
    for name, before in THINKING.items():
        correct = bcr.check(through_tokens(chat, [before(group) + answered(group) for group in golds]), golds)
        assert correct.all(), (name, [group for group, row in zip(golds, correct) if not row.all()][:3])
    # Without the words `Answer i:`, which win within one text, but not over what follows the thinking.
    for name in ("wrong answers", "opened by the prompt"):
        texts = [THINKING[name](group) + answered(group).replace("Answer ", "So ") for group in golds]
        assert bcr.check(texts, golds).all(), name
    # The other way about: right while thinking, wrong in the answer.
    texts = [f"<think>\n{answered(group)}\n</think>\n\n{answered(wrong(group))}" for group in golds]
    assert not bcr.check(texts, golds).any()
    # Answers that were reached while thinking, and a budget that ended before the answer.
    texts = [f"<think>\n{answered(group)}\n\nWait, let me check that ag" for group in golds]
    assert bcr.check(through_tokens(chat, texts), golds).all()


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_answers_to_the_neighbours_problem_earn_nothing(chat, file, n):
    """If it fails, a right number under the wrong problem counts, and a model may learn to answer
    out of order; or the checker takes different answers for equal."""
    _, golds = groups_of(file, n, MOST)
    if n == 1:
        neighbours = golds[1:] + golds[:1]
    else:
        neighbours = [group[1:] + group[:1] for group in golds]
    correct = bcr.check(through_tokens(chat, [answered(group) for group in neighbours]), golds)
    pairs = [(a, b) for ours, others in zip(golds, neighbours) for a, b in zip(ours, others)]
    plain = [(a.strip(" $"), b.strip(" $")) for a, b in pairs]
    written_apart = np.array([a != b for a, b in plain])
    credited = [pair for pair, right, apart in zip(plain, correct.flat, written_apart) if right and apart]
    assert written_apart.mean() > 0.5
    assert all(set(pair) in WORTH_THE_SAME for pair in credited), credited
    assert correct.flat[~written_apart].all()


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_answers_cut_off_earn_nothing(chat, file, n):
    """If it fails, the budget does not do its work: half an answer (\\boxed{12 of \\boxed{123}) earns
    something, or the cut takes away what stood before it."""
    _, golds = groups_of(file, n, 600)
    draw = random.Random(0)
    rows = [chat.tokenizer.encode(answered(group), add_special_tokens=False).ids for group in golds]
    tails = [len(chat.tokenizer.encode(f"{group[-1]}}}", add_special_tokens=False).ids) for group in golds]
    for cut in ("just before the last box closes", "within the last answer", "anywhere"):
        lengths = [len(row) - 1 if cut.startswith("just") else
                   len(row) - draw.randint(1, tail) if cut.startswith("within") else draw.randint(0, len(row) - 1)
                   for row, tail in zip(rows, tails)]
        texts = bcr.decode(chat, [row[:length] for row, length in zip(rows, lengths)])
        # The sections that are whole before the cut.
        whole = np.array([[len(answered(group[:i + 1])) <= len(text) for i in range(n)] for group, text in zip(golds, texts)])
        assert np.array_equal(bcr.check(texts, golds), whole), cut
        if cut != "anywhere":
            assert not whole[:, -1].any() and whole[:, :-1].all()


@pytest.mark.parametrize("file", FILES)
def test_no_answer_earns_nothing(file):
    """If it fails, an empty completion, or one that repeats the prompt, earns a reward."""
    for n in NS:
        problems, golds = groups_of(file, n, 600)
        for text in ("", "I don't know.", "### Problem 1\nAnswer 1: \\boxed{...}"):
            assert not bcr.check([text] * len(golds), golds).any()
        echoed = bcr.check([bcr.batch_prompt(group) for group in problems], golds)
        assert not echoed.any()
