"""
The study: each claim of the paper tried in the tiny world, with controls, five seeds for each arm and intervals.

    python tests/study.py                      runs what is missing, two runs at a time, then the report
    python tests/study.py --arms bcr-n4,cap-n1 --seeds 2       some of the arms, some of the seeds
    python tests/study.py --report             only the report, of what is there

An arm is a line of flags of bcr.py, which does all the training and evaluating; nothing is trained here. All arms
see the same number of problems a step, of the same sequence at the same N, for the same number of steps. A run is
one arm and one seed: it is trained, then evaluated by `bcr.py --steps 0`, each into a directory of its own under
--out. What was stopped goes on where it was; what is finished is not run again.

The report: report.txt (tables), results.json (each seed's value), examples.txt (the same problems, several arms) and
figures (where matplotlib is installed).
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "data/tiny")]

import bcr  # noqa: E402

PROBLEMS = 24  # a step, in every arm: --groups is this / N
STEPS, LR = 20, 3e-4
NS = (1, 2, 3, 4, 6, 8)  # of the task-scaling law
EVALUATED = 240  # held-out problems
SHARED = 150  # the one budget under which all N are compared: that of BCR at N = 4, 37.5 a problem
STRENGTHS = (0.25, 0.5, 1, 2, 4)  # of the explicit penalty, in rewards a full budget


def arm(n, budget, **flags):
    """The flags of an arm that trains at N (a number, or several with commas) with that budget (likewise)."""
    return {"n": n, "budget": budget, **flags}


def groups(n, problems):
    """Prompts a step that hold about that many problems, on average where N takes turns."""
    ns = [int(part) for part in str(n).split(",")]
    return round(problems * len(ns) / sum(ns))


ARMS = {
    "base": {},
    "bcr-n2": arm(2, 75), "bcr-n3": arm(3, 112), "bcr-n4": arm(4, 150), "bcr-n8": arm(8, 300),  # 37.5 tokens a problem
    "bcr-n4-tight": arm(4, 100), "bcr-n4-loose": arm(4, 220),
    "bcr-mixed": arm("2,4,8", "75,150,300"),
    "rl-n1": arm(1, 512),  # does RL alone shorten?
    "cap-n1": arm(1, 38), "cap-n1-tight": arm(1, 25),  # is it the sharing, or just the cap?
    "rl-n4": arm(4, 640),  # is it the budget, or just the format?
    **{f"penalty-{strength}": arm(1, 192, length_penalty=strength) for strength in STRENGTHS},
    **{f"penalty-{strength}-std": arm(1, 192, length_penalty=strength, normalize_std=True) for strength in STRENGTHS},
    "togo-n4": arm(4, 150, credit="togo"),
    # does it last? the only arms that see more problems than the others
    "bcr-n4-long": arm(4, 150, steps=80),
    "penalty-4-std-long": arm(1, 192, length_penalty=4, normalize_std=True, steps=80),
}
SCALING = ("base", "rl-n1", "bcr-n4", "bcr-n8", "bcr-mixed")  # arms that are evaluated at all NS, the others at 1, 4 and 8
ELSEWHERE = ("base", "bcr-n4", "rl-n1")  # arms that are tried on harder problems, too

# ----------------------------------------------------------------------------------------------
# Runs


def harder_problems(path, count):
    """Two files of problems as the world has none: chains of five and six steps, and numbers up to 60."""
    import make

    for name, steps, largest, operand in (("longer", (5, 6), 30, 12), ("larger", (2, 3, 4), 60, 24)):
        rng, (make.LARGEST, make.OPERAND) = random.Random(1), (largest, operand)
        problems = []
        while len(problems) < count:
            problem = make.make_problem(rng, steps=rng.choice(steps))
            start, chain, _ = problem["chain"]
            if name == "longer" or max(np.cumsum([start] + [sign * b for sign, b in chain])) > 30:
                problems.append({key: problem[key] for key in ("problem", "answer", "difficulty")})
        path.mkdir(parents=True, exist_ok=True)
        bcr.write_lines(path / f"{name}.jsonl", problems)


def bcr_run(out, **flags):
    """Runs bcr.py into directory `out`, or goes on there, or does nothing where it has ended. Returns its results."""
    ended = out / "results.json"
    if not ended.exists() or "seconds" not in bcr.read_json(ended):
        words = [word for name, value in flags.items() for word in ([f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True))]
        words += ["--out", str(out)] + ["--resume"] * (out / "settings.json").exists()
        done = subprocess.run([sys.executable, str(REPO / "bcr.py"), *words], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # two runs share two cores
        if done.returncode:
            raise SystemExit(f"{out.name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
        for checkpoint in out.glob("checkpoint-*"):  # model/ is what goes on
            shutil.rmtree(checkpoint)
    return bcr.read_json(ended)


def one_run(o, name, seed):
    """Trains and evaluates one arm with one seed. The evaluation has the same problems and draws in all arms."""
    out, clock, model, flags = o.out, time.time(), {}, ARMS[name]
    if flags:
        trained = out / f"{name}-seed{seed}"
        bcr_run(trained, **{"steps": o.steps} | flags, groups=groups(flags["n"], o.problems), seed=seed, lr=LR, save_every=10, eval_n=1, eval_problems=1)
        model = {"model": trained / "model"}
    common = {"steps": 0, "seed": seed, "budget": SHARED, "eval_problems": o.evaluated}
    ns = (1, 4) if o.brief else NS if name in SCALING else (1, 4, 8)
    bcr_run(out / f"{name}-seed{seed}-evaluated", **model, **common, eval_n=",".join(map(str, ns)))
    if name in ELSEWHERE and not o.brief:
        files = ",".join(str(out / f"problems/{kind}.jsonl") for kind in ("longer", "larger"))
        bcr_run(out / f"{name}-seed{seed}-elsewhere", **model, **common, eval_n="1,4", eval_data=files)
    return f"{name}, seed {seed}: {time.time() - clock:.0f} s"


# ----------------------------------------------------------------------------------------------
# The variance of the gradient at fixed weights, by --credit


def gradient_variance(model_path, groups=64, seed=0):
    """The total variance of one group's gradient (the trace of its covariance over groups of one prompt each, and
    within a prompt over its groups) with both kinds of credit, for the same completions. Each prompt is sampled
    twice: half the squared difference of its two gradients is the variance that sampling causes, which is what
    credit can lower; the rest is the difference between prompts."""
    import torch

    s = bcr.Settings(n="4", budget=str(SHARED))
    model, chat, _ = bcr.load(bcr.dataclasses.replace(s, model=str(model_path)))
    problems, parameters = bcr.load_problems(s.data), list(model.parameters())
    chosen = bcr.draw_groups(problems, 4, seed, 0, groups)
    found = {"sequence": [], "togo": []}
    unsure = []
    for p, group in enumerate(chosen):
        prompt = bcr.encode_chat(chat, bcr.batch_prompt([problems[i]["problem"] for i in group]))
        golds = [[problems[i]["answer"] for i in group]] * 8
        pair = {name: [] for name in found}
        for turn in range(2):
            rollout = bcr.generate(model, [prompt], 8, SHARED, eos_ids=chat.eos_ids, seed=seed, step=1 + turn, prompt_keys=[p])
            completions = [row[:length].tolist() for row, length in zip(rollout.tokens, rollout.lengths)]
            texts = bcr.decode(chat, completions)
            correct = bcr.check(texts, golds)
            sections = [bcr.sections_of(chat, *row, bcr.score) for row in zip(texts, completions, correct, golds)]
            unsure += [section is None for section in sections]
            whole = bcr.advantages_of(correct.mean(axis=1)[None])[0]
            for name, advantages in (("sequence", whole), ("togo", bcr.advantages_to_go(correct, np.zeros(8), sections, 8))):
                bcr.accumulate_gradient(model, parameters, [prompt], [0] * 8, completions, [row[:length] for row, length in zip(
                    rollout.logprobs, rollout.lengths)], advantages, constant=8 * SHARED, s=s)
                pair[name].append(torch.cat([torch.zeros(w.numel()) if w.grad is None else w.grad.flatten() for w in parameters]))
                model.zero_grad()
        for name, (first, second) in pair.items():
            found[name].append([((first - second) ** 2).sum().item() / 2, ((first + second) ** 2).sum().item() / 4,
                                (first @ second).item()])
    result = {name: dict(zip(("of_sampling", "of_a_pair", "signal"), np.mean(values, axis=0).tolist())) for name, values in found.items()}
    ratios = np.array(found["togo"])[:, 0] / np.maximum(np.array(found["sequence"])[:, 0], 1e-30)
    kept = np.array(found["sequence"])[:, 0] > 0
    rng = np.random.default_rng(0)
    a, b = np.array(found["togo"])[:, 0], np.array(found["sequence"])[:, 0]
    again = [a[i].sum() / b[i].sum() for i in rng.integers(0, len(a), (2000, len(a)))]  # a bootstrap over prompts
    return result | {"ratio": a.sum() / b.sum(), "ratio_ci95": np.quantile(again, [0.025, 0.975]).tolist(),
                     "median_ratio": float(np.median(ratios[kept])), "unsure": float(np.mean(unsure)), "prompts": groups}


# ----------------------------------------------------------------------------------------------
# What stands in the completions


def anatomy(records):
    """What a solution consists of, each a mean over problems: waits, solutions that begin with a restatement, that
    are done again, that have no step at all, and equations (steps and checks)."""
    counts = []
    for record in records:
        sections = re.split(r"^### Problem \d+\n", record["completion"], flags=re.MULTILINE)[1:]
        for section in sections or [record["completion"]]:  # a model that drops the heading still has a solution
            work = section.split("Answer")[0]
            counts.append((bcr.wait_loops(work), "We need" in work, "do it again" in work, "=" not in work, work.count("=")))
    names = ("waits", "restated", "done_again", "no_steps", "equations")
    return dict(zip(names, np.mean(counts, axis=0).tolist())) if counts else dict.fromkeys(names, math.nan)


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------
# The report


def interval(values):
    """Mean and half the width of a 95% interval of Student's t over seeds."""
    values = np.array(values, float)
    half = bcr.student95(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(half)


def collect(out, arms, seeds):
    """{arm: {seed: figures}} of all runs that have ended."""
    found, steps_of = {}, {p["id"]: p["difficulty"] for p in bcr.load_problems(REPO / "data/tiny/heldout.jsonl")}
    for name in arms:
        for seed in seeds:
            path = out / f"{name}-seed{seed}-evaluated"
            if not (path / "results.json").exists() or "seconds" not in (results := bcr.read_json(path / "results.json")):
                continue
            figures = {"by_n": results["before"]["heldout"], "seconds": results["seconds"],
                       "anatomy": {n: anatomy(records_of(path / f"evaluation/heldout-n{n}-step0.jsonl")) for n in (1, 4)}}
            by_n = figures["by_n"]
            of_steps = {}
            for record in records_of(path / "evaluation/heldout-n1-step0.jsonl"):
                of_steps.setdefault(steps_of[record["problems"][0]], []).append((record["tokens"], record["correct"][0]))
            figures["by_steps"] = {steps: np.mean(values, axis=0).tolist() for steps, values in sorted(of_steps.items())}
            figures["lost"] = {kind: {n: by_n["1"][kind] - by_n[n][kind] if n in by_n else math.nan for n in ("4", "8")}
                               for kind in ("accuracy", "accuracy_in_budget")}
            tokens = [of_n["tokens_per_problem"] for of_n in by_n.values()]
            figures["exponent"] = float(np.polyfit(np.log([int(n) for n in by_n]), np.log(tokens), 1)[0])  # tokens per problem ~ N^exponent
            figures["monotone"] = bool(np.all(np.diff(tokens) < 0))
            elsewhere = out / f"{name}-seed{seed}-elsewhere/results.json"
            if elsewhere.exists():
                figures["elsewhere"] = bcr.read_json(elsewhere)["before"]
            metrics = out / f"{name}-seed{seed}/metrics.jsonl"
            if metrics.exists():
                steps = records_of(metrics)
                rewards = np.array([m["accuracy"] for m in steps])
                figures["training"] = {
                    "accuracy": rewards.tolist(), "tokens_per_problem": [m["tokens_per_problem"] for m in steps],
                    "worst_accuracy": float(np.convolve(rewards, np.ones(3) / 3, "valid").min()),
                    "grad_norm_max": max(m["grad_norm"] for m in steps), "grad_norm_mean": float(np.mean([m["grad_norm"] for m in steps])),
                    "truncated": [m["truncated"] for m in steps], "unsure": float(np.mean([m["credit_unsure"] for m in steps])),
                    "seconds": sum(m["sampling_seconds"] + m["training_seconds"] for m in steps)}
            found.setdefault(name, {})[seed] = figures
    return found


def over_seeds(of_arm, pick):
    return [pick(figures) for figures in of_arm.values()]


def cell(values, scale=1.0, digits=1):
    mean, half = interval(np.array(values) * scale)
    if mean != mean:
        return ""
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if half == half else "")


