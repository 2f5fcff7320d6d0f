"""
Evaluation: accuracy and tokens per problem over N, and solving files of problems.

    python evaluate.py --model out/run-1/model --data FILE.jsonl --n 1,2,4,8
    python evaluate.py --model out/run-1/model --solve FILE.jsonl --n 4 --budget 300

bcr.py calls `evaluate_all` before and after training. Completions are sampled with a budget large enough to
avoid truncation; the accuracy within a smaller budget is read off the same completions.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
from data.chat import decode, encode_chat, fitting_problems, load_chat
from data.files import UserError, find_model, write_json, write_lines, write_text
from data.problems import batch_prompt, doubtful_golds, evaluation_groups, load_benchmarks, load_problems
from distributed import say
from model import Transformer
from reward import extract_answers, score

HERE = Path(__file__).resolve().parent


def flag(default, doc, least=None, most=None, choices=None):
    """A field of a settings class: a flag of the command line with its help text and its range. Every number
    has a `least` value, and at most 2**31 unless `most` differs, so that no flag accepts nan or inf."""
    most = 2**31 if least is not None and most is None else most
    metadata = {"doc": doc, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EvaluationSettings:
    model: str = flag(str(HERE / "data/tiny/model"), "Hugging Face model: a directory, or a name on the Hub")
    data: str = flag(str(HERE / "data/tiny/heldout.jsonl"), "JSONL files of problems, separated by commas")
    solve: str = flag("", "answer the problems of this JSONL file, with one --n and one --budget")
    n: tuple = flag((1, 2, 4, 8), "values of N, the number of problems in a prompt")
    budget: tuple = flag((1536,), "tokens for a whole completion: one number, or one for each N")
    within: int = flag(0, "also report the accuracy within this many tokens; 0 does not", least=0)
    problems: int = flag(512, "problems of each file, the same ones at each N", least=1)
    samples: int = flag(1, "completions of each prompt (k): the accuracy is avg@k", least=1)
    temperature: float = flag(1.0, "sampling temperature; 0 takes the most likely token", least=0)
    target_accuracy: float = flag(0.0, "name the N that reaches this accuracy with the fewest tokens", 0, 1)
    reward: str = flag("", "Python file with your own score(completion, golds) -> N numbers from 0 to 1")
    skip_long: bool = flag(False, "leave out problems whose prompt does not fit the model's positions")
    seed: int = flag(0, "seed of the groups and of every sampled token", 0, 2**63 - 1)
    out: str = flag("", "output directory (default: the next free out/evaluation-1, -2, ...)")
    resume: bool = flag(False, "continue the evaluation in --out; finished files and N are not repeated")
    device: str = flag("auto", "cpu, cuda, or auto: cuda if available")
    dtype: str = flag("auto", "auto: bfloat16 on cuda, else float32", choices=("auto", "float32", "bfloat16"))
    processes: int = flag(0, "processes on a CPU; 0: one per core for a small model (at most 8)", 0, 64)
    rows: int = flag(256, "completions sampled at a time; lower it if memory runs out", least=1)


# ----------------------------------------------------------------------------------------------
# Accuracy and tokens at one N

EVALUATION = 2**32  # evaluation draws from the random stream of step EVALUATION + N


def evaluate_all(model, chat, benchmarks, score, s, out, step, title):
    """Evaluates every benchmark at every N. benchmarks: {name: problems}.

    Returns ({name: {n: figures}}, {name: {n: records}}), with n as text. A finished (benchmark, N) is a file
    in `out`/evaluation/, which a resumed run reads."""
    figures, records = {}, {}
    for name, problems in benchmarks.items():
        figures[name], records[name] = {}, {}
        for n, budget in zip(s.n, s.budget):
            path = out / f"evaluation/{name}-n{n}-step{step}.jsonl"
            label = f"{title}, {name}, N = {n}"
            known, clock = path.exists(), time.time()
            found = evaluate(model, chat, problems, n, budget, score, s, path, label)
            summary = summarize(found, n, s)
            speed = summary["problems"] * s.samples / (time.time() - clock)
            summary["problems_per_second"] = None if known else speed  # None: sampled before it was resumed
            say(f"{label}: {summary['accuracy']:.1%} right, "
                f"{summary['tokens_per_problem']:.1f} tokens a problem")
            figures[name][str(n)], records[name][str(n)] = summary, found
    return figures, records


def evaluate(model, chat, problems, n, budget, score, s, path, title):
    """Answers all problems, N in a prompt. Returns a record of each completion, in the order (prompt,
    sample). Its lists of N numbers have None for problems that only fill up the last prompt."""
    groups, counted = evaluation_groups(problems, n, s.seed)
    batch = [[problems[i] for i in group] for group in groups]

    def judge(p, tokens, text):
        golds = [problem["answer"] for problem in batch[p]]
        correct = in_budget = score(text, golds)  # N marks
        if 0 < s.within < len(tokens):  # sampling with that budget gives the same tokens, up to the cut
            in_budget = score(decode(chat, [tokens[: s.within]])[0], golds)
        return {"correct": [float(mark) if c else None for mark, c in zip(correct, counted[p])],
                "in_budget": [float(mark) if c else None for mark, c in zip(in_budget, counted[p])],
                "waits": count_waits(text)}

    return sample_records(model, chat, batch, s.samples, budget, s, path, title, judge)


def sample_records(model, chat, batch, samples, budget, s, path, title, judge=lambda p, tokens, text: {}):
    """Samples completions for each group of problems in `batch`. Returns one dict for each, in the order
    (prompt, sample). judge(p, tokens, text) returns further fields. The records are written to `path` once
    all are done; if it exists, they are read from it."""
    if distributed.all_gather(path.exists())[0]:
        return read_records(path, batch, samples)
    prompts = [encode_chat(chat, batch_prompt(problems)) for problems in batch]
    completions = distributed.sample(
        model, prompts, samples, budget, title=title, eos_ids=chat.eos_ids, temperature=s.temperature,
        seed=s.seed, step=EVALUATION + len(batch[0]), max_rows=s.rows)
    records = []
    for row, completion in enumerate(completions):
        p, text = row // samples, decode(chat, [completion.tokens])[0]
        records.append({
            "prompt": p, "sample": row % samples, "problems": [problem["id"] for problem in batch[p]],
            "tokens": len(completion.tokens), "truncated": completion.truncated,
            **judge(p, completion.tokens, text), "completion": text})
    if distributed.rank() == 0:
        path.parent.mkdir(exist_ok=True)
        write_lines(path, records)
    return records


def read_records(path, batch, samples):
    """The records of a finished evaluation. Raises UserError if they are not those of these prompts."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [(r["prompt"], r["sample"], r["problems"], type(r["tokens"])) for r in records]
    except (ValueError, KeyError, TypeError):
        found = None
    expected = [(p, g, [problem["id"] for problem in problems], int)
                for p, problems in enumerate(batch) for g in range(samples)]
    if found != expected:
        raise UserError(f"{path} is damaged: remove it, and --resume samples it again")
    return records


