"""The benchmarks: their scripts start, their arithmetic is right, and the row for a GPU."""

import subprocess
import sys

import pytest
import torch

import bcr
from conftest import REPO
from data.settings import parse_flags
from model import Config, Transformer
from tests.bench import scale, speed

SMALL = dict(speed.SHAPES["1.5B"], vocab_size=64, hidden_size=32, intermediate_size=48,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512)


@pytest.mark.parametrize("module, flags, expected", [
    ("speed", ["--help"], "--trl"), ("scale", ["--paper"], "4B |  8 H100"),
    ("checker", ["--help"], "--pairs"),
    ("speed", ["--only", "step", "--runs", "1", "--threads", "1"], "  ours             seconds ")])
def test_scripts_start(module, flags, expected):
    """A benchmark fails before it measures anything, or ours is reported as missing."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_the_row_for_a_gpu():
    """The row fails on the first machine that could measure it."""
    result = speed.gpu({"device": "cpu", "sizes": SMALL, "rows": 8, "context": 20, "tokens": 100,
                        "micro": 64, "checkpointing": True})()
    assert all(value > 0 for value in result.values())


def test_shapes_are_those_of_the_models():
    """Other models are measured than the ones named (their parameters are known)."""
    with torch.device("meta"):
        for name, count in (("1.5B", 1_777_088_000), ("4B", 4_022_468_096)):
            model = Transformer(Config.from_hf(speed.SHAPES[name]))
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("key, ratio", [("tokens/s", "2.00"), ("seconds", "3.00")])
def test_table_of_speed(key, ratio):
    """The ratio has the wrong direction, or a contender that did not run looks as if it had."""
    results = {"ours": [{"seconds": 2.0, "tokens/s": 5.0}],
               "peer": [{"seconds": 6.0, "tokens/s": 2.5}], "other": [{"missing": "no module"}]}
    _, ours, peer, other = speed.table("title", key, results).split("\n")
    assert "ratio" not in ours and peer.endswith(f"ratio {ratio}") and other.endswith("no module")


def test_bytes_sent_in_a_step():
    """The expected traffic is wrong by a factor."""
    assert scale.bytes_replicated(1, 100) == 0
    assert scale.bytes_replicated(2, 100) == 400  # half to the other process, and half back
    assert scale.bytes_replicated(8, 100) == pytest.approx(2 * 400 * 7 / 8)
    # All 100 weights to sample; in a pass the 80 of the layers twice and the other 20 once;
    # gradients once.
    assert scale.bytes_sharded(2, 80, 20, 1, 4) == (4 * (100 + 2 * 80 + 20) + 400) / 2
    assert scale.bytes_sharded(2, 80, 20, 3, 4) == (4 * (100 + 3 * (2 * 80 + 20)) + 3 * 400) / 2


def test_a_step_on_paper():
    """The table of GPUs does not follow from its formulas."""
    t = scale.step_on_paper("4B", "H100", 8)
    assert t["held"] == pytest.approx(2 * 4.02e9 + 12 * 4.02e9 / 8)
    assert t["rows"] == 32 and t["waves"] == 1
    cache = 4 * 36 * 8 * 128 * 5000 * 32  # 32 rows, on average 1,000 + 4,000 tokens long
    prefill = 4 * 1000 * 2 * 4.02e9 / (0.4 * 989e12)
    sampling = 8000 * (2 * 4.02e9 + cache) / (0.4 * 3.35e12) + prefill
    assert t["sampling"] == pytest.approx(sampling)
    flops = 8 * 4.02e9 + 4 * 4 * 36 * 32 * 128 * 4500  # per token, at an average of 4,500 before it
    assert t["training"] == pytest.approx(32 * 9000 * flops / (0.4 * 989e12))
    # 32 passes of one row of 9,000 tokens: weights gathered in bfloat16, gradients in float32
    network = 4.02e9 * 7 / 8 * (2 * (1 + 32 * 2) + 4 * 32) / (0.4 * 450e9)
    assert t["network"] == pytest.approx(network)
    assert t["step"] == pytest.approx(t["sampling"] + t["training"] + t["network"])
    many = scale.step_on_paper("4B", "H100", 64)
    assert many["sampling"] > many["floor"]
    assert many["step"] > t["step"] / 3  # 8 times the GPUs, less than 3 times the speed
    assert scale.step_on_paper("32B", "H100", 64)["rows"] == 0  # gathered weights leave no room


def test_the_runs_that_scale_measures_are_accepted():
    """A default of bcr.py changes, and the measurement ends with a sentence about its flags."""
    s = parse_flags(bcr.Settings, "", scale.RUN)
    assert min(s.eval_budget) >= max(s.budget)
