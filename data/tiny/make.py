"""
The tiny world: small arithmetic problems, worked solutions that check themselves far too often, and
a small model trained on them.

    python -m data.tiny.make      makes the problems, tokenizer.json and the weights from a seed

What makes the world a fair test of BCR is explained at `write_solution`: checks find mistakes and
hurry makes them, so a method that rewards correctness alone has no reason to shorten solutions.
"""

import argparse
import itertools
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence

import distributed
from data.chat import encode_chat, load_chat
from data.files import read_json, write_lines
from data.problems import answer_section, batch_prompt, load_problems
from model import Config, Transformer

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
KINDS = ("sum", "story", "fraction")
STEPS = {1: 3, 2: 4, 3: 5, 4: 6, 5: 6, 6: 5, 7: 4, 8: 4}  # the difficulty, in operations: weight
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

# How a completion is written, and how often (in %) each style is taken for N problems: the more
# problems, the terser. Between the values of N the shares are interpolated.
STYLES = ("thorough", "checked", "concise", "in twos", "in threes")
SHARES = {1: (69, 14, 12, 3, 2), 2: (59, 17, 16, 5, 3), 4: (43, 20, 22, 9, 6),
          8: (24, 20, 28, 16, 12), 12: (16, 15, 29, 20, 20)}
JOINED = {"in twos": 2, "in threes": 3}  # operations in one step


def draw_style(rng, n, joined=None):
    """A style for n problems. joined: the share of the joined styles, if not that of SHARES."""
    shares = [np.interp(n, list(SHARES), column) for column in zip(*SHARES.values())]
    if joined is not None:
        single = sum(shares[:3])
        shares = [(1 - joined) * share / single for share in shares[:3]] + [joined / 2] * 2
    return rng.choices(STYLES, shares)[0]


def write_solution(rng, problem, style, direct=0.004, slip=0.008, hurry=0.008):
    """One worked solution: (work, answer), where `work` is what precedes the answer's line.

    A thorough solution may restate the problem, checks each step 0, 1 or 2 times, and may repeat
    the complete chain. A checked one checks most of its steps once. A concise one only has the
    steps. The joined ones do two or three operations in a step.

    A share `slip` of the single steps and a share `hurry` of the joined ones is wrong. The first
    check that follows a slip finds and corrects it. So checks have a purpose, a long solution is
    right at least as often as a short one, and brevity has a price. A share `direct` has no steps:
    a method that rewards shortness alone can exploit them."""
    start, chain, denominator = problem["chain"]
    if len(chain) > 1 and rng.random() < direct:
        return "", answer_text(value_of(start, chain), denominator)
    parts = []
    if style == "thorough" and rng.random() < 0.4:
        parts.append(f"We need {expression(start, chain)}.")
    size = JOINED.get(style, 1)
    total = start
    for first in range(0, len(chain), size):
        moves = chain[first : first + size]
        before = total
        right = value_of(before, moves)
        total = right
        if rng.random() < (slip if size == 1 else hurry):
            near = (right - 2, right - 1, right + 1, right + 2)
            total = rng.choice([value for value in near if value >= min(0, right)])
        parts.append(f"{expression(before, moves)} = {total}.")
        for _ in range(count_checks(rng, style)):
            parts.append(check(rng, before, moves[0], total, right))
            total = right
    if style == "thorough" and rng.random() < 0.3:
        parts.append("Wait, let me do it again.")
        total = start
        for move in chain:
            before = total
            total = value_of(before, [move])
            parts.append(f"{expression(before, [move])} = {total}.")
    return " ".join(parts) + "\n", answer_text(total, denominator)


def count_checks(rng, style):
    """How often one step is checked."""
    if style == "thorough":
        return rng.choices((0, 1, 2), (0.2, 0.45, 0.35))[0]
    if style == "checked":
        return int(rng.random() < 0.7)
    return 0


def value_of(start, moves):
    return start + sum(sign * operand for sign, operand in moves)


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


def write_completion(rng, problems, joined=None, hurry=0.008):
    """The completion for a prompt with these problems, in the format that the prompt asks for. All
    its solutions have one style."""
    style = draw_style(rng, len(problems), joined)
    solutions = [write_solution(rng, problem, style, hurry=hurry) for problem in problems]
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
MIXED = {1: 0.25, 2: 0.14, 3: 0.1, 4: 0.17, 5: 0.05, 6: 0.08, 8: 0.12, 10: 0.04, 12: 0.05}
# Rounds: (peak of the learning rate, wrong joined steps, two parts). A part: (optimizer steps, N
# and its weight, share of joined styles, None: that of SHARES). The learning rate is at its peak in
# the first part and falls linearly to 0 in the second. Single problems teach the steps fastest, and
# joined ones need practice. In the first round joined steps are right as often as single ones, and
# the model learns to compute them; the second gives hurry its price.
ROUNDS = ((3e-3, 0.008, ((1500, {1: 1.0}, 0.3), (5500, MIXED, None))),
          (1e-3, 0.055, ((200, MIXED, None), (500, MIXED, None))))
TOKENS_A_BATCH = 2048  # of each process, with prompts and padding
PROCESSES = 2  # a fixed number: another one sees other documents


def batches(rng, chat, heldout, ns, joined, hurry):
    """Endless batches of about TOKENS_A_BATCH tokens: tokens (B, T), and a mask (B, T) of those to
    predict. No problem is in `heldout`. Completions of similar length share a batch, so that little
    is padding."""
    while True:
        pool = []
        for n in rng.choices(list(ns), ns.values(), k=2048):
            problems = [new_problem(rng, heldout) for _ in range(n)]
            completion = write_completion(rng, problems, joined, hurry) + "<|end|>"
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
    for number, (peak, hurry, parts) in enumerate(ROUNDS):
        rng = random.Random(f"{s.seed} documents {number} {distributed.rank()}")
        pretrain_round(model, rng, peak, hurry, parts)
        if distributed.rank() == 0:
            model.save_pretrained(MODEL)


def pretrain_round(model, rng, peak, hurry, parts):
    chat = load_chat(MODEL)
    heldout = frozenset(problem["problem"] for problem in load_problems(HERE / "heldout.jsonl"))
    optimizers = optimizers_of(model, peak)
    sources = [itertools.islice(batches(rng, chat, heldout, ns, joined, hurry), count)
               for count, ns, joined in parts]
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    make(parser.parse_args().seed)


if __name__ == "__main__":
    main()