def summarize(records, n, s):
    """The figures of one benchmark at one N, from its records."""
    correct, in_budget = (np.array([r[key] for r in records], dtype=float).reshape(-1, s.samples, n)
                          for key in ("correct", "in_budget"))  # (P, k, N), NaN where it does not count
    return {
        "accuracy": np.nanmean(correct),
        "accuracy_ci95": interval95(correct),
        "tokens_per_problem": np.mean([r["tokens"] for r in records]) / n,
        "loops_per_problem": np.mean([r["waits"] for r in records]) / n,
        "truncated": np.mean([r["truncated"] for r in records]),
        "budget": s.within,
        "accuracy_in_budget": np.nanmean(in_budget),
        "accuracy_in_budget_ci95": interval95(in_budget),
        "accuracy_by_position": np.nanmean(correct, axis=(0, 1)).tolist(),
        "problems": int(np.isfinite(correct[:, 0]).sum()),
        "samples": s.samples,
    }


def count_waits(text):
    return len(re.findall(r"\bwait\b", text, re.IGNORECASE))


# ----------------------------------------------------------------------------------------------
# Intervals


def student95(freedom):
    """The 97.5% quantile of Student's t with `freedom` degrees of freedom, within 0.3% from 4 on.

    Source: Abramowitz & Stegun 26.7.5."""
    z, v = 1.959964, freedom
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / v + g2 / v**2 + g3 / v**3


