"""
The study: each claim of the paper tried in the tiny world, with controls, five seeds per arm and
intervals.

    python -m data.study.study                                  all missing runs, then the report
    python -m data.study.study --arms bcr-n4,cap-n1 --seeds 2   some of the arms, some of the seeds
    python -m data.study.study --report                         only the report

An arm is a set of flags of bcr.py, which does all the training. All arms see the same number of
problems per step and train for the same number of steps. A run is one arm with one seed: it is
trained, then evaluated by evaluate.py, each in a directory of its own under --out. Runs that were
stopped are resumed, finished runs are not repeated, and a long run continues the short one.

The report: report.txt (tables), results.json (the values of each seed), examples.txt (the same
problems answered by several arms) and sharing.png (if matplotlib is
installed).
"""

import argparse
import json
import math
import os
import re
import shutil
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
PROBLEMS = 24  # in a step, in every arm: --groups is this / N
STEPS = 40
LONG = 160
SEEDS = 5  # of each arm
LONG_SEEDS = 3  # of those that train for LONG steps
EVALUATED = 400  # held-out problems
ROOM = 1536  # a budget that truncates nothing, even at N = 8
SHARE = 40  # tokens per problem that BCR at N = 4 and the cap at N = 1 are trained with
ALLOWED = (15, 20, 25, 30, 35, 40, 50, 60, 80, 110, 150, 200)  # tokens per problem in the picture
HARD = 6  # a problem of at least this many steps is one of the hardest
ARMS = {  # flags of bcr.py, or of the fork `program`
    "base": {},
    "bcr-n2": dict(n=2, budget=2 * SHARE, groups=12),
    "bcr-n4": dict(n=4, budget=4 * SHARE, groups=6),
    "bcr-n8": dict(n=8, budget=8 * SHARE, groups=3),
    "mixed": dict(n="1,2,4,8", budget=8 * SHARE, groups=6),  # one budget for every N
    "grpo-n1": dict(n=1, budget=512, groups=24),  # does RL alone shorten?
    "grpo-n4": dict(n=4, budget=1024, groups=6),  # is it the budget or the format?
    "cap-n1": dict(n=1, budget=SHARE, groups=24),  # is it the sharing or the cap?
    "cap-n1-tight": dict(n=1, budget=30, groups=24),
    # The penalty is what a completion of 512 tokens would lose.
    "penalty-1": dict(n=1, budget=512, groups=24, length_penalty=1),
    "penalty-4": dict(n=1, budget=512, groups=24, length_penalty=4),
    "penalty-16": dict(n=1, budget=512, groups=24, length_penalty=16),
    "penalty-1-std": dict(n=1, budget=512, groups=24, length_penalty=1, normalize_std=True),
    "penalty-4-std": dict(n=1, budget=512, groups=24, length_penalty=4, normalize_std=True),
    "penalty-16-std": dict(n=1, budget=512, groups=24, length_penalty=16, normalize_std=True),
    "togo-n4": dict(n=4, budget=4 * SHARE, groups=6, program="data.study.credit_togo"),
}
for arm in ("bcr-n4", "cap-n1", "penalty-16-std", "mixed"):
    ARMS[f"{arm}-long"] = ARMS[arm] | {"steps": LONG}  # does it last?
SCALING = ("base", "bcr-n4", "mixed", "bcr-n4-long", "mixed-long")  # evaluated at N = 2, too
PAIRS = [  # an arm, and the arm it is compared with
    ("bcr-n2", "base"), ("bcr-n4", "base"), ("bcr-n8", "base"), ("mixed", "base"),
    ("grpo-n1", "base"), ("grpo-n4", "base"), ("bcr-n4-long", "base"), ("cap-n1-long", "base"),
    ("penalty-16-std-long", "base"), ("mixed-long", "base"), ("bcr-n4", "cap-n1"),
    ("bcr-n4", "cap-n1-tight"), ("bcr-n4-long", "cap-n1-long"), ("bcr-n4", "penalty-1"),
    ("bcr-n4", "penalty-4"), ("bcr-n4", "penalty-16"), ("bcr-n4", "penalty-1-std"),
    ("bcr-n4", "penalty-4-std"), ("bcr-n4", "penalty-16-std"),
    ("bcr-n4-long", "penalty-16-std-long"), ("togo-n4", "bcr-n4")]

