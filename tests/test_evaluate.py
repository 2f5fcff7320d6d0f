"""Evaluation and solving: every problem counts once, intervals hold what they promise, rewards of
the user's own, and the command evaluate.py."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import bcr
import evaluate
from conftest import REPO, TINY, lines_of, status_of
from data.chat import encode_chat
from data.files import UserError, write_lines
from data.problems import evaluation_groups, load_problems
from data.reports import budget_report, dial
from evaluate import EvaluationSettings, mean_and_interval, paired_change
from reward import score


def heldout(count):
    return load_problems(TINY / "heldout.jsonl")[:count]


@pytest.mark.parametrize("prompts, samples, n", [(30, 8, 1), (20, 4, 3)])
def test_the_interval_covers_the_truth_19_times_in_20(prompts, samples, n):
    """k samples of one problem count as k problems: then the interval of avg@8 on AIME holds the
    truth in half of the cases. The problems differ in difficulty, as real ones do."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        p = rng.beta(0.8, 0.8, (prompts, 1, n))  # the true mean is 0.5
        correct = (rng.random((prompts, samples, n)) < p).astype(float)
        _, (low, high) = mean_and_interval(correct.mean(axis=(1, 2)))
        inside += low <= 0.5 <= high
    assert 930 <= inside <= 985


def test_equal_marks_do_not_prove_certainty():
    """An interval is empty where all answers are right, or reaches beyond what is possible."""
    mean, (low, high) = mean_and_interval(np.ones(100))
    assert mean == high == 1 and 0.95 < low < 0.99
    mean, (low, high) = mean_and_interval(np.zeros(20), lowest=-1.0)
    assert mean == 0 and low == -high and 0.05 < high < 0.2


def test_the_change_is_between_the_same_prompts():
    """The interval of the change does not use that both models answered the same problems, or an
    answer that only fills up a prompt (None) counts."""
    easy = np.random.default_rng(0).random(200) < 0.5
    easier = easy | (np.arange(200) < 10)
    before, after = (
        [{"prompt": p, "correct": [float(right[p]), None], "tokens": tokens} for p in range(200)]
        for right, tokens in ((easy, 100), (easier, 50)))
    moved = paired_change(before, after)
    assert moved["accuracy"] == pytest.approx(easier.mean() - easy.mean())
    low, high = moved["accuracy_ci95"]
    assert low < moved["accuracy"] < high and high - low < 0.08  # unpaired: 0.2
    assert moved["tokens"] == pytest.approx(-0.5)


def measured(shipped, problems, n, budget=1024, **changes):
    """(results, records) of the shipped model."""
    s = EvaluationSettings(**changes)
    records = evaluate.evaluate(*shipped, problems, n, budget, score, s)
    return evaluate.summarize(records, n, s), records


def test_accuracy_within_a_budget_is_what_sampling_with_it_gives(shipped):
    """The column `in B tokens` is read off longer completions, but is not the accuracy of a run
    with that budget."""
    free, cut = (measured(shipped, heldout(48), 4, budget, within=150)[0] for budget in (600, 150))
    assert free["accuracy_within"] == cut["accuracy"] < free["accuracy"]
    assert free["tokens_per_problem"] > cut["tokens_per_problem"] and cut["truncated"] > 0.5


def test_k_samples_of_each_prompt_are_counted(shipped):
    """avg@k is not over k samples of each prompt, a problem that only fills up a prompt counts, or
    an answer counts under another problem's number (the golds of each prompt are turned by one in
    the second part)."""
    found, records = measured(shipped, heldout(10), 3, samples=4)
    assert [(r["prompt"], r["sample"]) for r in records] == list(np.ndindex(4, 4))
    assert len({r["completion"] for r in records if r["prompt"] == 0}) > 1
    marks = [mark for r in records for mark in r["correct"] if mark is not None]
    assert len(marks) == 10 * 4 and np.mean(marks) > 0.8
    assert found["accuracy"] == pytest.approx(np.mean(marks))
    assert found["problems"] == 10 and len(found["accuracy_by_position"]) == 3
    problems = heldout(10)
    for group in evaluation_groups(problems, 3, 0)[0][:3]:
        for i, j in zip(group, np.roll(group, -1)):
            problems[i]["answer"] = heldout(10)[j]["answer"]
    assert measured(shipped, problems, 3, samples=4)[0]["accuracy"] < 0.3


@pytest.mark.parametrize("budget, reason", [
    (300, 'The first answer is "(.*)", its gold is "#### 7"'),
    (3, "the format is not followed, or the budget is too small")])
