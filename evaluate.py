"""
Evaluation: accuracy and tokens per problem over N, and solving files of problems.

    python evaluate.py --model out/run-1/model --data FILE.jsonl --n 1,2,4,8
    python evaluate.py --model out/run-1/model --solve FILE.jsonl --n 4 --budget 300
    python evaluate.py --resume out/evaluation-1

bcr.py calls `evaluate_all` before and after training. Completions are sampled with a budget large
enough to avoid truncation; the accuracy within a smaller budget is read off the same completions.
"""

import dataclasses
import datetime
import json
import math
import os
import re
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
import reward
from data.chat import decode, encode_chat, fitting_problems, load_chat
from data.files import TINY, UserError, find_model, write_json, write_lines
from data.problems import (
    batch_prompt,
    doubtful_golds,
    evaluation_groups,
    load_benchmarks,
    load_problems,
)
from data.reports import dial, plot, table
from data.runs import open_out
from data.settings import flag, one_for_each, parse_flags
from distributed import say
from model import Transformer


@dataclass(frozen=True)
class EvaluationSettings:
    model: str = flag(
        str(TINY / "model"), "Hugging Face model: a directory, or a name on the Hub", group="task")
    template_options: str = flag("", 'JSON for the chat template: {"enable_thinking": false}')
    data: str = flag(str(TINY / "heldout.jsonl"), "JSONL files of problems, separated by commas")
    solve: str = flag("", "answer the problems of this JSONL file, with one --n and one --budget")
    n: tuple = flag((1, 2, 4, 8), "values of N, the number of problems in a prompt")
    budget: tuple = flag((1536,), "tokens for a whole completion: one number, or one for each N")
    within: int = flag(0, "also report the accuracy within this many tokens; 0 does not")
    problems: int = flag(512, "problems of each file, the same ones at each N", least=1)
    samples: int = flag(1, "completions of each prompt (k): the accuracy is avg@k", least=1)
    temperature: float = flag(1.0, "sampling temperature; 0 takes the most likely token")
    target_accuracy: float = flag(0.0, "name the fastest N that reaches this accuracy")
    reward: str = flag("", "Python file with score(completion, golds) -> N numbers from 0 to 1")
    out: str = flag(
        "", "output directory (default: the next free out/evaluation-1, ...)", group="run")
    resume: str = flag("", "directory of an evaluation to continue; what is finished stays")
    accept_changes: bool = flag(False, "resume although data, reward or model have changed")
    skip_long: bool = flag(False, "leave out problems that do not fit the model's positions")
    seed: int = flag(0, "seed of the groups and of every sampled token")
    date: str = flag("", "")  # of the start, for chat templates that write one; not a flag
    dtype: str = flag(
        "auto", "bfloat16 on cuda, else float32", choices=("auto", "float32", "bfloat16"))
    device: str = flag(
        "auto", "cpu, cuda, cuda:1, or auto: cuda if available", group="machine")
    rows: int = flag(256, "completions sampled at a time; lower it if memory runs out", least=1)
    processes: int = flag(0, "processes on a CPU; 0: one per core for a small model, at most 8")


# ----------------------------------------------------------------------------------------------
# Accuracy and tokens at one N

EVALUATION = 2**32  # evaluation draws from the random stream of step EVALUATION + N


def evaluate_all(model, chat, benchmarks, score, s, out, step, title):
    """Evaluates every benchmark at every N. benchmarks: {name: problems}.

    Returns ({name: {n: results}}, {name: {n: records}}), with n as text. A finished (benchmark, N)
    is a file in `out`/evaluation/, which a resumed run reads."""
    results = {}
    records = {}
    (out / "evaluation").mkdir(exist_ok=True)
    for name, problems in benchmarks.items():
        results[name] = {}
        records[name] = {}
        for n, budget in zip(s.n, s.budget):
            path = out / f"evaluation/{name}-n{n}-step{step}.jsonl"
            label = f"{title}, {name}, N = {n}"
            known = distributed.on_first(path.exists)
            clock = time.time()
            if known:
                found = read_records(path)
            else:
                found = evaluate(model, chat, problems, n, budget, score, s, label)
                distributed.on_first(write_lines, path, found)
            summary = summarize(found, n, s)
            # Of an evaluation that was finished before, the speed is unknown.
            speed = summary["problems"] * s.samples / (time.time() - clock)
            summary["problems_per_second"] = None if known else speed
            say(f"{label}: {summary['accuracy']:.1%} right, "
                f"{summary['tokens_per_problem']:.1f} tokens a problem")
            if summary["accuracy"] < 0.05 and not s.reward:
                say(f"warning: {why_nothing_is_right(found, problems)}")
            results[name][str(n)] = summary
            records[name][str(n)] = found
    return results, records


