"""
Several processes: measurements with 1 and 2 on this machine, and arithmetic for 8 and 64 GPUs.

    python -m tests.bench.scale                 measures (two minutes) and prints both tables
    python -m tests.bench.scale --paper         prints the arithmetic only

The measurements are complete runs of bcr.py under torchrun, in turns: one process, two with a copy
of the model each, two that share it (--shard). Bytes are those that a process wrote to its sockets
(/proc/self/io), next to what the formulas below expect. The first step of each run is a warm-up and
does not count.

The second table is arithmetic, not measurement: none of it has run on more than one GPU.
"""

import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import bcr
import distributed
import evaluate
import rollout
from model import Config, Transformer

REPO = Path(__file__).resolve().parents[2]
GROUPS = 16
SAMPLES = 8
RUN = ["--steps", "4", "--groups", str(GROUPS), "--samples", str(SAMPLES),
       "--micro-tokens", "32768", "--eval-n", "1", "--eval-problems", "2", "--eval-budget", "200",
       "--save-every", "100"]
WAYS = {"1 process": (1, []), "2 processes": (2, []), "2 processes, --shard": (2, ["--shard"])}

# ----------------------------------------------------------------------------------------------
# Bytes that a process sends in a step, without the completions (about 12 bytes per token, measured)


def ring(ranks, size):
    """Bytes a process sends so that all processes have, or each has the sum of, `size` bytes.

    Source: Patarasuk and Yuan (2009)."""
    return (ranks - 1) / ranks * size


def bytes_replicated(ranks, weights, size=4):
    """An all-reduce (a reduce-scatter and a gather) of the gradients: float32 on a GPU, float64 on
    a CPU."""
    return 2 * ring(ranks, size * weights)


def bytes_sharded(ranks, layers, rest, passes, size, reduce=1):
    """--shard, with `layers` weights in layers and `rest` in embedding, head and last norm, in a
    type of `size` bytes. All weights are gathered once to sample. Each pass gathers the layers
    forward and backward and the rest once, and sums every float32 gradient.
    reduce: 2 for gloo, whose reduce-scatter sends as much as an all-reduce (measured)."""
    gathers = layers + rest + passes * (2 * layers + rest)
    return ring(ranks, size * gathers + reduce * 4 * passes * (layers + rest))


# ----------------------------------------------------------------------------------------------
# Measurements


def work(arguments):
    """One process of a run: bcr.py, noting the time and the bytes sent so far after each step."""
    marks = []
    report_step = bcr.report_step

    def mark(s, metrics, out):  # every process calls it once per step
        counters = dict(line.split(": ") for line in open("/proc/self/io"))
        sent = int(counters["wchar"])
        marks.append({"time": time.time(), "sent": sent, **metrics[-1]})
        report_step(s, metrics, out)

    bcr.report_step = mark
    bcr.main(arguments)
    if distributed.rank() == 0:
        Path(arguments[-1] + ".json").write_text(json.dumps(marks, default=float))


def measure(rounds=2):
    """{way: the steps of all rounds}."""
    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for index, (way, (ranks, flags)) in enumerate(WAYS.items()):
                out = f"{folder}/{number}-{index}"
                subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node", str(ranks), "--", __file__, "--work", *RUN, *flags,
                     "--out", out], check=True, capture_output=True, timeout=300,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)})
                marks = json.loads(Path(out + ".json").read_text())
                found[way] += [
                    {"seconds": b["time"] - a["time"], "sent": b["sent"] - a["sent"],
                     "sampling": b["sampling_seconds"], "training": b["training_seconds"],
                     "tokens": b["tokens_per_problem"] * b["n"] * GROUPS * SAMPLES}
                    for a, b in zip(marks, marks[1:])]
    return found


