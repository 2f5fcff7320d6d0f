"""
Several processes. On a CPU `launch` starts one per core; on GPUs torchrun starts them. Each samples its share
of the prompts and learns from its share of the completions. Every draw depends on (seed, step, prompt,
sample, token) alone, so K processes sample what one process would, and the sum of their gradients is its
gradient. On a CPU, with one thread per process, this holds to the last bit.

The rest of the repo calls these functions without knowing K: with one process they do the obvious thing.
Four parts: processes, sharded weights (FSDP2), the output directory, and checkpoints that any number of
processes can resume.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tqdm import tqdm

from data.files import UserError, find_model, read_json, write_json
from model import Transformer, load_weights, weight_files
from rollout import Completion, free_memory, generate, rows_that_fit

# ----------------------------------------------------------------------------------------------
# Processes


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def was_restarted():
    """Whether torchrun has restarted the processes because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def find_device(name):
    """The device of the flag --device. auto is cuda if available, else cpu; cuda is cuda:0, and under
    torchrun the GPU of this process. Raises UserError for a device that PyTorch does not see."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" or name.startswith("cuda:") and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        if name != "cpu":
            torch.cuda.set_device(name)  # CUDA graphs are captured on the current device
    except (RuntimeError, ValueError, AssertionError):
        raise UserError(f"--device {name} is not available: use cpu or one of the "
                        f"{torch.cuda.device_count()} GPUs that PyTorch sees") from None
    return name


def processes_and_threads(s, most):
    """How many processes to start on a CPU, and the threads of each.

    A small model gets a process of one thread per physical core, at most 8 and at most `most`: its operations
    are too small to divide. Rounding then depends on neither number. The weights of a model of over 100 MB do
    not fit the caches; they are read by one process with all threads, unless --processes asks for more."""
    cores = torch.get_num_threads()  # torch's default
    large = sum(file.stat().st_size for file in weight_files(find_model(s.model)) if file.exists()) > 1e8
    if large and s.processes < 2:
        return 1, cores
    return s.processes or min(cores, most, 8), 1


def launch(program, function, s, most):
    """Runs function(s), on a CPU in as many processes as `processes_and_threads` says. This process is the
    first one, and the others end with it. Under torchrun there is nothing to start."""
    if "RANK" in os.environ or find_device(s.device) != "cpu":
        return function(s)
    count, threads = processes_and_threads(s, most)
    torch.set_num_threads(threads)
    if count == 1:
        return function(s)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    others = multiprocessing.start_processes(
        run_as, (function, s), count - 1, join=False,
        start_method="fork" if sys.platform == "linux" else "spawn")  # a fork need not import again
    finished = threading.Event()
    watcher = threading.Thread(target=watch, args=(program, others, finished), daemon=True)
    watcher.start()
    try:
        function(s)
        dist.barrier()
    except RuntimeError as error:
        if "by peer" in str(error):
            watcher.join(10)  # it reports why the other process ended
        raise
    finally:
        finished.set()
        watcher.join(1)  # the others end by themselves, after the same work or with the same error
        for process in others.processes:
            process.kill()
        watcher.join()


def run_as(index, function, s):
    """The work of a process that `launch` starts."""
    os.environ["RANK"] = str(index + 1)
    torch.set_num_threads(1)
    function(s)
    dist.barrier()


def watch(program, others, finished):
    """Ends this process, with the cause, if one of the others ends before the work is done."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    status = 1
    try:
        while not others.join(grace_period=1):
            pass
        return
    except multiprocessing.ProcessRaisedException as error:
        cause = str(error).strip()
        if "\ndata.files.UserError: " in cause:
            cause, status = cause.rpartition("\ndata.files.UserError: ")[2], 2
    except multiprocessing.ProcessExitedException as error:
        how = error.signal_name or f"status {error.exit_code}"
        cause = (f"process {error.error_index + 1} of {world_size()} ended ({how}). Saved files are intact: "
                 "rerun with --resume --out DIR")
    if not finished.wait(2):  # unless this process has failed, too
        fail(program, cause, status)


