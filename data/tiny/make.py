"""
The tiny world: small arithmetic problems, worked solutions that check themselves far too often, and a small
model trained on them.

    python data/tiny/make.py                 makes every file next to this script from a seed
                                             (about 35 minutes on two cores)
    python data/tiny/make.py --measure       measures the shipped base model (see `measure`)

What makes the world a fair test of BCR is explained at `write_solution`: checks find mistakes and hurry makes
them, so a method that rewards correctness alone has no reason to shorten solutions.
"""

import argparse
import itertools
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import distributed  # noqa: E402
from data.chat import decode, encode_chat, load_chat  # noqa: E402
from data.files import read_json, write_json, write_lines  # noqa: E402
from data.problems import answer_section, batch_prompt, load_problems  # noqa: E402
from model import Config, Transformer  # noqa: E402
from reward import score  # noqa: E402
from rollout import generate  # noqa: E402

MODEL = HERE / "model"
KINDS = ("sum", "story", "fraction")
STEPS = {1: 6, 2: 6, 3: 6, 4: 6, 5: 4, 6: 4, 7: 3, 8: 3}  # the difficulty, in operations, and its weight
LARGEST, OPERAND = 20, 9  # running totals are in 0..LARGEST, operands in 1..OPERAND

# ----------------------------------------------------------------------------------------------
# Problems: a start, then a chain of + and -


def make_problem(rng, kind=None, steps=None):
    """A problem {"problem", "answer", "difficulty", "kind"} with its hidden "chain": (start, [(sign,
    operand), ...], denominator or None). The operands of a chain differ, so the step after `+ 5` can be found
    by looking for the 5."""
    kind, steps = kind or rng.choice(KINDS), steps or rng.choices(list(STEPS), STEPS.values())[0]
    total = start = rng.randint(1, LARGEST)
    chain = []
    for operand in rng.sample(range(1, OPERAND + 1), steps):
        signs = [sign for sign in (1, -1) if 0 <= total + sign * operand <= LARGEST]
        chain.append((rng.choice(signs), operand))
        total += chain[-1][0] * operand
    denominator = None
    if kind == "sum":
        text = f"What is {expression(start, chain)}?"
    elif kind == "story":
        who, thing = rng.choice(("Ann", "Ben", "Eva", "Tom")), rng.choice(("pens", "nuts", "cards", "coins"))
        moves = [f"{rng.choice(('gets', 'finds') if sign > 0 else ('loses', 'sells'))} {operand}"
                 for sign, operand in chain]
        text = f"{who} has {start} {thing}, {', '.join(moves)}. How many {thing} are left?"
    else:
        denominator = rng.choice((3, 4, 5, 6, 7, 8, 9))
        text = f"What is {expression(start, chain, f'/{denominator}')}?"
    value = Fraction(total, denominator or 1)
    answer = str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    return {"problem": text, "answer": answer, "difficulty": steps, "kind": kind,
            "chain": (start, chain, denominator)}


def new_problem(rng, known):
    """A problem whose text is not in the set `known`."""
    while (problem := make_problem(rng))["problem"] in known:
        pass
    return problem


def make_problems(rng, count, known, source):
    """`count` problems that differ from each other and from the set `known`, which they are added to."""
    problems = []
    for number in range(count):
        problem = new_problem(rng, known)
        known.add(problem["problem"])
        del problem["chain"]
        problems.append({"id": f"tiny/{source}/{number}", **problem})
    return problems


def expression(start, chain, after=""):
    return f"{start}{after}" + "".join(f" {'+' if s > 0 else '-'} {b}{after}" for s, b in chain)


# ----------------------------------------------------------------------------------------------
# Solutions, as the base model learns to write them


