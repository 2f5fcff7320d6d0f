"""
Does BCR shorten a pretrained model that was not trained to loop? SmolLM2-135M-Instruct, BCR at N = 3 against
plain GRPO at N = 1.

    python data/study/study_real.py             all missing runs (about 100 minutes), then the report
    python data/study/study_real.py --report    only the report

The model (4 bits per weight, see smollm2.py) solves about one in six problems of one step with numbers below
10, and does not follow the format at N = 3. So it gets a warm-up without any pressure on length: it answers
problems one by one, as a user would ask them, and is then trained on its own correct solutions, written in
the format at N = 1, 2, 3. Both arms start from there, see the same number of problems, and are evaluated on
the same held-out ones. Runs that were stopped are resumed.

The report: report.txt, results.json, examples.txt.
"""

import argparse
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import bcr  # noqa: E402
from data.chat import copy_tokenizer, decode, encode_chat  # noqa: E402
from data.files import read_json, write_json, write_lines, write_text  # noqa: E402
from data.problems import answer_section, batch_prompt, load_problems  # noqa: E402
from data.study import smollm2, study  # noqa: E402
from evaluate import EvaluationSettings, load_model  # noqa: E402
from rollout import generate  # noqa: E402

TRAIN, HELDOUT, OWN = 900, 192, 280  # problems to train and to evaluate on; own solutions for the warm-up
TEMPERATURE = 0.7  # of all sampling; at 1 this model is right at N = 3 only a quarter as often
STEPS, LR = 30, 2e-5
ARMS = {
    "warm": {},
    "bcr-n3": {"n": 3, "budget": 140, "groups": 2},  # after the warm-up three solutions take about 156 tokens
    "rl-n1": {"n": 1, "budget": 128, "groups": 6},  # a budget that truncates almost nothing
}


def make_problem(rng):
    """One step of arithmetic with numbers from 2 to 9, in words: {"problem", "answer"}."""
    who = rng.choice(["Ann", "Ben", "Eva", "Tom", "Mia", "Sam"])
    thing = rng.choice(["pen", "apple", "card", "coin", "book"])
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    text, answer = rng.choice([
        (f"{who} has {a} {thing}s and buys {b} more. How many {thing}s does {who} have now?", a + b),
        (f"{who} finds {a} {thing}s in the morning and {b} {thing}s in the evening. "
         f"How many {thing}s does {who} find in all?", a + b),
        (f"{who} has {a + b} {thing}s and gives away {b}. How many {thing}s does {who} have left?", a),
        (f"{who} has {a} boxes with {b} {thing}s in each box. "
         f"How many {thing}s does {who} have in all?", a * b),
        (f"A {thing} costs {b} dollars. How many dollars do {a} {thing}s cost?", a * b)])
    return {"problem": text, "answer": str(answer)}


def make_problems(out):
    """Writes train.jsonl and heldout.jsonl, with no problem in both."""
    rng, found = random.Random(7), {}
    while len(found) < TRAIN + HELDOUT:
        problem = make_problem(rng)
        found[problem["problem"]] = problem
    found = list(found.values())
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "train.jsonl", found[:TRAIN])
    write_lines(out / "heldout.jsonl", found[TRAIN:])


# ----------------------------------------------------------------------------------------------
# The warm-up


