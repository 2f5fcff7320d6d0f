"""
Is BCR right on this GPU, and how fast is it? One command, under ten minutes on an H100:

    python tests/slow/cuda_report.py --out report.json
    python tests/slow/cuda_report.py --rehearse     small shapes on a CPU, under a minute

It prints a Markdown table and writes the same as JSON. The exit status is 1 if a part that must
hold fails; the others are measurements. A part that raises is reported, and the next one follows.
1.5B has the shape of DeepSeek-R1-Distill-Qwen-1.5B, 4B that of Qwen3-4B: random weights, bfloat16.
Three complete steps need a card of 80 GB; the checkpoint needs 25 GB of disk where TMPDIR says.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # this file runs as a script
if "--rehearse" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the programs that it starts, too

import numpy as np
import torch
from torch.autograd import DeviceType

import bcr
import distributed
import rollout
from data import runs
from data.chat import encode_chat, load_chat
from data.files import read_json
from data.problems import batch_prompt, load_problems
from model import Config, Transformer
from tests.bench.scale import CONFIGS

CUDA = torch.cuda.is_available()
NEEDS_CUDA = "needs CUDA"
SHIPPED = REPO / "data/tiny/model"
PEAK_FLOPS = 989e12  # dense bfloat16 products, from the data sheets of H100 SXM and H200

SHAPE_15B = CONFIGS["hbx/JustRL-DeepSeek-1.5B"]
SHAPE_4B = CONFIGS["Qwen/Qwen3-4B-Thinking-2507"]
# A random model samples one of the first V / ending ids with probability 1 / ending. With these as
# EOS, the last of 256 rows ends after about ending * (ln 256 + 0.6) = 920 tokens.
FULL = SimpleNamespace(
    device="cuda:0", device_flags=("auto", "cuda", "cuda:0"), square=8192,
    flags=("--eval-n", "1,4", "--eval-problems", "32"), problems=32, rows=(32, 128, 256),
    contexts=(1024, 3072, 5632), profiled=(256, 3000, 5820), micro_tokens=8192, groups=32,
    prompt_lengths=(700, 1500), budget=5120, ending=150, eval_prompts=272, eval_budget=16384)
REHEARSAL = SimpleNamespace(
    device="cpu", device_flags=("cpu",), square=128,
    flags=("--n", "1", "--budget", "40", "--groups", "2", "--samples", "2", "--eval-n", "1",
           "--eval-problems", "2", "--eval-budget", "40", "--processes", "1"),
    problems=2, rows=(2, 4), contexts=(16, 32), profiled=(16, 37), micro_tokens=128, groups=2,
    prompt_lengths=(7, 15), budget=24, ending=8, eval_prompts=5, eval_budget=60)


def random_model(shape, s):
    """A model with random weights in bfloat16, its float32 master weights, and AdamW."""
    if s is REHEARSAL:
        shape = read_json(SHIPPED / "config.json") | {"tie_word_embeddings": False}
    with torch.device(s.device):
        model = Transformer(Config.from_hf(shape)).to(torch.bfloat16)
    master = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    return model, master, torch.optim.AdamW(master, lr=1e-6, foreach=False)


def random_tokens(model, count, length):
    return torch.randint(model.config.vocab_size, (count, length)).tolist()


def full_batch(model, prompt, sequences, s):
    """Random completions that fill a micro-batch."""
    length = (s.micro_tokens - len(prompt)) // sequences
    return [bcr.Row(prompt, tokens, torch.zeros(length), np.ones(length))
            for tokens in random_tokens(model, sequences, length)]


def decode_step(model, n, context):
    """step(n, filled) computes a token of n rows with `context` tokens. No row is alive, so none
    moves: the step can be repeated."""
    slots = rollout.Slots(model, n, context)
    eos = torch.tensor([-1], device=model.device)
    slots.position += context - 1
    return torch.inference_mode()(
        lambda n, filled: rollout.sample_token(model, slots, eos, 8, 1.0, n, filled))


def release():
    """Returns unused memory to the device, and starts its peaks again."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(function, repeats=1, warm_up=0):
    """Seconds of one call."""
    for _ in range(warm_up):
        function()
    release()
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def free_memory():
    return torch.cuda.mem_get_info()[0] / 1e9 if CUDA else NEEDS_CUDA


