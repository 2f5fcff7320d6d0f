"""What distributed.py and data/runs.py do in one process: shares, checkpoints and readable errors.
Runs of several processes are in slow/test_processes.py."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distributed
from bcr import Row, Settings
from conftest import TINY, random_model
from data.runs import checkpoints, load_checkpoint, save_checkpoint
from distributed import readable_errors


def test_small_models_get_processes_and_large_ones_threads(tmp_path, monkeypatch):
    """A model of gigabytes is copied into eight processes, or a small one is divided among threads,
    and what it computes depends on their number."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    small = Settings()
    large = Settings(model=str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 2 * 10**8)  # takes no space on the disk
    for s, processes, most, expected in (
            (small, 0, 16, (6, 1)), (small, 0, 4, (4, 1)), (small, 12, 16, (12, 1)),
            (large, 0, 16, (1, 6)), (large, 2, 16, (2, 1))):
        s = dataclasses.replace(s, processes=processes)
        assert distributed.processes_and_threads(s, most) == expected


def test_processes_share_the_batches_evenly(monkeypatch):
    """A batch is lost or learned twice, one process has all the long ones while the others wait,
    or, with --shard, one makes fewer passes and the others wait forever."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    batches = [[Row([1], [2] * length, None, np.ones(length))] for length in (10, 900, 30, 500, 20)]
    shares = []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        share = distributed.my_share(batches)
        shares.append([len(batch[0].tokens) for batch in share if batch[0].advantages.any()])
        assert len(share) == 2
    assert shares == [[900, 20], [500, 10], [30]]


def test_grad_clip_0_does_not_clip():
    """--grad-clip 0 scales every gradient to 0, and the model never changes."""
    weight = torch.nn.Parameter(torch.zeros(4))
    for max_norm, expected in ((0, 20.0), (5, 5.0)):
        weight.grad = torch.full((4,), 10.0)
        assert distributed.clip_gradient([weight], max_norm) == pytest.approx(20.0)
        assert weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_restores_weights_adamw_and_metrics(tmp_path):
    """A resumed run forgets weights, AdamW's state or the metrics so far; more than two checkpoints
    fill the disk; or a half-written one is taken for a checkpoint."""
    model = random_model()
    master = list(model.parameters())
    optimizer = torch.optim.AdamW(master, lr=1e-3, foreach=False)
    assert load_checkpoint(tmp_path, model, master, optimizer) == (0, [])
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimizer.step()
    for step in (3, 5, 12):
        save_checkpoint(tmp_path, step, [{"step": step}], model, master, optimizer, TINY / "model")
    (tmp_path / "checkpoint.tmp").mkdir()
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-000005", "checkpoint-000012"]
    saved = load_file(tmp_path / "checkpoint-000012/model.safetensors")  # the library reads it
    assert all(torch.equal(saved[name], weight) for name, weight in model.named_parameters())
    other = random_model(seed=1)
    weights = list(other.parameters())
    again = torch.optim.AdamW(weights, lr=1e-3, foreach=False)
    assert load_checkpoint(tmp_path, other, weights, again) == (12, [{"step": 12}])
    for ours, theirs in zip(weights, master, strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(again.state[ours][key], value), key


def graph_capture():
    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("action, status, words", [
    (lambda: torch.empty(2**50), 2, "memory ran out: lower --rows"),
    (graph_capture, 2, "memory ran out"),
    (lambda: signal.raise_signal(signal.SIGTERM), 130, "stopped. Continue with --resume")])
def test_errors_that_a_user_can_fix_are_one_sentence(capsys, action, status, words):
    """Running out of memory, or being stopped, ends in a traceback."""
    with pytest.raises(SystemExit) as stop, readable_errors("bcr.py"):
        action()
    stderr = capsys.readouterr().err
    assert stop.value.code == status and stderr.count("\n") == 1 and words in stderr


def test_a_bug_keeps_its_traceback():
    """An error in the code is reported as the user's."""
    with pytest.raises(RuntimeError, match="shape"), readable_errors("bcr.py"):
        raise RuntimeError("shape mismatch")


def test_a_long_step_says_how_far_it_is(capsys):
    """Without a terminal an evaluation of an hour is silent, or a short one is not."""
    for pause, shown in ((1e-9, True), (300, False), (None, False)):
        with distributed.progress_bar(3, "evaluation", pause=pause) as bar:
            bar.update()
        stderr = capsys.readouterr().err
        assert ("evaluation" in stderr and "1/3" in stderr) if shown else stderr == ""