def measured():
    """Prints the table of measurements."""
    model = Transformer.from_pretrained(REPO / "data/tiny/model")
    weights = sum(p.numel() for p in model.parameters())
    layers = sum(p.numel() for p in model.model.layers.parameters())
    expected = {"1 process": 0.0, "2 processes": bytes_replicated(2, weights, 8),
                # a pass for each prompt
                "2 processes, --shard": bytes_sharded(
                    2, layers, weights - layers, GROUPS // 2, 4, reduce=2)}
    print("measured here        | steps/s | tokens/s | sampling s | training s | MB per process | "
          "expected")
    for way, steps in measure().items():
        ranks, _ = WAYS[way]
        mean = {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        completions = ring(ranks, 12 * mean["tokens"])  # its share, sent to the others
        print(f"{way:20} | {1 / mean['seconds']:7.3f} | {mean['tokens'] / mean['seconds']:8.0f} | "
              f"{mean['sampling']:10.2f} | {mean['training']:10.2f} | "
              f"{mean['sent'] / 1e6:14.2f} | "
              f"{(expected[way] + completions) / 1e6:8.2f}")


# ----------------------------------------------------------------------------------------------
# Arithmetic

SHAPES = {  # config.json on the Hugging Face Hub, and the weights that it describes
    # Qwen3-4B-Thinking-2507 and Qwen3-32B
    "4B": dict(weights=4.02e9, layers=36, kv_heads=8, heads=32, head=128),
    "32B": dict(weights=32.8e9, layers=64, kv_heads=8, heads=64, head=128),
}
GPUS = {  # NVIDIA's data sheets (SXM): bfloat16 without sparsity, memory bandwidth, memory
    "H100": dict(flops=989e12, bandwidth=3.35e12, memory=80e9),
    "H200": dict(flops=989e12, bandwidth=4.8e12, memory=141e9),
}
# bytes/s per GPU and direction, fourth generation (the data sheet's 900 GB/s count both)
NVLINK = 450e9
NODE = 8  # GPUs of a node
NETWORK = 8 * 50e9  # bytes/s into a node with 400 Gb/s InfiniBand for each GPU
SHARE = 0.4  # of these limits is reached: an assumption
USABLE = 0.92  # of the memory: the rest belongs to the driver, NCCL and the allocator


def step_on_paper(shape, gpu, ranks, prompts=32, samples=8, prompt=1000, budget=8000,
                  micro_tokens=16384, shard=True):
    """Seconds of a step in which all completions reach the budget (the worst case), with
    --checkpointing."""
    s = SHAPES[shape]
    g = GPUS[gpu]
    weights = s["weights"]
    length = prompt + budget
    per_token = 4 * s["layers"] * s["kv_heads"] * s["head"]  # bytes of cache: k and v in bfloat16
    # bfloat16 weights to sample with; float32 weights and AdamW's two moments, complete or a share
    held = 2 * weights + 12 * weights / (ranks if shard else 1)
    room = int((USABLE * g["memory"] - held) // (per_token * length))
    if room < 1:
        return {"rows": 0, "held": held}
    busy = -(-prompts // ranks)  # prompts of the process with the most
    rows = busy * samples
    waves = [min(room, rows - first) for first in range(0, rows, room)]

    def token(n):  # of n rows: reading weights and caches or computing, whichever is longer
        read = 2 * weights + n * per_token * (prompt + budget / 2)
        return max(read / (SHARE * g["bandwidth"]), 2 * weights * n / (SHARE * g["flops"]))

    prefill = busy * prompt * 2 * weights / (SHARE * g["flops"])  # a prompt's keys and values, once
    attention = 4 * s["layers"] * s["heads"] * s["head"] * length / 2  # flops per token
    flops = 8 * weights + 4 * attention  # per token: forward, backward (twice that), forward again
    passes = -(-rows // max(1, micro_tokens // length))  # rows are complete: prompt and completion
    sent = bytes_replicated(ranks, weights)
    if shard:
        sent = bytes_sharded(ranks, weights, 0, passes, 2)
    link = SHARE * (NVLINK if ranks <= NODE else NETWORK)
    times = {"sampling": prefill + budget * sum(map(token, waves)),
             "training": rows * length * flops / (SHARE * g["flops"]),
             "network": sent / link if ranks > 1 else 0.0}
    return {"rows": min(room, rows), "waves": len(waves), "held": held,
            "step": sum(times.values()), **times,
            "floor": budget * 2 * weights / (SHARE * g["bandwidth"])}


def paper():
    """Prints the table of the arithmetic."""
    print("\nArithmetic, not measured: seconds of a step, 8 completions per prompt, each of 8,000 "
          "tokens.\nmodel | GPUs | prompts | --shard | GB held | rows per GPU | waves | "
          "sampling (floor) | training | network | step | completions/s")
    for shape, gpu, ranks, prompts, shard in (
            ("4B", "H100", 8, 32, False), ("4B", "H100", 8, 32, True), ("4B", "H100", 64, 32, True),
            ("4B", "H100", 64, 256, True), ("32B", "H100", 8, 32, True),
            ("32B", "H100", 64, 32, True), ("32B", "H200", 8, 32, True),
            ("32B", "H200", 64, 32, True), ("32B", "H200", 64, 256, True)):
        t = step_on_paper(shape, gpu, ranks, prompts, shard=shard)
        head = (f"{shape:>5} | {ranks:>2} {gpu} | {prompts:>4} | {'yes' if shard else 'no':>3} | "
                f"{t['held'] / 1e9:6.1f} |")
        if not t["rows"]:
            print(head, "no room for the cache of one row")
            continue
        print(head, f"{t['rows']:>3} | {t['waves']:>2} | "
                    f"{t['sampling']:7.0f} ({t['floor']:.0f}) | "
                    f"{t['training']:6.1f} | {t['network']:5.1f} | {t['step']:6.0f} | "
                    f"{prompts * 8 / t['step']:.2f}")


# ----------------------------------------------------------------------------------------------
# Memory of one GPU

CONFIGS = {  # config.json on the Hugging Face Hub
    "hbx/JustRL-DeepSeek-1.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=131072, tie_word_embeddings=False),
    "Qwen/Qwen3-4B-Thinking-2507": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=262144, tie_word_embeddings=True),
}
CARDS = {"hbx/JustRL-DeepSeek-1.5B": 80e9, "Qwen/Qwen3-4B-Thinking-2507": 141e9}  # bytes
PROMPT = 1500  # tokens of the longest prompt
CONTEXT = 1.0e9  # bytes of the CUDA context, cuBLAS and its workspaces: an assumption
GRAPH = 25e6  # bytes of a captured graph outside PyTorch's allocator; vLLM reports 24 to 28 MiB
GAPS = 0.02  # of what is allocated is lost between blocks: an assumption


class FlashAttention(torch.autograd.Function):
    """What flash attention keeps for the backward pass, without computing it: q, k, v, the output,
    and a float32 number for each query (arXiv 2205.14135, section 3.1)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out


def saved_bytes(config, prompt, tokens, samples, checkpointing):
    """Bytes that autograd keeps of a training pass of `tokens` tokens: one prompt and `samples`
    completions. They are counted on a model without values (on the meta device)."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.checkpointing = checkpointing
    length = (tokens - prompt) // samples
    rows = [bcr.Row([0] * prompt, [0] * length, None, None) for _ in range(samples)]
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    def attention(q, k, v, is_causal):
        return FlashAttention.apply(q, k, v)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            rollout.token_logprobs(model, rows, temperature=1.0)
    return sum(storage.nbytes() for storage in saved.values())


def memory(config, s, card, prompt=PROMPT):
    """Bytes of one GPU of `card` bytes in each phase of a run: {phase: {part: bytes}}. s:
    bcr.Settings; prompt: tokens of the longest prompt."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in Transformer(config).parameters())
    start = {"weights, bfloat16": 2 * weights, "master weights": 4 * weights}
    held = start | {"AdamW": 8 * weights}
    # keys and values in bfloat16
    per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

    def sampling(held, budget):
        length = prompt + budget
        free = card - CONTEXT - sum(held.values())
        rows = rollout.rows_that_fit(config, length, torch.bfloat16, free, s.rows)
        row = rollout.row_bytes(config, length, torch.bfloat16)
        graphs = length / rollout.LENGTH_MULTIPLE["cuda"] + rows / 32  # pairs of sizes on the way
        return rows, held | {
            "keys and values": rows * length * per_token,
            "a token of all rows": rows * (row - length * per_token),
            "prompt": prompt * per_token,
            "graphs": graphs * GRAPH}

    before_rows, before = sampling(start, max(s.eval_budget))
    rows, step = sampling(held, max(s.budget))
    after_rows, after = sampling(held, max(s.eval_budget))
    tokens = max(s.micro_tokens, prompt + max(s.budget))
    activations = saved_bytes(config, prompt, tokens, s.samples, s.checkpointing)
    if s.checkpointing:  # a layer is computed again, and what it keeps is held next to the inputs
        layer = dataclasses.replace(config, num_hidden_layers=1, vocab_size=1)
        activations += saved_bytes(layer, prompt, tokens, s.samples, False)
    training = held | {
        "sums of gradients": 4 * weights,
        "gradients": 2 * weights,  # they grow while the activations shrink: an upper bound
        "activations": activations,
        "logits": 20 * min(2**26, tokens * config.vocab_size)}  # a chunk in bfloat16 and float32
    phases = {f"evaluation before, {before_rows} rows": before, f"sampling, {rows} rows": step,
              "training": training, f"evaluation after, {after_rows} rows": after}
    for parts in phases.values():
        parts["gaps"] = GAPS * sum(parts.values())
        parts["context"] = CONTEXT
    return phases


def paper_commands():
    """bcr.Settings of each command in README.md and data/README.md that trains a model of the
    paper."""
    commands = []
    for file in ("README.md", "data/README.md"):
        for line in (REPO / file).read_text().splitlines():
            if line.startswith("python bcr.py --model "):
                s = evaluate.parse_flags(bcr.Settings, "", shlex.split(line)[2:])
                commands.append(s)
    return commands


def print_memory():
    print("\nArithmetic, not measured: GB on one GPU, with a longest prompt of "
          f"{PROMPT:,} tokens.")
    for model, s in {s.model: s for s in paper_commands()}.items():
        phases = memory(Config.from_hf(CONFIGS[model]), s, CARDS[model])
        parts = dict.fromkeys(itertools.chain(*phases.values()))
        print(f"\n| {model}, {CARDS[model] / 1e9:.0f} GB | " + " | ".join(phases) + " |")
        print("| --- |" + " --- |" * len(phases))
        for part in parts:
            cells = [f"{phase[part] / 1e9:.1f}" if part in phase else ""
                     for phase in phases.values()]
            print(f"| {part} | " + " | ".join(cells) + " |")
        totals = [f"{sum(phase.values()) / 1e9:.1f}" for phase in phases.values()]
        print("| together | " + " | ".join(totals) + " |")


def main():
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    if sys.argv[1:] != ["--paper"]:
        measured()
    paper()
    print_memory()


if __name__ == "__main__":
    main()
