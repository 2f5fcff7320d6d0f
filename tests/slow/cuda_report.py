"""
Is BCR right on this GPU, and how fast is it? One command, under ten minutes on an H100:

    python tests/slow/cuda_report.py --out report.json
    python tests/slow/cuda_report.py --rehearse          small shapes on a CPU, in under a minute

It prints a Markdown table and writes the same as JSON. The exit status is 1 if a part that must hold fails; the
other parts are measurements. A part that raises is reported by its message, and the next one follows.

The 1.5B shape is DeepSeek-R1-Distill-Qwen-1.5B, the 4B shape Qwen3-4B, with random weights in bfloat16. Three
complete steps need a card of 80 GB; the checkpoint needs 25 GB of disk where TMPDIR says. GB are 10^9 bytes.
A rehearsal runs the same functions on a CPU; what only CUDA has is reported as "needs CUDA".
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # this file runs as a script

import numpy as np
import torch
from torch.autograd import DeviceType

import bcr
import distributed
import rollout
from data.chat import encode_chat, load_chat
from data.problems import batch_prompt, load_problems
from model import Config, Transformer

NEEDS_CUDA = "needs CUDA"
PEAK_FLOPS = 989e12  # dense bfloat16 products, from the data sheets of H100 SXM and H200
SHAPE_15B = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "max_position_embeddings": 131072}
SHAPE_4B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "tie_word_embeddings": True}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@dataclass(frozen=True)
class Sizes:
    """What the parts compute: by default that of the full report."""

    device: str = "cuda:0"
    shrink: dict = dataclasses.field(default_factory=dict)  # replaces sizes of the two shapes
    copied: int = 2**30  # bytes
    square: int = 8192
    flags: tuple = ("--eval-n", "1,4", "--eval-problems", "32")
    parity: tuple = (32, 256)  # prompts, budget
    rows: tuple = (32, 128, 256)
    profiled_contexts: tuple = (256, 3000, 5820)
    contexts: tuple = (1024, 3072, 5632)
    graph_budget: int = 300
    micro_tokens: int = 8192
    # Complete steps. With random weights a token is one of V / ending EOS ids with probability 1 / ending. The
    # last of 256 rows ends after about ending * (ln 256 + 0.6) = 920 tokens, in a cache of the full size.
    groups: int = 32
    longest_prompts: tuple = (700, 1500)
    budget: int = 5120
    ending: int = 150
    evaluation: tuple = (272, 16384)  # Minerva's prompts, budget


REHEARSAL = Sizes(
    device="cpu", shrink=TINY, copied=2**20, square=128,
    flags=("--eval-n", "1", "--eval-problems", "2", "--eval-budget", "40", "--budget", "40", "--groups", "2",
           "--samples", "2", "--processes", "1"),
    parity=(3, 40), rows=(2, 4), profiled_contexts=(16, 37), contexts=(16, 32), graph_budget=20,
    micro_tokens=256, groups=2, longest_prompts=(7, 15), budget=24, ending=8, evaluation=(5, 60))


# ----------------------------------------------------------------------------------------------
# Uses of the repo that several parts share


def random_model(shape, sizes):
    """A model with random weights in bfloat16, its float32 master weights, and AdamW."""
    with torch.device(sizes.device):
        model = Transformer(Config.from_hf(shape | sizes.shrink)).to(torch.bfloat16)
    master = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    return model, master, torch.optim.AdamW(master, lr=1e-6, foreach=False)


def random_prompts(model, count, length):
    return torch.randint(model.config.vocab_size, (count, length)).tolist()


def random_eos(model, ending):
    return torch.randperm(model.config.vocab_size)[:model.config.vocab_size // ending].tolist()


def full_batch(prompt, sequences, sizes):
    """Random completions that fill a micro-batch."""
    length = (sizes.micro_tokens - len(prompt)) // sequences
    tokens = torch.randint(10, 500, (sequences, length)).tolist()
    return [bcr.Row(prompt, row, torch.zeros(length), np.ones(length)) for row in tokens]


def decode_step(model, n, context):
    """step(n, filled), which computes one token of n rows that hold `context` tokens each. No row is alive, so
    none moves: the step can be repeated."""
    budget = 8
    rows = rollout.Rows(model, n, budget, context)
    rows.position += context - 1
    eos = torch.tensor([-1], device=model.device)
    return torch.inference_mode()(
        lambda n, filled: rollout.sample_token(model, rows, eos, budget, 1.0, n, filled))


def timed(sizes, function, repeats=1, warm_up=0):
    """Seconds of one call."""
    for _ in range(warm_up):
        function()
    synchronize(sizes)
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(sizes)
    return (time.perf_counter() - begin) / repeats


def on_cuda(sizes):
    return sizes.device != "cpu"


def synchronize(sizes):
    if on_cuda(sizes):
        torch.cuda.synchronize()


def release(sizes):
    """Returns unused memory to the device and starts the peaks again."""
    gc.collect()
    if on_cuda(sizes):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(sizes):
    if not on_cuda(sizes):
        return {"GB allocated": NEEDS_CUDA}
    return {"GB allocated": torch.cuda.max_memory_allocated() / 1e9,
            "GB reserved": torch.cuda.max_memory_reserved() / 1e9}


def free_memory():
    """Gigabytes that the device has free; NaN without one."""
    return torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else float("nan")


@contextlib.contextmanager
def watch_captures():
    """Yields a list of the free memory at the beginning of each capture of a graph."""
    free, capture_begin = [], torch.cuda.CUDAGraph.capture_begin

    def watched(graph, *arguments, **options):
        free.append(free_memory())
        return capture_begin(graph, *arguments, **options)

    with mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", watched):
        yield free


# ----------------------------------------------------------------------------------------------
# The parts. Each yields (case, {name: value}) and raises if it does not hold.


@functools.cache
def limits(device, copied, square):
    """The bytes per second that a copy moves (read and written), and the flops of a bfloat16 product."""
    sizes = dataclasses.replace(REHEARSAL, device=device)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(square, square, dtype=torch.bfloat16, device=device)
    copying = timed(sizes, lambda: target.copy_(source), repeats=20, warm_up=2)
    multiplying = timed(sizes, lambda: a @ a, repeats=20, warm_up=2)
    return 2 * copied / copying, 2 * square**3 / multiplying


def device_limits(sizes):
    name, memory = platform.processor() or platform.machine(), NEEDS_CUDA
    if on_cuda(sizes):
        properties = torch.cuda.get_device_properties(sizes.device)
        name, memory = properties.name, properties.total_memory / 1e9
    yield "device", {"name": name, "GB": memory, "torch": torch.__version__, "CUDA": torch.version.cuda,
                     "Python": platform.python_version()}
    copy_rate, flops = limits(sizes.device, sizes.copied, sizes.square)
    yield "limits", {"copy GB/s": copy_rate / 1e9, "bfloat16 TFLOP/s": flops / 1e12}


def run(*command):
    """Runs a command in the repo. Returns its seconds and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=REPO, capture_output=True, text=True)
    last = (done.stderr.strip().split("\n") or [""])[-1]
    assert done.returncode == 0, f"{' '.join(map(str, command))}: exit status {done.returncode}: {last}"
    return time.perf_counter() - begin, done.stdout


