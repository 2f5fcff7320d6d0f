"""The command line: what a run of bcr.py writes, what it must not depend on, and errors a user can
fix."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import bcr
import evaluate
from conftest import QUICK, REPO, TINY, lines_of, metrics_of, outcome, status_of
from data.runs import checkpoints
from model import Transformer

SMALL = ["--n", 1, "--budget", 40, "--steps", 1, "--groups", 2, "--samples", 2, "--eval-n", 1,
         "--eval-problems", 2, "--eval-budget", 40]


# ----------------------------------------------------------------------------------------------
# A finished run


def test_a_run_writes_all_that_it_promises(finished):
    """A program cannot read the results, or figures are missing."""
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    for stage in ("before", "after"):
        assert list(results[stage]["heldout"]) == ["1", "4"]
        for n, row in results[stage]["heldout"].items():
            low, high = row["accuracy_ci95"]
            assert 0 <= low <= row["accuracy"] <= high <= 1 and row["problems"] == 9
            assert 10 < row["tokens_per_problem"] < 200 and row["waits_per_problem"] >= 0
            assert 0 <= row["truncated"] <= 1 and len(row["accuracy_by_position"]) == int(n)
    metrics = metrics_of(out)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    for m in metrics:
        assert {"truncated", "zero_variance", "waits_per_problem", "logprob_gap"} <= m.keys()
        assert m["reward"] == m["accuracy"] > 0 and m["grad_norm"] > 0 and 0 < m["entropy"] < 2
        assert m["tokens_per_problem"] == pytest.approx(30, abs=5)
        assert len(m["accuracy_by_position"]) == 4
        assert m["logprob_gap_max"] < 1e-4  # sampler and trainer compute the same distribution
    shown = sorted(int(path.stem.removeprefix("step-")) for path in out.glob("samples/step-*.txt"))
    assert shown == [1, 2, 4, 5]  # the first, each --save-every, the last
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000004", "checkpoint-000005"]


def test_the_table_shows_what_results_json_holds(finished):
    """The table has other numbers than the file, or is not printed on a pipe."""
    out, stdout = finished
    results = json.loads((out / "results.json").read_text())
    cells = [[cell.strip() for cell in line.split("|")] for line in stdout.splitlines()
             if "|" in line]
    rows = {(row[0], row[1]): row[2:] for row in cells}
    for n in ("1", "4"):
        before, after, change = (results[key]["heldout"][n]
                                 for key in ("before", "after", "change"))
        accuracy, _, tokens, _ = rows["heldout", n]
        assert tokens.split() == [f"{before['tokens_per_problem']:.1f}",
                                  f"{after['tokens_per_problem']:.1f}",
                                  f"{change['tokens']:+.1%}"]
        assert accuracy.split()[:3] == [f"{100 * before['accuracy']:.1f}",
                                        f"{100 * after['accuracy']:.1f}",
                                        f"{100 * change['accuracy']:+.1f}"]
        assert change["accuracy"] == pytest.approx(after["accuracy"] - before["accuracy"])
        ratio = after["tokens_per_problem"] / before["tokens_per_problem"]
        assert change["tokens"] == pytest.approx(ratio - 1)
        assert change["accuracy_ci95"][0] <= change["accuracy"] <= change["accuracy_ci95"][1]


def test_the_trained_model_loads_in_transformers(finished):
    """Another engine computes other logits from model/, or finds no tokenizer in it."""
    transformers = pytest.importorskip("transformers")
    path = finished[0] / "model"
    ours = Transformer.from_pretrained(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Problem 1: What is 3 + 4?", return_tensors="pt").input_ids
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert ours.model.norm.weight.dtype == torch.float32
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


def test_the_machine_does_not_decide_the_result(finished, tmp_path):
    """Fewer rows at a time, smaller micro-batches or checkpointing sample other completions or
    reach other weights, up to the rounding of sums in another order."""
    out, _ = finished
    assert status_of(bcr.main, *QUICK, "--rows", 5, "--micro-tokens", 700, "--checkpointing",
                     "--out", tmp_path / "out") == 0
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (tmp_path / "out", out))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0,
                                   atol=2e-5)  # after five steps of 1e-4
    for a, b in zip(metrics_of(tmp_path / "out"), metrics_of(out), strict=True):
        assert a["tokens_per_problem"] == b["tokens_per_problem"] and a["reward"] == b["reward"]


# ----------------------------------------------------------------------------------------------
# Resuming


def test_a_run_resumes_from_its_directory_alone(finished, tmp_path):
    """Flags have to be typed again, or a run that moved, with its model and checkout, is
    refused."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    out = tmp_path / "out"
    assert status_of(bcr.main, *QUICK, "--steps", 2, "--model", tmp_path / "model", "--out",
                     out) == 0
    saved = json.loads((out / "settings.json").read_text())
    assert saved["data"] == "data/tiny/train.jsonl"  # wherever the checkout is
    (tmp_path / "model").rename(tmp_path / "moved")
    out.rename(tmp_path / "run")
    saved["model"] = str(tmp_path / "moved")
    (tmp_path / "run/settings.json").write_text(json.dumps(saved))
    assert status_of(bcr.main, "--resume", tmp_path / "run", "--steps", 5, "--rows", 3) == 0
    ours, theirs = outcome(tmp_path / "run"), outcome(finished[0])
    assert ours[1] == theirs[1] and ours[2].pop("heldout-n1-step0.jsonl")
    assert all(theirs[2][name] == content for name, content in ours[2].items()
               if "step2" not in name)
    assert json.loads((tmp_path / "run/settings.json").read_text())["steps"] == 5


