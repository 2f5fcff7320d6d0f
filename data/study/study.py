"""
The study: each claim of the paper tried in the tiny world, with controls, five seeds per arm and
intervals.

    python -m data.study.study                                  all missing runs, then the report
    python -m data.study.study --arms bcr-n4,cap-n1 --seeds 2   some of the arms, some of the seeds
    python -m data.study.study --report                         only the report

An arm is a set of flags of bcr.py, which does all the training. A run is one arm with one seed: it
is trained, then evaluated by evaluate.py, each in a directory of its own under --out. Runs that
were stopped are resumed, finished runs are not repeated.

The report: report.txt (tables), results.json (the values of each seed), sharing.png and dial.png
(if matplotlib is installed).
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.chat import decode, load_chat
from data.files import write_json, write_text
from data.problems import load_problems
from data.study import credit_togo
from evaluate import count_waits
from reward import find_headers, score

REPO = Path(__file__).resolve().parents[2]
HELDOUT = REPO / "data/tiny/heldout.jsonl"
SEEDS = 5  # of each arm
EVALUATED = 400  # held-out problems
ROOM = 2048  # a budget that truncates nothing, even at N = 12
SHARE = 45  # tokens per problem that BCR at N = 4 and the cap at N = 1 are trained with
TOTAL = 200  # tokens that all problems of a prompt share in `mixed`
ALLOWED = (15, 20, 25, 30, 35, 45, 60, 80, 110, 150, 200)  # tokens per problem in the picture
STYLES = ("checks", "steps", "joins", "none")  # of solutions: see `style_of`
HARD = 7  # a problem of at least this many steps is one of the hardest
PENALTY = dict(n=1, budget=512, groups=24)  # a penalty is what a completion of 512 tokens loses
ARMS = {  # flags of bcr.py, or of the fork `program`; most arms see 24 problems in a step
    "base": {},
    "default": dict(n=4, lr=1e-4),  # the default run of bcr.py
    "mixed": dict(n="1,2,4,8", budget=TOTAL, groups=8, steps=160),  # one budget for every N
    "bcr-n4": dict(n=4, budget=4 * SHARE, groups=6),
    "bcr-n8": dict(n=8, budget=8 * SHARE, groups=3),
    "grpo-n1": dict(n=1, budget=512, groups=24),  # does RL alone shorten?
    "cap-n1": dict(n=1, budget=SHARE, groups=24),  # is it the sharing or the cap?
    "cap-n1-dler": dict(n=1, budget=SHARE, groups=24, program="data.study.dler"),
    "penalty-1": PENALTY | dict(length_penalty=1),
    "penalty-16": PENALTY | dict(length_penalty=16),
    "penalty-1-std": PENALTY | dict(length_penalty=1, normalize_std=True),
    "penalty-16-std": PENALTY | dict(length_penalty=16, normalize_std=True, steps=160),
    "togo-n4": dict(n=4, budget=4 * SHARE, groups=6, program="data.study.credit_togo"),
}
SCALING = ("base", "default", "mixed", "bcr-n4")  # evaluated at these N; the others at N = 1, 4, 8
SCALES = (1, 2, 4, 8, 12)
PAIRS = [(arm, "base") for arm in list(ARMS)[1:]] + [  # an arm, and what it is compared with
    ("bcr-n4", arm) for arm in list(ARMS)[6:]]

# ----------------------------------------------------------------------------------------------
# Runs


def run_program(module, out, **flags):
    """Runs bcr.py, evaluate.py or a fork; resumes a run that was stopped, skips a finished one."""
    if (out / "results.json").exists():
        return
    command = [sys.executable, "-m", module, "--out", str(out)]
    if (out / "settings.json").exists():
        command = [sys.executable, "-m", module, "--resume", str(out)]
        flags = {}
    for name, value in flags.items():
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command.append(str(value))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # runs share the cores
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO)
    if done.returncode:
        raise SystemExit(f"{out.name} ended with status {done.returncode}: {done.stderr[-2000:]}")


def one_run(o, arm, seed):
    """Trains and evaluates one arm with one seed, all on the same held-out problems and draws."""
    out = o.out / f"{arm}-seed{seed}"
    model = {}
    if ARMS[arm]:
        flags = {"lr": 2e-4} | ARMS[arm]
        if o.steps:
            flags["steps"] = o.steps
        program = flags.pop("program", "bcr")
        run_program(program, out, **flags, seed=seed, processes=1, eval_n=1, eval_problems=1,
                    eval_budget=ROOM)
        model = {"model": out / "model"}
    ns = SCALES if arm in SCALING else (1, 4, 8)
    run_program("evaluate", out.with_name(f"{out.name}-evaluated"), **model, seed=seed,
                processes=1, budget=ROOM, problems=o.evaluated, n=",".join(map(str, ns)))


def train_all(o):
    """All runs, seed by seed: a study that was stopped has complete seeds."""
    runs = [(arm, seed) for seed in range(o.seeds) for arm in o.arms]
    clock = time.time()
    with ThreadPoolExecutor(o.jobs) as pool:
        jobs = [pool.submit(one_run, o, arm, seed) for arm, seed in runs]
        for number, job in enumerate(jobs, start=1):
            job.result()
            print(f"{number} of {len(jobs)} runs; {time.time() - clock:.0f} s so far", flush=True)


def evaluation_of(run, n):
    """The file with the completions of a run's evaluation at one N."""
    return run.with_name(f"{run.name}-evaluated") / f"evaluation/heldout-n{n}-step0.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------
