"""
The tiny world: small arithmetic problems, worked solutions that check themselves far too often, and a small
model trained on them.

    python data/tiny/make.py                 makes every file next to this script from a seed
                                             (about an hour on two cores)
    python data/tiny/make.py --measure       measures the shipped base model (see `measure`)

What makes the world a fair test of BCR is explained at `write_solution`: redundant checks cost tokens and
nothing else, so a method that rewards correctness alone has no reason to shorten solutions.
"""

import argparse
import itertools
import random
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data.chat import decode, encode_chat, load_chat  # noqa: E402
from data.problems import answer_section, batch_prompt, load_problems, write_lines  # noqa: E402
from model import Config, Transformer, write_json  # noqa: E402
from reward import score  # noqa: E402
from rollout import generate  # noqa: E402

MODEL = HERE / "model"
KINDS = ("sum", "story", "fraction")
STEPS = (2, 3, 4)  # operations in a problem: its difficulty
LARGEST, OPERAND = 30, 12  # running totals are in 0..LARGEST, operands in 1..OPERAND

# ----------------------------------------------------------------------------------------------
# Problems: a start, then a chain of + and -


def make_problem(rng, kind=None, steps=None):
    """A problem {"problem", "answer", "difficulty", "kind"} with its hidden "chain": (start, [(sign,
    operand), ...], denominator or None). The operands of a chain differ, so the step after `+ 5` can be found
    by looking for the 5."""
    kind, steps = kind or rng.choice(KINDS), steps or rng.choice(STEPS)
    total = start = rng.randint(1, LARGEST // 2)
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


def write_solution(rng, problem, restate=0.4, plain=0.16, direct=0.008, slip=0.006, redo=0.4):
    """One worked solution: (work, answer), where `work` is the text between the header and the answer's line.

    A share `direct` has no steps: a method that rewards shortness alone can exploit them. A share `plain` has
    steps and no checks. All others check each step 0, 1 or 2 times, and a share `redo` of those repeats the
    complete chain.

    A share `slip` of the steps is wrong. The first check that follows finds and corrects it; without a check
    the answer is wrong. So checks have a purpose, a long solution is right at least as often as a short one,
    and correctness alone gives no reason to drop checks."""
    start, chain, denominator = problem["chain"]
    true = start + sum(sign * operand for sign, operand in chain)
    if rng.random() < direct:
        return "", answer_text(true, denominator)
    checks = rng.random() >= plain
    parts = []
    if rng.random() < restate:
        parts.append(f"We need {expression(start, chain)}.")
    total = start
    for i, (sign, operand) in enumerate(chain):
        before, right = total, total + sign * operand
        total = right
        if rng.random() < slip:
            near = (right - 2, right - 1, right + 1, right + 2)
            total = rng.choice([value for value in near if value >= min(0, right)])
        parts.append(f"{step(before, sign, operand)} = {total}.")
        for _ in range(rng.choices((0, 1, 2), (0.2, 0.45, 0.35))[0] if checks else 0):
            if rng.random() < 0.6 and total - sign * operand >= 0:
                found = total - sign * operand
                text = f"Wait, check: {step(total, -sign, operand)} = {found}, "
                correction = f"not {before}. So {step(before, sign, operand)} = {right}."
                text += "ok." if total == right else correction
            else:
                text = f"Wait, is it {total}? {step(before, sign, operand)} = {right}, "
                text += "yes." if total == right else f"so no, it is {right}."
            parts.append(text)
            total = right
    if checks and rng.random() < redo:
        parts.append("Wait, let me do it again.")
        total = start
        for sign, operand in chain:
            parts.append(f"{step(total, sign, operand)} = {total + sign * operand}.")
            total += sign * operand
    return " ".join(parts) + "\n", answer_text(total, denominator)


def step(total, sign, operand):
    return f"{total} {'+' if sign > 0 else '-'} {operand}"


def answer_text(total, denominator):
    return f"{total}" if denominator is None else f"\\frac{{{total}}}{{{denominator}}}"


def write_completion(rng, problems):
    """The completion for a prompt with these problems, in the format that the prompt asks for."""
    solutions = [write_solution(rng, problem) for problem in problems]
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
    """Writes every file of a Hugging Face directory except the weights. Returns its config.json."""
    MODEL.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(MODEL / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    (MODEL / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(MODEL / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>",
        "model_max_length": 2048, "clean_up_tokenization_spaces": False})
    write_json(MODEL / "generation_config.json", {"do_sample": True, "temperature": 1.0, "eos_token_id": end})
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY,
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "attention_bias": False, "eos_token_id": end, "pad_token_id": end,
    }


# ----------------------------------------------------------------------------------------------
# Pretraining

# Rounds of training: tokens (with prompts and padding), peak learning rate, the share at the start with one
# problem per document (where steps are learned fastest), the share at the end in which the learning rate
# falls to 0 (so that facts settle), and the distribution of N after the beginning.
ROUNDS = (
    dict(tokens=16e6, peak=3e-3, alone=0.3, decay=0.6,
         ns={1: 0.4, 2: 0.22, 3: 0.1, 4: 0.14, 5: 0.03, 6: 0.04, 7: 0.02, 8: 0.05}),
    dict(tokens=14e6, peak=2e-3, alone=0.0, decay=1.0,
         ns={1: 0.3, 2: 0.2, 3: 0.1, 4: 0.16, 5: 0.05, 6: 0.06, 7: 0.04, 8: 0.09}),
    dict(tokens=9e6, peak=1.5e-3, alone=0.0, decay=1.0,
         ns={1: 0.4, 2: 0.18, 3: 0.1, 4: 0.16, 5: 0.03, 6: 0.04, 7: 0.02, 8: 0.07}),
)
TOKENS_A_BATCH = 4096


def documents(rng, chat, count, heldout, ns):
    """`count` documents as (prompt ids, completion ids with <|end|>), without held-out problems."""
    prompts, completions = [], []
    for n in rng.choices(list(ns), ns.values(), k=count):
        problems = [new_problem(rng, heldout) for _ in range(n)]
        prompts.append(batch_prompt(problems))
        completions.append(write_completion(rng, problems) + "<|end|>")
    ids = chat.tokenizer.encode_batch(completions, add_special_tokens=False)
    return [(encode_chat(chat, prompt), c.ids) for prompt, c in zip(prompts, ids)]


def batches(rng, chat, heldout, ns):
    """Endless batches (tokens (B, T), mask (B, T): which tokens to predict) of about TOKENS_A_BATCH tokens.
    Documents of similar length share a batch, so that little is padding."""
    while True:
        pool = sorted(documents(rng, chat, 2048, heldout, ns), key=lambda d: len(d[0]) + len(d[1]))
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


def pretrain(model, chat, heldout, rng, tokens, peak, alone, decay, ns):
    """One round with a new AdamW: the model learns to predict the completions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    seen, started, recent = 0, time.time(), 0.0
    bar = tqdm(total=tokens, unit="tok", unit_scale=True, disable=not sys.stderr.isatty())
    single, mixed = batches(rng, chat, heldout, {1: 1.0}), batches(rng, chat, heldout, ns)
    for count in itertools.count():
        batch, mask = next(single if seen < alone * tokens else mixed)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (count + 1) / 100, max(0, 1 - seen / tokens) / decay)
        targets = mask[:, 1:]
        logits = model.head(model.hidden(batch[:, :-1])[targets])  # (predicted tokens, V)
        loss = F.cross_entropy(logits, batch[:, 1:][targets])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += batch.numel()
        bar.update(batch.numel())
        recent = 0.98 * recent + 0.02 * loss.item() if count else loss.item()
        if count % 100 == 0 and bar.disable:
            rate = seen / (time.time() - started)
            print(f"{seen / 1e6:6.1f}M tokens  loss {recent:.4f}  {rate:.0f} tok/s", flush=True)
        if seen >= tokens:
            break
    bar.close()


# ----------------------------------------------------------------------------------------------
# Measurements


def measure(path, count):
    """Prints two facts about a model of this world that decide whether it is a fair test, at N = 1,
    temperature 1 and a budget large enough to avoid truncation:

    - Are long solutions right as often as short ones? Among problems with the same number of steps, the
      longer half of the solutions is compared with the shorter half. If short ones were right more often,
      plain GRPO would shorten them, and the comparison with BCR would prove nothing.
    - Do steps matter? The model is forced to answer without steps: how often is it right, and how often does
      it answer without steps on its own?"""
    model, chat = Transformer.from_pretrained(path), load_chat(path)
    problems = load_problems(HERE / "heldout.jsonl")
    problems = (problems * (count // len(problems) + 1))[:count]
    prompts = [encode_chat(chat, batch_prompt([problem])) for problem in problems]

    def answer(opening, budget):
        """Completions that begin with `opening`: their texts, lengths, and which are right."""
        opened = [prompt + chat.tokenizer.encode(opening, add_special_tokens=False).ids for prompt in prompts]
        completions = generate(model, opened, 1, budget, eos_ids=chat.eos_ids, seed=1)
        texts = [opening + text for text in decode(chat, [c.tokens for c in completions])]
        right = [score(text, [problem["answer"]])[0] for text, problem in zip(texts, problems)]
        return texts, np.array([len(c.tokens) for c in completions]), np.array(right)

    texts, lengths, right = answer("", 1024)
    with_steps = np.array([" = " in text for text in texts])
    steps = np.array([p["difficulty"] for p in problems])
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
    print(f"  answers without steps on its own: {1 - with_steps.mean():.2%} of all")
    _, _, right = answer("### Problem 1\nAnswer 1:", 24)
    print(f"  forced to answer without steps: {right.mean():.2%} right")


# ----------------------------------------------------------------------------------------------


def make(seed):
    known = set()
    for name, count in (("heldout", 2000), ("train", 6000)):
        problems = make_problems(random.Random(f"{seed} {name}"), count, known, name)
        write_lines(HERE / f"{name}.jsonl", problems)
        if name == "heldout":
            heldout = frozenset(known)
    hf = write_model_files(train_tokenizer(random.Random(f"{seed} tokenizer")))
    chat, model = load_chat(MODEL), new_model(hf, seed)
    for number, plan in enumerate(ROUNDS):
        # The first round's documents are seeded by the seed itself, later ones by seed and number.
        pretrain(model, chat, heldout, random.Random(f"{seed} round {number}" if number else seed), **plan)
        model.save_pretrained(MODEL)


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
