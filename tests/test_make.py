"""The shipped world: its answers are right, its solutions do what make.py says, and its model has
the properties without which the experiment would prove nothing."""

import json
import random
import re
import statistics
import sys
from fractions import Fraction

import pytest

from bcr import Settings, draw_groups, evaluate, load_problems
from conftest import REPO, TINY
from reward import answers_equal, score

sys.path.insert(0, str(TINY))
import make  # noqa: E402


@pytest.fixture(scope="module")
def problems():
    return {name: [json.loads(line) for line in open(TINY / f"{name}.jsonl")] for name in ("train", "heldout")}


def value_of(problem):
    """The answer worked out anew from a problem's text, by another way than make.py's."""
    problem = re.sub(r", (gets|finds) ", " + ", re.sub(r", (loses|sells) ", " - ", problem))
    terms = re.findall(r"([+-] |has |^|is )(\d+(?:/\d+)?)", problem.replace("What ", ""))
    return sum(Fraction(number) * (-1 if sign == "- " else 1) for sign, number in terms)


def test_every_gold_is_the_value_of_its_problem(problems):
    """A wrong gold: right answers would be punished. And the checker must take it for itself."""
    for problem in problems["train"] + problems["heldout"]:
        value = value_of(problem["problem"])
        assert answers_equal(str(value), problem["answer"]), problem
        assert answers_equal(problem["answer"], problem["answer"])


def test_the_data_is_as_described(problems):
    """Held-out problems in the training data; kinds, levels or fractions that are missing."""
    texts = {name: {p["problem"] for p in of} for name, of in problems.items()}
    assert len(texts["train"]) == 6000 and len(texts["heldout"]) == 2000 and not texts["train"] & texts["heldout"]
    for of in problems.values():
        assert {p["kind"] for p in of} == set(make.KINDS) and {p["difficulty"] for p in of} == set(make.STEPS)
        assert 0.05 < sum("frac" in p["answer"] for p in of) / len(of) < 0.3


def test_the_shipped_files_are_those_that_make_writes(problems):
    """Data that make.py no longer makes: nobody could build upon the world."""
    known = set()
    for name, count in (("heldout", 2000), ("train", 6000)):
        assert make.make_problems(random.Random(f"0 {name}"), count, known, name) == problems[name]


def test_what_ships_is_small():
    """More than 8 MB in a clone."""
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file() and "pycache" not in str(path)) < 8e6


def test_checks_find_mistakes_and_plain_solutions_keep_them():
    """Solutions that are wrong in another way than intended. Without slips all are right; when
    every step slips and every step is checked, all are right; without checks almost none is."""
    rng = random.Random(0)

    def share_right(**how):
        sample = [make.make_problem(rng) for _ in range(500)]
        solutions = [make.write_solution(rng, problem, **how) for problem in sample]
        return statistics.mean(score(f"{work}Answer 1: {box}", [p["answer"]])[0] for p, (work, box) in zip(sample, solutions))

    assert share_right(slip=0) == 1
    assert share_right(slip=1, redo=1, plain=0, direct=0) == 1
    assert share_right(slip=1, plain=1, direct=0) < 0.3


def test_arithmetic_in_solutions_is_right_where_nothing_slipped():
    """Facts that the model would learn wrong."""
    rng = random.Random(1)
    for _ in range(300):
        work, _ = make.write_solution(rng, make.make_problem(rng), slip=0, direct=0)
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", work):
            assert int(a) + int(sign + b) == int(c)


def test_numbers_and_words_are_single_tokens(shipped):
    """A tokenizer that cuts numbers into digits: the small model could not do arithmetic."""
    _, chat = shipped
    for number in range(make.LARGEST + make.OPERAND):
        assert len(chat.tokenizer.encode(f" {number}").ids) == len(chat.tokenizer.encode(f"{number}").ids) == 1
    for word in (" Wait,", " \\boxed{", " Problem", "###", "\n\n"):
        assert len(chat.tokenizer.encode(word).ids) == 1
    text = 'Any text, "ünïcode" 数学 😀 too:\n\n\tit survives.'
    assert chat.tokenizer.decode(chat.tokenizer.encode(text).ids) == text


def test_the_base_model_is_good_and_writes_loops(shipped, tmp_path):
    """A base model whose accuracy leaves room to mistake better arithmetic for better economy. The
    bounds are loose, for 200 problems; README has the figures for 8,000."""
    model, chat = shipped
    heldout = load_problems(TINY / "heldout.jsonl")[:200]
    for n, least in ((1, 0.93), (4, 0.9)):
        figures, _ = evaluate(model, chat, "tiny", heldout, n, Settings(), tmp_path / f"{n}.jsonl", "")
        assert figures["accuracy"] > least and figures["truncated"] == 0
        assert 60 < figures["tokens_per_problem"] < 100 and 2 < figures["loops_per_problem"] < 5
