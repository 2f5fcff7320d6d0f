"""
Every problem of every benchmark file through what a run does with it: groups of N, the prompt in
the tokens of a real model, a scripted completion in tokens and back in text, and the checker. Right
answers must earn everything, wrong and missing ones nothing. The files are not in this repository.
"""

import json
import random

import numpy as np
import pytest

from conftest import REPO
from data.chat import decode, encode_chat, load_chat
from data.problems import answer_section, batch_prompt, evaluation_groups, load_problems
from reward import score

BENCHMARKS = REPO.parent / "shared/benchmarks"
FILES = sorted(path.stem for path in BENCHMARKS.glob("*.jsonl"))
pytestmark = pytest.mark.skipif(not FILES, reason=f"there are no benchmark files in {BENCHMARKS}")
NS = [1, 3, 8]
MOST = 1400  # groups of a file in the slower tests: all of them but for gsm8k_train
# Answers to neighbouring problems that are written differently and are equal.
EQUAL = [{"4,000", "4000"}, {"k=3", "3"}]
WORK = "First we look at what is given. Then it follows that $x_1 = 3 \\cdot 4$, so we are done.\n"


@pytest.fixture(scope="module")
def chat(smollm2):
    """The Chat of a real model. Its tokenizer is byte-level, so it can write any text."""
    return load_chat(smollm2)


def groups_of(file, n, most=10**6):
    """The first `most` groups of n problems, as (groups, golds). All groups hold every problem."""
    problems = load_problems(BENCHMARKS / f"{file}.jsonl")
    indices, _ = evaluation_groups(problems, n, seed=0)
    groups = [[problems[i] for i in group] for group in indices[:most]]
    return groups, [[problem["answer"] for problem in group] for group in groups]


def answered(answers):
    return "\n\n".join(answer_section(i, WORK, answer)
                       for i, answer in enumerate(answers, start=1))


def check(texts, golds):
    return np.array([score(text, group) for text, group in zip(texts, golds)])


