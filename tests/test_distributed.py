"""What distributed.py does in one process: shares, checkpoints and readable errors. Runs of several processes
are in slow/test_processes.py."""

import dataclasses
import json
import os
import signal
from itertools import repeat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import distributed
from bcr import Row, Settings
from conftest import random_model
from data.files import UserError
from distributed import checkpoints, finish_first, load_checkpoint, readable_errors, save_checkpoint
from rollout import generate


# ----------------------------------------------------------------------------------------------
# Shares


def test_processes_share_the_batches_evenly(monkeypatch):
    """A batch is lost or learned twice, or one process has all the long ones while the others wait."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    batches = [[Row([1], [2] * length, None, None)] for length in (10, 900, 30, 500, 400, 20)]
    shares = []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        shares.append([len(batch[0].tokens) for batch in distributed.my_share(batches)])
    assert shares == [[900, 30], [500, 20], [400, 10]]


def test_samples_of_all_processes_are_joined_in_order(monkeypatch):
    """A completion appears under another prompt. Each process samples its prompts under their own keys, so
    together they sample what one process does; one may have nothing to do."""
    model, prompts = random_model(), [[5], [6, 7], [8], [9, 9], [4]]
    options = dict(eos_ids=[0], seed=1, max_rows=3)
    alone = [c.tokens for c in generate(model, prompts, 2, 12, **options)]
    nothing = [], np.zeros(0, np.float32), True
    for count in (2, 3, 6):
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        parts = []
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank", lambda: rank)
            monkeypatch.setattr(
                distributed, "all_gather", lambda own: parts.append(own) or [repeat(nothing)] * count)
            distributed.sample(model, prompts, 2, 12, **options)
        monkeypatch.setattr(distributed, "all_gather", lambda own: parts)
        assert [c.tokens for c in distributed.sample(model, prompts, 2, 12, **options)] == alone


def test_small_models_get_processes_and_large_ones_threads(tmp_path, monkeypatch):
    """A model of gigabytes is copied into eight processes, or a small one is divided among threads, and what
    it computes depends on their number."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    small, large = Settings(), Settings(model=str(tmp_path))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    os.truncate(tmp_path / "model.safetensors", 2 * 10**8)  # takes no space on the disk
    for s, processes, most, expected in (
            (small, 0, 16, (6, 1)), (small, 0, 4, (4, 1)), (small, 1, 16, (1, 1)), (small, 12, 16, (12, 1)),
            (large, 0, 16, (1, 6)), (large, 1, 16, (1, 6)), (large, 2, 16, (2, 1))):
        s = dataclasses.replace(s, processes=processes)
        assert distributed.processes_and_threads(s, most) == expected


# ----------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def state():
    """A small model after one step of AdamW."""
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimizer.step()
    return model, list(model.parameters()), optimizer


def test_a_checkpoint_restores_weights_and_adamw(state, tmp_path):
    """A resumed run forgets weights or AdamW's state; pickle is used, which runs code; more than two
    checkpoints fill the disk; another directory or a half-written one is taken for a checkpoint."""
    for step in (3, 5, 12):
        save_checkpoint(tmp_path, step, *state)
    for name in ("checkpoint-7", "checkpoint-000099.old", "checkpoint-00002x", "checkpoint.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000005", "checkpoint-000012"]
    assert {path.suffix for path in tmp_path.glob("checkpoint-*/*")} == {".safetensors"}
    model = random_model(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    assert load_checkpoint(tmp_path, model, list(model.parameters()), optimizer) == 12
    for ours, theirs in zip(model.parameters(), state[1], strict=True):
        assert torch.equal(ours, theirs)
        for key, value in state[2].state[theirs].items():
            assert torch.equal(optimizer.state[ours][key], value), key
    assert load_checkpoint(tmp_path / "nowhere", model, None, None) == 0


def test_a_damaged_checkpoint_is_named(state, tmp_path):
    """A file that is cut, missing or changed raises a traceback, or some weights stay as they were."""
    save_checkpoint(tmp_path, 3, *state)
    path = next(tmp_path.glob("checkpoint-000003/*"))
    content = path.read_bytes()
    saved = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped from the file
    moved = json.dumps({name: {"saved_offsets": [9] * tensor.dim()} for name, tensor in saved.items()})
    for damage in (
            lambda: path.write_bytes(content[:-1]), lambda: path.write_bytes(content[:100]), path.unlink,
            lambda: save_file({name: t for name, t in saved.items() if "norm" not in name}, path),
            lambda: save_file(saved | {"weight.model.norm.weight": torch.ones(3)}, path),
            lambda: save_file(saved, path, {"DCP_SHARDING_INFO": moved})):
        damage()
        with pytest.raises(UserError, match="checkpoint-000003 is damaged[^\n]*$"):
            load_checkpoint(tmp_path, *state)
    path.write_bytes(content)
    assert load_checkpoint(tmp_path, *state) == 3


# ----------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("action, status, words", [
    (lambda: torch.empty(2**50), 2, ["memory ran out", "--rows", "--micro-tokens", "--checkpointing"]),
    (lambda: np.ones(2**50), 2, ["memory ran out"]),
    (lambda: open("nowhere/file"), 2, ["No such file", "nowhere/file", "--resume"]),
    (lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), 2, ["No space left", "--resume"]),
    (lambda: load_file(__file__), 2, ["--resume"]),
    (lambda: signal.raise_signal(signal.SIGINT), 130, ["stopped", "--resume"]),
    (lambda: signal.raise_signal(signal.SIGTERM), 143, ["stopped", "--resume"])],
    ids=["memory", "numpy's memory", "no file", "full disk", "not safetensors", "Ctrl-C", "SIGTERM"])
def test_errors_that_a_user_can_fix_are_one_sentence(capsys, action, status, words):
    """Running out of memory or disk, or Ctrl-C, ends in a traceback."""
    with pytest.raises(SystemExit) as stop, readable_errors("bcr.py"):
        action()
    stderr = capsys.readouterr().err
    assert stop.value.code == status and len(stderr.strip().splitlines()) == 1
    assert all(word in stderr for word in words), stderr


def test_a_bug_keeps_its_traceback():
    """An error in the code is reported as the user's."""
    with pytest.raises(RuntimeError, match="shape"), readable_errors("bcr.py"):
        raise RuntimeError("shape mismatch")


def test_the_first_signal_finishes_the_step_and_the_second_does_not():
    """Ctrl-C loses the step in progress, or cannot end a long one; or the handler stays in place after
    training."""
    def handler(number, frame):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for first, second in ((signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)):
            with pytest.raises(KeyboardInterrupt), finish_first() as stop:
                signal.raise_signal(first)
                assert stop == [first]
                signal.raise_signal(second)
        with finish_first():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def test_grad_clip_0_does_not_clip():
    """--grad-clip 0 scales every gradient to 0, and the model never changes."""
    weight = torch.nn.Parameter(torch.zeros(4))
    for max_norm, expected in ((0, 20.0), (5, 5.0)):
        weight.grad = torch.full((4,), 10.0)
        assert distributed.clip_gradient([weight], max_norm) == pytest.approx(20.0)
        assert weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)
