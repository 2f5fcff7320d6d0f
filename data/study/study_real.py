"""
Does BCR shorten a pretrained model that nobody taught to loop? SmolLM2-135M-Instruct, N = 3 against plain GRPO at N = 1.

    python tests/study_real.py          runs what is missing (an hour and a half or two on two cores), then the report
    python tests/study_real.py --report                    only the report, of what is there

The model (from a PyPI package, 4 bits a weight, see smollm2.py) is right about one time in six on problems of one
step with numbers below 10, and at N = 3 it does not follow the format. So it gets a warm-up in which nobody says a
word about length: it answers problems one by one, in its own way, as a user would ask them; what is right and ends by
itself is kept; on these, its own words, set in the format at N = 1, 2, 3, it is trained. Both arms start from there,
see as many problems, and are evaluated on the same held-out ones. What was stopped goes on where it was.

The report: report.txt, results.json, examples.txt.
"""

import argparse
import json
import os
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import bcr  # noqa: E402
import study  # noqa: E402

TRAIN, HELDOUT, OWN = 900, 192, 280  # problems to train on and to evaluate on; own right solutions for the warm-up
TEMPERATURE = 0.7  # of all sampling; at 1 this model is right at N = 3 only a quarter as often
STEPS, LR = 30, 2e-5
ARMS = {
    "warm": {},
    "bcr-n3": {"n": 3, "budget": 140, "groups": 2},  # after the warm-up three solutions take about 156 tokens
    "rl-n1": {"n": 1, "budget": 128, "groups": 6},  # which cuts hardly anyone
}


def make_problem(rng):
    """One step of arithmetic with numbers from 2 to 9, in words: {"problem", "answer"}."""
    who, thing = rng.choice(["Ann", "Ben", "Eva", "Tom", "Mia", "Sam"]), rng.choice(["pen", "apple", "card", "coin", "book"])
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    text, answer = rng.choice([
        (f"{who} has {a} {thing}s and buys {b} more. How many {thing}s does {who} have now?", a + b),
        (f"{who} finds {a} {thing}s in the morning and {b} {thing}s in the evening. How many {thing}s does {who} find in all?", a + b),
        (f"{who} has {a + b} {thing}s and gives away {b}. How many {thing}s does {who} have left?", a),
        (f"{who} has {a} boxes with {b} {thing}s in each box. How many {thing}s does {who} have in all?", a * b),
        (f"A {thing} costs {b} dollars. How many dollars do {a} {thing}s cost?", a * b)])
    return {"problem": text, "answer": str(answer)}


def make_problems(out):
    """Writes train.jsonl and heldout.jsonl, no problem in both."""
    rng, found = random.Random(7), {}
    while len(found) < TRAIN + HELDOUT:
        problem = make_problem(rng)
        found[problem["problem"]] = problem
    found = list(found.values())
    out.mkdir(parents=True, exist_ok=True)
    bcr.write_lines(out / "train.jsonl", found[:TRAIN])
    bcr.write_lines(out / "heldout.jsonl", found[TRAIN:])


# ----------------------------------------------------------------------------------------------
# The warm-up


