"""
Batched Contextual Reinforcement (BCR, arXiv 2604.02322): N problems in one prompt, one token budget for the
whole answer, and a reward that counts how many of the N are answered correctly. A problem that the budget
does not reach earns nothing, so the model learns to reason shorter. Nothing else in this file asks it to.

    python bcr.py --n 4                        the shipped model on the shipped problems
    python bcr.py --n 1 --budget 512           plain GRPO: one problem, a budget that truncates nothing
    python bcr.py --n 3 --model DIR --data FILE.jsonl --eval-data FILE.jsonl --budget 5120 --lr 1e-6
    torchrun --nproc-per-node 8 -- bcr.py ...  the same on eight GPUs (CPU cores need no torchrun)

Read from the top to the end of `train`; what follows it are reports, checks and the command line. The
algorithm is GRPO (arXiv 2402.03300) without these parts:

- No KL term and no reference model: rewards are verifiable.
- No division by the response length: a mean over each sequence is itself a length incentive and would falsify
  what BCR claims (Dr. GRPO, arXiv 2503.20783). The loss is divided by a constant.
- No division by the group's standard deviation (`--normalize-std` restores it).
- No filtering of truncated samples (DAPO's overlong filtering, arXiv 2503.14476): truncation IS the pressure.
- No top-k and no top-p: training uses exactly the distribution that was sampled from.

Shapes: P prompts in a step, G samples of each, N problems in a prompt, R = P * G completions in the order
(prompt, sample), T tokens of one completion.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import dataclasses
import itertools
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import distributed
import evaluate
from data.chat import check_budget, copy_tokenizer, decode, encode_chat
from data.files import UserError, write_json, write_lines, write_text
from data.problems import batch_prompt, draw_groups, load_benchmarks, load_problems
from distributed import say
from evaluate import flag
from rollout import Completion, token_logprobs

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    # The task
    n: tuple = flag((4,), "problems in a prompt (N); several, as in 2,4,8, take turns, one N per step")
    budget: tuple = flag((160,), "tokens for a whole completion, all N problems together; one, or one per N")
    model: str = flag(str(HERE / "data/tiny/model"), "Hugging Face model: a directory, or a name on the Hub")
    data: str = flag(str(HERE / "data/tiny/train.jsonl"), "training problems (JSONL)")
    reward: str = flag("", "Python file with your own score(completion, golds) -> N numbers from 0 to 1")
    # Training
    steps: int = flag(40, "training steps", least=1)
    groups: int = flag(16, "prompts in a step (P)", least=1)
    samples: int = flag(8, "completions of each prompt (G), the group whose mean is the baseline", least=2)
    lr: float = flag(1e-4, "AdamW's learning rate; 1e-6 suits a model of a billion parameters", 0, 1)
    temperature: float = flag(1.0, "sampling temperature, which the loss applies too", least=1e-6)
    updates: int = flag(1, "optimizer steps per rollout; above 1 the ratio is clipped", least=1)
    clip_low: float = flag(0.2, "the ratio is clipped below 1 minus this ...", 0, 1)
    clip_high: float = flag(0.28, "... and above 1 plus this (DAPO's clip-higher)", least=0)
    normalize_std: bool = flag(False, "divide advantages by the group's standard deviation, as GRPO does")
    length_penalty: float = flag(0.0, "baseline: subtract this times tokens / budget from the reward", 0)
    grad_clip: float = flag(1.0, "maximum norm of the gradient; 0 does not clip", least=0)
    weight_decay: float = flag(0.0, "AdamW's weight decay", least=0)
    # Evaluation, before and after training
    eval_data: str = flag(str(HERE / "data/tiny/heldout.jsonl"), "problems to evaluate on; files with commas")
    eval_n: tuple = flag((1, 2, 4, 8), "values of N to evaluate at")
    eval_problems: int = flag(512, "problems of each file, the same ones at each N", least=1)
    eval_samples: int = flag(1, "completions of each prompt (k): the accuracy is avg@k", least=1)
    eval_budget: tuple = flag((1536,), "tokens for a whole completion; one number or one per N")
    eval_temperature: float = flag(1.0, "sampling temperature of the evaluation", least=0)
    # The run
    skip_long: bool = flag(False, "leave out problems whose prompt does not fit the model's positions")
    seed: int = flag(0, "seed of the order of the data and of every sampled token", 0, 2**63 - 1)
    out: str = flag("", "output directory (default: the next free out/run-1, -2, ...)")
    resume: bool = flag(False, "continue from the last checkpoint in --out")
    save_every: int = flag(10, "steps between checkpoints", least=1)
    # The machine
    device: str = flag("auto", "cpu, cuda, or auto: cuda if available")
    dtype: str = flag("auto", "auto: bfloat16 on cuda, else float32", choices=("auto", "float32", "bfloat16"))
    rows: int = flag(256, "completions sampled at a time; lower it if sampling runs out of memory", least=1)
    micro_tokens: int = flag(4096, "tokens in a training pass, with padding; lower it likewise", least=1)
    checkpointing: bool = flag(False, "recompute activations in the backward pass instead of keeping them")
    processes: int = flag(0, "processes on a CPU; 0: one per core for a small model (at most 8)", 0, 64)
    shard: bool = flag(False, "divide weights, gradients and AdamW's state among the processes (FSDP2)")


# ----------------------------------------------------------------------------------------------
# Advantages


@dataclass
class Rollout:
    """The completions of one step with their rewards."""

    groups: list[list[dict]]  # (P, N) problems
    prompts: list[list[int]]  # P lists of token ids
    completions: list[Completion]  # R
    texts: list[str]  # R
    correct: np.ndarray  # (P, G, N), 1 or 0
    rewards: np.ndarray  # (P, G)


def group_advantages(rewards, normalize_std=False):
    """A_g = r_g - mean over the group of r. rewards: (P, G) -> (P, G).

    Source: GRPO (arXiv 2402.03300, section 4.1.2), without the division by the standard deviation as in Dr.
    GRPO (arXiv 2503.20783). With rewards [1, 0.5, 0.5, 0] the advantages are [0.5, 0, 0, -0.5]."""
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    advantages[rewards.max(axis=1) == rewards.min(axis=1)] = 0.0  # exactly, whatever the rounding of the mean
    if normalize_std:
        advantages /= rewards.std(axis=1, keepdims=True) + 1e-6
    return advantages


def token_advantages(rollout, chat, s):
    """The advantage of each token: all tokens of a completion have the completion's. R arrays (T,).

    To change how credit is assigned, replace this function: data/study/credit_togo.py does."""
    advantages = group_advantages(rollout.rewards, s.normalize_std)  # (P, G)
    return [np.full(len(c.tokens), a) for c, a in zip(rollout.completions, advantages.flat)]


# ----------------------------------------------------------------------------------------------
# Loss and gradient


@dataclass
class Row:
    """One completion to learn from."""

    prompt: list[int]
    tokens: list[int]  # (T,), EOS included: stopping is an action
    sampler_logprobs: torch.Tensor  # (T,)
    advantages: np.ndarray  # (T,)


def policy_loss(logprobs, old_logprobs, advantages, constant, clip_low, clip_high):
    """-1/constant * sum_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t), where rho_t is
    pi(token_t) / pi_old(token_t). All inputs are (M,); returns a scalar.

    Source: PPO (arXiv 1707.06347, equation 7); a range per side: DAPO (arXiv 2503.14476, section 3.1)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / constant