# ----------------------------------------------------------------------------------------------
# Runs


def run_program(module, out, **flags):
    """Runs bcr.py, evaluate.py or a fork; resumes a run that was stopped, skips a finished one."""
    if (out / "results.json").exists():
        return
    command = [sys.executable, "-m", module, "--out", str(out)]
    if (out / "settings.json").exists():
        command = [sys.executable, "-m", module, "--resume", str(out)]
        flags = {name: value for name, value in flags.items() if name == "steps"}
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
    short = o.out / f"{arm.removesuffix('-long')}-seed{seed}"
    if short != out and (short / "results.json").exists() and not out.exists():
        part = out.with_name(f"{out.name}.tmp")
        shutil.copytree(short, part, dirs_exist_ok=True)
        (part / "results.json").unlink()
        part.rename(out)  # its first steps are those of the short run, which it resumes
    model = {}
    if ARMS[arm]:
        flags = {"steps": o.steps} | ARMS[arm]
        program = flags.pop("program", "bcr")
        run_program(program, out, **flags, seed=seed, lr=2e-4, save_every=10, eval_n=1,
                    eval_problems=1, eval_budget=ROOM)
        model = {"model": out / "model"}
    evaluated = out.with_name(f"{out.name}-evaluated")
    run_program("evaluate", evaluated, **model, seed=seed, budget=ROOM, problems=o.evaluated,
                n="1,2,4,8" if arm in SCALING else "1,4,8")


def evaluation_of(run, n):
    """The file with the completions of a run's evaluation at one N."""
    return run.with_name(f"{run.name}-evaluated") / f"evaluation/heldout-n{n}-step0.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------
# Results of a run: one flat dict, whose keys are the headings of the report


def anatomy(records):
    """What a solution consists of, as means over problems: waits, equations (steps and checks), and
    the share of solutions that begin with a restatement, that are done again, that join several
    operations in one step, and that have no step at all."""
    counts = {name: [] for name in (
        "waits", "equations", "restated %", "done again %", "hurried %", "no steps %")}
    for record in records:
        text = record["completion"]
        starts = [start for _, start in find_headers(text)] or [0]  # without a header, it is one
        for start, end in zip(starts, [*starts[1:], len(text)]):
            work = text[start:end].split("Answer")[0]
            joined = re.search(r"\d+( [+-] \d+){2,} =", work)
            counts["waits"].append(count_waits(work))
            counts["equations"].append(work.count("="))
            counts["restated %"].append(100 * ("We need" in work))
            counts["done again %"].append(100 * ("do it again" in work))
            counts["hurried %"].append(100 * bool(joined))
            counts["no steps %"].append(100 * ("=" not in work))
    return {name: float(np.mean(values)) for name, values in counts.items()}


def marks_within(record, tokens, golds, chat):
    """The marks of a completion that is cut after `tokens` tokens, None where they do not count.
    Its text is encoded again: the tokenizer gives the tokens that were sampled (tested)."""
    if record["tokens"] <= tokens:
        return record["correct"]
    ids = chat.tokenizer.encode(record["completion"], add_special_tokens=False).ids
    marks = score(decode(chat, [ids[:tokens]])[0], golds)
    return [None if whole is None else mark for mark, whole in zip(marks, record["correct"])]