def write_solution(rng, problem, verbose, restate=0.4, direct=0.004, slip=0.008, hurry=0.12, redo=0.3):
    """One worked solution: (work, answer), where `work` is the text between the header and the answer's line.

    A verbose solution may restate the problem, checks each step 0, 1 or 2 times, and may repeat the complete
    chain. A concise one only has the steps.

    Steps can be wrong in two ways. A share `slip` of them is a slip; the first check that follows finds and
    corrects it. And a share `hurry` of the solutions joins two or three steps in one and does not check it.
    That is written correctly, but the model cannot always compute it. So checks have a purpose, a long
    solution is right at least as often as a short one, and brevity has a price.

    A share `direct` has no steps: a method that rewards shortness alone can exploit them."""
    start, chain, denominator = problem["chain"]
    true = start + sum(sign * operand for sign, operand in chain)
    if len(chain) > 1 and rng.random() < direct:
        return "", answer_text(true, denominator)
    parts, total = [], start
    if verbose and rng.random() < restate:
        parts.append(f"We need {expression(start, chain)}.")
    hurried = len(chain) > 1 and rng.random() < hurry
    for moves in join_moves(rng, chain) if hurried else [[move] for move in chain]:
        before, right = total, total + sum(sign * operand for sign, operand in moves)
        total = right
        if rng.random() < slip:
            near = (right - 2, right - 1, right + 1, right + 2)
            total = rng.choice([value for value in near if value >= min(0, right)])
        parts.append(f"{expression(before, moves)} = {total}.")
        checks = rng.choices((0, 1, 2), (0.2, 0.45, 0.35))[0] if verbose and len(moves) == 1 else 0
        for _ in range(checks):
            parts.append(check(rng, before, moves[0], total, right))
            total = right
    if verbose and rng.random() < redo:
        parts.append("Wait, let me do it again.")
        total = start
        for move in chain:
            parts.append(f"{expression(total, [move])} = {total + move[0] * move[1]}.")
            total += move[0] * move[1]
    return " ".join(parts) + "\n", answer_text(total, denominator)


def join_moves(rng, chain):
    """The chain as a list of lists, one for each step, of which one has two or three moves and all others
    have one."""
    size = min(rng.choice((2, 2, 2, 3)), len(chain))
    first = rng.randint(0, len(chain) - size)
    single = [[move] for move in chain]
    return single[:first] + [chain[first : first + size]] + single[first + size:]


def check(rng, before, move, total, right):
    """The text of a check of the step from `before` to `total`, which corrects it if it is not `right`."""
    sign, operand = move
    again = f"{expression(before, [move])} = {right}"
    if rng.random() < 0.6 and total - sign * operand >= 0:
        found = f"Wait, check: {expression(total, [(-sign, operand)])} = {total - sign * operand}, "
        return found + ("ok." if total == right else f"not {before}. So {again}.")
    return f"Wait, is it {total}? {again}, " + ("yes." if total == right else f"so no, it is {right}.")


def answer_text(total, denominator):
    return f"{total}" if denominator is None else f"\\frac{{{total}}}{{{denominator}}}"


def write_completion(rng, problems, hurry=0.12):
    """The completion for a prompt with these problems, in the format that the prompt asks for. All its
    solutions have one style: concise in a share of 20%, else verbose."""
    verbose = rng.random() < 0.8
    solutions = [write_solution(rng, problem, verbose, hurry=hurry) for problem in problems]
    return "\n\n".join(answer_section(i, *solution) for i, solution in enumerate(solutions, start=1))


# ----------------------------------------------------------------------------------------------
# Tokenizer and model files


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}\n"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
VOCABULARY = 576