def micro_batches(rows, max_tokens):
    """The rows of each prompt, sorted by length, in batches of at most `max_tokens` tokens with padding."""
    batches = []
    for prompt, group in itertools.groupby(rows, key=lambda row: row.prompt):
        batches.append([])
        for row in sorted(group, key=lambda row: len(row.tokens)):
            if batches[-1] and len(prompt) + (len(batches[-1]) + 1) * len(row.tokens) > max_tokens:
                batches.append([])
            batches[-1].append(row)
    return batches


def accumulate_gradient(model, master, rows, constant, s):
    """Sets master[i].grad to the gradient of the loss of `rows`, computed by all processes together. Returns
    {"loss", "gap", "gap_max"}: gap is the sum over tokens of |logprob here - logprob in the sampler|.

    The loss of each micro-batch is a sum divided by the same constant, so their gradients add up to the
    gradient of the whole. On a CPU they are added in float64, where float32 numbers of similar size add up
    without rounding: the result does not depend on which process computes which batch."""
    dtype = torch.float64 if model.device.type == "cpu" else torch.float32
    sums, stats = [torch.zeros_like(weight, dtype=dtype) for weight in master], []
    filler = [Row([0], [0], torch.zeros(1), np.zeros(1))]
    batches = distributed.my_share(micro_batches(rows, s.micro_tokens))
    for batch in distributed.equal_passes(model, batches, filler):
        logprobs = token_logprobs(model, batch, s.temperature)  # (M,)
        sampler_logprobs = torch.cat([row.sampler_logprobs for row in batch]).to(model.device)
        advantages = np.concatenate([row.advantages for row in batch])
        advantages = torch.tensor(advantages, dtype=torch.float32, device=model.device)  # (M,)
        # With one update per rollout the ratio is 1, and its gradient is that of the logprob.
        old_logprobs = sampler_logprobs if s.updates > 1 else logprobs.detach()
        loss = policy_loss(logprobs, old_logprobs, advantages, constant, s.clip_low, s.clip_high)
        loss.backward()
        for total, parameter in zip(sums, model.parameters()):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None
        gap = (logprobs.detach() - sampler_logprobs).abs() * (advantages != 0)
        stats.append((loss.item(), gap.sum().item(), gap.max().item()))
    distributed.sum_over_processes(sums)
    for weight, total in zip(master, sums):
        weight.grad = total.to(weight.dtype)
    losses, gaps, maxima = zip(*sum(distributed.all_gather(stats), []))
    return {"loss": math.fsum(losses), "gap": math.fsum(gaps), "gap_max": max(maxima)}