def resume(out, flags, steps):
    return run("bcr.py", *flags, "--out", out, "--steps", steps, "--resume")


def programs(sizes):
    """bcr.py with a resume, evaluate.py, and the names of devices."""
    flags = [*sizes.flags, "--save-every", 1]
    devices = ["auto", "cuda", "cuda:0"] if on_cuda(sizes) else ["cpu"]
    with tempfile.TemporaryDirectory() as folder:
        for device in devices:
            out = Path(folder) / device.replace(":", "-")
            own = [*flags, "--device", device]
            seconds, printed = run("bcr.py", *own, "--out", out, "--steps", 2)
            yield f"bcr.py --device {device}", {"seconds": seconds}
            assert sizes.device in printed, f"--device {device} did not compute on {sizes.device}"
        if not on_cuda(sizes):
            yield "bcr.py --device auto, cuda, cuda:0", {"seconds": NEEDS_CUDA}
        yield "resume", {"seconds": resume(out, own, 3)[0]}
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3], "the resumed run lacks steps"
        seconds, _ = run("evaluate.py", "--model", out / "model", "--n", "1", "--problems", 8,
                         "--device", devices[0], "--out", out / "evaluate")
        yield "evaluate.py", {"seconds": seconds}
        seconds, _ = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "bcr.py",
                         *flags, "--device", devices[0], "--out", Path(folder) / "torchrun", "--steps", 1)
        yield "torchrun, one process", {"seconds": seconds}


