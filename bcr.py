"""
Batched Contextual Reinforcement (BCR, arXiv 2604.02322): N problems in one prompt, one token budget
for the whole answer, and a reward that counts how many of the N are answered correctly. A problem
that the budget does not reach earns nothing, so the model learns to reason shorter. Nothing else in
this file asks it to.

    python bcr.py --n 4                     the shipped model on the shipped problems
    python bcr.py --n 1 --budget 512        plain GRPO: one problem, a budget that truncates nothing
    python bcr.py --resume out/run-1        continues a run that was stopped
    torchrun --nproc-per-node 8 -- bcr.py   on eight GPUs (CPU cores need no torchrun)

Read to the end of `train`; what follows are reports and the command line. The algorithm is GRPO
(arXiv 2402.03300) without these parts:

- No KL term and no reference model: rewards are verifiable.
- No division by the response length: a mean over each sequence is itself a length incentive and
  would falsify what BCR claims (Dr. GRPO, arXiv 2503.20783). The loss is divided by a constant.
- No division by the group's standard deviation (`--normalize-std` restores it).
- No filtering of truncated samples (DAPO, arXiv 2503.14476): truncation IS the pressure.
- No top-k and no top-p: training uses exactly the distribution that was sampled from.

Shapes: P prompts in a step, G samples of each, N problems in a prompt, R = P * G completions in the
order (prompt, sample), T tokens of one completion.
"""

import dataclasses
import math
import time

import numpy as np
import torch

import distributed
import evaluate
from data.chat import check_budget, copy_tokenizer, decode, encode_chat
from data.files import TINY, UserError, write_json, write_lines
from data.problems import batch_prompt, draw_groups, load_benchmarks, load_problems
from data.reports import budget_report, plot, table, training_warnings, write_group
from data.runs import load_checkpoint, open_out, resume_restarted, save_checkpoint
from data.settings import flag, one_for_each, parse_flags
from distributed import say
from rollout import Completion, token_logprobs


@dataclasses.dataclass(frozen=True)
class Settings:
    n: tuple = flag((4,), "problems in a prompt (N); 2,4,8 take turns, a step each", group="task")
    budget: tuple = flag((180,), "tokens for a whole completion, all N problems; one, or one per N")
    model: str = flag(str(TINY / "model"), "Hugging Face model: a directory, or a name on the Hub")
    template_options: str = flag("", 'JSON for the chat template: {"enable_thinking": false}')
    data: str = flag(str(TINY / "train.jsonl"), "training problems (JSONL)")
    reward: str = flag("", "Python file with score(completion, golds) -> N numbers from 0 to 1")
    steps: int = flag(40, "training steps", least=1, group="training")
    groups: int = flag(16, "prompts in a step (P)", least=1)
    samples: int = flag(8, "completions of each prompt (G), whose mean is the baseline", least=2)
    lr: float = flag(1e-4, "AdamW's learning rate; 1e-6 suits a billion parameters")
    temperature: float = flag(1.0, "of sampling, which the loss applies, too", least=1e-6)
    updates: int = flag(1, "optimizer steps per rollout; above 1 the ratio is clipped", least=1)
    clip_low: float = flag(0.2, "the ratio is clipped below 1 minus this ...")
    clip_high: float = flag(0.28, "... and above 1 plus this (DAPO's clip-higher)")
    normalize_std: bool = flag(False, "divide advantages by the group's deviation, as GRPO does")
    length_penalty: float = flag(0.0, "baseline: reward minus this times tokens / budget")
    grad_clip: float = flag(1.0, "maximum norm of the gradient; 0 does not clip")
    weight_decay: float = flag(0.0, "AdamW's weight decay of matrices")
    eval_data: str = flag(str(TINY / "heldout.jsonl"), "files of problems", group="evaluation")
    eval_n: tuple = flag((1, 2, 4, 8), "values of N to evaluate at, before and after training")
    eval_problems: int = flag(512, "problems of each file, the same ones at each N", least=1)
    eval_samples: int = flag(1, "completions of each prompt (k): the accuracy is avg@k", least=1)
    eval_budget: tuple = flag((1536,), "tokens for a whole completion; one number or one per N")
    eval_temperature: float = flag(1.0, "sampling temperature of the evaluation")
    out: str = flag("", "directory of the run (default: the next free out/run-1, ...)", group="run")
    resume: str = flag("", "directory of a run to continue, with the settings it began with")
    accept_changes: bool = flag(False, "resume although data, reward or model have changed")
    save_every: int = flag(10, "steps between checkpoints", least=1)
    skip_long: bool = flag(False, "leave out problems that do not fit the model's positions")
    seed: int = flag(0, "seed of the order of the data and of every sampled token")
    date: str = flag("", "")  # of the start, for chat templates that write one; not a flag
    dtype: str = flag("auto", "bfloat16 on cuda, else float32", 0, ("auto", "float32", "bfloat16"))
    device: str = flag("auto", "cpu, cuda, cuda:1, or auto: cuda if available", group="machine")
    rows: int = flag(256, "completions sampled at a time; lower it if memory runs out", least=1)
    micro_tokens: int = flag(4096, "tokens in a training pass, padded; lower it likewise", least=1)
    checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    processes: int = flag(0, "processes on a CPU; 0: one per core for a small model, at most 8")
    shard: bool = flag(False, "divide weights and AdamW's state among the processes (FSDP2)")