def interval95(correct):
    """A 95% interval for the mean of correct (P, k, N), where NaN does not count.

    The N problems of a prompt and its k samples are not independent; prompts are. This is Wilson's interval
    (1927) for the number of independent answers that would have the standard error seen between prompts
    (Kish's effective sample size), with Student's t because prompts may be few."""
    prompts, p = len(correct), np.nanmean(correct)
    trials, z = float(np.isfinite(correct[:, 0]).sum()), student95(prompts - 1) if prompts > 1 else 1.96
    variance = np.nanmean(correct, axis=(1, 2)).var(ddof=1) / prompts if prompts > 1 else 0
    if variance > 0:
        trials = min(float(np.isfinite(correct).sum()), p * (1 - p) / variance)
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return [max(0.0, middle - half), middle + half if p < 1 else 1.0]


def paired_change(before, after):
    """From records of the same prompts before and after training: the change of the accuracy and the relative
    change of the tokens, each with a 95% interval over prompts (None for the tokens of one prompt).

    The interval of the accuracy counts two prompts more (Agresti and Min 2005, for matched pairs): if no
    answer changed, the true accuracy may still have."""

    def by_prompt(records, key):  # (P,): sums over samples and problems
        values = [np.nansum(np.array(r[key], dtype=float)) for r in records]
        return np.array(values).reshape(records[-1]["prompt"] + 1, -1).sum(axis=1)

    def interval(value, deviations):
        if len(deviations) < 2:
            return None
        half = student95(len(deviations) - 1) * deviations.std(ddof=1) / math.sqrt(len(deviations))
        return [max(-1.0, value - half), value + half]

    answers = sum(value is not None for r in after for value in r["correct"])
    gain = by_prompt(after, "correct") - by_prompt(before, "correct")
    gain = gain * len(gain) / answers  # (P,), its mean is the change of the accuracy
    smoothed = np.append(gain, [math.sqrt(0.5), -math.sqrt(0.5)])
    old, new = by_prompt(before, "tokens"), by_prompt(after, "tokens")
    ratio = new.mean() / old.mean()
    return {"accuracy": gain.mean(), "accuracy_ci95": interval(smoothed.mean(), smoothed),
            "tokens": ratio - 1,
            "tokens_ci95": interval(ratio - 1, (new - ratio * old) / old.mean())}  # a ratio, to first order


# ----------------------------------------------------------------------------------------------
# Reports

METRICS = (  # title, key of the figures, scale, digits
    ("accuracy %", "accuracy", 100, 1), ("in {within} tokens %", "accuracy_in_budget", 100, 1),
    ("tokens / problem", "tokens_per_problem", 1, 1), ("waits / problem", "loops_per_problem", 1, 2),
    ("problems / s", "problems_per_second", 1, 1))


