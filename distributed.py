"""
Several processes. On a CPU `launch` starts one per core; on GPUs torchrun starts them. Each samples
its share of the prompts and learns from its share of the completions. Every draw depends on (seed,
step, prompt, sample, token) alone, so K processes sample what one process would, and the sum of
their gradients is its gradient. On a CPU, with one thread per process, this holds to the last bit.
Ctrl-C and SIGTERM end a run at once: resumed, it repeats the steps since the last checkpoint.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from data.files import UserError, find_model
from model import Transformer, load_weights
from rollout import generate

# ----------------------------------------------------------------------------------------------
# Processes


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def find_device(name):
    """The device that the flag --device means: cpu or cuda:i. Raises UserError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" or name != "cpu" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun each process has its own
    count = torch.cuda.device_count()
    if name not in ["cpu", *(f"cuda:{i}" for i in range(count))]:
        raise UserError(f"--device {name} is not available: use cpu or one of the {count} GPUs "
                        "that PyTorch sees")
    return name


def processes_and_threads(s, most):
    """How many processes to start on a CPU, and the threads of each. A small model gets a process
    of one thread per core, at most 8 and at most `most`: its operations are too small to divide,
    and rounding depends on neither number. Over 100 MB, weights do not fit the caches: one process
    with all threads reads them, unless --processes asks for more."""
    cores = torch.get_num_threads()  # torch's default
    files = find_model(s.model).glob("model*.safetensors")
    if sum(file.stat().st_size for file in files) > 1e8 and s.processes < 2:
        return 1, cores
    return s.processes or min(cores, most, 8), 1


def launch(program, function, s, most):
    """Runs function(s), on a CPU in as many processes as `processes_and_threads` says; this process
    only starts and joins them. Under torchrun, and on one GPU, there is nothing to start."""
    if "RANK" in os.environ or find_device(s.device) != "cpu":
        return function(s)
    count, threads = processes_and_threads(s, most)
    torch.set_num_threads(threads)
    if count == 1:
        return function(s)
    method = "fork" if sys.platform == "linux" and hasattr(os, "fork") else "spawn"
    errors = mp.get_context(method).SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        given = (function, s, count, (Path(directory) / "store").as_uri(), errors)
        run = mp.start_processes(run_as, given, count, join=False, start_method=method)
        try:
            while not run.join(grace_period=1):
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if not errors.empty():
                raise UserError(errors.get()) from None
            sys.exit(f"{program}: error: {str(error).strip()}\n"
                     "Saved files are intact. Continue with --resume DIR")
        finally:
            for process in run.processes:
                process.kill()


def run_as(number, function, s, count, store, errors):
    """The work of one process. Its parent prints the sentence about an error a user can fix."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "BCR_STORE": store}
    torch.set_num_threads(1)
    try:
        function(s)
        dist.barrier()
        dist.destroy_process_group()  # ends gloo's threads before the interpreter does
    except Exception as error:
        if sentence := explain(error):
            errors.put(sentence)
            os._exit(2)  # an orderly exit waits for collectives that other processes have begun
        time.sleep(1)  # if another process ended, that is the cause: the parent should see it first
        raise


def start(name):
    """Joins the process group. Returns the device of this process, for the flag --device."""
    device = find_device(name)
    if device != "cpu":
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
    if world_size() > 1 and not dist.is_initialized():
        url = os.environ.get("BCR_STORE", "env://")
        store, *_ = next(dist.rendezvous(url, rank(), world_size()))
        # After a restart torchrun's store still has the addresses of the processes that ended.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl", store=store, rank=rank(),
            world_size=world_size(), timeout=timedelta(days=1))  # the fastest wait for the slowest
    return device


def all_gather(value):
    """The values of all processes, in the order of their ranks: a list of K."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(function, *arguments):
    """Calls a function on the first process alone. Returns its result on all."""
    return all_gather(function(*arguments) if rank() == 0 else None)[0]


def say(text):
    """Prints a line on the first process."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)  # above a progress bar
        sys.stdout.flush()


def progress_bar(total, title, done=0, pause=None):
    """A progress bar of the first process, on stderr; hidden without a title. Where that is no
    terminal it appears every `pause` seconds, or (None) not at all."""
    pause = 0.1 if sys.stderr.isatty() else pause
    hidden = not title or rank() > 0 or pause is None
    return tqdm(total=total, desc=title, initial=done, leave=False, disable=hidden, miniters=1,
                mininterval=pause, delay=pause)


def explain(error):
    """One sentence about an error that the user can fix, or a stop; None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped. Continue with --resume DIR"
    # The last two names are of cuBLAS and of the capture of a CUDA graph.
    names = "out of memory|allocate memory|unable to allocate|ALLOC_FAILED|error during capture"
    if isinstance(error, (RuntimeError, MemoryError)) and re.search(names, str(error), re.I):
        return ("memory ran out: lower --rows if it was sampling, lower --micro-tokens or add "
                "--checkpointing if it was training, or lower the budget")


