"""Evaluation and solving: every problem counts once, intervals hold what they promise, rewards of the user's
own, and the command evaluate.py."""

import json
import re
import shutil

import numpy as np
import pytest

import bcr
import evaluate
from conftest import REPO, TINY, lines_of, status_of
from data.files import UserError, write_lines
from data.problems import evaluation_groups, load_problems
from evaluate import EvaluationSettings, interval95, paired_change, student95
from reward import score


def heldout(count):
    return load_problems(TINY / "heldout.jsonl")[:count]


# ----------------------------------------------------------------------------------------------
# Intervals


def test_students_quantiles():
    """Intervals from few prompts are as narrow as those from many. Source: any table."""
    for freedom, quantile in ((4, 2.776), (9, 2.262), (29, 2.045), (1999, 1.961)):
        assert student95(freedom) == pytest.approx(quantile, rel=3e-3)


@pytest.mark.parametrize("prompts, samples, n", [(30, 1, 1), (30, 8, 1), (10, 4, 3), (300, 2, 1)])
def test_the_interval_covers_the_truth_19_times_in_20(prompts, samples, n):
    """k samples of one problem count as k problems: then the interval of avg@8 on AIME holds the truth in
    half of the cases. The problems differ in difficulty, as real ones do."""
    rng, inside, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        p = rng.beta(0.8, 0.8, (prompts, 1, n))  # the true mean is 0.5
        correct = (rng.random((prompts, samples, n)) < p).astype(float)
        low, high = interval95(correct)
        inside += low <= 0.5 <= high
        naive += abs(correct.mean() - 0.5) < 1.96 * 0.5 / np.sqrt(correct.size)
    assert 920 <= inside <= 985
    if samples == 8:
        assert naive < 750


def test_intervals_respect_that_problems_share_a_prompt():
    """Intervals are too narrow for N > 1, or empty where all answers are right."""
    single = (np.random.default_rng(0).random((400, 1, 1)) < 0.8).astype(float)  # (P, k, N)
    low, high = interval95(single)
    assert low < single.mean() < high and 0.06 < high - low < 0.10  # 2 * 1.96 * sqrt(.8 * .2 / 400)
    low4, high4 = interval95(np.repeat(single[:100], 4, axis=2))  # four equal answers: 100 trials, not 400
    assert (high4 - low4) > 1.8 * (high - low)
    low, high = interval95(np.ones((100, 1, 4)))
    assert high == 1 and 0.98 < low < 1


def test_the_change_is_between_the_same_prompts():
    """The interval of the change does not use that both models answered the same problems, or an answer that
    only fills up a prompt (None) counts."""
    easy = np.random.default_rng(0).random(200) < 0.5
    before = [{"prompt": p, "sample": 0, "correct": [float(easy[p]), None], "tokens": 100 + p}
              for p in range(200)]
    after = [r | {"correct": [float(easy[p] or p < 10), None], "tokens": (100 + p) / 2}
             for p, r in enumerate(before)]
    moved = paired_change(before, after)
    assert moved["accuracy"] == pytest.approx(np.mean(easy | (np.arange(200) < 10)) - easy.mean())
    low, high = moved["accuracy_ci95"]
    assert low < moved["accuracy"] < high and high - low < 0.08  # unpaired: 0.2
    assert moved["tokens"] == pytest.approx(-0.5) and moved["tokens_ci95"] == pytest.approx([-0.5, -0.5])
    low, high = paired_change(before[:20], before[:20])["accuracy_ci95"]
    assert low < -0.05 and high > 0.05  # twenty equal answers do not prove that nothing changed
    assert paired_change(before[:1], after[:1])["tokens_ci95"] is None


# ----------------------------------------------------------------------------------------------
# Accuracy and tokens at one N


def measured(shipped, path, problems, n, budget=1024, **changes):
    """(figures, records) of the shipped model."""
    s = EvaluationSettings(**changes)
    records = evaluate.evaluate(*shipped, problems, n, budget, score, s, path, "")
    return evaluate.summarize(records, n, s), records