def table(stages, changes, within):
    """The results as text, one line for each benchmark and N. stages: {"before": figures, "after": figures};
    changes: what `paired_change` returns for each benchmark and N, or {}, which adds the problems per
    second."""
    def cell(value, scale, digits):
        return "" if value is None else f"{value * scale:.{digits}f}"

    hidden = {None if within else "accuracy_in_budget", "problems_per_second" if changes else None}
    keys = [(name, n) for name, of_name in next(iter(stages.values())).items() for n in of_name]
    groups = [("benchmark", [["", *(name for name, _ in keys)]]), ("N", [["", *(n for _, n in keys)]])]
    for title, metric, scale, digits in METRICS:
        columns = [[stage, *(cell(figures[name][n][metric], scale, digits) for name, n in keys)]
                   for stage, figures in stages.items()]
        if changes and metric == "accuracy":
            columns.append(["change", *(format_points(changes[name][n]) for name, n in keys)])
        if changes and metric == "tokens_per_problem":
            columns.append(["change", *(f"{changes[name][n]['tokens']:+.1%}" for name, n in keys)])
        if metric not in hidden:
            groups.append((title.format(within=within), columns))
    blocks = []
    for title, columns in groups:
        widths = [max(map(len, column)) for column in columns]
        rows = [" ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in zip(*columns)]
        width = max(len(title), len(rows[0]))
        blocks.append([title.center(width), *(row.rjust(width) for row in rows)])
    lines = [" | ".join(parts) for parts in zip(*blocks)]
    head = lines[:2] if len(stages) > 1 else lines[:1]
    return "\n".join([*head, "-" * len(lines[0]), *lines[2:]])


def format_points(change):
    low, high = change["accuracy_ci95"]
    return f"{100 * change['accuracy']:+.1f} ±{50 * (high - low):.1f}"


def dial(results, target):
    """N as a dial: for each benchmark a sentence that names the N with the fewest tokens per problem among
    those with an accuracy of at least `target`. results: {name: {n: figures}}."""
    for name, by_n in results.items():
        enough = [n for n in by_n if by_n[n]["accuracy"] >= target]
        if not enough:
            yield f"{name}: no N of {', '.join(by_n)} reaches {target:.1%}"
            continue
        best = min(enough, key=lambda n: by_n[n]["tokens_per_problem"])
        low, high = by_n[best]["accuracy_ci95"]
        speed = by_n[best].get("problems_per_second")
        speed = f", {speed:.1f} problems a second" if speed else ""
        doubt = "; the interval reaches below the target: evaluate more problems" if low < target else ""
        yield (f"{name}: at least {target:.1%} right with the fewest tokens: N = {best}, "
               f"{by_n[best]['accuracy']:.1%} right (95% interval {low:.1%} to {high:.1%}) with "
               f"{by_n[best]['tokens_per_problem']:.1f} tokens a problem{speed}{doubt}")


def write_completions(path, benchmarks, records, each=3):
    """Some prompts and completions of each benchmark and N as text. Only the first process writes."""
    if distributed.rank() > 0:
        return
    out = []
    for name, by_n in records.items():
        known = {problem["id"]: problem for problem in benchmarks[name]}
        for n, of_n in by_n.items():
            for r in [r for r in of_n if r["sample"] == 0][:each]:
                problems = [known[i] for i in r["problems"]]
                right, answers = sum(filter(None, r["correct"])), ", ".join(p["answer"] for p in problems)
                out += ["=" * 100, f"{name}, N = {n}", "", batch_prompt(problems), "",
                        f"--- completion of {r['tokens']} tokens: {right:g} of {n} right; answers: {answers}",
                        "", r["completion"], ""]
    write_text(path, "\n".join(out) + "\n")


def append_group(path, step, rollout, advantages):
    """Appends one group in full to samples.txt: the first whose rewards differ, else the first."""
    if distributed.rank() > 0:
        return
    rewards, (_, G, N) = rollout.rewards, rollout.correct.shape
    p = int(np.argmax(rewards.max(axis=1) > rewards.min(axis=1)))
    golds = ", ".join(problem["answer"] for problem in rollout.groups[p])
    out = [f"==== step {step}: one group of {G} samples, N = {N}", "", batch_prompt(rollout.groups[p]), "",
           f"Answers: {golds}. Mean reward (the baseline): {rewards[p].mean():.3f}", ""]
    for g in range(G):
        completion, row = rollout.completions[p * G + g], p * G + g
        right = " ".join("right" if correct else "wrong" for correct in rollout.correct[p, g])
        cut = ", truncated" if completion.truncated else ""
        low, high = advantages[row].min(), advantages[row].max()
        advantage = f"{low:+.3f}" if low == high else f"{low:+.3f} to {high:+.3f}"
        out += [f"---- sample {g + 1}: {len(completion.tokens)} tokens{cut}; {right}; "
                f"reward {rewards[p, g]:.3f}; advantage {advantage}", rollout.texts[row], ""]
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join(out) + "\n")