# Results of a run: one flat dict, whose keys are the headings of the report


def results_of(run, problems, chat):
    """All results of the run in directory `run`, whose evaluation has finished."""
    evaluated = {n: lines_of(evaluation_of(run, n)) for n in SCALES
                 if evaluation_of(run, n).exists()}
    results = {}
    for n, records in evaluated.items():
        results |= {f"{name}, N={n}": value
                    for name, value in results_at(n, records, problems, chat).items()}
    ns = [n for n in evaluated if n <= 8]  # those of the mixed training
    tokens = [results[f"tokens, N={n}"] for n in ns]
    results["exponent"] = np.polyfit(np.log(ns), np.log(tokens), 1)[0]
    for low, high in zip(SCALES, SCALES[1:]):
        if {low, high} <= evaluated.keys():
            ratio = results[f"tokens, N={high}"] / results[f"tokens, N={low}"]
            results[f"tokens %, N={low} to {high}"] = 100 * (ratio - 1)
    golds = [[problems[i]["answer"] for i in record["problems"]] for record in evaluated[4]]
    texts = [record["completion"] for record in evaluated[4]]
    results["sections unsure %"] = 100 * credit_togo.unsure_share(texts, golds)
    if (run / "metrics.jsonl").exists():
        results |= results_of_training(lines_of(run / "metrics.jsonl"))
    return results


def results_at(n, records, problems, chat):
    """The results of an evaluation at one N, as means over problems."""
    groups = [[problems[i] for i in record["problems"]] for record in records]
    hard = np.array([[p["difficulty"] >= HARD for p in group] for group in groups])  # (P, N)
    results = {
        "tokens": np.mean([record["tokens"] for record in records]) / n,
        "waits": np.mean([count_waits(record["completion"]) for record in records]) / n,
        "truncated %": 100 * np.mean([record["truncated"] for record in records])}
    results |= results_of_styles(records, groups, chat)
    budgets = {"": ROOM, f" in {TOTAL} shared": TOTAL} | {f" in {x}": x * n for x in ALLOWED}
    for where, budget in budgets.items():
        marks = np.array([marks_within(record, budget, [p["answer"] for p in group], chat)
                          for record, group in zip(records, groups)], dtype=float)  # (P, N)
        results[f"right %{where}"] = 100 * np.nanmean(marks)
        results[f"hardest right %{where}"] = 100 * np.nanmean(marks[hard])
    return results


