"""Several processes, started by torchrun over gloo: they must do what one does, and outlive one of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bcr import joined, load_checkpoint, save_checkpoint, shares
from conftest import REPO, TINY
from model import Transformer, UserError
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


@pytest.mark.parametrize("ranks, flags", [(2, []), (4, []), (2, ["--shard"]), (4, ["--shard", "--micro-tokens", "500", "--checkpointing"])])
def test_several_processes_do_what_one_does(alone, tmp_path, ranks, flags):
    """Other completions, or a gradient of other weight, with more processes, or with a share of the
    weights in each: results would depend on the number of GPUs. Five prompts do not divide by 2 or
    4, ranks differ in their number of passes, and one may have nothing to learn."""
    process = torchrun(ranks, *QUICK, *flags, "--out", tmp_path / "out")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("step 5/5") == 1  # one process speaks
    assert_same(tmp_path / "out", alone)


def killed_after(line, out, process):
    """Kills the last rank once `line` is printed; torchrun ends the others."""
    while line not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    ours = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and str(out) in command(pid)
            and int(environment(pid).get("RANK", -2)) == int(environment(pid).get("WORLD_SIZE", 0)) - 1]
    assert len(ours) == 1
    os.kill(ours[0], signal.SIGKILL)
    return process


def test_a_sharded_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    """A checkpoint that only as many processes as wrote it can read, that a run without --shard
    cannot, or the other way round; pickle in it; weights in model/ that miss a share."""
    out = tmp_path / "out"
    arguments = [*QUICK, "--out", out, "--save-every", "1"]
    killed_after("step 2/5", out, torchrun(2, *arguments, "--shard")).communicate(timeout=60)
    parts = list((out / "checkpoint-000001").iterdir())
    assert sorted(path.suffix for path in parts) == [".json"] + [".safetensors"] * 2
    weight = torch.cat([load_file(path)["weight.model.embed_tokens.weight"] for path in sorted(parts) if path.suffix != ".json"])
    assert weight.shape == load_file(TINY / "model/model.safetensors")["model.embed_tokens.weight"].shape
    (tmp_path / "half/out").mkdir(parents=True)
    shutil.copytree(out / "checkpoint-000001", tmp_path / "half/out/checkpoint-000001")
    min(tmp_path.glob("half/out/checkpoint-*/*.safetensors")).unlink()
    model = Transformer.from_pretrained(TINY / "model")
    with pytest.raises(UserError, match="not all of"):
        load_checkpoint(tmp_path / "half/out", model, list(model.parameters()), torch.optim.AdamW(model.parameters()))
    killed_after("step 4/5", out, torchrun(1, *arguments, "--resume")).communicate(timeout=60)
    assert (out / "checkpoint-000003/state.safetensors").exists()
    process = torchrun(3, *arguments, "--resume", "--shard")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on from step" in stdout, stderr
    assert_same(out, alone)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(out / "model").state_dict(), load_file(out / "model/model.safetensors")
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_damaged_part_is_named(tmp_path):
    """A traceback, or half of the weights from before, where a file of a checkpoint is cut or gone."""
    model = Transformer.from_pretrained(TINY / "model")
    master = list(model.parameters())
    optimizer = torch.optim.AdamW(master)
    save_checkpoint(tmp_path, 3, model, master, optimizer)
    assert load_checkpoint(tmp_path, model, master, optimizer) == 3
    path = tmp_path / "checkpoint-000003/state.safetensors"
    content = path.read_bytes()
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped from the file that is written over
    for damage in (lambda: path.write_bytes(content[:-1]), lambda: path.write_bytes(content[:100]), path.unlink,
                   lambda: save_file({name: tensor for name, tensor in state.items() if "norm" not in name}, path),
                   lambda: save_file(state | {"weight.model.norm.weight": torch.ones(3)}, path),
                   lambda: save_file(state, path, {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [9] * tensor.dim()} for name, tensor in state.items()})})):
        damage()
        with pytest.raises(UserError, match="checkpoint-000003 is damaged") as error:
            load_checkpoint(tmp_path, model, master, optimizer)
        assert "\n" not in str(error.value)
    path.write_bytes(content)
    assert load_checkpoint(tmp_path, model, master, optimizer) == 3


def test_a_process_that_fails_ends_the_run_with_its_cause(tmp_path):
    """Processes that wait for ever for the one that has failed, or a cause that drowns in theirs."""
    (tmp_path / "mine.py").write_text("import os\n\n\ndef score(completion, golds):\n    return [1.0] * (len(golds) + (os.environ['RANK'] == '1'))\n")
    clock = time.time()
    process = torchrun(2, *QUICK, "--shard", "--reward", tmp_path / "mine.py", "--out", tmp_path / "out")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - clock < 60
    assert "should return 2 numbers" in stderr and "(process 1 of 2)" in stderr and "rank      : 1" in stderr.split("Root Cause")[1]
    assert "in main" not in stderr.split("should return")[0]  # no traceback before it


def test_torchrun_restarts_a_run_of_which_one_process_died(alone, tmp_path):
    """A dead process that leaves the others waiting for ever, or a restart that begins anew."""
    process = torchrun(2, *QUICK, "--out", tmp_path / "out", restarts=1)
    stdout, stderr = killed_after("step 3/5", tmp_path, process).communicate(timeout=300)
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
