"""
The study: each claim of the paper tried in the tiny world, with controls, five seeds per arm and intervals.

    python data/study/study.py                                  all missing runs, then the report
    python data/study/study.py --arms bcr-n4,cap-n1 --seeds 2   some of the arms, some of the seeds
    python data/study/study.py --report                         only the report

An arm is a set of flags of bcr.py (togo-n4: of credit_togo.py), which does all the training. All arms see the
same number of problems per step and train for the same number of steps. A run is one arm with one seed: it is
trained, then evaluated by evaluate.py, each in a directory of its own under --out. Runs that were stopped are
resumed, and finished runs are not repeated.

The report: report.txt (tables), results.json (the values of each seed), examples.txt (the same problems
answered by several arms) and figures (if matplotlib is installed).
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
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
from data.chat import decode, encode_chat  # noqa: E402
from data.problems import batch_prompt, draw_groups, load_problems, write_lines  # noqa: E402
from data.study import credit_togo  # noqa: E402
from data.tiny import make  # noqa: E402
from evaluate import count_waits, load_model, student95  # noqa: E402
from model import read_json, write_json, write_text  # noqa: E402
from reward import find_headers, score  # noqa: E402
from rollout import generate  # noqa: E402

PROBLEMS = 24  # in a step, in every arm: --groups is this / N
STEPS, LR = 20, 3e-4
NS = (1, 2, 3, 4, 6, 8)  # for the task-scaling law
EVALUATED = 240  # held-out problems
SHARED = 150  # the budget under which all N are compared: that of BCR at N = 4, 37.5 per problem
STRENGTHS = (0.25, 0.5, 1, 2, 4)  # of the explicit penalty: what a completion that fills the budget loses


def groups(n, problems):
    """Prompts per step that hold about that many problems, on average if several N take turns."""
    ns = [int(part) for part in str(n).split(",")]
    return round(problems * len(ns) / sum(ns))


ARMS = {  # flags of bcr.py
    "base": {},
    # 37.5 tokens per problem, and other budgets
    "bcr-n2": dict(n=2, budget=75), "bcr-n3": dict(n=3, budget=112), "bcr-n4": dict(n=4, budget=150),
    "bcr-n8": dict(n=8, budget=300), "bcr-n4-tight": dict(n=4, budget=100),
    "bcr-n4-loose": dict(n=4, budget=220), "bcr-mixed": dict(n="2,4,8", budget="75,150,300"),
    "rl-n1": dict(n=1, budget=512),  # does RL alone shorten?
    "cap-n1": dict(n=1, budget=38), "cap-n1-tight": dict(n=1, budget=25),  # is it the sharing or the cap?
    "rl-n4": dict(n=4, budget=640),  # is it the budget or the format?
    **{f"penalty-{x}": dict(n=1, budget=192, length_penalty=x) for x in STRENGTHS},
    **{f"penalty-{x}-std": dict(n=1, budget=192, length_penalty=x, normalize_std=True) for x in STRENGTHS},
    "togo-n4": dict(n=4, budget=150),
    # Does it last? The only arms that see more problems than the others.
    "bcr-n4-long": dict(n=4, budget=150, steps=80),
    "penalty-4-std-long": dict(n=1, budget=192, length_penalty=4, normalize_std=True, steps=80),
}
PROGRAMS = {"togo-n4": "data/study/credit_togo.py"}  # all other arms are trained by bcr.py
SCALING = ("base", "rl-n1", "bcr-n4", "bcr-n8", "bcr-mixed")  # evaluated at all NS, the others at 1, 4 and 8
ELSEWHERE = ("base", "bcr-n4", "rl-n1")  # arms that are evaluated on harder problems, too

# ----------------------------------------------------------------------------------------------
# Runs


def harder_problems(path, count):
    """Two files of problems outside the tiny world: chains of five and six steps, and numbers up to 60."""
    for name, steps, largest, operand in (("longer", (5, 6), 30, 12), ("larger", (2, 3, 4), 60, 24)):
        rng, (make.LARGEST, make.OPERAND) = random.Random(1), (largest, operand)
        problems = []
        while len(problems) < count:
            problem = make.make_problem(rng, steps=rng.choice(steps))
            start, chain, _ = problem["chain"]
            if name == "longer" or max(np.cumsum([start] + [sign * b for sign, b in chain])) > 30:
                problems.append({key: problem[key] for key in ("problem", "answer", "difficulty")})
        path.mkdir(parents=True, exist_ok=True)
        write_lines(path / f"{name}.jsonl", problems)


def run_program(program, out, **flags):
    """Runs bcr.py, evaluate.py or a fork, and returns its results.json. Resumes a run that was stopped; reads
    the results of one that has finished."""
    if not (out / "results.json").exists():
        command = [sys.executable, str(REPO / program), "--out", str(out)]
        for name, value in flags.items():
            command.append(f"--{name.replace('_', '-')}")
            if value is not True:
                command.append(str(value))
        if (out / "settings.json").exists():
            command.append("--resume")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # runs share the cores
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{out.name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
        for checkpoint in out.glob("checkpoint-*"):  # model/ is all that is needed from here on
            shutil.rmtree(checkpoint)
    return read_json(out / "results.json")


def one_run(o, name, seed):
    """Trains and evaluates one arm with one seed. All arms are evaluated on the same problems and draws."""
    out, clock, flags = o.out / f"{name}-seed{seed}", time.time(), ARMS[name]
    common = {"seed": seed, "within": SHARED, "problems": o.evaluated}
    if flags:
        run_program(PROGRAMS.get(name, "bcr.py"), out, **{"steps": o.steps} | flags, seed=seed, lr=LR,
                    groups=groups(flags["n"], o.problems), save_every=10, eval_n=1, eval_problems=1)
        common["model"] = out / "model"
    ns = "1,4" if o.brief else ",".join(map(str, NS if name in SCALING else (1, 4, 8)))
    run_program("evaluate.py", out.with_name(f"{out.name}-evaluated"), **common, n=ns)
    if name in ELSEWHERE and not o.brief:
        files = ",".join(str(o.out / f"problems/{kind}.jsonl") for kind in ("longer", "larger"))
        run_program("evaluate.py", out.with_name(f"{out.name}-elsewhere"), **common, n="1,4", data=files)
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
            completions = generate(model, [prompt], samples, SHARED, eos_ids=chat.eos_ids, seed=seed,
                                   step=turn, prompt_keys=[p])
            texts = decode(chat, [c.tokens for c in completions])
            correct = np.array([[score(text, golds) for text in texts]], dtype=float)  # (1, G, 4)
            rollout = bcr.Rollout([group], [prompt], completions, texts, correct, correct.mean(axis=2))
            unsure.append(credit_togo.unsure_share(texts, [golds] * samples))
            for name, credit in CREDITS.items():
                rows = [bcr.Row(prompt, c.tokens, c.logprobs, advantages)
                        for c, advantages in zip(completions, credit(rollout, chat, s))]
                bcr.accumulate_gradient(model, parameters, rows, samples * SHARED, s)
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


def by_n_figures(by_n, prefix=""):
    """The results of evaluate.py for one file of problems."""
    found = {}
    for n, of_n in by_n.items():
        found |= {f"{prefix}tokens, N={n}": of_n["tokens_per_problem"],
                  f"{prefix}right %, N={n}": 100 * of_n["accuracy"],
                  f"{prefix}right % in {SHARED}, N={n}": 100 * of_n["accuracy_in_budget"],
                  f"{prefix}waits, N={n}": of_n["loops_per_problem"]}
    return found


def anatomy(records):
    """What a solution consists of, as means over problems: waits, equations (steps and checks), and the share
    of solutions that begin with a restatement, that are done again, and that have no step at all."""
    counts = []
    for record in records:
        text = record["completion"]
        starts = [start for _, start in find_headers(text)] or [0]  # without a header it is still a solution
        for start, end in zip(starts, [*starts[1:], len(text)]):
            work = text[start:end].split("Answer")[0]
            counts.append((count_waits(work), work.count("="), 100 * ("We need" in work),
                           100 * ("do it again" in work), 100 * ("=" not in work)))
    names = ("waits", "equations", "restated %", "done again %", "no steps %")
    return dict(zip(names, np.mean(counts, axis=0).tolist()))


def figures_by_steps(records, problems):
    """Tokens and accuracy at N = 1 by the number of steps that a problem needs. problems: {id: problem}."""
    found = {}
    for steps in (2, 3, 4):
        some = [r for r in records if problems[r["problems"][0]]["difficulty"] == steps]
        if some:
            found[f"{steps} steps, tokens"] = np.mean([r["tokens"] for r in some])
            found[f"{steps} steps, right %"] = 100 * np.mean([r["correct"][0] for r in some])
    return found


def run_figures(run, problems):
    """All figures of the run in directory `run`, or {} if its evaluation has not finished."""
    evaluated, elsewhere = (run.with_name(f"{run.name}-{kind}") for kind in ("evaluated", "elsewhere"))
    if not (evaluated / "results.json").exists():
        return {}
    by_n = read_json(evaluated / "results.json")["results"]["heldout"]
    alone, in_fours = (records_of(evaluated / f"evaluation/heldout-n{n}-step0.jsonl") for n in (1, 4))
    found = by_n_figures(by_n) | anatomy(alone) | figures_by_steps(alone, problems)
    for n, part in itertools.product([n for n in ("4", "8") if n in by_n], ("", f" in {SHARED}")):
        found[f"lost to N={n}{part}"] = found[f"right %{part}, N=1"] - found[f"right %{part}, N={n}"]
    for position, right in enumerate(by_n.get("8", {}).get("accuracy_by_position", ()), start=1):
        found[f"position {position}"] = 100 * right
    tokens = [of_n["tokens_per_problem"] for of_n in by_n.values()]
    found["exponent"] = np.polyfit(np.log([int(n) for n in by_n]), np.log(tokens), 1)[0]
    found["falls at each N"] = bool(np.all(np.diff(tokens) < 0))
    golds = [[problems[i]["answer"] for i in record["problems"]] for record in in_fours]
    unsure = credit_togo.unsure_share([record["completion"] for record in in_fours], golds)
    found["sections unsure %, N=4"] = 100 * unsure
    if (elsewhere / "results.json").exists():
        for name, of_file in read_json(elsewhere / "results.json")["results"].items():
            found |= by_n_figures(of_file, f"{name}, ")
    if (run / "metrics.jsonl").exists():
        steps = records_of(run / "metrics.jsonl")
        found["training"] = [100 * m["accuracy"] for m in steps]
        found["worst right %"] = np.convolve(found["training"], np.ones(3) / 3, "valid").min()
        found["largest gradient norm"] = max(m["grad_norm"] for m in steps)
        found["seconds"] = sum(m["sampling_seconds"] + m["training_seconds"] for m in steps)
    return found


def collect(out, arms, seeds):
    """{arm: {seed: figures}} of all runs that have finished."""
    problems, found = {p["id"]: p for p in load_problems(REPO / "data/tiny/heldout.jsonl")}, {}
    for arm, seed in itertools.product(arms, seeds):
        if figures_of_run := run_figures(out / f"{arm}-seed{seed}", problems):
            found.setdefault(arm, {})[seed] = figures_of_run
    return found


# ----------------------------------------------------------------------------------------------
# Tables

DIGITS = {"waits": 2, "equations": 2, "exponent": 3, "largest gradient norm": 3}


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


def against(found, arm, other, compare):
    """compare(figures, figures of the other arm) seed by seed: the same problems, the same draws."""
    return [compare(found[arm][seed], found[other][seed]) for seed in found[arm] if seed in found[other]]


def differences_table(found):
    names = ["right %, N=1", "right %, N=4", f"right % in {SHARED}, N=4", "lost to N=4", "lost to N=8",
             f"lost to N=4 in {SHARED}", f"lost to N=8 in {SHARED}"]
    pairs = [(arm, other) for other in ("base", "rl-n1", "bcr-n4") for arm in found if arm != "base"]
    pairs += [("cap-n1-tight", "bcr-n4-tight"), ("penalty-4-std-long", "bcr-n4-long")]
    rows, tokens = [], "tokens, N=1"
    for arm, other in pairs:
        if arm in found and other in found and arm != other:
            changes = [against(found, arm, other, lambda a, b: 100 * (a[tokens] / b[tokens] - 1))]
            changes += [against(found, arm, other, lambda a, b: a.get(name, math.nan) - b.get(name, math.nan))
                        for name in names]
            rows.append([f"{arm} against {other}", *map(cell, changes)])
    return ("Differences, seed by seed: tokens in %, the others in points\n\n"
            + markdown(["", tokens, *names], rows))


def credit_tables(out, found):
    """What credit to go changes: the steps to a goal, and the variance of the gradient."""
    if "togo-n4" not in found or "bcr-n4" not in found:
        return
    rows = []
    for goal in (50, 60, 70):
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
    scaled, in_budget = {arm: found[arm] for arm in SCALING if arm in found}, f"right % in {SHARED}, N="
    parts = (
        arm_table("Arms: mean over seeds, ± half a 95% interval", found, (
            "tokens, N=1", "right %, N=1", "waits, N=1", "tokens, N=4", "right %, N=4", f"{in_budget}4",
            "right %, N=8")),
        differences_table(found),
        arm_table("Task scaling: tokens per problem ~ N^exponent over all N; points lost from N=1 on", found,
                  ("exponent", "falls at each N", "lost to N=4", "lost to N=8",
                   f"lost to N=4 in {SHARED}", f"lost to N=8 in {SHARED}")),
        arm_table("Tokens per problem by N, not truncated", scaled, [f"tokens, N={n}" for n in NS]),
        arm_table("Right % by N, not truncated", scaled, [f"right %, N={n}" for n in NS]),
        arm_table(f"Right % by N, all N in {SHARED} tokens", scaled, [f"{in_budget}{n}" for n in NS]),
        arm_table("What shortened, N = 1", found,
                  ("waits", "equations", "restated %", "done again %", "no steps %")),
        arm_table("By the number of steps that a problem needs, N = 1", found,
                  [f"{steps} steps, {what}" for steps in (2, 3, 4) for what in ("tokens", "right %")]),
        arm_table("Stability: the worst three steps in training, in the arm's own budget", found,
                  ("worst right %", "largest gradient norm", "sections unsure %, N=4", "seconds")),
        arm_table("Stability: the lowest of any seed", found, ("worst right %", "right %, N=1"), lowest),
        arm_table("Right % by position, N = 8, not truncated", found, [f"position {i}" for i in range(1, 9)]),
        arm_table("Elsewhere: chains of 5 and 6 steps; numbers up to 60", found,
                  [f"{file}, {what}, N={n}" for file in ("longer", "larger") for n in (1, 4)
                   for what in ("tokens", "right %")]),
        *credit_tables(out, found))
    text = "\n\n".join(parts) + "\n"
    print(text)
    write_text(out / "report.txt", text)
    write_json(out / "results.json", found)


def examples(out, names=("base", "rl-n1", "bcr-n4", "penalty-1", "penalty-4-std"), count=4,
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
    """Four PNG files, or a line of text if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for draw, name, size, columns in (
            (scaling_figure, "scaling", (14, 4), 3), (penalty_figure, "penalty", (14, 4.4), 3),
            (anatomy_figure, "anatomy", (14, 3.6), 4), (training_figure, "training", (10, 3.8), 2)):
        figure, axes = pyplot.subplots(1, columns, figsize=size, sharey=name == "anatomy")
        draw(axes, found)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=100)