def plot(path, stages, within, metrics=()):
    """results.png: for each benchmark tokens and accuracy over N (the task-scaling law) and accuracy over the
    position in the prompt. Below them the training, from its metrics; without training, beside them the dial:
    accuracy against problems per second."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(stages.values())))
    rows, columns = len(names) + bool(metrics), 3 if metrics else 4
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.8 * rows), squeeze=False)
    for row, name in zip(axes, names):
        for (stage, figures), colour in zip(stages.items(), ("tab:gray", "tab:blue")):
            plot_over_n(row, figures[name], stage, colour, within)
        row[0].set(title=f"{name}: tokens per problem", xlabel="N problems in the prompt")
        row[1].set(title=f"{name}: accuracy", xlabel="N problems in the prompt")
        row[2].set(title=f"{name}: accuracy by position", xlabel="position in the prompt")
        for axis in row[:3]:
            axis.legend(fontsize=8)
        for axis in row[3:]:
            plot_dial(axis, figures[name])
            axis.set(title=f"{name}: N as a dial", xlabel="problems per second", ylabel="accuracy")
    if metrics:
        plot_training(axes[-1], metrics)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_over_n(axes, by_n, stage, colour, within):
    """The curves of one benchmark at one stage of the training, in three axes."""
    ns, figures = [int(n) for n in by_n], list(by_n.values())
    axes[0].plot(ns, [f["tokens_per_problem"] for f in figures], "o-", color=colour, label=stage)
    axes[1].plot(ns, [f["accuracy"] for f in figures], "o-", color=colour, label=f"{stage}, not truncated")
    low, high = zip(*(f["accuracy_ci95"] for f in figures))
    axes[1].fill_between(ns, low, high, color=colour, alpha=0.2, linewidth=0)
    if within:
        axes[1].plot(ns, [f["accuracy_in_budget"] for f in figures], "o--", color=colour,
                     label=f"{stage}, {within} tokens")
    for n, of_n in zip(ns, figures):
        axes[2].plot(range(1, n + 1), of_n["accuracy_by_position"], ".-", color=colour,
                     alpha=0.2 + 0.8 * (n / max(ns)), label=f"{stage}, N = {n}")
    for axis in axes[:2]:
        axis.set_xticks(ns)
    axes[2].xaxis.get_major_locator().set_params(integer=True)


def plot_dial(axis, by_n):
    """Accuracy against problems per second, a point for each N that was sampled in this run."""
    for n, f in by_n.items():
        if f["problems_per_second"] is not None:
            low, high = f["accuracy_ci95"]
            axis.vlines(f["problems_per_second"], low, high, color="tab:gray", alpha=0.5)
            axis.plot(f["problems_per_second"], f["accuracy"], "o", color="tab:gray")
            axis.annotate(f"N = {n}", (f["problems_per_second"], f["accuracy"]), fontsize=8,
                          xytext=(4, 4), textcoords="offset points")


def plot_training(axes, metrics):
    """The metrics of the training in three axes, with the budget of each N per problem."""
    steps = [m["step"] for m in metrics]
    for axis, keys in zip(axes, (["tokens_per_problem"], ["accuracy", "truncated"], ["entropy"])):
        for key in keys:
            axis.plot(steps, [m[key] for m in metrics], label=key.replace("_", " "))
        axis.set(title=f"training: {', '.join(keys).replace('_', ' ')}", xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for n, budget in sorted({(m["n"], m["budget"]) for m in metrics}):
        axes[0].axhline(budget / n, color="black", linestyle=":", label=f"budget / N, N = {n}")
    for axis in axes:
        axis.legend(fontsize=8)


# ----------------------------------------------------------------------------------------------
# Solving


def solve(s):
    """Answers the problems of a file, N in a prompt. Problems that the budget did not reach are asked again,
    in prompts of half as many, down to one.

    answers.jsonl has one line for each problem, in the order of the file: {id, answer (null: not reached),
    n, rounds, tokens (its share of all its completions), completion, correct (if the file has answers)}."""
    if len(s.n) > 1 or len(s.budget) > 1:
        raise UserError("--solve takes one value of --n and of --budget")
    problems, (extract, score) = load_problems(s.solve, answers=False), load_reward(s.reward)
    model, chat, about = load_model(s)
    problems = leave_out_long(model, chat, problems, s)
    if not s.reward:
        warn_of_golds(problems)
    out, started = distributed.open_out(s, "out/solve", [s.solve, s.reward]), time.time()
    say(f"{about}; {len(problems)} problems to solve; writing to {out}")
    entries = [{"id": p["id"], "answer": None, "n": 0, "rounds": 0, "tokens": 0.0, "completion": ""}
               for p in problems]
    waiting, size, rounds, tokens = list(range(len(problems))), s.n[0], 0, 0
    while waiting and size:
        rounds += 1
        groups = [[waiting[i] for i in group] for group, _ in in_order(len(waiting), size, s.budget[0])]
        records = sample_records(
            model, chat, [[problems[i] for i in group] for group in groups], 1, s.budget[0], s,
            out / f"evaluation/round-{rounds}.jsonl", f"round {rounds}, N = {size}")
        for group, record in zip(groups, records):
            tokens += record["tokens"]
            text, golds = record["completion"], [problems[i]["answer"] or "" for i in group]
            for i, answer, correct in zip(group, extract(text, len(group)), score(text, golds)):
                share = entries[i]["tokens"] + record["tokens"] / len(group)
                entries[i].update(answer=answer, n=len(group), rounds=rounds, tokens=share, completion=text)
                if problems[i]["answer"] is not None:
                    entries[i]["correct"] = float(correct)
        waiting = [i for i in waiting if entries[i]["answer"] is None]
        size //= 2
    marks, seconds = [e["correct"] for e in entries if "correct" in e], time.time() - started
    summary = {
        "problems": len(problems), "n": s.n[0], "budget": s.budget[0],
        "tokens_per_problem": tokens / len(problems), "problems_per_second": len(problems) / seconds,
        "seconds": seconds, "asked_again": sum(e["rounds"] > 1 for e in entries), "unanswered": len(waiting),
        "accuracy": np.mean(marks) if marks else None}
    if distributed.rank() == 0:
        write_lines(out / "answers.jsonl", entries)
        write_json(out / "results.json", summary)
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in summary.items()}
    say("\n" + " | ".join(rounded) + "\n" + " | ".join(str(v).rjust(len(k)) for k, v in rounded.items()))
    say(f"\nIn {out}: answers.jsonl, results.json")


# ----------------------------------------------------------------------------------------------
# Loading, and directories for output


def load_model(s, checkpointing=False, shard=False):
    """The model, its Chat, and a line about them, by the settings `model`, `device` and `dtype`."""
    device, dtype = distributed.find_device(s.device), s.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    device = distributed.start(device)
    try:
        if device != "cpu":
            torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
    except (RuntimeError, ValueError, AssertionError):
        raise UserError(f"--device {device} is not available: use cpu or one of the "
                        f"{torch.cuda.device_count()} GPUs that PyTorch sees") from None
    chat = load_chat(find_model(s.model))
    if shard and distributed.world_size() > 1:
        model = distributed.load_sharded(chat.path, getattr(torch, dtype), device)
    else:
        model = Transformer.from_pretrained(chat.path, getattr(torch, dtype), device)
    tokens, rows = chat.tokenizer.get_vocab_size(), model.config.vocab_size
    if max(chat.eos_ids) >= rows:
        raise UserError(f"{chat.path}: eos_token_id {max(chat.eos_ids)} is outside the model's vocabulary of "
                        f"{rows} tokens: correct config.json or generation_config.json")
    if tokens > rows:
        raise UserError(f"the tokenizer in {s.model} has {tokens} tokens, but the model only {rows}: the two "
                        "do not belong together")
    model.checkpointing = checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    several = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    about = f"{os.path.relpath(chat.path)}: {parameters / 1e6:.2f}M parameters, {dtype} on {device}{several}"
    return model, chat, about


def load_reward(path):
    """(extract_answers, score) of reward.py or, with a path, of the user's Python file, which needs
    score(completion, golds) and may have extract_answers(completion, n). Both are checked at every call."""
    if not path:
        return extract_answers, score
    try:
        loader = importlib.machinery.SourceFileLoader("user_reward", str(Path(path).resolve()))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("user_reward", loader))
        sys.modules["user_reward"] = module  # dataclasses and pickle look it up there
        sys.path.append(str(Path(path).resolve().parent))  # for helper modules next to the file
        loader.exec_module(module)
        user_score = module.score
    except (Exception, SystemExit) as error:  # anything the user's file does
        raise UserError(f"cannot use --reward {path}: {type(error).__name__}: {error}; expected a Python "
                        "file with a function score(completion, golds)") from None

    def call(name, function, *arguments):
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            raise UserError(f"{name} in --reward {path} fails: {type(error).__name__}: {error}") from None

    def checked_score(completion, golds):
        rewards = call("score", lambda: np.array(user_score(completion, list(golds)), dtype=float))
        if rewards.shape != (len(golds),) or not ((0 <= rewards) & (rewards <= 1)).all():
            raise UserError(f"score in --reward {path} should return {len(golds)} numbers from 0 to 1, one "
                            f"for each problem, not {rewards.tolist()}")
        return rewards

    def checked_extract(completion, n):
        answers = call("extract_answers", lambda: list(module.extract_answers(completion, n)))
        if len(answers) != n or not all(isinstance(answer, str | None) for answer in answers):
            raise UserError(f"extract_answers in --reward {path} should return {n} texts or None, one for "
                            f"each problem, not {answers}")
        return answers

    return checked_extract if hasattr(module, "extract_answers") else extract_answers, checked_score


def in_order(count, n, budget):
    """Problems 0..count-1 in groups of n, as pairs of a group and the budget."""
    return [(range(first, min(first + n, count)), budget) for first in range(0, count, n)]


# ----------------------------------------------------------------------------------------------
# Command line


def whole_numbers(text):
    """The type of flags such as `--n 2,4,8`: a tuple of integers above 0."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0, as in 4 or 2,4,8, not {text!r}")
    return tuple(map(int, text.split(",")))