# ----------------------------------------------------------------------------------------------
# The training loop


def groups_of_step(s, problems, step):
    """(N, budget, indices of the problems (P, N)) of a step, counted from 1. Values of N take turns, and each
    has its own sequence of groups."""
    turn, which = divmod(step - 1, len(s.n))
    return s.n[which], s.budget[which], draw_groups(problems, s.n[which], s.seed, turn * s.groups, s.groups)


def train(s, model, master, optimizer, chat, problems, score, out, first, metrics):
    """Runs steps first + 1 to s.steps. `metrics` has one dict for each step so far, and grows."""
    with distributed.finish_first() as stop, distributed.progress_bar(s.steps, "training", first) as bar:
        for step in range(first + 1, s.steps + 1):
            # Prompts: P groups of N problems.
            n, budget, indices = groups_of_step(s, problems, step)
            groups = [[problems[i] for i in group] for group in indices]  # (P, N)
            prompts = [encode_chat(chat, batch_prompt(group)) for group in groups]

            # Sample. The budget bites here: `budget` tokens for all N problems of a prompt, then the cut.
            clock = time.time()
            completions = distributed.sample(
                model, prompts, s.samples, budget, eos_ids=chat.eos_ids, temperature=s.temperature,
                seed=s.seed, step=step, max_rows=s.rows)  # R
            texts = decode(chat, [c.tokens for c in completions])
            sampling_seconds = time.time() - clock

            # Score. A problem earns its reward here: r_g = 1/N * sum_i [answer i of completion g is right].
            # What was answered before the cut counts; what the budget did not reach has no answer.
            golds = [[problem["answer"] for problem in group] for group in groups for _ in range(s.samples)]
            correct = np.array([score(text, gold) for text, gold in zip(texts, golds)], dtype=float)
            correct = correct.reshape(s.groups, s.samples, n)  # (P, G, N)
            lengths = np.array([len(c.tokens) for c in completions]).reshape(s.groups, s.samples)  # (P, G)
            rewards = correct.mean(axis=2) - s.length_penalty * lengths / budget  # (P, G)

            # Advantages. The baseline is the mean of the group: A_g = r_g - 1/G * sum_h r_h.
            rollout = Rollout(groups, prompts, completions, texts, correct, rewards)
            advantages = token_advantages(rollout, chat, s)  # R arrays (T,)

            # Gradient. The loss is divided by a constant, P * G * budget, not by the completions' lengths.
            # Completions whose advantage is 0 have no gradient and are skipped.
            clock, constant = time.time(), len(completions) * budget
            rows = [Row(prompts[r // s.samples], c.tokens, c.logprobs, advantages[r])
                    for r, c in enumerate(completions) if advantages[r].any()]
            stats, grad_norm = {"loss": 0.0, "gap": 0.0, "gap_max": 0.0}, 0.0
            for _ in range(s.updates if rows else 0):
                stats = accumulate_gradient(model, master, rows, constant, s)
                grad_norm = distributed.clip_gradient(master, s.grad_clip)
                # Step.
                if math.isfinite(grad_norm):
                    optimizer.step()
                    copy_weights(master, model)
                optimizer.zero_grad()

            # Log.
            metrics.append({
                "step": step, "n": n, "budget": budget, **measure(rollout, rows, stats, grad_norm),
                "sampling_seconds": sampling_seconds, "training_seconds": time.time() - clock})
            report_step(s, metrics, out)
            stopping = any(distributed.all_gather(bool(stop)))
            save = stopping or step % s.save_every == 0 or step == s.steps
            if save or step == 1:
                evaluate.append_group(out / "samples.txt", step, rollout, advantages)
            if save:
                distributed.save_checkpoint(out, step, model, master, optimizer)
            bar.update()
            if stopping:
                say(f"saved step {step} in {out}")
                raise KeyboardInterrupt(*stop[:1])


# ----------------------------------------------------------------------------------------------
# Reports of a step


def measure(rollout, rows, stats, grad_norm):
    """The metrics of a step, except its times."""
    rewards, lengths = rollout.rewards, np.array([len(c.tokens) for c in rollout.completions])
    # The mean of -logprob over the sampled tokens is an unbiased estimate of the entropy of a token, in nats.
    entropy = -sum(c.logprobs.double().sum().item() for c in rollout.completions) / lengths.sum()
    return {
        "reward": rewards.mean(), "accuracy": rollout.correct.mean(),
        "accuracy_by_position": rollout.correct.mean(axis=(0, 1)).tolist(),
        "tokens_per_problem": lengths.mean() / rollout.correct.shape[2],
        "truncated": np.mean([c.truncated for c in rollout.completions]),
        "zero_variance": np.mean(rewards.max(axis=1) == rewards.min(axis=1)),
        "loops_per_problem": sum(map(evaluate.count_waits, rollout.texts)) / rollout.correct.size,
        "entropy": entropy, "loss": stats["loss"], "grad_norm": grad_norm,
        "skipped": not math.isfinite(grad_norm) or not math.isfinite(entropy),
        "logprob_gap": stats["gap"] / max(1, sum(len(row.tokens) for row in rows)),
        "logprob_gap_max": stats["gap_max"],
    }


def report_step(s, metrics, out):
    """Appends the last step to metrics.jsonl and prints it, with a warning when a problem begins. Raises
    UserError after three steps that were not finite."""
    m, width = metrics[-1], len(str(s.steps))
    if distributed.rank() == 0:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
            finite = {k: v if np.all(np.isfinite(v)) else None for k, v in m.items()}  # JSON has no NaN
            file.write(json.dumps(finite) + "\n")
    say(f"step {m['step']:>{width}}/{s.steps}" + (f"  N {m['n']}" if len(s.n) > 1 else "") +
        f"  reward {m['reward']:.3f}  tokens/problem {m['tokens_per_problem']:5.1f}"
        f"  waits {m['loops_per_problem']:.2f}  truncated {m['truncated']:4.0%}"
        f"  equal groups {m['zero_variance']:4.0%}  {m['sampling_seconds'] + m['training_seconds']:.1f} s")
    before = training_warnings(metrics[:-1])
    for name, warning in training_warnings(metrics).items():
        if name not in before:
            say(f"warning: {warning}")
    if len(metrics) >= 3 and all(m["skipped"] for m in metrics[-3:]):
        raise UserError(f"steps {m['step'] - 2} to {m['step']} had a loss or gradient that is not finite and "
                        "were skipped: start again with a lower --lr, or check the model's weights")


def training_warnings(metrics):
    """The ways in which a run silently learns nothing, {name: sentence}, that hold after the last step."""
    if not metrics:
        return {}
    last, three, ten, found = metrics[-1], metrics[-3:], metrics[-10:], {}
    always_truncated = len(ten) == 10 and all(m["truncated"] > 0.95 for m in ten)
    if always_truncated or last["truncated"] > 0.95 and last["accuracy"] < 0.1:
        found["truncated"] = (f"{last['truncated']:.0%} of the completions are truncated by the budget of "
                              f"{last['budget']} tokens: raise --budget or lower --n")
    if len(three) == 3 and all(m["zero_variance"] > 0.9 for m in three):
        found["equal"] = ("in over 90% of the groups all samples have the same reward, so every advantage is "
                          "zero: raise --samples, or use problems that are neither too easy nor too hard")
    if len(three) == 3 and all(m["accuracy"] == 0 for m in three):
        found["nothing"] = ("three steps without a correct answer: check in samples.txt whether completions "
                            "follow the format, use easier problems, or raise --budget")
    if last["entropy"] is not None and last["entropy"] < (metrics[0]["entropy"] or 0) / 10:
        found["collapse"] = (f"the entropy fell to {last['entropy']:.4f} nats per token, less than a tenth "
                             "of the first step's: lower --lr, or use an earlier checkpoint")
    if last["skipped"]:
        found["skipped"] = f"the loss or gradient of step {last['step']} is not finite: the step is skipped"
    return found


# ----------------------------------------------------------------------------------------------
# The run


@torch.no_grad()
def copy_weights(master, model):
    for weight, parameter in zip(master, model.parameters()):
        if weight is not parameter:
            parameter.copy_(weight)


def read_metrics(path, steps):
    """The metrics of steps 1 to `steps`. Later lines, perhaps partial, are of steps that run again."""
    try:
        metrics = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:steps]]
        if [m["step"] for m in metrics] == list(range(1, steps + 1)):
            return metrics
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise UserError(f"{path} does not have one line for each of the {steps} steps of the last checkpoint: "
                    "restore it, or start a new run")


