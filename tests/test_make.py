"""The shipped world: its answers are right, its solutions are what make.py describes, and its model has the
properties without which the experiment would prove nothing."""

import random
import re
import statistics
import sys
from fractions import Fraction

import pytest

from conftest import TINY, lines_of
from data.problems import answer_section, load_problems
from evaluate import EvaluationSettings, evaluate, summarize
from reward import answers_equal, score

sys.path.insert(0, str(TINY))
import make  # noqa: E402


@pytest.fixture(scope="module")
def problems():
    return {name: lines_of(TINY / f"{name}.jsonl") for name in ("train", "heldout")}


def value_of(problem):
    """The answer computed from a problem's text, in another way than in make.py."""
    problem = re.sub(r", (gets|finds) ", " + ", re.sub(r", (loses|sells) ", " - ", problem))
    terms = re.findall(r"([+-] |has |^|is )(\d+(?:/\d+)?)", problem.replace("What ", ""))
    return sum(Fraction(number) * (-1 if sign == "- " else 1) for sign, number in terms)


def test_every_gold_is_the_value_of_its_problem(problems):
    """A gold is wrong, or the checker refuses it, and right answers earn nothing."""
    for problem in problems["train"] + problems["heldout"]:
        value = value_of(problem["problem"])
        assert answers_equal(str(value), problem["answer"]), problem
        assert answers_equal(problem["answer"], problem["answer"])


def test_the_data_is_as_described(problems):
    """Held-out problems are in the training data, or kinds, levels or fractions are missing."""
    texts = {name: {p["problem"] for p in of} for name, of in problems.items()}
    assert {name: len(of) for name, of in texts.items()} == {"train": 6000, "heldout": 2000}
    assert not texts["train"] & texts["heldout"]
    for of in problems.values():
        assert {p["kind"] for p in of} == set(make.KINDS) and {p["difficulty"] for p in of} == set(make.STEPS)
        assert 0.05 < sum("frac" in p["answer"] for p in of) / len(of) < 0.3


def test_the_shipped_files_are_those_that_make_writes(problems):
    """make.py no longer writes the shipped data, so the world cannot be extended."""
    known = set()
    for name, count in (("heldout", 2000), ("train", 6000)):
        assert make.make_problems(random.Random(f"0 {name}"), count, known, name) == problems[name]


def test_what_ships_is_small():
    """A clone has more than 8 MB of it."""
    files = [path for path in TINY.rglob("*") if path.is_file() and "pycache" not in str(path)]
    assert sum(path.stat().st_size for path in files) < 8e6


def test_copying_the_problem_earns_nothing():
    """The expression in "What is X?" is accepted as its own value: the cheapest answer under a budget."""
    for problem in load_problems(TINY / "heldout.jsonl"):
        numbers = re.findall(r"\d+", problem["problem"])
        copies = {" + ".join(numbers), *re.findall("What is (.*)\\?", problem["problem"])}
        copies |= {re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", copy) for copy in copies}
        for copy in copies:
            assert score(answer_section(1, "", copy), [problem["answer"]]) == [False], copy


def test_checks_find_mistakes_and_concise_solutions_keep_them():
    """Solutions are wrong in another way than intended. Without slips all are right, joined steps included;
    if every step slips and is checked, all are right; if every step slips without checks, few are."""
    rng = random.Random(0)

    def share_right(verbose, **how):
        sample = [make.make_problem(rng) for _ in range(500)]
        solutions = [make.write_solution(rng, problem, verbose, **how) for problem in sample]
        return statistics.mean(score(answer_section(1, *solution), [problem["answer"]])[0]
                               for problem, solution in zip(sample, solutions))

    assert share_right(True, slip=0, hurry=0.5) == share_right(False, slip=0, hurry=0.5) == 1
    assert share_right(True, slip=1, redo=1, direct=0) == 1
    assert share_right(False, slip=1, direct=0) < 0.3


def test_arithmetic_in_solutions_is_right_where_nothing_slipped():
    """The model learns wrong facts."""
    rng, lengths = random.Random(1), set()
    for verbose in [True, False] * 150:
        work, _ = make.write_solution(rng, make.make_problem(rng), verbose, slip=0, hurry=0.5, direct=0)
        for expression, value in re.findall(r"(\d+(?: [+-] \d+)+) = (\d+)", work):
            terms = re.findall(r"[+-]?\d+", expression.replace(" ", ""))
            assert sum(map(int, terms)) == int(value)
            lengths.add(len(terms))
    assert lengths == {2, 3, 4}  # joined steps are among them


def test_the_solutions_of_a_completion_have_one_style():
    """A model that never saw eight concise solutions in a row cannot be shortened at N = 8."""
    rng = random.Random(2)
    texts = [make.write_completion(rng, [make.make_problem(rng) for _ in range(8)]) for _ in range(400)]
    waits = [text.count("Wait") for text in texts]
    assert 0.15 < waits.count(0) / len(texts) < 0.25
    assert all(8 < count for count in waits if count)


def test_numbers_and_words_are_single_tokens(shipped):
    """The tokenizer splits numbers into digits, which the small model cannot add."""
    _, chat = shipped
    for number in range(make.LARGEST + make.OPERAND):
        for text in (f" {number}", f"{number}"):
            assert len(chat.tokenizer.encode(text).ids) == 1
    for word in (" Wait,", " \\boxed{", " Problem", "###", "\n\n"):
        assert len(chat.tokenizer.encode(word).ids) == 1
    text = 'Any text, "ünïcode" 数学 😀 too:\n\n\tit survives.'
    assert chat.tokenizer.decode(chat.tokenizer.encode(text).ids) == text


def test_the_base_model_is_good_and_writes_loops(shipped):
    """The base model is so inaccurate that better arithmetic looks like shorter reasoning. The bounds are
    loose, for 200 problems; data/tiny/README.md has the figures for 8,000."""
    heldout, s = load_problems(TINY / "heldout.jsonl")[:200], EvaluationSettings()
    for n, least in ((1, 0.93), (4, 0.9)):
        records = evaluate(*shipped, heldout, n, 1024, score, s)
        figures = summarize(records, n, s)
        assert figures["accuracy"] > least and figures["truncated"] == 0
        assert 60 < figures["tokens_per_problem"] < 100 and 2 < figures["waits_per_problem"] < 5
