"""The command line: what a run of bcr.py writes, what it must not depend on, and errors a user can
fix."""

import json
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bcr
import evaluate
from conftest import QUICK, REPO, TINY, lines_of, metrics_of, outcome, status_of
from data.runs import checkpoints
from model import Transformer

SMALL = ["--n", 1, "--budget", 40, "--steps", 1, "--groups", 2, "--samples", 2, "--eval-n", 1,
         "--eval-problems", 2, "--eval-budget", 40]


def test_a_run_writes_what_it_promises(finished):
    """Figures are missing in the files, or are others in the table; completions are scored against
    the answers of another prompt."""
    out, stdout = finished
    results = json.loads((out / "results.json").read_text())
    for n in ("1", "4"):
        before, after = (results[stage]["heldout"][n] for stage in ("before", "after"))
        low, high = after["accuracy_ci95"]
        assert 0 <= low <= after["accuracy"] <= high <= 1 and after["problems"] == 9
        row = " ".join(re.search(rf" heldout \| {n} \|.*", stdout)[0].split())
        old, new = before["tokens_per_problem"], after["tokens_per_problem"]
        assert f"| {old:.1f} {new:.1f} {new / old - 1:+.1%} |" in row
        old, new = 100 * before["accuracy"], 100 * after["accuracy"]
        assert f"| {old:.1f} {new:.1f} {new - old:+.1f} ±" in row
    metrics = metrics_of(out)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert np.mean([m["accuracy"] for m in metrics]) > 0.2
    for m in metrics:
        assert m["reward"] == m["accuracy"] and m["grad_norm"] > 0 and 0 < m["entropy"] < 2
        assert m["tokens_per_problem"] == pytest.approx(30, abs=5)
        assert m["logprob_gap_max"] < 1e-4  # sampler and trainer compute the same distribution
    shown = sorted(int(path.stem[-6:]) for path in out.glob("samples/*"))
    assert shown == [1, 2, 4, 5]  # the first, each --save-every, the last
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000004", "checkpoint-000005"]


def test_the_trained_model_loads_in_transformers(finished):
    """Another engine computes other logits from model/ or from a checkpoint, or finds no tokenizer
    in it; the model was not trained, or its last checkpoint is another."""
    path = finished[0] / "model"
    ours = Transformer.from_pretrained(path)
    for saved in (path, checkpoints(finished[0])[-1]):
        ids = AutoTokenizer.from_pretrained(saved)("Problem 1: What is 3 + 4?").input_ids
        logits = AutoModelForCausalLM.from_pretrained(saved)(torch.tensor([ids])).logits
        torch.testing.assert_close(ours(torch.tensor([ids])), logits, atol=1e-4, rtol=1e-4)
    before = Transformer.from_pretrained(TINY / "model")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), ours.parameters()))


def test_a_used_out_is_never_touched(finished, capsys):
    """A second run overwrites the first, or a resumed one trains with other settings."""
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert status_of(bcr.main, *QUICK, "--out", out) == 2 and "in use" in capsys.readouterr().err
    assert status_of(bcr.main, "--resume", out, "--n", 2) == 2
    assert "--n cannot be given with --resume" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


HIDE = """
import os, sys
sys.modules["fcntl"] = None
del os.fork
import bcr
bcr.main(sys.argv[1:])
"""


def test_nothing_that_only_posix_has_is_needed(tmp_path):
    """The project does not start on Windows: an import of fcntl, or processes that cannot fork."""
    command = [sys.executable, "-c", HIDE, *SMALL, "--processes", 2, "--out", tmp_path / "out"]
    done = subprocess.run([*map(str, command)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "out")) == 1