def results_of_styles(records, groups, chat):
    """How often each style is written, and the tokens and accuracy of each style in solutions of
    problems with several operations: those of one cannot be joined."""
    found = {style: [] for style in STYLES}
    for record, group in zip(records, groups):
        text = record["completion"]
        starts = [start for _, start in find_headers(text)]
        for problem, mark, start, end in zip(group, record["correct"], starts, [*starts[1:], None]):
            work = text[start:end]
            several = problem["difficulty"] > 1 and mark is not None
            found[style_of(work)].append((work, mark) if several else None)
    results = {}
    total = sum(map(len, found.values()))
    for style, solutions in found.items():
        results[f"{style} %"] = 100 * len(solutions) / total if total else math.nan
        solutions = [solution for solution in solutions if solution]
        if solutions:
            tokens = chat.tokenizer.encode_batch([work for work, _ in solutions])
            results[f"tokens of {style}"] = np.mean([len(encoding.ids) for encoding in tokens])
            results[f"right % of {style}"] = 100 * np.mean([mark for _, mark in solutions])
    return results


def style_of(work):
    """How a solution is written, as far as its text tells: it checks (or restates the problem), it
    joins operations in a step, it has single steps, or it has none."""
    if "Wait" in work or "We need" in work:
        return "checks"
    if re.search(r"\d+( [+-] \d+){2,} =", work):
        return "joins"
    return "steps" if "=" in work else "none"


def marks_within(record, tokens, golds, chat):
    """The marks of a completion that is cut after `tokens` tokens, None where they do not count.
    Its text is encoded again: the tokenizer gives the tokens that were sampled (tested)."""
    if record["tokens"] <= tokens:
        return record["correct"]
    ids = chat.tokenizer.encode(record["completion"], add_special_tokens=False).ids
    marks = score(decode(chat, [ids[:tokens]])[0], golds)
    return [None if whole is None else mark for mark, whole in zip(marks, record["correct"])]


def results_of_training(metrics):
    right = [100 * step["accuracy"] for step in metrics]
    of_three = np.convolve(right, np.ones(3) / 3, "valid")
    results = {"worst three steps, right %": of_three.min(),
               "last entropy": metrics[-1]["entropy"],
               "seconds": sum(m["sampling_seconds"] + m["training_seconds"] for m in metrics)}
    for goal in (70, 80, 90):
        reached = np.flatnonzero(of_three >= goal)
        results[f"steps to {goal}%"] = float(reached[0] + 3) if len(reached) else math.nan
    return results


def collect(out, arms, seeds):
    """{arm: {seed: results}} of all runs that have finished."""
    problems = {problem["id"]: problem for problem in load_problems(HELDOUT)}
    chat = load_chat(REPO / "data/tiny/model")
    found = {}
    for arm in arms:
        for seed in range(seeds):
            run = out / f"{arm}-seed{seed}"
            if (run.with_name(f"{run.name}-evaluated") / "results.json").exists():
                found.setdefault(arm, {})[seed] = results_of(run, problems, chat)
    return found


# ----------------------------------------------------------------------------------------------
# Tables

DIGITS = {"waits": 2, "exponent": 3, "last entropy": 3}


# The 97.5% quantiles of Student's t for 1 to 9 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values):
    """Mean and half the width of a 95% interval of Student's t over seeds (at most ten)."""
    values = np.array(values, float)
    half = math.nan
    if len(values) > 1:
        half = T95[len(values) - 2] * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def over_seeds(seeds, name):
    return [results.get(name, math.nan) for results in seeds.values()]


def cell(values, digits=1):
    """Mean and interval as text, "" for results that the arm does not have."""
    middle, half = interval(values)
    text = f"{middle:.{digits}f} ±{half:.{digits}f}"
    return text.removesuffix(" ±nan") if middle == middle else ""