# ----------------------------------------------------------------------------------------------
# Advantages, loss and gradient


@dataclasses.dataclass
class Rollout:
    """What one step has sampled, and its rewards."""

    groups: list[list[dict]]  # (P, N) problems
    prompts: list[list[int]]  # P lists of token ids
    completions: list[Completion]  # R
    texts: list[str]  # R
    correct: np.ndarray  # (P, G, N), 1 or 0
    rewards: np.ndarray  # (P, G)


def group_advantages(rewards, normalize_std=False):
    """A_g = r_g - mean over the group of r. rewards: (P, G) -> (P, G).

    Source: GRPO (arXiv 2402.03300, section 4.1.2); without the standard deviation: Dr. GRPO."""
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    advantages[equal_rewards(rewards)] = 0.0
    if normalize_std:
        advantages /= rewards.std(axis=1, keepdims=True) + 1e-6
    return advantages


def equal_rewards(rewards):
    """Which groups have nothing to tell: rewards that differ by rounding at most. (P, G) -> (P,)"""
    return np.ptp(rewards, axis=1) < 1e-9


def token_advantages(rollout, chat, s):
    """All tokens of a completion have its advantage. Returns R arrays (T,).

    To change how credit is assigned, replace this function: data/study/credit_togo.py does."""
    advantages = group_advantages(rollout.rewards, s.normalize_std)  # (P, G)
    return [np.full(len(c.tokens), a) for c, a in zip(rollout.completions, advantages.flat)]


@dataclasses.dataclass
class Row:
    """One completion to learn from."""

    prompt: list[int]
    tokens: list[int]  # (T,), EOS included: stopping is an action
    sampler_logprobs: torch.Tensor  # (T,)
    advantages: np.ndarray  # (T,)


