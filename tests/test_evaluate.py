"""Evaluation and solving: every problem counts once, intervals hold what they promise, and what
was stopped goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import bcr as bcr_module
from bcr import Settings, batch_prompt, change, evaluate, evaluation_groups, interval95, load_chat, load_problems, student95
from conftest import REPO, TINY
from model import Transformer
from test_cli import bcr


@pytest.fixture(scope="module")
def shipped():
    return Transformer.from_pretrained(TINY / "model"), load_chat(TINY / "model")


def heldout(count):
    return load_problems(TINY / "heldout.jsonl")[:count]


def write_problems(path, problems):
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


@pytest.mark.parametrize("count, n", [(30, 8), (30, 4), (40, 3), (8, 8), (9, 8), (30, 1), (675, 6)])
def test_every_problem_counts_once_at_every_n(count, n):
    """AIME has 30 problems: at N = 8 six of them were left out, or counted twice."""
    groups, counted = evaluation_groups(heldout(count), n, seed=0)
    assert groups.shape == counted.shape == (-(-count // n), n)
    assert sorted(groups[counted]) == list(range(count))
    assert all(len(set(group)) == n for group in groups.tolist())


def test_students_quantiles():
    """Intervals from few prompts that are as narrow as those from many. Source: any table."""
    for freedom, quantile in ((4, 2.776), (9, 2.262), (29, 2.045), (1999, 1.961)):
        assert student95(freedom) == pytest.approx(quantile, rel=3e-3)


@pytest.mark.parametrize("prompts, samples, n", [(30, 1, 1), (30, 8, 1), (10, 4, 3), (300, 2, 1)])
def test_the_interval_covers_the_truth_19_times_in_20(prompts, samples, n):
    """k samples of one problem taken for k problems: then the interval of avg@8 on AIME holds the
    truth in half of the cases. The problems differ in difficulty, as real ones do."""
    rng, inside, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        p = rng.beta(0.8, 0.8, (prompts, 1, n))  # the truth, over all problems that there might be, is 0.5
        correct = (rng.random((prompts, samples, n)) < p).astype(float)
        low, high = interval95(correct)
        inside += low <= 0.5 <= high
        naive += abs(correct.mean() - 0.5) < 1.96 * 0.5 / np.sqrt(correct.size)
    assert 920 <= inside <= 985
    if samples == 8:
        assert naive < 750


def test_the_change_is_between_the_same_prompts():
    """An interval of the change that does not use that both models answered the same problems; a
    filled-up answer (None) that counts."""
    rng = np.random.default_rng(0)
    easy = rng.random(200) < 0.5
    before = [{"prompt": p, "sample": 0, "correct": [float(easy[p]), None], "tokens": 100 + p} for p in range(200)]
    after = [{"prompt": p, "sample": 0, "correct": [float(easy[p] or p < 10), None], "tokens": (100 + p) / 2} for p in range(200)]
    moved = change(before, after)
    assert moved["accuracy"] == pytest.approx(np.mean(easy | (np.arange(200) < 10)) - easy.mean())
    low, high = moved["accuracy_ci95"]
    assert low < moved["accuracy"] < high and high - low < 0.08  # unpaired: 0.2
    assert moved["tokens"] == pytest.approx(-0.5) and moved["tokens_ci95"] == pytest.approx([-0.5, -0.5])
    low, high = change(before[:20], before[:20])["accuracy_ci95"]
    assert low < -0.05 and high > 0.05  # twenty equal answers do not prove that nothing changed
    assert change(before[:1], after[:1])["tokens_ci95"] is None


def test_accuracy_in_budget_is_what_sampling_with_that_budget_gives(shipped, tmp_path):
    """The column `in B tokens` is read off longer completions: it must be the accuracy that a run
    with that budget has, token for token."""
    model, chat = shipped
    free, cut = (evaluate(model, chat, "tiny", heldout(48), 4, Settings(budget="150", eval_n="4", eval_budget=budget),
                          tmp_path / f"{budget}.jsonl", "")[0] for budget in ("600", "150"))
    assert free["accuracy_in_budget"] == cut["accuracy"] < free["accuracy"]
    assert free["tokens_per_problem"] > cut["tokens_per_problem"] and cut["truncated"] > 0.5


def test_k_samples_and_interference_are_counted(shipped, tmp_path):
    """avg@k over other than k samples of each prompt; an answer under another problem's number that
    goes unseen. The golds of each prompt are turned by one, so that what the model answers rightly
    to problem i + 1 is what the file asks of problem i."""
    model, chat = shipped
    s = Settings(eval_n="3", eval_samples=4)
    right, records = evaluate(model, chat, "tiny", heldout(10), 3, s, tmp_path / "a.jsonl", "")
    assert [(r["prompt"], r["sample"]) for r in records] == [(p, g) for p in range(4) for g in range(4)]
    assert len({r["completion"] for r in records if r["prompt"] == 0}) > 1
    assert right["problems"] == 10 and right["accuracy"] > 0.8
    assert sum(mark is not None for r in records for mark in r["correct"]) == 10 * 4
    problems = heldout(10)
    groups, _ = evaluation_groups(problems, 3, s.seed)
    answers = {i: heldout(10)[j]["answer"] for group in groups[:3] for i, j in zip(group, np.roll(group, -1))}
    for i, answer in answers.items():
        problems[i]["answer"] = answer
    turned, _ = evaluate(model, chat, "tiny", problems, 3, s, tmp_path / "b.jsonl", "")
    assert turned["accuracy"] < 0.3 < 0.5 < turned["interference"] and right["interference"] < 0.1
    assert len(turned["accuracy_by_position"]) == 3


def test_each_n_has_its_budget_and_temperature(tmp_path):
    """--eval-budget or --eval-temperature given for each N, but used for the first alone; results of
    several files in one heap."""
    a, b = (write_problems(tmp_path / f"{name}.jsonl", heldout(4)) for name in "ab")
    done = bcr("--steps", 0, "--eval-data", f"{a},{b}", "--eval-n", "1,2", "--eval-budget", "20,300", "--eval-temperature", "1,0",
               "--eval-samples", 3, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["before"]) == ["a", "b"] and results["after"] == {}
    for name in "ab":
        one, two = results["before"][name]["1"], results["before"][name]["2"]
        assert one["tokens_per_problem"] <= 20 and two["tokens_per_problem"] > 20
        for n, texts in ((1, 3), (2, 1)):  # greedy completions are equal
            records = [json.loads(line) for line in (tmp_path / f"out/evaluation/{name}-n{n}-step0.jsonl").read_text().splitlines()]
            assert len({r["completion"] for r in records if r["prompt"] == 0}) == texts
    assert [line.split()[:2] for line in done.stdout.splitlines() if line[:1] in "ab" and "|" in line and "bench" not in line] \
        == [["a", "1"], ["a", "2"], ["b", "1"], ["b", "2"]]


def stop_when(arguments, condition):
    """Runs bcr.py and kills it -9 as soon as the condition holds."""
    process = subprocess.Popen([sys.executable, str(REPO / "bcr.py"), *map(str, arguments)], stdout=subprocess.DEVNULL)
    try:
        while not condition():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def test_a_stopped_evaluation_goes_on_without_repeating(tmp_path):
    """A killed evaluation of hours that begins anew, counts a completion twice, or trips over the
    half line at which it was killed."""
    arguments = ["--steps", 0, "--eval-n", 2, "--eval-problems", 40, "--rows", 4]
    whole = bcr(*arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    path = tmp_path / "out/evaluation/heldout-n2-step0.jsonl"
    stop_when([*arguments, "--out", tmp_path / "out"], lambda: lines(path) >= 6)
    with open(path, "a") as file:
        file.write('{"prompt": 19, "sam')
    first = path.read_text().splitlines()[0].replace('"waits": ', '"waits": 1000')  # would be lost if sampled again
    path.write_text(first + "\n" + path.read_text().split("\n", 1)[1])
    done = bcr(*arguments, "--out", tmp_path / "out", "--resume")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "whole/evaluation/heldout-n2-step0.jsonl").read_text().splitlines()]
    assert sum(r.pop("waits") >= 1000 for r in records) == 1
    assert records == [{k: v for k, v in r.items() if k != "waits"} for r in expected]


def test_solve_answers_in_input_order_and_asks_again(tmp_path):
    """Answers that belong to other problems, lose their order or are not marked as asked again; a
    problem without a known answer that is refused."""
    problems = [{"id": f"p{i}", "problem": p["problem"]} | ({"answer": p["answer"]} if i % 2 else {}) for i, p in enumerate(heldout(21))]
    file = write_problems(tmp_path / "problems.jsonl", problems)
    done = bcr("--solve", file, "--n", 4, "--budget", 150, "--rows", 5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [e["id"] for e in entries] == [p["id"] for p in problems]
    assert all(("correct" in e) == (i % 2 == 1) for i, e in enumerate(entries))
    known = [score for e, p in zip(entries, heldout(21)) if "correct" in e for score in [e["correct"]]]
    assert np.mean(known) > 0.7
    assert all(e["answer"] is None or f"\\boxed{{{e['answer']}}}" in e["completion"] for e in entries)
    again = [e for e in entries if e["rounds"] > 1]
    assert again and all(e["n"] <= 2 for e in again) and any(e["n"] == 4 and e["rounds"] == 1 for e in entries)
    summary = json.loads((tmp_path / "out/results.json").read_text())
    assert summary["again"] == len(again) and summary["accuracy"] == pytest.approx(np.mean(known))
    assert summary["tokens_per_problem"] == pytest.approx(np.mean([e["tokens"] for e in entries]))
    spent = sum(json.loads(line)["tokens"] for path in (tmp_path / "out").glob("round-*.jsonl") for line in path.read_text().splitlines())
    assert summary["tokens_per_problem"] == pytest.approx(spent / 21)
    before = (tmp_path / "out/answers.jsonl").read_bytes()
    again = bcr("--solve", file, "--n", 4, "--budget", 150, "--rows", 5, "--out", tmp_path / "out", "--resume")
    assert again.returncode == 0 and (tmp_path / "out/answers.jsonl").read_bytes() == before


def test_a_problem_no_budget_reaches_is_marked(tmp_path):
    """A guess, or an endless loop, where even a prompt of its own is cut."""
    file = write_problems(tmp_path / "problems.jsonl", heldout(3))
    done = bcr("--solve", file, "--n", 2, "--budget", 5, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [(e["answer"], e["n"], e["rounds"], e["correct"]) for e in entries] == [(None, 1, 2, 0.0)] * 3


VERDICTS = '''
def score(completion, golds):
    """Half of the reward for any section, the rest for more than five digits: nothing a checker of answers knows."""
    sections = completion.split("### Problem")[1:]
    return [0.5 * (i < len(sections)) + 0.5 * (i < len(sections) and sum(map(str.isdigit, sections[i])) > 5) for i in range(len(golds))]
'''


def test_a_reward_of_ones_own(tmp_path):
    """--reward that is read but not used, in training or in evaluation."""
    (tmp_path / "mine.py").write_text(VERDICTS)
    data = write_problems(tmp_path / "data.jsonl", [p | {"answer": ("SWITCH", "STAY", "HOLD")[i % 3]} for i, p in enumerate(heldout(12))])
    quick = ["--n", 2, "--data", data, "--eval-data", data, "--eval-n", 1, "--steps", 1, "--groups", 2, "--samples", 2]
    done = bcr(*quick, "--reward", tmp_path / "mine.py", "--out", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    theirs = bcr(*quick, "--out", tmp_path / "theirs")
    assert theirs.returncode == 0, theirs.stderr
    reward = {name: json.loads((tmp_path / name / "metrics.jsonl").read_text())["reward"] for name in ("mine", "theirs")}
    accuracy = {name: json.loads((tmp_path / name / "results.json").read_text())["before"]["data"]["1"]["accuracy"] for name in reward}
    assert reward["mine"] > 0.5 > reward["theirs"] == 0 and accuracy["mine"] > 0.5 > accuracy["theirs"] == 0


@pytest.mark.parametrize("body, named", [("return 1 / 0", "ZeroDivisionError"), ("return [1]", "2 numbers"), ("return [2.0, 0]", "2 numbers"),
                                         ("return None", "2 numbers"), ("return ['a', 'b']", "ValueError"),
                                         ("return [float('nan'), 0]", "2 numbers")])
def test_a_failing_reward_is_one_sentence(tmp_path, body, named):
    """A traceback from deep inside the loop, or rewards that are silently wrong."""
    (tmp_path / "mine.py").write_text(f"def score(completion, golds):\n    {body}\n")
    _, score = bcr_module.load_reward(str(tmp_path / "mine.py"))
    with pytest.raises(bcr_module.UserError, match=named):
        score("### Problem 1", ["1", "2"])


def test_a_model_comes_from_the_hub_once_it_was_downloaded(tmp_path, monkeypatch):
    """--model owner/name that ignores what huggingface_hub has on disk. The cache is laid out as it
    lays it out."""
    snapshot = tmp_path / "models--bcr--tiny/snapshots/0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    for file in (TINY / "model").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (tmp_path / "models--bcr--tiny/refs").mkdir()
    (tmp_path / "models--bcr--tiny/refs/main").write_text(snapshot.name)
    done = bcr("--model", "bcr/tiny", "--steps", 0, "--eval-n", 1, "--eval-problems", 2, "--out", tmp_path / "out",
               env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_the_readmes_own_reward_and_verdicts_run(tmp_path):
    """README's example of --reward, or of a task that is a JSONL file alone, that does not run as it stands."""
    readme = (REPO / "README.md").read_text()
    (tmp_path / "my_reward.py").write_text(readme.split("```python\n")[1].split("```")[0])
    verdict = next(line for line in readme.splitlines() if line.startswith("{") and "SWITCH" in line)
    data = tmp_path / "verdicts.jsonl"
    data.write_text(f"{verdict}\n" * 4)
    _, score = bcr_module.load_reward(str(tmp_path / "my_reward.py"))
    assert score("### Problem 1\nAnswer 1: \\boxed{101}\n### Problem 2\nAnswer 2: \\boxed{x}", ["100", "5"]).tolist() == [1, 0]
    assert bcr_module.check(["### Problem 1\nAnswer 1: \\boxed{Switch}"], [["SWITCH"]]).tolist() == [[1]]
    for more in ([], ["--reward", tmp_path / "my_reward.py"]):
        done = bcr("--data", data, "--eval-data", data, "--n", 2, "--eval-n", 1, "--eval-problems", 2, "--steps", 1, "--groups", 1,
                   "--samples", 2, "--out", tmp_path / f"out{len(more)}", *more)
        assert done.returncode == 0, done.stderr
        assert "1 problems of verdicts are in --data too" in done.stdout  # the mend of a study that flatters itself


