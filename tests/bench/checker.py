"""
The checker next to math-verify: speed, and wrong verdicts on the benchmarks' golds, their rewrites
and the shared examples.

    pip install math-verify && python -m tests.bench.checker [--pairs 4000]

The right verdict follows from how a pair was made: a rewrite that keeps the value, or one that
changes it. The times are processor times.
"""

import argparse
import json
import logging
import random
import time
from pathlib import Path

from reward import answers_equal
from tests.reward_rewrites import changing, keeping

SHARED = Path(__file__).resolve().parents[3] / "shared"


def collect(count):
    """(gold, answer, right verdict) of `count` golds and rewrites, and of the examples."""
    pairs = []
    for path in sorted((SHARED / "benchmarks").glob("*.jsonl")):
        for gold in [json.loads(line)["answer"] for line in path.open()]:
            pairs += [(gold, text, True) for text in (gold, *keeping(gold).values())]
            pairs += [(gold, text, False) for text in changing(gold).values()]
    pairs = random.Random(0).sample(pairs, min(count, len(pairs)))
    examples = [json.loads(line) for line in (SHARED / "checker/examples.jsonl").open()]
    return pairs + [(case["gold"], case["pred"], case["expected"]) for case in examples
                    if case["kind"] == "compare" and isinstance(case["pred"], str)]


def math_verify_equal(prediction, gold):
    """math-verify's comparison with its defaults: both sides are parsed out of their text."""
    from math_verify import parse, verify

    gold = parse(f"${gold}$", raise_on_error=False)
    prediction = parse(f"$\\boxed{{{prediction}}}$", raise_on_error=False)
    return verify(gold, prediction, raise_on_error=False)


def measure(name, judge, pairs):
    """Prints the wrong verdicts of a judge, and a line with its speed, and how often it paid for a
    wrong answer or missed a right one."""
    paid = missed = 0
    start = time.process_time()
    for gold, answer, expected in pairs:
        verdict = bool(judge(answer, gold))
        if verdict != expected:
            print(f"{name}: {answer!r} for {gold!r} is {'equal' if expected else 'not equal'}")
        paid += verdict > expected
        missed += verdict < expected
    speed = len(pairs) / (time.process_time() - start)
    print(f"{name}: {len(pairs)} pairs, {speed:,.0f} a second; {paid} paid, {missed} missed")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4000, help="golds and rewrites to draw")
    pairs = collect(parser.parse_args().pairs)
    logging.disable(logging.ERROR)  # of math-verify
    measure("math-verify", math_verify_equal, pairs)
    measure("reward.py", answers_equal, pairs)


if __name__ == "__main__":
    main()