def policy_loss(logprobs, old_logprobs, advantages, constant, clip_low, clip_high):
    """-1/constant * sum_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t), where rho_t
    is pi(token_t) / pi_old(token_t). All inputs are (M,); returns a scalar.

    Source: PPO (arXiv 1707.06347, equation 7); a range per side: DAPO (section 3.1)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / constant


def accumulate_gradient(model, master, rows, constant, s):
    """Sets master[i].grad to the gradient of the loss of `rows`, from all processes. Returns the
    loss, and the mean and maximum over tokens of the gap |logprob here - logprob in the sampler|.

    The loss of each micro-batch is a sum divided by the same constant, so their gradients add up to
    that of the whole: on a CPU in float64, without rounding, whatever process has which batch."""
    dtype = torch.float64 if model.device.type == "cpu" else torch.float32
    sums = [torch.zeros_like(weight, dtype=dtype) for weight in master]
    stats = []
    batches = distributed.micro_batches(rows, s.micro_tokens)
    for batch in distributed.my_share(batches):
        logprobs = token_logprobs(model, batch, s.temperature)  # (M,)
        sampler_logprobs = torch.cat([row.sampler_logprobs for row in batch]).to(model.device)
        advantages = torch.from_numpy(np.concatenate([row.advantages for row in batch]))
        advantages = advantages.float().to(model.device)  # (M,)
        # With one update the policy is still the sampler: the ratio is 1, without any rounding.
        old_logprobs = sampler_logprobs if s.updates > 1 else logprobs.detach()
        loss = policy_loss(logprobs, old_logprobs, advantages, constant, s.clip_low, s.clip_high)
        loss.backward()
        for total, parameter in zip(sums, model.parameters()):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None
        gaps = (logprobs.detach() - sampler_logprobs).abs() * (advantages != 0)
        stats.append(torch.stack([loss.detach(), gaps.sum(), gaps.max()]))
    distributed.sum_over_processes(sums)
    for weight, total in zip(master, sums):
        weight.grad = total.to(weight.dtype)
    stats = [values.tolist() for values in stats]  # only now does the host wait for the device
    stats = np.array(sum(distributed.all_gather(stats), []))  # (micro-batches of all processes, 3)
    loss, gap, _ = map(math.fsum, stats.T)
    gap /= sum(len(row.tokens) for row in rows)
    return {"loss": loss, "logprob_gap": gap, "logprob_gap_max": stats[:, 2].max()}


# ----------------------------------------------------------------------------------------------
# Training


def train(s):
    """Evaluates, trains, evaluates again, and writes everything into the directory of the run."""
    # Setup. What can be wrong is found before anything is written.
    started = time.time()
    problems = load_problems(s.data)
    benchmarks = load_benchmarks(s.eval_data, s.eval_problems)
    _, score = evaluate.load_reward(s.reward)
    model, chat, about = evaluate.load_model(s, s.checkpointing, s.shard)
    e = evaluation_settings(s)
    benchmarks = evaluate.fit_benchmarks(model, chat, benchmarks, e)
    problems = fit_problems(model, chat, problems, benchmarks, s)
    master = master_weights(model)
    optimizer = make_optimizer(master, s)
    out = distributed.on_first(open_out, s, "out/run")
    say(f"{about}; {len(problems)} training problems; writing to {out}")
    before = evaluate.evaluate_all(model, chat, benchmarks, score, e, out, 0, "before training")
    say(budget_report(s, before[0]))
    done, metrics = load_checkpoint(out, model, master, optimizer)
    copy_weights(master, model)
    if done:
        say(f"resuming from step {done}")

    bar = distributed.progress_bar(s.steps, "training", done)
    for step in range(done + 1, s.steps + 1):
        # Prompts: P groups of N problems. Values of N take turns, each with its own sequence.
        round_, turn = divmod(step - 1, len(s.n))
        n = s.n[turn]
        budget = s.budget[turn]
        indices = draw_groups(problems, n, s.seed, round_ * s.groups, s.groups)
        groups = [[problems[i] for i in group] for group in indices]  # (P, N)
        prompts = [encode_chat(chat, batch_prompt(group)) for group in groups]

        # Sample. The budget bites here: `budget` tokens for all N problems, then the cut.
        clock = time.time()
        completions = distributed.sample(
            model, prompts, s.samples, budget, eos_ids=chat.eos_ids, temperature=s.temperature,
            seed=s.seed, step=step, max_rows=s.rows)  # R
        texts = decode(chat, [c.tokens for c in completions])
        sampling_seconds = time.time() - clock

        # Score. A problem earns its reward here: r_g = 1/N * sum_i [answer i of y_g is right].
        # What was answered before the cut counts; what the budget did not reach has no answer.
        golds = [[problem["answer"] for problem in group] for group in groups]  # (P, N)
        correct = [score(text, golds[r // s.samples]) for r, text in enumerate(texts)]
        correct = np.array(correct, dtype=float).reshape(s.groups, s.samples, n)  # (P, G, N)
        lengths = np.array([len(c.tokens) for c in completions]).reshape(s.groups, s.samples)
        rewards = correct.mean(axis=2) - s.length_penalty * lengths / budget  # (P, G)

        # Advantages. The baseline is the mean of the group: A_g = r_g - 1/G * sum_h r_h.
        rollout = Rollout(groups, prompts, completions, texts, correct, rewards)
        advantages = token_advantages(rollout, chat, s)  # R arrays (T,)

        # Gradient. The loss is divided by a constant, P * G * budget, not by the lengths.
        # Completions whose advantage is 0 have no gradient and are skipped.
        clock = time.time()
        constant = len(completions) * budget
        rows = [Row(prompts[r // s.samples], c.tokens, c.logprobs, advantages[r])
                for r, c in enumerate(completions) if advantages[r].any()]
        stats = {"loss": 0.0, "logprob_gap": 0.0, "logprob_gap_max": 0.0}
        grad_norm = 0.0
        for _ in range(s.updates if rows else 0):
            stats = accumulate_gradient(model, master, rows, constant, s)
            grad_norm = distributed.clip_gradient(master, s.grad_clip)
            # Step. AdamW moves the weights, unless the gradient is not finite.
            if math.isfinite(grad_norm):
                optimizer.step()
                copy_weights(master, model)
            optimizer.zero_grad()

        # Log.
        seconds = {"sampling_seconds": sampling_seconds, "training_seconds": time.time() - clock}
        head = {"step": step, "n": n, "budget": budget}
        metrics.append(head | measure(rollout, stats, grad_norm) | seconds)
        report_step(s, metrics, out)
        save = step % s.save_every == 0 or step == s.steps
        if save or step == 1:
            distributed.on_first(write_group, out, step, rollout, advantages)
        if save:
            save_checkpoint(out, step, metrics, model, master, optimizer, chat.path)
        bar.update()
    bar.close()

    # Results.
    last = max(done, s.steps)
    after = evaluate.evaluate_all(
        model, chat, benchmarks, score, e, out, last, "after training")
    with distributed.full_weights(model) as whole:
        if distributed.rank() == 0:
            whole.save_pretrained(out / "model")
            copy_tokenizer(chat.path, out / "model")
    seconds = time.time() - started
    distributed.on_first(write_results, s, out, before, after, metrics, seconds)


# ----------------------------------------------------------------------------------------------
# Setup and reports


def evaluation_settings(s):
    return evaluate.EvaluationSettings(
        n=s.eval_n,
        budget=s.eval_budget,
        within=max(s.budget),
        samples=s.eval_samples,
        temperature=s.eval_temperature,
        reward=s.reward,
        skip_long=s.skip_long,
        seed=s.seed,
        rows=s.rows)


def fit_problems(model, chat, problems, benchmarks, s):
    """The training problems that fit the model's positions. Raises UserError for a budget that
    cannot hold even the answers, and as `evaluate.leave_out_long`."""
    problems = evaluate.leave_out_long(model, chat, problems, s)
    for n, budget in zip(s.n, s.budget):
        group = draw_groups(problems, n, s.seed, 0, 1)[0]
        check_budget(chat, [problems[i] for i in group], budget)
    known = {problem["problem"] for problem in problems}
    for name, held_out in benchmarks.items():
        shared = sum(problem["problem"] in known for problem in held_out)
        if shared:
            say(f"warning: {shared} problems of {name} are also in --data, which inflates its "
                "accuracy")
    return problems


def master_weights(model):
    """The weights that AdamW moves, in float32: the model's own, or copies of its bfloat16."""
    return [
        weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_()
        for weight in model.parameters()]


