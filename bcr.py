"""
Batched Contextual Reinforcement (BCR, arXiv 2604.02322): N problems in one prompt, one token
budget for the whole answer, and a reward that counts how many of the N were answered correctly.
A problem that the budget did not reach earns nothing, so the model learns to reason shorter:
nothing else in this file asks it to.

    python bcr.py --n 4                        the shipped model on the shipped problems
    python bcr.py --n 1 --budget 512           plain GRPO: one problem, a budget that cuts no one
    python bcr.py --n 4 --steps 0              only evaluate
    python bcr.py --n 4 --solve FILE.jsonl     answer the problems of a file, 4 a prompt
    torchrun --nproc-per-node 8 -- bcr.py ...  the same on eight GPUs, or on CPU cores
    python bcr.py --n 3 --model DIR --data FILE.jsonl --eval-data FILE.jsonl --budget 5120 --lr 1e-6

It reads from top to bottom: settings, data, prompts, rewards and advantages, loss, evaluation,
report, solving, files, several processes, what may go wrong, and the loop (`train`). The algorithm is
GRPO (arXiv 2402.03300) with these parts left out:

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
import bisect
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import Transformer, UserError, read_json
from reward import extract_answers, score
from rollout import Past, Rollout, generate, prefill

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
    model: str = flag(str(HERE / "data/tiny/model"), "Hugging Face model: a directory, or the name of one on the Hub")
    data: str = flag(str(HERE / "data/tiny/train.jsonl"), 'training problems, one {"problem", "answer", "difficulty"?} a line')
    eval_data: str = flag(str(HERE / "data/tiny/heldout.jsonl"), "problems to evaluate on, in the same form; several files with commas")
    reward: str = flag("", "Python file with a function score(completion, golds) of your own: N numbers from 0 to 1")
    solve: str = flag("", "answer the problems of this JSONL file, --n a prompt, instead of training")
    # Training
    steps: int = flag(40, "training steps; 0 only evaluates")
    groups: int = flag(16, "prompts a step (P), each with N problems")
    samples: int = flag(8, "completions of each prompt (G), the group whose mean is the baseline")
    lr: float = flag(1e-4, "AdamW's learning rate: 1e-4 suits the shipped model, 1e-6 one of a billion parameters")
    temperature: float = flag(1.0, "of sampling in training, where the loss uses the same, and in --solve")
    updates: int = flag(1, "optimizer steps a rollout; above 1 the clipped ratio is on")
    clip_low: float = flag(0.2, "the ratio is clipped below 1 minus this ...")
    clip_high: float = flag(0.28, "... and above 1 plus this (DAPO's clip-higher)")
    normalize_std: bool = flag(False, "divide advantages by the group's standard deviation, as the first GRPO did")
    credit: str = flag("sequence", "what a token is credited with: sequence, all N problems; or togo, its own section's problem and the later ones")
    length_penalty: float = flag(0.0, "baseline: subtract this times tokens / budget from the reward")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    weight_decay: float = flag(0.0, "AdamW's weight decay")
    # Evaluation
    eval_n: str = flag("1,2,4,8", "values of N to evaluate at")
    eval_problems: int = flag(512, "problems of each file to evaluate on, the same ones at each N")
    eval_samples: int = flag(1, "completions of each prompt in evaluation (k): the accuracy is avg@k")
    eval_budget: str = flag("1024", "tokens for a whole completion in evaluation, enough to cut no one; one, or one for each N")
    eval_temperature: str = flag("1", "of sampling in evaluation; one for all N or one for each")
    target_accuracy: float = flag(0.0, "say which of --eval-n answers this share of the problems correctly with the fewest tokens")
    # The run
    seed: int = flag(0, "decides the order of the data and every sampled token")
    out: str = flag("", "directory for all that the run writes (default: out/run-1, or the next free number)")
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    save_every: int = flag(10, "steps between checkpoints")
    # The machine
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = flag("auto", "float32, bfloat16, or auto: bfloat16 on cuda; master weights are float32 always")
    rows: int = flag(256, "most completions sampled at a time; fewer where the key/value cache would not fit the free memory")
    micro_tokens: int = flag(16384, "most tokens, padding included, in one forward and backward pass; fewer where they would not fit the free memory")
    shard: bool = flag(False, "several processes: each keeps a share of weights, gradients and AdamW's state (FSDP2), for models that one GPU cannot hold")
    checkpointing: bool = flag(False, "compute activations twice instead of keeping them; on by itself where memory is short")


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
    at_least = {"groups": 1, "samples": 2, "steps": 0, "updates": 1, "eval_problems": 1, "eval_samples": 1,
                "seed": 0, "save_every": 1, "rows": 1, "micro_tokens": 1, "temperature": 0, "lr": 0, "target_accuracy": 0}
    for name, least in at_least.items():
        at_most_1 = name in ("lr", "target_accuracy")
        if not getattr(s, name) >= least or at_most_1 and getattr(s, name) > 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least {least}{' and at most 1' * at_most_1}, not {getattr(s, name)}")
    if s.credit not in ("sequence", "togo"):
        raise UserError(f"--credit {s.credit} is not known: use sequence or togo")
    if s.temperature == 0 and s.steps and not s.solve:
        raise UserError("--temperature 0 gives a group of equal samples, which teaches nothing: use 1 for training")
    ns, _, _ = numbers(s, "n"), numbers(s, "budget", "n"), numbers(s, "eval_n")
    numbers(s, "eval_budget", "eval_n"), numbers(s, "eval_temperature", "eval_n")
    if s.solve and len(ns) > 1:
        raise UserError(f"--solve takes one value of --n, not {s.n}")
    return s


def numbers(s, name, of=None):
    """The list that a setting such as `2,4,8` stands for; with `of`, one number for each of that
    setting's. Whole numbers above 0, but for temperatures. Raises UserError for anything else."""
    parts = [part.strip() for part in getattr(s, name).split(",")]
    kind = r"[0-9]{1,9}(\.[0-9]{1,9})?" if "temperature" in name else r"[1-9][0-9]{0,8}"
    if not all(re.fullmatch(kind, part) for part in parts):
        raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)!r} should be a whole number above 0, or several with commas")
    count = len(numbers(s, of)) if of else len(parts)
    if len(parts) not in (1, count):
        raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)} should name one number, or one for each of "
                        f"--{of.replace('_', '-')} {getattr(s, of)}")
    return [float(part) if "temperature" in name else int(part) for part in parts * (count // len(parts))]


# ----------------------------------------------------------------------------------------------
# Data: problems, and groups of N that are about equally hard


def load_problems(path, answers=True):
    """A JSONL file as a list of {"id", "problem": str, "answer": str, "difficulty": float}. An id is
    the line's number where there is none; without `answers` a line may lack its answer (None).
    Raises UserError with the line's number for a line that is not of that form."""
    problems, names = [], {}
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: it should be a JSONL file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(line) > 10**6:
            raise UserError(f"{path}, line {number}: {len(line)} characters are no problem but a whole file; should each problem have a line?")
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
        if (answers or answer is not None) and (not isinstance(answer, str) or not answer.strip()):
            raise UserError(f"{path}, line {number}: no text or number in the field answer")
        try:
            (problem + (answer or "")).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{path}, line {number}: half of a surrogate pair, which is no character") from None
        if isinstance(difficulty, bool) or not isinstance(difficulty, (int, float)) or not math.isfinite(difficulty):
            raise UserError(f"{path}, line {number}: difficulty should be a number")
        name = str(entry.get("id", number))
        names[name] = names.get(name, 0) + 1  # an id that comes again gets its line's number
        name += f" (line {number})" * (names[name] > 1)
        problems.append({"id": name, "problem": problem, "answer": answer, "difficulty": difficulty})
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


def evaluation_groups(problems, n, seed):
    """Every problem once, (ceil(len / n), n) indices. What does not divide by n makes one more
    prompt, filled up with problems that were asked already; returns, too, which are asked for the
    first time: bool of the same shape. Only those count."""
    groups = draw_groups(problems, n, seed, 0, len(problems) // n)
    if rest := sorted(set(range(len(problems))) - set(groups.flat)):
        groups = np.append(groups, [rest + groups.flat[: n - len(rest)].tolist()], axis=0)
    return groups, np.arange(groups.size).reshape(groups.shape) < len(problems)


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

    path: Path
    tokenizer: Tokenizer
    template: jinja2.Template | None
    special: dict  # bos_token, eos_token ... as the template wants them
    eos_ids: list[int]


def find_model(name):
    """The directory of a model. A name such as Qwen/Qwen3-0.6B that is no directory is looked up in
    the Hugging Face Hub, or among what was downloaded before. Raises UserError if it is not there."""
    if Path(name).is_dir() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return Path(name)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[
            *TOKENIZER_FILES, "config.json", "model*.safetensors", "model.safetensors.index.json"]))
    except Exception as error:  # the library's own errors, the network's, the disk's
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--model {name} is no directory here, and the Hugging Face Hub did not give it "
                        f"({type(error).__name__}: {reason})") from None