def memory(free=()):
    """The peaks, in GB, and the least of `free` and what is free now."""
    if not CUDA:
        return {"memory": NEEDS_CUDA}
    return {"GB allocated": torch.cuda.max_memory_allocated() / 1e9,
            "reserved": torch.cuda.max_memory_reserved() / 1e9, "free": min([*free, free_memory()]),
            "allocations tried again": torch.cuda.memory_stats()["num_alloc_retries"]}


# The parts follow. Each yields (case, {name: value}), and raises if it does not hold.


def device(s):
    """Also measures what others are compared with: bytes of a copy, flops of a product."""
    name = torch.cuda.get_device_name() if CUDA else NEEDS_CUDA
    yield "versions", {"GPU": name, "torch": torch.__version__, "CUDA": torch.version.cuda}
    a = torch.randn(s.square, s.square, dtype=torch.bfloat16, device=s.device)
    seconds = timed(lambda: a @ a, repeats=20, warm_up=2)
    source = torch.zeros(8 * s.square**2, dtype=torch.bfloat16, device=s.device)
    target = torch.empty_like(source)
    copying = timed(lambda: target.copy_(source), repeats=20, warm_up=2)
    s.copy_rate = 2 * source.nbytes / copying  # read and written
    yield "limits", {"copy GB/s": s.copy_rate / 1e9, "TFLOP/s": 2 * s.square**3 / seconds / 1e12}


def run(*command, status=0):
    """Runs a command in the repo. Returns its seconds and what it prints."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=REPO, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = done.stdout.strip()
    assert done.returncode == status, f"{command} ends with {done.returncode}: {printed[-300:]}"
    return time.perf_counter() - begin, printed


def resume(out, steps):
    """Goes on with a run, under torchrun with one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "--"]
    return run(*torchrun, "bcr.py", "--resume", out, "--steps", steps)


