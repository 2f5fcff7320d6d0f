"""Several processes, started by bcr.py itself or by torchrun over gloo: they do what one does, and a run
outlives one of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import QUICK, REPO, TINY, figures_of, metrics_of, outcome, start, wait_for
from data.files import UserError
from distributed import load_checkpoint
from model import Transformer


def torchrun(processes, *arguments, restarts=0):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
         "--max-restarts", str(restarts), "--", str(REPO / "bcr.py"), *map(str, (*QUICK, *arguments))],
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
    """Waits for `line`, then kills the process of the last rank with signal 9; torchrun ends the others."""
    wait_for(line, process)
    os.kill(processes_of(out)[-1], signal.SIGKILL)


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
        assert m["entropy"] == pytest.approx(n["entropy"], rel=1e-4)
        assert m["loss"] == pytest.approx(n["loss"], rel=1e-3, abs=1e-7)
    assert figures_of(out) == figures_of(expected)
    evaluations = [{path.name: path.read_bytes() for path in (directory / "evaluation").iterdir()}
                   for directory in (out, expected)]
    assert evaluations[0] == evaluations[1]


def children_of(process):
    """Process ids of the processes that a run started by itself."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_number_of_processes_writes_the_same_bytes(finished, tmp_path, processes):
    """Results depend on how many cores a laptop has: rounding differs with the rows next to a row, or sums
    of gradients depend on their order. Five prompts do not divide by 2, 3 or 4."""
    process = start("bcr.py", *QUICK, "--processes", processes, "--out", tmp_path / "out")
    wait_for("step 2/5", process)
    assert len(children_of(process)) == processes - 1
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and stderr == ""
    assert stdout.count("step 5/5") == 1  # one process prints
    assert outcome(tmp_path / "out") == outcome(finished[0])


@pytest.mark.parametrize("victim", ["the first", "another"])
def test_a_run_whose_process_is_killed_resumes_with_the_same_bytes(finished, tmp_path, victim):
    """The others wait forever, continue alone or keep the directory locked; the cause is not named."""
    out = tmp_path / "out"
    process = start("bcr.py", *QUICK, "--processes", 3, "--out", out)
    wait_for("step 3/5", process)
    others = children_of(process)
    os.kill(process.pid if victim == "the first" else others[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    if victim == "another":
        assert process.returncode == 1 and len(stderr.strip().splitlines()) == 1
        assert "process 2 of 3 ended (SIGKILL)" in stderr and "--resume" in stderr
    process = start("bcr.py", *QUICK, "--processes", 2, "--out", out, "--resume")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert outcome(out) == outcome(finished[0])
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)


def test_ctrl_c_stops_all_processes_once(tmp_path):
    """Each process prints its own message, or one is left behind."""
    process = start("bcr.py", *QUICK, "--processes", 3, "--out", tmp_path / "out", start_new_session=True)
    wait_for("step 1/5", process)
    others = children_of(process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.count("stopped") == 1 and "Traceback" not in stderr
    assert stdout.count("stopping after this step") == stdout.count("saved step") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)


def test_several_processes_evaluate_as_one_does(tmp_path):
    """evaluate.py divides the prompts and mixes up the completions."""
    flags = ["--n", "1,4", "--problems", 9, "--samples", 2]
    for processes in (1, 3):
        process = start("evaluate.py", *flags, "--processes", processes, "--out", tmp_path / str(processes))
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / str(processes)).glob("**/*.*")
              if path.is_file() and path.name not in ("settings.json", "results.json", "results.png")}
             for processes in (1, 3)]
    assert files[0] == files[1] and len(files[0]) == 3


def test_sharded_processes_do_what_one_does(finished, tmp_path):
    """With a share of the weights in each process the gradient has another weight. Processes have different
    numbers of passes, and one may have nothing to learn."""
    flags = ["--shard", "--micro-tokens", 500, "--checkpointing"]
    process = torchrun(4, *flags, "--out", tmp_path / "out")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("step 5/5") == 1
    assert_same(tmp_path / "out", finished[0])


def test_a_sharded_run_resumes_with_another_number_of_processes(finished, tmp_path):
    """A checkpoint is readable only by as many processes as wrote it, or only with --shard; or weights in
    model/ miss a share."""
    out = tmp_path / "out"
    process = torchrun(2, "--out", out, "--save-every", 1, "--shard")
    kill_one(out, process, "step 2/5")
    process.communicate(timeout=60)
    parts = sorted((out / "checkpoint-000001").iterdir())
    assert [path.suffix for path in parts] == [".safetensors"] * 2
    embedding = torch.cat([load_file(path)["weight.model.embed_tokens.weight"] for path in parts])
    assert embedding.shape == load_file(TINY / "model/model.safetensors")["model.embed_tokens.weight"].shape
    (tmp_path / "half").mkdir()
    shutil.copytree(out / "checkpoint-000001", tmp_path / "half/checkpoint-000001")
    (tmp_path / "half/checkpoint-000001" / parts[0].name).unlink()
    model = Transformer.from_pretrained(TINY / "model")
    master = list(model.parameters())
    with pytest.raises(UserError, match="a part of .* is missing"):
        load_checkpoint(tmp_path / "half", model, master, torch.optim.AdamW(master))

    process = torchrun(1, "--out", out, "--save-every", 1, "--resume")
    kill_one(out, process, "step 4/5")
    process.communicate(timeout=60)
    assert len(list((out / "checkpoint-000003").iterdir())) == 1
    process = torchrun(3, "--out", out, "--resume", "--shard")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming from step" in stdout, stderr
    assert_same(out, finished[0])


def test_torchrun_restarts_a_run_of_which_one_process_died(finished, tmp_path):
    """The others wait forever for a dead process, or the restarted run begins at step 1."""
    process = torchrun(2, "--out", tmp_path / "out", restarts=1)
    kill_one(tmp_path / "out", process, "step 3/5")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "resuming from step 2" in stdout
    assert outcome(tmp_path / "out") == outcome(finished[0])


def test_a_process_that_fails_ends_the_run_with_its_cause(tmp_path):
    """Processes wait forever for one that has failed, or its message is lost among theirs."""
    (tmp_path / "mine.py").write_text("import os\n\n\ndef score(completion, golds):\n"
                                      "    return [1.0] * (len(golds) + (os.environ['RANK'] == '1'))\n")
    clock = time.time()
    process = torchrun(2, "--shard", "--reward", tmp_path / "mine.py", "--out", tmp_path / "out")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - clock < 60
    assert "should return 1 numbers" in stderr and "(process 1 of 2)" in stderr
    assert "in main" not in stderr.split("should return")[0]  # no traceback before it
    assert "rank      : 1" in stderr.split("Root Cause")[1]


def test_several_processes_need_a_name_for_the_run():
    """Without --out a restart by torchrun does not find the run, and begins another."""
    process = torchrun(2)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and "several processes need --out" in stderr