def test_changed_contents_are_refused_by_name_or_accepted_and_recorded(tmp_path, capsys):
    """Answers to other problems, a table of two rewards, or prompts of another template are mixed
    in silently; or a reward that failed at step 900 cannot be corrected."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    data = (TINY / "heldout.jsonl").read_text()
    # A problem may look like the heading of a file that is written to be read.
    data = data.replace('"problem": "', '"problem": "Consider:\\n==== step 1: one group\\n')
    (tmp_path / "data.jsonl").write_text(data)
    (tmp_path / "mine.py").write_text("from reward import score\n")
    out = tmp_path / "out"
    assert status_of(bcr.main, *SMALL, "--model", tmp_path / "model", "--data",
                     tmp_path / "data.jsonl",
                     "--reward", tmp_path / "mine.py", "--out", out) == 0
    for name, role in (("data.jsonl", "--data"), ("mine.py", "--reward"),
                       ("model/config.json", "config.json"),
                       ("model/model.safetensors", "the weights"),
                       ("model/tokenizer.json", "the tokenizer"),
                       ("model/chat_template.jinja", "the chat template")):
        path = tmp_path / name
        content = path.read_bytes()
        last = bytes([content[-1] ^ 1]) if name.endswith("safetensors") else content[-1:] + b"\n"
        path.write_bytes(content[:-1] + last)
        assert status_of(bcr.main, "--resume", out) == 2
        assert f"the contents of {role} have changed" in capsys.readouterr().err
        path.write_bytes(content)
    (tmp_path / "mine.py").write_text("from reward import score  # corrected\n")
    assert status_of(bcr.main, "--resume", out, "--accept-changes", "--steps", 2) == 0
    saved = json.loads((out / "settings.json").read_text())
    before, after = [digests["--reward"] for digests in saved["sha256"]]
    assert before != after and len(metrics_of(out)) == 2
    assert status_of(bcr.main, "--resume", out) == 0
    assert "\n==== step 1: one group\n" in (out / "samples/step-000002.txt").read_text()


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


def test_a_checkpoint_is_a_model(finished, tmp_path, capsys):
    """`--model out/run-1/checkpoint-000004` is refused, or has other weights than the run."""
    flags = ["--n", 4, "--problems", 9, "--seed", 0]
    for name in ("checkpoint-000005", "model"):
        assert status_of(evaluate.main, "--model", finished[0] / name, *flags, "--out",
                         tmp_path / name) == 0
    records = [(tmp_path / name / "evaluation/heldout-n4-step0.jsonl").read_bytes()
               for name in ("checkpoint-000005", "model")]
    assert records[0] == records[1]


HIDE = """
import os, sys
sys.modules["fcntl"] = None
del os.fork
import bcr
bcr.main(sys.argv[1:])
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_that_only_posix_has_is_needed(tmp_path, processes):
    """The project does not start on Windows: an import of fcntl, or processes that cannot fork."""
    command = [sys.executable, "-c", HIDE, *SMALL, "--steps", 2, "--processes", processes, "--out",
               tmp_path / "o"]
    done = subprocess.run([*map(str, command)], cwd=REPO, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "o")) == 2


# ----------------------------------------------------------------------------------------------
# Errors