def markdown(title, head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([title, "", *lines])


def arm_table(title, found, names):
    """One row for each arm that has some of the results `names`."""
    rows = []
    for arm, seeds in found.items():
        cells = [cell(over_seeds(seeds, name), DIGITS.get(name.split(",")[0], 1)) for name in names]
        if any(cells):
            rows.append([f"`{arm}`", *cells])
    return markdown(title, ["arm", *names], rows)


def at_each(ns, *names):
    return [f"{name}, N={n}" for name in names for n in ns]


def differences_table(found):
    """Seed by seed: the same problems, the same draws."""
    names = at_each((1, 4, 8), "right %", "hardest right %")
    rows = []
    for arm, other in PAIRS:
        if arm not in found or other not in found:
            continue
        pairs = [(found[arm][seed], found[other][seed]) for seed in found[arm]
                 if seed in found[other]]
        row = [f"`{arm}` against `{other}`",
               cell([100 * (a["tokens, N=1"] / b["tokens, N=1"] - 1) for a, b in pairs])]
        for name in names:
            row.append(cell([a[name] - b[name] for a, b in pairs]))
        rows.append(row)
    return markdown("Differences, seed by seed, with room: tokens in %, the others in points",
                    ["", "tokens, N=1", *names], rows)


def sharing_table(found):
    """At SHARE tokens per problem: four problems that share them against each one alone."""
    rows = []
    for arm, other in (("base", "base"), ("bcr-n4", "bcr-n4"), ("bcr-n4", "cap-n1"),
                       ("bcr-n4", "cap-n1-dler")):
        if arm in found and other in found:
            row = [f"`{arm}` at N = 4, `{other}` at N = 1"]
            for what in ("right", "hardest right"):
                shared = over_seeds(found[arm], f"{what} % in {SHARE}, N=4")
                alone = over_seeds(found[other], f"{what} % in {SHARE}, N=1")
                row += [cell(shared), cell(alone), cell([a - b for a, b in zip(shared, alone)])]
            rows.append(row)
    head = [f"{what}, {column}" for what in ("right %", "hardest right %")
            for column in ("N = 4", "N = 1", "difference")]
    return markdown(f"Sharing against a cap, {SHARE} tokens per problem", ["", *head], rows)


def report(out, found):
    """Prints and writes the tables. Every number of the README comes from here."""
    falls = [f"tokens %, N={low} to {high}" for low, high in zip(SCALES, SCALES[1:])]
    scaling = {arm: found[arm] for arm in SCALING if arm in found}
    parts = [
        arm_table("Arms: mean over seeds, ± half a 95% interval", found, [
            *at_each((1, 4, 8), "tokens", "right %"), "waits, N=1"]),
        arm_table("The law: tokens per problem ~ N^exponent (N = 1 to 8)", scaling, [
            *at_each(SCALES, "tokens"), "exponent"]),
        arm_table("The law: change of the tokens per problem from one N to the next", scaling,
                  falls),
        arm_table("The law: right, with room", scaling, at_each(SCALES, "right %")),
        arm_table(f"The law: right within {TOTAL} tokens for all problems of a prompt", scaling,
                  at_each(SCALES, f"right % in {TOTAL} shared")),
        sharing_table(found),
        differences_table(found),
        arm_table("Stability: the worst three steps of training, in the arm's own budget", found, [
            "worst three steps, right %", "last entropy", "sections unsure %", "truncated %, N=8",
            "seconds"]),
        arm_table("What is dropped: solutions by style", found, at_each(
            (1, 4, 8), *(f"{style} %" for style in STYLES))),
        arm_table("The price of hurry, in problems of several operations", found, at_each(
            (4, 8), "right % of steps", "right % of joins", "tokens of steps", "tokens of joins")),
        arm_table("Steps until three in a row are right that often, in the arm's budget", found, [
            f"steps to {goal}%" for goal in (70, 80, 90)])]
    text = "\n\n".join(parts) + "\n"
    print(text)
    write_text(out / "report.txt", text)
    write_json(out / "results.json", found)


# ----------------------------------------------------------------------------------------------
# Pictures

LABELS = {"base": ("tab:gray", "base model"),
          "cap-n1": ("tab:red", f"trained with a cap: {SHARE} tokens at N = 1"),
          "bcr-n4": ("tab:blue", f"trained with BCR: {4 * SHARE} tokens at N = 4"),
          "default": ("tab:blue", "python bcr.py --n 4"),
          "mixed": ("tab:green", f"--n 1,2,4,8, one budget of {TOTAL}")}


def draw(axis, found, arm, xs, names):
    """A line with the 95% interval over seeds. names: the result at each of xs."""
    colour, label = LABELS[arm]
    middle, half = np.transpose([interval(over_seeds(found[arm], name)) for name in names])
    axis.plot(xs, middle, "o-", markersize=3, color=colour, label=label)
    axis.fill_between(xs, middle - half, middle + half, color=colour, alpha=0.2, linewidth=0)


def sharing_picture(path, found):
    """Accuracy against the tokens allowed per problem: what a budget buys, shared or alone."""
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for axis, n in zip(axes, (1, 4, 8)):
        for arm in [arm for arm in ("base", "cap-n1", "bcr-n4") if arm in found]:
            draw(axis, found, arm, ALLOWED, [f"right % in {x}, N={n}" for x in ALLOWED])
        if n > 1 and "cap-n1" in found:
            alone = [np.mean(over_seeds(found["cap-n1"], f"right % in {x}, N=1")) for x in ALLOWED]
            axis.plot(ALLOWED, alone, "--", linewidth=1, color="tab:red",
                      label="with the cap, at N = 1")
        axis.axvline(SHARE, color="black", linestyle=":", linewidth=1)
        axis.set(title=f"N = {n} in one prompt", xlabel="tokens allowed per problem", xscale="log")
        axis.set_xticks((15, 20, 30, 45, 80, 110, 200), (15, 20, 30, 45, 80, 110, 200))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="right %", ylim=(-3, 103))
    axes[1].legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=100)