def markdown(head, rows):
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def against(found, name, other, pick):
    """Differences between two arms, seed by seed: the same problems, the same draws."""
    return [pick(found[name][seed]) - pick(found[other][seed]) for seed in found[name] if seed in found[other]]


def report(out, found):
    """Prints and writes the tables. Every number of README's section comes from here."""
    parts = []

    def at(n, key):
        return lambda figures: figures["by_n"].get(str(n), {}).get(key, math.nan)

    rows = [[name, str(len(of_arm)), cell(over_seeds(of_arm, at(1, "tokens_per_problem"))), cell(over_seeds(of_arm, at(1, "accuracy")), 100),
             cell(over_seeds(of_arm, at(1, "loops_per_problem")), 1, 2), cell(over_seeds(of_arm, at(4, "tokens_per_problem"))),
             cell(over_seeds(of_arm, at(4, "accuracy")), 100), cell(over_seeds(of_arm, at(4, "accuracy_in_budget")), 100),
             cell(over_seeds(of_arm, at(8, "accuracy")), 100)] for name, of_arm in found.items()]
    parts.append("Arms: mean over seeds, ± half a 95% interval\n\n" + markdown(
        ["arm", "seeds", "tokens, N=1", "right %, N=1", "waits, N=1", "tokens, N=4", "right %, N=4", f"right % in {SHARED}, N=4", "right %, N=8"], rows))

    rows = []
    for other, only in (("base", ""), ("rl-n1", ""), ("bcr-n4", ""), ("bcr-n4-tight", "cap-n1-tight"), ("bcr-n4-long", "penalty-4-std-long")):
        for name in found if other in found else ():
            if name in ("base", other) or only not in name:
                continue
            tokens = [100 * (math.exp(d) - 1) for d in against(found, name, other, lambda f: math.log(at(1, "tokens_per_problem")(f)))]
            rows.append([f"{name} against {other}", cell(tokens)] + [cell(against(found, name, other, pick), 100) for pick in (
                at(1, "accuracy"), at(4, "accuracy"), at(4, "accuracy_in_budget"), *(
                    lambda f, kind=kind, n=n: f["lost"][kind][n] for kind in ("accuracy", "accuracy_in_budget") for n in ("4", "8")))])
    parts.append("Differences, seed by seed: tokens, points right, and points lost from N=1 on\n\n" + markdown(
        ["", "tokens %, N=1", "right, N=1", "right, N=4", f"right in {SHARED}, N=4", "lost to N=4", "lost to N=8",
         f"lost to N=4 in {SHARED}", f"lost to N=8 in {SHARED}"], rows))

    rows = [[name, cell(over_seeds(of_arm, lambda f: f["exponent"]), 1, 3),
             f"{sum(over_seeds(of_arm, lambda f: f['monotone']))} of {len(of_arm)}",
             *(cell(over_seeds(of_arm, lambda f: f["lost"][kind][n]), 100) for kind in ("accuracy", "accuracy_in_budget") for n in ("4", "8"))]
            for name, of_arm in found.items()]
    parts.append("Task scaling: tokens per problem ~ N^exponent over N = " + ", ".join(map(str, NS)) + " or 1, 4, 8\n\n" + markdown(
        ["arm", "exponent", "falls at each N", "points lost from N=1 to 4, nobody cut", "to 8", f"to 4, in {SHARED} tokens", "to 8"], rows))

    for key, title, scale in (("tokens_per_problem", "Tokens per problem by N, nobody cut", 1), ("accuracy", "Right % by N, nobody cut", 100),
                              ("accuracy_in_budget", f"Right % by N, all N in {SHARED} tokens", 100), ("interference", "Interference % by N", 100)):
        rows = [[name, *(cell(over_seeds(found[name], at(n, key)), scale) for n in NS)] for name in found if name in SCALING]
        parts.append(title + "\n\n" + markdown(["arm", *(f"N={n}" for n in NS)], rows))

    rows = [[name, *(cell(over_seeds(of_arm, lambda f: f["anatomy"][1][key]), scale, digits) for key, scale, digits in (
        ("waits", 1, 2), ("equations", 1, 2), ("restated", 100, 1), ("done_again", 100, 1), ("no_steps", 100, 1)))] for name, of_arm in found.items()]
    parts.append("What shortened, N = 1\n\n" + markdown(["arm", "waits", "equations", "restated %", "done again %", "no steps %"], rows))

    rows = [[name, *(cell(over_seeds(of_arm, lambda f: f["by_steps"].get(steps, [math.nan] * 2)[i]), scale)
                     for steps in (2, 3, 4) for i, scale in ((0, 1), (1, 100)))] for name, of_arm in found.items()]
    parts.append("By the number of steps that a problem needs, N = 1\n\n" + markdown(
        ["arm"] + [f"{steps} steps, {what}" for steps in (2, 3, 4) for what in ("tokens", "right %")], rows))

    base = np.mean(over_seeds(found["base"], at(1, "accuracy"))) if "base" in found else 0
    rows = []
    for name, of_arm in found.items():
        if all("training" in figures for figures in of_arm.values()):
            worst = over_seeds(of_arm, lambda f: f["training"]["worst_accuracy"])
            rows.append([name, cell(worst, 100), f"{100 * min(worst):.0f}",
                         cell(over_seeds(of_arm, lambda f: f["training"]["grad_norm_max"]), 1, 3),
                         f"{sum(at(1, 'accuracy')(f) < base / 2 for f in of_arm.values())} of {len(of_arm)}",
                         f"{100 * np.mean(over_seeds(of_arm, lambda f: f['training']['unsure'])):.2f}",
                         cell(over_seeds(of_arm, lambda f: f["training"]["seconds"]), 1, 0)])
    parts.append("Stability: the worst three steps in training, in the arm's own budget\n\n" + markdown(
        ["arm", "worst right %", "of any seed", "largest gradient norm", "runs below half of base", "sections unsure %", "seconds"], rows))

    rows = []
    for name in ("bcr-n4", "bcr-n8", "bcr-mixed", "rl-n1", "rl-n4", "base"):
        if name in found and all("8" in figures["by_n"] for figures in found[name].values()):
            places = np.array(over_seeds(found[name], lambda f: f["by_n"]["8"]["accuracy_by_position"]))
            rows.append([name, *(cell(places[:, i], 100, 0) for i in range(8))])
    parts.append("Right % by position, N = 8, nobody cut\n\n" + markdown(["arm", *(f"{i}" for i in range(1, 9))], rows))

    rows = []
    for name in ELSEWHERE:
        if name in found and all("elsewhere" in f for f in found[name].values()):
            rows.append([name, *(cell(over_seeds(found[name], lambda f: f["elsewhere"][kind][n][key]), scale)
                                 for kind in ("longer", "larger") for n in ("1", "4") for key, scale in (("tokens_per_problem", 1), ("accuracy", 100)))])
    parts.append("Elsewhere: chains of 5 and 6 steps; numbers up to 60\n\n" + markdown(
        ["arm"] + [f"{kind}, N={n}, {what}" for kind in ("longer", "larger") for n in (1, 4) for what in ("tokens", "right %")], rows))

    if "togo-n4" in found and "bcr-n4" in found:
        rows = []
        for goal in (0.5, 0.6, 0.7):
            row = [f"{goal:.0%}"]
            for name in ("bcr-n4", "togo-n4"):
                reached = [next((i + 1 for i in range(2, len(a)) if np.mean(a[i - 2:i + 1]) >= goal), math.nan)
                           for a in over_seeds(found[name], lambda f: f["training"]["accuracy"])]
                row.append(cell(reached) if all(r == r for r in reached) else ", ".join(f"{r:g}" for r in reached))
            rows.append(row)
        parts.append("Steps until three steps in a row are right that often, in the budget\n\n" + markdown(["", "sequence", "togo"], rows))
        for file in sorted(out.glob("variance-*.json")):
            v = bcr.read_json(file)
            parts.append(f"Gradient variance, {file.stem.removeprefix('variance-')}: togo / sequence = {v['ratio']:.3f} "
                         f"({v['ratio_ci95'][0]:.3f} to {v['ratio_ci95'][1]:.3f}), {v['prompts']} prompts; signal {v['togo']['signal']:.3g} "
                         f"against {v['sequence']['signal']:.3g}; sections unsure {v['unsure']:.2%}")

    text = "\n\n".join(parts) + "\n"
    print(text)
    bcr.write_text(out / "report.txt", text)
    bcr.write_json(out / "results.json", found)