def band(axis, x, middle, low, high, colour, label, style="-"):
    axis.plot(x, middle, style, color=colour, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.legend(fontsize=8)


def scaling_figure(axes, found):
    colours = ("tab:gray", "tab:orange", "tab:blue", "tab:purple", "tab:green")
    for axis, name in zip(axes, ("tokens", "right %", f"right % in {SHARED}")):
        for arm, colour in zip(SCALING, colours):
            if arm in found:
                middle, half = np.transpose([interval(over_seeds(found[arm], f"{name}, N={n}")) for n in NS])
                band(axis, NS, middle, middle - half, middle + half, colour, arm, "o-")
        axis.set(title=name, xlabel="N problems in the prompt", ylim=(0, None))


def penalty_figure(axes, found):
    """Tokens and accuracy at N = 1 of all arms, then each over the strength of the penalty."""
    colours = {"bcr": "tab:blue", "togo": "tab:blue", "penalty": "tab:red"}
    for arm, of_arm in found.items():
        (x, dx), (y, dy) = (interval(over_seeds(of_arm, name)) for name in ("tokens, N=1", "right %, N=1"))
        colour = colours.get(arm.split("-")[0], "tab:gray")
        axes[0].errorbar(x, y, dy, dx, "o", color=colour, markersize=4, linewidth=0.7)
        if not arm.startswith("penalty"):  # the other two axes show those
            axes[0].annotate(arm, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes[0].set(title="all arms, N = 1 (red: penalties)", xlabel="tokens per problem", ylabel="right %")
    for axis, name, limits in ((axes[1], "tokens, N=1", (0, None)), (axes[2], "right %, N=1", (80, 100))):
        for suffix, colour, label in (("", "tab:red", "constant scale"),
                                      ("-std", "tab:purple", "divided by the group's deviation")):
            arms = {x: found[f"penalty-{x}{suffix}"] for x in STRENGTHS if f"penalty-{x}{suffix}" in found}
            if arms:
                points = zip(*(interval(over_seeds(of_arm, name)) for of_arm in arms.values()))
                axis.errorbar(list(arms), *points, fmt="o-", color=colour, label=label)
        for arm, colour in (("base", "tab:gray"), ("bcr-n4", "tab:blue")):
            if arm in found:
                axis.axhline(np.mean(over_seeds(found[arm], name)), color=colour, linestyle="--", label=arm)
        axis.set(title=f"penalty: {name}", xlabel="strength of the penalty", xscale="log", ylim=limits)
        axis.set_xticks(STRENGTHS, map(str, STRENGTHS))
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=8)


def anatomy_figure(axes, found):
    arms = ("base", "rl-n1", "rl-n4", "cap-n1", "bcr-n2", "bcr-n4", "bcr-n8", "penalty-1", "penalty-4-std")
    shown = [arm for arm in arms if arm in found]
    for axis, name in zip(axes, ("waits", "equations", "done again %", "no steps %")):
        points = [interval(over_seeds(found[arm], name)) for arm in shown]
        axis.barh(shown, [p[0] for p in points], xerr=[p[1] for p in points], color="tab:blue", alpha=0.7)
        axis.set(title=f"{name}, N = 1")
    axes[0].invert_yaxis()


def training_figure(axes, found):
    at_four = {"bcr-n4-long": "tab:gray", "bcr-n4": "tab:blue", "togo-n4": "tab:green"}
    at_one = {"rl-n1": "tab:orange", "penalty-1": "tab:red", "penalty-4-std-long": "tab:purple"}
    for axis, colours, n in zip(axes, (at_four, at_one), (4, 1)):
        for arm, colour in colours.items():
            if arm in found:
                values = np.array(over_seeds(found[arm], "training"))  # (seeds, steps)
                x = np.arange(1, values.shape[1] + 1)
                band(axis, x, values.mean(axis=0), values.min(axis=0), values.max(axis=0), colour, arm)
        axis.set(title=f"N = {n}: right % in training (mean, range)", xlabel="step", ylim=(0, 100))


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=REPO / "out/study", help="default: out/study")
    options.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS),
                         help="arms, separated by commas: " + ", ".join(ARMS))
    options.add_argument("--seeds", type=int, default=5, help="seeds of each arm")
    options.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    options.add_argument("--problems", type=int, default=PROBLEMS, help="problems in a training step")
    options.add_argument("--evaluated", type=int, default=EVALUATED, help="held-out problems to evaluate on")
    options.add_argument("--brief", action="store_true", help="evaluate at N = 1 and 4, no harder problems")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--report", action="store_true", help="only write the report")
    o = options.parse_args()
    if unknown := set(o.arms) - set(ARMS):
        options.error(f"unknown arms: {', '.join(sorted(unknown))}")
    if not o.report:
        harder_problems(o.out / "problems", o.evaluated)
        clock = time.time()
        with ThreadPoolExecutor(o.jobs) as pool:  # seed by seed: a study that was stopped has complete seeds
            jobs = [pool.submit(one_run, o, name, seed) for seed in range(o.seeds) for name in o.arms]
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