@torch.no_grad()
def copy_weights(master, model):
    for weight, parameter in zip(master, model.parameters()):
        if weight is not parameter:
            parameter.copy_(weight)


def make_optimizer(master, s):
    """AdamW. As usual, weights of one dimension (norms, biases) do not decay."""
    vectors = [weight for weight in master if weight.dim() == 1]
    matrices = [weight for weight in master if weight.dim() > 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=s.lr,
        weight_decay=s.weight_decay,
        foreach=False)  # less memory


def measure(rollout, stats, grad_norm):
    """The metrics of a step, except its times. What is not finite is None: JSON has no NaN."""
    rewards = rollout.rewards
    tokens = sum(len(c.tokens) for c in rollout.completions)
    # The mean of -logprob over sampled tokens is an unbiased estimate of the entropy, in nats.
    entropy = -sum(c.logprobs.double().sum().item() for c in rollout.completions) / tokens
    size = rollout.correct.size  # P * G * N
    metrics = {
        "reward": rewards.mean(),
        "accuracy": rollout.correct.mean(),
        "accuracy_by_position": rollout.correct.mean(axis=(0, 1)).tolist(),
        "tokens_per_problem": tokens / size,
        "truncated": np.mean([c.truncated for c in rollout.completions]),
        "zero_variance": equal_rewards(rewards).mean(),
        "waits_per_problem": sum(map(evaluate.count_waits, rollout.texts)) / size,
        "entropy": entropy,
        "grad_norm": grad_norm,
        "skipped": not math.isfinite(grad_norm + entropy)} | stats
    for key, value in metrics.items():
        if not np.all(np.isfinite(value)):
            metrics[key] = None
    return metrics