def accuracy_at(n, records, problems, chat):
    """Accuracy at one N: of all problems and of the hardest, not truncated and within ALLOWED."""
    groups = [[problems[i] for i in record["problems"]] for record in records]
    hard = np.array([[p["difficulty"] >= HARD for p in group] for group in groups])  # (P, N)
    results = {}
    for allowed in (None, *ALLOWED):
        where = f" in {allowed}" if allowed else ""
        budget = allowed * n if allowed else ROOM
        marks = np.array([marks_within(record, budget, [p["answer"] for p in group], chat)
                          for record, group in zip(records, groups)], dtype=float)  # (P, N)
        results[f"right %{where}, N={n}"] = 100 * np.nanmean(marks)
        results[f"hardest right %{where}, N={n}"] = 100 * np.nanmean(marks[hard])
    return results


def accuracy_by_steps(records, problems):
    """Tokens and accuracy at N = 1 by the number of steps that a problem needs."""
    results = {}
    steps = np.array([problems[record["problems"][0]]["difficulty"] for record in records])
    tokens = np.array([record["tokens"] for record in records])
    right = np.array([record["correct"][0] for record in records])
    for low in (1, 3, 5, 7):
        some = (steps == low) | (steps == low + 1)
        results[f"{low}-{low + 1} steps, tokens"] = tokens[some].mean()
        results[f"{low}-{low + 1} steps, right %"] = 100 * right[some].mean()
    return results


def results_of(run, problems, chat):
    """All results of the run in directory `run`, whose evaluation has finished."""
    results = {}
    evaluated = {}
    for n in (1, 2, 4, 8):
        if not evaluation_of(run, n).exists():
            continue
        records = lines_of(evaluation_of(run, n))
        evaluated[n] = records
        waits = [count_waits(record["completion"]) for record in records]
        results[f"tokens, N={n}"] = np.mean([record["tokens"] for record in records]) / n
        results[f"waits, N={n}"] = np.mean(waits) / n
        results[f"truncated %, N={n}"] = 100 * np.mean([r["truncated"] for r in records])
        results |= accuracy_at(n, records, problems, chat)
    tokens = [results[f"tokens, N={n}"] for n in evaluated]
    results["exponent"] = np.polyfit(np.log(list(evaluated)), np.log(tokens), 1)[0]
    results["falls at each N"] = float(np.all(np.diff(tokens) < 0))
    results |= anatomy(evaluated[1]) | accuracy_by_steps(evaluated[1], problems)
    golds = [[problems[i]["answer"] for i in record["problems"]] for record in evaluated[4]]
    texts = [record["completion"] for record in evaluated[4]]
    results["sections unsure %, N=4"] = 100 * credit_togo.unsure_share(texts, golds)
    marks = np.array([record["correct"] for record in evaluated[8]], dtype=float)  # (P, 8)
    for position, right in enumerate(np.nanmean(marks, axis=0), start=1):
        results[f"position {position}"] = 100 * right
    if (run / "metrics.jsonl").exists():
        results |= results_of_training(lines_of(run / "metrics.jsonl"))
    return results


def results_of_training(metrics):
    right = [100 * step["accuracy"] for step in metrics]
    of_three = np.convolve(right, np.ones(3) / 3, "valid")
    results = {"worst right %": of_three.min(), "last entropy": metrics[-1]["entropy"]}
    results["seconds"] = sum(m["sampling_seconds"] + m["training_seconds"] for m in metrics)
    for goal in (60, 70, 80):
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
            if evaluation_of(run, 8).exists():  # the last to be written
                found.setdefault(arm, {})[seed] = results_of(run, problems, chat)
    return found


# ----------------------------------------------------------------------------------------------
# Tables

DIGITS = {"waits": 2, "equations": 2, "exponent": 3, "last entropy": 3}


def student95(freedom):
    """The 97.5% quantile of Student's t, within 0.3% from 4 degrees of freedom on.

    Source: Abramowitz & Stegun 26.7.5."""
    z = 1.959964
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


