"""
The study: each claim of the paper tried in the tiny world, with controls, five seeds per arm and intervals.

    python data/study/study.py                                  all missing runs, then the report
    python data/study/study.py --arms bcr-n4,cap-n1 --seeds 2   some of the arms, some of the seeds
    python data/study/study.py --report                         only the report

An arm is a set of flags of bcr.py (togo-n4: of credit_togo.py), which does all the training. All arms see the
same number of problems per step and train for the same number of steps. A run is one arm with one seed: it is
trained, then evaluated by evaluate.py, each in a directory of its own under --out. Runs that were stopped are
resumed, finished runs are not repeated, and a long run continues the short one.

The report: report.txt (tables), results.json (the values of each seed), examples.txt (the same problems
answered by several arms) and figures (if matplotlib is installed).
"""

import argparse
import dataclasses
import itertools
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
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import bcr  # noqa: E402
from data.chat import decode, encode_chat, load_chat  # noqa: E402
from data.files import read_json, write_json, write_text  # noqa: E402
from data.problems import batch_prompt, draw_groups, load_problems  # noqa: E402
from data.study import credit_togo  # noqa: E402
from evaluate import count_waits, load_model  # noqa: E402
from reward import find_headers, score  # noqa: E402
from rollout import generate  # noqa: E402

PROBLEMS = 24  # in a step, in every arm: --groups is this / N
STEPS, LONG, LR = 40, 160, 2e-4
SEEDS, LONG_SEEDS = 5, 3  # of each arm, and of those that train for LONG steps
EVALUATED, ROOM = 400, 1536  # held-out problems; a budget that truncates nothing, even at N = 8
SHARE = 40  # tokens per problem that BCR at N = 4 and the cap at N = 1 are trained with
ALLOWED = (15, 20, 25, 30, 35, 40, 50, 60, 80, 110, 150, 200)  # tokens per problem in the figure
HARD = 6  # a problem of at least this many steps is one of the hardest
STRENGTHS = (1, 4, 16)  # of the penalty: what a completion of 512 tokens would lose


def groups(n, problems):
    """Prompts per step that hold about that many problems, on average if several N take turns."""
    ns = [int(part) for part in str(n).split(",")]
    return round(problems * len(ns) / sum(ns))


ARMS = {  # flags of bcr.py
    "base": {},
    "bcr-n2": dict(n=2, budget=2 * SHARE), "bcr-n4": dict(n=4, budget=4 * SHARE),
    "bcr-n8": dict(n=8, budget=8 * SHARE),
    "mixed": dict(n="1,2,4,8", budget=8 * SHARE),  # one budget for every N
    "grpo-n1": dict(n=1, budget=512),  # does RL alone shorten?
    "grpo-n4": dict(n=4, budget=1024),  # is it the budget or the format?
    "cap-n1": dict(n=1, budget=SHARE), "cap-n1-tight": dict(n=1, budget=30),  # is it the sharing or the cap?
    **{f"penalty-{x}": dict(n=1, budget=512, length_penalty=x) for x in STRENGTHS},
    **{f"penalty-{x}-std": dict(n=1, budget=512, length_penalty=x, normalize_std=True) for x in STRENGTHS},
    "togo-n4": dict(n=4, budget=4 * SHARE),
    # Does it last? The only arms that see more problems than the others.
    "bcr-n4-long": dict(n=4, budget=4 * SHARE, steps=LONG),
    "cap-n1-long": dict(n=1, budget=SHARE, steps=LONG),
    "penalty-16-std-long": dict(n=1, budget=512, length_penalty=16, normalize_std=True, steps=LONG),
    "mixed-long": dict(n="1,2,4,8", budget=8 * SHARE, steps=LONG),
}
PROGRAMS = {"togo-n4": "data/study/credit_togo.py"}  # all other arms are trained by bcr.py
SCALING = ("base", "bcr-n4", "mixed", "bcr-n4-long", "mixed-long")  # evaluated at N = 2, too