def report_step(s, metrics, out):
    """Writes metrics.jsonl and prints the last step, with a warning when a problem begins. Raises
    UserError after three steps that were not finite."""
    m = metrics[-1]
    seconds = m["sampling_seconds"] + m["training_seconds"]
    say(f"step {m['step']:>{len(str(s.steps))}}/{s.steps}  N {m['n']}"
        f"  reward {m['reward']:.3f}"
        f"  tokens/problem {m['tokens_per_problem']:5.1f}"
        f"  waits {m['waits_per_problem']:.2f}"
        f"  truncated {m['truncated']:4.0%}"
        f"  equal groups {m['zero_variance']:4.0%}"
        f"  {seconds:.1f} s")
    if distributed.rank() == 0:
        write_lines(out / "metrics.jsonl", metrics)
    before = training_warnings(metrics[:-1])
    for name, warning in training_warnings(metrics).items():
        if name not in before:
            say(f"warning: {warning}")
    if len(metrics) >= 3 and all(m["skipped"] for m in metrics[-3:]):
        raise UserError(
            f"steps {m['step'] - 2} to {m['step']} had a loss or gradient that is not finite and "
            "were skipped: start again with a lower --lr, or check the model's weights")


def write_results(s, out, before, after, metrics, seconds):
    """results.json and results.png, and the table on the screen. before, after: ({name: {n:
    results}}, {name: {n: records}})."""
    stages = {"before": before[0], "after": after[0]}
    changes = {}
    for name, by_n in before[1].items():
        changes[name] = {}
        for n, records in by_n.items():
            changes[name][n] = evaluate.paired_change(records, after[1][name][n])
    write_json(out / "results.json", {
        "settings": dataclasses.asdict(s),
        **stages,
        "change": changes,
        "seconds": seconds})
    plot(out / "results.png", stages, max(s.budget), metrics)
    say("\n" + table(stages, changes, max(s.budget)))
    say(f"\n{seconds:.0f} s in all. In {out}: results.json, metrics.jsonl, samples/, evaluation/, "
        "results.png, model/ (a Hugging Face directory)")


def main(argv=None):
    with distributed.readable_errors("bcr.py"):
        s = parse_flags(Settings, __doc__.split("\n\n")[0], argv)
        s = one_for_each(s, "budget", "n")
        s = one_for_each(s, "eval_budget", "eval_n")
        if distributed.world_size() > 1 and not (s.out or s.resume):
            raise UserError("several processes need --out: a restart by torchrun must find the run")
        s = resume_restarted(s)
        distributed.launch("bcr.py", train, s, most=s.groups)


if __name__ == "__main__":
    main()