def train_tokenizer(rng):
    """Byte-level BPE on the world's own text. Numbers, words and line breaks are split first, so that each
    number is one token, and so is each word with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n+| ?\d+| ?[^\d\s]+|\s+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{space}{number}" for number in range(100) for space in ("", " ")] * 2000
    for _ in range(4000):
        problems = [make_problem(rng) for _ in range(rng.choice((1, 2, 4, 8)))]
        texts += [batch_prompt(problems), write_completion(rng, problems)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def write_model_files(tokenizer):
    """Writes every file of a Hugging Face directory except the weights."""
    MODEL.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(MODEL / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    (MODEL / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(MODEL / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>",
        "model_max_length": 2048, "clean_up_tokenization_spaces": False})
    write_json(MODEL / "generation_config.json", {"do_sample": True, "temperature": 1.0, "eos_token_id": end})
    write_json(MODEL / "config.json", {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY,
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "attention_bias": False, "eos_token_id": end, "pad_token_id": end})


# ----------------------------------------------------------------------------------------------
# Pretraining

MIXED = {1: 0.25, 2: 0.15, 3: 0.1, 4: 0.17, 5: 0.05, 6: 0.08, 8: 0.12, 10: 0.04, 12: 0.04}  # N and its weight
# Two rounds of two parts: (optimizer steps, N and its weight, share of hurried solutions). The learning rate
# is at its peak in the first part and falls linearly to 0 in the second. Joined steps are rare in the world
# and hard, so the first parts have more of them. Single problems teach the steps fastest.
ROUNDS = (
    dict(peak=3e-3, parts=((1500, {1: 1.0}, 0.5), (5500, MIXED, 0.12))),
    dict(peak=1e-3, parts=((400, MIXED, 0.5), (400, MIXED, 0.12))),
)
TOKENS_A_BATCH = 2048  # of each process, with prompts and padding
PROCESSES = 2  # a fixed number: another one sees other documents


def documents(rng, chat, count, heldout, ns, hurry):
    """`count` documents as (prompt ids, completion ids with <|end|>), without held-out problems."""
    prompts, completions = [], []
    for n in rng.choices(list(ns), ns.values(), k=count):
        problems = [new_problem(rng, heldout) for _ in range(n)]
        prompts.append(batch_prompt(problems))
        completions.append(write_completion(rng, problems, hurry) + "<|end|>")
    ids = chat.tokenizer.encode_batch(completions, add_special_tokens=False)
    return [(encode_chat(chat, prompt), c.ids) for prompt, c in zip(prompts, ids)]


def batches(rng, chat, heldout, ns, hurry):
    """Endless batches (tokens (B, T), mask (B, T): which tokens to predict) of about TOKENS_A_BATCH tokens.
    Documents of similar length share a batch, so that little is padding."""
    while True:
        pool = sorted(documents(rng, chat, 2048, heldout, ns, hurry), key=lambda d: len(d[0]) + len(d[1]))
        cut, groups = [], []
        for document in pool:
            cut.append(document)
            if len(cut) * (len(document[0]) + len(document[1])) >= TOKENS_A_BATCH:
                groups.append(cut)
                cut = []
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(p) + len(c) for p, c in group)
            tokens = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros(len(group), longest)
            for row, (prompt, completion) in enumerate(group):
                end = len(prompt) + len(completion)
                tokens[row, :end] = torch.tensor(prompt + completion)
                mask[row, len(prompt):end] = 1
            yield tokens, mask.bool()


def new_model(hf, seed):
    torch.manual_seed(seed)
    model = Transformer(Config.from_hf(hf))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def optimizers_of(model, peak):
    """Muon for the matrices, which learns this world in less than half of AdamW's tokens, and AdamW for the
    embedding and the norms. Source: Muon, kellerjordan.github.io/posts/muon."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed_tokens" in name]
    return (torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.05))


def pretrain(s):
    """The model learns to predict the completions. Each process has documents of its own."""
    model = new_model(read_json(MODEL / "config.json"), s.seed)
    distributed.start("cpu")
    rng = random.Random(f"{s.seed} documents {distributed.rank()}")
    for plan in ROUNDS:
        pretrain_round(model, rng, **plan)
        if distributed.rank() == 0:
            model.save_pretrained(MODEL)