def own_solutions(model, chat, problems, path, budget=64, count=64):
    """Samples problems, each alone and without instructions, until OWN completions have ended by themselves
    with the correct number. Each round is written to `path`, and a run that was stopped continues there."""
    kept = study.records_of(path) if path.exists() else []
    turn = kept[-1]["turn"] + 1 if kept else 0
    while len(kept) < OWN:
        chosen = [problems[i] for i in np.random.default_rng([1, turn]).permutation(len(problems))[:count]]
        prompts = [encode_chat(chat, problem["problem"]) for problem in chosen]
        completions = generate(model, prompts, 4, budget, eos_ids=chat.eos_ids, temperature=TEMPERATURE,
                               seed=1, step=turn)
        for row, completion in enumerate(completions):
            text, problem = decode(chat, [completion.tokens])[0].strip(), chosen[row // 4]
            if not completion.truncated and (re.findall(r"\d+", text) or [""])[-1] == problem["answer"]:
                kept.append(problem | {"solution": text, "tokens": len(completion.tokens), "turn": turn})
        turn += 1
        write_lines(path, kept)
        print(f"own correct solutions: {len(kept)} of {4 * count * turn} completions", flush=True)
    return kept


def in_format(solved):
    """The completion that `batch_prompt` asks for, made of solutions of single problems."""
    return "\n\n".join(answer_section(i, one["solution"] + "\n", one["answer"])
                       for i, one in enumerate(solved, start=1))


def warm_up(model, chat, own, out, steps=20, lr=5e-5):
    """Trains on own solutions in the format, with two prompts at each of N = 1, 2, 3 per step, and writes the
    model. The gradient of the log-likelihood is a policy gradient whose advantage is 1 everywhere."""
    eos = chat.tokenizer.token_to_id(chat.special["eos_token"])
    parameters, rng = list(model.parameters()), np.random.default_rng(2)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step in range(1, steps + 1):
        rows, clock = [], time.time()
        for n in (1, 1, 2, 2, 3, 3):
            chosen = [own[i] for i in rng.choice(len(own), n, replace=False)]
            tokens = chat.tokenizer.encode(in_format(chosen), add_special_tokens=False).ids + [eos]
            rows.append(bcr.Row(encode_chat(chat, batch_prompt(chosen)), tokens, torch.zeros(len(tokens)),
                                np.ones(len(tokens))))
        count = sum(len(row.tokens) for row in rows)
        # The sampler's logprobs are 0 here, so the gap to them is the negative log-likelihood.
        stats = bcr.accumulate_gradient(model, parameters, rows, count, bcr.Settings())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"warm-up step {step}/{steps}: {stats['gap'] / count:.3f} nats per token, "
              f"{time.time() - clock:.0f} s", flush=True)
    model.save_pretrained(out)
    copy_tokenizer(chat.path, out)


def prepare(out):
    """Writes what is missing of the problems, the own solutions and the model after the warm-up."""
    if not (out / "heldout.jsonl").exists():
        make_problems(out)
    if not (out / "warm/tokenizer_config.json").exists():
        try:
            model, chat, _ = load_model(EvaluationSettings(model=str(smollm2.smollm2_directory())))
        except smollm2.Unreachable as reason:
            raise SystemExit(f"SmolLM2-135M-Instruct is not available: {reason}") from None
        own = own_solutions(model, chat, load_problems(out / "train.jsonl"), out / "own.jsonl")
        warm_up(model, chat, own, out / "warm")


# ----------------------------------------------------------------------------------------------
# The arms


def one_run(out, name, seed):
    """Trains one arm with one seed by bcr.py and evaluates it by evaluate.py, each in its own directory."""
    clock, model, run = time.time(), out / "warm", out / f"{name}-seed{seed}"
    if ARMS[name]:
        study.run_program(
            "bcr.py", run, **ARMS[name], model=model, data=out / "train.jsonl", samples=8, steps=STEPS, lr=LR,
            temperature=TEMPERATURE, seed=seed, micro_tokens=1024, save_every=5, eval_n=1, eval_budget=128,
            eval_data=out / "heldout.jsonl", eval_problems=1, eval_temperature=TEMPERATURE)
        model = run / "model"
    study.run_program(
        "evaluate.py", out / f"{run.name}-evaluated", model=model, data=out / "heldout.jsonl", n="1,3",
        budget="128,384", within=ARMS["bcr-n3"]["budget"], problems=HELDOUT, temperature=TEMPERATURE,
        seed=seed)
    return f"{name}, seed {seed}: {time.time() - clock:.0f} s"


