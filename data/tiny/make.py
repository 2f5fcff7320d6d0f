"""
The tiny world: small arithmetic problems, worked solutions that check themselves far too often, and
a small model trained on them.

    python -m data.tiny.make                 makes the problems, tokenizer.json and the weights from
                                             a seed (about 35 minutes on two cores)
    python -m data.tiny.make --measure       measures the shipped base model (see `measure`)

What makes the world a fair test of BCR is explained at `write_solution`: checks find mistakes and
hurry makes them, so a method that rewards correctness alone has no reason to shorten solutions.
"""

import argparse
import itertools
import random
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence

import distributed
from data.chat import decode, encode_chat, load_chat
from data.files import read_json, write_lines
from data.problems import answer_section, batch_prompt, load_problems
from model import Config, Transformer
from reward import score
from rollout import generate

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
KINDS = ("sum", "story", "fraction")
STEPS = {1: 6, 2: 6, 3: 6, 4: 6, 5: 4, 6: 4, 7: 3, 8: 3}  # the difficulty, in operations: weight
LARGEST = 20  # running totals are in 0..LARGEST
OPERAND = 9  # operands are in 1..OPERAND

# ----------------------------------------------------------------------------------------------
# Problems: a start, then a chain of + and -


def make_problem(rng):
    """A problem {"problem", "answer", "difficulty", "kind"} with its hidden "chain": (start,
    [(sign, operand), ...], denominator or None). The operands of a chain differ, so the step after
    `+ 5` can be found by looking for the 5."""
    kind = rng.choice(KINDS)
    steps = rng.choices(list(STEPS), STEPS.values())[0]
    start = rng.randint(1, LARGEST)
    total = start
    chain = []
    for operand in rng.sample(range(1, OPERAND + 1), steps):
        sign = rng.choice([sign for sign in (1, -1) if 0 <= total + sign * operand <= LARGEST])
        chain.append((sign, operand))
        total += sign * operand
    denominator = None
    if kind == "sum":
        text = f"What is {expression(start, chain)}?"
    elif kind == "story":
        text = story(rng, start, chain)
    else:
        denominator = rng.choice((3, 4, 5, 6, 7, 8, 9))
        text = f"What is {expression(start, chain, f'/{denominator}')}?"
    value = Fraction(total, denominator or 1)
    answer = answer_text(value.numerator, value.denominator)
    return {"problem": text, "answer": answer, "difficulty": steps, "kind": kind,
            "chain": (start, chain, denominator)}


def story(rng, start, chain):
    who = rng.choice(("Ann", "Ben", "Eva", "Tom"))
    thing = rng.choice(("pens", "nuts", "cards", "coins"))
    verbs = {1: ("gets", "finds"), -1: ("loses", "sells")}
    moves = ", ".join(f"{rng.choice(verbs[sign])} {operand}" for sign, operand in chain)
    return f"{who} has {start} {thing}, {moves}. How many {thing} are left?"


def expression(start, chain, after=""):
    moves = [f" {'+' if sign > 0 else '-'} {operand}{after}" for sign, operand in chain]
    return f"{start}{after}" + "".join(moves)


def answer_text(total, denominator):
    return f"{total}" if denominator in (None, 1) else f"\\frac{{{total}}}{{{denominator}}}"


def new_problem(rng, known):
    """A problem whose text is not in the set `known`."""
    while (problem := make_problem(rng))["problem"] in known:
        pass
    return problem


def make_problems(rng, count, known, source):
    """`count` problems that differ from each other and from the set `known`, which they join."""
    problems = []
    for number in range(count):
        problem = new_problem(rng, known)
        known.add(problem["problem"])
        del problem["chain"]
        problems.append({"id": f"tiny/{source}/{number}", **problem})
    return problems


# ----------------------------------------------------------------------------------------------
# Solutions, as the base model learns to write them


def write_solution(rng, problem, verbose, direct=0.004, slip=0.008, hurry=0.12, redo=0.3):
    """One worked solution: (work, answer), where `work` is what precedes the answer's line.

    A verbose solution may restate the problem, checks each step 0, 1 or 2 times, and may repeat the
    complete chain. A concise one only has the steps.

    Steps can be wrong in two ways. A share `slip` of them is a slip; the first check that follows
    finds and corrects it. And a share `hurry` of the solutions joins two or three steps in one and
    does not check it. That is written correctly, but the model cannot always compute it. So checks
    have a purpose, a long solution is right at least as often as a short one, and brevity has a
    price. A share `direct` has no steps: a method that rewards shortness alone can exploit them."""
    start, chain, denominator = problem["chain"]
    if len(chain) > 1 and rng.random() < direct:
        return "", answer_text(value_of(start, chain), denominator)
    parts = []
    if verbose and rng.random() < 0.4:
        parts.append(f"We need {expression(start, chain)}.")
    steps = [[move] for move in chain]
    if len(chain) > 1 and rng.random() < hurry:
        steps = join_moves(rng, chain)
    total = start
    for moves in steps:
        before = total
        right = value_of(before, moves)
        total = right
        if rng.random() < slip:
            near = (right - 2, right - 1, right + 1, right + 2)
            total = rng.choice([value for value in near if value >= min(0, right)])
        parts.append(f"{expression(before, moves)} = {total}.")
        if verbose and len(moves) == 1:
            for _ in range(rng.choices((0, 1, 2), (0.2, 0.45, 0.35))[0]):
                parts.append(check(rng, before, moves[0], total, right))
                total = right
    if verbose and rng.random() < redo:
        parts.append("Wait, let me do it again.")
        total = start
        for move in chain:
            before = total
            total = value_of(before, [move])
            parts.append(f"{expression(before, [move])} = {total}.")
    return " ".join(parts) + "\n", answer_text(total, denominator)