MEASURED = """
import runpy, sys
sys.path.insert(0, {repo!r})
runpy.run_path({repo!r} + "/bcr.py", run_name="__main__")
print(open("/proc/self/status").read())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process's memory is read from /proc")
def test_running_out_of_memory_is_no_end(tmp_path):
    """A run that dies, or comes to other results, on a machine with less memory: first one that takes what it
    wants, then one that may have three quarters of that."""
    def quick(out):
        return ["--n", "4", "--steps", "1", "--groups", "16", "--samples", "8", "--micro-tokens", "1000000", "--eval-n", "1",
                "--eval-problems", "2", "--out", str(tmp_path / out)]
    alone = dict(capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    free = subprocess.run([sys.executable, "-c", MEASURED.format(repo=str(REPO)), *quick("free")], **alone)
    assert free.returncode == 0 and "memory ran out" not in free.stdout
    peak = int(next(line.split()[1] for line in free.stdout.splitlines() if line.startswith("VmPeak")))  # kB
    arguments = " ".join([sys.executable, str(REPO / "bcr.py"), *quick("tight")])
    tight = subprocess.run(["bash", "-c", f"ulimit -v {peak * 3 // 4}; {arguments}"], **alone)
    assert tight.returncode == 0, tight.stderr
    assert "memory ran out: going on with" in tight.stdout
    ours, theirs = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("tight", "free"))
    assert ours["reward"] == theirs["reward"] and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_the_dial_names_the_cheapest_n_that_is_good_enough():
    """An N that costs more, or is not good enough, or a target that nothing reaches and nobody hears of."""
    def of(accuracy, tokens):
        return {"accuracy": accuracy, "tokens_per_problem": tokens, "accuracy_ci95": [accuracy - 0.02, accuracy + 0.02]}
    results = {"before": {}, "after": {"a": {"1": of(0.97, 40), "2": of(0.95, 36), "4": of(0.93, 38), "8": of(0.8, 30)}}}
    def said(target):
        return next(bcr_module.dial(results, target))
    assert "N = 2," in said(0.92) and "36.0 tokens" in said(0.92) and "below" not in said(0.92)
    assert "N = 8," in said(0.5) and "N = 1," in said(0.96) and "reaches below the target" in said(0.96)
    assert "no N of 1, 2, 4, 8 reaches 99.0%" in said(0.99) and "N = 1," in said(0.99)


@pytest.mark.parametrize("ns", [[3], [1, 3], [1, 2, 5, 7, 10], [6, 49]])
def test_the_picture_is_drawn_at_any_n(tmp_path, ns):
    """A run of hours that ends in a traceback for an N whose shade is more than black (0.2 + 0.8 * 3 / 3 > 1)."""
    pytest.importorskip("matplotlib")
    of_n = {str(n): {"tokens_per_problem": 40.0, "accuracy": 0.9, "accuracy_ci95": [0.8, 0.95], "accuracy_in_budget": 0.5, "budget": 150,
                     "accuracy_by_position": [0.9] * n} for n in ns}
    bcr_module.plot(tmp_path / "results.png", {"before": {"a": of_n}, "after": {}}, [])
    assert (tmp_path / "results.png").stat().st_size > 10_000
