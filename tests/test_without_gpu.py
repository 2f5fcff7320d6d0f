"""What runs on a GPU, checked without one: kernels on meta tensors, graphs with a stand-in, memory
on paper."""

import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bcr
import distributed
import evaluate
import rollout
from conftest import PROMPTS, random_model
from data.files import UserError
from model import Config, Transformer
from rollout import Slots, cuda_graphs, generate, sample_token, token_logprobs
from tests.bench import scale

# ----------------------------------------------------------------------------------------------
# Kernels. The meta device has shapes and types but no values, so it takes the place of a GPU:
# an operation that mixes it with the CPU, or that needs a value on the host, is an error.

WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select",
         "aten::is_nonzero", "aten::equal", "aten::unique"}


class OnTheDevice(TorchDispatchMode):
    """Raises for an operation that waits for the device, or that reads tensors of both devices.
    Copies of inputs from the host to the device are allowed."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().split(".")[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        out = operation(*args, **(kwargs or {}))
        results = {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        if "meta" in devices:
            assert name not in WAITS, f"{name} waits for the device"
            assert "cpu" not in results, f"{name} copies to the host"
            assert "cpu" not in devices or name == "aten::copy_", f"{name} mixes devices"
            self.operations += 1
        return out


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request):
    """A model of each family on the meta device, Llama's in float32."""
    dtype = torch.float32 if request.param == "llama" else torch.bfloat16
    return random_model(request.param).to("meta", dtype)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_sampled_token_neither_waits_nor_touches_the_host(model, temperature):
    """A part of the sampler's state is left on the CPU, or a token waits for the host: a CUDA graph
    cannot be captured, or every token costs a round trip."""
    with torch.inference_mode(), OnTheDevice() as mode:
        slots = Slots(model, 64, 128)
        eos = torch.tensor([0, 1], device="meta")
        sample_token(model, slots, eos, 30, temperature, 32, 64)
    assert mode.operations > 100


def test_starting_a_group_neither_waits_nor_touches_the_host(model):
    """A prompt is computed on the CPU, or its keys and values are copied there on their way to the
    cache."""
    with torch.inference_mode(), OnTheDevice() as mode:
        slots = Slots(model, 8, 128)
        prefix = rollout.Prefix(model, PROMPTS[3])
        for job in range(3):
            slots.add(job, PROMPTS[3], prefix, np.zeros(30))
    assert slots.n == 3 and mode.operations > 50


@pytest.mark.parametrize("chunked", [False, True])
def test_a_training_pass_neither_waits_nor_touches_the_host(model, chunked):
    """A boolean mask makes the device search for the tokens, or an index stays on the CPU."""
    model.checkpointing = chunked
    rows = [bcr.Row(PROMPTS[0], [7] * n, torch.zeros(n), np.ones(n)) for n in (4, 9, 2)]
    with OnTheDevice() as mode:
        logprobs = token_logprobs(model, rows, 0.7, max_logits=64 * 5 if chunked else 2**26)  # (M,)
        old = torch.zeros(15).to("meta")
        bcr.policy_loss(logprobs, old, torch.ones(15).to("meta"), 100, 0.2, 0.28).backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters()) and mode.operations > 200


def test_the_gradient_of_a_step_waits_for_the_device_only_at_its_end(monkeypatch):
    """A number is read on the host in each micro-batch, and the device stands still between two."""
    def end(sums):  # what follows reads the statistics, which have no values here
        assert mode.operations > 5 * 200
        raise StopIteration

    monkeypatch.setattr(distributed, "sum_over_processes", end)
    model = random_model().to("meta", torch.bfloat16)
    master = [p.detach().float() for p in model.parameters()]
    rows = [bcr.Row(prompt, [7] * 9, torch.zeros(9), np.ones(9)) for prompt in PROMPTS]
    with pytest.raises(StopIteration), OnTheDevice() as mode:
        bcr.accumulate_gradient(model, master, rows, 100, bcr.Settings())


# ----------------------------------------------------------------------------------------------
# Graphs


class RecordedGraph:
    """Takes the place of torch.cuda.CUDAGraph: capturing executes nothing, a replay executes
    all."""

    capturing = None

    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


class capture:
    """Takes the place of torch.cuda.graph."""

    def __init__(self, graph, pool=None):
        self.graph = graph

    def __enter__(self):
        RecordedGraph.capturing = self.graph

    def __exit__(self, *error):
        RecordedGraph.capturing = None


def recordable(function):
    """A function that is recorded while a graph is captured, as kernels are."""
    def call(*arguments):
        if RecordedGraph.capturing:
            RecordedGraph.capturing.calls.append(lambda: function(*arguments))
        else:
            function(*arguments)
    return call


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")


def test_a_token_is_computed_once_whatever_the_order_of_sizes(graphs):
    """A capture is not replayed, so a token is lost, or it is computed by the capture's call,
    too."""
    rng = np.random.default_rng(0)
    sizes = [(int(n), int(filled)) for n, filled in rng.integers(1, 4, (200, 2))]
    computed = []
    run = cuda_graphs(recordable(lambda *pair: computed.append(pair)))
    for pair in sizes:
        run(*pair)
    assert computed == sizes and len(set(sizes)) == 9


