"""The main comparison of the study in short: BCR, plain GRPO and an explicit length penalty, two seeds each."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import reward
import study
import study_real
from conftest import REPO

ARMS = ("base", "bcr-n4", "rl-n1", "penalty-1")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    command = [sys.executable, str(REPO / "tests/study.py"), "--out", str(out), "--arms", ",".join(ARMS), "--seeds", "2", "--steps", "8",
               "--problems", "8", "--evaluated", "32", "--brief", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    again = subprocess.run([*command, "--report"], capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout in done.stdout, again.stderr  # the report comes from what was written
    return json.loads((out / "results.json").read_text())


def mean(found, name, key, n="1"):
    return np.mean([of_seed["by_n"][n][key] for of_seed in found[name].values()])


@pytest.mark.slow
def test_bcr_shortens_and_plain_rl_does_not(found):
    """The claim itself, loosely: after 8 steps BCR's solutions at N = 1 are shorter than the base's and than plain
    GRPO's, and about as often right."""
    tokens = {name: mean(found, name, "tokens_per_problem") for name in ARMS}
    assert tokens["bcr-n4"] < 0.9 * tokens["base"] and tokens["bcr-n4"] < 0.9 * tokens["rl-n1"]
    assert tokens["rl-n1"] > 0.9 * tokens["base"]
    assert mean(found, "bcr-n4", "accuracy") > mean(found, "base", "accuracy") - 0.1
    assert mean(found, "bcr-n4", "loops_per_problem") < 0.8 * mean(found, "base", "loops_per_problem")
    assert mean(found, "bcr-n4", "accuracy_in_budget", "4") > mean(found, "base", "accuracy_in_budget", "4") + 0.1


@pytest.mark.slow
def test_problems_of_more_steps_take_more_tokens(found):
    """Figures by the number of steps that stand under another number, or mix N."""
    for of_seed in found["base"].values():
        by_steps, accuracy = of_seed["by_steps"], of_seed["by_n"]["1"]["accuracy"]
        assert by_steps["2"][0] < by_steps["4"][0] and list(by_steps) == ["2", "3", "4"]
        assert min(right for _, right in by_steps.values()) <= accuracy <= max(right for _, right in by_steps.values())


@pytest.mark.slow
def test_the_penalty_of_this_strength_shortens_and_does_not_collapse(found):
    """The baseline that BCR is compared with must be a working one: a penalty that did nothing would flatter BCR."""
    assert mean(found, "penalty-1", "tokens_per_problem") < 0.97 * mean(found, "rl-n1", "tokens_per_problem")
    assert mean(found, "penalty-1", "accuracy") > mean(found, "base", "accuracy") - 0.15


def test_every_arm_sees_as_many_problems():
    """Arms that learn from more problems than others: the comparison would be of data, not of methods."""
    for name, flags in study.ARMS.items():
        if flags and "," not in str(flags["n"]) and not name.endswith("long"):
            assert abs(study.groups(flags["n"], study.PROBLEMS) * int(flags["n"]) - study.PROBLEMS) <= 1, name


def test_differences_are_taken_seed_by_seed_and_intervals_are_students():
    """Intervals that are too narrow for five seeds, seeds paired with others, or the sign of a difference."""
    middle, half = study.interval([1, 2, 3, 4, 5])
    assert middle == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=3e-3)
    found = {"ours": {0: 10, 1: 30, 2: 99}, "theirs": {1: 25, 0: 8}}
    assert study.against(found, "ours", "theirs", float) == [2, 5]


def test_the_anatomy_counts_what_it_names():
    """Waits, restatements or repetitions that are counted as each other."""
    text = ("### Problem 1\nWe need 2 + 3. 2 + 3 = 5. Wait, check: 5 - 3 = 2, ok. Wait, let me do it again. 2 + 3 = 5.\nAnswer 1: \\boxed{5}"
            "\n\n### Problem 2\nAnswer 2: \\boxed{7}")
    assert study.anatomy([{"completion": text}]) == {"waits": 1.0, "restated": 0.5, "done_again": 0.5, "no_steps": 0.5, "equations": 1.5}


def test_a_solution_without_its_heading_is_counted():
    """A model that drops the heading: its solutions would vanish from the means, or take them with them."""
    assert study.anatomy([{"completion": "### 1\n2 + 3 = 5.\nAnswer 1: \\boxed{5}"}])["equations"] == 1.0


def test_the_word_problems_have_the_answers_that_they_ask_for(tmp_path):
    """Golds that are wrong, or held-out problems that were trained on."""
    study_real.make_problems(tmp_path)
    train, heldout = (study.records_of(tmp_path / f"{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (study_real.TRAIN, study_real.HELDOUT)
    assert len({one["problem"] for one in train + heldout}) == len(train) + len(heldout)
    for one in train + heldout:
        a, b = map(int, re.findall(r"\d+", one["problem"]))
        assert int(one["answer"]) == (a - b if "gives" in one["problem"] else a * b if "cost" in one["problem"] or "boxes" in one["problem"] else a + b)


def test_what_the_warm_up_teaches_is_what_the_reward_wants():
    """A format in which right solutions earn nothing: the arms would start from a model that was taught to fail."""
    solved = [{"solution": "He has 2 + 3 = 5 pens.", "answer": "5"}, {"solution": "6 - 2 is 4.\n#### 4", "answer": "4"}]
    text = study_real.in_format(solved)
    assert reward.score(text, ["5", "4"]) == [1.0, 1.0] and reward.score(text, ["4", "5"]) == [0.0, 0.0]
    assert re.findall(r"^### Problem (\d)$", text, re.MULTILINE) == ["1", "2"]
    one = study_real.in_format(solved[1:])
    assert study_real.anatomy([{"completion": one, "problems": ["a"]}, {"completion": one.split("\n", 1)[1], "problems": ["a"]}], {"a": "4"}) == {
        "headed": 0.5, "words": 7.0, "equations": 0.0, "answer_said": 2.0}