def start(device):
    """Joins the process group. device: of this process, "cpu" or "cuda:i"."""
    if world_size() == 1 or dist.is_initialized():
        return
    # After a restart the store still holds the addresses of the processes that ended: use another prefix.
    attempt = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    store, *_ = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", store=dist.PrefixStore(attempt, store), rank=rank(),
        world_size=world_size(), timeout=timedelta(days=1))  # the fastest sampler waits for the slowest


def all_gather(value):
    """The values of all processes, in the order of their ranks: a list of K."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def say(text):
    """Prints a line on the first process."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)  # above a progress bar
        sys.stdout.flush()


def progress_bar(total, title, first=0):
    """A progress bar on the terminal of the first process; elsewhere, or without a title, it is hidden."""
    hidden = not title or rank() > 0 or not sys.stderr.isatty()
    return tqdm(total=total, desc=title, initial=first, leave=False, disable=hidden)


def rows_at_a_time(model, prompts, samples, budget, max_rows):
    """How many completions to sample at a time: at most `max_rows`, and on a GPU as many as fit its free
    memory."""
    rows = min(max_rows, len(prompts) * samples)
    if model.device.type != "cuda" or not prompts:
        return max_rows
    length = max(map(len, prompts)) + budget
    free = free_memory(model.device)
    fitting = rows_that_fit(model.config, length, budget, model.dtype, free, rows)
    if fitting < rows:
        say_once(f"with a budget of {budget} tokens fewer than {rows} completions fit the GPU's memory: "
                 "as many as fit are sampled at a time")
    return fitting


@functools.cache
def say_once(text):
    say(text)


def sample(model, prompts, samples, budget, title="", max_rows=256, **options):
    """`rollout.generate` with the prompts divided among the processes: all completions, on each of them. With
    a title it shows its progress: a bar on a terminal, a line per minute elsewhere."""
    mine, own, done, told = range(rank(), len(prompts), world_size()), [], 0, time.time()
    total = len(mine) * samples
    with full_weights(model) as whole, progress_bar(total, title) as bar:

        def on_finished():
            nonlocal done, told
            done += 1
            bar.update()
            if title and bar.disable and time.time() - told > 60:
                told = time.time()
                say(f"{title}: {done} of {total} completions")

        if mine:
            own_prompts = [prompts[p] for p in mine]
            rows = rows_at_a_time(whole, own_prompts, samples, budget, max_rows)
            own = generate(whole, own_prompts, samples, budget, prompt_keys=mine, max_rows=rows,
                           on_finished=on_finished, **options)
    # Arrays are pickled many times as fast as tensors.
    parts = [iter(part) for part in all_gather([(c.tokens, c.logprobs.numpy(), c.truncated) for c in own])]
    completions = [next(parts[p % len(parts)]) for p in range(len(prompts)) for _ in range(samples)]
    return [Completion(tokens, torch.from_numpy(logprobs), cut) for tokens, logprobs, cut in completions]


def my_share(batches):
    """This process's share of the micro-batches, which are sorted by size first: all shares take about as
    long."""
    def tokens(batch):
        return len(batch[0].prompt) + sum(len(row.tokens) for row in batch)

    return sorted(batches, key=tokens, reverse=True)[rank()::world_size()]


def sum_over_processes(sums):
    """Adds up the tensors of all processes, in place. FSDP2 has already done so for sharded weights."""
    if world_size() > 1 and not isinstance(sums[0], DTensor):
        for total in sums:
            dist.all_reduce(total)