def value_of(start, moves):
    return start + sum(sign * operand for sign, operand in moves)


def join_moves(rng, chain):
    """The chain as a list of steps, of which one has two or three moves and the others have one."""
    size = min(rng.choice((2, 2, 2, 3)), len(chain))
    first = rng.randint(0, len(chain) - size)
    single = [[move] for move in chain]
    return single[:first] + [chain[first : first + size]] + single[first + size:]


def check(rng, before, move, total, right):
    """A check of the step from `before` to `total`, which corrects it if it is not `right`."""
    sign, operand = move
    back = total - sign * operand
    again = f"{expression(before, [move])} = {right}"
    if rng.random() < 0.6 and back >= 0:
        found = "ok." if total == right else f"not {before}. So {again}."
        return f"Wait, check: {expression(total, [(-sign, operand)])} = {back}, {found}"
    found = "yes." if total == right else f"so no, it is {right}."
    return f"Wait, is it {total}? {again}, {found}"


def write_completion(rng, problems, hurry=0.12):
    """The completion for a prompt with these problems, in the format that the prompt asks for. All
    its solutions have one style: concise in a share of 20%, else verbose."""
    verbose = rng.random() < 0.8
    solutions = [write_solution(rng, problem, verbose, hurry=hurry) for problem in problems]
    sections = [answer_section(i, *solution) for i, solution in enumerate(solutions, start=1)]
    return "\n\n".join(sections)