def anatomy(records, golds):
    """What a solution at N = 1 consists of, as means over problems: whether it has its heading; then, without
    heading and answer, its words, its equations, and how often it gives the correct answer."""
    counts = []
    for record in records:
        heading, text = re.match(r"(### Problem \d+\n)?(.*)", record["completion"], re.DOTALL).groups()
        work, gold = re.split(r"^Answer", text, flags=re.MULTILINE)[0], golds[record["problems"][0]]
        counts.append((heading is not None, len(work.split()), work.count("="),
                       len(re.findall(rf"\b{gold}\b", work))))
    return dict(zip(("headed", "words", "equations", "answer_said"), np.mean(counts, axis=0).tolist()))


def collect(out, seeds):
    """Rows of the report and figures of the runs that have finished: ([row], {arm: {seed: figures}})."""
    rows, found = [], {}
    golds = {problem["id"]: problem["answer"] for problem in load_problems(out / "heldout.jsonl")}
    for name, seed in [(name, seed) for name in ARMS for seed in seeds]:
        run, path = out / f"{name}-seed{seed}", out / f"{name}-seed{seed}-evaluated"
        if not (path / "results.json").exists():
            continue
        by_n, row = read_json(path / "results.json")["results"]["heldout"], [name, str(seed)]
        records = {n: study.records_of(path / f"evaluation/heldout-n{n}-step0.jsonl") for n in by_n}
        for n, of_n in by_n.items():
            tokens = np.array([record["tokens"] for record in records[n]]) / int(n)
            half = 1.96 * tokens.std(ddof=1) / len(tokens) ** 0.5  # prompts are independent
            low, high = of_n["accuracy_ci95"]
            row += [f"{tokens.mean():.1f} ±{half:.1f}",
                    f"{100 * of_n['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"]
        parts = anatomy(records["1"], golds)
        row += [f"{100 * by_n['3']['accuracy_in_budget']:.1f}", *(f"{part:.2f}" for part in parts.values())]
        for mark in (1, 0):
            row.append(f"{np.mean([r['tokens'] for r in records['1'] if r['correct'][0] == mark]):.1f}")
        rows.append(row)
        found.setdefault(name, {})[seed] = {"by_n": by_n, "anatomy": parts}
        if ARMS[name]:
            found[name][seed]["training"] = study.records_of(run / "metrics.jsonl")
    return rows, found


def report(out, seeds):
    rows, found = collect(out, seeds)
    text = study.markdown(
        ["arm", "seed", "tokens, N=1", "right %, N=1", "tokens, N=3", "right %, N=3",
         f"in {ARMS['bcr-n3']['budget']} tokens", "with heading", "words", "equations", "answer said",
         "tokens of the right, N=1", "of the wrong"], rows)
    runs = [(name, seed, figures) for name, of_arm in found.items() for seed, figures in of_arm.items()]
    for name, seed, figures in runs:
        for key, digits in (("tokens_per_problem", 0), ("accuracy", 2)) if "training" in figures else ():
            values = [m[key] for m in figures["training"]]
            means = [f"{np.mean(values[i : i + 5]):.{digits}f}" for i in range(0, len(values), 5)]
            text += f"\n\n{name}, seed {seed}, {key}, means of five steps: {', '.join(means)}"
    print(text)
    write_text(out / "report.txt", text + "\n")
    write_json(out / "results.json", found)
    study.examples(out, tuple(ARMS), 12, out / "heldout.jsonl")


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=REPO / "out/study-real", help="default: out/study-real")
    options.add_argument("--seeds", type=int, default=2, help="seeds of each arm")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options.add_argument("--report", action="store_true", help="only write the report")
    o = options.parse_args()
    if not o.report:
        clock = time.time()
        prepare(o.out)
        print(f"problems and warm-up: {time.time() - clock:.0f} s", flush=True)
        with ThreadPoolExecutor(o.jobs) as pool:
            for job in [pool.submit(one_run, o.out, name, seed) for seed in range(o.seeds) for name in ARMS]:
                print(job.result(), flush=True)
    report(o.out, range(o.seeds))


if __name__ == "__main__":
    main()
