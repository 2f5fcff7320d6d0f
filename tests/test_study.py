"""The study, with its main comparison in short: BCR, a cap at N = 1 and plain GRPO, one seed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import TINY, lines_of, start
from data.chat import load_chat
from data.problems import answer_section
from data.study import dler, study

ARMS = ("base", "bcr-n4", "cap-n1", "grpo-n1")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The directory of a study of one seed."""
    out = tmp_path_factory.mktemp("study")
    process = start("data.study.study", "--out", out, "--arms", ",".join(ARMS), "--seeds", 1,
                    "--steps", 10, "--evaluated", 80, "--jobs", 1)
    stdout, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert (out / "report.txt").read_text() in stdout
    return out


@pytest.fixture(scope="module")
def found(out):
    """{arm: results}"""
    results = json.loads((out / "results.json").read_text())
    return {arm: seeds["0"] for arm, seeds in results.items()}


@pytest.mark.slow
def test_bcr_shortens_and_plain_grpo_does_not(found):
    """The claim itself, loosely: BCR stopped working, or it is not the budget that shortens."""
    base, bcr, _, grpo = (found[arm] for arm in ARMS)
    assert bcr["tokens, N=1"] < 0.8 * min(base["tokens, N=1"], grpo["tokens, N=1"])
    assert grpo["tokens, N=1"] > 0.9 * base["tokens, N=1"]
    assert bcr["waits, N=1"] < 0.7 * base["waits, N=1"]
    for n in (1, 4):
        assert bcr[f"right %, N={n}"] > base[f"right %, N={n}"] - 7
    assert bcr["right % in 45, N=4"] > base["right % in 45, N=4"] + 15


@pytest.mark.slow
def test_a_shared_budget_answers_hard_problems_that_a_cap_cannot(found):
    """What tells BCR from a cap, loosely: the budget is divided among the problems."""
    bcr = found["bcr-n4"]
    cap = found["cap-n1"]
    assert bcr["hardest right % in 45, N=4"] > cap["hardest right % in 45, N=1"] + 20
    assert bcr["right % in 45, N=4"] > cap["right % in 45, N=1"]


@pytest.mark.slow
def test_a_completion_cut_by_its_text_is_the_one_cut_by_its_tokens(out):
    """Accuracy within a budget is that of other tokens than the ones sampled."""
    chat = load_chat(TINY / "model")
    records = lines_of(study.evaluation_of(out / "base-seed0", 4))
    for record in records:
        ids = chat.tokenizer.encode(record["completion"], add_special_tokens=False).ids
        assert len(ids) == record["tokens"] - 1  # without EOS
    golds = {problem["id"]: problem["answer"] for problem in lines_of(TINY / "heldout.jsonl")}
    golds = [golds[i] for i in records[0]["problems"]]
    assert study.marks_within(records[0], 2000, golds, chat) == records[0]["correct"]
    assert sum(study.marks_within(records[0], 10, golds, chat)) == 0


def test_arms_that_are_compared_see_as_many_problems():
    """An arm learns from more problems than another: a comparison of data, not of methods."""
    for name, flags in study.ARMS.items():
        if name not in ("base", "default", "mixed"):
            assert flags["groups"] * flags["n"] == 24, name
            assert flags.get("steps", 40) == (160 if name == "penalty-16-std" else 40)
    assert {arm for pair in study.PAIRS for arm in pair} <= set(study.ARMS)


def test_differences_are_taken_seed_by_seed_and_intervals_are_students():
    """Intervals are too narrow for five seeds, or seeds are paired with others."""
    middle, half = study.interval([1, 2, 3, 4, 5])
    assert middle == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=3e-3)
    right = {f"{what}right %, N={n}": 0 for what in ("", "hardest ") for n in (1, 4, 8)}
    found = {"grpo-n1": {seed: right | {"tokens, N=1": x} for seed, x in enumerate((50, 40, 99))},
             "base": {1: right | {"tokens, N=1": 25}, 0: right | {"tokens, N=1": 100}}}
    row = study.differences_table(found).splitlines()[-1].split("|")
    assert row[1] == " `grpo-n1` against `base` " and row[2].split()[0] == "5.0"  # of -50 and 60%


def test_styles_are_read_from_the_text(shipped):
    """Solutions are counted under another style, or accuracy is that of another solution."""
    works = ["We need 2 + 3. 2 + 3 = 5.", "2 + 3 - 4 = 1. 1 + 1 = 2.", "2 + 3 = 5. 5 + 1 = 6.", "",
             "7 + 1 = 8. Wait, is it 8? 7 + 1 = 8, yes.", "1 + 2 = 3."]
    sections = [answer_section(i, f"{work}\n", "7") for i, work in enumerate(works, start=1)]
    record = {"completion": "\n\n".join(sections), "correct": [1.0, 0.0, 1.0, 0.0, 0.0, None]}
    group = [{"difficulty": 2}] * 5 + [{"difficulty": 1}]
    found = study.results_of_styles([record], [group], shipped[1])
    shares = [found[f"{style} %"] for style in study.STYLES]
    assert shares == pytest.approx([100 / 3, 100 / 3, 50 / 3, 50 / 3])
    assert found["right % of joins"] == found["right % of none"] == 0
    assert found["right % of steps"] == 100 and found["right % of checks"] == 50
    assert found["tokens of joins"] == found["tokens of steps"] + 2


def test_dler_divides_by_the_deviation_of_the_step():
    """The best cap that we know is another one: its advantages divide by each group's deviation, or
    lose the baseline of the group."""
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    completions = [SimpleNamespace(tokens=[1] * 3)] * 12
    rollout = SimpleNamespace(rewards=rewards, completions=completions)
    found = np.array(dler.token_advantages(rollout, None, None))  # (R, T)
    plain = (rewards - rewards.mean(axis=1, keepdims=True)).flatten()
    assert found == pytest.approx(np.repeat(plain[:, None] / plain.std(), 3, axis=1), rel=1e-4)