def evaluate(model, chat, problems, n, budget, score, s, title=""):
    """Answers all problems, N in a prompt. Returns a record of each completion, in the order
    (prompt, sample). Its lists of N marks have None for problems that only fill up the last
    prompt."""
    groups, counted = evaluation_groups(problems, n, s.seed)
    batch = [[problems[i] for i in group] for group in groups]  # (P, N)
    completions = sample_batch(model, chat, batch, s.samples, budget, s, title)
    records = []
    for row, completion in enumerate(completions):
        p = row // s.samples
        golds = [problem["answer"] for problem in batch[p]]
        text = decode(chat, [completion.tokens])[0]
        correct = score(text, golds)  # N marks
        within = correct
        if 0 < s.within < len(completion.tokens):
            # Sampling with that budget gives the same tokens, up to the cut.
            within = score(decode(chat, [completion.tokens[: s.within]])[0], golds)
        records.append({
            "prompt": p,
            "sample": row % s.samples,
            "problems": [problem["id"] for problem in batch[p]],
            "tokens": len(completion.tokens),
            "truncated": completion.truncated,
            "correct": marks_that_count(correct, counted[p]),
            "within": marks_that_count(within, counted[p]),
            "waits": count_waits(text),
            "completion": text})
    return records


def sample_batch(model, chat, batch, samples, budget, s, title):
    """Completions of each group of problems in `batch`, in the order (prompt, sample)."""
    prompts = [encode_chat(chat, batch_prompt(problems)) for problems in batch]
    return distributed.sample(
        model, prompts, samples, budget, title=title, eos_ids=chat.eos_ids,
        temperature=s.temperature, seed=s.seed, step=EVALUATION + len(batch[0]), max_rows=s.rows)


def marks_that_count(marks, counted):
    return [float(mark) if counts else None for mark, counts in zip(marks, counted)]


def count_waits(text):
    return len(re.findall(r"\bwait\b", text, re.IGNORECASE))


