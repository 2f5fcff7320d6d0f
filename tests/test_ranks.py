"""Several processes, started by torchrun over gloo: they must do what one does, and outlive one of them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from bcr import joined, shares
from conftest import REPO
from rollout import Rollout
from test_cli import metrics_of

QUICK = ["--steps", "5", "--groups", "5", "--samples", "4", "--eval-n", "2", "--eval-problems", "9", "--budget", "120", "--save-every", "2"]


def torchrun(ranks, *arguments, restarts=0):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts",
                             str(restarts), str(REPO / "bcr.py"), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    process = torchrun(1, *QUICK, "--out", out)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return out


def assert_same(ours, theirs):
    a, b = (load_file(out / "model/model.safetensors") for out in (ours, theirs))
    difference = torch.cat([(a[name] - b[name]).flatten() for name in b]).norm() / torch.cat([b[name].flatten() for name in b]).norm()
    assert difference <= 1e-6
    for m, n in zip(metrics_of(ours), metrics_of(theirs), strict=True):
        for key in ("step", "reward", "accuracy_by_position", "tokens_per_problem", "truncated", "zero_variance", "loops_per_problem"):
            assert m[key] == n[key], key
        assert m["grad_norm"] == pytest.approx(n["grad_norm"], rel=1e-4) and m["loss"] == pytest.approx(n["loss"], rel=1e-3, abs=1e-7)
    figures = [json.loads((out / "results.json").read_text()) for out in (ours, theirs)]
    assert figures[0]["before"] == figures[1]["before"] and figures[0]["after"] == figures[1]["after"]
    for path in (theirs / "evaluation").iterdir():
        assert (ours / "evaluation" / path.name).read_bytes() == path.read_bytes()
    assert len(list((ours / "evaluation").iterdir())) == len(list((theirs / "evaluation").iterdir()))


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_do_what_one_does(alone, tmp_path, ranks):
    """Other completions, or a gradient of other weight, with more processes: results would depend on
    the number of GPUs. Five prompts do not divide by 2 or 4, and one rank may have nothing to learn."""
    process = torchrun(ranks, *QUICK, "--out", tmp_path / "out")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("step 5/5") == 1  # one process speaks
    assert_same(tmp_path / "out", alone)


def test_torchrun_restarts_a_run_of_which_one_process_died(alone, tmp_path):
    """A dead process that leaves the others waiting for ever, or a restart that begins anew."""
    process = torchrun(2, *QUICK, "--out", tmp_path / "out", restarts=1)
    while "step 3/5" not in process.stdout.readline():
        assert process.poll() is None
    ours = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and environment(pid).get("RANK") == "1"
            and str(tmp_path) in command(pid)]
    assert len(ours) == 1
    os.kill(ours[0], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "going on from step" in stdout and "exitcode: -9" in stderr
    assert_same(tmp_path / "out", alone)


def environment(pid):
    try:
        return dict(entry.split("=", 1) for entry in open(f"/proc/{pid}/environ").read().split("\0") if "=" in entry)
    except OSError:
        return {}


def command(pid):
    try:
        return open(f"/proc/{pid}/cmdline").read()
    except OSError:
        return ""


def test_a_mistake_ends_all_processes(tmp_path):
    """Processes that wait for one that has ended with an error."""
    clock = time.time()
    process = torchrun(2, *QUICK, "--budget", "20", "--out", tmp_path / "out")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and "bare answers" in stderr and time.time() - clock < 60


def test_ranks_share_tokens_and_join_in_order(monkeypatch):
    """One rank with all the long completions while the others wait; completions under another's prompt."""
    monkeypatch.setattr("bcr.RANKS", 3)
    parts = shares([10, 900, 30, 500, 400, 20])
    assert sorted(sum(parts, [])) == list(range(6))
    assert parts == [[1], [3], [4, 2, 5, 0]]
    rollouts = [Rollout(torch.full((2 * prompts, width), k), torch.zeros(2 * prompts, width), torch.full((2 * prompts,), width),
                        torch.zeros(2 * prompts, dtype=torch.bool)) for k, prompts, width in ((0, 2, 3), (1, 2, 5), (2, 1, 4))]
    whole = joined(rollouts, 2)
    assert whole.tokens[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    assert whole.lengths.tolist() == [3, 3, 5, 5, 4, 4, 3, 3, 5, 5] and whole.tokens.shape == (10, 5)