def restore(out, model, master, optimizer):
    """Continues the run in `out`. Returns the last checkpoint's step (0 if there is none) and the metrics so
    far. Later lines of metrics.jsonl and samples.txt are removed: those steps run again."""
    first = distributed.load_checkpoint(out, model, master, optimizer)
    metrics = read_metrics(out / "metrics.jsonl", first) if first else []
    copy_weights(master, model)
    if distributed.rank() == 0:
        write_lines(out / "metrics.jsonl", metrics)
        if (out / "samples.txt").exists():
            groups = re.split(r"(?m)^(?===== step )", (out / "samples.txt").read_text(encoding="utf-8"))
            kept = [group for group in groups[1:] if int(re.match(r"==== step (\d+)", group)[1]) <= first]
            write_text(out / "samples.txt", "".join(kept))
    say(f"resuming from step {first} in {out}")
    return first, metrics


def run(s):
    """Evaluates, trains, evaluates again, and writes everything into the output directory."""
    started = time.time()
    problems, benchmarks = load_problems(s.data), load_benchmarks(s.eval_data, s.eval_problems)
    _, score = evaluate.load_reward(s.reward)
    model, chat, about = evaluate.load_model(s, s.checkpointing, s.shard)
    master = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
              for p in model.parameters()]  # master weights are float32
    optimizer = torch.optim.AdamW(master, lr=s.lr, weight_decay=s.weight_decay, foreach=False)  # less memory
    e = evaluate.EvaluationSettings(
        n=s.eval_n, budget=s.eval_budget, within=max(s.budget), problems=s.eval_problems,
        samples=s.eval_samples, temperature=s.eval_temperature, skip_long=s.skip_long, seed=s.seed,
        rows=s.rows)
    benchmarks = evaluate.fit_benchmarks(model, chat, benchmarks, e)
    problems = evaluate.leave_out_long(model, chat, problems, s)
    for data in (problems, *benchmarks.values()) if not s.reward else ():
        evaluate.warn_of_golds(data)
    for step in range(1, len(s.n) + 1):
        _, budget, indices = groups_of_step(s, problems, step)
        check_budget(chat, [problems[i] for i in indices[0]], budget)
    for name, heldout in benchmarks.items():
        if shared := {p["problem"] for p in problems} & {p["problem"] for p in heldout}:
            say(f"warning: {len(shared)} problems of {name} are also in --data: its accuracy is inflated")
    out = distributed.open_out(s, "out/run", [s.data, *s.eval_data.split(","), s.reward], (
        "steps", "save_every", "micro_tokens", "checkpointing", "shard"))
    say(f"{about}; {len(problems)} training problems, {sum(map(len, benchmarks.values()))} held out; "
        f"writing to {out}")
    figures, records = {}, {}

    def evaluate_stage(stage, step):  # a resumed run reads what it found
        figures[stage], records[stage] = evaluate.evaluate_all(
            model, chat, benchmarks, score, e, out, step, f"{stage} training")
        evaluate.write_completions(out / f"completions-{stage}.txt", benchmarks, records[stage])

    evaluate_stage("before", 0)
    first, metrics = restore(out, model, master, optimizer) if s.resume else (0, [])
    train(s, model, master, optimizer, chat, problems, score, out, first, metrics)
    evaluate_stage("after", max(first, s.steps))

    changes = {name: {n: evaluate.paired_change(old, records["after"][name][n]) for n, old in by_n.items()}
               for name, by_n in records["before"].items()}
    seconds = time.time() - started
    with distributed.full_weights(model) as whole:
        if distributed.rank() == 0:
            whole.save_pretrained(out / "model")
            copy_tokenizer(chat.path, out / "model")
            evaluate.plot(out / "results.png", figures, e.within, metrics)
            write_json(out / "results.json", {
                "settings": dataclasses.asdict(s), **figures, "change": changes, "seconds": seconds})
    say("\n" + evaluate.table(figures, changes, e.within))
    say(f"\n{seconds:.0f} s in all. In {out}: results.json, metrics.jsonl, samples.txt, completions-*.txt, "
        "evaluation/, model/ (a Hugging Face directory)")


def main(argv=None):
    with distributed.readable_errors("bcr.py"):
        s = evaluate.parse_flags(Settings, __doc__.split("\n\n")[0], argv)
        s = evaluate.one_for_each(evaluate.one_for_each(s, "budget", "n"), "eval_budget", "eval_n")
        if distributed.world_size() > 1 and not s.out:
            raise UserError("several processes need --out, so that a restart by torchrun finds the run")
        if distributed.was_restarted() and (Path(s.out) / "settings.json").is_file():
            s = dataclasses.replace(s, resume=True)
        distributed.launch("bcr.py", run, s, most=s.groups)


if __name__ == "__main__":
    main()