def read_records(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def summarize(records, n, s):
    """The results of one benchmark at one N, from its records."""
    correct = per_prompt(records, "correct")
    within = per_prompt(records, "within")
    marks = np.array([r["correct"] for r in records], dtype=float)  # (P k, N), NaN: does not count
    accuracy, accuracy_ci95 = mean_and_interval(correct)
    accuracy_within, accuracy_within_ci95 = mean_and_interval(within)
    return {
        "accuracy": accuracy,
        "accuracy_ci95": accuracy_ci95,
        "tokens_per_problem": np.mean([r["tokens"] for r in records]) / n,
        "waits_per_problem": np.mean([r["waits"] for r in records]) / n,
        "truncated": np.mean([r["truncated"] for r in records]),
        "within": s.within,
        "accuracy_within": accuracy_within,
        "accuracy_within_ci95": accuracy_within_ci95,
        "accuracy_by_position": np.nanmean(marks, axis=0).tolist(),
        "problems": int(np.isfinite(marks).sum()) // s.samples,
        "samples": s.samples}


def why_nothing_is_right(records, problems):
    """A sentence for an accuracy near 0: another form of answers, or none in the format."""
    golds = {problem["id"]: problem["answer"] for problem in problems}
    for r in records:
        answers = reward.extract_answers(r["completion"], len(r["problems"]))
        for i, answer in zip(r["problems"], answers):
            if answer is not None:
                return (f'nearly nothing is right. The first answer is "{answer[:200]}", its gold '
                        f'is "{golds[i][:200]}": compare how they are written')
    return ("nearly nothing is right, and no completion has an answer where the prompt asks for it "
            "(Answer i: \\boxed{...}): the format is not followed, or the budget is too small")


# ----------------------------------------------------------------------------------------------
# Means and intervals


def per_prompt(records, key):
    """The marks of each prompt, scaled so that their mean is that of all marks: (P,)."""
    prompts = records[-1]["prompt"] + 1
    marks = np.array([r[key] for r in records], dtype=float)
    share = np.isfinite(marks).sum() / prompts
    return np.nansum(marks.reshape(prompts, -1), axis=1) / share


def mean_and_interval(values, lowest=0.0):
    """The mean of a value per prompt, from `lowest` to 1, and its 95% interval. values: (P,).

    Prompts are independent; the N problems of a prompt and its k samples are not. The interval is
    that of the normal approximation after two imaginary prompts are added, one with each extreme
    value: if all values are equal, the truth may still be another. Source: the idea of Agresti and
    Coull (1998) for proportions and of Agresti and Min (2005) for pairs, whose values are from -1
    to 1. It is approximate: for fewer than about 20 prompts it is too wide."""
    padded = np.append(values, [lowest, 1.0])
    half = 1.96 * padded.std(ddof=1) / math.sqrt(len(padded))
    low = max(lowest, padded.mean() - half)
    high = min(1.0, padded.mean() + half)
    return values.mean(), [low, high]


def paired_change(before, after):
    """The change of the accuracy, with its interval, and the relative change of the tokens, from
    records of the same prompts before and after training."""
    difference = per_prompt(after, "correct") - per_prompt(before, "correct")  # (P,)
    accuracy, interval = mean_and_interval(difference, lowest=-1.0)
    tokens = sum(r["tokens"] for r in after) / sum(r["tokens"] for r in before)
    return {"accuracy": accuracy, "accuracy_ci95": interval, "tokens": tokens - 1}


# ----------------------------------------------------------------------------------------------
# Solving


def solve(s):
    """Answers the problems of a file, N in a prompt. Problems that the budget did not reach are
    asked again, in prompts of half as many, down to one.

    answers.jsonl has one line for each problem, in the order of the file: {id, answer (null: not
    reached), n, rounds, tokens (its share of all its completions), completion, correct (if the file
    has answers)}. A solving that is resumed starts over, and comes to the same answers."""
    if len(s.n) > 1 or len(s.budget) > 1:
        raise UserError("--solve takes one value of --n and of --budget")
    problems = load_problems(s.solve, answers=False)
    extract, score = load_reward(s.reward)
    model, chat, about = load_model(s)
    problems = leave_out_long(model, chat, problems, s)
    out = distributed.on_first(open_out, s, "out/solve")
    started = time.time()
    say(f"{about}; {len(problems)} problems to solve; writing to {out}")
    entries = [{"id": p["id"], "answer": None, "n": 0, "rounds": 0, "tokens": 0.0, "completion": ""}
               for p in problems]
    waiting = list(range(len(problems)))
    size = s.n[0]
    while waiting and size:
        groups = [waiting[i : i + size] for i in range(0, len(waiting), size)]
        batch = [[problems[i] for i in group] for group in groups]
        title = f"{len(waiting)} problems, N = {size}"
        completions = sample_batch(model, chat, batch, 1, s.budget[0], s, title)
        for group, completion in zip(groups, completions):
            text = decode(chat, [completion.tokens])[0]
            marks = score(text, [problems[i]["answer"] or "" for i in group])
            for i, answer, mark in zip(group, extract(text, len(group)), marks):
                entry = entries[i]
                entry["answer"] = answer
                entry["n"] = len(group)
                entry["rounds"] += 1
                entry["tokens"] += len(completion.tokens) / len(group)
                entry["completion"] = text
                if problems[i]["answer"] is not None:
                    entry["correct"] = float(mark)
        waiting = [i for i in waiting if entries[i]["answer"] is None]
        size //= 2
    report_answers(s, out, entries, time.time() - started)


def report_answers(s, out, entries, seconds):
    """answers.jsonl, results.json, and the same numbers on the screen."""
    marks = [entry["correct"] for entry in entries if "correct" in entry]
    summary = {
        "problems": len(entries),
        "n": s.n[0],
        "budget": s.budget[0],
        "tokens_per_problem": np.mean([entry["tokens"] for entry in entries]),
        "problems_per_second": len(entries) / seconds,
        "seconds": seconds,
        "asked_again": sum(entry["rounds"] > 1 for entry in entries),
        "unanswered": sum(entry["answer"] is None for entry in entries),
        "accuracy": np.mean(marks) if marks else None}
    if distributed.rank() == 0:
        write_lines(out / "answers.jsonl", entries)
        write_json(out / "results.json", summary)
    for key, value in summary.items():
        say(f"{key.replace('_', ' ')}: " + ("unknown" if value is None else f"{value:.5g}"))
    say(f"\nIn {out}: answers.jsonl, results.json")


# ----------------------------------------------------------------------------------------------
# Loading


def load_model(s, checkpointing=False, shard=False):
    """The model, its Chat, and a line about them, by the settings `model`, `device` and `dtype`."""
    device = distributed.start(s.device)
    dtype = s.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    date = datetime.datetime.fromisoformat(s.date) if s.date else None
    date = distributed.all_gather(date)[0]
    chat = load_chat(find_model(s.model), date, s.template_options)
    if shard and distributed.world_size() > 1:
        model = distributed.load_sharded(chat.path, getattr(torch, dtype), device)
    else:
        model = Transformer.from_pretrained(chat.path, getattr(torch, dtype), device)
    rows = model.config.vocab_size
    if max(chat.eos_ids) >= rows or chat.tokenizer.get_vocab_size() > rows:
        raise UserError(f"the tokenizer in {chat.path} has tokens beyond the {rows} of the model: "
                        "the two do not belong together")
    model.checkpointing = checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    about = f"{os.path.relpath(chat.path)}: {parameters / 1e6:.2f}M parameters, {dtype} on {device}"
    if distributed.world_size() > 1:
        about += f", {distributed.world_size()} processes"
    return model, chat, about


def load_reward(path):
    """(extract_answers, score) of reward.py or, with a path, of the user's Python file, which needs
    score(completion, golds) and may have extract_answers(completion, n)."""
    if not path:
        return reward.extract_answers, reward.score
    if not Path(path).is_file():
        raise UserError(f"--reward {path} is not a file")
    sys.path.append(str(Path(path).resolve().parent))  # for helper modules next to the file
    module = runpy.run_path(path)
    if "score" not in module:
        raise UserError(f"--reward {path} has no function score(completion, golds)")

    def score(completion, golds):
        marks = np.array(module["score"](completion, list(golds)), dtype=float)
        if marks.shape != (len(golds),) or not ((0 <= marks) & (marks <= 1)).all():
            raise UserError(f"score in --reward {path} should return {len(golds)} numbers from 0 "
                            f"to 1, one for each problem, not {marks.tolist()}")
        return marks

    return module.get("extract_answers", reward.extract_answers), score


def leave_out_long(model, chat, problems, s):
    """The problems of which any s.n fit the model's positions. Says how many do not, and with the
    built-in reward also which golds look as if no answer could match them."""
    positions = model.config.max_position_embeddings
    kept = fitting_problems(chat, problems, list(zip(s.n, s.budget)), positions, s.skip_long)
    if len(kept) < len(problems):
        say(f"{len(problems) - len(kept)} of {len(problems)} problems are too long for the model's "
            "positions and are left out")
    warning = None if s.reward else distributed.on_first(doubtful_golds, kept)
    if warning:
        say(warning)
    return kept


def fit_benchmarks(model, chat, benchmarks, s):
    """`leave_out_long` for each benchmark. Raises UserError also where fewer than N problems are
    left, or if s.within exceeds the budget."""
    if s.within > min(s.budget):
        raise UserError(
            f"the accuracy within {s.within} tokens cannot be read off completions of at most "
            f"{min(s.budget)} tokens: raise the budget of the evaluation")
    benchmarks = {name: leave_out_long(model, chat, problems, s)
                  for name, problems in benchmarks.items()}
    for problems in benchmarks.values():
        evaluation_groups(problems, max(s.n), s.seed)
    return benchmarks


# ----------------------------------------------------------------------------------------------
# The command


def run(s):
    benchmarks = load_benchmarks(s.data, s.problems)
    _, score = load_reward(s.reward)
    model, chat, about = load_model(s)
    benchmarks = fit_benchmarks(model, chat, benchmarks, s)
    out = distributed.on_first(open_out, s, "out/evaluation")
    say(f"{about}; {sum(map(len, benchmarks.values()))} problems; writing to {out}")
    results, _ = evaluate_all(model, chat, benchmarks, score, s, out, 0, "evaluation")
    if distributed.rank() == 0:
        write_json(out / "results.json", {"settings": dataclasses.asdict(s), "results": results})
        plot(out / "results.png", {"model": results}, s.within)
    say("\n" + table({"": results}, {}, s.within))
    for name, by_n in results.items():
        if s.target_accuracy:
            say("\n" + dial(name, by_n, s.target_accuracy))
    say(f"\nIn {out}: results.json, results.png, evaluation/ (every completion)")


def main(argv=None):
    with distributed.readable_errors("evaluate.py"):
        s = one_for_each(parse_flags(EvaluationSettings, __doc__, argv), "budget", "n")
        distributed.launch("evaluate.py", solve if s.solve else run, s, most=8)


if __name__ == "__main__":
    main()