@contextlib.contextmanager
def readable_errors(program):
    """Ends the program with one sentence instead of a traceback for errors that the user can fix
    (status 2), and for Ctrl-C and SIGTERM (status 130)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"{program}: error: {sentence}", file=sys.stderr, flush=True)
        status = 130 if isinstance(error, KeyboardInterrupt) else 2
        if dist.is_initialized():
            os._exit(status)  # see run_as
        sys.exit(status)


# ----------------------------------------------------------------------------------------------
# Shares of the work, and of the weights (--shard)


def sample(model, prompts, samples, budget, title="", **options):
    """`rollout.generate` with the prompts divided among the processes: all completions, on each."""
    K = world_size()
    mine = range(rank(), len(prompts), K)
    own = []
    with full_weights(model) as full, progress_bar(len(mine) * samples, title, pause=300) as bar:
        if mine:
            own = generate(full, [prompts[p] for p in mine], samples, budget, prompt_keys=mine,
                           on_finished=bar.update, **options)
    # Arrays are pickled many times as fast as tensors.
    parts = all_gather([dataclasses.replace(c, logprobs=c.logprobs.numpy()) for c in own])
    completions = []
    for p in range(len(prompts)):
        start = p // K * samples
        completions += parts[p % K][start : start + samples]
    return [dataclasses.replace(c, logprobs=torch.from_numpy(c.logprobs)) for c in completions]


def micro_batches(rows, max_tokens):
    """The rows of each prompt, by length, in batches of at most `max_tokens` tokens, padded."""
    batches = []
    for prompt, group in itertools.groupby(rows, key=lambda row: row.prompt):
        batches.append([])
        for row in sorted(group, key=lambda row: len(row.tokens)):
            padded = len(prompt) + (len(batches[-1]) + 1) * len(row.tokens)
            if batches[-1] and padded > max_tokens:
                batches.append([])
            batches[-1].append(row)
    return batches


def my_share(batches):
    """This process's micro-batches. All shares take about as long, and have as many: with --shard
    each pass gathers the layers from all processes. Some end with one whose gradient is 0."""
    # The largest first, by tokens with padding: the last row of a batch is its longest.
    batches = sorted(batches, key=lambda batch: -len(batch) * len(batch[-1].tokens))
    row = batches[-1][0]
    nothing = dataclasses.replace(row, advantages=0 * row.advantages)
    batches += [[nothing]] * (-len(batches) % world_size())
    return batches[rank() :: world_size()]


def sum_over_processes(sums):
    """Adds up the tensors of all processes, in place. FSDP2 has already done so for its shares."""
    if world_size() > 1 and not isinstance(sums[0], DTensor):
        for total in sums:
            dist.all_reduce(total)


def clip_gradient(weights, max_norm):
    """Scales the gradient to a norm of at most `max_norm` (0: any). Returns the norm before."""
    return whole(torch.nn.utils.clip_grad_norm_(weights, max_norm or float("inf"))).item()


def load_sharded(path, dtype, device):
    """A model of which each process keeps its share of every float32 weight, and so of gradients
    and of AdamW's state. A layer's weights are gathered, in type `dtype`, just before they are
    used, and freed after. Its gradients are summed over the processes in float32.

    Source: PyTorch FSDP (arXiv 2304.11277); ZeRO stage 3 (arXiv 1910.02054)."""
    import torch.distributed.fsdp as fsdp  # takes seconds

    model = Transformer.empty(path)
    mesh = dist.init_device_mesh(torch.device(device).type, (world_size(),))
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*model.model.layers, model]:
        fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    fsdp.register_fsdp_forward_method(model, "hidden")  # what `head` needs stays until backward

    like = next(model.parameters())
    load_weights(model, path, lambda tensor: share_of(tensor.to(device, torch.float32), like))
    model.compute_dtype = dtype
    return model


def whole(tensor):
    """A tensor of which each process may have a share. All processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor, like):
    """The part of a whole tensor that this process keeps, if `like` is sharded. Nothing is sent."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


@contextlib.contextmanager
def full_weights(model):
    """The whole model on each process while it samples. With --shard this is a copy, gathered once:
    gathering each layer for each token would cost more than computing it."""
    if not hasattr(model, "compute_dtype"):  # see load_sharded
        yield model
        return
    with torch.device("meta"):
        copy = Transformer(model.config)
    state = {name: whole(weight.to(model.compute_dtype)).clone()  # clone drops the padding
             for name, weight in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    yield copy
    copy.to_empty(device="meta")
