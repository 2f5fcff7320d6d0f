"""
Several processes. On a CPU `launch` starts one per core; on GPUs torchrun starts them. Each samples
its share of the prompts and learns from its share of the completions. Every draw depends on (seed,
step, prompt, sample, token) alone, so K processes sample what one process would, and the sum of
their gradients is its gradient. On a CPU, with one thread per process, this holds to the last bit.
The rest of the repo calls these functions without knowing K.

Ctrl-C and SIGTERM end a run at once, without saving: a resumed run repeats the steps since the last
checkpoint exactly, so nothing is lost but their time.
"""

import contextlib
import dataclasses
import functools
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
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from tqdm import tqdm

from data.files import UserError, find_model
from model import Transformer, load_weights
from rollout import free_memory, generate, rows_that_fit

TIMEOUT = timedelta(days=1)  # the fastest sampler waits for the slowest

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
    can_fork = sys.platform == "linux" and hasattr(os, "fork")
    method = "fork" if can_fork else "spawn"  # a fork need not import again
    errors = multiprocessing.get_context(method).SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        store = (Path(directory) / "store").as_uri()
        run = multiprocessing.start_processes(
            run_as, (function, s, count, store, errors), count, join=False, start_method=method)
        try:
            while not run.join(grace_period=1):
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
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
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=number, world_size=count, timeout=TIMEOUT)
    try:
        function(s)
        dist.barrier()
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
        # After a restart torchrun's store still has the addresses of the processes that ended.
        store, *_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl", store=store, rank=rank(),
            world_size=world_size(), timeout=TIMEOUT)
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


def progress_bar(total, title, done=0):
    """A progress bar on the terminal of the first process; hidden elsewhere and without a title."""
    hidden = not title or rank() > 0 or not sys.stderr.isatty()
    return tqdm(total=total, desc=title, initial=done, leave=False, disable=hidden)


def explain(error):
    """One sentence about an error that the user can fix; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    # The last two names are of cuBLAS and of the capture of a CUDA graph.
    names = "out of memory|allocate memory|unable to allocate|ALLOC_FAILED|error during capture"
    if isinstance(error, (RuntimeError, MemoryError)) and re.search(names, str(error), re.I):
        return ("memory ran out: lower --rows if it was sampling, lower --micro-tokens or add "
                "--checkpointing if it was training, or lower the budget")


@contextlib.contextmanager
def readable_errors(program):
    """Ends the program with one sentence instead of a traceback for errors that the user can fix
    (status 2), and for Ctrl-C and SIGTERM (status 128 + the signal)."""
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except KeyboardInterrupt as stop:
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        sentence = "stopped. Continue with --resume DIR"
    except Exception as error:
        status = 2
        sentence = explain(error)
        if sentence is None:
            raise
    print(f"{program}: error: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)  # see run_as
    sys.exit(status)


# ----------------------------------------------------------------------------------------------
# Shares of the work


def counter(bar, title, total, pause=60):
    """A function that counts completions: on a progress bar, or in a line every `pause` seconds
    where there is no terminal."""
    said = time.time()
    done = 0

    def count():
        nonlocal said, done
        done += 1
        bar.update()
        if title and bar.disable and time.time() - said > pause:
            said = time.time()
            say(f"{title}: {done} of {total} completions")

    return count


def rows_at_a_time(model, prompts, samples, budget, max_rows):
    """How many completions to sample at a time: on a GPU as many as fit its free memory."""
    rows = min(max_rows, len(prompts) * samples)
    if model.device.type != "cuda":
        return rows
    length = max(map(len, prompts)) + budget
    free = free_memory(model.device)
    fitting = rows_that_fit(model.config, length, budget, model.dtype, free, rows)
    if fitting < rows:
        say_once(f"with a budget of {budget} tokens fewer than {rows} completions fit the GPU's "
                 "memory: as many as fit are sampled at a time")
    return fitting


@functools.cache
def say_once(text):
    say(text)


def sample(model, prompts, samples, budget, title="", max_rows=256, **options):
    """`rollout.generate` with the prompts divided among the processes: all completions, on each."""
    mine = range(rank(), len(prompts), world_size())
    own = []
    with full_weights(model) as full, progress_bar(len(mine) * samples, title) as bar:
        if mine:
            share = [prompts[p] for p in mine]
            rows = rows_at_a_time(full, share, samples, budget, max_rows)
            own = generate(full, share, samples, budget, prompt_keys=mine, max_rows=rows,
                           on_finished=counter(bar, title, len(share) * samples), **options)
    # Arrays are pickled many times as fast as tensors.
    own = [dataclasses.replace(c, logprobs=c.logprobs.numpy()) for c in own]
    groups = [None] * len(prompts)
    for k, part in enumerate(all_gather(own)):
        groups[k::world_size()] = [part[i : i + samples] for i in range(0, len(part), samples)]
    return [dataclasses.replace(c, logprobs=torch.from_numpy(c.logprobs))
            for c in itertools.chain.from_iterable(groups)]


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


def my_share(model, batches):
    """This process's micro-batches. All shares take about as long. With --shard each pass gathers
    the layers from all processes, so all make as many: some add one whose gradient is 0."""
    def tokens(batch):
        return len(batch[0].prompt) + sum(len(row.tokens) for row in batch)

    batches = sorted(batches, key=tokens, reverse=True)
    if is_sharded(model):
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


# ----------------------------------------------------------------------------------------------
# Sharded weights (--shard)


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

    def share(tensor):  # each process reads the whole tensor and keeps its part: nothing is sent
        tensor = tensor.to(device, torch.float32)
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    load_weights(model, path, share)
    model.compute_dtype = dtype
    return model


def is_sharded(model):
    return hasattr(model, "compute_dtype")


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
    if not is_sharded(model):
        yield model
        return
    with torch.device("meta"):
        copy = Transformer(model.config)
    state = {name: whole(weight.to(model.compute_dtype)).clone()  # clone drops the padding
             for name, weight in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    yield copy
    copy.to_empty(device="meta")