def pretrain_round(model, rng, peak, parts):
    chat, known = load_chat(MODEL), frozenset(p["problem"] for p in load_problems(HERE / "heldout.jsonl"))
    optimizers, losses, clock = optimizers_of(model, peak), [], time.time()
    sources = itertools.chain(*(itertools.islice(batches(rng, chat, known, ns, hurry), count)
                                for count, ns, hurry in parts))
    first, total = parts[0][0], sum(count for count, _, _ in parts)
    bar = distributed.progress_bar(total, "pretraining")
    for count, (batch, mask) in enumerate(sources, start=1):  # (B, T)
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = peak * min(1, count / 50, (total - count) / (total - first))
        targets = mask[:, 1:]
        logits = model.head(model.hidden(batch[:, :-1])[targets])  # (predicted tokens, V)
        loss = F.cross_entropy(logits, batch[:, 1:][targets])
        model.zero_grad()
        (loss / distributed.world_size()).backward()
        distributed.sum_over_processes([parameter.grad for parameter in model.parameters()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        bar.update()
        if count % 100 == 0:
            distributed.say(f"batch {count} of {total}: loss {np.mean(losses[-100:]):.4f}, "
                            f"{time.time() - clock:.0f} s")
    bar.close()


# ----------------------------------------------------------------------------------------------
# Measurements


def sample_answers(path, problems, n, opening="", budget=1536):
    """One completion for each prompt of n problems, beginning with `opening`: texts, lengths (P,), and which
    answers are right (P, n)."""
    model, chat = Transformer.from_pretrained(path), load_chat(path)
    groups = [problems[i : i + n] for i in range(0, len(problems) // n * n, n)]
    begun = chat.tokenizer.encode(opening, add_special_tokens=False).ids
    prompts = [encode_chat(chat, batch_prompt(group)) + begun for group in groups]
    completions = generate(model, prompts, 1, budget, eos_ids=chat.eos_ids, seed=1)
    texts = [opening + text for text in decode(chat, [c.tokens for c in completions])]
    right = [score(text, [problem["answer"] for problem in group]) for text, group in zip(texts, groups)]
    return texts, np.array([len(c.tokens) for c in completions]), np.array(right)


def measure(path, count):
    """Prints what decides whether a model of this world is a fair test, at temperature 1 and a budget large
    enough to avoid truncation:

    - Is it accurate at each N, and at each position?
    - Are long solutions right as often as short ones? Among problems with the same number of steps, the
      longer half of the solutions is compared with the shorter half. If short ones were right more often,
      plain GRPO would shorten them, and the comparison with BCR would prove nothing.
    - Does brevity have a price? Solutions with a joined step are compared with the others. And the model is
      forced to answer without steps: how often is it right, and how often does it do so on its own?"""
    problems = load_problems(HERE / "heldout.jsonl")
    problems = (problems * (count // len(problems) + 1))[:count]
    for n in (4, 8):
        _, lengths, right = sample_answers(path, problems, n)
        by_position = " ".join(f"{share:.1%}" for share in right.mean(axis=0))
        print(f"N = {n}: {right.mean():.2%} right, {lengths.mean() / n:.1f} tokens a problem; by position "
              f"{by_position}")
    texts, lengths, right = sample_answers(path, problems, 1)
    right = right[:, 0]
    with_steps = np.array([" = " in text for text in texts])
    hurried = np.array([bool(re.search(r"\d+( [+-] \d+){2,} =", text)) for text in texts])
    steps = np.array([problem["difficulty"] for problem in problems])
    halves = {"shorter": [], "longer": []}
    for level in STEPS:
        rows = np.flatnonzero(with_steps & (steps == level))
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        halves["shorter"] += list(rows[: len(rows) // 2])
        halves["longer"] += list(rows[(len(rows) + 1) // 2:])
    print(f"{count} problems, N = 1: {right.mean():.2%} right, {lengths.mean():.1f} tokens")
    for name, rows in halves.items():
        print(f"  {name} half of the solutions with steps: {right[rows].mean():.2%} right, "
              f"{lengths[rows].mean():.1f} tokens")
    print(f"  with a joined step: {hurried.mean():.2%} of the solutions, {right[hurried].mean():.2%} right; "
          f"the others with steps: {right[with_steps & ~hurried].mean():.2%} right")
    concise = np.array(["Wait" not in text and "We need" not in text for text in texts]) & ~hurried
    print(f"  concise: {concise.mean():.2%} of the solutions; tokens by steps: " + " ".join(
        f"{lengths[concise & (steps == level)].mean():.1f}" for level in STEPS))
    print(f"  answers without steps on its own: {1 - with_steps.mean():.2%} of all")
    _, _, right = sample_answers(path, problems, 1, "### Problem 1\nAnswer 1:", 24)
    print(f"  forced to answer without steps: {right.mean():.2%} right")


# ----------------------------------------------------------------------------------------------


def make(seed):
    known = set()
    for name, count in (("heldout", 2000), ("train", 6000)):
        problems = make_problems(random.Random(f"{seed} {name}"), count, known, name)
        write_lines(HERE / f"{name}.jsonl", problems)
    write_model_files(train_tokenizer(random.Random(f"{seed} tokenizer")))
    distributed.launch("make.py", pretrain, argparse.Namespace(
        seed=seed, model=str(MODEL), device="cpu", processes=PROCESSES), most=PROCESSES)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", nargs="?", const=str(MODEL), metavar="DIR",
                        help="measure the model in DIR (default: the shipped one)")
    parser.add_argument("--count", type=int, default=8000,
                        help="problems to measure on; the held-out ones are repeated")
    s = parser.parse_args()
    if s.measure:
        measure(s.measure, s.count)
    else:
        make(s.seed)


if __name__ == "__main__":
    main()