def test_a_run_resumes_from_its_directory_alone(finished, tmp_path):
    """Flags have to be typed again, or a run that moved, with its model and checkout, is
    refused."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    flags = [*QUICK, "--steps", 2, "--model", tmp_path / "model", "--out", tmp_path / "out"]
    assert status_of(bcr.main, *flags) == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    out = (tmp_path / "out").rename(tmp_path / "run")
    saved = json.loads((out / "settings.json").read_text())
    assert saved["data"] == "data/tiny/train.jsonl"  # wherever the checkout is
    (out / "settings.json").write_text(json.dumps(saved | {"model": str(tmp_path / "moved")}))
    assert status_of(bcr.main, "--resume", out, "--steps", 5, "--rows", 3) == 0
    assert json.loads((out / "settings.json").read_text())["steps"] == 5
    _, metrics, files = outcome(out)
    _, expected, expected_files = outcome(finished[0])
    assert metrics == expected
    assert {name: files[name] for name in expected_files} == expected_files


def test_changed_contents_are_refused_by_name_or_accepted_and_recorded(tmp_path, capsys):
    """Answers to other problems, a table of two rewards, or prompts of another template are mixed
    in silently; or a reward that failed at step 900 cannot be corrected."""
    model, data, reward, out = (tmp_path / name for name in ("model", "data.jsonl", "r.py", "out"))
    shutil.copytree(TINY / "model", model)
    shutil.copy(TINY / "heldout.jsonl", data)
    reward.write_text("from reward import score\n")
    assert status_of(bcr.main, *SMALL, "--model", model, "--data", data, "--reward", reward,
                     "--out", out) == 0
    for path, role in ((data, "--data"), (reward, "--reward"),
                       (model / "config.json", "config.json"),
                       (model / "model.safetensors", "the weights"),
                       (model / "tokenizer.json", "the tokenizer"),
                       (model / "chat_template.jinja", "the chat template")):
        content = path.read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])  # of the last weight
        path.write_bytes(flipped if role == "the weights" else content + b"\n")
        assert status_of(bcr.main, "--resume", out) == 2
        assert f"the contents of {role} have changed" in capsys.readouterr().err
        path.write_bytes(content)
    reward.write_text("from reward import score  # corrected\n")
    assert status_of(bcr.main, "--resume", out, "--accept-changes", "--steps", 2) == 0
    saved = json.loads((out / "settings.json").read_text())
    before, after = [digests["--reward"] for digests in saved["sha256"]]
    assert before != after and len(metrics_of(out)) == 2


def test_a_full_disk_damages_nothing(finished, tmp_path):
    """A checkpoint is half written and taken for a complete one. The resumed run ends with the
    bytes of the run that was not interrupted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # the embedding has 0.4 MB
    try:
        with pytest.raises(Exception, match="File too large"):
            bcr.main([*map(str, QUICK), "--out", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not checkpoints(tmp_path / "out")
    assert status_of(bcr.main, "--resume", tmp_path / "out") == 0
    assert outcome(tmp_path / "out") == outcome(finished[0])


def test_a_reward_of_the_users_own(tmp_path, capsys):
    """--reward is read, but not used in training or in evaluation; the warning for held-out
    problems that are trained on is missing."""
    reward, data, out = (tmp_path / name for name in ("mine.py", "data.jsonl", "out"))
    reward.write_text("def score(completion, golds):\n    return [0.5 for gold in golds]\n")
    data.write_text('{"problem": "What is 1 + 1?", "answer": "HOLD"}\n')
    assert status_of(bcr.main, *SMALL, "--data", data, "--eval-data", data, "--eval-problems", 1,
                     "--reward", reward, "--out", out) == 0
    assert "1 problems of data are also in --data" in capsys.readouterr().out
    assert metrics_of(out)[0]["reward"] == 0.5
    assert lines_of(out / "evaluation/data-n1-step0.jsonl")[0]["correct"] == [0.5]


MISTAKES = [  # program, flags, and a word of the sentence
    (bcr, "--eval-data one.jsonl,./one.jsonl", "two data files"),
    (bcr, "--model nowhere", "nowhere"),
    (bcr, "--model .", "tokenizer.json"),
    (bcr, "--reward empty.py", "score"),
    (bcr, "--out one.jsonl/out", "--out"),
    (bcr, "--resume empty", "no run"),
    (bcr, "--budge 5", "--budge"),
    (bcr, "--n 2,,4", "--n"),
    (bcr, "--lr nan", "--lr"),
    (bcr, "--steps 0", "--steps"),
    (bcr, "--temperature 0", "--temperature"),
    (bcr, "--template-options thinking", "--template-options"),
    (bcr, "--n 2,4,8 --budget 80,160", "--budget"),
    (bcr, "--n 2 --data one.jsonl", "only 1"),
    (bcr, "--budget 20", "bare answers"),
    (bcr, "--budget 5000 --eval-budget 5000", "4096 positions"),
    (bcr, "--budget 512 --eval-budget 60", "512"),
    (evaluate, "--within 512 --budget 60", "512"),
    (evaluate, "--budget 5000", "4096 positions"),
    (evaluate, "--solve one.jsonl --n 1,2", "--n"),
    (evaluate, "--steps 5", "--steps")]


@pytest.mark.parametrize("program, flags, named", MISTAKES)
def test_a_mistake_is_one_sentence_with_status_2(
        tmp_path, monkeypatch, capsys, program, flags, named):
    """A traceback, a mistyped flag that is ignored, or a run that starts in spite of an error and
    fails an hour later. Nothing is created."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "2"}\n')
    (tmp_path / "empty.py").touch()
    before = sorted(tmp_path.rglob("*"))
    assert status_of(program.main, *flags.split()) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1 and named in stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_several_processes_need_a_name_for_the_run(monkeypatch, capsys):
    """Without --out a restart by torchrun does not find the run, and begins another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status_of(bcr.main, *SMALL) == 2
    assert "several processes need --out" in capsys.readouterr().err