def test_accuracy_within_a_budget_is_what_sampling_with_it_gives(shipped, tmp_path):
    """The column `in B tokens` is read off longer completions, but is not the accuracy of a run with that
    budget."""
    free, cut = (measured(shipped, tmp_path / f"{budget}.jsonl", heldout(48), 4, budget, within=150)[0]
                 for budget in (600, 150))
    assert free["accuracy_in_budget"] == cut["accuracy"] < free["accuracy"]
    assert free["tokens_per_problem"] > cut["tokens_per_problem"] and cut["truncated"] > 0.5


def test_k_samples_of_each_prompt_are_counted(shipped, tmp_path):
    """avg@k is not over k samples of each prompt, or an answer counts under another problem's number. The
    golds of each prompt are turned by one in the second part."""
    right, records = measured(shipped, tmp_path / "a.jsonl", heldout(10), 3, samples=4)
    assert [(r["prompt"], r["sample"]) for r in records] == [(p, g) for p in range(4) for g in range(4)]
    assert len({r["completion"] for r in records if r["prompt"] == 0}) > 1
    assert right["problems"] == 10 and right["samples"] == 4 and len(right["accuracy_by_position"]) == 3
    marks = [mark for r in records for mark in r["correct"] if mark is not None]
    assert len(marks) == 10 * 4 and right["accuracy"] == np.mean(marks) > 0.8
    assert right["loops_per_problem"] == np.mean([r["waits"] for r in records]) / 3
    problems = heldout(10)
    for group in evaluation_groups(problems, 3, 0)[0][:3]:
        for i, j in zip(group, np.roll(group, -1)):
            problems[i]["answer"] = heldout(10)[j]["answer"]
    assert measured(shipped, tmp_path / "b.jsonl", problems, 3, samples=4)[0]["accuracy"] < 0.3


def test_waits_are_counted_as_words():
    """`waiter` is counted, or `Wait,` is not."""
    assert evaluate.count_waits("Wait, check. wait! The waiter awaits. WAIT") == 3


# ----------------------------------------------------------------------------------------------
# Reports


def test_the_dial_names_the_cheapest_n_that_is_good_enough():
    """--target-accuracy names an N that costs more or is not good enough, or none without a word."""
    def of(accuracy, tokens):
        return {"accuracy": accuracy, "tokens_per_problem": tokens,
                "accuracy_ci95": [accuracy - 0.02, accuracy + 0.02]}

    results = {"a": {"1": of(0.97, 40), "2": of(0.95, 36), "4": of(0.93, 38), "8": of(0.8, 30)}}
    sentence = {target: next(evaluate.dial(results, target)) for target in (0.5, 0.92, 0.96, 0.99)}
    assert "N = 2," in sentence[0.92] and "36.0 tokens" in sentence[0.92] and "below" not in sentence[0.92]
    assert "N = 8," in sentence[0.5]
    assert "N = 1," in sentence[0.96] and "reaches below the target" in sentence[0.96]
    assert "no N of 1, 2, 4, 8 reaches 99.0%" in sentence[0.99]


@pytest.mark.parametrize("ns", [[3], [1, 3], [1, 2, 5, 7, 10], [6, 49]])
def test_the_picture_is_drawn_at_any_n(tmp_path, ns):
    """A long run ends in a traceback for an N whose shade is beyond black (0.2 + 0.8 * 3 / 3 > 1)."""
    pytest.importorskip("matplotlib")
    by_n = {str(n): {"tokens_per_problem": 40.0, "accuracy": 0.9, "accuracy_ci95": [0.8, 0.95],
                     "accuracy_in_budget": 0.5, "accuracy_by_position": [0.9] * n,
                     "problems_per_second": None if n == 5 else 100.0} for n in ns}
    metrics = [{"step": 1, "n": 4, "budget": 150, "tokens_per_problem": 40.0, "accuracy": 0.5,
                "truncated": 0.5, "entropy": 0.5}]
    two = {"before": {"a": by_n}, "after": {"a": by_n}}
    for stages, of_training in ((two, metrics), ({"model": {"a": by_n}}, ())):
        evaluate.plot(tmp_path / "results.png", stages, 150, of_training)
        assert (tmp_path / "results.png").stat().st_size > 10_000


# ----------------------------------------------------------------------------------------------
# Rewards of the user's own


@pytest.mark.parametrize("body, named", [
    ("return 1 / 0", "ZeroDivisionError"), ("return [1]", "2 numbers"), ("return [2.0, 0]", "2 numbers"),
    ("return None", "2 numbers"), ("return ['a', 'b']", "ValueError"),
    ("return [float('nan'), 0]", "2 numbers")])
