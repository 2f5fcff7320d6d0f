"""
Batched Contextual Reinforcement (BCR, arXiv 2604.02322): N problems in one prompt, one token
budget for the whole answer, and a reward that counts how many of the N were answered correctly.
A problem that the budget did not reach earns nothing, so the model learns to reason shorter:
nothing else in this file asks it to.

    python bcr.py --n 4                        the shipped model on the shipped problems
    python bcr.py --n 1 --budget 512           plain GRPO: one problem, a budget that cuts no one
    python bcr.py --n 4 --steps 0              only evaluate
    python bcr.py --n 3 --model DIR --data FILE.jsonl --eval-data FILE.jsonl --budget 5120 --lr 1e-6

It reads from top to bottom: settings, data, prompts, rewards and advantages, loss, evaluation,
checkpoints, loop. The algorithm is GRPO (arXiv 2402.03300) with these parts left out:

- No KL term and no reference model: rewards that are checked need no leash.
- No division by response length: each sequence's own mean would itself reward or punish length
  (Dr. GRPO, arXiv 2503.20783), and falsify what BCR claims. The loss is divided by a constant.
- No division by the group's standard deviation (`--normalize-std` brings it back).
- No filtering of truncated samples (DAPO's overlong filtering, arXiv 2503.14476): truncation IS
  the pressure.
- No top-k, no top-p: what is trained on is what was sampled from.

Letters in shapes: P prompts a step, G samples of each, N problems in a prompt, R = P * G rows.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.sandbox
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import Transformer, UserError, read_json
from reward import score
from rollout import generate

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------
# Settings


def flag(default, doc):
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass
class Settings:
    # The task
    n: str = flag("4", "problems in one prompt (N); several, as in 2,4,8, take turns, one a step")
    budget: str = flag("150", "tokens for a whole completion, all N problems together; one for all N or one for each")
    model: str = flag(str(HERE / "data/tiny/model"), "Hugging Face model directory")
    data: str = flag(str(HERE / "data/tiny/train.jsonl"), 'training problems, one {"problem", "answer", "difficulty"?} a line')
    eval_data: str = flag(str(HERE / "data/tiny/heldout.jsonl"), "problems to evaluate on, in the same form")
    # Training
    steps: int = flag(40, "training steps; 0 only evaluates")
    groups: int = flag(16, "prompts a step (P), each with N problems")
    samples: int = flag(8, "completions of each prompt (G), the group whose mean is the baseline")
    lr: float = flag(1e-4, "AdamW's learning rate: 1e-4 suits the shipped model, 1e-6 one of a billion parameters")
    temperature: float = flag(1.0, "of sampling, in training and evaluation; the loss uses the same")
    updates: int = flag(1, "optimizer steps a rollout; above 1 the clipped ratio is on")
    clip_low: float = flag(0.2, "the ratio is clipped below 1 minus this ...")
    clip_high: float = flag(0.28, "... and above 1 plus this (DAPO's clip-higher)")
    normalize_std: bool = flag(False, "divide advantages by the group's standard deviation, as the first GRPO did")
    length_penalty: float = flag(0.0, "baseline: subtract this times tokens / budget from the reward")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    weight_decay: float = flag(0.0, "AdamW's weight decay")
    # Evaluation
    eval_n: str = flag("1,2,4,8", "values of N to evaluate at")
    eval_problems: int = flag(512, "problems to evaluate on, the same ones at each N")
    eval_budget: int = flag(1024, "tokens for a whole completion in evaluation: enough to cut no one")
    # The run
    seed: int = flag(0, "decides the order of the data and every sampled token")
    out: str = flag("", "directory for all that the run writes (default: out/run-1, or the next free number)")
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    save_every: int = flag(10, "steps between checkpoints")
    # The machine
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = flag("auto", "float32, bfloat16, or auto: bfloat16 on cuda; master weights are float32 always")
    rows: int = flag(256, "completions sampled at a time: what the key/value cache has room for")
    micro_tokens: int = flag(16384, "tokens, padding included, in one forward and backward pass")


def parse_settings(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        name, doc = "--" + field.name.replace("_", "-"), field.metadata["doc"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(name, action="store_true", help=doc)
        else:
            shown = os.path.relpath(field.default) if field.default != "" and "/" in str(field.default) else field.default
            parser.add_argument(name, type=field.type, default=field.default,
                                help=doc + (f" (default: {shown})" if shown != "" else ""))
    s = Settings(**vars(parser.parse_args(argv)))
    at_least = {"groups": 1, "samples": 2, "steps": 0, "updates": 1, "eval_problems": 1, "eval_budget": 1,
                "seed": 0, "save_every": 1, "rows": 1, "micro_tokens": 1, "temperature": 0, "lr": 0}
    for name, least in at_least.items():
        if not getattr(s, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} should be at least {least}, not {getattr(s, name)}")
    if s.temperature == 0 and s.steps:
        raise UserError("--temperature 0 gives a group of equal samples, which teaches nothing: use 1 for training")
    if len(whole_numbers(s, "budget")) not in (1, len(whole_numbers(s, "n"))):
        raise UserError(f"--budget {s.budget} should name one number, or one for each of --n {s.n}")
    whole_numbers(s, "eval_n")
    return s


def whole_numbers(s, name):
    """The list that a setting such as `2,4,8` stands for. Raises UserError if it is none."""
    parts = getattr(s, name).split(",")
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part.strip()) for part in parts):
        raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)!r} should be a whole number above 0, or several with commas")
    return [int(part) for part in parts]


# ----------------------------------------------------------------------------------------------
# Data: problems, and groups of N that are about equally hard


def load_problems(path):
    """A JSONL file as a list of {"problem": str, "answer": str, "difficulty": float}. Raises
    UserError with the line's number for a line that is not of that form."""
    problems = []
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: --data and --eval-data should be JSONL files") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}: not valid JSON") from None
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: should be a JSON object with problem and answer")
        problem, answer, difficulty = entry.get("problem"), entry.get("answer"), entry.get("difficulty") or 0
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(problem, str) or not problem.strip():
            raise UserError(f"{path}, line {number}: no text in the field problem")
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{path}, line {number}: no text or number in the field answer")
        if isinstance(difficulty, bool) or not isinstance(difficulty, (int, float)) or not math.isfinite(difficulty):
            raise UserError(f"{path}, line {number}: difficulty should be a number")
        problems.append({"problem": problem, "answer": answer, "difficulty": difficulty})
    if not problems:
        raise UserError(f"{path} has no problems in it")
    return problems