def interval(values):
    """Mean and half the width of a 95% interval of Student's t over seeds."""
    values = np.array(values, float)
    half = math.nan
    if len(values) > 1:
        half = student95(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
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
            rows.append([arm, *cells])
    return markdown(title, ["arm", *names], rows)


def differences_table(found):
    """Seed by seed: the same problems, the same draws."""
    names = [f"{what}right %, N={n}" for n in (1, 4, 8) for what in ("", "hardest ")]
    rows = []
    for arm, other in PAIRS:
        if arm not in found or other not in found:
            continue
        pairs = [(found[arm][seed], found[other][seed]) for seed in found[arm]
                 if seed in found[other]]
        row = [f"{arm} against {other}",
               cell([100 * (a["tokens, N=1"] / b["tokens, N=1"] - 1) for a, b in pairs])]
        for name in names:
            row.append(cell([a[name] - b[name] for a, b in pairs]))
        rows.append(row)
    return markdown("Differences, seed by seed, not truncated: tokens in %, the others in points",
                    ["", "tokens, N=1", *names], rows)


def sharing_table(found):
    """At SHARE tokens per problem: problems that share them against one alone, each in its arm."""
    rows = []
    for arm, other in (("base", "base"), ("bcr-n4", "cap-n1"), ("bcr-n4-long", "cap-n1-long"),
                       ("bcr-n4", "bcr-n4"), ("bcr-n4-long", "bcr-n4-long")):
        if arm in found and other in found:
            row = [f"{arm} at N = 4 against {other} at N = 1"]
            for what in ("right", "hardest right"):
                shared = over_seeds(found[arm], f"{what} % in {SHARE}, N=4")
                alone = over_seeds(found[other], f"{what} % in {SHARE}, N=1")
                row += [cell(shared), cell(alone), cell([a - b for a, b in zip(shared, alone)])]
            rows.append(row)
    head = [f"{what}, {column}" for what in ("right %", "hardest right %")
            for column in ("N = 4", "N = 1", "difference")]
    return markdown(f"Within {SHARE} tokens per problem: shared against alone", ["", *head], rows)


def report(out, found):
    """Prints and writes the tables. Every number of the README comes from here."""
    share = f"Within {SHARE} tokens per problem; the hardest have {HARD} steps or more"
    parts = [
        arm_table("Arms: mean over seeds, ± half a 95% interval", found, (
            "tokens, N=1", "right %, N=1", "waits, N=1", "tokens, N=4", "right %, N=4",
            "tokens, N=8", "right %, N=8")),
        arm_table(share, found, [f"{what} % in {SHARE}, N={n}"
                                 for what in ("right", "hardest right") for n in (1, 4, 8)]),
        sharing_table(found),
        differences_table(found),
        arm_table("The hardest problems, not truncated", found, [
            f"hardest right %, N={n}" for n in (1, 4, 8)]),
        arm_table("Task scaling: tokens per problem ~ N^exponent", found, [
            "exponent", "falls at each N",
            *(f"{what}, N={n}" for what in ("tokens", "right %") for n in (1, 2, 4, 8))]),
        arm_table("What is dropped, N = 1", found, (
            "waits", "equations", "restated %", "done again %", "hurried %", "no steps %")),
        arm_table("By the number of steps that a problem needs, N = 1", found, [
            f"{low}-{low + 1} steps, {what}" for low in (1, 3, 5, 7)
            for what in ("tokens", "right %")]),
        arm_table("Stability: the worst three steps in training, in the arm's own budget", found, (
            "worst right %", "last entropy", "sections unsure %, N=4", "truncated %, N=8",
            "seconds")),
        arm_table("Steps until three in a row are right that often, in the budget", found, [
            f"steps to {goal}%" for goal in (60, 70, 80)]),
        arm_table("Right % by position, N = 8", found, [f"position {i}" for i in range(1, 9)])]
    text = "\n\n".join(parts) + "\n"
    print(text)
    write_text(out / "report.txt", text)
    write_json(out / "results.json", found)


def examples(out, arms=("base", "grpo-n1", "bcr-n4", "cap-n1", "penalty-16-std"), count=4):
    """examples.txt: the same problems answered by several arms (seed 0, N = 1)."""
    problems = {problem["id"]: problem["problem"] for problem in load_problems(HELDOUT)}
    runs = {arm: out / f"{arm}-seed0" for arm in arms}
    records = {arm: lines_of(evaluation_of(run, 1)) for arm, run in runs.items()
               if evaluation_of(run, 1).exists()}
    parts = []
    for answers in list(zip(*records.values()))[:count]:
        parts.append("=" * 100 + "\n" + problems[answers[0]["problems"][0]])
        for arm, record in zip(records, answers):
            mark = "right" if record["correct"][0] else "wrong"
            parts.append(f"--- {arm}: {record['tokens']} tokens, {mark}\n{record['completion']}")
    write_text(out / "examples.txt", "\n\n".join(parts) + "\n")


# ----------------------------------------------------------------------------------------------
# Picture


def sharing_picture(path, found):
    """Accuracy against the tokens allowed per problem: what a budget buys, shared or alone."""
    from matplotlib import pyplot

    labels = {"base": ("tab:gray", "base model"),
              "cap-n1": ("tab:red", f"trained with a cap: {SHARE} tokens at N = 1"),
              "bcr-n4": ("tab:blue", f"trained with BCR: {4 * SHARE} tokens at N = 4")}
    picture, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for axis, n in zip(axes, (1, 4, 8)):
        for arm in [arm for arm in labels if arm in found]:
            colour, label = labels[arm]
            middle, half = np.transpose([interval(over_seeds(found[arm], f"right % in {x}, N={n}"))
                                         for x in ALLOWED])
            axis.plot(ALLOWED, middle, "o-", markersize=3, color=colour, label=label)
            low, high = np.clip((middle - half, middle + half), 0, 100)
            axis.fill_between(ALLOWED, low, high, color=colour, alpha=0.2, linewidth=0)
        if n > 1 and "cap-n1" in found:
            alone = [np.mean(over_seeds(found["cap-n1"], f"right % in {x}, N=1")) for x in ALLOWED]
            axis.plot(ALLOWED, alone, "--", linewidth=1, color="tab:red",
                      label="with the cap, at N = 1")
        axis.axvline(SHARE, color="black", linestyle=":", linewidth=1)
        axis.set(title=f"N = {n} in one prompt", xlabel="tokens allowed per problem", xscale="log")
        axis.set_xticks((15, 20, 30, 40, 60, 80, 110, 150, 200),
                        (15, 20, 30, 40, 60, 80, 110, 150, 200))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right %")
    axes[1].legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------


def train_all(o):
    """All runs, seed by seed: a study that was stopped has complete seeds. Long runs come last."""
    runs = []
    for seed in range(o.seeds):
        runs += [(arm, seed) for arm in o.arms if seed < LONG_SEEDS or not arm.endswith("-long")]
    runs.sort(key=lambda run: run[0].endswith("-long"))
    clock = time.time()
    with ThreadPoolExecutor(o.jobs) as pool:
        jobs = [pool.submit(one_run, o, arm, seed) for arm, seed in runs]
        for number, job in enumerate(jobs, start=1):
            job.result()
            print(f"{number} of {len(jobs)} runs; {time.time() - clock:.0f} s so far", flush=True)
def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=REPO / "out/study", help="default: out/study")
    options.add_argument("--arms", default=",".join(ARMS), help="with commas: %(default)s")
    options.add_argument("--seeds", type=int, default=SEEDS,
                         help=f"seeds of each arm; at most {LONG_SEEDS} of the long ones")
    options.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
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
    examples(o.out)
    try:
        sharing_picture(o.out / "sharing.png", found)
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")


if __name__ == "__main__":
    main()