def own_solutions(model, chat, problems, path, budget=64, count=64):
    """Samples problems, each alone and without any instruction, until OWN completions have ended by themselves with the
    right number. Each round is written to `path`; a run that was stopped goes on with the next."""
    kept = study.records_of(path) if path.exists() else []
    turn = kept[-1]["turn"] + 1 if kept else 0
    while len(kept) < OWN:
        chosen = [problems[i] for i in np.random.default_rng([1, turn]).permutation(len(problems))[:count]]
        rollout = bcr.generate(model, [bcr.encode_chat(chat, problem["problem"]) for problem in chosen], 4, budget,
                               eos_ids=chat.eos_ids, temperature=TEMPERATURE, seed=1, step=turn, prompt_keys=range(count))
        for row, (ids, length, cut) in enumerate(zip(rollout.tokens, rollout.lengths, rollout.truncated)):
            text, problem = bcr.decode(chat, [ids[:length].tolist()])[0].strip(), chosen[row // 4]
            if not cut and (re.findall(r"\d+", text) or [""])[-1] == problem["answer"]:
                kept.append(problem | {"solution": text, "tokens": int(length), "turn": turn})
        turn += 1
        bcr.write_lines(path, kept)
        print(f"own right solutions: {len(kept)} of {4 * count * turn} completions", flush=True)
    return kept


def in_format(solved):
    """The completion that bcr.batch_prompt asks for, made of solutions of single problems."""
    return "\n\n".join(f"### Problem {i}\n{one['solution']}\nAnswer {i}: \\boxed{{{one['answer']}}}" for i, one in enumerate(solved, start=1))


def warm_up(model, chat, own, out, steps=20, lr=5e-5):
    """Trains on own solutions in the format at N = 1, 2, 3, two prompts of each a step, and writes the model. The
    gradient of the log-likelihood is a policy gradient whose advantage is 1 everywhere: bcr.py's own pass computes it."""
    eos = chat.tokenizer.token_to_id(chat.special["eos_token"])
    parameters, s, rng = list(model.parameters()), bcr.Settings(), np.random.default_rng(2)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step in range(1, steps + 1):
        prompts, completions, clock = [], [], time.time()
        for n in (1, 1, 2, 2, 3, 3):
            chosen = [own[i] for i in rng.choice(len(own), n, replace=False)]
            prompts.append(bcr.encode_chat(chat, bcr.batch_prompt([one["problem"] for one in chosen])))
            completions.append(chat.tokenizer.encode(in_format(chosen), add_special_tokens=False).ids + [eos])
        tokens = sum(map(len, completions))
        # Its second result sums |logprob - what the sampler said|: of zeros, the negative log-likelihood.
        _, nats, _ = bcr.accumulate_gradient(model, parameters, prompts, list(range(6)), completions, [torch.zeros(len(c)) for c in completions],
                                             [1.0] * 6, constant=tokens, s=s)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"warm-up step {step}/{steps}: {nats / tokens:.3f} nats a token, {time.time() - clock:.0f} s", flush=True)
    bcr.write_model(out, model, chat.path)


def prepare(out):
    """Problems, own solutions and the model after the warm-up, as far as they are missing."""
    import smollm2

    if not (out / "heldout.jsonl").exists():
        make_problems(out)
    if not (out / "warm/tokenizer_config.json").exists():
        try:
            model, chat, _ = bcr.load(bcr.Settings(model=str(smollm2.smollm2_directory())))
        except smollm2.Unreachable as reason:
            raise SystemExit(f"SmolLM2-135M-Instruct is not to be had: {reason}") from None
        warm_up(model, chat, own_solutions(model, chat, bcr.load_problems(out / "train.jsonl"), out / "own.jsonl"), out / "warm")


# ----------------------------------------------------------------------------------------------
# The arms


def one_run(out, name, seed):
    """Trains and evaluates one arm with one seed, each by bcr.py in a directory of its own."""
    clock, model = time.time(), out / "warm"
    common = {"data": out / "train.jsonl", "eval_data": out / "heldout.jsonl", "eval_temperature": TEMPERATURE, "seed": seed}
    if ARMS[name]:
        study.bcr_run(out / f"{name}-seed{seed}", model=model, **common, **ARMS[name], temperature=TEMPERATURE, samples=8, steps=STEPS, lr=LR,
                      eval_n=1, eval_budget=128, eval_problems=1, micro_tokens=1024, save_every=5)
        model = out / f"{name}-seed{seed}/model"
    study.bcr_run(out / f"{name}-seed{seed}-evaluated", model=model, **common, steps=0, eval_n="1,3", eval_budget="128,384",
                  eval_problems=HELDOUT, budget=ARMS["bcr-n3"]["budget"])
    return f"{name}, seed {seed}: {time.time() - clock:.0f} s"