def compare(ours, expected):
    """How far completions agree. A token whose logits are almost equal may differ."""
    equal = [(a, b) for a, b in zip(ours, expected) if a.tokens == b.tokens]
    differences = [(a.logprobs - b.logprobs).abs().max().item() for a, b in equal]
    return {"equal completions": len(equal) / len(ours), "logprobs differ by": max(differences, default=0.0)}


def parity(sizes):
    """The shipped model samples on the GPU what it samples on the CPU, and the trainer agrees."""
    path = REPO / "data/tiny/model"
    count, budget = sizes.parity
    chat = load_chat(path)
    problems = load_problems(REPO / "data/tiny/heldout.jsonl")[:count]
    prompts = [encode_chat(chat, batch_prompt([problem])) for problem in problems]
    model = Transformer.from_pretrained(path)
    sample = functools.partial(rollout.generate, model, prompts, 2, budget, eos_ids=chat.eos_ids, seed=1)
    expected = {temperature: sample(temperature=temperature) for temperature in (0.0, 1.0)}
    model.to(sizes.device)
    for temperature, completions in expected.items():
        found = compare(sample(temperature=temperature), completions)
        yield f"float32, temperature {temperature}", found
        assert found["equal completions"] >= 0.95, "the tokens are not those of the CPU"
        assert found["logprobs differ by"] < 1e-3, "the logprobs are not those of the CPU"
    model.to(torch.bfloat16)
    found = compare(sample(temperature=0.0), expected[0.0])
    yield "bfloat16 beside float32 on the CPU, temperature 0", found
    gaps = []
    for i, completion in enumerate(sample(temperature=1.0)):
        tokens, logprobs = completion.tokens, completion.logprobs
        row = bcr.Row(prompts[i // 2], tokens, logprobs, np.ones(len(tokens)))
        with torch.no_grad():
            gaps.append((rollout.token_logprobs(model, [row], 1.0).cpu() - logprobs).abs())
    gaps = torch.cat(gaps)
    yield "bfloat16, sampler beside trainer", {"mean gap": gaps.mean().item(), "largest": gaps.max().item()}
    assert gaps.mean() < 0.05, "the trainer does not see the distribution that was sampled"


def kernels(sizes):
    """The kernels of a token: attention is fused, and no step copies the cache."""
    model = random_model(SHAPE_15B, sizes)[0]
    for n in (sizes.rows[0], sizes.rows[-1]):
        for context in sizes.profiled_contexts:
            release(sizes)
            found = kernels_case(model, n, context, sizes)
            yield f"{n} rows, context {context:,}", found
            assert found["attention"], "attention is not fused"
            assert found["GB"] == NEEDS_CUDA or found["GB"] < 1, "a step allocates more than 1 GB"


def kernels_case(model, n, context, sizes):
    step = decode_step(model, n, context)
    step(n, context)
    release(sizes)
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile() as profile:
        step(n, context)
        synchronize(sizes)
    gigabytes = (torch.cuda.max_memory_allocated() - before) / 1e9
    wanted = DeviceType.CUDA if on_cuda(sizes) else DeviceType.CPU
    clock = "self_device_time_total" if on_cuda(sizes) else "self_cpu_time_total"
    found = [event for event in profile.key_averages() if event.device_type == wanted]
    found.sort(key=lambda event: getattr(event, clock), reverse=True)
    attention = [short(event.key) for event in found if re.search("fmha|flash", event.key)]
    return {"kernels": sum(event.count for event in found), "attention": ", ".join(attention),
            "longest": ", ".join(short(event.key) for event in found[:3]),
            "GB": gigabytes if on_cuda(sizes) else NEEDS_CUDA}


def short(kernel):
    """The name of a kernel without its arguments."""
    return re.sub("[|<(].*", "", kernel.removeprefix("void "))[:60]


def graphs(sizes):
    """Graphs and eager steps sample the same tokens, while rows end."""
    model = random_model(SHAPE_15B, sizes)[0]
    rows, budget = sizes.rows[-1], sizes.graph_budget
    prompts, eos = random_prompts(model, rows // 2, 20), random_eos(model, budget)
    sample = functools.partial(rollout.generate, model, prompts, 2, budget, eos_ids=eos, max_rows=rows)
    begin = time.perf_counter()
    with watch_captures() as free:
        ours = sample()
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    with mock.patch.object(rollout, "captured", lambda step: step):
        expected = sample()
    eager_seconds = time.perf_counter() - begin
    growth = (free[0] - free[-1]) / (len(free) - 1) if len(free) > 1 else NEEDS_CUDA
    equal = compare(ours, expected)["equal completions"]
    yield f"{rows} rows, at most {budget} tokens", {
        "seconds": seconds, "eager seconds": eager_seconds, "captures": len(free) or NEEDS_CUDA,
        "GB of each": growth, "equal completions": equal}
    assert equal == 1, "graphs change tokens"
    assert free or not on_cuda(sizes), "no graph was captured"


def decode_case(model, n, context, sizes):
    """The speed of a decode step. A token of every row reads the weights once and the row's cache once."""
    step = decode_step(model, n, context)
    if on_cuda(sizes):
        step = rollout.captured(step)
    seconds = timed(sizes, lambda: step(n, context), repeats=20, warm_up=3)
    c = model.config
    weights = sum(p.numel() for p in model.model.layers.parameters()) + c.vocab_size * c.hidden_size
    cache = 2 * n * context * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    rate = 2 * (weights + cache) / seconds
    copy_rate, _ = limits(sizes.device, sizes.copied, sizes.square)
    return {"tokens/s": n / seconds, "ms": 1000 * seconds, "GB/s": rate / 1e9,
            "% of copy": 100 * rate / copy_rate}


def decoding(sizes):
    model = random_model(SHAPE_15B, sizes)[0]
    for n in sizes.rows:
        for context in sizes.contexts:
            yield f"{n} rows, context {context:,}", decode_case(model, n, context, sizes)
            release(sizes)


def training_case(model, master, sequences, checkpointing, sizes):
    """The speed of passes of micro_tokens tokens, a sixteenth of them prompt. Flops: 6 for each weight and token
    (the head's for completions only), 12 for each channel of a query and each token that it sees."""
    model.checkpointing = checkpointing
    settings = bcr.Settings(micro_tokens=sizes.micro_tokens)
    prompt = random_prompts(model, 1, sizes.micro_tokens // 16)[0]
    passes = 4
    rows = full_batch(prompt, sequences, sizes) * passes
    release(sizes)
    seconds = timed(sizes, lambda: bcr.accumulate_gradient(model, master, rows, 1000, settings), warm_up=1)
    seconds /= passes
    c = model.config
    predicted = sequences * len(rows[0].tokens)
    weights = sum(p.numel() for p in model.model.layers.parameters())
    products = weights * (len(prompt) + predicted) + c.vocab_size * c.hidden_size * predicted
    seen = sequences * (len(prompt) + len(rows[0].tokens)) ** 2 / 2
    channels = c.num_hidden_layers * c.num_attention_heads * c.head_dim
    flops = (6 * products + 12 * channels * seen) / seconds
    _, possible = limits(sizes.device, sizes.copied, sizes.square)
    return {"seconds": seconds, "tokens/s": (len(prompt) + predicted) / seconds, "TFLOP/s": flops / 1e12,
            "% of a product's": 100 * flops / possible, "MFU %": 100 * flops / PEAK_FLOPS, **peaks(sizes)}


def training(sizes):
    model, master, _ = random_model(SHAPE_15B, sizes)
    for sequences in (1, 8):
        for checkpointing in (False, True):
            case = f"{sequences} x {sizes.micro_tokens // sequences:,}" + ", checkpointing" * checkpointing
            yield case, training_case(model, master, sequences, checkpointing, sizes)


def complete_step(model, master, optimizer, prompts, eos, sizes, step):
    """A step of training: sampling, gradient, AdamW, bfloat16 weights. Returns seconds and the least free
    memory. One full micro-batch beside the sampled completions reaches the peak of training."""
    clocks = [time.perf_counter()]
    with watch_captures() as free:
        completions = rollout.generate(model, prompts, 8, sizes.budget, eos_ids=eos, step=step)
    free.append(free_memory())
    clocks.append(time.perf_counter())
    rows = full_batch(prompts[0], 8, sizes)
    for i, c in enumerate(completions):
        rows.append(bcr.Row(prompts[i // 8], c.tokens, c.logprobs, np.full(len(c.tokens), (-1.0) ** i)))
    settings = bcr.Settings(micro_tokens=sizes.micro_tokens)
    bcr.accumulate_gradient(model, master, rows, len(rows) * sizes.budget, settings)
    norm = distributed.clip_gradient(master, 1.0)
    assert 0 < norm < float("inf"), f"the norm of the gradient is {norm}"
    optimizer.step()
    bcr.copy_weights(master, model)
    optimizer.zero_grad()
    synchronize(sizes)
    free.append(free_memory())
    clocks.append(time.perf_counter())
    return {"sampling": clocks[1] - clocks[0], "training": clocks[2] - clocks[1],
            "GB free at least": min(free) if on_cuda(sizes) else NEEDS_CUDA, "tokens": sum(len(c.tokens) for c in completions)}


def three_steps(sizes):
    """The paper's steps with the whole cache, then an evaluation beside AdamW's state."""
    for longest in sizes.longest_prompts:
        release(sizes)
        model, master, optimizer = random_model(SHAPE_15B, sizes)
        prompts, eos = random_prompts(model, sizes.groups, longest), random_eos(model, sizes.ending)
        first = master[0].detach().clone()
        release(sizes)
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        for step in (1, 2, 3):
            found = complete_step(model, master, optimizer, prompts, eos, sizes, step)
            yield f"prompts of {longest:,}, step {step}", found | peaks(sizes)
        assert not torch.equal(first, master[0]), "the weights do not move"
        retried = torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries
        yield f"prompts of {longest:,}", {"allocations tried again": retried if on_cuda(sizes) else NEEDS_CUDA}
    count, budget = sizes.evaluation
    prompts = random_prompts(model, count, sizes.longest_prompts[0])
    begin = time.perf_counter()
    with watch_captures() as free:
        completions = rollout.generate(model, prompts, 1, budget, eos_ids=eos)
    free.append(free_memory())
    yield f"evaluation, budget {budget:,}", {
        "seconds": time.perf_counter() - begin, "tokens": sum(len(c.tokens) for c in completions),
        "GB free at least": min(free) if on_cuda(sizes) else NEEDS_CUDA, **peaks(sizes)}


def save(out, model, master, optimizer):
    distributed.save_checkpoint(out, 1, model, master, optimizer)


def load(out, model, master, optimizer):
    distributed.load_checkpoint(out, model, master, optimizer)


def tensors_of(master, optimizer):
    """Master weights and AdamW's state, which are tensors too."""
    states = [value for weight in master for value in optimizer.state[weight].values()]
    return [weight.detach() for weight in master] + states


def resident(field):
    """Gigabytes of host memory of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024 / 1e9


def watch_host(function):
    """Calls a function. Returns its seconds and how far host memory rose above what it was."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident("VmRSS")
    begin = time.perf_counter()
    function()
    return {"seconds": time.perf_counter() - begin, "GB of host memory": resident("VmHWM") - before}


def checkpoint(sizes):
    """What is saved is what is loaded."""
    model, master, optimizer = random_model(SHAPE_15B, sizes)
    for weight in master:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    saved = [tensor.clone() for tensor in tensors_of(master, optimizer)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        found = watch_host(lambda: save(out, model, master, optimizer))
        files = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        yield "save", found | {"GB": sum(files) / 1e9}
        for tensor in tensors_of(master, optimizer):
            tensor.zero_()
        yield "load", watch_host(lambda: load(out, model, master, optimizer))
    for old, new in zip(saved, tensors_of(master, optimizer), strict=True):
        assert torch.equal(old, new), "what was loaded is not what was saved"


def no_memory(sizes):
    """bcr.py ends with status 2 and one sentence, in an eager step and in the capture of a graph."""
    for place in ("eager", "capture"):
        if place == "capture" and not on_cuda(sizes):
            yield place, {"message": NEEDS_CUDA}
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [__file__, "--run-out-of-memory", place, "--device", sizes.device, *sizes.flags]
            done = subprocess.run([sys.executable, *command, "--steps", "1", "--out", folder], cwd=REPO,
                                  capture_output=True, text=True)
        yield place, {"status": done.returncode, "message": (done.stderr.strip().split("\n") or [""])[-1]}
        assert done.returncode == 2, f"{place}: exit status {done.returncode}"
        assert "memory ran out" in done.stderr, f"{place}: the sentence is missing"
        assert "Traceback" not in done.stderr, f"{place}: a traceback is printed"


def run_out_of_memory(place, arguments):
    """bcr.py where nothing can be allocated from the first softmax, or the first capture, on."""
    owner, name = (torch, "log_softmax") if place == "eager" else (torch.cuda.CUDAGraph, "capture_begin")
    function = getattr(owner, name)

    def without_memory(*positional, **named):
        hog = take_memory()
        result = function(*positional, **named)
        return result, hog

    setattr(owner, name, without_memory)
    bcr.main(arguments)


def take_memory():
    """Allocates the whole memory of the GPU; on a CPU, more than there is."""
    hog, size = [], 2**30
    if not torch.cuda.is_available():
        hog.append(torch.empty(2**60, dtype=torch.uint8))
    while size >= 512:
        try:
            hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return hog


def larger_model(sizes):
    """The shape of the 4B command."""
    model, master, _ = random_model(SHAPE_4B, sizes)
    yield "8 rows, context 2,048", decode_case(model, 8, min(2048, sizes.contexts[-1]), sizes)
    yield "training, checkpointing", training_case(model, master, 1, True, sizes)


# ----------------------------------------------------------------------------------------------
# The report

PARTS = [  # title, function, must it hold?
    ("device and limits", device_limits, False),
    ("programs", programs, True),
    ("the CPU's tokens", parity, True),
    ("kernels of a token", kernels, True),
    ("graphs", graphs, True),
    ("decoding, 1.5B", decoding, False),
    ("training passes, 1.5B", training, False),
    ("three complete steps, 1.5B", three_steps, True),
    ("checkpoint, 1.5B", checkpoint, True),
    ("out of memory", no_memory, True),
    ("4B", larger_model, False)]


def measure(title, function, must_hold, sizes):
    """Runs a part and prints its lines of the table."""
    begin = time.perf_counter()
    cases = {}
    result = "holds" if must_hold else "measured"
    if not on_cuda(sizes):
        result = "rehearsed"
    try:
        for case, values in function(sizes):
            cases[case] = values
            print(f"| {title} | {case} | {text_of(values)} |", flush=True)
    except Exception as error:
        result = f"FAILS: {type(error).__name__}: {error}".split("\n")[0]
    seconds = time.perf_counter() - begin
    print(f"| {title} | **{result}** | {seconds:.0f} s |", flush=True)
    return {"part": title, "must hold": must_hold, "result": result, "seconds": seconds, "cases": cases}


def text_of(values):
    return ", ".join(f"{name} {number(value)}" for name, value in values.items()).replace("|", "/")


def number(value):
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return value


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="JSON file to write")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on a CPU")
    o = parser.parse_args()
    if not o.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU: add --rehearse for a rehearsal on the CPU")
    sizes = REHEARSAL if o.rehearse else Sizes()
    torch.manual_seed(0)
    print("| part | case | measured |\n| --- | --- | --- |")
    parts = []
    for number_of_part, (title, function, must_hold) in enumerate(PARTS):
        parts.append(measure(f"{number_of_part} {title}", function, must_hold, sizes))
        release(sizes)
        if o.out:
            Path(o.out).write_text(json.dumps(parts, indent=2) + "\n")
    return int(any(part["must hold"] and part["result"].startswith("FAILS") for part in parts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run-out-of-memory"]:
        run_out_of_memory(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