def test_a_failing_reward_is_one_sentence(tmp_path, body, named):
    """A traceback from inside the loop, or rewards that are silently wrong."""
    (tmp_path / "mine.py").write_text(f"def score(completion, golds):\n    {body}\n")
    _, user_score = evaluate.load_reward(str(tmp_path / "mine.py"))
    with pytest.raises(UserError, match=f"{named}[^\n]*$"):
        user_score("### Problem 1", ["1", "2"])


def test_the_readmes_examples_of_rewards_and_data_work(tmp_path):
    """The documented example of --reward does not run as it stands, or that of a data line is refused."""
    texts = [path.read_text() for path in (REPO / "README.md", REPO / "data/README.md") if path.exists()]
    blocks = [block for text in texts for block in re.findall("```python\n(.*?)```", text, re.DOTALL)]
    rewards = [block for block in blocks if "def score(" in block]
    example = re.compile(r'(?:^|`)(\{"problem": [^`\n]*\})(?:`|$)', re.MULTILINE)
    lines = [line for text in texts for line in example.findall(text)]
    assert rewards and lines
    for block in rewards:
        (tmp_path / "my_reward.py").write_text(block)
        _, user_score = evaluate.load_reward(str(tmp_path / "my_reward.py"))
        assert user_score("### Problem 1\nAnswer 1: \\boxed{100}", ["100", "5"]).shape == (2,)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    assert len(load_problems(tmp_path / "data.jsonl")) == len(lines)


# ----------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of problems, as in --data."""
    path = tmp_path_factory.mktemp("files")
    write_lines(path / "a.jsonl", heldout(4))
    write_lines(path / "b.jsonl", heldout(9)[4:])
    return f"{path / 'a.jsonl'},{path / 'b.jsonl'}"


def test_the_command_reports_each_file_and_n(files, tmp_path, capsys):
    """A budget is used for the first N alone, several files are mixed up, the table has other numbers than
    results.json, or the dial names another N. A resumed evaluation samples a finished (file, N) again, or
    comes to other results."""
    out = tmp_path / "out"
    flags = ["--data", files, "--n", "1,2", "--budget", "20,300", "--samples", 2, "--within", 15,
             "--target-accuracy", 0.5, "--out", out]
    assert status_of(evaluate.main, *flags) == 0
    stdout, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())["results"]
    assert {name: list(by_n) for name, by_n in results.items()} == {"a": ["1", "2"], "b": ["1", "2"]}
    rows = [line.split("|") for line in stdout.splitlines() if re.match(r" *[ab] \| ", line)]
    assert [f"{row[0].strip()} {row[1].strip()}" for row in rows] == ["a 1", "a 2", "b 1", "b 2"]
    for name, n, *cells in rows:
        f = results[name.strip()][n.strip()]
        assert [cell.strip() for cell in cells] == [
            f"{100 * f['accuracy']:.1f}", f"{100 * f['accuracy_in_budget']:.1f}",
            f"{f['tokens_per_problem']:.1f}", f"{f['loops_per_problem']:.2f}",
            f"{f['problems_per_second']:.1f}"]
        assert (f["tokens_per_problem"] <= 20) == (n.strip() == "1") and f["samples"] == 2
        records = lines_of(out / f"evaluation/{name.strip()}-n{n.strip()}-step0.jsonl")
        assert f["accuracy"] == np.mean([m for r in records for m in r["correct"] if m is not None])
        assert f["tokens_per_problem"] == pytest.approx(np.mean([r["tokens"] for r in records]) / int(n))
    assert stdout.count("at least 50.0% right with the fewest tokens: N = 2") == 2
    assert "Problem 2:" in (out / "completions.txt").read_text()

    expected = {path.name: path.read_bytes() for path in out.glob("evaluation/*")}
    finished = out / "evaluation/a-n2-step0.jsonl"
    write_lines(finished, [r | {"waits": 1000} for r in lines_of(finished)])  # lost if sampled again
    (out / "evaluation/b-n2-step0.jsonl").unlink()
    (out / "evaluation/b-n1-step0.jsonl.tmp").write_text('{"prompt": 19, "sam')  # where a kill left it
    assert status_of(evaluate.main, *flags, "--resume", "--rows", 2) == 0
    again = json.loads((out / "results.json").read_text())["results"]
    assert again["a"]["2"]["loops_per_problem"] == 500
    assert again["b"]["1"]["problems_per_second"] is None  # sampled before
    assert again["b"]["2"].pop("problems_per_second") and results["b"]["2"].pop("problems_per_second")
    assert again["b"]["2"] == results["b"]["2"]
    assert (out / "evaluation/b-n2-step0.jsonl").read_bytes() == expected["b-n2-step0.jsonl"]
    assert status_of(evaluate.main, *flags[2:], "--resume") == 2 and "--data was" in capsys.readouterr().err


