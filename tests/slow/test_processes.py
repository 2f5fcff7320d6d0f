"""Several processes, started by bcr.py itself or by torchrun over gloo, do what one does; and runs
that are killed or stopped end with the same bytes (see also test_idea.py)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import QUICK, REPO, TINY, figures_of, metrics_of, outcome, start, wait_for
from data.runs import checkpoints


def torchrun(processes, *arguments, restarts=0):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), "--max-restarts", str(restarts), "--", str(REPO / "bcr.py"),
         *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def children_of(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def kill_one(process, line):
    """Waits for `line`, then kills one of the processes that torchrun has started."""
    wait_for(line, process)
    os.kill(children_of(process)[-1], signal.SIGKILL)


def test_several_processes_evaluate_as_one_does(tmp_path):
    """evaluate.py divides the prompts and mixes up the completions."""
    found = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        process = start("evaluate.py", "--n", "1,4", "--problems", 9, "--samples", 2,
                        "--processes", processes, "--out", out)
        assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
        found.append({path.name: path.read_bytes() for path in out.glob("evaluation/*")})
    assert found[0] == found[1] and len(found[0]) == 2


def test_sharded_processes_do_what_one_does_and_any_number_resumes(finished, tmp_path):
    """With a share of the weights in each process the gradient has another weight, or processes
    make different numbers of passes; a checkpoint is readable only by as many processes as wrote
    it, or only with --shard. Sums are in another order here, so weights differ by rounding."""
    out = tmp_path / "out"
    process = torchrun(2, *QUICK, "--shard", "--micro-tokens", 500, "--checkpointing", "--out", out)
    kill_one(process, "step 3/5")
    process.communicate(timeout=60)
    saved = load_file(checkpoints(out)[-1] / "model.safetensors")
    whole = load_file(TINY / "model/model.safetensors")
    assert all(saved[name].shape == whole[name].shape for name in saved)
    process = torchrun(3, "--resume", out)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (out, finished[0]))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for m, n in zip(metrics_of(out), metrics_of(finished[0]), strict=True):
        assert m["reward"] == n["reward"] and m["tokens_per_problem"] == n["tokens_per_problem"]
        assert m["grad_norm"] == pytest.approx(n["grad_norm"], rel=1e-4)
    assert figures_of(out) == figures_of(finished[0])


def test_a_run_killed_again_and_again_ends_as_if_it_was_not(finished, tmp_path):
    """A kill -9 while sampling, training, evaluating or writing loses a step, repeats one or leaves
    half a file. BCR_KILLS=20 kills the run 20 times."""
    out = tmp_path / "out"
    kills = int(os.environ.get("BCR_KILLS", 3))
    rng = random.Random(kills)
    for _ in range(kills):
        begun = (out / "settings.json").exists()
        process = start("bcr.py", *(["--resume", out] if begun else [*QUICK, "--out", out]))
        process.stdout.readline()  # the settings are written
        time.sleep(rng.random() * 2.5)
        process.kill()
        process.communicate()
    process = start("bcr.py", "--resume", out)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert outcome(out) == outcome(finished[0])
    assert len(checkpoints(out)) == 2 and not (out / "checkpoint.tmp").exists()


@pytest.mark.parametrize("victim", ["the parent", "a child"])
def test_no_process_survives_another(tmp_path, victim):
    """The others wait forever for a process that was killed, or continue alone; the cause is not
    named."""
    process = start("bcr.py", *QUICK, "--processes", 3, "--out", tmp_path / "out")
    wait_for("step 1/5", process)
    children = children_of(process)
    os.kill(process.pid if victim == "the parent" else children[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    if victim == "a child":
        assert process.returncode == 1 and stderr.count("\n") == 2
        assert "terminated with signal SIGKILL" in stderr and "--resume" in stderr
    end = time.time() + 10  # init takes a moment to forget the orphans
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.time() < end
        time.sleep(0.1)


@pytest.mark.parametrize("processes, number", [(1, signal.SIGINT), (3, signal.SIGTERM)])
def test_a_stopped_run_says_how_to_go_on(tmp_path, processes, number):
    """Ctrl-C or preemption ends in a traceback, in a message per process, or takes long. The
    terminal sends Ctrl-C to all processes, a scheduler SIGTERM to the first."""
    process = start("bcr.py", *QUICK, "--processes", processes, "--out", tmp_path / "out",
                    start_new_session=True)
    wait_for("step 1/5", process)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in stderr and stderr.count("\n") == 1


REWARD = """import os
def score(completion, golds):
    return [1.0] * len(golds) if os.environ["RANK"] == "0" else {value}
"""


@pytest.mark.parametrize("launcher, value, status, words", [
    ("bcr.py", "[2]", 2, "should return 1 numbers"), ("bcr.py", "1 / 0", 1, "ZeroDivisionError"),
    ("torchrun", "1 / 0", 1, "ZeroDivisionError")])
def test_a_process_that_fails_ends_the_run_with_its_cause(
        tmp_path, launcher, value, status, words):
    """Processes wait forever for one that has failed, or its message is lost among theirs."""
    (tmp_path / "mine.py").write_text(REWARD.format(value=value))
    flags = [*QUICK, "--reward", tmp_path / "mine.py", "--out", tmp_path / "out"]
    if launcher == "torchrun":
        process = torchrun(2, *flags)
    else:
        process = start("bcr.py", "--processes", 2, *flags)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status and words in stderr
    assert stderr.count("\n") == 1 or status == 1


def test_torchrun_restarts_a_run_of_which_one_process_died(finished, tmp_path):
    """The others wait forever for a dead process, or the restarted run begins at step 1."""
    process = torchrun(2, *QUICK, "--out", tmp_path / "out", restarts=1)
    kill_one(process, "step 3/5")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming from step 2" in stdout, stderr
    assert stdout.count("step 5/5") == 1  # one process prints
    assert outcome(tmp_path / "out") == outcome(finished[0])