def through_tokens(chat, texts):
    """The texts as a rollout gives them: tokens, then EOS, decoded."""
    rows = [encoding.ids + chat.eos_ids[:1]
            for encoding in chat.tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert decode(chat, rows) == texts
    return texts


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_prompts_hold_the_problems(chat, file, n):
    """A problem does not reach the model as it is written, or a prompt and the paper's budget do
    not fit the model that the paper trains."""
    groups, _ = groups_of(file, n, MOST)
    prompts = [encode_chat(chat, batch_prompt(group)) for group in groups]
    texts = chat.tokenizer.decode_batch(prompts, skip_special_tokens=False)
    for group, text in zip(groups, texts):
        for i, problem in enumerate(group, start=1):
            assert f"\nProblem {i}: {problem['problem']}" in text
    assert max(map(len, prompts)) < 8192


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_right_answers_earn_all(chat, file, n):
    """A right answer earns nothing: every result of this benchmark is too low, and training pushes
    the wrong way."""
    _, golds = groups_of(file, n)
    if n == 1:
        sources = json.loads((BENCHMARKS / "SOURCES.json").read_text())
        counts = {source["file"]: source["count"] for source in sources}
        assert len(golds) == counts[f"{file}.jsonl"]
    correct = check(through_tokens(chat, [answered(group) for group in golds]), golds)
    assert correct.shape == (len(golds), n)
    assert correct.all(), np.array(golds)[~correct][:5]


def wrong(group):
    """Answers that are wrong for every problem: a number that is not in any file."""
    return ["-98765.4321"] * len(group)


THINKING = {  # what stands before the answer, of a model that thinks first
    "empty": lambda group: "<think>\n\n</think>\n\n",
    "words": lambda group: (
        "<think>\nWait, is \\boxed{7} right? Let me see: Problem 1 ...\n</think>\n\n"),
    "wrong answers": lambda group: (
        f"<think>\n{answered(wrong(group))}\n\nWait, that is wrong.\n</think>\n\n"),
    # The prompt ends in <think>, so only the end of the part is in the completion.
    "opened by the prompt": lambda group: f"Okay. {answered(wrong(group))}\n\nHmm.\n</think>\n\n",
}


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_right_answers_after_thinking_earn_all(chat, file, n):
    """What a model tries while thinking overrides its answer."""
    _, golds = groups_of(file, n, 120)
    for name, before in THINKING.items():
        texts = [before(group) + answered(group) for group in golds]
        assert check(through_tokens(chat, texts), golds).all(), name
    # Without the label `Answer i:`, which overrides within one text, but not over what follows the
    # thinking.
    for name in ("wrong answers", "opened by the prompt"):
        texts = [THINKING[name](group) + answered(group).replace("Answer ", "So ")
                 for group in golds]
        assert check(texts, golds).all(), name
    # Right while thinking, wrong in the answer.
    texts = [f"<think>\n{answered(group)}\n</think>\n\n{answered(wrong(group))}" for group in golds]
    assert not check(texts, golds).any()
    # Answers found while thinking, and a budget that ends before the answer.
    texts = [f"<think>\n{answered(group)}\n\nWait, let me check that ag" for group in golds]
    assert check(through_tokens(chat, texts), golds).all()


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_answers_to_the_neighbours_problem_earn_nothing(chat, file, n):
    """A right number under the wrong problem counts, so a model may learn to answer out of order,
    or different answers are equal to the checker."""
    _, golds = groups_of(file, n, MOST)
    neighbours = [group[1:] + group[:1] for group in golds]
    if n == 1:
        neighbours = golds[1:] + golds[:1]
    correct = check(through_tokens(chat, [answered(group) for group in neighbours]), golds)
    pairs = [(a.strip(" $"), b.strip(" $")) for a, b in zip(np.ravel(golds), np.ravel(neighbours))]
    different = np.array([a != b for a, b in pairs])
    credited = [pair for pair, right, differs in zip(pairs, correct.flat, different)
                if right and differs]
    assert different.mean() > 0.5
    assert all(set(pair) in EQUAL for pair in credited), credited
    assert correct.ravel()[~different].all()


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("file", FILES)
def test_answers_cut_off_earn_nothing(chat, file, n):
    """The budget has no effect: half an answer (\\boxed{12 of \\boxed{123}) earns something, or the
    cut takes away what precedes it."""
    _, golds = groups_of(file, n, 600)
    draw = random.Random(0)

    def encode(text):
        return chat.tokenizer.encode(text, add_special_tokens=False).ids

    rows = [encode(answered(group)) for group in golds]
    tails = [len(encode(group[-1] + "}")) for group in golds]
    lengths_of = {
        "just before the last box closes": [len(row) - 1 for row in rows],
        "within the last answer": [len(row) - draw.randint(1, tail)
                                   for row, tail in zip(rows, tails)],
        "anywhere": [draw.randrange(len(row)) for row in rows]}
    for cut, lengths in lengths_of.items():
        texts = decode(chat, [row[:length] for row, length in zip(rows, lengths)])
        complete = np.array([[len(answered(group[:i + 1])) <= len(text) for i in range(n)]
                             for group, text in zip(golds, texts)])  # the sections before the cut
        assert np.array_equal(check(texts, golds), complete), cut
        if cut != "anywhere":
            assert not complete[:, -1].any() and complete[:, :-1].all()


@pytest.mark.parametrize("file", FILES)
def test_no_answer_earns_nothing(file):
    """An empty completion, or one that repeats the prompt, earns a reward."""
    for n in NS:
        groups, golds = groups_of(file, n, 600)
        for text in ("", "I don't know.", "### Problem 1\nAnswer 1: \\boxed{...}"):
            assert not check([text] * len(golds), golds).any()
        assert not check([batch_prompt(group) for group in groups], golds).any()