def parse_flags(settings_class, description, argv=None):
    """The command line as an instance of a settings class. Raises UserError for an unknown flag or a value of
    the wrong type or out of range."""

    def refuse(message):
        raise UserError(message)

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = refuse
    for field in dataclasses.fields(settings_class):
        name, doc = "--" + field.name.replace("_", "-"), field.metadata["doc"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(name, action="store_true", help=doc)
            continue
        default = ",".join(map(str, field.default)) if field.type is tuple else str(field.default)
        if default.startswith("/"):
            default = os.path.relpath(default)
        parser.add_argument(
            name, type=whole_numbers if field.type is tuple else field.type, default=field.default,
            choices=field.metadata["choices"], help=doc + (f" (default: {default})" if default else ""))
    s = settings_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(settings_class):
        least, most, value = field.metadata["least"], field.metadata["most"], getattr(s, field.name)
        if least is not None and not least <= value <= most:  # false for nan
            flag_name = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{flag_name} should be at least {least} and at most {most}, not {value}")
    return s


def one_for_each(s, name, of):
    """Settings in which the tuple `name` has one number for each number of the tuple `of`."""
    values, count = getattr(s, name), len(getattr(s, of))
    if len(values) not in (1, count):
        flags = [f"--{key.replace('_', '-')}" for key in (name, of)]
        raise UserError(f"{flags[0]} should be one number, or one for each of the {count} of {flags[1]}")
    return dataclasses.replace(s, **{name: values * (count // len(values))})


def run(s):
    s = one_for_each(s, "budget", "n")
    benchmarks, (_, score) = load_benchmarks(s.data, s.problems), load_reward(s.reward)
    model, chat, about = load_model(s)
    benchmarks = fit_benchmarks(model, chat, benchmarks, s)
    for problems in benchmarks.values() if not s.reward else ():
        warn_of_golds(problems)
    out = distributed.open_out(s, "out/evaluation", [*s.data.split(","), s.reward])
    say(f"{about}; {sum(map(len, benchmarks.values()))} problems; writing to {out}")
    results, records = evaluate_all(model, chat, benchmarks, score, s, out, 0, "evaluation")
    write_completions(out / "completions.txt", benchmarks, records)
    if distributed.rank() == 0:
        write_json(out / "results.json", {"settings": dataclasses.asdict(s), "results": results})
        plot(out / "results.png", {"model": results}, s.within)
    say("\n" + table({"": results}, {}, s.within))
    for sentence in dial(results, s.target_accuracy) if s.target_accuracy else ():
        say("\n" + sentence)
    say(f"\nIn {out}: results.json, completions.txt, evaluation/")


def fit_benchmarks(model, chat, benchmarks, s):
    """The benchmarks with problems that fit at every N. Raises UserError for fewer than N, for a problem that
    does not fit, and for settings that do not fit together."""
    if s.within > min(s.budget):
        raise UserError(f"the accuracy within {s.within} tokens cannot be read off completions of at most "
                        f"{min(s.budget)} tokens: raise the budget of the evaluation")

    benchmarks = {name: leave_out_long(model, chat, problems, s)
                  for name, problems in benchmarks.items()}
    for problems in benchmarks.values():
        for n in s.n:
            evaluation_groups(problems, n, s.seed)  # raises UserError for fewer than n
    return benchmarks


def leave_out_long(model, chat, problems, s):
    """`data.chat.fitting_problems`, with a line about the problems that are left out."""
    sizes = list(zip(s.n, s.budget))
    positions = model.config.max_position_embeddings
    kept = fitting_problems(chat, problems, sizes, positions, s.skip_long)
    if len(kept) < len(problems):
        say(f"{len(problems) - len(kept)} of {len(problems)} problems are too long for the model's positions "
            "and are left out")
    return kept


def warn_of_golds(problems):
    if warning := doubtful_golds(problems):
        say(warning)


def main(argv=None):
    with distributed.readable_errors("evaluate.py"):
        s = parse_flags(EvaluationSettings, __doc__, argv)
        distributed.launch("evaluate.py", solve if s.solve else run, s, most=8)


if __name__ == "__main__":
    main()
