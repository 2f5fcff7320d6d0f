"""The command line: what a run of bcr.py writes, what it must not depend on, and errors a user can fix."""

import dataclasses
import json
import re
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import bcr
import evaluate
from conftest import QUICK, TINY, lines_of, metrics_of, outcome, start, status_of
from distributed import checkpoints
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
            assert 10 < row["tokens_per_problem"] < 200 and row["loops_per_problem"] >= 0
            assert 0 <= row["truncated"] <= 1 and len(row["accuracy_by_position"]) == int(n)
        assert "### Problem 4\n" in (out / f"completions-{stage}.txt").read_text()
    metrics = metrics_of(out)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    for m in metrics:
        assert {"truncated", "zero_variance", "loops_per_problem", "logprob_gap"} <= m.keys()
        assert m["reward"] == m["accuracy"] > 0 and m["grad_norm"] > 0 and 0 < m["entropy"] < 2
        assert m["tokens_per_problem"] == pytest.approx(30, abs=5) and len(m["accuracy_by_position"]) == 4
        assert m["logprob_gap_max"] < 1e-4  # the sampler and the trainer compute the same distribution
    shown = re.findall(r"^==== step (\d+): one group of 4 samples, N = 4$", (out / "samples.txt").read_text(),
                       re.MULTILINE)
    assert shown == ["1", "2", "4", "5"]  # the first, each --save-every, the last
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000004", "checkpoint-000005"]


def test_the_table_shows_what_results_json_holds(finished):
    """The table has other numbers than the file, or is not printed on a pipe."""
    out, stdout = finished
    results = json.loads((out / "results.json").read_text())
    cells = [[cell.strip() for cell in line.split("|")] for line in stdout.splitlines() if "|" in line]
    rows = {(row[0], row[1]): row[2:] for row in cells}
    for n in ("1", "4"):
        before, after, change = (results[key]["heldout"][n] for key in ("before", "after", "change"))
        accuracy, _, tokens, _ = rows["heldout", n]
        assert tokens.split() == [f"{before['tokens_per_problem']:.1f}", f"{after['tokens_per_problem']:.1f}",
                                  f"{change['tokens']:+.1%}"]
        assert accuracy.split()[:3] == [f"{100 * before['accuracy']:.1f}", f"{100 * after['accuracy']:.1f}",
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
    """A second run overwrites the first, or resumes it with other settings."""
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert status_of(bcr.main, *QUICK, "--out", out) == 2 and "in use" in capsys.readouterr().err
    assert status_of(bcr.main, *QUICK, "--n", 2, "--out", out, "--resume") == 2
    assert "--n was [4] and is now [2]" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_machine_does_not_decide_the_result(finished, tmp_path):
    """Fewer rows at a time, smaller micro-batches or checkpointing sample other completions or reach other
    weights, up to the rounding of sums in another order."""
    out, _ = finished
    assert status_of(bcr.main, *QUICK, "--rows", 5, "--micro-tokens", 700, "--checkpointing",
                     "--out", tmp_path / "out") == 0
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (tmp_path / "out", out))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)  # after five steps of 1e-4
    for a, b in zip(metrics_of(tmp_path / "out"), metrics_of(out), strict=True):
        assert a["tokens_per_problem"] == b["tokens_per_problem"] and a["reward"] == b["reward"]


# ----------------------------------------------------------------------------------------------
# Interruptions that need no other process


