"""The benchmarks: their scripts start, and their arithmetic is right."""

import subprocess
import sys

import pytest

import bcr
from conftest import REPO
from data.settings import parse_flags
from tests.bench import scale, speed


@pytest.mark.parametrize("module, flags, expected", [
    ("scale", ["--paper"], "4B |  8 H100"), ("checker", ["--help"], "--pairs"),
    ("speed", ["--only", "step", "--runs", "1", "--threads", "1"], "  ours             seconds ")])
def test_scripts_start(module, flags, expected):
    """A benchmark fails before it measures anything, or ours is reported as missing."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


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
    assert scale.bytes_replicated(8, 100) == pytest.approx(2 * 400 * 7 / 8)
    # All 100 weights to sample; in a pass the 80 of the layers twice and the other 20 once;
    # gradients once.
    assert scale.bytes_sharded(2, 80, 20, 3, 4) == (4 * (100 + 3 * (2 * 80 + 20)) + 3 * 400) / 2


def test_the_runs_that_scale_measures_are_accepted():
    """A default of bcr.py changes, and the measurement ends with a sentence about its flags."""
    s = parse_flags(bcr.Settings, "", scale.RUN)
    assert min(s.eval_budget) >= max(s.budget)