# ----------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(rng):
    """Byte-level BPE on the world's own text. Numbers, words and line breaks are split first, so
    that each number is one token, and so is each word with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n+| ?\d+| ?[^\d\s]+|\s+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{space}{number}" for number in range(100) for space in ("", " ")] * 2000
    for _ in range(4000):
        problems = [make_problem(rng) for _ in range(rng.choice((1, 2, 4, 8)))]
        texts += [batch_prompt(problems), write_completion(rng, problems)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=576, special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


# ----------------------------------------------------------------------------------------------
# Pretraining

# N and its weight
MIXED = {1: 0.25, 2: 0.15, 3: 0.1, 4: 0.17, 5: 0.05, 6: 0.08, 8: 0.12, 10: 0.04, 12: 0.04}
# Two rounds: (peak of the learning rate, two parts). A part: (optimizer steps, N and its weight,
# share of hurried solutions). The learning rate is at its peak in the first part and falls linearly
# to 0 in the second. Joined steps are rare and hard, so the first parts have more of them. Single
# problems teach the steps fastest.
ROUNDS = ((3e-3, ((1500, {1: 1.0}, 0.5), (5500, MIXED, 0.12))),
          (1e-3, ((400, MIXED, 0.5), (400, MIXED, 0.12))))
TOKENS_A_BATCH = 2048  # of each process, with prompts and padding
PROCESSES = 2  # a fixed number: another one sees other documents


def batches(rng, chat, heldout, ns, hurry):
    """Endless batches of about TOKENS_A_BATCH tokens: tokens (B, T), and a mask (B, T) of those to
    predict. No problem is in `heldout`. Completions of similar length share a batch, so that little
    is padding."""
    while True:
        pool = []
        for n in rng.choices(list(ns), ns.values(), k=2048):
            problems = [new_problem(rng, heldout) for _ in range(n)]
            completion = write_completion(rng, problems, hurry) + "<|end|>"
            encoding = chat.tokenizer.encode(completion, add_special_tokens=False)
            pool.append((encode_chat(chat, batch_prompt(problems)), encoding.ids))
        pool.sort(key=lambda document: len(document[0]) + len(document[1]))
        cut = []
        groups = []
        for prompt, completion in pool:
            cut.append((prompt, completion))
            if len(cut) * (len(prompt) + len(completion)) >= TOKENS_A_BATCH:
                groups.append(cut)
                cut = []
        rng.shuffle(groups)
        for group in groups:
            tokens = [torch.tensor(prompt + completion) for prompt, completion in group]
            masks = [torch.tensor([False] * len(prompt) + [True] * len(completion))
                     for prompt, completion in group]
            yield pad_sequence(tokens, batch_first=True), pad_sequence(masks, batch_first=True)


def optimizers_of(model, peak):
    """Muon for the matrices, which learns this world in less than half of AdamW's tokens, and AdamW
    for the embedding and the norms. Source: Muon, kellerjordan.github.io/posts/muon."""
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() < 2 or p is embedding]
    return (torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.05))


def pretrain(s):
    """The model learns to predict the completions. Each process has documents of its own."""
    torch.manual_seed(s.seed)
    model = Transformer(Config.from_hf(read_json(MODEL / "config.json")))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    distributed.start("cpu")
    rng = random.Random(f"{s.seed} documents {distributed.rank()}")
    for peak, parts in ROUNDS:
        pretrain_round(model, rng, peak, parts)
        if distributed.rank() == 0:
            model.save_pretrained(MODEL)


def pretrain_round(model, rng, peak, parts):
    chat = load_chat(MODEL)
    heldout = frozenset(problem["problem"] for problem in load_problems(HERE / "heldout.jsonl"))
    optimizers = optimizers_of(model, peak)
    sources = [itertools.islice(batches(rng, chat, heldout, ns, hurry), count)
               for count, ns, hurry in parts]
    total = sum(count for count, _, _ in parts)
    falling = parts[1][0]
    for count, (tokens, mask) in enumerate(itertools.chain(*sources), start=1):  # (B, T)
        targets = mask[:, 1:]
        logits = model.head(model.hidden(tokens[:, :-1])[targets])  # (predicted tokens, V)
        loss = F.cross_entropy(logits, tokens[:, 1:][targets])
        model.zero_grad()
        (loss / distributed.world_size()).backward()
        distributed.sum_over_processes([parameter.grad for parameter in model.parameters()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = peak * min(1, count / 50, (total - count) / falling)
            optimizer.step()
        if count % 100 == 0:
            distributed.say(f"batch {count} of {total}: loss {loss.item():.4f}")


def make(seed):
    known = set()
    for name, count in (("heldout", 2000), ("train", 6000)):
        problems = make_problems(random.Random(f"{seed} {name}"), count, known, name)
        write_lines(HERE / f"{name}.jsonl", problems)
    tokenizer = train_tokenizer(random.Random(f"{seed} tokenizer"))
    tokenizer.save(str(MODEL / "tokenizer.json"))
    distributed.launch("make.py", pretrain, argparse.Namespace(
        seed=seed, model=str(MODEL), device="cpu", processes=PROCESSES), most=PROCESSES)


def measure(path, count=2000):
    """Prints what decides whether a model of this world is a fair test, at temperature 1 and
    without truncation: is it accurate at each N and position? Are long solutions right as often as
    short ones (else plain GRPO would shorten them)? Do joined steps cost accuracy?"""
    model = Transformer.from_pretrained(path)
    chat = load_chat(path)
    problems = load_problems(HERE / "heldout.jsonl")[:count]
    for n in (8, 4, 2, 1):
        groups = [problems[i : i + n] for i in range(0, len(problems) // n * n, n)]
        prompts = [encode_chat(chat, batch_prompt(group)) for group in groups]
        completions = generate(model, prompts, 1, 1536, eos_ids=chat.eos_ids, seed=1)
        texts = decode(chat, [c.tokens for c in completions])
        lengths = np.array([len(c.tokens) for c in completions])  # (P,)
        right = np.array([score(text, [problem["answer"] for problem in group])
                          for text, group in zip(texts, groups)])  # (P, N)
        positions = " ".join(f"{share:.1%}" for share in right.mean(axis=0))
        print(f"N = {n}: {right.mean():.2%} right, {lengths.mean() / n:.1f} tokens a problem; "
              f"by position {positions}")
    right = right[:, 0]
    steps = np.array([problem["difficulty"] for problem in problems])
    joined = np.array([bool(re.search(r"\d+( [+-] \d+){2,} =", text)) for text in texts])
    median = np.array([np.median(lengths[steps == level]) for level in steps])
    for name, rows in {"shorter than the median of their steps": lengths < median,
                       "longer": lengths > median, "with a joined step": joined,
                       "without": ~joined}.items():
        print(f"N = 1, solutions {name}: {rows.mean():.2%} of all, {right[rows].mean():.2%} right, "
              f"{lengths[rows].mean():.1f} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", nargs="?", const=str(MODEL), metavar="DIR",
                        help="measure the model in DIR (default: the shipped one)")
    s = parser.parse_args()
    if s.measure:
        measure(s.measure)
    else:
        make(s.seed)


if __name__ == "__main__":
    main()
