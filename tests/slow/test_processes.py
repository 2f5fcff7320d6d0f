"""Several processes, started by bcr.py itself or by torchrun over gloo: they do what one does, and
a run outlives one of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import QUICK, REPO, TINY, figures_of, metrics_of, outcome, start, wait_for


def torchrun(processes, *arguments, restarts=0):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes),
         "--max-restarts", str(restarts), "--", str(REPO / "bcr.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def processes_of(out):
    """Process ids of a run under torchrun, in the order of their ranks."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((directory / name).read_text() for name in ("cmdline", "environ"))
        except OSError:  # it has ended, or belongs to someone else
            continue
        environment = dict(entry.split("=", 1) for entry in variables.split("\0") if "=" in entry)
        if str(out) in command and "RANK" in environment:
            found.append((int(environment["RANK"]), int(directory.name)))
    return [pid for _, pid in sorted(found)]


def kill_one(out, process, line):
    """Waits for `line`, then kills the process of the last rank with signal 9; torchrun ends the
    others."""
    wait_for(line, process)
    os.kill(processes_of(out)[-1], signal.SIGKILL)


def children_of(process):
    """Process ids of the processes that a run started by itself."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def assert_same(out, expected):
    """The same completions and evaluations, and weights and metrics up to the rounding of sums."""
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (out, expected))
    distance, norm = (torch.cat([f(name).flatten() for name in theirs]).norm()
                      for f in (lambda name: ours[name] - theirs[name], theirs.get))
    assert distance <= 1e-6 * norm
    for m, n in zip(metrics_of(out), metrics_of(expected), strict=True):
        for key in n.keys() - {"grad_norm", "loss", "entropy", "logprob_gap", "logprob_gap_max"}:
            assert m[key] == n[key], key
        assert m["grad_norm"] == pytest.approx(n["grad_norm"], rel=1e-4)
        assert m["loss"] == pytest.approx(n["loss"], rel=1e-3, abs=1e-7)
    assert figures_of(out) == figures_of(expected)
    evaluations = [{path.name: path.read_bytes() for path in (directory / "evaluation").iterdir()}
                   for directory in (out, expected)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_every_number_of_processes_writes_the_same_bytes(finished, tmp_path, processes):
    """Results depend on how many cores a laptop has: rounding differs with the rows next to a row,
    or sums of gradients depend on their order. Five prompts do not divide by 2 or 4."""
    process = start("bcr.py", *QUICK, "--processes", processes, "--out", tmp_path / "out")
    wait_for("step 2/5", process)
    assert len(children_of(process)) == processes
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and stderr == ""
    assert stdout.count("step 5/5") == 1  # one process prints
    assert outcome(tmp_path / "out") == outcome(finished[0])


@pytest.mark.parametrize("victim", ["the parent", "the last"])
def test_a_run_whose_process_is_killed_resumes_with_the_same_bytes(finished, tmp_path, victim):
    """The others wait forever or continue alone; the cause is not named."""
    out = tmp_path / "out"
    process = start("bcr.py", *QUICK, "--processes", 3, "--out", out)
    wait_for("step 3/5", process)
    others = children_of(process)
    os.kill(process.pid if victim == "the parent" else others[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    if victim != "the parent":
        assert process.returncode == 1 and len(stderr.strip().splitlines()) == 2
        assert "terminated with signal SIGKILL" in stderr and "--resume" in stderr
    process = start("bcr.py", "--resume", out, "--processes", 2)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert outcome(out) == outcome(finished[0])
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)


REWARD = """import os
def score(completion, golds):
    return [1.0] * len(golds) if os.environ["RANK"] == "0" else {value}
"""


@pytest.mark.parametrize("launcher", [start, torchrun])
@pytest.mark.parametrize("value, words",
                         [("[2]", "should return 1 numbers"), ("1 / 0", "ZeroDivisionError")])
def test_a_process_that_fails_ends_the_run_with_its_cause(tmp_path, launcher, value, words):
    """Processes wait forever for one that has failed, or its message is lost among theirs."""
    (tmp_path / "mine.py").write_text(REWARD.format(value=value))
    flags = [*QUICK, "--reward", tmp_path / "mine.py", "--out", tmp_path / "out"]
    clock = time.time()
    process = start("bcr.py", "--processes", 2, *flags) if launcher is start else torchrun(2,
                                                                                           *flags)
    _, stderr = process.communicate(timeout=120)
    assert words in stderr and time.time() - clock < 60
    if launcher is start:
        assert process.returncode == (2 if value == "[2]" else 1)
        assert stderr.count("\n") == 1 or value != "[2]"
    else:
        assert process.returncode != 0


def test_several_processes_evaluate_as_one_does(tmp_path):
    """evaluate.py divides the prompts and mixes up the completions."""
    flags = ["--n", "1,4", "--problems", 9, "--samples", 2]
    for processes in (1, 3):
        process = start("evaluate.py", *flags, "--processes", processes, "--out",
                        tmp_path / str(processes))
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    files = [{path.name: path.read_bytes()
              for path in (tmp_path / str(processes)).glob("evaluation/*")}
             for processes in (1, 3)]
    assert files[0] == files[1] and len(files[0]) == 2


def test_sharded_processes_do_what_one_does_and_any_number_resumes(finished, tmp_path):
    """With a share of the weights in each process the gradient has another weight, or processes
    make different numbers of passes; a checkpoint is readable only by as many processes as wrote
    it, or only with --shard."""
    out = tmp_path / "out"
    flags = ["--shard", "--micro-tokens", 500, "--checkpointing"]
    process = torchrun(4, *QUICK, *flags, "--save-every", 1, "--out", out)
    kill_one(out, process, "step 2/5")
    process.communicate(timeout=60)
    embedding = load_file(out / "checkpoint-000001/model.safetensors")
    whole = load_file(TINY / "model/model.safetensors")["model.embed_tokens.weight"]
    assert embedding["model.embed_tokens.weight"].shape == whole.shape
    process = torchrun(1, "--resume", out)
    kill_one(out, process, "step 4/5")
    process.communicate(timeout=60)
    process = torchrun(3, "--resume", out, "--shard")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming from step" in stdout, stderr
    assert stdout.count("step 5/5") == 1
    assert_same(out, finished[0])


def test_torchrun_restarts_a_run_of_which_one_process_died(finished, tmp_path):
    """The others wait forever for a dead process, or the restarted run begins at step 1."""
    process = torchrun(2, *QUICK, "--out", tmp_path / "out", restarts=1)
    kill_one(tmp_path / "out", process, "step 3/5")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "resuming from step 2" in stdout
    assert outcome(tmp_path / "out") == outcome(finished[0])


def test_several_processes_need_a_name_for_the_run():
    """Without --out a restart by torchrun does not find the run, and begins another."""
    process = torchrun(2, *QUICK)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and "several processes need --out" in stderr
