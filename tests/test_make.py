"""The shipped world: its answers are right, its solutions are what make.py describes, and its model
has the properties without which the experiment would prove nothing."""

import random
import re
from fractions import Fraction

import numpy as np
import pytest

from conftest import TINY, lines_of
from data.chat import decode, encode_chat
from data.problems import answer_section, batch_prompt
from data.tiny import make
from reward import answers_equal, score
from rollout import generate

TRAIN = lines_of(TINY / "train.jsonl")
HELDOUT = lines_of(TINY / "heldout.jsonl")


def value_of(problem):
    """The answer computed from a problem's text, in another way than in make.py."""
    problem = re.sub(r", (gets|finds) ", " + ", re.sub(r", (loses|sells) ", " - ", problem))
    terms = re.findall(r"([+-] |has |^|is )(\d+(?:/\d+)?)", problem.replace("What ", ""))
    return sum(-Fraction(number) if sign == "- " else Fraction(number) for sign, number in terms)


def test_every_gold_is_the_value_of_its_problem():
    """A gold is wrong, or the checker refuses it, and right answers earn nothing."""
    for problem in TRAIN + HELDOUT:
        assert answers_equal(str(value_of(problem["problem"])), problem["answer"]), problem


def test_heldout_problems_are_not_in_the_training_data():
    """Held-out problems are in the training data, or kinds, levels or fractions are missing."""
    assert len({p["problem"] for p in TRAIN + HELDOUT}) == len(TRAIN + HELDOUT) == 8000
    for some in (TRAIN, HELDOUT):
        assert {p["kind"] for p in some} == set(make.KINDS)
        assert 0.05 < np.mean(["frac" in p["answer"] for p in some]) < 0.3


def test_the_shipped_files_are_those_that_make_writes():
    """make.py no longer writes the shipped data, so the world cannot be extended."""
    known = set()
    assert make.make_problems(random.Random("0 heldout"), 2000, known, "heldout") == HELDOUT
    assert make.make_problems(random.Random("0 train"), 6000, known, "train") == TRAIN
    made = make.train_tokenizer(random.Random("0 tokenizer"))
    assert made.to_str(pretty=True) == (TINY / "model/tokenizer.json").read_text()


def test_copying_the_problem_earns_nothing():
    """The expression in "What is X?" is accepted as its own value: the cheapest answer there is."""
    for problem in HELDOUT:
        numbers = re.findall(r"\d+", problem["problem"])
        for copy in (" + ".join(numbers), *re.findall("What is (.*)\\?", problem["problem"])):
            for text in (copy, re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", copy)):
                assert score(answer_section(1, "", text), [problem["answer"]]) == [False], text


@pytest.mark.parametrize("style, least, most", [
    ("thorough", 0.45, 0.75), ("checked", 0.15, 0.45), ("concise", 0, 0.15),
    ("in twos", 0, 0.15)])
def test_checks_find_mistakes_and_concise_solutions_keep_them(style, least, most):
    """Checks are of no use, or solutions without them are right although their steps are not. Here
    every step slips; without slips every solution is right."""
    rng = random.Random(0)
    for slip, low, high in ((1, least, most), (0, 1, 1)):
        right = []
        for _ in range(500):
            problem = make.make_problem(rng)
            solution = make.write_solution(rng, problem, style, direct=0, slip=slip, hurry=slip)
            right += score(answer_section(1, *solution), [problem["answer"]])
        assert low <= np.mean(right) <= high, slip


def test_arithmetic_in_solutions_is_right_where_nothing_slipped():
    """The model learns wrong facts, or joined solutions do not join."""
    rng = random.Random(1)
    for style, most in (("thorough", 2), ("concise", 2), ("in twos", 3), ("in threes", 4)):
        lengths = set()
        for _ in range(200):
            problem = make.make_problem(rng)
            work, _ = make.write_solution(rng, problem, style, direct=0, slip=0, hurry=0)
            for expression, value in re.findall(r"(\d+(?: [+-] \d+)+) = (\d+)", work):
                terms = re.findall(r"[+-]?\d+", expression.replace(" ", ""))
                assert sum(map(int, terms)) == int(value)
                lengths.add(len(terms))
        assert lengths == set(range(2, most + 1))


def test_hard_problems_take_three_times_the_tokens_of_easy_ones(shipped):
    """Problems are so alike that a shared budget can do no more than a cap for each."""
    rng = random.Random(0)
    problems = [make.make_problem(rng) for _ in range(3000)]
    solutions = [make.write_solution(rng, problem, "concise", direct=0) for problem in problems]
    texts = [answer_section(1, *solution) for solution in solutions]
    lengths = sorted(len(e.ids) + 1 for e in shipped[1].tokenizer.encode_batch(texts))  # with EOS
    assert np.mean(lengths[-300:]) > 3 * np.mean(lengths[:300])


def test_completions_are_terser_the_more_problems_they_have():
    """Training cannot show what it does with the fall that the base model has, as large models
    have."""
    rng = random.Random(2)
    words = {}
    for n in (1, 2, 4, 8, 12):
        written = [make.write_completion(rng, [make.make_problem(rng) for _ in range(n)])
                   for _ in range(400)]
        words[n] = np.mean([len(text.split()) for text in written]) / n
    assert list(words.values()) == sorted(words.values(), reverse=True)
    assert words[8] < 0.8 * words[1]
    styles = [make.draw_style(rng, 1, joined=0.4) for _ in range(2000)]
    assert 0.35 < np.mean([style in make.JOINED for style in styles]) < 0.45


def test_numbers_and_words_are_single_tokens(shipped):
    """The tokenizer splits numbers into digits, which the small model cannot add."""
    _, chat = shipped
    numbers = [str(number) for number in range(make.LARGEST + make.OPERAND)]
    words = [" Wait,", " \\boxed{", " Problem", "###", "\n\n"]
    for text in numbers + [f" {number}" for number in numbers] + words:
        assert len(chat.tokenizer.encode(text).ids) == 1
    text = 'Any text, "ünïcode" 数学 😀 too:\n\n\tit survives.'
    assert chat.tokenizer.decode(chat.tokenizer.encode(text).ids) == text


def test_the_base_model_is_good_and_writes_less_when_n_rises(shipped):
    """The base model is so inaccurate that better arithmetic looks like shorter reasoning, or it
    does not fall with N. The bounds are loose, for 200 problems; the study has 2,000."""
    model, chat = shipped
    tokens = {}
    for n in (1, 8):
        groups = [HELDOUT[i : i + n] for i in range(0, 200, n)]
        prompts = [encode_chat(chat, batch_prompt(group)) for group in groups]
        completions = generate(model, prompts, 1, 1536, eos_ids=chat.eos_ids)
        texts = decode(chat, [c.tokens for c in completions])
        right = [score(text, [p["answer"] for p in group]) for text, group in zip(texts, groups)]
        assert np.mean(right) > 0.9 and not any(c.truncated for c in completions)
        tokens[n] = sum(len(c.tokens) for c in completions) / 200
        assert 1 < "".join(texts).count("Wait") / 200 < 6
    assert 70 < tokens[1] < 110 and tokens[8] < 0.85 * tokens[1]