def clip_gradient(weights, max_norm):
    """Scales the gradient down to norm `max_norm`, in place; 0 does not. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm or float("inf"))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# What running out of memory says; inside the capture of a CUDA graph it comes under other names.
OUT_OF_MEMORY = ("out of memory|can't allocate memory|unable to allocate|CUBLAS_STATUS_ALLOC_FAILED|"
                 "operation failed due to a previous error during capture")


@contextlib.contextmanager
def readable_errors(program):
    """Ends the process with one sentence instead of a traceback for errors that the user can fix (status 2),
    for the end of another process (status 1), and for Ctrl-C and SIGTERM (status 128 + the signal)."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        fail(program, error)
    except (OSError, SafetensorError) as error:  # a full disk, a directory that was removed
        where = f" ({error.filename})" if getattr(error, "filename", None) else ""
        fail(program, f"{getattr(error, 'strerror', None) or error}{where}. Saved files are intact. Fix the "
                      "problem and rerun with --resume --out DIR")
    except (RuntimeError, MemoryError) as error:
        if re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE):
            fail(program, "memory ran out: lower --rows if it was sampling, lower --micro-tokens or add "
                          "--checkpointing if it was training, or lower the budget")
        if world_size() > 1 and "by peer" in str(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(0.5)  # torchrun reports the process that ends first as the cause
            fail(program, "ended because another process ended: see its message", status=1)
        raise
    except KeyboardInterrupt as stop:
        print("\nstopped. To resume, rerun with the same flags and --resume --out DIR", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


@contextlib.contextmanager
def finish_first():
    """Within, the first Ctrl-C or SIGTERM only extends the list that this yields; the second acts at once."""
    stop, handlers = [], {}

    def note(number, frame):
        stop.append(number)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        say("stopping after this step; press Ctrl-C again to stop at once")

    handlers |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def fail(program, message, status=2):
    several = "TORCHELASTIC_RUN_ID" in os.environ  # under torchrun each process may print
    process = f" (process {rank()} of {world_size()})" if several else ""
    print(f"{program}: error: {message}{process}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)  # an orderly exit would wait for collectives that other processes have begun
    sys.exit(status)


# ----------------------------------------------------------------------------------------------
# Sharded weights (--shard)


def load_sharded(path, dtype, device):
    """A model of which each process keeps its share of every float32 weight, and so of gradients and of
    AdamW's state. A layer's weights are gathered, in type `dtype`, just before they are used, and freed
    after. Its gradients are summed over the processes in float32; each process keeps its share of the sum.

    Source: PyTorch FSDP (arXiv 2304.11277); ZeRO stage 3 (arXiv 1910.02054)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    model = Transformer.empty(path)
    mesh = dist.init_device_mesh(torch.device(device).type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    register_fsdp_forward_method(model, "hidden")  # what `head` needs stays gathered until backward

    def share(tensor):  # each process has read the whole tensor and keeps its part: nothing is sent
        return distribute_tensor(tensor.to(device, torch.float32), mesh, [Shard(0)], src_data_rank=None)

    load_weights(model, path, share)
    model.compute_dtype = dtype
    return model


def is_sharded(model):
    return hasattr(model, "compute_dtype")


@contextlib.contextmanager
def full_weights(model):
    """The whole model on each process while it samples. With --shard this is a copy that is gathered once and
    freed after: gathering each layer again for each token would cost more than computing it."""
    if not is_sharded(model):
        yield model
        return
    with torch.device("meta"):
        whole = Transformer(model.config)
    state = {name: weight.to(model.compute_dtype).full_tensor().clone()  # clone drops the padding
             for name, weight in model.state_dict().items()}
    whole.load_state_dict(state, assign=True)
    yield whole
    whole.to_empty(device="meta")


def equal_passes(model, batches, filler):
    """The micro-batches of this process. With --shard each pass gathers the layers from all processes, so all
    make as many passes: processes with fewer add `filler`, a batch whose gradient is 0."""
    if not is_sharded(model):
        return batches
    return batches + [filler] * (max(all_gather(len(batches))) - len(batches))


# ----------------------------------------------------------------------------------------------
# The output directory of a run


def open_out(s, default, files, may_change=()):
    """Creates the output directory with settings.json or, with --resume, opens that of an earlier run. Only
    the first process writes. It locks the directory until it ends, and it records the contents of `files` and
    of the model.

    Raises UserError for a directory in use, and for settings (other than those in `may_change`) or contents
    that differ from those of the run to resume."""
    out = None
    if rank() == 0:
        free = (Path(f"{default}-{k}") for k in itertools.count(1))
        out = Path(s.out) if s.out else next(path for path in free if not path.exists())
        settings = json.loads(json.dumps(dataclasses.asdict(s)))  # tuples as lists, as in the file
        settings["sha256"] = fingerprints([file for file in files if file], s.model)
        if s.resume:
            check_resumed(s.out, settings, {"resume", "out", "rows", "processes", *may_change})
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is in use: name a new directory, or add --resume to continue it")
        else:
            try:
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / "settings.json", settings)
            except OSError as error:
                raise UserError(f"cannot create the directory --out {out}: {error.strerror}") from None
        lock(out)
    out = all_gather(out)[0]
    if not out.is_dir():
        raise UserError(f"{out} does not exist here: several machines need an --out on a shared file system")
    return out


def fingerprints(files, model):
    """{file: sha256} of data and reward files and of the model's config.json and weights."""
    path = find_model(model)
    found = {}
    for file in [*files, path / "config.json", *weight_files(path)]:
        with open(file, "rb") as content:
            found[str(file)] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def lock(out):
    """Locks a run's directory. The descriptor stays open: the lock is released when the process dies."""
    try:
        fcntl.lockf(os.open(out / "lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is running in --out {out}: wait for its end, or stop it") from None


def check_resumed(out, settings, may_change):
    if not out or not (Path(out) / "settings.json").is_file():
        raise UserError(f"--resume finds no run in --out {out!r}: name the directory of the run to resume")
    saved = read_json(Path(out) / "settings.json")
    for name, value in settings.items():
        if name not in may_change | {"sha256"} and value != saved.get(name):
            raise UserError(f"--resume: --{name.replace('_', '-')} was {saved.get(name)} and is now {value}: "
                            "a run keeps the settings it began with")
    for file, digest in settings["sha256"].items():
        if digest != saved.get("sha256", {}).get(file):
            raise UserError(f"--resume: {file} has changed since the run began: restore it")


# ----------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(out):
    """The checkpoint directories in `out`, oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6}", path.name))


def save_checkpoint(out, step, model, master, optimizer):
    """Writes what the steps after `step` depend on: master weights and AdamW's state. (The order of the data
    and every draw are functions of the settings and the step.)

    Each process writes the weights that it holds, as safetensors; any number of processes can read them. The
    directory is written under another name, flushed and renamed, then all but the last two are removed: at
    any moment the last `checkpoint-*` is complete."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    temporary, target = out / "checkpoint.tmp", out / f"checkpoint-{step:06d}"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    all_gather(None)  # the directory exists
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming the intent is to save in a single process"
            save(training_state(model, master, optimizer), no_dist=world_size() == 1,
                 storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except CheckpointException as error:
        raise first_cause(error) from None
    if rank() > 0:
        return
    flush_directory(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    flush_directory(out)
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old)


def load_checkpoint(out, model, master, optimizer):
    """Restores the last checkpoint in place and returns its step, 0 if there is none. Raises UserError if it
    is damaged."""
    if not checkpoints(out):
        return 0
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    path = checkpoints(out)[-1]
    try:
        reader = HuggingFaceStorageReader(str(path))
        saved = reader.read_metadata().state_dict_metadata
        for name, whole in saved.items():
            if sum(math.prod(part.sizes) for part in whole.chunks) != math.prod(whole.size):
                raise KeyError(f"a part of {name} is missing")  # the file of a process
        for name, weight in zip(parameter_names(model), master):
            if f"step.{name}" in saved:  # AdamW has no state for weights that had no gradient yet
                zeros = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.tensor(0.0)} | zeros
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process"
            load(training_state(model, master, optimizer), storage_reader=reader, no_dist=True)
    except (OSError, SafetensorError, KeyError, TypeError, CheckpointException) as error:
        raise UserError(f"{path} is damaged ({first_cause(error)}): remove it, and --resume uses the "
                        "checkpoint before") from None
    return int(path.name.removeprefix("checkpoint-"))


def parameter_names(model):
    return [name for name, _ in model.named_parameters()]


def training_state(model, master, optimizer):
    """Master weights and AdamW's state as one flat dict of tensors."""
    state = {}
    for name, weight in zip(parameter_names(model), master):
        state[f"weight.{name}"] = weight.detach()
        state |= {f"{key}.{name}": value for key, value in optimizer.state[weight].items()}
    return state


def first_cause(error):
    """The error behind torch.distributed.checkpoint's exception, which quotes whole tracebacks."""
    return next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error


def flush_directory(path):
    """Waits until the list of files of a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