def programs(s):
    """bcr.py with every name of the device, a resume by torchrun, and evaluate.py."""
    with tempfile.TemporaryDirectory() as folder:
        for name in s.device_flags:
            out = Path(folder, name.replace(":", "-"))
            flags = [*s.flags, "--save-every", 1, "--device", name]
            seconds, printed = run("bcr.py", *flags, "--out", out, "--steps", 2)
            yield f"bcr.py --device {name}", {"seconds": seconds}
            assert s.device in printed, f"--device {name} does not compute on {s.device}"
        if not CUDA:
            yield "bcr.py --device auto, cuda, cuda:0", {"seconds": NEEDS_CUDA}
        yield "resume, torchrun", {"seconds": resume(out, 3)[0]}
        lines = (out / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == [1, 2, 3], f"the steps after a resume are {steps}"
        command = ["evaluate.py", "--model", out / "model", "--n", 1, "--problems", 8, "--device"]
        yield "evaluate.py", {"seconds": run(*command, name, "--out", out / "evaluate")[0]}


def compare(ours, expected):
    """How far completions agree. Where two logits are almost equal, a token may differ."""
    equal = [(a, b) for a, b in zip(ours, expected) if a.tokens == b.tokens]
    differences = [(a.logprobs - b.logprobs).abs().max().item() for a, b in equal]
    return {"equal": len(equal) / len(ours), "logprobs differ by": max([0.0, *differences])}


def parity(s):
    """The shipped model samples on the GPU what it samples on the CPU, and training agrees."""
    chat = load_chat(SHIPPED)
    problems = load_problems(REPO / "data/tiny/heldout.jsonl")[:s.problems]
    prompts = [encode_chat(chat, batch_prompt([problem])) for problem in problems]
    model = Transformer.from_pretrained(chat.path)
    sample = functools.partial(rollout.generate, model, prompts, 2, 256, eos_ids=chat.eos_ids)
    expected = {temperature: sample(temperature=temperature) for temperature in (0.0, 1.0)}
    model.to(s.device)
    for temperature, completions in expected.items():
        found = compare(sample(temperature=temperature), completions)
        yield f"float32, temperature {temperature}", found
        assert found["equal"] > 0.95, "the tokens are not those of the CPU"
        assert found["logprobs differ by"] < 1e-3, "the logprobs are not those of the CPU"
    model.to(torch.bfloat16)
    yield "bfloat16, temperature 0.0", compare(sample(temperature=0.0), expected[0.0])
    gaps = []
    for i, c in enumerate(sample()):
        row = bcr.Row(prompts[i // 2], c.tokens, c.logprobs, np.ones(len(c.tokens)))
        with torch.no_grad():
            gaps.append(rollout.token_logprobs(model, [row], 1.0).cpu() - c.logprobs)
    gap = torch.cat(gaps).abs()
    yield "bfloat16, sampler and trainer", {"gap": gap.mean().item(), "max": gap.max().item()}
    assert gap.mean() < 0.05, "the trainer does not see the distribution that was sampled"


def kernels_of(model, n, context):
    step = decode_step(model, n, context)
    step(n, context)
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile() as profile:
        timed(lambda: step(n, context))
    used = (torch.cuda.max_memory_allocated() - before) / 1e9
    wanted = DeviceType.CUDA if CUDA else DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == wanted]
    events.sort(key=lambda event: event.self_device_time_total, reverse=True)
    names = [event.key.removeprefix("void ")[:60] for event in events]
    attention = [name for name in names if re.search("fmha|flash", name)]
    return {"kernels": sum(event.count for event in events), "attention": ", ".join(attention),
            "longest": ", ".join(names[:3]), "GB": used if CUDA else NEEDS_CUDA}


def kernels(s):
    """The attention of a token is fused, and no step copies the cache."""
    model = random_model(SHAPE_15B, s)[0]
    for n in (s.rows[0], s.rows[-1]):
        for context in s.profiled:
            found = kernels_of(model, n, context)
            yield f"{n} rows, context {context:,}", found
            assert found["attention"], "attention is not fused"
            assert not CUDA or found["GB"] < 1, "a step allocates more than 1 GB"


def graphs(s):
    """Graphs and eager steps sample the same tokens, while rows end."""
    model = random_model(SHAPE_15B, s)[0]
    n, budget = s.rows[-1], 2 * s.ending
    prompts = random_tokens(model, n // 2, 20)
    eos = range(model.config.vocab_size // budget)
    sample = functools.partial(rollout.generate, model, prompts, 2, budget, eos_ids=eos)
    begin = time.perf_counter()
    with mock.patch.object(torch.cuda, "graph", wraps=torch.cuda.graph) as graph:
        ours = sample()
    middle = time.perf_counter()
    with mock.patch.dict(rollout.WRAPPERS, cuda=lambda step: step):
        found = compare(ours, sample())
    found |= {"captures": graph.call_count or NEEDS_CUDA, "seconds": middle - begin}
    yield f"{n} rows", found | {"seconds without": time.perf_counter() - middle}
    assert found["equal"] == 1, "graphs change tokens"
    assert graph.called or not CUDA, "no graph is captured"


def decode_speed(model, n, context, s):
    """A token of every row reads the layers and the head once, and the row's keys and values."""
    step = decode_step(model, n, context)
    step = rollout.WRAPPERS[model.device.type](step)
    seconds = timed(lambda: step(n, context), repeats=20, warm_up=3)
    c = model.config
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    cache = 2 * n * context * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    rate = 2 * (layers + c.vocab_size * c.hidden_size + cache) / seconds
    return {"tokens/s": n / seconds, "GB/s": rate / 1e9, "% of copy": 100 * rate / s.copy_rate}


def decoding(s):
    model = random_model(SHAPE_15B, s)[0]
    for n in s.rows:
        for context in s.contexts:
            yield f"{n} rows, context {context:,}", decode_speed(model, n, context, s)


def training_speed(model, master, sequences, checkpointing, s):
    """Four passes of full micro-batches, a sixteenth of them prompt. Flops: 6 for each weight and
    token (the head's for completions), 12 for each channel of a query and each token it sees."""
    model.checkpointing = checkpointing
    settings = bcr.Settings(micro_tokens=s.micro_tokens)
    prompt = random_tokens(model, 1, s.micro_tokens // 16)[0]
    rows = full_batch(model, prompt, sequences, s) * 4
    seconds = timed(
        lambda: bcr.accumulate_gradient(model, master, rows, 1000, settings), warm_up=1) / 4
    c = model.config
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    predicted = sequences * len(rows[0].tokens)
    products = layers * (len(prompt) + predicted) + c.vocab_size * c.hidden_size * predicted
    seen = sequences * (len(prompt) + len(rows[0].tokens)) ** 2 / 2
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    flops = (6 * products + 12 * attention) / seconds
    return {"seconds": seconds, "tokens/s": (len(prompt) + predicted) / seconds,
            "TFLOP/s": flops / 1e12, "MFU %": 100 * flops / PEAK_FLOPS, **memory()}


def training(s):
    model, master, _ = random_model(SHAPE_15B, s)
    for sequences in (1, 8):
        yield f"B = {sequences}", training_speed(model, master, sequences, False, s)
        yield f"B = {sequences}, checkpointing", training_speed(model, master, sequences, True, s)


def complete_step(model, master, optimizer, prompts, eos, s):
    """Sampling, gradient, AdamW, bfloat16 weights. A full micro-batch beside the sampled
    completions brings training to its peak of memory."""
    free = []
    begin = time.perf_counter()
    max_rows = rollout.rows_at_a_time(model, len(prompts[0]) + s.budget, min(256, 8 * len(prompts)))
    completions = rollout.generate(  # free memory is least while the graphs exist
        model, prompts, 8, s.budget, eos_ids=eos,
        on_finished=lambda: free.append(free_memory()))
    middle = time.perf_counter()
    rows = full_batch(model, prompts[0], 8, s)
    for i, c in enumerate(completions):
        advantages = np.full(len(c.tokens), (-1.0) ** i)
        rows.append(bcr.Row(prompts[i // 8], c.tokens, c.logprobs, advantages))
    settings = bcr.Settings(micro_tokens=s.micro_tokens)
    bcr.accumulate_gradient(model, master, rows, len(rows) * s.budget, settings)
    norm = distributed.clip_gradient(master, 1.0)
    assert 0 < norm < float("inf"), f"the norm of the gradient is {norm}"
    optimizer.step()
    bcr.copy_weights(master, model)
    optimizer.zero_grad()
    return {"rows": max_rows, "sampling": middle - begin,
            "training": time.perf_counter() - middle, **memory(free)}


def three_steps(s):
    """The paper's steps with the whole cache, then an evaluation beside AdamW's state."""
    for length in s.prompt_lengths:
        model, master, optimizer = random_model(SHAPE_15B, s)
        prompts = random_tokens(model, s.groups, length)
        eos = range(model.config.vocab_size // s.ending)
        first = master[0].detach().clone()
        release()
        for step in (1, 2, 3):
            found = complete_step(model, master, optimizer, prompts, eos, s)
            yield f"prompts of {length:,}, step {step}", found
        assert not torch.equal(first, master[0]), "the weights do not move"
    prompts = random_tokens(model, s.eval_prompts, s.prompt_lengths[0])
    begin = time.perf_counter()
    distributed.sample(model, prompts, 1, s.eval_budget, eos_ids=eos)
    seconds = time.perf_counter() - begin
    yield f"evaluation, budget {s.eval_budget:,}", {"seconds": seconds, **memory()}


def checkpoint(s):
    """What is loaded is what was saved: master weights and AdamW's state."""
    model, master, optimizer = random_model(SHAPE_15B, s)

    def tensors():
        return [tensor for weight in master
                for tensor in (weight.detach(), *optimizer.state[weight].values())]

    for weight in master:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    saved = [tensor.clone() for tensor in tensors()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        seconds = timed(lambda: runs.save_checkpoint(
            out, 1, [], model, master, optimizer, SHIPPED))
        size = sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        yield "save", {"seconds": seconds, "GB": size, "GB of host memory at most": peak}
        for tensor in tensors():
            tensor.zero_()
        seconds = timed(lambda: runs.load_checkpoint(out, model, master, optimizer))
        yield "load", {"seconds": seconds}
    for old, new in zip(saved, tensors(), strict=True):
        assert torch.equal(old, new), "what is loaded is not what was saved"


def no_memory(s):
    """bcr.py ends with status 2 and a sentence, in an eager step and within a capture."""
    for place in ("eager", "capture") if CUDA else ("eager",):
        with tempfile.TemporaryDirectory() as folder:
            _, printed = run(__file__, "--without-memory", place, *s.flags, "--device", s.device,
                             "--out", Path(folder, "out"), status=2)
        yield place, {"it prints": printed.split("\n")[-1]}
        assert "memory ran out" in printed and "Traceback" not in printed
    if not CUDA:
        yield "capture", {"it prints": NEEDS_CUDA}


def run_without_memory(place, arguments):
    """bcr.py where memory is gone from the first softmax on or, but for pieces below 2 MB, which
    the beginning of a capture needs, from the first capture on. A CPU raises its own error."""
    owner, name, least = torch, "log_softmax", 9
    if place == "capture":
        owner, name, least = torch.cuda.CUDAGraph, "capture_begin", 21
    function = getattr(owner, name)
    device = "cuda" if CUDA else "cpu"
    hog = []

    def without_memory(*positional, **named):
        for exponent in range(59, least - 1, -1):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    hog.append(torch.empty(2**exponent, dtype=torch.uint8, device=device))
        return function(*positional, **named)

    setattr(owner, name, without_memory)
    bcr.main(arguments)


def larger_model(s):
    model, master, _ = random_model(SHAPE_4B, s)
    yield "8 rows, context 2,048", decode_speed(model, 8, 2048, s)
    yield "B = 1, checkpointing", training_speed(model, master, 1, True, s)


PARTS = [device, programs, parity, kernels, graphs, decoding, training, three_steps, checkpoint,
         no_memory, larger_model]
MUST_HOLD = [programs, parity, kernels, graphs, three_steps, checkpoint, no_memory]


def report(part, s):
    """Runs a part and prints its lines of the table. Returns them with the result."""
    begin = time.perf_counter()
    cases = {}
    result = "holds" if part in MUST_HOLD else "measured"
    if s is REHEARSAL:
        result = "rehearsed"
    try:
        for case, values in part(s):
            for name, value in values.items():
                if isinstance(value, float):
                    values[name] = round(value, 4) if value < 10 else round(value, 1)
            cases[case] = values
            measured = ", ".join(f"{name} {value}" for name, value in values.items())
            print(f"| {part.__name__} | {case} | {measured} |", flush=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next part follows
        result = f"FAILS: {type(error).__name__}: {error}".replace("\n", " ")
    print(f"| {part.__name__} | **{result}** | {time.perf_counter() - begin:.0f} s |", flush=True)
    return {"part": part.__name__, "result": result, "cases": cases}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="JSON file to write")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on a CPU")
    o = parser.parse_args()
    s = REHEARSAL if o.rehearse else FULL
    if not CUDA and not o.rehearse:
        parser.error("PyTorch sees no GPU: --rehearse runs small shapes on the CPU")
    print("| part | case | measured |\n| --- | --- | --- |")
    results = []
    for part in PARTS:
        results.append(report(part, s))
        release()
        if o.out:
            Path(o.out).write_text(json.dumps(results, indent=2) + "\n")
    failed = [part for part, found in zip(PARTS, results) if "FAILS" in found["result"]]
    return int(any(part in MUST_HOLD for part in failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--without-memory"]:
        run_without_memory(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