def dial_picture(path, found):
    """Tokens per problem over N, and accuracy where all problems of a prompt share TOTAL tokens."""
    from matplotlib import pyplot

    picture, (tokens, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for arm in [arm for arm in ("base", "default", "mixed") if arm in found]:
        draw(tokens, found, arm, SCALES, at_each(SCALES, "tokens"))
        draw(right, found, arm, SCALES, at_each(SCALES, f"right % in {TOTAL} shared"))
    tokens.plot(SCALES, [TOTAL / n for n in SCALES], "k:", linewidth=1, label=f"{TOTAL} / N")
    tokens.set(ylabel="tokens per problem, with room", ylim=(0, 110))
    right.set(ylabel=f"right %, {TOTAL} tokens for all N problems", ylim=(-3, 103))
    for axis in (tokens, right):
        axis.set(xlabel="N problems in one prompt", xscale="log")
        axis.set_xticks(SCALES, SCALES)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    tokens.legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=REPO / "out/study", help="default: out/study")
    options.add_argument("--arms", default=",".join(ARMS), help="with commas: %(default)s")
    options.add_argument("--seeds", type=int, default=SEEDS, help="seeds of each arm")
    options.add_argument("--steps", type=int, default=0, help="of each run, in place of the arm's")
    options.add_argument("--evaluated", type=int, default=EVALUATED, help="held-out problems")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--report", action="store_true", help="only write the report")
    o = options.parse_args()
    o.arms = o.arms.split(",")
    if unknown := set(o.arms) - set(ARMS):
        options.error(f"unknown arms: {', '.join(sorted(unknown))}")
    o.out.mkdir(parents=True, exist_ok=True)
    o.out = o.out.resolve()
    if not o.report:
        train_all(o)
    found = collect(o.out, o.arms, o.seeds)
    report(o.out, found)
    try:
        sharing_picture(o.out / "sharing.png", found)
        dial_picture(o.out / "dial.png", found)
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install matplotlib)")


if __name__ == "__main__":
    main()
