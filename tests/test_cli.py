"""The command line, run as a user runs it: subprocesses, the shipped model, real files."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import bcr as bcr_module  # the name `bcr` is the subprocess
from conftest import REPO, TINY
from model import Transformer

QUICK = ["--steps", "4", "--groups", "3", "--samples", "4", "--eval-problems", "16", "--eval-n", "1,4"]


def bcr(*args, **kwargs):
    return subprocess.run([sys.executable, str(REPO / "bcr.py"), *map(str, args)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300, **kwargs)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run from start to end, in a working directory that is not the repo's."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = bcr("--n", 4, *QUICK, "--save-every", 2, "--out", out, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out, done


def metrics_of(out):
    """metrics.jsonl without its timings."""
    timed = ("sampling_seconds", "training_seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def test_a_run_writes_all_that_it_promises(finished):
    """Results that a program cannot read, or figures that are missing."""
    out, done = finished
    results = json.loads((out / "results.json").read_text())
    for stage in ("before", "after"):
        assert list(results[stage]["heldout"]) == ["1", "4"]
        for n, row in results[stage]["heldout"].items():
            low, high = row["accuracy_ci95"]
            assert 0 <= low <= row["accuracy"] <= high <= 1 and row["problems"] == 16
            assert 10 < row["tokens_per_problem"] < 200 and row["loops_per_problem"] >= 0
            assert 0 <= row["truncated"] <= 1 and len(row["accuracy_by_position"]) == int(n)
    metrics = metrics_of(out)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for m in metrics:
        assert {"reward", "accuracy", "accuracy_by_position", "tokens_per_problem", "truncated", "zero_variance",
                "loops_per_problem", "entropy", "grad_norm", "logprob_gap"} <= m.keys()
        assert m["reward"] == m["accuracy"] > 0 and m["grad_norm"] > 0 and 0 < m["entropy"] < 2
        assert m["logprob_gap_max"] < 1e-4  # the sampler and the trainer compute the same distribution
    for stage in ("before", "after"):
        assert "### Problem 4\n" in (out / f"completions-{stage}.txt").read_text()


def test_the_table_shows_what_results_json_holds(finished):
    """A table of other numbers than the file's, or no table on a pipe."""
    out, done = finished
    results = json.loads((out / "results.json").read_text())
    rows = {tuple(line.split("|")[0].split()): line.split("|") for line in done.stdout.splitlines() if "|" in line}
    for n in ("1", "4"):
        row, (before, after, change) = rows["heldout", n], (results[key]["heldout"][n] for key in ("before", "after", "change"))
        assert row[3].split() == [f"{before['tokens_per_problem']:.1f}", f"{after['tokens_per_problem']:.1f}", f"{change['tokens']:+.1%}"]
        assert row[1].split()[:3] == [f"{100 * before['accuracy']:.1f}", f"{100 * after['accuracy']:.1f}", f"{100 * change['accuracy']:+.1f}"]
        assert change["accuracy"] == pytest.approx(after["accuracy"] - before["accuracy"])
        assert change["tokens"] == pytest.approx(after["tokens_per_problem"] / before["tokens_per_problem"] - 1)
        assert change["accuracy_ci95"][0] <= change["accuracy"] <= change["accuracy_ci95"][1]
    assert done.stderr == ""  # no progress bar where there is no terminal


def test_the_trained_model_loads_in_transformers(finished):
    """A checkpoint that nobody else can serve: other logits, or no tokenizer beside it."""
    transformers = pytest.importorskip("transformers")
    out, _ = finished
    ours, theirs = Transformer.from_pretrained(out / "model"), transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    ids = transformers.AutoTokenizer.from_pretrained(out / "model")("Problem 1: What is 3 + 4?", return_tensors="pt").input_ids
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert ours.model.norm.weight.dtype == torch.float32
    before = Transformer.from_pretrained(TINY / "model")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), ours.parameters()))