def test_an_accuracy_near_0_has_a_reason(capsys, tmp_path, budget, reason):
    """A table says 0.0% right and nothing else, where golds are written in another way or the model
    does not follow the format."""
    write_lines(tmp_path / "golds.jsonl", [p | {"answer": "#### 7"} for p in heldout(3)])
    assert status_of(evaluate.main, "--data", tmp_path / "golds.jsonl", "--n", 1, "--budget",
                     budget, "--out", tmp_path / "out") == 0
    assert re.search(f"warning: .*{reason}", capsys.readouterr().out)


def test_the_dial_names_the_fastest_n_that_is_good_enough():
    """--target-accuracy names an N that is slower or not good enough, or none without a word. Where
    one speed is not known, tokens decide."""
    by_n = {}
    for n, accuracy, tokens, speed in ((1, 0.97, 40, 9), (2, 0.95, 36, 14), (4, 0.93, 38, 20)):
        by_n[str(n)] = {"accuracy": accuracy, "accuracy_ci95": [0.9, 1.0],
                        "tokens_per_problem": tokens, "problems_per_second": speed}
    assert "second (20.0): N = 4," in dial("a", by_n, 0.92)
    assert "second (14.0): N = 2," in dial("a", by_n, 0.94)
    assert dial("a", by_n, 0.99) == "a: no N of 1, 2, 4 reaches 99.0%"
    by_n["1"]["problems_per_second"] = None
    assert "the fewest tokens: N = 2," in dial("a", by_n, 0.92)


def test_the_budget_is_compared_with_what_the_model_uses():
    """A budget that nothing finishes in, or that presses on nothing, is not noticed before the run
    is over; or another N's tokens are compared with it."""
    results = {name: {"1": {"tokens_per_problem": 100}, "4": {"tokens_per_problem": tokens}}
               for name, tokens in (("a", 70), ("b", 90))}
    s = SimpleNamespace(n=(4, 5, 1), budget=(192, 90, 101), eval_n=(1, 4))
    lines = budget_report(s, results).splitlines()
    assert lines[0] == ("at N = 4 this model uses 80 tokens per problem without a limit; the "
                        "budget at N = 4 allows 48 (60%)")
    assert lines[1].startswith("at N = 4") and lines[1].endswith("at N = 5 allows 18 (22%)")
    assert lines[2].startswith("warning: hardly anything") and lines[3].endswith("101 (101%)")
    assert lines[4].startswith("warning: such a budget puts no pressure") and len(lines) == 5


@pytest.mark.parametrize("value", ["[1]", "[2.0, 0]", "None", "[float('nan'), 0]"])
def test_a_reward_that_is_not_one_is_a_sentence(tmp_path, value):
    """Rewards are silently wrong, or of the wrong problems."""
    (tmp_path / "mine.py").write_text(f"def score(completion, golds):\n    return {value}\n")
    _, user_score = evaluate.load_reward(str(tmp_path / "mine.py"))
    with pytest.raises(UserError, match="mine.py should return 2 numbers"):
        user_score("### Problem 1", ["1", "2"])


def test_the_readmes_examples_of_rewards_and_data_work(tmp_path):
    """The documented example of --reward does not run as it stands, or that of a data line is
    refused."""
    text = (REPO / "README.md").read_text() + (REPO / "data/README.md").read_text()
    (reward,) = re.findall("```python\n([^`]*def score[^`]*)```", text)
    (tmp_path / "my_reward.py").write_text(reward)
    _, user_score = evaluate.load_reward(str(tmp_path / "my_reward.py"))
    assert user_score("### Problem 1\nAnswer 1: \\boxed{100}", ["100", "5"]).shape == (2,)
    lines = re.findall(r'^(?:.*`)?(\{"problem": [^`\n]*\})', text, re.MULTILINE)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    assert len(load_problems(tmp_path / "data.jsonl")) == len(lines)