def examples(out, names=("base", "rl-n1", "bcr-n4", "penalty-1", "penalty-4-std"), count=4, heldout=REPO / "data/tiny/heldout.jsonl"):
    """The same problems answered by several arms (seed 0, N = 1), side by side: examples.txt."""
    problems, parts = {problem["id"]: problem["problem"] for problem in bcr.load_problems(heldout)}, []
    files = {name: out / f"{name}-seed0-evaluated/evaluation/heldout-n1-step0.jsonl" for name in names}
    records = {name: records_of(path) for name, path in files.items() if path.exists()}
    for p in range(count if records else 0):
        parts.append("=" * 100 + "\n" + problems[next(iter(records.values()))[p]["problems"][0]])
        for name, of_arm in records.items():
            parts.append(f"--- {name}: {of_arm[p]['tokens']} tokens, {'right' if of_arm[p]['correct'][0] else 'wrong'}\n{of_arm[p]['completion']}")
    bcr.write_text(out / "examples.txt", "\n\n".join(parts) + "\n")


def figures(out, found):
    """Four pictures; without matplotlib a line that says so."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def curve(axis, name, key, colour, style="o-"):
        values = np.array([[f["by_n"][str(n)][key] for n in NS] for f in found[name].values()])  # (seeds, NS)
        middle, half = values.mean(axis=0), np.array([interval(column)[1] for column in values.T])
        axis.plot(NS, middle, style, color=colour, label=name)
        axis.fill_between(NS, middle - half, middle + half, color=colour, alpha=0.15, linewidth=0)

    lines = [(name, colour) for name, colour in zip(SCALING, ("tab:gray", "tab:orange", "tab:blue", "tab:purple", "tab:green")) if name in found]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    for axis, key, title in zip(axes, ("tokens_per_problem", "accuracy", "accuracy_in_budget"),
                                ("tokens per problem, nobody cut", "right, nobody cut", f"right, all N in {SHARED} tokens")):
        for name, colour in lines:
            if all(len(f["by_n"]) == len(NS) for f in found[name].values()):
                curve(axis, name, key, colour)
        axis.set(title=title, xlabel="N problems in the prompt", ylim=(0, None))
        axis.legend(fontsize=8)
    save(figure, out / "scaling.png")

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4))
    for name, of_arm in found.items():
        (x, dx), (y, dy) = (interval(over_seeds(of_arm, lambda f: f["by_n"]["1"][key])) for key in ("tokens_per_problem", "accuracy"))
        colour = "tab:blue" if name.startswith(("bcr", "togo")) else "tab:red" if name.startswith("penalty") else "tab:gray"
        axes[0].errorbar(x, y, dy, dx, "o", color=colour, markersize=4, linewidth=0.7)
        if not name.startswith("penalty"):  # those are in the next two
            axes[0].annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes[0].set(title="N = 1: what each arm costs (red: penalties)", xlabel="tokens per problem", ylabel="right")
    for suffix, colour, label in (("", "tab:red", "constant scale"), ("-std", "tab:purple", "divided by the group's deviation")):
        names = [f"penalty-{strength}{suffix}" for strength in STRENGTHS if f"penalty-{strength}{suffix}" in found]
        for axis, key in zip(axes[1:], ("tokens_per_problem", "accuracy")):
            points = [interval(over_seeds(found[name], lambda f: f["by_n"]["1"][key])) for name in names]
            if points:
                axis.errorbar([float(name.split("-")[1]) for name in names], *zip(*points), fmt="o-", color=colour, label=label)
    for axis, key, title in zip(axes[1:], ("tokens_per_problem", "accuracy"), ("penalty: tokens, N = 1", "penalty: right, N = 1")):
        for name, colour in (("base", "tab:gray"), ("bcr-n4", "tab:blue")):
            if name in found:
                axis.axhline(np.mean(over_seeds(found[name], lambda f: f["by_n"]["1"][key])), color=colour, linestyle="--", label=name)
        axis.set(title=title, xlabel="strength of the penalty", xscale="log", ylim=(0, None) if key == "tokens_per_problem" else (0.8, 1))
        axis.set_xticks(STRENGTHS, map(str, STRENGTHS))
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=8)
    save(figure, out / "penalty.png")

    shown = [name for name in ("base", "rl-n1", "rl-n4", "cap-n1", "bcr-n2", "bcr-n4", "bcr-n8", "penalty-1", "penalty-4-std") if name in found]
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.6), sharey=True)
    for axis, key, title in zip(axes, ("waits", "equations", "done_again", "no_steps"),
                                ("waits per problem", "equations per problem", "share done again", "share without steps")):
        points = [interval(over_seeds(found[name], lambda f: f["anatomy"][1][key])) for name in shown]
        axis.barh(shown, [p[0] for p in points], xerr=[p[1] for p in points], color="tab:blue", alpha=0.7)
        axis.set(title=title)
    axes[0].invert_yaxis()
    save(figure, out / "anatomy.png")

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for names, axis, title in (((("bcr-n4-long", "tab:gray"), ("bcr-n4", "tab:blue"), ("togo-n4", "tab:green")), axes[0], "N = 4: right in the budget"),
                               ((("rl-n1", "tab:orange"), ("penalty-1", "tab:red"), ("penalty-4-std-long", "tab:purple")),
                                axes[1], "N = 1: right in training")):
        for name, colour in names:
            if name in found:
                values = np.array(over_seeds(found[name], lambda f: f["training"]["accuracy"]))
                axis.plot(np.arange(1, values.shape[1] + 1), values.mean(axis=0), color=colour, label=name)
                axis.fill_between(np.arange(1, values.shape[1] + 1), values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)
        axis.set(title=title + " (mean, range)", xlabel="step", ylim=(0, 1))
        axis.legend(fontsize=8)
    save(figure, out / "training.png")


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=REPO / "out/study", help="directory of the study (default: out/study)")
    options.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help="arms, with commas: " + ", ".join(ARMS))
    options.add_argument("--seeds", type=int, default=5, help="seeds of each arm")
    options.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    options.add_argument("--problems", type=int, default=PROBLEMS, help="problems in a training step")
    options.add_argument("--evaluated", type=int, default=EVALUATED, help="held-out problems to evaluate on")
    options.add_argument("--brief", action="store_true", help="evaluate at N = 1 and 4 only, on the world's own problems only")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--report", action="store_true", help="run nothing")
    o = options.parse_args()
    if unknown := set(o.arms) - set(ARMS):
        options.error(f"no such arm: {', '.join(sorted(unknown))}")
    if not o.report:
        harder_problems(o.out / "problems", o.evaluated)
        clock = time.time()
        with ThreadPoolExecutor(o.jobs) as pool:  # seed by seed: a study that was stopped has whole seeds
            jobs = [pool.submit(one_run, o, name, seed) for seed in range(o.seeds) for name in o.arms]
            for number, job in enumerate(jobs, start=1):
                print(f"{number} of {len(jobs)}: {job.result()}; {time.time() - clock:.0f} s so far", flush=True)
        for stage, model in (("base", bcr.Settings.model), ("trained", o.out / "bcr-n4-seed0/model")):
            if "togo-n4" in o.arms and Path(model).is_dir() and not (o.out / f"variance-{stage}.json").exists():
                bcr.write_json(o.out / f"variance-{stage}.json", gradient_variance(model))
    found = collect(o.out, o.arms, range(o.seeds))
    if found:
        report(o.out, found)
        examples(o.out)
        figures(o.out, found)


if __name__ == "__main__":
    main()