def load_chat(path):
    """Reads the tokenizer side of a Hugging Face directory. The template is in
    chat_template.jinja or in tokenizer_config.json; the ids that end a completion are the union
    of config.json's, generation_config.json's and the tokenizer's, for they differ in practice.
    Raises UserError for a missing or broken file."""
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json: --model should name a Hugging Face model directory, or a model of the Hub as owner/name")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"cannot read {path / 'tokenizer.json'}: {error}") from None
    tokenizer.no_truncation()  # the file may hold either, from the last time that somebody used it
    tokenizer.no_padding()
    settings = {name: read_json(path / name) if (path / name).is_file() else {}
                for name in ("config.json", "generation_config.json", "tokenizer_config.json")}
    special = {name: token.get("content") if isinstance(token, dict) else token  # an AddedToken is a dict
               for name, token in settings["tokenizer_config.json"].items() if name.endswith("_token")}
    special = {name: token for name, token in special.items() if isinstance(token, str)}  # not null, not add_bos_token
    eos_ids = {tokenizer.token_to_id(special.get("eos_token") or "")}
    for name in ("config.json", "generation_config.json"):
        ids = settings[name].get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not all(i is None or isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise UserError(f"{path / name}: eos_token_id should be a token id or a list of them, not {ids}")
        eos_ids |= set(ids)
    if not (eos_ids := sorted(eos_ids - {None})):
        raise UserError(f"{path} names no eos_token: a completion could not end")
    source = settings["tokenizer_config.json"].get("chat_template")
    try:
        if (path / "chat_template.jinja").is_file():
            source = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(source, list):  # several named templates
            source = next((t["template"] for t in source if t.get("name") == "default"), None)
        template = chat_environment().from_string(source) if source else None
    except Exception as error:  # jinja2's own, or Python's for what is no text
        raise UserError(f"the chat template in {path} is not valid: {error}") from None
    return Chat(path, tokenizer, template, special, eos_ids)


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says, for those who train on
    given answers. In a prompt it is its content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a template cannot ask for a number or a text of gigabytes either."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator, left, right):
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if operator == "**" and (sizes[0] > 1000 or sizes[1] > 100) or sizes[0] * sizes[1] > 10**9:
            raise jinja2.sandbox.SecurityError(f"{operator} is too large")
        return super().call_binop(context, operator, left, right)


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError within, once the time is over."""

    def over(number, frame):
        raise TimeoutError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def chat_environment():
    """Jinja as transformers renders chat templates: sandboxed, for a template is code that comes
    with a download."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: time.strftime(format)
    return environment


def encode_chat(chat, message):
    """Token ids of one user message, ready for the model to answer."""
    if chat.template is None:
        return chat.tokenizer.encode(message + "\n\n").ids
    try:
        with time_limit(10):
            text = chat.template.render(messages=[{"role": "user", "content": message}], tools=None, documents=None,
                                        add_generation_prompt=True, **chat.special)
    except Exception as error:  # a template is a program: it may fail in any way
        raise UserError(f"the model's chat template fails: {error}") from None
    return chat.tokenizer.encode(text, add_special_tokens=False).ids  # the template has written them


# ----------------------------------------------------------------------------------------------
# Rewards and advantages


def check(texts, golds, score=score):
    """Which problems each completion answers correctly. texts: R completions; golds: for each its
    N answers -> (R, N), 1 or 0. THE reward is earned here: r = mean over the N of this. What stood
    before the cut counts; what the budget did not reach has no answer, and earns 0."""
    return np.array([score(text, gold) for text, gold in zip(texts, golds)], dtype=float)


def load_reward(path):
    """Returns (extract_answers, score): those of reward.py or, with --reward, those of the user's
    file, which needs score(completion, golds) and may have an extract_answers(completion, n)."""
    if not path:
        return extract_answers, score
    spec = importlib.util.spec_from_file_location("user_reward", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        theirs = module.score
    except Exception as error:  # whatever the user's file does wrong
        raise UserError(f"cannot take --reward {path}: {type(error).__name__}: {error}; it should be a Python file with "
                        "a function score(completion, golds)") from None

    def checked(completion, golds):
        try:
            rewards = np.array(theirs(completion, golds), dtype=float)
        except Exception as error:
            raise UserError(f"score in --reward {path} fails: {type(error).__name__}: {error}") from None
        if rewards.shape != (len(golds),) or not ((0 <= rewards) & (rewards <= 1)).all():
            raise UserError(f"score in --reward {path} should return {len(golds)} numbers from 0 to 1, one a problem, "
                            f"not {rewards.tolist()}")
        return rewards

    return getattr(module, "extract_answers", extract_answers), checked


def advantages_of(rewards, normalize_std=False):
    """A_pg = r_pg - mean_g r_pg: the group's mean is the baseline. rewards: (P, G) -> (P, G).

    Source: GRPO (arXiv 2402.03300, section 4.1.2); without the division by the standard deviation
    as in Dr. GRPO (arXiv 2503.20783). A group whose rewards are all equal gets exact zeros."""
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    advantages[rewards.max(axis=1) == rewards.min(axis=1)] = 0.0  # the mean may be off by rounding
    if normalize_std:
        advantages /= rewards.std(axis=1, keepdims=True) + 1e-6
    return advantages


HEADER = re.compile(r"^[ \t]{0,3}#{1,6}[ \t]*Problem[ \t]+([0-9]{1,3})\b", re.MULTILINE)


def sections_of(chat, text, ids, right, golds, score):
    """The number (from 0) of the problem in whose section each token stands, (T,); what precedes the
    first header belongs to the first. None where this is not to be had: the headers are not 1, 2, 3
    ... in order, or a later section has changed an earlier answer's mark (right: (N,) at the end)."""
    headers = list(HEADER.finditer(text))
    if not headers or [int(header[1]) for header in headers] != list(range(1, len(headers) + 1)) or len(headers) > len(golds):
        return None
    starts = [header.start() for header in headers[1:]]
    if any((check([text[:start]], [golds], score)[0, :i] != right[:i]).any() for i, start in enumerate(starts, start=1)):
        return None
    # The token that begins a section is the first one with which the decoded text is longer than its start.
    firsts = [bisect.bisect_right(range(len(ids)), start, key=lambda t: len(decode(chat, [ids[: t + 1]])[0])) for start in starts]
    return np.searchsorted(firsts, np.arange(len(ids)), side="right")


def advantages_to_go(correct, penalties, sections, samples, normalize_std=False):
    """Credit for what a token could still change. The gradient of E[r], r = 1/N sum_j c_j - penalty, is

        E[sum_t grad log pi(y_t) (r - b)] = E[sum_t grad log pi(y_t) (1/N sum_{j >= i(t)} c_j - penalty - b_i(t))],

    i(t) being the section that token t stands in: c_j of an earlier problem, j < i(t), is known before
    y_t is drawn, and E[grad log pi(y_t) | what came before] = 0. So the earlier terms add nothing but
    variance, as long as no later token changes an earlier c_j (`sections_of` sees to it: such rows
    keep the credit of the whole, a small bias whose share of rows is the metric `credit_unsure`). b_i is the mean over the
    group, as in `advantages_of`; for the first section the two are equal.
    correct: (R, N); penalties: (R,); sections: R arrays (T,) or None -> R arrays (T,)."""
    togo = correct[:, ::-1].cumsum(axis=1)[:, ::-1] / correct.shape[1] - penalties[:, None]  # (R, N)
    advantages = np.stack([advantages_of(column.reshape(-1, samples), normalize_std).reshape(-1) for column in togo.T], axis=1)
    return [of_row[:1] if section is None else of_row[section] for of_row, section in zip(advantages, sections)]


# ----------------------------------------------------------------------------------------------
# Loss


def token_logprobs(model, prefix, prompts, owners, completions, temperature, logits=2**26):
    """Log-probabilities of the completions' tokens, one after the other: float32 (M,), M being
    the sum of their lengths. completions: B lists of token ids; owners: (B,), the number of the
    prompt of each; prefix: what `prefill` says of the prompts.

    Every sampled token counts, EOS too, for stopping is an action. The head and the softmax run
    over as many tokens at a time as have `logits` logits, and are computed again in the backward
    pass: logits for all tokens at once, (B, T, V), are what large vocabularies run out of memory on."""
    longest = max(map(len, completions))
    tokens = torch.zeros(len(completions), longest, dtype=torch.int64)
    for row, (owner, completion) in enumerate(zip(owners, completions)):
        tokens[row, : len(completion)] = torch.tensor([prompts[owner][-1], *completion[:-1]])
    starts = torch.tensor([len(prompts[owner]) - 1 for owner in owners], device=model.device)  # (B,)
    positions = starts[:, None] + torch.arange(longest, device=model.device)
    sampled = torch.arange(longest) < torch.tensor([[len(completion)] for completion in completions])  # (B, T)
    past = Past(prefix, torch.tensor(owners, device=model.device), starts, longest)
    hidden = model.hidden(tokens.to(model.device), positions, past)[sampled.to(model.device)]  # (M, C)
    targets = torch.tensor([token for completion in completions for token in completion], device=model.device)  # (M,)

    def of_chunk(hidden, targets):
        logits = model.head(hidden).float() / temperature  # (chunk, V)
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]

    chunk = max(1, logits // model.config.vocab_size)
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


def accumulate_gradient(model, master, prompts, owners, completions, sampled, advantages, constant, s):
    """Adds the gradient of the loss of these rows to master[i].grad. prompts: P lists of token ids;
    for each of B rows its prompt's number (owners), token ids (completions), the sampler's logprobs
    (sampled, tensors of its length) and its advantage, one for all its tokens or one for each.

    The loss of a micro-batch is a sum divided by the one `constant` (P * G * budget, the most
    tokens that the step could have sampled), so its gradients add up to those of the whole:
    nothing depends on how the rows were split. A prompt is computed once for all its rows: its keys
    and values gather the gradients of the rows (in their own type: a prompt has few), and pass them on
    at the end. Returns the loss and the gaps |logprob here - logprob in the sampler|, their sum and the
    largest: 0 but for rounding."""

    def gather():  # bfloat16 gradients are summed in float32
        for ours, computed in zip(master, model.parameters()):
            if ours is not computed and computed.grad is not None:
                ours.grad = computed.grad.float() if ours.grad is None else ours.grad + computed.grad
                computed.grad = None

    total, gaps, nothing = 0.0, [torch.zeros(1, device=model.device)], [len(completions)]
    asked, shortest = sorted(set(owners)), prompts[0][:2]  # the prompts of other ranks' rows are theirs to compute
    prompts, owners = [prompts[p] for p in asked], [asked.index(owner) for owner in owners]
    batches, of_prompts = (list(micro_batches(np.array(list(map(len, texts))), s.micro_tokens)) for texts in (completions, prompts))
    if model.divided:
        # Each pass gathers the layers from all processes, so all make as many passes: who has fewer rows goes
        # on with one of a prompt and a token, whose advantage, and so its gradient, is 0.
        passes, prompt_passes = map(max, zip(*of_all_ranks((len(batches), len(of_prompts)))))
        batches += [nothing] * (passes - len(batches))
        of_prompts += [[len(prompts)]] * (prompt_passes - len(of_prompts))
        prompts, owners, completions = [*prompts, shortest], [*owners, len(prompts)], [*completions, [0]]
        sampled, advantages = [*sampled, torch.zeros(1)], [*advantages, 0.0]
    if not batches:
        return 0.0, 0.0, 0.0
    with torch.no_grad():
        prefix = prefill(model, prompts)
    shared = [kv.requires_grad_() for kv in prefix.k + prefix.v]  # (P, K, T, D) each
    for rows in batches:
        logprobs = token_logprobs(model, prefix, prompts, [owners[r] for r in rows], [completions[r] for r in rows], s.temperature)
        behaviour = torch.cat([sampled[r] for r in rows]).to(model.device)
        spread = torch.cat([torch.as_tensor(advantages[r], dtype=torch.float32).expand(len(completions[r])) for r in rows]).to(model.device)
        # One update a rollout is on-policy: the ratio is 1, its gradient that of the logprob.
        old = behaviour if s.updates > 1 else logprobs.detach()
        loss = policy_loss(logprobs, old, spread, constant, s.clip_low, s.clip_high)
        loss.backward()
        gather()
        total += loss.item()
        if rows != nothing:
            gaps.append((logprobs.detach() - behaviour).abs())
    for rows in of_prompts:  # the chain rule, through the prompts
        part = prefill(model, [prompts[p] for p in rows])
        if (length := part.k[0].shape[2]):
            # FSDP2 gathers a layer again when the gradient reaches its output: the last one's gets a gradient of 0.
            last = [part.hidden] if model.divided else []
            torch.autograd.backward(part.k + part.v + last, [kv.grad[rows, :, :length] for kv in shared] + list(map(torch.zeros_like, last)))
            gather()
    gaps = torch.cat(gaps)
    return total, gaps.sum().item(), gaps.max().item()


def with_less_memory(work, shrink):
    """Returns work(). Where memory runs out, shrink() asks for less of it and says so in a sentence,
    and the work is done again; an empty sentence means that there is nothing left to shrink."""
    while True:
        try:
            return work()
        except RuntimeError as error:  # CUDA's own kind, or the CPU allocator's message
            if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
                raise
        if not (done := shrink()):
            raise UserError("memory runs out even for one row at a time: lower --budget, or take a smaller model or a larger machine")
        print(f"memory ran out: {done}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def free_memory(device):
    """Bytes that this process may still take; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        free = next(1024 * int(line.split()[1]) for line in open("/proc/meminfo", encoding="utf-8") if line.startswith("MemAvailable"))
        return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except (OSError, StopIteration):
        return math.inf


def rows_that_fit(model, rows, tokens, free=None):
    """As many of `rows` rows of `tokens` tokens as four fifths of the free memory hold: of each its
    keys and values, and four times its V numbers (logits, probabilities, their sums)."""
    c = model.config
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize * tokens
    free = free_memory(model.device) if free is None else free
    return max(1, min(rows, math.floor(min(0.8 * free / (cache + 24 * c.vocab_size), rows))))


def activation_bytes(model):
    """What a token keeps for the backward pass, by the sizes of what each layer makes (measured on
    the two models of README: within 15%)."""
    c = model.config
    layer = 4 * c.intermediate_size + 14 * c.hidden_size + 4 * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layers = 3 * c.num_hidden_layers * c.hidden_size + layer if model.checkpointing else c.num_hidden_layers * layer
    return model.dtype.itemsize * layers


def passes_that_fit(model, master, s, free=None):
    """Does what smaller_passes does before memory runs out, as far as it can be foreseen. All ranks decide
    alike: with --shard one that computes layers twice would ask for them when no other does."""
    gradients_and_adamw = sum(12 * own_part(weight).numel() for weight in master) + (model.dtype != torch.float32) * sum(2 * own_part(p).numel() for p in model.parameters())
    free = 0.8 * (min(of_all_ranks(free_memory(model.device))) if free is None else free) - gradients_and_adamw - 3 * 4 * 2**26  # of token_logprobs' chunk
    most = s.groups * s.samples * max(numbers(s, "budget"))  # tokens in a step
    while s.micro_tokens > 256 and min(s.micro_tokens, most) * activation_bytes(model) > free:
        say(f"memory for {s.micro_tokens} tokens in a pass may not be there: {smaller_passes(model, master, s)}")


def fewer_rows(s):
    s.rows //= 2
    return f"going on with --rows {s.rows}" if s.rows else ""


def smaller_passes(model, master, s, begun=False):
    if begun and model.divided:  # the others are in the middle of the pass and cannot begin anew
        raise UserError("memory runs out in a process that shares the model with others: add --checkpointing, or lower --micro-tokens")
    for weight in [*master, *model.parameters()]:
        weight.grad = None
    if not model.checkpointing:
        model.checkpointing = True
        return "going on with --checkpointing"
    s.micro_tokens //= 2
    return f"going on with --micro-tokens {s.micro_tokens}" if s.micro_tokens else ""


# ----------------------------------------------------------------------------------------------
# Evaluation


def wait_loops(text):
    return len(re.findall(r"\bwait\b", text, re.IGNORECASE))


def student95(freedom):
    """The 97.5% quantile of Student's t with that many degrees of freedom, by Abramowitz & Stegun
    26.7.5: within 0.3% of the true one from 4 on."""
    z, v = 1.959964, freedom
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2) \
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)


def interval95(correct):
    """A 95% interval for the mean of correct (P, k, N), NaN where an answer does not count. Neither
    the N problems of a prompt nor its k samples are independent, prompts are: Wilson's interval
    (1927) for as many trials as a sample of single answers would need for the same standard error
    between prompts (Kish's effective size), with Student's t for the few prompts there may be."""
    prompts, p = len(correct), np.nanmean(correct)
    trials, z = float(np.isfinite(correct[:, 0]).sum()), student95(prompts - 1) if prompts > 1 else 1.96
    if prompts > 1 and (variance := np.nanmean(correct, axis=(1, 2)).var(ddof=1) / prompts) > 0:
        trials = min(float(np.isfinite(correct).sum()), p * (1 - p) / variance)
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return [max(0.0, middle - half), middle + half if p < 1 else 1.0]


EVALUATION = 2**32  # the step number that evaluation's random stream goes by, plus N


def sample_records(model, chat, problems, groups, samples, budget, temperature, s, path, title, mark):
    """Samples `samples` completions of the prompt of each group (indices of problems) and returns a
    record of each, in the order (prompt, sample). A record is a line of the JSONL file `path` as
    soon as its completion ends: what stands there already is not sampled again, and as every draw
    is a function of its place, a run that was stopped ends as if it had not been.
    mark(p, ids, text): what else belongs into the record."""
    records, total, told = {}, len(groups) * samples, time.time()
    room = dataclasses.replace(s)  # where this budget leaves room for fewer rows, training keeps its own

    def collect():
        """Reads what each rank wrote, leaves it to rank 0 to make one file of it, in order."""
        parts = sorted(part for part in path.parent.glob("*.rank*") if part.name.startswith(f"{path.name}.rank"))
        for line in "".join(part.read_text(encoding="utf-8") + "\n" for part in [path, *parts] if part.exists()).splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the line at which the run was stopped
                continue
            records[record["prompt"], record["sample"]] = record
        of_all_ranks(None)  # all have read
        if RANK == 0:
            path.parent.mkdir(exist_ok=True)
            write_lines(path, [records[key] for key in sorted(records)])
            for part in parts:
                part.unlink()
        of_all_ranks(None)

    collect()
    own = path.with_name(f"{path.name}.rank{RANK}")
    with progress(total, title) as bar, open(own, "a", encoding="utf-8") as file:
        bar.update(len(records))

        def sample_missing():
            missing = [p for p in range(len(groups)) if any((p, g) not in records for g in range(samples)) and p % RANKS == RANK]

            def keep(row, ids, truncated):
                nonlocal told
                p, g = missing[row // samples], row % samples
                text = decode(chat, [ids])[0]
                records[p, g] = {"prompt": p, "sample": g, "problems": [problems[i]["id"] for i in groups[p]],
                                 "tokens": len(ids), "truncated": truncated, **mark(p, ids, text), "completion": text}
                file.write(json.dumps(records[p, g]) + "\n")
                file.flush()
                bar.update()
                if bar.disable and time.time() - told > 60:
                    told = time.time()
                    say(f"{title}: {len(records)} of {total} completions" + f" on the first of {RANKS} processes" * (RANKS > 1))

            if missing:
                prompts = [encode_chat(chat, batch_prompt([problems[i]["problem"] for i in groups[p]])) for p in missing]
                generate(model, prompts, samples, budget, eos_ids=chat.eos_ids, temperature=temperature, seed=s.seed,
                         step=EVALUATION + len(groups[0]), prompt_keys=missing, on_finished=keep,
                         rows=rows_that_fit(model, room.rows, max(map(len, prompts)) + budget))

        with_less_memory(sample_missing, lambda: fewer_rows(room))
    of_all_ranks(None)  # all have written
    collect()
    return [records[key] for key in sorted(records)]


def evaluate(model, chat, name, problems, n, s, path, title, score=score):
    """Answers `--eval-problems` problems, N a prompt, k samples of each. Returns the figures and the
    records they come from. `accuracy` is with --eval-budget, meant to cut no one;
    `accuracy_in_budget` is of the same completions cut at the training budget, which is what
    sampling with that budget would have given, token for token. `interference`: the share of
    problems whose answer is wrong, but right for another problem of the same prompt."""
    groups, counted = evaluation_groups(problems, n, s.seed)
    which, budget = numbers(s, "eval_n").index(n), max(numbers(s, "budget"))

    def mark(p, ids, text):
        golds = [problems[i]["answer"] for i in groups[p]]
        turned = [golds[shift:] + golds[:shift] for shift in range(n)]  # the first is the right one
        correct, *others = check([text] * n, turned, score)
        in_budget = correct if len(ids) <= budget else check(decode(chat, [ids[:budget]]), [golds], score)[0]
        swapped = (correct < 1) & np.any(others, axis=0) if n > 1 else np.zeros(1)
        return {key: [float(value) if count else None for value, count in zip(values, counted[p])] for key, values in
                (("correct", correct), ("in_budget", in_budget), ("swapped", swapped))} | {"waits": wait_loops(text)}

    records = sample_records(model, chat, problems, groups.tolist(), s.eval_samples, numbers(s, "eval_budget", "eval_n")[which],
                             numbers(s, "eval_temperature", "eval_n")[which], s, path, f"{title}, {name}, N = {n}", mark)
    correct, in_budget, swapped = (np.array([record[key] for record in records], float).reshape(len(groups), s.eval_samples, n)
                                   for key in ("correct", "in_budget", "swapped"))  # (P, k, N), NaN where it does not count
    figures = {
        "accuracy": np.nanmean(correct),
        "accuracy_ci95": interval95(correct),
        "tokens_per_problem": np.mean([record["tokens"] for record in records]) / n,
        "loops_per_problem": np.mean([record["waits"] for record in records]) / n,
        "truncated": np.mean([record["truncated"] for record in records]),
        "budget": budget,
        "accuracy_in_budget": np.nanmean(in_budget),
        "accuracy_in_budget_ci95": interval95(in_budget),
        "accuracy_by_position": [np.nanmean(correct[:, :, i]) for i in range(n)],
        "interference": np.nanmean(swapped),
        "problems": len(problems),
        "samples": s.eval_samples,
    }
    say(f"{title}, {name}, N = {n}: {figures['accuracy']:.1%} right, {figures['tokens_per_problem']:.1f} tokens a problem")
    return figures, records


def change(before, after):
    """From the records of the same prompts before and after training: the change of the accuracy
    and of the tokens (as a share), each with a 95% interval, prompt against prompt. That of the
    accuracy counts two prompts more, as Agresti and Min (2005) do for matched pairs: where no
    answer changed, the truth may yet have. The tokens of one prompt have none."""

    def of_prompts(records, key):  # (P,): what each prompt adds to the sum
        return np.array([np.nansum(np.array(r[key], float)) for r in records]).reshape(records[-1]["prompt"] + 1, -1).sum(axis=1)

    def interval(value, spread):
        half = student95(len(spread) - 1) * spread.std(ddof=1) / math.sqrt(len(spread)) if len(spread) > 1 else math.nan
        return [max(-1.0, value - half), value + half] if half == half else None

    answers = sum(value is not None for r in after for value in r["correct"])
    right = (of_prompts(after, "correct") - of_prompts(before, "correct")) * (after[-1]["prompt"] + 1) / answers
    then, now = of_prompts(before, "tokens"), of_prompts(after, "tokens")
    ratio = now.mean() / then.mean()
    smoothed = np.append(right, [math.sqrt(0.5), -math.sqrt(0.5)])
    return {"accuracy": right.mean(), "accuracy_ci95": interval(smoothed.mean(), smoothed), "tokens": ratio - 1,
            "tokens_ci95": interval(ratio - 1, (now - ratio * then) / then.mean())}  # a ratio, to first order


def decode(chat, ids):
    return chat.tokenizer.decode_batch(ids, skip_special_tokens=True)


def progress(total, title):
    """A bar on a terminal; elsewhere nothing, for the lines that are printed tell enough."""
    return tqdm(total=total, desc=title, leave=False, disable=RANK > 0 or not sys.stderr.isatty())


# ----------------------------------------------------------------------------------------------
# Report


def table(results):
    """The result as text: a line for each benchmark and N, before and after side by side."""
    budget = next(iter(next(iter(results["before"].values())).values()))["budget"]
    width = max(len(name) for name in ["benchmark", *results["before"]])
    columns = [("accuracy %", "accuracy", 100, ".1f", True), (f"in {budget} tokens %", "accuracy_in_budget", 100, ".1f", False),
               ("tokens / problem", "tokens_per_problem", 1, ".1f", True), ("waits / problem", "loops_per_problem", 1, ".2f", False)]
    head, under = " " * (width + 5), f"{'benchmark':{width}}  {'N':>3}"
    for title, _, _, _, changes in columns:
        head += f" | {title:^{17 + 13 * changes}}"
        under += f" | {'before':>8} {'after':>8}" + f" {'change':>12}" * changes
    lines = [head, under, "-" * len(under)]
    for name, of_name in results["before"].items():
        for n, before in of_name.items():
            after, moved = (results[key].get(name, {}).get(n) for key in ("after", "change"))
            line = f"{name:{width}}  {n:>3}"
            for _, key, scale, form, changes in columns:
                then = format(after[key] * scale, form) if after else ""
                line += f" | {before[key] * scale:>8{form}} {then:>8}"
                if changes:
                    text = ""
                    if moved and key == "accuracy":
                        low, high = moved["accuracy_ci95"]
                        text = f"{100 * moved['accuracy']:+.1f} ±{50 * (high - low):.1f}"
                    elif moved:
                        text = f"{moved['tokens']:+.1%}"
                    line += f" {text:>12}"
            lines.append(line)
    return "\n".join(lines)


def dial(results, target):
    """N as a dial, read off the scaling curve: for each benchmark a sentence that names the N which
    answers at least `target` of the problems correctly with the fewest tokens a problem."""
    for name, of_name in (results["after"] or results["before"]).items():
        enough = [n for n, figures in of_name.items() if figures["accuracy"] >= target]
        best = min(enough, key=lambda n: of_name[n]["tokens_per_problem"]) if enough else max(of_name, key=lambda n: of_name[n]["accuracy"])
        figures, (low, high) = of_name[best], of_name[best]["accuracy_ci95"]
        found = (f"{figures['accuracy']:.1%} right (95% interval {low:.1%} to {high:.1%}) with {figures['tokens_per_problem']:.1f} tokens a problem")
        if not enough:
            yield f"{name}: no N of {', '.join(of_name)} reaches {target:.1%}; the most is N = {best}, {found}"
        else:
            doubt = "" if low >= target else "; the interval reaches below the target: evaluate more problems to be sure"
            yield f"{name}: at least {target:.1%} right with the fewest tokens: N = {best}, {found}{doubt}"


def write_completions(path, results, each=3):
    """Some prompts and completions of each benchmark and N for a person to read.
    results: {name: {n: (problems, records)}}."""
    out = []
    for name, of_name in results.items():
        for n, (problems, records) in of_name.items():
            known = {problem["id"]: problem for problem in problems}
            for r in [r for r in records if r["sample"] == 0][:each]:
                asked = [known[i] for i in r["problems"]]
                out += ["=" * 100, f"{name}, N = {n}", "", batch_prompt([p["problem"] for p in asked]), "",
                        f"--- completion of {r['tokens']} tokens: {sum(filter(None, r['correct'])):g} of {n} right; the answers are "
                        + ", ".join(p["answer"] for p in asked), "", r["completion"], ""]
    write_text(path, "\n".join(out) + "\n")


def plot(path, results, metrics):
    """results.png: for each benchmark tokens and accuracy over N (the task-scaling law) and accuracy
    over the position in the prompt; below them the training."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results["before"])
    figure, axes = pyplot.subplots(len(names) + bool(metrics), 3, figsize=(14, 3.8 * (len(names) + bool(metrics))), squeeze=False)
    for row, name in zip(axes, names):
        for stage, colour in (("before", "tab:gray"), ("after", "tab:blue")):
            if not (figures := results[stage].get(name)):
                continue

            def over_n(key):
                return [of_n[key] for of_n in figures.values()]

            xs, budget = [int(n) for n in figures], over_n("budget")[0]
            row[0].plot(xs, over_n("tokens_per_problem"), "o-", color=colour, label=stage)
            row[1].plot(xs, over_n("accuracy"), "o-", color=colour, label=f"{stage}, nobody cut")
            row[1].fill_between(xs, *zip(*over_n("accuracy_ci95")), color=colour, alpha=0.2, linewidth=0)
            row[1].plot(xs, over_n("accuracy_in_budget"), "o--", color=colour, label=f"{stage}, {budget} tokens")
            for n, by_position in zip(xs, over_n("accuracy_by_position")):
                row[2].plot(range(1, n + 1), by_position, ".-", color=colour, alpha=0.2 + 0.8 * (n / max(xs)), label=f"{stage}, N = {n}")
        for axis, title, label in zip(row, ("tokens per problem", "accuracy", "accuracy by position"),
                                      ("N problems in the prompt",) * 2 + ("position in the prompt",)):
            axis.set(title=f"{name}: {title}", xlabel=label, ylim=(0, None))
            axis.legend(fontsize=8)
    if metrics:
        for axis, keys in zip(axes[-1], (["tokens_per_problem"], ["accuracy", "truncated"], ["entropy"])):
            for key in keys:
                axis.plot([m["step"] for m in metrics], [m[key] for m in metrics], label=key.replace("_", " "))
            axis.set(title=f"training: {', '.join(keys).replace('_', ' ')}", xlabel="step", ylim=(0, None))
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------
# Solving: what a user of a trained model deploys


def solve(s):
    """Answers the problems of a file, N a prompt. Problems that the budget did not reach go round
    again, in prompts of half as many, down to one. answers.jsonl has a line a problem, in the order
    of the file: {id, answer (None: not reached), n, rounds, tokens (its share of all completions
    that it was in), completion, correct (where the file knows)}."""
    problems, (n,), (budget,) = load_problems(s.solve, answers=False), numbers(s, "n"), numbers(s, "budget")
    extract, score = load_reward(s.reward)
    model, chat, about = load(s)
    out, started = of_all_ranks(open_out(s) if RANK == 0 else None)[0], time.time()
    say(f"{about}; {len(problems)} problems to solve; writing to {out}")
    entries = [{"id": p["id"], "answer": None, "n": 0, "rounds": 0, "tokens": 0.0, "completion": ""} for p in problems]
    waiting, size, rounds, tokens = list(range(len(problems))), n, 0, 0
    while waiting and size:
        rounds += 1
        groups = [waiting[first : first + size] for first in range(0, len(waiting), size)]
        with gathered(model) as whole:
            records = sample_records(whole, chat, problems, groups, 1, budget, s.temperature, s, out / f"round-{rounds}.jsonl",
                                     f"round {rounds}, N = {size}", lambda p, ids, text: {})
        for group, record in zip(groups, records):
            tokens += record["tokens"]
            for i, answer in zip(group, extract(record["completion"], len(group))):
                entries[i].update(answer=answer, n=len(group), rounds=rounds, completion=record["completion"],
                                  tokens=entries[i]["tokens"] + record["tokens"] / len(group))
                if problems[i]["answer"] is not None:
                    golds = [problems[j]["answer"] or "" for j in group]
                    entries[i]["correct"] = check([record["completion"]], [golds], score)[0, group.index(i)]
        waiting = [i for i in waiting if entries[i]["answer"] is None]
        size //= 2
    if RANK == 0:
        write_lines(out / "answers.jsonl", entries)
    marks, seconds = [e["correct"] for e in entries if "correct" in e], time.time() - started
    summary = {"problems": len(problems), "n": n, "budget": budget, "tokens_per_problem": tokens / len(problems),
               "problems_per_second": len(problems) / seconds, "seconds": seconds, "again": sum(e["rounds"] > 1 for e in entries),
               "unanswered": len(waiting), "accuracy": np.mean(marks) if marks else None}
    if RANK == 0:
        write_json(out / "results.json", summary)
    say("\nproblems | N | budget | tokens / problem | problems / second | asked again | unanswered | right")
    say(f"{len(problems):>8} | {n} | {budget:>6} | {summary['tokens_per_problem']:>16.1f} | {summary['problems_per_second']:>17.2f} | "
          f"{summary['again']:>11} | {len(waiting):>10} | " + (f"{summary['accuracy']:.1%}" if marks else "unknown"))
    say(f"In {out}: answers.jsonl, results.json")


# ----------------------------------------------------------------------------------------------
# Files: checkpoints and the trained model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
MAY_CHANGE = {"steps", "resume", "out", "save_every", "rows", "micro_tokens", "checkpointing", "shard", "target_accuracy"}  # when a run goes on


def write_text(path, text):
    """Writes a file in one move: a reader sees the old one or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def flush(path):
    """Waits until a file, or the list of files of a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_lines(path, entries):
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_model(out, model, source):
    """The model with its tokenizer as a Hugging Face directory."""
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, out / name)


def save_checkpoint(out, step, model, master, optimizer):
    """All that the step after `step` depends on, apart from out/settings.json: master weights and
    AdamW's state. The order of the data and every draw are functions of the settings and the step.
    Written aside, flushed and renamed, then all but the last two are removed: whenever the machine
    stops, the last `checkpoint-*` is whole. Tensors are safetensors, the rest is JSON: loading it
    executes nothing. With --shard each rank writes a part, and any number of ranks can read them."""
    target = out / f"checkpoint-{step:06d}"
    temporary = out / "checkpoint.tmp"
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    names = [name for name, _ in model.named_parameters()]
    state = {f"{key}.{name}": value for name, weight in zip(names, master)
             for key, value in ({"weight": weight.detach()} | optimizer.state[weight]).items()}
    if model.divided:
        of_all_ranks(None)  # the directory is there
        write_parts(state, temporary)
    elif RANK == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "state.safetensors")
        flush(temporary / "state.safetensors")
    if RANK > 0:
        return
    write_json(temporary / "state.json", {"step": step})
    flush(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    flush(out)
    for old in sorted(out.glob("checkpoint-*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(out, model, master, optimizer):
    """Restores the last checkpoint in place and returns its step, 0 where there is none yet."""
    checkpoints = sorted(out.glob("checkpoint-*"))
    if not checkpoints:
        return 0
    from warnings import catch_warnings, simplefilter

    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(checkpoints[-1]))  # reads safetensors, one file or the parts of any number of ranks
    try:
        step, known, state = read_json(checkpoints[-1] / "state.json")["step"], reader.read_metadata().state_dict_metadata, {}
        if gaps := [key for key, whole in known.items() if sum(math.prod(part.sizes) for part in whole.chunks) != math.prod(whole.size)]:
            raise KeyError(f"not all of {gaps[0]}")  # the file of a rank is gone
        for (name, _), weight in zip(model.named_parameters(), master):
            state[f"weight.{name}"] = weight.detach()
            if f"step.{name}" in known:  # else every group was equal so far, and AdamW has no state
                optimizer.state[weight] = {"step": torch.tensor(0.0)} | {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                state |= {f"{key}.{name}": value for key, value in optimizer.state[weight].items()}
        with catch_warnings():
            simplefilter("ignore")  # "assuming the intent is to load in a single process"
            load(state, storage_reader=reader, no_dist=True)
    except (OSError, SafetensorError, KeyError, TypeError, CheckpointException) as error:
        error = cause_of(error)
        raise UserError(f"{checkpoints[-1]} is damaged ({error}): remove it, and --resume takes the one before") from None
    with torch.no_grad():
        for computed, weight in zip(model.parameters(), master):
            if computed is not weight:
                computed.copy_(weight)
    return step


def write_parts(state, path):
    """Writes tensors that are divided among the ranks: each rank one safetensors file of its parts,
    which says where they belong. Raises on every rank what went wrong on any."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    try:
        save(state, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))  # which flushes, too
    except CheckpointException as error:
        raise cause_of(error) from None


def cause_of(error):
    """What stands behind torch.distributed.checkpoint's exception, which quotes whole tracebacks."""
    return next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error


# ----------------------------------------------------------------------------------------------
# Several processes: torchrun starts K of them. Every draw is a function of (seed, step, prompt, sample,
# token), so K processes sample what one would; each samples its share of the prompts, all of them learn
# from a share of the completions, and the sum of their gradients is the one process's gradient.

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def of_all_ranks(value):
    """The values of all ranks, in their order: a list of K, the same on each."""
    if RANKS == 1:
        return [value]
    values = [None] * RANKS
    dist.all_gather_object(values, value)
    return values


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def sum_gradients(master):
    """Adds up the gradients of all ranks, in place. FSDP2 has done it already."""
    for weight in master if RANKS > 1 and not hasattr(master[0], "to_local") else ():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        dist.all_reduce(weight.grad)


def divide(model, dtype, device):
    """--shard: each rank keeps its share of every float32 weight, and so of gradients and AdamW's state.
    A layer's weights are gathered, in the type `dtype`, just before they are used and freed after; its
    gradients are summed over the ranks, in float32, and each keeps its share of the sum. FSDP2 (PyTorch
    FSDP, arXiv 2304.11277; ZeRO stage 3, arXiv 1910.02054)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(torch.device(device).type, (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(model, "hidden")  # what `head` needs stays gathered until the gradient is through
    model.divided = dtype


def own_part(tensor):
    """What this rank keeps of a tensor that is divided among the ranks; all of any other."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextlib.contextmanager
def gathered(model):
    """The whole model on each rank for as long as it samples: with --shard a copy, gathered once and
    freed after, for to gather each layer anew for each token would cost more than to compute it."""
    if not model.divided:
        yield model
        return
    with torch.device("meta"):
        whole = Transformer(model.config)
    whole.load_state_dict({name: weight.to(model.dtype).full_tensor().clone()  # without the padding of shares that are not equal
                           for name, weight in model.state_dict().items()}, assign=True)
    yield whole
    whole.to_empty(device="meta")


def joined(parts, samples):
    """The rollout of all prompts, in their order. parts[k] is that of the prompts k, k + K, k + 2K, ..."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.tokens.shape[1] for part in parts if part)
    order = [(row // samples * len(parts) + k, row % samples, k, row) for k, part in enumerate(parts) if part
             for row in range(len(part.lengths))]

    def field(name):
        rows = [getattr(parts[k], name)[row] for _, _, k, row in sorted(order)]
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) if row.dim() else row for row in rows])

    return Rollout(*map(field, ("tokens", "logprobs", "lengths", "truncated")))


def shares(costs):
    """Divides jobs among the ranks so that each has about the same cost, dearest first: K lists."""
    parts, loads = [[] for _ in range(RANKS)], [0.0] * RANKS
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        least = loads.index(min(loads))
        parts[least].append(job)
        loads[least] += costs[job]
    return parts


# ----------------------------------------------------------------------------------------------
# What may go wrong


@contextlib.contextmanager
def undivided():
    """What stands within is done whole: Ctrl-C and SIGTERM wait for its end."""
    came = []
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came:
        handlers[number](number, None)


def on_signal(number, frame):
    raise KeyboardInterrupt(number)


def not_finite(model, master, loss):
    """Names what in a step is not a finite number, "" where all is."""
    bad = [f"the gradient of {name}" for (name, _), weight in zip(model.named_parameters(), master)
           if weight.grad is not None and not torch.isfinite(own_part(weight.grad)).all()]
    return next(filter(None, of_all_ranks(bad[0] if bad else "" if math.isfinite(loss) else "the loss")), "")


CUT = ("warning: {truncated:.0%} of the completions are cut by the budget of {budget} tokens; if the reward does not rise, "
       "raise --budget or lower --n")
EQUAL = ("warning: in {zero_variance:.0%} of the groups all samples earn the same, and teach nothing; if that lasts, "
         "raise --samples, or take problems that are neither too easy nor too hard")
NOTHING = ("warning: three steps without a single right answer; see whether the completions follow the format "
           "(completions-before.txt), take easier problems, or raise --budget")
COLLAPSE = ("warning: the entropy has fallen to {entropy:.4f} nats a token, less than a tenth of the first step's: completions "
            "are nearly all alike, and little is left to learn from; lower --lr, or stop at an earlier checkpoint")


def warnings(metrics):
    """The ways in which such a run silently learns nothing, as sentences."""
    last, three, ten = metrics[-1], metrics[-3:], metrics[-10:]
    found = set()
    if last["truncated"] > 0.95 and (last["accuracy"] < 0.1 or all(m["truncated"] > 0.95 for m in ten) and len(ten) == 10):
        found.add(CUT)
    if len(three) == 3 and all(m["zero_variance"] > 0.9 for m in three):
        found.add(EQUAL)
    if len(three) == 3 and all(m["accuracy"] == 0 for m in three):
        found.add(NOTHING)
    if last["entropy"] < (metrics[0]["entropy"] or 0) / 10:
        found.add(COLLAPSE)
    return found


# ----------------------------------------------------------------------------------------------
# The loop


def load(s):
    """Returns the model, its Chat, and a line about them."""
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype} is not supported: use float32 or bfloat16")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device} is not to be had on this machine: use cpu")
    if device.startswith("cuda") and RANKS == 1:
        if (number := torch.device(device).index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device} is not to be had: this machine has {torch.cuda.device_count()} of them, counted from cuda:0")
        torch.cuda.set_device(number)  # graphs are captured on the current device
    if RANKS > 1 and not dist.is_initialized():
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        # A restart must not find the addresses that the processes before it have left in torchrun's store.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of process group {os.environ.get('TORCHELASTIC_RUN_ID')}"
        store, *_ = next(dist.rendezvous("env://"))
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=dist.PrefixStore(attempt, store), rank=RANK, world_size=RANKS,
                                timeout=timedelta(days=1))  # a rank that has sampled waits for the slowest: NCCL would give up after ten minutes
    chat = load_chat(find_model(s.model))
    if s.shard and RANKS > 1:
        model = Transformer.from_pretrained(chat.path, torch.float32, device, lambda model: divide(model, getattr(torch, dtype), device))
    else:
        model = Transformer.from_pretrained(chat.path, getattr(torch, dtype), device)
    if chat.tokenizer.get_vocab_size() > model.config.vocab_size:
        raise UserError(f"the tokenizer in {s.model} has {chat.tokenizer.get_vocab_size()} tokens, but the model "
                        f"only {model.config.vocab_size}: the two do not belong together")
    model.checkpointing = s.checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    return model, chat, f"{os.path.relpath(chat.path)}: {parameters / 1e6:.2f}M parameters, {dtype} on {device}"


def load_benchmarks(s):
    """The problems of each file of --eval-data, {name of the file: problems}."""
    benchmarks = {}
    for path in s.eval_data.split(","):
        if Path(path).stem in benchmarks:
            raise UserError(f"--eval-data names two files called {Path(path).stem}: their results could not be told apart")
        benchmarks[Path(path).stem] = load_problems(path)[: s.eval_problems]
    return benchmarks


def check_settings(s, model, chat, problems, benchmarks):
    """Everything that can be wrong with the settings shows before anything is written."""

    def first_prompt(problems, n, budget):
        group = [problems[i] for i in draw_groups(problems, n, s.seed, 0, 1)[0]]
        tokens, limit = len(encode_chat(chat, batch_prompt([p["problem"] for p in group]))), model.config.max_position_embeddings
        if tokens + budget > limit:
            raise UserError(f"a prompt of {tokens} tokens and a budget of {budget} exceed the {limit} positions of "
                            "this model: lower the budget or N")
        return [p["answer"] for p in group]

    for of_name in benchmarks.values():
        for n, budget in zip(numbers(s, "eval_n"), numbers(s, "eval_budget", "eval_n")):
            first_prompt(of_name, n, budget)
    for n, budget in zip(numbers(s, "n"), numbers(s, "budget", "n")):
        golds = first_prompt(problems, n, budget)
        bare = "\n\n".join(f"### Problem {i}\nAnswer {i}: \\boxed{{{gold}}}" for i, gold in enumerate(golds, start=1))
        need = len(chat.tokenizer.encode(bare, add_special_tokens=False).ids)
        if budget < need:
            raise UserError(f"a budget of {budget} tokens cannot hold even the bare answers to {n} problems "
                            f"(about {need} tokens): raise --budget or lower --n")
    for name, of_name in benchmarks.items():
        if shared := {p["problem"] for p in problems} & {p["problem"] for p in of_name}:
            say(f"warning: {len(shared)} problems of {name} are in --data too, so accuracy after training is flattered")


def train(s, model, master, optimizer, chat, problems, score, out, first, metrics):
    """Steps first + 1 to --steps of GRPO. On Ctrl-C or SIGTERM the last whole step is saved."""
    ns, budgets = numbers(s, "n"), numbers(s, "budget", "n")
    bar, warned, bad, done = progress(s.steps, "training"), set(), [], first
    bar.update(first)

    def tell(line):
        if RANK == 0:
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    try:
        for step in range(first + 1, s.steps + 1):
            n, budget = ns[(step - 1) % len(ns)], budgets[(step - 1) % len(ns)]
            groups = draw_groups(problems, n, s.seed, (step - 1) // len(ns) * s.groups, s.groups)  # (P, N)
            golds = [[problems[i]["answer"] for i in group] for group in groups for _ in range(s.samples)]  # (R, N)
            prompts = [encode_chat(chat, batch_prompt([problems[i]["problem"] for i in group])) for group in groups]

            # Sample. The budget bites here: `budget` tokens for all N problems of a prompt, then the cut.
            clock = time.time()
            mine = range(RANK, len(prompts), RANKS)  # the prompts of this rank
            with gathered(model) as whole:
                part = with_less_memory(lambda: generate(
                    whole, [prompts[p] for p in mine], s.samples, budget, eos_ids=chat.eos_ids, temperature=s.temperature,
                    seed=s.seed, step=step, prompt_keys=mine, rows=rows_that_fit(whole, s.rows, max(map(len, prompts)) + budget)),
                    lambda: fewer_rows(s)) if mine else None
            rollout = joined(of_all_ranks(part), s.samples)
            sampling_seconds = time.time() - clock
            lengths = rollout.lengths.numpy()  # (R,)
            completions = [row[:length].tolist() for row, length in zip(rollout.tokens, lengths)]
            texts = decode(chat, completions)

            # Reward = share of the N problems answered correctly; advantage = reward - mean of its group.
            correct = check(texts, golds, score)  # (R, N)
            penalties = s.length_penalty * lengths / budget  # (R,)
            rewards = correct.mean(axis=1) - penalties  # (R,)
            advantages = advantages_of(rewards.reshape(s.groups, s.samples), s.normalize_std).reshape(-1)  # (R,)
            unsure = 0.0
            if s.credit == "togo":
                sections = list(map(functools.partial(sections_of, chat, score=score), texts, completions, correct, golds))
                unsure = np.mean([section is None for section in sections])
                advantages = advantages_to_go(correct, penalties, sections, s.samples, s.normalize_std)  # R arrays (T,)
            learns = np.array([np.any(advantage) for advantage in advantages])  # (R,)
            zero_variance = 1 - learns.reshape(s.groups, s.samples).any(axis=1).mean()

            # Learn. Rows with advantage 0 have no gradient and are left out of the sum; the constant
            # that divides it counts all P * G rows.
            clock = time.time()
            live = np.flatnonzero(learns)

            # Each rank takes whole groups, of about as many tokens as the others.
            tokens = np.bincount(live // s.samples, lengths[live], minlength=len(prompts))
            mine = np.flatnonzero(np.isin(np.arange(len(completions)) // s.samples, shares(tokens)[RANK]))
            mine = mine[np.isin(mine, live)]

            def gradient():
                found = with_less_memory(lambda: accumulate_gradient(
                    model, master, prompts, [r // s.samples for r in mine], [completions[r] for r in mine],
                    [rollout.logprobs[r, : lengths[r]] for r in mine], [advantages[r] for r in mine],
                    constant=len(completions) * budget, s=s), lambda: smaller_passes(model, master, s, begun=True))
                sum_gradients(master)
                loss, gap_sum, gap_max = zip(*of_all_ranks(found))
                return sum(loss), sum(gap_sum) / lengths[live].sum(), max(gap_max)

            loss, gap_mean, gap_max = gradient() if len(live) else (0.0, 0.0, 0.0)
            grad_norm = 0.0
            with undivided():  # a step is taken whole and written down, or not at all
                cause = "" if rollout.logprobs.isfinite().all() else "what the model says of its own samples"
                for update in range(s.updates if len(live) and not cause else 0):
                    if update:
                        loss, gap_mean, gap_max = gradient()
                    if cause := not_finite(model, master, loss):
                        break
                    norm = torch.nn.utils.clip_grad_norm_(master, s.grad_clip)
                    grad_norm = (norm.full_tensor() if model.divided else norm).item()  # of all ranks' parts
                    optimizer.step()
                    optimizer.zero_grad()
                    with torch.no_grad():
                        for ours, computed in zip(master, model.parameters()):
                            if ours is not computed:
                                computed.copy_(ours)
                bad = bad + [f"{cause} in step {step} (problems {', '.join(problems[i]['id'] for i in groups[0])}, ...)"] if cause else []
                if bad:
                    tell(f"warning: {bad[-1]} is not finite: the step is skipped")
                    optimizer.zero_grad()
                training_seconds = time.time() - clock

                metrics.append({
                    "step": step, "n": n, "budget": budget, "reward": rewards.mean(), "accuracy": correct.mean(),
                    "accuracy_by_position": correct.mean(axis=0).tolist(),
                    "tokens_per_problem": lengths.mean() / n, "truncated": rollout.truncated.double().mean().item(),
                    "zero_variance": zero_variance, "credit_unsure": unsure, "loops_per_problem": sum(map(wait_loops, texts)) / correct.size,
                    # The mean of -logprob over what was sampled estimates the entropy of a token, unbiased.
                    "entropy": -rollout.logprobs.double().sum().item() / lengths.sum(),
                    "loss": loss, "grad_norm": grad_norm, "skipped": bool(bad), "logprob_gap": gap_mean, "logprob_gap_max": gap_max,
                    "sampling_seconds": sampling_seconds, "training_seconds": training_seconds,
                    "tokens_per_second": lengths.sum() / (sampling_seconds + training_seconds),
                })
                with open(out / "metrics.jsonl" if RANK == 0 else os.devnull, "a", encoding="utf-8") as file:
                    file.write(json.dumps({key: None if isinstance(value, float) and not math.isfinite(value) else value
                                           for key, value in metrics[-1].items()}) + "\n")  # JSON knows no NaN
                done = step
            m = metrics[-1]
            tell(f"step {step:>{len(str(s.steps))}}/{s.steps}" + (f"  N {n}" if len(ns) > 1 else "") +
                 f"  reward {m['reward']:.3f}  tokens/problem {m['tokens_per_problem']:5.1f}  waits {m['loops_per_problem']:.2f}  "
                 f"cut {m['truncated']:4.0%}  equal groups {zero_variance:4.0%}  {sampling_seconds + training_seconds:.1f} s")
            for warning in warnings(metrics) - warned:
                tell(warning.format(**m))
                warned.add(warning)
            bar.update()
            if len(bad) == 3:
                raise UserError(f"three steps in a row were not finite: {'; '.join(bad)}. The last checkpoint in {out} is from before; "
                                "go on from it with a lower --lr, or look at these problems and at the model's weights")
            if not bad and (step % s.save_every == 0 or step == s.steps):
                with undivided():
                    save_checkpoint(out, step, model, master, optimizer)
    except KeyboardInterrupt:
        if not bad and RANK == 0 and not model.divided:  # else it would need the parts of all ranks, which stop where they are
            with undivided():
                save_checkpoint(out, done, model, master, optimizer)
            say(f"saved step {done} in {out}")
        raise
    finally:
        bar.close()


def run(s):
    started = time.time()
    problems, benchmarks, (_, score) = load_problems(s.data), load_benchmarks(s), load_reward(s.reward)
    model, chat, about = load(s)
    # Float32 master weights: the model's own if it is computed in float32, else copies.
    master = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(master, lr=s.lr, weight_decay=s.weight_decay, foreach=False)  # foreach takes 4 bytes a weight more
    check_settings(s, model, chat, problems, benchmarks)
    out = of_all_ranks(open_out(s) if RANK == 0 else None)[0]
    if not out.is_dir():
        raise UserError(f"there is no {out} here: processes on several machines need an --out on a file system that all of them share")
    say(f"{about}; {len(problems)} training problems, {sum(map(len, benchmarks.values()))} held out; writing to {out}")
    results, metrics = {"settings": dataclasses.asdict(s), "before": {}, "after": {}, "change": {}}, []

    def evaluate_all(stage, step):
        found = {}
        for name, of_name in benchmarks.items():
            for n in numbers(s, "eval_n"):
                path = out / f"evaluation/{name}-n{n}-step{step}.jsonl"
                with gathered(model) as whole:
                    figures, records = evaluate(whole, chat, name, of_name, n, s, path, f"{stage} training", score)
                results[stage].setdefault(name, {})[str(n)] = figures
                found.setdefault(name, {})[str(n)] = of_name, records
        if RANK == 0:
            write_completions(out / f"completions-{stage}.txt", found)
            write_json(out / "results.json", results)
        return found

    # --- before training; a resumed run reads what it has found
    before = evaluate_all("before", 0)
    first = load_checkpoint(out, model, master, optimizer) if s.resume else 0
    if s.resume:
        if (out / "metrics.jsonl").exists():  # a line a step; what was written after the checkpoint comes again
            metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[:first]]
        if RANK == 0:
            write_lines(out / "metrics.jsonl", metrics)
        say(f"going on from step {first} in {out}")

    # --- training
    if s.steps > first:
        passes_that_fit(model, master, s)
    train(s, model, master, optimizer, chat, problems, score, out, first, metrics)

    # --- after training
    if s.steps:
        after = evaluate_all("after", max(first, s.steps))
        results["change"] = {name: {n: change(of_name[n][1], after[name][n][1]) for n in of_name} for name, of_name in before.items()}
    results["seconds"] = time.time() - started
    with gathered(model) as whole:
        if RANK == 0 and s.steps:
            write_model(out / "model", whole, chat.path)
    if RANK == 0:
        write_json(out / "results.json", results)
        plot(out / "results.png", results, metrics)
        say("\n" + table(results))
        for sentence in dial(results, s.target_accuracy) if s.target_accuracy else ():
            say("\n" + sentence)
        say(f"\n{results['seconds']:.0f} s in all. In {out}: results.json, metrics.jsonl, completions-*.txt, evaluation/"
            + (", model/ (a Hugging Face directory)" if s.steps else ""))


def open_out(s):
    """Makes the directory for this run, or opens that of the run that goes on. Raises UserError
    rather than write into a used one, or go on with settings that the run's numbers depend on and
    that it did not begin with."""
    if s.resume:
        if not s.out:
            raise UserError("--resume needs --out, the directory of the run that should go on")
        if not (Path(s.out) / "settings.json").is_file():
            raise UserError(f"--resume finds no run in {s.out}: start it without --resume, in a new --out")
        saved = read_json(Path(s.out) / "settings.json")
        for name, value in dataclasses.asdict(s).items():
            if name not in MAY_CHANGE and value != saved.get(name):
                raise UserError(f"--resume: --{name.replace('_', '-')} was {saved.get(name)} and is now {value}: "
                                "a run goes on with the settings it began with")
        return Path(s.out)
    out = Path(s.out or next(f"out/run-{k}" for k in itertools.count(1) if not Path(f"out/run-{k}").exists()))
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is in use: name a new directory, or go on with --resume")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "settings.json", dataclasses.asdict(s))
    except OSError as error:
        raise UserError(f"cannot make the directory --out {out}: {error.strerror}") from None
    return out


def main(argv=None):
    s = None
    signal.signal(signal.SIGTERM, on_signal)  # a machine that is taken away says so first
    signal.signal(signal.SIGINT, on_signal)
    try:
        s = parse_settings(argv)
        if RANKS > 1 and not s.out:
            raise UserError("several processes need --out, so that torchrun's restart finds the run")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (Path(s.out) / "settings.json").is_file():
            s.resume = True  # a process died, and torchrun has started all of them again
        solve(s) if s.solve else run(s)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        print(f"bcr.py: error: {error}" + f" (process {RANK} of {RANKS})" * (RANKS > 1), file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # an orderly end would wait for what the other processes have begun
        sys.exit(2)
    except (OSError, SafetensorError) as error:  # a full disk, a directory that is gone
        where = f" ({error.filename})" if getattr(error, "filename", None) else ""
        print(f"bcr.py: error: {getattr(error, 'strerror', None) or error}{where}: what was written before is whole; mend it, and go on with "
              "the same flags and --resume --out DIR", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if RANKS == 1 or "by peer" not in str(error):
            raise
        print(f"bcr.py: process {RANK} of {RANKS} ends, because another has ended: the cause is what that one says", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print("\nstopped; go on with the same flags and --resume --out DIR", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


if __name__ == "__main__":
    main()