def test_resume_is_exact(finished, tmp_path):
    """A resumed run that repeats data, forgets AdamW's state or counts anew: killed -9 in the middle
    and resumed, it must end with the very bytes of the run that was not."""
    out, _ = finished
    ours = tmp_path / "out"
    arguments = [sys.executable, str(REPO / "bcr.py"), "--n", "4", *QUICK, "--save-every", "2", "--out", str(ours)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and metrics_of(ours)[-1]["step"] == 3
    done = bcr("--n", 4, *QUICK, "--save-every", 2, "--out", ours, "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on from step 2" in done.stdout
    assert (ours / "model" / "model.safetensors").read_bytes() == (out / "model" / "model.safetensors").read_bytes()
    assert metrics_of(ours) == metrics_of(out)
    for name in ("before", "after"):
        assert json.loads((ours / "results.json").read_text())[name] == json.loads((out / "results.json").read_text())[name]
    refused = bcr("--n", 2, *QUICK, "--save-every", 2, "--out", ours, "--resume")
    assert refused.returncode == 2 and "--n was 4" in refused.stderr


def test_a_used_out_is_never_touched(finished):
    """A second run that overwrites the first."""
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = bcr("--n", 4, *QUICK, "--out", out)
    assert done.returncode == 2 and "in use" in done.stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_machine_does_not_decide_the_result(finished, tmp_path):
    """Fewer rows at a time and smaller micro-batches must sample the same completions and reach the
    same weights, up to the rounding of sums in another order."""
    out, _ = finished
    done = bcr("--n", 4, *QUICK, "--save-every", 2, "--out", tmp_path / "out", "--rows", 5, "--micro-tokens", 700)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(d / "model" / "model.safetensors") for d in (tmp_path / "out", out))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)  # four steps of 1e-4 were taken
    for a, b in zip(metrics_of(tmp_path / "out"), metrics_of(out)):
        assert a["tokens_per_problem"] == b["tokens_per_problem"] and a["reward"] == b["reward"]


