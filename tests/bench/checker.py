"""
The checker next to math-verify in one run: speed, and verdicts on the benchmarks' golds and their
rewrites.

    pip install math-verify && python -m tests.bench.checker [--pairs 4000]

Both judge the same pairs (gold, answer) and are timed in processor time. The expected verdict
follows from how a pair was made: a rewrite that keeps the value, or one that changes it. Every
disagreement is printed with the side that is right.
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
    """(source, gold, answer, expected) of `count` golds and rewrites, and of the examples."""
    golds = []
    for path in sorted((SHARED / "benchmarks").glob("*.jsonl")):
        golds += [json.loads(line)["answer"] for line in path.open()]
    pairs = [("itself", gold, gold, True) for gold in golds]
    for gold in golds:
        pairs += [("kept: " + name, gold, text, True) for name, text in keeping(gold).items()]
        pairs += [("changed: " + name, gold, text, False) for name, text in changing(gold).items()]
    pairs = random.Random(0).sample(pairs, min(count, len(pairs)))
    examples = [json.loads(line) for line in (SHARED / "checker/examples.jsonl").open()]
    pairs += [("example", case["gold"], case["pred"], case["expected"]) for case in examples
              if case["kind"] == "compare" and isinstance(case["pred"], str)]
    return pairs


def math_verify_equal(prediction, gold):
    """math-verify's comparison with its defaults: both sides are parsed out of their text."""
    from math_verify import parse, verify

    gold = parse(f"${gold}$", raise_on_error=False)
    prediction = parse(f"$\\boxed{{{prediction}}}$", raise_on_error=False)
    return verify(gold, prediction, raise_on_error=False)


JUDGES = {"reward.py": answers_equal, "math-verify": math_verify_equal}


def measure(pairs):
    """{name: (verdicts, seconds of each)}. The judges take turns."""
    results = {name: ([], []) for name in JUDGES}
    for _, gold, answer, _ in pairs:
        for name, judge in JUDGES.items():
            verdicts, seconds = results[name]
            start = time.process_time()
            try:
                verdict = bool(judge(answer, gold))
            except Exception:  # a trainer would lose the step
                verdict = None
            seconds.append(time.process_time() - start)
            verdicts.append(verdict)
    return results


def print_table(results, pairs):
    expected = [pair[3] for pair in pairs]
    print(f"{len(pairs)} pairs\n{'':12}  checks/s   p99 ms  false rewards  missed")
    for name, (verdicts, seconds) in results.items():
        paid = sum(bool(v) and not e for v, e in zip(verdicts, expected))
        missed = sum(not v and e for v, e in zip(verdicts, expected))
        p99 = 1e3 * sorted(seconds)[int(len(seconds) * 0.99)]
        print(f"{name:12} {len(seconds) / sum(seconds):9.0f} {p99:8.3f} {paid:14} {missed:7}")


def print_disagreements(results, pairs):
    verdicts = zip(pairs, results["reward.py"][0], results["math-verify"][0])
    for (source, gold, answer, expected), ours, theirs in sorted(verdicts, key=str):
        if ours == theirs == expected:
            continue
        right = [name for name, verdict in zip(JUDGES, (ours, theirs)) if verdict == expected]
        print(f"  right: {right[0] if right else 'neither':11}  {source}: {answer!r} for {gold!r} "
              f"is {'equal' if expected else 'not equal'}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4000, help="golds and rewrites to draw")
    logging.disable(logging.ERROR)  # of math-verify
    pairs = collect(parser.parse_args().pairs)
    results = measure(pairs)
    print_table(results, pairs)
    print_disagreements(results, pairs)


if __name__ == "__main__":
    main()