def test_a_full_disk_is_one_sentence_and_damages_nothing(finished, tmp_path, capsys):
    """A checkpoint is half written and taken for a complete one, or there is a traceback. The resumed run
    ends with the bytes of the run that was not interrupted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, limits[1]))  # a checkpoint has 6 MB
    try:
        assert status_of(bcr.main, *QUICK, "--out", tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1 and "File too large" in stderr and "--resume" in stderr
    assert not checkpoints(tmp_path / "out")
    assert status_of(bcr.main, *QUICK, "--out", tmp_path / "out", "--resume") == 0
    assert outcome(tmp_path / "out") == outcome(finished[0])


def test_an_out_that_vanishes_is_one_sentence(tmp_path, capsys, monkeypatch):
    """The output directory is removed during the run, and there is a traceback."""
    monkeypatch.setattr(
        evaluate, "append_group", lambda path, *more: path.parent.rename(tmp_path / "elsewhere"))
    assert status_of(bcr.main, *SMALL, "--out", tmp_path / "out") == 2
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1 and "No such file" in stderr


def test_running_out_of_memory_names_the_flags(tmp_path, capsys, monkeypatch):
    """A traceback from the depth of the gradient, without a hint of what to lower."""
    monkeypatch.setattr(bcr, "policy_loss", lambda *arguments: torch.empty(2**50))
    assert status_of(bcr.main, *SMALL, "--samples", 8, "--out", tmp_path / "out") == 2
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1
    assert all(flag in stderr for flag in ("--rows", "--micro-tokens", "--checkpointing"))


@pytest.mark.parametrize("cause", ["gradient", "weights"])
def test_three_steps_that_are_not_finite_end_the_run(tmp_path, capsys, monkeypatch, cause):
    """NaN weights are trained on and saved over the last good ones."""
    change = []
    if cause == "gradient":
        monkeypatch.setattr(bcr.distributed, "clip_gradient", lambda weights, max_norm: float("nan"))
    else:  # the weights are finite, but their logits are not
        shutil.copytree(TINY / "model", tmp_path / "model")
        state = load_file(TINY / "model/model.safetensors")
        state["model.norm.weight"] *= 1e38
        save_file(state, tmp_path / "model/model.safetensors")
        change = ["--model", tmp_path / "model"]
    flags = [*SMALL, "--groups", 8, "--samples", 8, "--steps", 9, "--save-every", 9, *change]
    assert status_of(bcr.main, *flags, "--out", tmp_path / "out") == 2
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1 and "steps 1 to 3" in stderr and "not finite" in stderr
    assert not checkpoints(tmp_path / "out") and not (tmp_path / "out/model").exists()
    text = (tmp_path / "out/metrics.jsonl").read_text()
    assert [json.loads(line)["skipped"] for line in text.splitlines()] == [True] * 3
    assert "NaN" not in text and "Infinity" not in text  # JSON has neither


def test_a_reward_of_the_users_own(tmp_path, capsys):
    """--reward is read, but not used in training or in evaluation; the warning for held-out problems that
    are trained on is missing."""
    (tmp_path / "mine.py").write_text(
        'def score(completion, golds):\n    return [0.5 + 0.5 * ("Wait" in completion) for _ in golds]\n')
    (tmp_path / "data.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": "HOLD"}\n')
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    assert status_of(bcr.main, *SMALL, "--data", data, "--eval-data", data, "--eval-problems", 1,
                     "--reward", tmp_path / "mine.py", "--out", out) == 0
    assert "1 problems of data are also in --data" in capsys.readouterr().out
    assert metrics_of(out)[0]["reward"] >= 0.5
    assert lines_of(out / "evaluation/data-n1-step0.jsonl")[0]["correct"][0] >= 0.5


# ----------------------------------------------------------------------------------------------
# Errors that a user can fix

GOOD = '{"problem": "What is 1 + 1?", "answer": "2"}\n'
BAD_USE = [  # of bcr.py: flags, and a word of the sentence
    ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data .", "cannot read"),
    ("--data empty.jsonl", "no problems"), ("--data binary.jsonl", "UTF-8"), ("--model nowhere", "nowhere"),
    ("--model .", "tokenizer.json"), ("--budget 20", "bare answers"), ("--budget many", "--budget"),
    ("--n 2,4,8 --budget 80,160", "--budget"), ("--n 0", "--n"), ("--n 2,,4", "--n"), ("--n -1", "--n"),
    ("--n 1.5", "--n"), ("--n 2 --data one.jsonl", "only 1"), ("--eval-n 8 --eval-problems 7", "only 7"),
    ("--temperature 0", "--temperature"), ("--budget 3000 --eval-budget 3000", "2048 positions"),
    ("--dtype int8", "--dtype"),
    ("--eval-budget 5000", "2048 positions"), ("--device abacus", "--device"), ("--resume", "--out"),
    ("--resume --out empty", "no run"), ("--bugdet 5", "--bugdet"), ("--budge 150", "--budge"),
    ("--steps", "--steps"), ("--eval-data one.jsonl,./one.jsonl", "two data files"),
    ("--eval-n 1,2,4 --eval-budget 10,20", "--eval-budget"), ("--eval-temperature hot", "--eval-temperature"),
    ("--reward nowhere.py", "nowhere.py"), ("--reward empty.py", "score"), ("--reward one.jsonl", "one.js"),
    ("--out one.jsonl", "in use"), ("--out one.jsonl/out", "--out"), ("--solve one.jsonl", "--solve")]
BAD_EVALUATION = [
    ("--solve one.jsonl --n 1,2", "--n"), ("--solve one.jsonl --budget 10,20", "--budget"),
    ("--solve empty.jsonl --n 1", "no problems"), ("--n 1,2,4 --budget 10,20", "--budget"),
    ("--data one.jsonl --n 2", "only 1"), ("--budget 5000", "2048 positions"), ("--steps 5", "--steps"),
    ("--resume --out empty", "no run"), ("--target-accuracy 92", "at most 1"), ("--out one.jsonl", "in use")]


def out_of_range(settings_class):
    """(flags, a word of the sentence) for each limit of each field."""
    for field in dataclasses.fields(settings_class):
        least, most = field.metadata["least"], field.metadata["most"]
        flag = "--" + field.name.replace("_", "-")
        if least is not None:
            yield f"{flag} {field.type(least) - 1}", f"{flag} should be at least {least}"
        if most is not None:
            yield f"{flag} {field.type(most) + 1}", f"at most {most}"
        if field.type is float and least is not None:
            yield f"{flag} nan", flag


CASES = [(bcr.main, *case) for case in (*BAD_USE, *out_of_range(bcr.Settings))]
CASES += [(evaluate.main, *case) for case in (*BAD_EVALUATION, *out_of_range(evaluate.EvaluationSettings))]


@pytest.mark.parametrize("main, flags, named", CASES, ids=lambda value: getattr(value, "__module__", value))
def test_an_error_is_one_sentence_with_status_2(tmp_path, monkeypatch, capsys, main, flags, named):
    """A traceback, a mistyped flag that is ignored, or a run that starts in spite of an error and fails an
    hour later. Nothing is created."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of --reward
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "one.jsonl").write_text(GOOD)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.rglob("*"))
    assert status_of(main, *flags.split()) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.strip().splitlines()) == 1 and named in stderr and "Traceback" not in stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name, content", [
    ("config.json", "{"), ("tokenizer.json", "{"), ("tokenizer_config.json", "[]"), ("model.safetensors", ""),
    ("chat_template.jinja", "{% if %}"), ("chat_template.jinja", "{{ 1 / 0 }}"),
    ("fewer rows than tokens", "")])