def test_greedy_completions_are_equal(files, tmp_path):
    """--temperature is ignored."""
    assert status_of(evaluate.main, "--data", files, "--n", 1, "--budget", 30, "--samples", 3,
                     "--temperature", 0, "--out", tmp_path / "out") == 0
    records = lines_of(tmp_path / "out/evaluation/a-n1-step0.jsonl")
    assert len(records) == 12 and len({r["completion"] for r in records}) == 4


def test_solve_answers_in_input_order_and_asks_again(tmp_path):
    """Answers belong to other problems, lose their order or are not marked as asked again; a problem without
    a known answer is refused; a resumed run asks again or comes to other answers."""
    out = tmp_path / "out"
    problems = [{"id": f"p{i}", "problem": p["problem"]} | ({"answer": p["answer"]} if i % 2 else {})
                for i, p in enumerate(heldout(21))]
    write_lines(tmp_path / "problems.jsonl", problems)
    flags = ["--solve", tmp_path / "problems.jsonl", "--n", 4, "--budget", 220, "--rows", 5, "--out", out]
    assert status_of(evaluate.main, *flags) == 0
    entries, summary = lines_of(out / "answers.jsonl"), json.loads((out / "results.json").read_text())
    assert [e["id"] for e in entries] == [p["id"] for p in problems]
    assert all(("correct" in e) == (i % 2 == 1) for i, e in enumerate(entries))
    marks = [e["correct"] for e in entries if "correct" in e]
    assert np.mean(marks) > 0.7 and summary["accuracy"] == pytest.approx(np.mean(marks))
    assert all(e["answer"] is None or f"\\boxed{{{e['answer']}}}" in e["completion"] for e in entries)
    again = [e for e in entries if e["rounds"] > 1]
    assert again and all(e["n"] <= 2 for e in again) and summary["asked_again"] == len(again)
    assert any(e["n"] == 4 and e["rounds"] == 1 for e in entries)
    assert summary["unanswered"] == sum(e["answer"] is None for e in entries)
    records = [record for path in out.glob("evaluation/round-*.jsonl") for record in lines_of(path)]
    for tokens in (np.mean([e["tokens"] for e in entries]), sum(r["tokens"] for r in records) / 21):
        assert summary["tokens_per_problem"] == pytest.approx(tokens)
    before = (out / "answers.jsonl").read_bytes()
    first = out / "evaluation/round-1.jsonl"
    write_lines(first, [r | {"tokens": r["tokens"] + 1000} for r in lines_of(first)])  # lost if asked again
    assert status_of(evaluate.main, *flags, "--resume") == 0
    assert json.loads((out / "results.json").read_text())["tokens_per_problem"] > 200
    assert [e | {"tokens": 0} for e in lines_of(out / "answers.jsonl")] == [
        e | {"tokens": 0} for e in map(json.loads, before.splitlines())]


def test_a_problem_that_no_budget_reaches_is_marked(tmp_path):
    """A guess, or an endless loop, where even a prompt of one problem is truncated."""
    write_lines(tmp_path / "problems.jsonl", heldout(3))
    assert status_of(evaluate.main, "--solve", tmp_path / "problems.jsonl", "--n", 2, "--budget", 5,
                     "--out", tmp_path / "out") == 0
    entries = lines_of(tmp_path / "out/answers.jsonl")
    assert [(e["answer"], e["n"], e["rounds"], e["correct"]) for e in entries] == [(None, 1, 2, 0.0)] * 3


