"""What test files share: paths, models, and ways to run the commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel

import pytest
import torch
from transformers import AutoTokenizer

from data.chat import load_chat
from model import Config, Transformer
from smollm2 import smollm2_directory

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "data/tiny"
# The settings of the run `finished`. The number of prompts is odd, so that processes have unequal
# shares.
QUICK = ["--n", 4, "--budget", 120, "--steps", 5, "--groups", 5, "--samples", 4, "--eval-n", "1,4",
         "--eval-problems", 9, "--save-every", 2]
PROMPTS = [[5, 9, 60, 2, 8], [7] * 9, [3], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [4, 40]]


def pytest_collection_modifyitems(items):
    """Files in slow/ are slow. Slow files run first, so that none is left for the end."""
    for item in items:
        if item.path.parent.name == "slow":
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def random_model(kind="qwen3", seed=0, **changes):
    """A small model with wide random weights, so that its distribution is far from uniform."""
    torch.manual_seed(seed)
    sizes = dict(model_type=kind, vocab_size=64, hidden_size=32, intermediate_size=48,
                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 max_position_embeddings=256)
    model = Transformer(Config.from_hf(sizes | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def shipped():
    """The shipped model and its Chat. Tests do not train it."""
    return Transformer.from_pretrained(TINY / "model"), load_chat(TINY / "model")


@pytest.fixture(scope="session")
def smollm2():
    """Directory of a real chat model, SmolLM2-135M-Instruct. Tests do not write into it."""
    try:
        return smollm2_directory()
    except subprocess.SubprocessError as reason:
        pytest.skip(f"no real chat model: {reason}")


def prompt_of_transformers(path, message):
    """The token ids of a user message."""
    return AutoTokenizer.from_pretrained(path).apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False)


def start(program, *arguments, **options):
    """Starts bcr.py or evaluate.py, or a module such as data.prepare, in a process of its own."""
    if program.endswith(".py"):
        command = [sys.executable, str(REPO / program)]
    else:
        command = [sys.executable, "-m", program]
        options = {"cwd": REPO} | options
    return subprocess.Popen([*command, *map(str, arguments)], text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def wait_for(line, process):
    """Reads the output of a process up to `line`."""
    while line not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()


def status_of(main, *arguments):
    """Runs a command in this process, which saves the time of its imports. Returns its status."""
    try:
        main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def tokens_of(completions):
    return [completion.tokens for completion in completions]


def lines_of(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def metrics_of(out):
    """metrics.jsonl without its timings."""
    metrics = lines_of(out / "metrics.jsonl")
    for line in metrics:
        del line["sampling_seconds"], line["training_seconds"]
    return metrics


def figures_of(out):
    """The figures in a run's results.json, without the timings."""
    results = json.loads((out / "results.json").read_text())
    for by_n in (*results["before"].values(), *results["after"].values()):
        for result in by_n.values():
            del result["problems_per_second"]
    return {key: results[key] for key in ("before", "after", "change")}


def outcome(out):
    """All that a run leaves, without its timings and the settings that a resumed run may change."""
    paths = [out / "model/model.safetensors", *out.glob("samples/*"), *out.glob("evaluation/*")]
    return figures_of(out), metrics_of(out), {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run from start to end, in a working directory other than the repo: (out, stdout)."""
    out = tmp_path_factory.mktemp("finished") / "out"
    process = start("bcr.py", *QUICK, "--out", out, cwd=out.parent)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and stderr == ""  # no progress bar where there is no terminal
    return out, stdout
