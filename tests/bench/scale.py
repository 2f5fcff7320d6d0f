"""
Several processes: what K = 1 and 2 do on this machine, and what 8 and 64 GPUs should, on paper.

    python tests/bench_scale.py                 measures (two minutes), writes out/scale.json, prints both tables
    python tests/bench_scale.py --paper         prints only the arithmetic

Measured are whole runs of bcr.py under torchrun, in turns: one process, two that each hold the model, two that
share it (--shard). Bytes are those that the process handed to the sockets (/proc/self/io, which counts what gloo
writes), beside what the formulas below expect. Of each run the first step is left out: it warms up.

The second table is arithmetic, not measurement: nothing of this has run on more than one GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RUN = ["--steps", "4", "--groups", "16", "--samples", "8", "--micro-tokens", "32768", "--eval-n", "1", "--eval-problems", "2",
       "--eval-budget", "8", "--save-every", "100"]
WAYS = {"1 process": (1, []), "2 processes": (2, []), "2 processes, --shard": (2, ["--shard"])}

# ----------------------------------------------------------------------------------------------
# Bytes that a process sends in a step, apart from the completions (12 bytes a token)


def ring(ranks, size):
    """Bytes a process sends so that all have, or each has the sum of, `size` bytes: Patarasuk & Yuan (2009)."""
    return (ranks - 1) / ranks * size


def bytes_replicated(ranks, weights):
    """One all-reduce (a reduce-scatter and a gather) of the float32 gradients."""
    return 2 * ring(ranks, 4 * weights)


def bytes_sharded(ranks, layers, rest, passes, prompt_passes, size, reduce=1):
    """--shard, with `layers` weights in layers and `rest` in embedding, head and last norm, computed in a type
    of `size` bytes: gathered once to sample; once for the pass over the prompts without gradient; in each pass
    with gradient the layers forward and backward, the rest once, and every float32 gradient is summed.
    reduce: 2 for gloo, which sends for a reduce-scatter as much as for an all-reduce (measured)."""
    gathers = 2 * (layers + rest) + (passes + prompt_passes) * (2 * layers + rest) - rest  # the first finds the rest there
    return ring(ranks, size * gathers + reduce * 4 * (passes + prompt_passes) * (layers + rest))


# ----------------------------------------------------------------------------------------------
# Measured here


def work(arguments):
    """One rank of a run: bcr.py, that notes time and bytes at the end of each step."""
    sys.path.insert(0, str(REPO))
    import bcr

    marks, warnings = [], bcr.warnings

    def mark(metrics):
        sent = next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("wchar"))
        marks.append({"time": time.time(), "sent": sent, **metrics[-1]})
        return warnings(metrics)

    bcr.warnings = mark  # the last thing that every rank calls in a step
    bcr.main(arguments)
    Path(arguments[-1] + f".rank{bcr.RANK}.json").write_text(json.dumps(marks, default=float))


def measure(rounds=2):
    found = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for way, (ranks, flags) in WAYS.items():
                out = f"{folder}/{number}-{len(found[way])}-{ranks}{len(flags)}"
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--",
                                __file__, "--work", *RUN, *flags, "--out", out], check=True, capture_output=True, timeout=300,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
                marks = json.loads(Path(out + ".rank0.json").read_text())
                found[way] += [{"seconds": b["time"] - a["time"], "sent": b["sent"] - a["sent"], "sampling": b["sampling_seconds"],
                                "training": b["training_seconds"], "tokens": b["tokens_per_second"] * (b["sampling_seconds"] + b["training_seconds"])}
                               for a, b in zip(marks, marks[1:])]
    return found


def summary(steps):
    seconds = sum(step["seconds"] for step in steps)
    return {"steps_per_second": len(steps) / seconds, "tokens_per_second": sum(step["tokens"] for step in steps) / seconds,
            **{key: sum(step[key] for step in steps) / len(steps) for key in ("sampling", "training", "sent", "tokens")}}


# ----------------------------------------------------------------------------------------------
# On paper

SHAPES = {  # config.json of each on the Hugging Face Hub; weights as these configurations count them
    "4B": dict(weights=4.02e9, layers=36, kv_heads=8, heads=32, head=128),  # Qwen3-4B-Thinking-2507
    "32B": dict(weights=32.8e9, layers=64, kv_heads=8, heads=64, head=128),  # Qwen3-32B
}
GPUS = {  # NVIDIA's data sheets of the SXM versions: bfloat16 without sparsity, memory bandwidth, memory
    "H100": dict(flops=989e12, bandwidth=3.35e12, memory=80e9),
    "H200": dict(flops=989e12, bandwidth=4.8e12, memory=141e9),
}
NVLINK = 450e9  # bytes/s a GPU and direction, fourth generation (the data sheet's 900 GB/s count both)
NODE, NETWORK = 8, 8 * 50e9  # GPUs in a node; 400 Gb/s InfiniBand for each of them: what enters a node, bytes/s
SHARE = 0.4  # of these limits that is reached: an assumption, the same as in README's "The paper's experiment"
USABLE = 0.92  # of the memory: the rest is the driver's, NCCL's and the allocator's


def step_on_paper(shape, gpu, ranks, prompts=32, samples=8, prompt=1000, budget=8000, micro_tokens=16384, shard=True):
    """Seconds of a step whose completions all reach the budget (the worst case), --checkpointing on."""
    s, g = SHAPES[shape], GPUS[gpu]
    weights, per_token = s["weights"], 4 * s["layers"] * s["kv_heads"] * s["head"]  # cache bytes: k and v in bfloat16
    # bfloat16 weights to sample with; float32 weights and AdamW's two moments, whole or a share
    held = 2 * weights + 12 * weights / (ranks if shard else 1)
    room = int((USABLE * g["memory"] - held) // (per_token * (prompt + budget)))
    if room < 1:
        return {"rows": 0, "held": held}
    busy = -(-prompts // ranks)  # prompts of the busiest rank: groups are not divided
    waves = [min(room, busy * samples - first) for first in range(0, busy * samples, room)]
    mean = prompt + budget / 2

    def token(rows):  # one token of `rows` rows: weights and caches are read, or computed with, whichever takes longer
        return (2 * weights + rows * per_token * mean) / (SHARE * g["bandwidth"]), 2 * weights * rows / (SHARE * g["flops"])

    sampling = budget * sum(max(token(rows)) for rows in waves)
    floor = budget * 2 * weights / (SHARE * g["bandwidth"])
    attention = 4 * s["layers"] * s["heads"] * s["head"] * mean  # flops a token: scores and their sum over values
    flops = 8 * weights + 4 * attention  # a token: forward, backward (twice that), and forward again
    training = busy * samples * budget * flops / (SHARE * g["flops"])
    prompts_too = busy * prompt * (2 * weights + flops) / (SHARE * g["flops"])  # once for their keys and values, once for the gradient
    link = SHARE * (NVLINK if ranks <= NODE else NETWORK)
    passes = -(-busy * samples * budget // micro_tokens) + -(-busy * prompt // micro_tokens)
    sent = bytes_sharded(ranks, weights, 0, passes, 0, 2) if shard else bytes_replicated(ranks, weights)
    network = 0.0 if ranks == 1 else sent / link
    return {"rows": min(room, busy * samples), "waves": len(waves), "busy": min(ranks, prompts), "held": held, "sampling": sampling, "floor": floor,
            "training": training, "prompts": prompts_too, "network": network, "step": sampling + training + prompts_too + network}


def paper():
    print("\nOn paper: seconds of a step, 8 completions a prompt, all 8,000 tokens long, N = 3. Not measured.\n")
    print("model | GPUs | prompts | --shard | GB held | rows a GPU | waves | sampling (floor) | training | prompts | network | step | completions / s and GPU")
    for shape, gpu, ranks, prompts, shard in (
            ("4B", "H100", 8, 32, False), ("4B", "H100", 8, 32, True), ("4B", "H100", 64, 32, True), ("4B", "H100", 64, 256, True),
            ("32B", "H100", 8, 32, True), ("32B", "H100", 64, 32, True), ("32B", "H200", 8, 32, True), ("32B", "H200", 64, 32, True),
            ("32B", "H200", 64, 256, True)):
        t = step_on_paper(shape, gpu, ranks, prompts, shard=shard)
        head = f"{shape:>5} | {ranks:>2} {gpu} | {prompts:>4} | {'yes' if shard else 'no ':>3} | {t['held'] / 1e9:6.1f} |"
        if not t["rows"]:
            print(head, "no room for the cache of one row")
            continue
        print(head, f"{t['rows']:>3} | {t['waves']:>2} | {t['sampling']:7.0f} ({t['floor']:.0f}) | {t['training']:6.1f} | {t['prompts']:5.1f} | "
              f"{t['network']:5.1f} | {t['step']:6.0f} | {prompts * 8 / t['step'] / ranks:.4f}")


def main():
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    if sys.argv[1:] != ["--paper"]:
        sys.path.insert(0, str(REPO))
        from model import Transformer

        model = Transformer.from_pretrained(REPO / "data/tiny/model")
        whole, layers = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers))
        expected = {"1 process": 0.0, "2 processes": bytes_replicated(2, whole),
                    "2 processes, --shard": bytes_sharded(2, layers, whole - layers, 1, 1, 4, reduce=2)}
        found = measure()
        out = REPO / "out/scale.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({"steps": found, "expected": expected}, indent=2) + "\n")
        print("measured here            | steps/s | tokens/s | sampling s | training s | MB sent a step and process | expected, with the completions")
        for way, steps in found.items():
            m = summary(steps)
            completions = m["tokens"] * 12 / 2 * (WAYS[way][0] > 1)  # this rank's half, to the other
            print(f"{way:24} | {m['steps_per_second']:7.3f} | {m['tokens_per_second']:8.0f} | {m['sampling']:10.2f} | {m['training']:10.2f} | "
                  f"{m['sent'] / 1e6:10.2f} | {(expected[way] + completions) / 1e6:8.2f}")
    paper()


if __name__ == "__main__":
    main()