# ----------------------------------------------------------------------------------------------
# Runs


def run_program(program, out, **flags):
    """Runs bcr.py, evaluate.py or a fork, and returns its results.json. Resumes a run that was stopped; reads
    the results of one that has finished."""
    if not (out / "results.json").exists():
        command = [sys.executable, str(REPO / program), "--out", str(out)]
        if (out / "settings.json").exists():
            command[2:] = ["--resume", str(out)]
            flags = {name: value for name, value in flags.items() if name == "steps"}
        for name, value in flags.items():
            command.append(f"--{name.replace('_', '-')}")
            if value is not True:
                command.append(str(value))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # runs share the cores
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{out.name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return read_json(out / "results.json")


def seeds_of(o, name):
    return min(o.seeds, LONG_SEEDS) if name.endswith("-long") else o.seeds


def one_run(o, name, seed):
    """Trains and evaluates one arm with one seed. All arms are evaluated on the same problems and draws."""
    out, clock, flags = o.out / f"{name}-seed{seed}", time.time(), ARMS[name]
    model, short = {}, o.out / f"{name.removesuffix('-long')}-seed{seed}"
    if name.endswith("-long") and (short / "results.json").exists() and not out.exists():
        part = out.with_name(f"{out.name}.tmp")
        shutil.copytree(short, part, dirs_exist_ok=True)
        (part / "results.json").unlink()
        part.rename(out)  # its first steps are those of the short run, which it resumes
    if flags:
        run_program(PROGRAMS.get(name, "bcr.py"), out, **{"steps": o.steps} | flags, seed=seed, lr=LR,
                    groups=groups(flags["n"], o.problems), save_every=10, eval_n=1, eval_problems=1,
                    eval_budget=ROOM)
        model = {"model": out / "model"}
    ns = "1,2,4,8" if name in SCALING else "1,4,8"
    run_program("evaluate.py", out.with_name(f"{out.name}-evaluated"), **model, seed=seed, n=ns, budget=ROOM,
                problems=o.evaluated)
    return f"{name}, seed {seed}: {time.time() - clock:.0f} s"


# ----------------------------------------------------------------------------------------------
# The variance of the gradient at fixed weights, for both kinds of credit

CREDITS = {"sequence": bcr.token_advantages, "togo": credit_togo.token_advantages}


def gradient_variance(model_path, groups=64, samples=8, seed=0):
    """The variance that sampling causes in the gradient of one group, for both kinds of credit and the same
    completions. Each prompt is sampled twice: half the squared difference of its two gradients is that
    variance. The rest of the total variance is the difference between prompts, which credit cannot change."""
    s = dataclasses.replace(bcr.Settings(), model=str(model_path))
    model, chat, _ = load_model(s)
    problems, parameters = load_problems(s.data), list(model.parameters())
    variance, unsure = {name: [] for name in CREDITS}, []  # a number for each prompt; for each rollout
    for p, chosen in enumerate(draw_groups(problems, 4, seed, 0, groups)):
        group = [problems[i] for i in chosen]
        prompt, golds = encode_chat(chat, batch_prompt(group)), [problem["answer"] for problem in group]
        pair = {name: [] for name in CREDITS}
        for turn in (1, 2):
            completions = generate(model, [prompt], samples, 4 * SHARE, eos_ids=chat.eos_ids, seed=seed,
                                   step=turn, prompt_keys=[p])
            texts = decode(chat, [c.tokens for c in completions])
            correct = np.array([[score(text, golds) for text in texts]], dtype=float)  # (1, G, 4)
            rollout = bcr.Rollout([group], [prompt], completions, texts, correct, correct.mean(axis=2))
            unsure.append(credit_togo.unsure_share(texts, [golds] * samples))
            for name, credit in CREDITS.items():
                rows = [bcr.Row(prompt, c.tokens, c.logprobs, advantages)
                        for c, advantages in zip(completions, credit(rollout, chat, s))]
                bcr.accumulate_gradient(model, parameters, rows, samples * 4 * SHARE, s)
                pair[name].append(torch.cat([weight.grad.flatten() for weight in parameters]))
                model.zero_grad()
        for name, (first, second) in pair.items():
            variance[name].append(((first - second) ** 2).sum().item() / 2)
    togo, sequence = np.array(variance["togo"]), np.array(variance["sequence"])  # (groups,)
    resampled = np.random.default_rng(0).integers(0, groups, (2000, groups))  # a bootstrap over prompts
    ratios = togo[resampled].sum(axis=1) / sequence[resampled].sum(axis=1)
    return {"ratio": togo.sum() / sequence.sum(), "ratio_ci95": np.quantile(ratios, [0.025, 0.975]).tolist(),
            "unsure": np.mean(unsure), "prompts": groups}


# ----------------------------------------------------------------------------------------------
# Figures of a run: one flat dict, whose keys are the headings of the report


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def anatomy(records):
    """What a solution consists of, as means over problems: waits, equations (steps and checks), and the share
    of solutions that begin with a restatement, that are done again, that join several operations in one step,
    and that have no step at all."""
    counts = []
    for record in records:
        text = record["completion"]
        starts = [start for _, start in find_headers(text)] or [0]  # without a header it is still a solution
        for start, end in zip(starts, [*starts[1:], len(text)]):
            work = text[start:end].split("Answer")[0]
            counts.append((count_waits(work), work.count("="), 100 * ("We need" in work),
                           100 * ("do it again" in work),
                           100 * bool(re.search(r"\d+( [+-] \d+){2,} =", work)), 100 * ("=" not in work)))
    names = ("waits", "equations", "restated %", "done again %", "hurried %", "no steps %")
    return dict(zip(names, np.mean(counts, axis=0).tolist()))


def marks_within(record, tokens, golds, chat):
    """The marks of a completion that is cut after `tokens` tokens, None where they do not count. Its text is
    encoded again: the tokenizer gives the tokens that were sampled (tested)."""
    if record["tokens"] <= tokens:
        return record["correct"]
    ids = chat.tokenizer.encode(record["completion"], add_special_tokens=False).ids
    marks = score(decode(chat, [ids[:tokens]])[0], golds)
    return [mark if counted is not None else None for mark, counted in zip(marks, record["correct"])]


def accuracy_figures(records, n, problems, chat):
    """Accuracy at one N: of all problems and of the hardest, not truncated and within each of ALLOWED."""
    golds = [[problems[i]["answer"] for i in record["problems"]] for record in records]
    hard = np.array([[problems[i]["difficulty"] >= HARD for i in r["problems"]] for r in records])  # (P, N)
    found = {}
    for allowed in (None, *ALLOWED):
        marks = np.array([marks_within(r, allowed * n if allowed else ROOM, of, chat)
                          for r, of in zip(records, golds)], dtype=float)  # (P, N)
        where = f" in {allowed}" if allowed else ""
        found[f"right %{where}, N={n}"] = 100 * np.nanmean(marks)
        found[f"hardest right %{where}, N={n}"] = 100 * np.nanmean(marks[hard])
    return found


def figures_by_steps(records, problems):
    """Tokens, accuracy and waits at N = 1 by the number of steps that a problem needs."""
    found = {}
    for low in (1, 3, 5, 7):
        some = [r for r in records if problems[r["problems"][0]]["difficulty"] in (low, low + 1)]
        if some:
            found[f"{low}-{low + 1} steps, tokens"] = np.mean([r["tokens"] for r in some])
            found[f"{low}-{low + 1} steps, right %"] = 100 * np.mean([r["correct"][0] for r in some])
    return found


def run_figures(run, problems, chat):
    """All figures of the run in directory `run`, or {} if its evaluation has not finished."""
    evaluated = run.with_name(f"{run.name}-evaluated")
    if not (evaluated / "results.json").exists():
        return {}
    by_n, found = read_json(evaluated / "results.json")["results"]["heldout"], {}
    records = {n: records_of(evaluated / f"evaluation/heldout-n{n}-step0.jsonl") for n in by_n}
    for n, of_n in by_n.items():
        found |= {f"tokens, N={n}": of_n["tokens_per_problem"], f"waits, N={n}": of_n["waits_per_problem"],
                  f"truncated %, N={n}": 100 * of_n["truncated"]}
        found |= accuracy_figures(records[n], int(n), problems, chat)
    found |= anatomy(records["1"]) | figures_by_steps(records["1"], problems)
    for position, right in enumerate(by_n["8"]["accuracy_by_position"], start=1):
        found[f"position {position}"] = 100 * right
    tokens = [of_n["tokens_per_problem"] for of_n in by_n.values()]
    found["exponent"] = np.polyfit(np.log([int(n) for n in by_n]), np.log(tokens), 1)[0]
    found["falls at each N"] = bool(np.all(np.diff(tokens) < 0))
    golds = [[problems[i]["answer"] for i in record["problems"]] for record in records["4"]]
    unsure = credit_togo.unsure_share([record["completion"] for record in records["4"]], golds)
    found["sections unsure %, N=4"] = 100 * unsure
    if (run / "metrics.jsonl").exists():
        steps = records_of(run / "metrics.jsonl")
        found["training"] = [100 * m["accuracy"] for m in steps]
        found["worst right %"] = np.convolve(found["training"], np.ones(3) / 3, "valid").min()
        found["last entropy"] = steps[-1]["entropy"]
        found["seconds"] = sum(m["sampling_seconds"] + m["training_seconds"] for m in steps)
    return found


def collect(out, arms, seeds):
    """{arm: {seed: figures}} of all runs that have finished."""
    problems, found = {p["id"]: p for p in load_problems(REPO / "data/tiny/heldout.jsonl")}, {}
    chat = load_chat(bcr.Settings.model)
    for arm, seed in itertools.product(arms, seeds):
        if figures_of_run := run_figures(out / f"{arm}-seed{seed}", problems, chat):
            found.setdefault(arm, {})[seed] = figures_of_run
    return found


# ----------------------------------------------------------------------------------------------
# Tables

DIGITS = {"waits": 2, "equations": 2, "exponent": 3, "last entropy": 3}


def student95(freedom):
    """The 97.5% quantile of Student's t with `freedom` degrees of freedom, within 0.3% from 4 on.

    Source: Abramowitz & Stegun 26.7.5."""
    z, v = 1.959964, freedom
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / v + g2 / v**2 + g3 / v**3


def interval(values):
    """Mean and half the width of a 95% interval of Student's t over seeds."""
    values, half = np.array(values, float), math.nan
    if len(values) > 1:
        half = student95(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def over_seeds(of_arm, name):
    return [of_seed.get(name, math.nan) for of_seed in of_arm.values()]


def cell(values, digits=1):
    """Mean and interval as text, "" for figures that the arm does not have."""
    if isinstance(values[0], bool):
        return f"{sum(values)} of {len(values)}"
    middle, half = interval(values)
    text = f"{middle:.{digits}f} ±{half:.{digits}f}"
    return text.removesuffix(" ±nan") if middle == middle else ""


def lowest(values, digits):
    return "" if any(map(math.isnan, values)) else f"{min(values):.{digits}f}"


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def arm_table(title, found, names, statistic=cell):
    """One row for each arm that has some of the figures `names`."""
    rows = [[arm, *(statistic(over_seeds(of_arm, name), DIGITS.get(name.split(",")[0], 1)) for name in names)]
            for arm, of_arm in found.items()]
    return title + "\n\n" + markdown(["arm", *names], [row for row in rows if any(row[1:])])


PAIRS = (  # an arm, the arm it is compared with
    ("bcr-n2", "base"), ("bcr-n4", "base"), ("bcr-n8", "base"), ("mixed", "base"), ("grpo-n1", "base"),
    ("grpo-n4", "base"), ("bcr-n4-long", "base"), ("cap-n1-long", "base"), ("penalty-16-std-long", "base"),
    ("mixed-long", "base"), ("bcr-n4", "cap-n1"), ("bcr-n4", "cap-n1-tight"), ("bcr-n4-long", "cap-n1-long"),
    *(("bcr-n4", f"penalty-{x}{suffix}") for suffix in ("", "-std") for x in STRENGTHS),
    ("bcr-n4-long", "penalty-16-std-long"), ("togo-n4", "bcr-n4"))
ROOMY = [f"{what}right %, N={n}" for n in (1, 4, 8) for what in ("", "hardest ")]


def against(found, arm, other, compare):
    """compare(figures, figures of the other arm) seed by seed: the same problems, the same draws."""
    return [compare(found[arm][seed], found[other][seed]) for seed in found[arm] if seed in found[other]]


def differences_table(found):
    rows, tokens = [], "tokens, N=1"
    for arm, other in PAIRS:
        if arm in found and other in found:
            changes = [against(found, arm, other, lambda a, b: 100 * (a[tokens] / b[tokens] - 1))]
            changes += [against(found, arm, other, lambda a, b: a.get(name, math.nan) - b.get(name, math.nan))
                        for name in ROOMY]
            rows.append([f"{arm} against {other}", *map(cell, changes)])
    return ("Differences, seed by seed, not truncated: tokens in %, the others in points\n\n"
            + markdown(["", tokens, *ROOMY], rows))


def sharing_table(found):
    """At SHARE tokens per problem: N problems that share them against one problem alone, each in its arm."""
    rows, pairs = [], (("base", "base"), ("bcr-n4", "cap-n1"), ("bcr-n4-long", "cap-n1-long"),
                       ("bcr-n4", "bcr-n4"), ("bcr-n4-long", "bcr-n4-long"))
    for arm, other in pairs:
        if arm in found and other in found:
            rows.append([f"{arm} at N = 4 against {other} at N = 1"])
            for what in ("right", "hardest right"):
                here, there = (f"{what} % in {SHARE}, N={n}" for n in (4, 1))
                rows[-1] += [cell(over_seeds(found[arm], here)), cell(over_seeds(found[other], there)),
                             cell(against(found, arm, other, lambda a, b: a[here] - b[there]))]
    head = [f"{what}, {column}" for what in ("right %", "hardest right %")
            for column in ("N = 4", "N = 1", "difference")]
    return f"Within {SHARE} tokens per problem: shared against alone\n\n" + markdown(["", *head], rows)


def credit_tables(out, found):
    """What credit to go changes: the steps to a goal, and the variance of the gradient."""
    if "togo-n4" not in found or "bcr-n4" not in found:
        return
    rows = []
    for goal in (60, 70, 80):
        rows.append([f"{goal}%"])
        for arm in ("bcr-n4", "togo-n4"):
            reached = [next((i for i in range(3, len(a) + 1) if np.mean(a[i - 3 : i]) >= goal), math.nan)
                       for a in over_seeds(found[arm], "training")]
            rows[-1].append(cell(reached) or ", ".join(f"{steps:g}" for steps in reached))
    yield ("Steps until three steps in a row are right that often, in the budget\n\n"
           + markdown(["", "sequence", "togo"], rows))
    for file in sorted(out.glob("variance-*.json")):
        v = read_json(file)
        low, high = v["ratio_ci95"]
        yield (f"{file.stem}: variance of the gradient, togo / sequence = {v['ratio']:.3f} ({low:.3f} to "
               f"{high:.3f}), {v['prompts']} prompts; sections unsure {v['unsure']:.2%}")


def report(out, found):
    """Prints and writes the tables. Every number of the README comes from here."""
    in_share = [f"{what} % in {SHARE}, N={n}" for what in ("right", "hardest right") for n in (1, 4, 8)]
    parts = (
        arm_table("Arms: mean over seeds, ± half a 95% interval", found, (
            "tokens, N=1", "right %, N=1", "waits, N=1", "tokens, N=4", "right %, N=4", "tokens, N=8",
            "right %, N=8")),
        arm_table(f"Within {SHARE} tokens per problem; the hardest have {HARD} steps or more", found,
                  in_share),
        sharing_table(found), differences_table(found),
        arm_table("The hardest problems, not truncated", found, ROOMY[1::2]),
        arm_table("Task scaling: tokens per problem ~ N^exponent", found, (
            "exponent", "falls at each N", *(f"tokens, N={n}" for n in (1, 2, 4, 8)),
            *(f"right %, N={n}" for n in (1, 2, 4, 8)))),
        arm_table("What is dropped, N = 1", found, (
            "waits", "equations", "restated %", "done again %", "hurried %", "no steps %")),
        arm_table("By the number of steps that a problem needs, N = 1", found, [
            f"{low}-{low + 1} steps, {what}" for low in (1, 3, 5, 7) for what in ("tokens", "right %")]),
        arm_table("Stability: the worst three steps in training, in the arm's own budget", found, (
            "worst right %", "last entropy", "sections unsure %, N=4", "truncated %, N=8", "seconds")),
        arm_table("Stability: the lowest of any seed", found,
                  ("worst right %", "right %, N=1", "right %, N=4"), lowest),
        arm_table("Right % by position, N = 8, not truncated", found, [f"position {i}" for i in range(1, 9)]),
        *credit_tables(out, found))
    text = "\n\n".join(parts) + "\n"
    print(text)
    write_text(out / "report.txt", text)
    write_json(out / "results.json", found)


def examples(out, names=("base", "grpo-n1", "bcr-n4", "cap-n1", "penalty-16-std"), count=4,
             heldout=REPO / "data/tiny/heldout.jsonl"):
    """examples.txt: the same problems answered by several arms (seed 0, N = 1)."""
    problems, parts = {problem["id"]: problem["problem"] for problem in load_problems(heldout)}, []
    files = {name: out / f"{name}-seed0-evaluated/evaluation/heldout-n1-step0.jsonl" for name in names}
    records = {name: records_of(path) for name, path in files.items() if path.exists()}
    for p in range(count if records else 0):
        parts.append("=" * 100 + "\n" + problems[next(iter(records.values()))[p]["problems"][0]])
        for name, of_arm in records.items():
            mark = "right" if of_arm[p]["correct"][0] else "wrong"
            parts.append(f"--- {name}: {of_arm[p]['tokens']} tokens, {mark}\n{of_arm[p]['completion']}")
    write_text(out / "examples.txt", "\n\n".join(parts) + "\n")


# ----------------------------------------------------------------------------------------------
# Figures


def figures(out, found):
    """Two PNG files, or a line of text if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for draw, name, height, columns in ((sharing_figure, "sharing", 4.2, 3), (arms_figure, "arms", 5, 2)):
        figure, axes = pyplot.subplots(1, columns, figsize=(13, height), sharey=True)
        draw(axes, found)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=100)


def sharing_figure(axes, found):
    """Accuracy against the tokens allowed per problem: what a budget buys, shared or alone."""
    colours = {"base": "tab:gray", "cap-n1": "tab:red", "bcr-n4": "tab:blue"}
    labels = {"base": "base model", "cap-n1": f"trained with a cap: {SHARE} tokens at N = 1",
              "bcr-n4": f"trained with BCR: {4 * SHARE} tokens at N = 4"}
    for axis, n in zip(axes, (1, 4, 8)):
        for arm in [arm for arm in colours if arm in found]:
            middle, half = np.transpose([interval(over_seeds(found[arm], f"right % in {allowed}, N={n}"))
                                         for allowed in ALLOWED])
            axis.plot(ALLOWED, middle, "o-", markersize=3, color=colours[arm], label=labels[arm])
            low, high = np.clip((middle - half, middle + half), 0, 100)
            axis.fill_between(ALLOWED, low, high, color=colours[arm], alpha=0.2, linewidth=0)
        if n > 1 and "cap-n1" in found:
            alone = [np.mean(over_seeds(found["cap-n1"], f"right % in {x}, N=1")) for x in ALLOWED]
            axis.plot(ALLOWED, alone, "--", linewidth=1, color="tab:red", label="with the cap, at N = 1")
        axis.axvline(SHARE, color="black", linestyle=":", linewidth=1)
        axis.set(title=f"N = {n} in one prompt", xlabel="tokens allowed per problem", xscale="log")
        axis.set_xticks((15, 20, 30, 40, 60, 80, 110, 150, 200), (15, 20, 30, 40, 60, 80, 110, 150, 200))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right %")
    axes[1].legend(fontsize=8)


def arms_figure(axes, found):
    """Tokens and accuracy of every arm at N = 1 and N = 4, not truncated."""
    for axis, name in zip(axes, ("tokens", "right %")):
        for n, colour, shift in ((1, "tab:blue", -0.15), (4, "tab:orange", 0.15)):
            points = [interval(over_seeds(of_arm, f"{name}, N={n}")) for of_arm in found.values()]
            middle, half = np.transpose(points)
            axis.errorbar(middle, np.arange(len(found)) + shift, xerr=half, fmt="o", color=colour,
                          markersize=4, linewidth=1, label=f"N = {n}")
        axis.set(title=f"{name.replace('tokens', 'tokens per problem')}, not truncated")
        axis.set_yticks(range(len(found)), found, fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_xlim(0, 160)
    axes[1].set_xlim(70, 100)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=REPO / "out/study", help="default: out/study")
    options.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS),
                         help="arms, separated by commas: " + ", ".join(ARMS))
    options.add_argument("--seeds", type=int, default=SEEDS,
                         help=f"seeds of each arm; at most {LONG_SEEDS} of the long ones")
    options.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    options.add_argument("--problems", type=int, default=PROBLEMS, help="problems in a training step")
    options.add_argument("--evaluated", type=int, default=EVALUATED, help="held-out problems to evaluate on")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--report", action="store_true", help="only write the report")
    o = options.parse_args()
    if unknown := set(o.arms) - set(ARMS):
        options.error(f"unknown arms: {', '.join(sorted(unknown))}")
    if not o.report:
        o.out.mkdir(parents=True, exist_ok=True)
        clock = time.time()
        with ThreadPoolExecutor(o.jobs) as pool:  # seed by seed: a study that was stopped has complete ones
            runs = [(name, seed) for seed in range(o.seeds) for name in o.arms if seed < seeds_of(o, name)]
            runs.sort(key=lambda run: run[0].endswith("-long"))
            jobs = [pool.submit(one_run, o, name, seed) for name, seed in runs]
            for number, job in enumerate(jobs, start=1):
                seconds = time.time() - clock
                print(f"{number} of {len(jobs)}: {job.result()}; {seconds:.0f} s so far", flush=True)
        for stage, model in (("base", bcr.Settings.model), ("trained", o.out / "bcr-n4-seed0/model")):
            file = o.out / f"variance-{stage}.json"
            if "togo-n4" in o.arms and Path(model).is_dir() and not file.exists():
                write_json(file, gradient_variance(model))
    found = collect(o.out, o.arms, range(o.seeds))
    if found:
        report(o.out, found)
        examples(o.out)
        figures(o.out, found)


if __name__ == "__main__":
    main()