def test_a_damaged_model_is_one_sentence(tmp_path, capsys, name, content):
    """A damaged download ends in a traceback, creates --out or is changed. (test_model.py and test_chat.py
    have the many ways of damage.)"""
    path = tmp_path / "model"
    shutil.copytree(TINY / "model", path)
    if name == "fewer rows than tokens":
        config, state = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
        config["vocab_size"] -= 1
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].clone()
        save_file(state, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
    else:
        (path / name).write_text(content)
    before = {file: file.read_bytes() for file in path.iterdir()}
    assert status_of(bcr.main, *SMALL, "--model", path, "--out", tmp_path / "out") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert before == {file: file.read_bytes() for file in path.iterdir()}


def test_every_number_has_a_range():
    """A new setting accepts nan."""
    for settings in (bcr.Settings, evaluate.EvaluationSettings):
        for field in dataclasses.fields(settings):
            assert field.type not in (int, float) or field.metadata["least"] is not None, field.name


def test_a_run_resumes_only_with_the_files_it_began_with(tmp_path, capsys):
    """Answers to other problems, a table of two rewards, or the weights of another model are mixed in
    silently; or a changed model is reported as a damaged checkpoint."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    shutil.copy(TINY / "heldout.jsonl", tmp_path / "data.jsonl")
    (tmp_path / "mine.py").write_text("from reward import score\n")
    arguments = [*SMALL, "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl",
                 "--reward", tmp_path / "mine.py", "--out", tmp_path / "out"]
    assert status_of(bcr.main, *arguments) == 0
    for name in ("data.jsonl", "mine.py", "model/config.json", "model/model.safetensors"):
        path = tmp_path / name
        content = path.read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1]) if name.endswith("safetensors") else content + b"\n"
        path.write_bytes(changed)
        assert status_of(bcr.main, *arguments, "--resume") == 2
        assert f"{path} has changed" in capsys.readouterr().err
        path.write_bytes(content)
    assert status_of(bcr.main, *arguments, "--resume") == 0


def test_metrics_that_do_not_match_the_checkpoint_are_repaired_or_refused(finished, tmp_path, capsys):
    """Steps vanish from metrics.jsonl, or half a line ends a resumed run with a traceback."""
    shutil.copytree(finished[0], tmp_path / "out")
    path, arguments = tmp_path / "out/metrics.jsonl", [*QUICK, "--out", tmp_path / "out", "--resume"]
    content = path.read_text()
    path.write_text(content + '{"step": 6, "n"')
    assert status_of(bcr.main, *arguments) == 0 and path.read_text() == content
    for damaged in (content.split("\n", 1)[1], content[: len(content) // 2], "[]\n" + content):
        path.write_text(damaged)
        assert status_of(bcr.main, *arguments) == 2
        assert "metrics.jsonl does not have one line" in capsys.readouterr().err


def test_one_run_at_a_time_in_a_directory(tmp_path):
    """Two processes that resume the same run write every line twice. A lock that outlives its process would
    block the resume after a crash."""
    arguments = [*SMALL, "--steps", 500, "--save-every", 1, "--out", tmp_path / "out"]
    first = start("bcr.py", *arguments)
    while "step   2/" not in first.stdout.readline():
        assert first.poll() is None
    second = start("bcr.py", *arguments, "--resume")
    assert "another process" in second.communicate(timeout=60)[1] and second.returncode == 2
    first.kill()
    first.communicate()
    third = start("bcr.py", *arguments, "--resume", "--steps", 1)
    assert third.communicate(timeout=60)[1] == "" and third.returncode == 0


@pytest.mark.parametrize("program", ["bcr.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_is_not_a_traceback(program):
    """A page of torch's import stack for a user who stops a run at once."""
    process = start(program)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode != 0