REWARD_FILES = {
    "exits": ("import sys\nsys.exit(3)", "SystemExit"),
    "exits later": ("def score(completion, golds):\n    raise SystemExit(3)", "SystemExit"),
    "wrong number of answers": ("def score(completion, golds):\n    return [1.0, 1.0]\n"
                                "def extract_answers(completion, n):\n    return ['a']", "2 texts"),
    "failing extract": ("def score(completion, golds):\n    return [1.0, 1.0]\n"
                        "def extract_answers(completion, n):\n    return 1 / 0", "ZeroDivisionError"),
}


@pytest.mark.parametrize("body, cause", REWARD_FILES.values(), ids=REWARD_FILES)
def test_a_reward_file_that_fails_is_named_with_its_cause(tmp_path, body, cause):
    """A run ends silently with the user's own exit status, or with a traceback."""
    path = tmp_path / "mine.py"
    path.write_text(body)
    with pytest.raises(UserError, match=cause) as error:
        extract, score = evaluate.load_reward(str(path))
        score("### Problem 1", ["1", "2"])
        extract("### Problem 1", 2)
    assert "mine.py" in str(error.value)
    with pytest.raises(UserError, match=tmp_path.name):
        evaluate.load_reward(str(tmp_path))  # a directory


def test_a_reward_file_is_a_module_with_helpers_and_gets_copies(tmp_path):
    """Dataclasses with postponed annotations or helper modules fail to import, files without .py are refused,
    or a score that changes its golds changes them for the rest of the run."""
    (tmp_path / "bcr_test_helper.py").write_text("VALUE = 0.5\n")
    (tmp_path / "mine").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from bcr_test_helper import VALUE\n\n\n@dataclass\nclass Mark:\n    value: float\n\n\n"
        "def score(completion, golds):\n    marks = [Mark(VALUE) for _ in golds]\n    golds.clear()\n"
        "    return [mark.value for mark in marks]\n")
    _, score = evaluate.load_reward(str(tmp_path / "mine"))
    golds = ["1", "2"]
    assert score("", golds).tolist() == [0.5, 0.5] and golds == ["1", "2"]


@pytest.fixture
def long_file(tmp_path):
    """Eight problems; the third has more tokens than the shipped model has positions."""
    problems = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(8)]
    problems[2]["problem"] = "What is " + "1 + " * 1500 + "1?"
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return tmp_path / "long.jsonl"


@pytest.mark.parametrize("program, flags", [
    (bcr, "--n 2 --groups 2 --samples 2 --steps 2 --eval-n 1 --eval-problems 2 --data"),
    (evaluate, "--n 1,2 --budget 200 --data"), (evaluate, "--n 2 --budget 200 --solve")])
def test_a_problem_that_does_not_fit_is_named_first(tmp_path, capsys, long_file, program, flags):
    """A run ends in the middle at one long line, and cannot be resumed."""
    arguments = [*flags.split(), long_file, "--out", tmp_path / "out"]
    assert status_of(program.main, *arguments) == 2
    assert "long.jsonl, line 3" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert status_of(program.main, *arguments, "--skip-long") == 0
    assert "1 of 8 problems are too long" in capsys.readouterr().out


def test_the_accuracy_within_more_tokens_than_were_sampled_is_refused(tmp_path, capsys):
    """A column "in 512 tokens" of completions that were truncated at 60."""
    assert status_of(evaluate.main, "--within", 512, "--budget", 60, "--out", tmp_path / "out") == 2
    assert status_of(bcr.main, "--budget", 512, "--eval-budget", 60, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("512") == 2 and not (tmp_path / "out").exists()


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path, capsys):
    """Completions that can never end are sampled to the budget."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [0, 900]}')
    assert status_of(evaluate.main, "--model", tmp_path / "model", "--out", tmp_path / "out") == 2
    assert "900" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda line: line[: len(line) // 2], lambda line: "[]",
    lambda line: line.replace('"sample": 0', '"sample": 7')])
def test_a_damaged_evaluation_file_is_refused(tmp_path, capsys, damage):
    """Answers to other problems are counted, or a traceback."""
    arguments = ["--n", 2, "--problems", 4, "--budget", 200, "--out", tmp_path / "out"]
    assert status_of(evaluate.main, *arguments) == 0
    path = tmp_path / "out/evaluation/heldout-n2-step0.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(damage(first) + "\n" + rest)
    assert status_of(evaluate.main, *arguments, "--resume") == 2
    assert f"{path.name} is damaged" in capsys.readouterr().err