def test_all_cut_still_learns(tmp_path):
    """Truncated completions left out of the loss: under a tight budget, when every completion is
    cut, what they answered before the cut is all there is to learn from."""
    done = bcr("--n", 8, "--budget", 150, "--steps", 1, "--groups", 4, "--eval-problems", 8, "--eval-n", 8, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    m = metrics_of(tmp_path / "out")[0]
    assert m["truncated"] > 0.95 and 0 < m["accuracy"] < 0.8 and m["grad_norm"] > 0


def test_the_length_penalty_lowers_the_reward_by_its_formula(tmp_path):
    """A penalty of another size than --length-penalty * tokens / budget."""
    done = bcr("--n", 2, "--budget", 400, "--steps", 1, "--groups", 2, "--eval-problems", 2, "--eval-n", 1,
               "--length-penalty", 0.5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    m = metrics_of(tmp_path / "out")[0]
    assert m["reward"] == pytest.approx(m["accuracy"] - 0.5 * m["tokens_per_problem"] * 2 / 400)


def test_mixed_n_takes_turns(tmp_path):
    """--n 2,4 that trains on one of them, or on the wrong budget."""
    done = bcr("--n", "2,4", "--budget", "90,170", "--steps", 3, "--groups", 2, "--samples", 2, "--eval-problems", 4,
               "--eval-n", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [(m["n"], m["budget"]) for m in metrics_of(tmp_path / "out")] == [(2, 90), (4, 170), (2, 90)]


def test_steps_0_only_evaluates(tmp_path):
    """An evaluation that trains, or that leaves a model behind."""
    done = bcr("--steps", 0, "--eval-problems", 8, "--eval-n", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["after"] == {}
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_ctrl_c_is_one_line(tmp_path):
    """A traceback for the most usual way to end a run."""
    process = subprocess.Popen([sys.executable, str(REPO / "bcr.py"), "--steps", "50", *QUICK[2:], "--out", str(tmp_path / "out")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "1/50" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr


GOOD = '{"problem": "What is 1 + 1?", "answer": "2"}\n'
BAD_DATA = {
    "not json": ("{problem\n", "line 2"), "list": ("[1]\n", "line 2"), "no answer": ('{"problem": "a"}\n', "line 2"),
    "empty answer": ('{"problem": "a", "answer": " "}\n', "line 2"), "null": ('{"problem": null, "answer": "1"}\n', "line 2"),
    "difficulty": ('{"problem": "a", "answer": "1", "difficulty": "hard"}\n', "line 2"),
    "nan": ('{"problem": "a", "answer": "1", "difficulty": NaN}\n', "line 2"),
    "deep": ("[" * 100000 + "\n", "line 2"), "bool": ('{"problem": "a", "answer": true}\n', "line 2"),
}


@pytest.mark.parametrize("line, named", BAD_DATA.values(), ids=BAD_DATA)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, named):
    """Data that is skipped silently, or a traceback at it."""
    (tmp_path / "data.jsonl").write_text(GOOD + line)
    with pytest.raises(bcr_module.UserError, match=named):
        bcr_module.load_problems(tmp_path / "data.jsonl")

BAD_USE = {
    "missing data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "data is a directory": (["--data", "."], "cannot read"),
    "empty data": (["--data", "empty.jsonl"], "no problems"),
    "binary data": (["--data", "binary.jsonl"], "UTF-8"),
    "no model": (["--model", "nowhere"], "nowhere"),
    "not a model": (["--model", "."], "tokenizer.json"),
    "budget too small": (["--budget", "20"], "bare answers"),
    "budget no number": (["--budget", "many"], "--budget"),
    "budget for each of two": (["--n", "2,4,8", "--budget", "80,160"], "--budget"),
    "n 0": (["--n", "0"], "--n"),
    "n above the data": (["--n", "2", "--data", "one.jsonl"], "only 1"),
    "eval-n above the data": (["--eval-n", "8", "--eval-problems", "7"], "only 7"),
    "one sample": (["--samples", "1"], "--samples"),
    "temperature 0": (["--temperature", "0"], "--temperature"),
    "nan": (["--lr", "nan"], "--lr"),
    "budget beyond the positions": (["--eval-budget", "5000"], "2048 positions"),
    "device": (["--device", "abacus"], "--device"),
    "dtype": (["--dtype", "int8"], "--dtype"),
    "resume without out": (["--resume"], "--out"),
    "resume nothing": (["--resume", "--out", "empty"], "no run"),
    "no such model on the Hub": (["--model", "nobody/nothing"], "nobody/nothing"),
    "two files of one name": (["--eval-data", "one.jsonl,./one.jsonl"], "one"),
    "eval budgets": (["--eval-n", "1,2,4", "--eval-budget", "10,20"], "--eval-budget"),
    "eval temperature": (["--eval-temperature", "hot"], "--eval-temperature"),
    "no reward file": (["--reward", "nowhere.py"], "nowhere.py"),
    "a reward file without score": (["--reward", "empty.py"], "score"),
    "a broken reward file": (["--reward", "one.jsonl"], "one.jsonl"),
    "solve with two N": (["--solve", "one.jsonl", "--n", "1,2"], "--n"),
    "solve nothing": (["--solve", "empty.jsonl"], "no problems"),

    "out is a file": (["--out", "one.jsonl"], "in use"),
    "out below a file": (["--out", "one.jsonl/out"], "--out"),
}


@pytest.mark.parametrize("name", BAD_USE)
def test_a_users_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, name):
    """Tracebacks, or a run that starts in spite of a mistake and fails an hour later."""
    arguments, named = BAD_USE[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "one.jsonl").write_text(GOOD)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as exit:
        bcr_module.main(arguments)
    stderr = capsys.readouterr().err
    assert exit.value.code == 2
    assert len(stderr.strip().splitlines()) == 1 and named in stderr
    assert not (tmp_path / "out").exists()


def test_mistakes_end_the_process_with_status_2():
    """A mistyped flag that is ignored; an exit status that a script takes for success."""
    for flag in ("--bugdet", "--budget"):
        done = bcr(flag, 1)
        assert done.returncode == 2 and flag in done.stderr and "Traceback" not in done.stderr