def test_three_steps_that_are_not_finite_end_the_run(tmp_path, capsys):
    """NaN weights are trained on and saved over the last good ones. The weights of this model are
    finite, but their logits are not."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    state = load_file(TINY / "model/model.safetensors")
    state["model.norm.weight"] *= 1e38
    save_file(state, tmp_path / "model/model.safetensors")
    flags = [*SMALL, "--groups", 8, "--samples", 8, "--steps", 9, "--save-every", 9]
    assert status_of(bcr.main, *flags, "--model", tmp_path / "model", "--out",
                     tmp_path / "out") == 2
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1 and "steps 1 to 3" in stderr
    assert not checkpoints(tmp_path / "out") and not (tmp_path / "out/model").exists()
    text = (tmp_path / "out/metrics.jsonl").read_text()
    assert [json.loads(line)["skipped"] for line in text.splitlines()] == [True] * 3
    assert "NaN" not in text and "Infinity" not in text  # JSON has neither


def test_a_reward_of_the_users_own(tmp_path, capsys):
    """--reward is read, but not used in training or in evaluation; the warning for held-out
    problems that are trained on is missing."""
    (tmp_path / "mine.py").write_text(
        "def score(completion, golds):\n"
        '    return [0.5 + 0.5 * ("Wait" in completion) for _ in golds]\n')
    (tmp_path / "data.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "HOLD"}\n')
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    assert status_of(bcr.main, *SMALL, "--data", data, "--eval-data", data, "--eval-problems", 1,
                     "--reward", tmp_path / "mine.py", "--out", out) == 0
    assert "1 problems of data are also in --data" in capsys.readouterr().out
    assert metrics_of(out)[0]["reward"] >= 0.5
    assert lines_of(out / "evaluation/data-n1-step0.jsonl")[0]["correct"][0] >= 0.5


GOOD = '{"problem": "What is 1 + 1?", "answer": "2"}\n'
BAD_USE = [  # flags, and a word of the sentence
    ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data empty.jsonl", "no problems"),
    ("--model nowhere", "nowhere"), ("--model .", "tokenizer.json"),
           ("--budget 20", "bare answers"),
    ("--n 2,4,8 --budget 80,160", "--budget"), ("--n 0", "--n"), ("--n 2,,4", "--n"),
    ("--n 2 --data one.jsonl", "only 1"), ("--eval-n 8 --eval-problems 7", "only 7"),
    ("--budget 3000 --eval-budget 3000", "2048 positions"),
           ("--eval-budget 5000", "2048 positions"),
    ("--dtype int8", "--dtype"), ("--device abacus", "--device"), ("--device cuda:99", "--device"),
    ("--resume", "--resume"), ("--resume empty", "no run"), ("--bugdet 5", "--bugdet"),
           ("--budge 5", "--budge"),
    ("--temperature 0", "--temperature"), ("--lr nan", "--lr"), ("--lr -1", "--lr"),
           ("--steps 0", "--steps"),
    ("--seed -1", "--seed"), ("--clip-high inf", "--clip-high"), ("--steps many", "--steps"),
    ("--eval-data one.jsonl,./one.jsonl", "two data files"), ("--reward nowhere.py", "nowhere.py"),
    ("--reward empty.py", "score"), ("--out one.jsonl", "in use"), ("--out one.jsonl/out", "--out")]
BAD_EVALUATION = [
    ("--solve one.jsonl --n 1,2", "--n"), ("--data one.jsonl --n 2", "only 1"),
                  ("--steps 5", "--steps"),
    ("--budget 5000", "2048 positions"), ("--resume empty", "no run"),
                  ("--temperature nan", "--temperature")]
CASES = [(bcr.main, *case) for case in BAD_USE] + [(evaluate.main, *case)
                                                   for case in BAD_EVALUATION]


@pytest.mark.parametrize("main, flags, named", CASES,
                         ids=lambda value: getattr(value, "__module__", value))
def test_an_error_is_one_sentence_with_status_2(tmp_path, monkeypatch, capsys, main, flags, named):
    """A traceback, a mistyped flag that is ignored, or a run that starts in spite of an error and
    fails an hour later. Nothing is created."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty.jsonl", "\n"), ("empty.py", "\n"), ("one.jsonl", GOOD)):
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    assert status_of(main, *flags.split()) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1 and named in stderr and "Traceback" not in stderr
    assert sorted(tmp_path.rglob("*")) == before