def anatomy(records, golds):
    """What a solution at N = 1 consists of, means over problems: whether it has its heading; then, heading and Answer
    line left out, its words, equations, and how often it says the right answer (more than once is a restatement)."""
    counts = []
    for record in records:
        heading, text = re.match(r"(### Problem \d+\n)?(.*)", record["completion"], re.DOTALL).groups()
        work = re.split(r"^Answer", text, flags=re.MULTILINE)[0]
        counts.append((heading is not None, len(work.split()), work.count("="), len(re.findall(rf"\b{golds[record['problems'][0]]}\b", work))))
    return dict(zip(("headed", "words", "equations", "answer_said"), np.mean(counts, axis=0).tolist()))


def report(out, seeds):
    rows, found = [], {}
    golds = {problem["id"]: problem["answer"] for problem in bcr.load_problems(out / "heldout.jsonl")}
    for name in ARMS:
        for seed in seeds:
            path = out / f"{name}-seed{seed}-evaluated"
            if not (path / "results.json").exists() or "seconds" not in (results := bcr.read_json(path / "results.json")):
                continue
            by_n = results["before"]["heldout"]
            records = {n: study.records_of(path / f"evaluation/heldout-n{n}-step0.jsonl") for n in (1, 3)}
            parts = anatomy(records[1], golds)
            found.setdefault(name, {})[seed] = {"by_n": by_n, "anatomy": parts}
            row = [name, str(seed)]
            for n in ("1", "3"):
                tokens = np.array([record["tokens"] for record in records[int(n)]]) / int(n)
                of_n = by_n[n]
                half = 1.96 * tokens.std(ddof=1) / len(tokens) ** 0.5  # prompts are independent
                row += [f"{tokens.mean():.1f} ±{half:.1f}", "{:.1f} ({:.1f} to {:.1f})".format(100 * of_n["accuracy"], *(100 * x for x in of_n["accuracy_ci95"]))]
            row += [f"{100 * by_n['3']['accuracy_in_budget']:.1f}", *(f"{parts[key]:.2f}" for key in parts)]
            row += [f"{np.mean([record['tokens'] for record in records[1] if record['correct'][0] == right]):.1f}" for right in (1, 0)]
            rows.append(row)
            if ARMS[name]:
                found[name][seed]["training"] = study.records_of(out / f"{name}-seed{seed}/metrics.jsonl")
    text = study.markdown(["arm", "seed", "tokens, N=1", "right %, N=1", "tokens, N=3", "right %, N=3", f"in {ARMS['bcr-n3']['budget']} tokens",
                           "with heading", "words", "equations", "answer said", "tokens of the right, N=1", "of the wrong"], rows)
    for name, of_arm in found.items():
        for seed, figures in of_arm.items():
            for key, digits in (("tokens_per_problem", 0), ("accuracy", 2)) if "training" in figures else ():
                values = [m[key] for m in figures["training"]]
                text += f"\n\n{name}, seed {seed}, {key}, means of five steps: " + ", ".join(
                    f"{np.mean(values[i:i + 5]):.{digits}f}" for i in range(0, len(values), 5))
    print(text)
    bcr.write_text(out / "report.txt", text + "\n")
    bcr.write_json(out / "results.json", found)
    study.examples(out, tuple(ARMS), 12, out / "heldout.jsonl")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=REPO / "out/study-real", help="directory of the study (default: out/study-real)")
    options.add_argument("--seeds", type=int, default=2, help="seeds of each arm")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--report", action="store_true", help="run nothing")
    o = options.parse_args()
    if not o.report:
        clock = time.time()
        prepare(o.out)
        print(f"problems and warm-up: {time.time() - clock:.0f} s", flush=True)
        with ThreadPoolExecutor(o.jobs) as pool:
            for job in [pool.submit(one_run, o.out, name, seed) for seed in range(o.seeds) for name in ("bcr-n3", "rl-n1", "warm")]:
                print(job.result(), flush=True)
    report(o.out, range(o.seeds))


if __name__ == "__main__":
    main()
