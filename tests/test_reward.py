"""The checker: no false reward, no missed answer, no exception, no delay (in processor time, which
does not depend on other processes). The answers and their verdicts are in answers.tsv."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
from reward import MAX_DEPTH, MAX_LENGTH, answers_equal, extract_answers, find_headers, score
from reward_rewrites import changing, keeping

ANSWERS = Path(__file__).with_name("answers.tsv")
SHARED = Path(__file__).parents[2] / "shared"
EXAMPLES = SHARED / "checker" / "examples.jsonl"
BENCHMARKS = SHARED / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.exists(), reason="no shared benchmarks here")


def table(kind):
    """(gold, answer, verdict) of the rows of one kind. The id of a case names its rule."""
    rule = ""
    cases = []
    for line in ANSWERS.read_text(encoding="utf-8").split("\n"):
        if line.startswith("# "):
            rule = line[2:]
        elif line.startswith(kind + "\t"):
            _, gold, answer, verdict, why = line.split("\t")
            name = f"{rule}: {why}: {gold} / {answer}"
            cases.append(pytest.param(gold, answer, verdict, id=name))
    return cases


@pytest.mark.parametrize("gold, answer, verdict", table("answer"))
def test_answers(gold, answer, verdict):
    """A wrong answer is rewarded, or a right one is not; the id names the rule."""
    assert verdict in ("right", "wrong")
    assert answers_equal(answer, gold) is (verdict == "right")


@pytest.mark.parametrize("golds, completion, verdicts", table("completion"))
def test_completions(golds, completion, verdicts):
    """A box counts for another problem, or for none; the id names the rule."""
    completion = completion.replace("⏎", "\n").replace("␍", "\r")
    assert score(completion, golds.split(";")) == [letter == "T" for letter in verdicts]


def test_the_table_is_complete():
    """A part of the table is lost, and with it the rules that it guards."""
    assert len(table("answer")) >= 600 and len(table("completion")) >= 105


def test_examples_of_the_docstring():
    """A reader of reward.py learns a rule that does not hold."""
    rows = [line.split("|") for line in reward.__doc__.splitlines() if line.count("|") == 2]
    assert len(rows) >= 10
    for gold, right, wrong in rows[2:]:
        for answers, verdict in ((right, True), (wrong, False)):
            for answer in re.split("   +", answers.strip()):
                assert answers_equal(answer, gold.strip()) is verdict, (gold, answer)


def test_extract_answers_returns_the_text_of_the_box():
    """Solving writes the wrong text as an answer, or an unanswered problem is not asked again."""
    completion = "### Problem 1\nANSWER 1: \\boxed{ No answer }\n### Problem 3\nAnswer 3: \\boxed{x"
    assert extract_answers(completion, 3) == ["No answer", None, None]


def test_headers_have_numbers_and_offsets():
    """Credit to go gives a token to another section: its number, or where it begins, is wrong."""
    completion = (
        "So:\n ### Problem 2: easy\nas ### Problem 1 shows\r\n**PROBLEM 1-3**\n## Problem i\n")
    starts = [completion.index(text) for text in (" ### Problem 2", "**PROBLEM", "## Problem i")]
    assert find_headers(completion) == [(2, starts[0]), (0, starts[1]), (0, starts[2])]


def test_an_answer_before_the_cut_keeps_its_credit():
    """The budget has the wrong effect: answers before the cut earn nothing, or problems
    after it earn something."""
    golds = ["22", "1/2", "x+1", "7"]
    completion = "".join(f"### Problem {i}\nwork\nAnswer {i}: \\boxed{{{gold}}}\n\n"
                         for i, gold in enumerate(golds, 1))
    ends = [completion.index("}\n\n", completion.index(f"Answer {i}")) + 1 for i in (1, 2, 3, 4)]
    for cut in range(len(completion) + 1):
        assert score(completion[:cut], golds) == [end <= cut for end in ends], completion[:cut]


def quickest(function, *arguments):
    """Processor seconds of the quickest of three calls, none of which finds anything in a cache. A
    garbage collection of everything that pytest holds falls into one of them at most."""
    seconds = []
    for _ in range(3):
        for cached in (reward._clean, reward._read, reward._values):
            cached.cache_clear()
        start = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.mark.skipif(not EXAMPLES.exists(), reason="the shared examples are not here")
def test_shared_examples():
    """A case of the shared list has another verdict than agreed on, or takes too long."""
    wrong = []
    for line in EXAMPLES.read_text().splitlines():
        case = json.loads(line)
        judge = answers_equal if case["kind"] == "compare" else score
        assert quickest(judge, case["pred"], case["gold"]) < case.get("max_ms", 1000) / 1000
        result = judge(case["pred"], case["gold"])
        if result != case["expected"]:
            wrong.append((case["gold"], case["pred"]))
    assert wrong == []


def golds():
    lines = [line for path in sorted(BENCHMARKS.glob("*.jsonl")) for line in path.open()]
    return [json.loads(line)["answer"] for line in lines]


@needs_benchmarks
def test_every_gold_equals_itself():
    """A gold does not equal itself, so its problem can never be answered correctly."""
    assert [gold for gold in golds() if not answers_equal(f" ${gold}$ ", gold)] == []


@needs_benchmarks
@pytest.mark.parametrize("rewrites, verdict", [(keeping, True), (changing, False)])
def test_rewrites_of_golds(rewrites, verdict):
    """A right answer in another spelling earns nothing, or a wrong answer earns a reward."""
    pairs = [(text, gold) for gold in sorted(set(golds())) for text in rewrites(gold).values()]
    wrong = [pair for pair in pairs if answers_equal(*pair) is not verdict]
    assert len(wrong) <= (0.01 if verdict else 0.001) * len(pairs), wrong


PIECES = r"""
\frac \sqrt { } ( ) [ ] \{ \} ^ _ ! + - * / = < , | \le \in \cup \pm \pi \infty \log \sin \text{
\begin{pmatrix} & \\ \end{pmatrix} \lfloor \rfloor \binom % \% ^\circ e i x n 0 1 2 9 12 1,234 .
1e9 9999999999 or and cm $ \boxed{ </think> ² ½ √ ٣ …
""".split() + [" ", "\n", "### Problem 1\n", "Answer 1:", "\u200b", "\ud800", "\x00"]
soup = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


def latex(fraction):
    return f"\\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"


@settings(max_examples=300, deadline=None)
@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_fractions_are_equal_exactly_when_they_are(a, b):
    """The parser's arithmetic differs from that of Fraction."""
    assert answers_equal(latex(a), str(b)) == answers_equal(str(b), latex(a)) == (a == b)
    # with x, so that the gold is not plain
    assert answers_equal(f"x+{latex(a)}+{latex(b)}", f"x+{a + b}")
    assert answers_equal(f"x+({a})*({b})", f"x+{a * b}")
    assert answers_equal(f"x+({a})-{latex(b)}", f"x+{a - b}")


@settings(max_examples=1000, deadline=None)
@given(st.one_of(soup, st.text()), st.one_of(soup, st.text()))
def test_any_text_is_judged_soon(completion, gold):
    """A completion makes the checker raise or hang, or a gold that is not understood does not equal
    itself. Only text without content (spaces, dots, empty brackets) equals nothing."""
    boxed = f"### Problem 1\nAnswer 1: \\boxed{{{completion}}}"
    assert answers_equal(completion, gold) in (True, False)
    assert answers_equal(f" {gold}", gold) or not answers_equal(gold, gold)
    assert score(boxed, [gold, gold]) in ([True, False], [False, False])
    assert len(extract_answers(completion, 4)) == 4
    assert quickest(score, boxed, [gold, gold]) < 0.25


@pytest.mark.parametrize("value", [None, 5, True, b"5", ["5"]])
def test_other_types_are_wrong_not_fatal(value):
    """An answer that was not found (None), or a value of another type, makes the checker raise."""
    assert answers_equal(value, "5") is answers_equal("5", value) is False
    assert score(value, ["5"]) == [False]
    assert extract_answers(value, 2) == [None, None]


@pytest.mark.parametrize("gold", ["", " ", "{}", "{ }", "$$", "\\text{}", "...", "\\,", "\u200b"])
def test_empty_gold_is_never_rewarded(gold):
    """An empty gold of a broken data set rewards an empty answer."""
    assert not any(answers_equal(text, gold) for text in ("", " ", gold, "5", "...", "\\boxed{}"))


LONG = [
    "(" * 100_000 + ")" * 100_000, "{" * 200_000, "\\sqrt" * 40_000, "\\frac" * 90, "1_000",
    "\\sin" * 90 + "x", "2^" * 249 + "2", "9^{9^{9^{9}}}", "3" + "!" * 400, "((500)!)!", "|" * 500,
    "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, "+".join(["2^{-4000}", "3^{-2500}"] * 27), "x" * 500,
    "xyz+" * 124 + "1", "\\pm " * 90 + "1", "1e999999999", "1e-999999999", "\\text{a}" * 60 + "1",
    " " * 498 + "1", "1" * 5000, "1" * 500, "1," * 249, "word " * 99, "170!" * 120, "x_{" * 160,
    "100," * 124 + "100", "\\begin{pmatrix}" + "1&" * 60 + "\\end{pmatrix}", "x=" * 249 + "1",
    "(1," * 30 + "2" + ")" * 30, "x\\in " * 90, "x<" * 60, "\\lfloor" * 90, "-" * 499 + "1",
    "\\log_" * 90, "123 " * 124 + "5", "\ufdfa" * 500, "²" * 500, "½" * 500,
    "\\binom{500}{250}" * 30, "\ud800" * 500, "(x!)" * 120, "x_{\ud800}", "\x00" * 500, "A" * 500,
    "1\\frac12" * 60, "x\\pm 1," * 60, "*".join(["1e1000", "3e-1000"] * 40), "\\{x\\pm" * 40,
    ",".join(["x^2+y"] * 64), "(x+1)" * 95, ",".join(f"x+{k}" for k in range(64)),
    ",".join(f"{k}" for k in range(120)), "3^{5000}," * 60,
    ",".join(f"(x+{k})^2" for k in range(50)), "2^{999}+" * 60 + "1", "(2^{999}/3^{600})" * 28,
    "\\lfloor x\\rfloor," + ",".join(f"x+{k}" for k in range(60)), "\\sin^2 x+" * 50 + "1",
    "x!+" * 160 + "1", "2^{7999}/3^{5000}" + "+1" * 230, "(3^{4100})/(7^{2000})+" * 25 + "1",
    "\\sqrt{3^{601}}," * 30, "\\lfloor n \\rfloor" * 30, "x^{2024}+" * 55 + "1",
]


@pytest.mark.parametrize("text", LONG, ids=[repr(text[:24]) for text in LONG])
def test_hostile_answers_take_milliseconds(text):
    """Deep recursion, giant numbers, or a long list, compared item by item, stop the run."""
    for gold in ("5", text[::-1], ",".join(reversed(text.split(","))), "x+" + text):
        assert quickest(answers_equal, text, gold) < 0.05
        assert quickest(answers_equal, text[:MAX_LENGTH], gold[:MAX_LENGTH]) < 0.05


FLOODS = [
    "\\boxed{", "\\boxed{}", "\\boxed{5}", "\\boxed", "\\boxed ", "{", "}", "\\", "#", "*", "\n",
    " ", "### Problem 1\n", "### ", "# Problem1\n", "Answer 1: ", "answer1:", "Answer 1:\n", "a",
    "n", "answer1:\\boxed{5}", "box", "</think>", "answer ", "Answer 1: \\boxed{" + "{" * 400,
    "\\boxed{" + "{}" * 240, "\r\n", "answer1:" + "$" * 90 + "\n\\boxed",
]


@pytest.mark.parametrize("flood", FLOODS, ids=[repr(flood[:24]) for flood in FLOODS])
def test_extraction_is_linear(flood):
    """Extraction from 400,000 characters takes quadratic time in what they repeat."""
    text = (flood * (400_000 // len(flood)))[:399_000]
    for completion in (text, text + "\nAnswer 1: \\boxed{5}", "Answer 1: \\boxed{" + text):
        assert quickest(extract_answers, completion, 8) < 0.25  # measured: below 0.01 s


def mutated(rng, bases):
    """A completion for two problems with a few random edits."""
    text = ""
    for i in (1, 2):
        text += f"### Problem {i}\n{rng.choice(bases)}\n"
        text += f"Answer {i}: \\boxed{{{rng.choice(bases)}}}\n"
    for _ in range(rng.randrange(1, 6)):
        a, b = sorted(rng.choices(range(len(text) + 1), k=2))
        character = chr(rng.randrange(rng.choice((128, 0x3000, 0x110000))))
        new = rng.choice([rng.choice(PIECES) * 30, character, "", text[a:b] * 3])
        text = (text[:a] + new + text[rng.choice((a, b)):])[:4000]
    return text


def test_fuzz():
    """Text that a model can write makes the checker raise or hang."""
    rng = random.Random(0)
    bases = [text for case in table("answer") for text in case.values[:2]]
    bases += sorted(set(golds())) if BENCHMARKS.exists() else []
    for _ in range(5000):
        completion = mutated(rng, bases)
        pair = [rng.choice(bases), rng.choice(bases)]
        start = time.process_time()
        verdict = score(completion, pair)
        assert len(verdict) == 2 and set(verdict) <= {True, False}
        if time.process_time() - start > 0.1:
            assert quickest(score, completion, pair) < 0.1, (completion, pair)