def test_the_command_reports_each_file_and_n(tmp_path, capsys):
    """A budget is used for the first N alone, files are mixed up, --temperature is ignored, or the
    table has other numbers than results.json. A resumed evaluation samples a finished (file, N)
    again, or comes to other results."""
    write_lines(tmp_path / "a.jsonl", heldout(4))
    write_lines(tmp_path / "b.jsonl", heldout(9)[4:])
    out = tmp_path / "out"
    assert status_of(
        evaluate.main, "--data", f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}", "--n", "1,2",
        "--budget", "20,300", "--samples", 2, "--within", 15, "--target-accuracy", 0.5,
        "--temperature", 0, "--out", out) == 0
    stdout = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())["results"]
    for name, n in (("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")):
        records = lines_of(out / f"evaluation/{name}-n{n}-step0.jsonl")
        assert len({r["completion"] for r in records}) == len(records) / 2  # samples are equal
        marks = [mark for r in records for mark in r["correct"] if mark is not None]
        tokens = np.mean([r["tokens"] for r in records]) / int(n)
        assert (tokens <= 20) == (n == "1")
        found = results[name][n]
        assert found["accuracy"] == pytest.approx(np.mean(marks))
        assert found["tokens_per_problem"] == pytest.approx(tokens)
        row = " ".join(re.search(rf" {name} \| {n} \|.*", stdout)[0].split())
        assert row.startswith(
            f"{name} | {n} | {100 * np.mean(marks):.1f} | {100 * found['accuracy_within']:.1f} | "
            f"{tokens:.1f} | {found['waits_per_problem']:.2f} |")
    assert stdout.count("at least 50.0% right with the most problems per second") == 2

    finished = out / "evaluation/a-n2-step0.jsonl"
    write_lines(finished, [r | {"waits": 1000} for r in lines_of(finished)])
    (out / "evaluation/b-n2-step0.jsonl").unlink()
    assert status_of(evaluate.main, "--resume", out, "--rows", 2) == 0
    again = json.loads((out / "results.json").read_text())["results"]
    assert again["a"]["2"]["waits_per_problem"] == 500  # not sampled again
    assert again["b"]["2"]["tokens_per_problem"] == results["b"]["2"]["tokens_per_problem"]
    assert status_of(bcr.main, "--resume", out) == 2
    assert "another program" in capsys.readouterr().err


def test_solve_answers_in_input_order_and_asks_again(tmp_path):
    """Answers belong to other problems, lose their order or are not asked again; a problem without
    a known answer is refused; a resumed run comes to other answers."""
    out = tmp_path / "out"
    problems = heldout(21)
    for problem in problems[::2]:
        del problem["answer"]
    write_lines(tmp_path / "problems.jsonl", problems)
    assert status_of(evaluate.main, "--solve", tmp_path / "problems.jsonl", "--n", 4, "--budget",
                     220, "--rows", 5, "--out", out) == 0
    entries = lines_of(out / "answers.jsonl")
    summary = json.loads((out / "results.json").read_text())
    assert [e["id"] for e in entries] == [p["id"] for p in problems]
    assert [i for i, e in enumerate(entries) if "correct" in e] == [*range(1, 21, 2)]
    assert summary["accuracy"] == np.mean([e["correct"] for e in entries[1::2]]) > 0.7
    again = [e for e in entries if e["rounds"] > 1]
    assert 0 < len(again) == summary["asked_again"] < 21 and all(e["n"] <= 2 for e in again)
    for e in entries:
        answered = e["answer"] is not None and f"\\boxed{{{e['answer']}}}" in e["completion"]
        assert answered or e["answer"] is None and e["n"] == 1
    assert summary["unanswered"] == sum(e["answer"] is None for e in entries)
    assert summary["tokens_per_problem"] == pytest.approx(np.mean([e["tokens"] for e in entries]))
    before = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").unlink()
    assert status_of(evaluate.main, "--resume", out) == 0
    assert (out / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("data", ["--data", "--solve"])
def test_a_problem_that_does_not_fit_is_named_first(tmp_path, capsys, data):
    """A run ends in the middle at one long line, and cannot be resumed."""
    problems = heldout(8)
    problems[2]["problem"] = "What is " + "1 + " * 2500 + "1?"
    write_lines(tmp_path / "long.jsonl", problems)
    flags = [data, tmp_path / "long.jsonl", "--n", 2, "--budget", 60, "--out", tmp_path / "out"]
    assert status_of(evaluate.main, *flags) == 2
    assert "long.jsonl, line 3" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert status_of(evaluate.main, *flags, "--skip-long") == 0
    assert "1 of 8 problems are too long" in capsys.readouterr().out


def test_a_tokenizer_of_another_model_is_refused(tmp_path, capsys):
    """Completions that can never end are sampled to the budget."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [0, 900]}')
    assert status_of(evaluate.main, "--model", tmp_path / "model", "--out", tmp_path / "out") == 2
    assert "do not belong together" in capsys.readouterr().err


def test_a_run_keeps_the_date_that_it_began_with(tmp_path):
    """A template that writes today's date gives a run that is resumed tomorrow other prompts."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }}")
    s = EvaluationSettings(model=str(tmp_path / "model"))
    chat = evaluate.load_model(dataclasses.replace(s, date="2024-07-26"))[1]
    text = chat.tokenizer.decode(encode_chat(chat, "17"))
    assert "26" in text and "2024" in text
