"""
The checker next to math-verify in one run: speed, and verdicts on the benchmarks' golds and their
rewrites.

    pip install math-verify && python tests/bench/checker.py [--pairs 4000]

Both judge the same pairs (gold, answer) in alternating blocks and are timed in processor time. The
expected verdict follows from how a pair was made: a rewrite that keeps the value, or one that
changes it. Every disagreement is printed with the side that is right.
"""

import argparse
import json
import logging
import random
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
from reward import answers_equal  # noqa: E402
from reward_rewrites import changing, keeping  # noqa: E402

SHARED = REPO.parent / "shared"
BLOCK = 200  # pairs that one side judges before the other continues


def collect(count, seed):
    """(source, gold, answer, expected) of `count` golds and rewrites, and of the examples."""
    golds = [json.loads(line)["answer"] for path in sorted((SHARED / "benchmarks").glob("*.jsonl"))
             for line in path.open()]
    pairs = [("itself", gold, gold, True) for gold in golds]
    for gold in golds:
        pairs += [("kept: " + name, gold, text, True) for name, text in keeping(gold).items()]
        pairs += [("changed: " + name, gold, text, False) for name, text in changing(gold).items()]
    rng = random.Random(seed)
    pairs = rng.sample(pairs, min(count, len(pairs)))
    examples = [json.loads(line) for line in (SHARED / "checker/examples.jsonl").open()]
    pairs += [("example", case["gold"], case["pred"], case["expected"]) for case in examples
              if case["kind"] == "compare" and isinstance(case["pred"], str)]
    rng.shuffle(pairs)
    return pairs


def math_verify_equal():
    """math-verify's comparison with its defaults: both sides are parsed out of their text."""
    from math_verify import parse, verify

    logging.disable(logging.ERROR)

    def equal(prediction, gold):
        gold = parse(f"${gold}$", raise_on_error=False)
        prediction = parse(f"$\\boxed{{{prediction}}}$", raise_on_error=False)
        return verify(gold, prediction, raise_on_error=False)

    return equal


def measure(judges, pairs):
    """{name: (verdicts, seconds of each)}. The judges alternate, block by block."""
    results = {name: ([], []) for name in judges}
    for begin in range(0, len(pairs), BLOCK):
        for name, judge in judges.items():
            verdicts, seconds = results[name]
            for _, gold, answer, _ in pairs[begin:begin + BLOCK]:
                start = time.process_time()
                try:
                    verdict = bool(judge(answer, gold))
                except Exception:  # a trainer would lose the step
                    verdict = None
                seconds.append(time.process_time() - start)
                verdicts.append(verdict)
    return results


def print_table(results, pairs):
    print(f"{len(pairs)} pairs")
    print(f"{'':12} {'checks/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'worst ms':>9} "
          f"{'false rewards':>14} {'missed':>7} {'wrong on examples':>18}")
    for name, (verdicts, seconds) in results.items():
        ranked = sorted(seconds)
        paid = sum(bool(verdict) and not pair[3] for verdict, pair in zip(verdicts, pairs))
        missed = sum(not verdict and pair[3] for verdict, pair in zip(verdicts, pairs))
        examples = [bool(verdict) == pair[3] for verdict, pair in zip(verdicts, pairs)
                    if pair[0] == "example"]
        print(f"{name:12} {len(seconds) / sum(seconds):9.0f} {ranked[len(ranked) // 2] * 1e3:8.3f} "
              f"{ranked[int(len(ranked) * 0.99)] * 1e3:8.3f} {ranked[-1] * 1e3:9.2f} "
              f"{paid:14} {missed:7} {examples.count(False):9} of {len(examples)}")


def print_disagreements(pairs, ours, theirs):
    rows = sorted(zip(pairs, ours, theirs), key=lambda row: row[0][0])
    for (source, gold, answer, expected), a, b in rows:
        truth = "equal" if expected else "not equal"
        if a != b:
            right = "reward.py" if a == expected else "math-verify"
            print(f"  {right:11} is right   {source}: {answer!r} for {gold!r} is {truth}")
        elif a != expected:
            print(f"  both are wrong           {source}: {answer!r} for {gold!r} is {truth}")


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=4000, help="golds and rewrites to draw")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--quiet", action="store_true", help="do not print the disagreements")
    options = options.parse_args()
    pairs = collect(options.pairs, options.seed)
    results = measure({"reward.py": answers_equal, "math-verify": math_verify_equal()}, pairs)
    print_table(results, pairs)
    ours, theirs = (results[name][0] for name in ("reward.py", "math-verify"))
    ratio = sum(results["math-verify"][1]) / sum(results["reward.py"][1])
    print(f"reward.py is {ratio:.0f} times as fast")
    agree = sum(a == b for a, b in zip(ours, theirs))
    print(f"they agree on {agree} pairs ({agree / len(pairs):.1%}), "
          f"and disagree on {len(pairs) - agree}")
    if not options.quiet:
        print_disagreements(pairs, ours, theirs)


if __name__ == "__main__":
    main()
