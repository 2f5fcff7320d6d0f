"""The benchmarks: their scripts start, their arithmetic is right, and the rows for a GPU run (on the CPU)."""

import argparse
import subprocess
import sys

import pytest
import torch

from conftest import REPO
from model import Config, Transformer

BENCH = REPO / "tests/bench"
sys.path.insert(0, str(BENCH))

import scale  # noqa: E402
import speed  # noqa: E402

SMALL = dict(speed.SHAPES["1.5B"], vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)


@pytest.mark.parametrize("command, expected", [
    (["speed.py", "--help"], "--trl"),
    (["speed.py", "--only", "step", "--runs", "1", "--threads", "1"], "rows with a gradient"),
    (["scale.py", "--paper"], "4B |  8 H100"), (["checker.py", "--help"], "")])
def test_scripts_start(command, expected):
    """A benchmark fails before it measures anything, or ours is reported as missing."""
    name, *flags = command
    done = subprocess.run([sys.executable, str(BENCH / name), *flags], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize("worker, tokens", [("gpu_sampling", 8 * 200), ("gpu_training", 8 * 24)])
def test_rows_for_a_gpu(worker, tokens):
    """A row fails on the first machine that could measure it, or counts other tokens than it made."""
    spec = {"device": "cpu", "sizes": SMALL, "copied": 2**16, "square": 64, "rows": 8, "context": 20,
            "tokens": 200, "micro": 64, "checkpointing": False}
    found = getattr(speed, worker)(spec)(1)
    assert found["tokens"] == tokens
    assert all(value > 0 for name, value in found.items() if name != "peak GB")
    if not torch.cuda.is_available():
        with pytest.raises(speed.Missing):
            getattr(speed, worker)(spec | {"device": "cuda"})


def test_shapes_are_those_of_the_models():
    """Limits are computed for other models than the ones named (their parameters are known)."""
    with torch.device("meta"):
        for name, count in (("1.5B", 1_777_088_000), ("4B", 4_022_468_096)):
            model = Transformer(Config.from_hf(speed.SHAPES[name]))
            assert sum(p.numel() for p in model.parameters()) == count


def test_table_of_speed():
    """The ratio has the wrong direction, or a contender that did not run is reported as if it had."""
    runs = [{"seconds": 2.0, "tokens": 10, "tokens_per_second": 5.0, "peak": 8e6, "above": 4e6}]
    slower = [runs[0] | {"seconds": 6.0, "tokens_per_second": 2.5, "above": 2e6}]
    found = {"ours": {"runs": runs}, "peer": {"runs": slower},
             "other": {"runs": [], "missing": "not installed"}}
    contenders = [{"name": "ours"}, {"name": "peer", "peer of": "ours"}, {"name": "other"}]
    for key, ratio in (("tokens_per_second", " 2.00 "), ("seconds", " 3.00 "), ("above", " 0.50 ")):
        title, head, ours, peer, other = speed.table("title", key, contenders, found).split("\n")
        assert ratio in peer and other.endswith("not installed")
    assert speed.memory_row(argparse.Namespace(trl="python"))[1] == "above"


def test_bytes_sent_in_a_step():
    """The expected traffic is wrong by a factor."""
    assert scale.bytes_replicated(1, 100) == 0
    assert scale.bytes_replicated(2, 100) == 400  # half to the other process, and half back
    assert scale.bytes_replicated(8, 100) == pytest.approx(2 * 400 * 7 / 8)
    # All 100 weights to sample; in a pass the 80 of the layers twice and the other 20 once; gradients once.
    assert scale.bytes_sharded(2, 80, 20, 1, 4) == (4 * (100 + 2 * 80 + 20) + 400) / 2
    assert scale.bytes_sharded(2, 80, 20, 3, 4) == (4 * (100 + 3 * (2 * 80 + 20)) + 3 * 400) / 2


def test_a_step_on_paper():
    """The table of GPUs does not follow from its formulas."""
    t = scale.step_on_paper("4B", "H100", 8)
    assert t["held"] == pytest.approx(2 * 4.02e9 + 12 * 4.02e9 / 8) and t["rows"] == 32 and t["waves"] == 1
    cache = 4 * 36 * 8 * 128 * 5000 * 32  # 32 rows, on average 1,000 + 4,000 tokens long
    prefill = 4 * 1000 * 2 * 4.02e9 / (0.4 * 989e12)
    assert t["sampling"] == pytest.approx(8000 * (2 * 4.02e9 + cache) / (0.4 * 3.35e12) + prefill)
    flops = 8 * 4.02e9 + 4 * 4 * 36 * 32 * 128 * 4500  # per token, at an average of 4,500 before it
    assert t["training"] == pytest.approx(32 * 9000 * flops / (0.4 * 989e12))
    # 32 passes of one row of 9,000 tokens each: weights gathered in bfloat16, gradients in float32
    assert t["network"] == pytest.approx(4.02e9 * 7 / 8 * (2 * (1 + 32 * 2) + 4 * 32) / (0.4 * 450e9))
    assert t["step"] == pytest.approx(t["sampling"] + t["training"] + t["network"])
    many = scale.step_on_paper("4B", "H100", 64)
    assert many["sampling"] > t["floor"]
    assert many["step"] > t["step"] / 3  # 8 times the GPUs, less than 3 times the speed
    assert scale.step_on_paper("32B", "H100", 64)["rows"] == 0  # the gathered weights leave no room