@pytest.mark.parametrize("look_every, rows, length", [(8, 4, 16), (3, 7, 64), (50, 2, 1)])
def test_graphs_sample_what_the_plain_step_samples(graphs, monkeypatch, look_every, rows, length):
    """Graphs hold a state that the loop replaces, or what a row does after its EOS, or a free row
    does at all, changes the result. The CPU runs at the pace of a GPU here: it looks for ended rows
    only now and then and rounds sizes up."""
    model = random_model()
    options = dict(eos_ids=[3, 5], temperature=1.3, seed=5, max_rows=9)
    expected = generate(model, PROMPTS, 3, 40, **options)
    assert {c.truncated for c in expected} == {True, False}
    monkeypatch.setitem(rollout.WRAPPERS, "cpu", cuda_graphs)
    monkeypatch.setitem(rollout.LOOK_EVERY, "cpu", look_every)
    monkeypatch.setitem(rollout.LENGTH_MULTIPLE, "cpu", length)
    monkeypatch.setattr(rollout, "row_multiple", lambda device: rows)
    monkeypatch.setattr(rollout, "sample_token", recordable(rollout.sample_token))
    for ours, theirs in zip(generate(model, PROMPTS, 3, 40, **options), expected, strict=True):
        assert ours.tokens == theirs.tokens and ours.truncated == theirs.truncated
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------
# The device


@pytest.fixture
def one_gpu(monkeypatch):
    """PyTorch sees one GPU. Its own function judges which devices it can set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", torch.cuda._utils._get_device_index)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_model_loads_onto_the_one_gpu(one_gpu, monkeypatch, name):
    """PyTorch refuses "cuda" where it asks for a number: no run on one GPU passes its first
    line."""
    used = []

    def from_pretrained(path, dtype, device):
        used.append((dtype, device))
        return random_model(vocab_size=576)

    monkeypatch.setattr(Transformer, "from_pretrained", from_pretrained)
    _, _, about = evaluate.load_model(evaluate.EvaluationSettings(device=name))
    assert used == [(torch.bfloat16, "cuda:0")] and "bfloat16 on cuda:0" in about


@pytest.mark.parametrize("name, local_rank, world_size, expected", [
    ("auto", "0", "1", "cuda:0"), ("cuda", "3", "8", "cuda:3"), ("cuda:0", "2", "8", "cuda:2")])
def test_each_process_of_torchrun_has_its_own_gpu(
        monkeypatch, name, local_rank, world_size, expected):
    """All processes use the first GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(world_size))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert distributed.find_device(name) == expected


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_a_device_that_does_not_exist_is_named(one_gpu, name):
    """A traceback of PyTorch's, or a run on another device."""
    with pytest.raises(UserError, match=f"--device {name} is not available: .* one of the 1 GPUs"):
        distributed.find_device(name)


# ----------------------------------------------------------------------------------------------
# Memory


def test_a_gpu_samples_as_many_rows_as_fit(monkeypatch):
    """An evaluation with a large budget asks for more keys and values than a GPU holds, or a small
    one is slowed down."""
    config = Config.from_hf(scale.CONFIGS["hbx/JustRL-DeepSeek-1.5B"])
    device = torch.device("cuda:0")
    model = types.SimpleNamespace(config=config, dtype=torch.bfloat16, device=device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10e9)
    rows = rollout.rows_at_a_time(model, 17384, 256)
    assert 0.9 * 60e9 * 0.95 < rows * 28672 * 17384 < 0.9 * 60e9  # bytes of keys and values
    assert rollout.rows_at_a_time(model, 1100, 256) == 256
    assert rollout.rows_at_a_time(model, 17384, 30) == 30
    assert rollout.rows_at_a_time(model, 10**7, 256) == 1


def test_a_cpu_samples_as_many_rows_as_it_is_asked_to():
    """The free memory of a CPU changes how many rows are sampled at a time."""
    assert rollout.rows_at_a_time(random_model(), 10**7, 256) == 256


def test_the_commands_of_the_paper_fit_their_cards():
    """A command in README or data/README runs out of memory in one of its phases."""
    commands = scale.paper_commands()
    assert {s.model for s in commands} == set(scale.CONFIGS) and len(commands) == 3
    for s in commands:
        phases = scale.memory(Config.from_hf(scale.CONFIGS[s.model]), s, scale.CARDS[s.model])
        assert len(phases) == 4
        for parts in phases.values():
            assert sum(parts.values()) < scale.CARDS[s.model]


def test_the_memory_table_is_what_the_command_prints(capsys):
    """data/README has the table of an earlier formula, or of other commands."""
    scale.print_memory()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    text = (scale.REPO / "data/README.md").read_text().splitlines()
    assert len(rows) > 25 and not set(rows) - set(text)