@functools.lru_cache(maxsize=8)
def strata(difficulties, n, seed, epoch):
    """The problems sorted by difficulty (ties in random order) and cut into n equal parts, each
    shuffled: (n, len // n) indices. What does not divide by n sits out this epoch."""
    rng = np.random.default_rng([seed, n, epoch])
    order = rng.permutation(len(difficulties))
    order = rng.permutation(order[: len(order) // n * n])
    order = order[np.argsort(np.array(difficulties)[order], kind="stable")].reshape(n, -1)
    return rng.permuted(order, axis=1)


def draw_groups(problems, n, seed, first, count):
    """Groups number first .. first + count - 1 of an endless sequence, (count, n) indices. A group
    takes one problem from each stratum, so groups are about equally hard, in random order, so that
    a problem's place in the prompt says nothing about its difficulty. Depends on its arguments
    alone: a resumed run goes on with the next group."""
    size = len(problems) // n
    if not size:
        raise UserError(f"N = {n} problems in a prompt, but there are only {len(problems)}: lower --n or --eval-n")
    difficulties = tuple(problem["difficulty"] for problem in problems)
    groups = []
    for index in range(first, first + count):
        epoch, column = divmod(index, size)
        group = strata(difficulties, n, seed, epoch)[:, column]
        groups.append(np.random.default_rng([seed, n, index]).permutation(group))
    return np.stack(groups)


# ----------------------------------------------------------------------------------------------
# Prompts: N problems in one user message, in the model's own chat template


def batch_prompt(problems):
    """The user message for N problems (texts). One message, whatever the model and whatever N:
    what changes with N must be N alone."""
    listed = "\n".join(f"Problem {i}: {text}" for i, text in enumerate(problems, start=1))
    return ('Solve the problems below in order. For each problem i write a section that starts with '
            '"### Problem i" and ends with "Answer i: \\boxed{...}".\n\n' + listed)


@dataclass
class Chat:
    """What turns a message into token ids: tokenizer.json, the chat template (None: plain text)
    and the ids that end a completion."""

    tokenizer: Tokenizer
    template: jinja2.Template | None
    special: dict  # bos_token, eos_token ... as the template wants them
    eos_ids: list[int]


def load_chat(path):
    """Reads the tokenizer side of a Hugging Face directory. The template is in
    chat_template.jinja or in tokenizer_config.json; the ids that end a completion are the union
    of config.json's, generation_config.json's and the tokenizer's, for they differ in practice.
    Raises UserError for a missing or broken file."""
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json: --model should name a Hugging Face model directory")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"cannot read {path / 'tokenizer.json'}: {error}") from None
    settings = {name: read_json(path / name) if (path / name).is_file() else {}
                for name in ("config.json", "generation_config.json", "tokenizer_config.json")}
    special = {name: token.get("content") if isinstance(token, dict) else token  # an AddedToken is a dict
               for name, token in settings["tokenizer_config.json"].items() if name.endswith("_token")}
    eos_ids = {tokenizer.token_to_id(special.get("eos_token") or "")}
    for name in ("config.json", "generation_config.json"):
        ids = settings[name].get("eos_token_id")
        eos_ids |= set(ids) if isinstance(ids, list) else {ids}
    if not (eos_ids := sorted(eos_ids - {None})):
        raise UserError(f"{path} names no eos_token: a completion could not end")
    source = settings["tokenizer_config.json"].get("chat_template")
    if (path / "chat_template.jinja").is_file():
        source = (path / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(source, list):  # several named templates
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    try:
        template = chat_environment().from_string(source) if source else None
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template in {path} is not valid: {error}") from None
    return Chat(tokenizer, template, special, eos_ids)


def chat_environment():
    """Jinja as transformers renders chat templates: sandboxed, for a template is code that comes
    with a download."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: time.strftime(format)
    return environment


def encode_chat(chat, message):
    """Token ids of one user message, ready for the model to answer."""
    if chat.template is None:
        return chat.tokenizer.encode(message + "\n\n").ids
    try:
        text = chat.template.render(messages=[{"role": "user", "content": message}],
                                    add_generation_prompt=True, **chat.special)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template fails: {error}") from None
    return chat.tokenizer.encode(text, add_special_tokens=False).ids  # the template has written them


# ----------------------------------------------------------------------------------------------
# Rewards and advantages


def check(texts, golds):
    """Which problems each completion answers correctly. texts: R completions; golds: for each its
    N answers -> bool (R, N). THE reward is earned here: r = mean over the N of this. What stood
    before the cut counts; what the budget did not reach has no answer, and earns 0."""
    return np.array([score(text, gold) for text, gold in zip(texts, golds)])


def advantages_of(rewards, normalize_std=False):
    """A_pg = r_pg - mean_g r_pg: the group's mean is the baseline. rewards: (P, G) -> (P, G).

    Source: GRPO (arXiv 2402.03300, section 4.1.2); without the division by the standard deviation
    as in Dr. GRPO (arXiv 2503.20783). A group whose rewards are all equal gets exact zeros."""
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    advantages[rewards.max(axis=1) == rewards.min(axis=1)] = 0.0  # the mean may be off by rounding
    if normalize_std:
        advantages /= rewards.std(axis=1, keepdims=True) + 1e-6
    return advantages


# ----------------------------------------------------------------------------------------------
# Loss


def token_logprobs(model, prompts, completions, temperature, chunk=4096):
    """Log-probabilities of the completions' tokens, one after the other: float32 (M,), M being
    the sum of their lengths. prompts, completions: B lists of token ids.

    Every sampled token counts, EOS too, for stopping is an action. The head and the softmax run
    over `chunk` tokens at a time and are computed again in the backward pass: logits for all
    tokens at once, (B, T, V), are what large vocabularies run out of memory on."""
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    predicts = torch.zeros(len(prompts), longest - 1, dtype=torch.bool)  # True where a completion token comes next
    for row, (p, c) in enumerate(zip(prompts, completions)):
        tokens[row, : len(p) + len(c)] = torch.tensor(p + c)
        predicts[row, len(p) - 1 : len(p) + len(c) - 1] = True
    tokens, predicts = tokens.to(model.device), predicts.to(model.device)
    hidden = model.hidden(tokens[:, :-1])[predicts]  # (M, C)
    targets = tokens[:, 1:][predicts]  # (M,)

    def of_chunk(hidden, targets):
        logits = model.head(hidden).float() / temperature  # (chunk, V)
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]

    return torch.cat([checkpoint(of_chunk, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(chunk), targets.split(chunk))])


def policy_loss(logprobs, old_logprobs, advantages, constant, clip_low, clip_high):
    """-1/constant * sum_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t), with
    rho_t = pi(token) / pi_old(token), over tokens: all (M,) -> scalar.

    Source: PPO (arXiv 1707.06347, equation 7), a range of its own for each side as in DAPO
    (arXiv 2503.14476, section 3.1)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / constant


def micro_batches(lengths, micro_tokens):
    """Rows of about the same length together, at most `micro_tokens` tokens with their padding."""
    batch = []
    for row in np.argsort(lengths, kind="stable"):
        if batch and (len(batch) + 1) * lengths[row] > micro_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def accumulate_gradient(model, master, prompts, completions, sampled, advantages, constant, s):
    """Adds the gradient of the loss of these rows to master[i].grad. prompts, completions: lists of
    token ids; sampled: the sampler's logprobs, a list of (length,) tensors; advantages: one a row.

    The loss of a micro-batch is a sum divided by the one `constant` (P * G * budget, the most
    tokens that the step could have sampled), so its gradients add up to those of the whole:
    nothing depends on how the rows were split. Returns the loss and the gaps |logprob here -
    logprob in the sampler|, mean and largest: 0 but for rounding."""
    total, gaps = 0.0, []
    lengths = np.array([len(p) + len(c) for p, c in zip(prompts, completions)])
    for rows in micro_batches(lengths, s.micro_tokens):
        logprobs = token_logprobs(model, [prompts[r] for r in rows], [completions[r] for r in rows], s.temperature)
        behaviour = torch.cat([sampled[r] for r in rows]).to(model.device)
        spread = torch.cat([torch.full((len(completions[r]),), advantages[r]) for r in rows]).to(model.device)
        # One update a rollout is on-policy: the ratio is 1, its gradient that of the logprob.
        old = behaviour if s.updates > 1 else logprobs.detach()
        loss = policy_loss(logprobs, old, spread, constant, s.clip_low, s.clip_high)
        loss.backward()
        for ours, computed in zip(master, model.parameters()):
            if ours is not computed:  # bfloat16 gradients are summed in float32
                ours.grad = computed.grad.float() if ours.grad is None else ours.grad + computed.grad
                computed.grad = None
        total += loss.item()
        gaps.append((logprobs.detach() - behaviour).abs())
    gaps = torch.cat(gaps)
    return total, gaps.mean().item(), gaps.max().item()


# ----------------------------------------------------------------------------------------------
# Evaluation


def wait_loops(text):
    return len(re.findall(r"\bwait\b", text, re.IGNORECASE))


def interval95(correct):
    """A 95% interval for the mean of correct (P, N), in which the N problems of a prompt are not
    taken for independent: Wilson's interval (1927), for as many trials as a sample of single
    problems would need for the same standard error between prompts (Kish's effective size)."""
    prompts, n = correct.shape
    p, trials, z = correct.mean(), float(prompts * n), 1.96
    if prompts > 1 and (variance := correct.mean(axis=1).var(ddof=1) / prompts) > 0:
        trials = min(trials, p * (1 - p) / variance)
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


EVALUATION = 2**32  # the step number that evaluation's random stream goes by, plus N


def evaluate(model, chat, problems, n, s, title):
    """Answers `--eval-problems` problems, N a prompt, one sample each. Returns the figures and the
    prompts' and completions' texts. `accuracy` is with --eval-budget, meant to cut no one;
    `accuracy_in_budget` is of the same completions cut at the training budget, which is what
    sampling with that budget would have given, token for token."""
    groups = draw_groups(problems, n, s.seed, 0, len(problems) // n)  # raises if N is too large
    golds = [[problems[i]["answer"] for i in group] for group in groups]
    messages = [batch_prompt([problems[i]["problem"] for i in group]) for group in groups]
    with progress(len(groups), f"{title}, N = {n}") as bar:
        rollout = generate(model, [encode_chat(chat, m) for m in messages], 1, s.eval_budget, eos_ids=chat.eos_ids,
                           temperature=s.temperature, seed=s.seed, step=EVALUATION + n, rows=s.rows,
                           on_finished=bar.update)
    budget = max(whole_numbers(s, "budget"))
    ids = [row[:length].tolist() for row, length in zip(rollout.tokens, rollout.lengths)]
    texts = decode(chat, ids)
    correct = check(texts, golds)  # (P, N)
    in_budget = check(decode(chat, [row[:budget] for row in ids]), golds)
    print(f"{title}, N = {n}: {correct.mean():.1%} right, {rollout.lengths.sum().item() / correct.size:.1f} tokens a problem", flush=True)
    return {
        "accuracy": correct.mean(),
        "accuracy_ci95": interval95(correct),
        "tokens_per_problem": rollout.lengths.double().mean().item() / n,
        "loops_per_problem": sum(map(wait_loops, texts)) / (len(texts) * n),
        "truncated": rollout.truncated.double().mean().item(),
        "budget": budget,
        "accuracy_in_budget": in_budget.mean(),
        "accuracy_in_budget_ci95": interval95(in_budget),
        "accuracy_by_position": correct.mean(axis=0).tolist(),
        "problems": correct.size,
    }, list(zip(messages, texts, golds, correct.tolist()))


def decode(chat, ids):
    return chat.tokenizer.decode_batch(ids, skip_special_tokens=True)


def progress(total, title):
    """A bar on a terminal; elsewhere nothing, for the lines that are printed tell enough."""
    return tqdm(total=total, desc=title, leave=False, disable=not sys.stderr.isatty())


def table(before, after):
    """The result as text: a line for each N, before and after side by side."""
    budget = next(iter(before.values()))["budget"]
    columns = [("accuracy %", "accuracy", 100, "{:.1f}"), (f"in {budget} tokens %", "accuracy_in_budget", 100, "{:.1f}"),
               ("tokens / problem", "tokens_per_problem", 1, "{:.1f}"), ("waits / problem", "loops_per_problem", 1, "{:.2f}")]
    head = "  N" + "".join(f" | {title:>19}" for title, *_ in columns)
    lines = [head, "   " + f" | {'before':>9} {'after' if after else '':>9}" * len(columns), "-" * len(head)]
    for n, figures in before.items():
        cells = ""
        for _, name, scale, form in columns:
            then = form.format(after[n][name] * scale) if n in after else ""
            cells += f" | {form.format(figures[name] * scale):>9} {then:>9}"
        lines.append(f"{n:>3}" + cells)
    return "\n".join(lines)


def write_completions(path, examples, each=3):
    """Some prompts and completions at each N for a person to read: what `evaluate` returned."""
    out = []
    for n, of_n in examples.items():
        for message, text, golds, correct in of_n[:each]:
            out += ["=" * 100, f"N = {n}", "", message, "", f"--- completion: {sum(correct)} of {n} right; the answers "
                    f"are {', '.join(golds)}", "", text, ""]
    write_text(path, "\n".join(out) + "\n")


def plot(path, results, metrics, n):
    """results.png: tokens and accuracy over N before and after, and over the steps."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(17, 3.8))
    budget = next(iter(results["before"].values()))["budget"]
    for stage, colour in (("before", "tab:gray"), ("after", "tab:blue")):
        rows = results.get(stage, {})
        xs = [int(key) for key in rows]
        axes[0].plot(xs, [row["tokens_per_problem"] for row in rows.values()], "o-", color=colour, label=stage)
        axes[1].plot(xs, [row["accuracy"] for row in rows.values()], "o-", color=colour, label=f"{stage}, nobody cut")
        axes[1].plot(xs, [row["accuracy_in_budget"] for row in rows.values()], "o--", color=colour, label=f"{stage}, {budget} tokens")
    for axis, title in ((axes[0], "tokens per problem"), (axes[1], "accuracy")):
        axis.set(title=title, xlabel="N problems in the prompt", ylim=(0, None))
        axis.legend(fontsize=8)
    steps = [m["step"] for m in metrics]
    axes[2].plot(steps, [m["tokens_per_problem"] for m in metrics])
    axes[2].set(title=f"training, N = {n}: tokens per problem", xlabel="step", ylim=(0, None))
    axes[3].plot(steps, [m["accuracy"] for m in metrics], label="accuracy")
    axes[3].plot(steps, [m["truncated"] for m in metrics], label="share cut by the budget")
    axes[3].set(title=f"training, N = {n}", xlabel="step", ylim=(0, 1.02))
    axes[3].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------
# Files: checkpoints and the trained model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
MAY_CHANGE = {"steps", "resume", "out", "save_every", "rows", "micro_tokens"}  # when a run goes on


def write_text(path, text):
    """Writes a file in one move: a reader sees the old one or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_model(out, model, source):
    """The model with its tokenizer as a Hugging Face directory."""
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, out / name)


def save_checkpoint(out, step, model, master, optimizer, s):
    """All that step number `step` depends on: master weights, AdamW's state, settings. The order
    of the data and every draw are functions of the settings and the step. Written aside and
    renamed, then the one before is removed."""
    target = out / f"checkpoint-{step:06d}"
    temporary = out / "checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    names = [name for name, _ in model.named_parameters()]
    state = {f"{key}.{name}": value for name, weight in zip(names, master)
             for key, value in ({"weight": weight.detach()} | optimizer.state[weight]).items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "state.safetensors")
    write_json(temporary / "state.json", {"step": step, "settings": dataclasses.asdict(s)})
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    for old in sorted(out.glob("checkpoint-*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(out, model, master, optimizer, s):
    """Restores the last checkpoint in place and returns its step. Raises UserError if there is
    none, or if a setting was changed that the run's numbers depend on."""
    checkpoints = sorted(out.glob("checkpoint-*"))
    if not checkpoints:
        raise UserError(f"--resume finds no checkpoint in {out}: start the run without --resume, in a new --out")
    saved = read_json(checkpoints[-1] / "state.json")
    for name, value in dataclasses.asdict(s).items():
        if name not in MAY_CHANGE and value != saved["settings"].get(name):
            raise UserError(f"--resume: --{name.replace('_', '-')} was {saved['settings'].get(name)} and is now {value}: "
                            "a run goes on with the settings it began with")
    state = load_file(checkpoints[-1] / "state.safetensors")
    for (name, computed), weight in zip(model.named_parameters(), master):
        with torch.no_grad():
            weight.copy_(state[f"weight.{name}"])
            computed.copy_(weight)
        if f"step.{name}" in state:  # no step was taken yet: AdamW has no state
            optimizer.state[weight] = {key: state[f"{key}.{name}"].to(weight.device if key != "step" else "cpu")
                                       for key in ("step", "exp_avg", "exp_avg_sq")}
    return saved["step"]


# ----------------------------------------------------------------------------------------------
# The loop


def run(s):
    started = time.time()
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype} is not supported: use float32 or bfloat16")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device} is not to be had on this machine: use cpu")
    ns, budgets = whole_numbers(s, "n"), whole_numbers(s, "budget")
    problems, heldout = load_problems(s.data), load_problems(s.eval_data)[: s.eval_problems]
    if shared := {p["problem"] for p in problems} & {p["problem"] for p in heldout}:
        print(f"warning: {len(shared)} problems of --eval-data are in --data too, so accuracy after training is flattered")
    chat = load_chat(s.model)
    model = Transformer.from_pretrained(s.model, getattr(torch, dtype), device)
    if chat.tokenizer.get_vocab_size() > model.config.vocab_size:
        raise UserError(f"the tokenizer in {s.model} has {chat.tokenizer.get_vocab_size()} tokens, but the model "
                        f"only {model.config.vocab_size}: the two do not belong together")
    # Float32 master weights: the model's own if it is computed in float32, else copies.
    master = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(master, lr=s.lr, weight_decay=s.weight_decay)

    # Everything that can be wrong with the settings shows before anything is written.
    def first_prompt(problems, n, budget):
        group = [problems[i] for i in draw_groups(problems, n, s.seed, 0, 1)[0]]
        tokens, limit = len(encode_chat(chat, batch_prompt([p["problem"] for p in group]))), model.config.max_position_embeddings
        if tokens + budget > limit:
            raise UserError(f"a prompt of {tokens} tokens and a budget of {budget} exceed the {limit} positions of "
                            "this model: lower the budget or N")
        return [p["answer"] for p in group]

    for n in whole_numbers(s, "eval_n"):
        first_prompt(heldout, n, s.eval_budget)
    for turn, n in enumerate(ns):
        golds = first_prompt(problems, n, budgets[turn % len(budgets)])
        bare = "\n\n".join(f"### Problem {i}\nAnswer {i}: \\boxed{{{gold}}}" for i, gold in enumerate(golds, start=1))
        budget, need = budgets[turn % len(budgets)], len(chat.tokenizer.encode(bare, add_special_tokens=False).ids)
        if budget < need:
            raise UserError(f"a budget of {budget} tokens cannot hold even the bare answers to {n} problems "
                            f"(about {need} tokens): raise --budget or lower --n")
    out, first, metrics, warned = open_out(s), 0, [], set()
    results, examples = {"settings": dataclasses.asdict(s), "before": {}, "after": {}}, {}
    if s.resume:
        first = load_checkpoint(out, model, master, optimizer, s)
        results["before"] = read_json(out / "results.json")["before"]
        if first:  # a line a step; what was written after the checkpoint comes again
            metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[:first]]
        write_text(out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
        print(f"going on from step {first} in {out}")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the directory --out {out}: {error.strerror}") from None
        print(f"{os.path.relpath(s.model)}: {sum(p.numel() for p in master) / 1e6:.2f}M parameters, {dtype} on {device}; "
              f"{len(problems)} training problems, {len(heldout)} held out; writing to {out}", flush=True)
    # --- before training
    if not results["before"]:
        for n in whole_numbers(s, "eval_n"):
            results["before"][str(n)], examples[str(n)] = evaluate(model, chat, heldout, n, s, "before training")
        write_completions(out / "completions-before.txt", examples)
        write_json(out / "results.json", results)
        if s.steps:
            save_checkpoint(out, 0, model, master, optimizer, s)

    # --- training
    bar = progress(s.steps, "training")
    bar.update(first)
    for step in range(first + 1, s.steps + 1):
        turn = (step - 1) % len(ns)
        n, budget = ns[turn], budgets[turn % len(budgets)]
        groups = draw_groups(problems, n, s.seed, (step - 1) // len(ns) * s.groups, s.groups)  # (P, N)
        golds = [[problems[i]["answer"] for i in group] for group in groups for _ in range(s.samples)]  # (R, N)
        prompts = [encode_chat(chat, batch_prompt([problems[i]["problem"] for i in group])) for group in groups]

        # Sample. The budget bites here: `budget` tokens for all N problems of a prompt, then the cut.
        clock = time.time()
        rollout = generate(model, prompts, s.samples, budget, eos_ids=chat.eos_ids, temperature=s.temperature,
                           seed=s.seed, step=step, rows=s.rows)
        sampling_seconds = time.time() - clock
        lengths = rollout.lengths.numpy()  # (R,)
        completions = [row[:length].tolist() for row, length in zip(rollout.tokens, lengths)]
        texts = decode(chat, completions)

        # Reward = share of the N problems answered correctly; advantage = reward - mean of its group.
        correct = check(texts, golds)  # (R, N)
        rewards = correct.mean(axis=1) - s.length_penalty * lengths / budget  # (R,)
        advantages = advantages_of(rewards.reshape(s.groups, s.samples), s.normalize_std)  # (P, G)
        zero_variance = float((advantages == 0).all(axis=1).mean())

        # Learn. Rows with advantage 0 have no gradient and are left out of the sum; the constant
        # that divides it counts all P * G rows.
        clock = time.time()
        live = np.flatnonzero(advantages.reshape(-1))
        loss = gap_mean = gap_max = grad_norm = 0.0
        for _ in range(s.updates if len(live) else 0):
            loss, gap_mean, gap_max = accumulate_gradient(
                model, master, [prompts[r // s.samples] for r in live], [completions[r] for r in live],
                [rollout.logprobs[r, : lengths[r]] for r in live], advantages.reshape(-1)[live],
                constant=len(completions) * budget, s=s)
            grad_norm = torch.nn.utils.clip_grad_norm_(master, s.grad_clip).item()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for ours, computed in zip(master, model.parameters()):
                    if ours is not computed:
                        computed.copy_(ours)
        training_seconds = time.time() - clock

        metrics.append({
            "step": step, "n": n, "budget": budget, "reward": rewards.mean(), "accuracy": correct.mean(),
            "accuracy_by_position": correct.mean(axis=0).tolist(),
            "tokens_per_problem": lengths.mean() / n, "truncated": rollout.truncated.double().mean().item(),
            "zero_variance": zero_variance, "loops_per_problem": sum(map(wait_loops, texts)) / correct.size,
            # The mean of -logprob over what was sampled estimates the entropy of a token, unbiased.
            "entropy": -rollout.logprobs.double().sum().item() / lengths.sum(),
            "loss": loss, "grad_norm": grad_norm, "logprob_gap": gap_mean, "logprob_gap_max": gap_max,
            "sampling_seconds": sampling_seconds, "training_seconds": training_seconds,
            "tokens_per_second": lengths.sum() / (sampling_seconds + training_seconds),
        })
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics[-1]) + "\n")
        m = metrics[-1]
        bar.write(f"step {step:>{len(str(s.steps))}}/{s.steps}" + (f"  N {n}" if len(ns) > 1 else "") +
                  f"  reward {m['reward']:.3f}  tokens/problem {m['tokens_per_problem']:5.1f}  waits {m['loops_per_problem']:.2f}  "
                  f"cut {m['truncated']:4.0%}  equal groups {zero_variance:4.0%}  {sampling_seconds + training_seconds:.1f} s",
                  file=sys.stdout)
        sys.stdout.flush()
        for warning in warnings(metrics) - warned:
            bar.write(warning.format(**m), file=sys.stdout)
            warned.add(warning)
        bar.update()
        if step % s.save_every == 0 or step == s.steps:
            save_checkpoint(out, step, model, master, optimizer, s)
    bar.close()

    # --- after training
    if s.steps:
        for n in whole_numbers(s, "eval_n"):
            results["after"][str(n)], examples[str(n)] = evaluate(model, chat, heldout, n, s, "after training")
        write_completions(out / "completions-after.txt", examples)
        write_model(out / "model", model, s.model)
    results["seconds"] = time.time() - started
    write_json(out / "results.json", results)
    plot(out / "results.png", results, metrics, s.n)
    print("\n" + table(results["before"], results["after"]))
    print(f"\n{results['seconds']:.0f} s in all. In {out}: results.json, metrics.jsonl, completions-*.txt"
          + (", model/ (a Hugging Face directory)" if s.steps else ""))


CUT = ("warning: {truncated:.0%} of the completions are cut by the budget of {budget} tokens; if the reward does not rise, "
       "raise --budget or lower --n")
EQUAL = ("warning: in {zero_variance:.0%} of the groups all samples earn the same, and teach nothing; if that lasts, "
         "raise --samples, or take problems that are neither too easy nor too hard")


def warnings(metrics):
    """The two ways in which such a run silently learns nothing, as sentences."""
    last = metrics[-1]
    found = set()
    if last["truncated"] > 0.95 and (last["accuracy"] < 0.1 or all(m["truncated"] > 0.95 for m in metrics[-10:]) and len(metrics) >= 10):
        found.add(CUT)
    if len(metrics) >= 3 and all(m["zero_variance"] > 0.9 for m in metrics[-3:]):
        found.add(EQUAL)
    return found


def open_out(s):
    """The directory for this run. Raises UserError rather than write into a used one."""
    if s.resume and not s.out:
        raise UserError("--resume needs --out, the directory of the run that should go on")
    if not s.out:
        number = 1
        while Path(f"out/run-{number}").exists():
            number += 1
        return Path(f"out/run-{number}")
    out = Path(s.out)
    if not s.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is in use: name a new directory, or go on with --resume")
    return out


def main(argv=None):
    try:
        run(parse_settings(argv))
    except UserError as error:
        print(f"bcr.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; go on from the last checkpoint with the same flags and --resume --out DIR", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
