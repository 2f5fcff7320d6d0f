"""The study, with its main comparison in short: BCR, a cap at N = 1, plain GRPO and a penalty, one seed."""

import json
import re

import pytest

import reward
from conftest import TINY, lines_of, start
from data.chat import load_chat
from data.study import study, study_real

ARMS = ("base", "bcr-n4", "cap-n1", "grpo-n1", "penalty-4")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The directory of a study of one seed."""
    out = tmp_path_factory.mktemp("study")
    process = start("data/study/study.py", "--out", out, "--arms", ",".join(ARMS), "--seeds", 1,
                    "--steps", 12, "--evaluated", 160, "--jobs", 1)
    stdout, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert (out / "report.txt").read_text() in stdout
    assert (out / "examples.txt").read_text().count("--- ") == 16  # four problems, four arms
    study.report(out, study.collect(out, ARMS, [0]))  # the report alone gives the same
    assert (out / "report.txt").read_text() in stdout
    return out


@pytest.fixture(scope="module")
def found(out):
    """{arm: figures}"""
    return {arm: of_arm["0"] for arm, of_arm in json.loads((out / "results.json").read_text()).items()}


@pytest.mark.slow
def test_bcr_shortens_and_plain_grpo_does_not(found):
    """The claim itself, loosely: without this, BCR could stop working. The penalty is checked too, because a
    baseline that did nothing would flatter BCR."""
    base, bcr, _, grpo, penalty = (found[arm] for arm in ARMS)
    assert bcr["tokens, N=1"] < 0.8 * base["tokens, N=1"] and bcr["tokens, N=1"] < 0.8 * grpo["tokens, N=1"]
    assert grpo["tokens, N=1"] > 0.9 * base["tokens, N=1"] and bcr["waits, N=1"] < 0.7 * base["waits, N=1"]
    assert bcr["right %, N=1"] > base["right %, N=1"] - 7 and bcr["right %, N=4"] > base["right %, N=4"] - 7
    assert bcr["right % in 40, N=4"] > base["right % in 40, N=4"] + 15
    assert penalty["tokens, N=1"] < 0.97 * grpo["tokens, N=1"]
    assert penalty["right %, N=1"] > base["right %, N=1"] - 15


@pytest.mark.slow
def test_a_shared_budget_answers_hard_problems_that_a_cap_cannot(found):
    """What tells BCR from a cap, loosely: with as many tokens per problem, four problems that share them
    leave enough for the hardest. Without this, the budget could be divided among the problems."""
    bcr, cap = found["bcr-n4"], found["cap-n1"]
    assert bcr["hardest right % in 40, N=4"] > cap["hardest right % in 40, N=1"] + 20
    assert bcr["right % in 40, N=4"] > cap["right % in 40, N=1"]


@pytest.mark.slow
def test_problems_of_more_steps_take_more_tokens(found):
    """Without this, the figures of one number of steps could be reported under another."""
    base = found["base"]
    tokens = [base[f"{low}-{low + 1} steps, tokens"] for low in (1, 3, 5, 7)]
    assert tokens == sorted(tokens) and tokens[-1] > 2 * tokens[0]
    rights = [base[f"{low}-{low + 1} steps, right %"] for low in (1, 3, 5, 7)]
    assert min(rights) <= base["right %, N=1"] <= max(rights)


@pytest.mark.slow
def test_a_completion_cut_by_its_text_is_the_one_cut_by_its_tokens(out):
    """Without this, accuracy within a budget could be that of other tokens than the ones sampled."""
    chat = load_chat(TINY / "model")
    records = lines_of(out / "base-seed0-evaluated/evaluation/heldout-n4-step0.jsonl")
    for record in records:
        ids = chat.tokenizer.encode(record["completion"], add_special_tokens=False).ids
        assert len(ids) == record["tokens"] - 1  # without EOS
    golds = {problem["id"]: problem["answer"] for problem in lines_of(TINY / "heldout.jsonl")}
    golds = [golds[i] for i in records[0]["problems"]]
    assert study.marks_within(records[0], 2000, golds, chat) == records[0]["correct"]
    assert sum(study.marks_within(records[0], 10, golds, chat)) == 0


def test_every_arm_sees_as_many_problems():
    """Without this, arms could learn from more problems than others: a comparison of data, not of methods."""
    for name, flags in study.ARMS.items():
        if flags and "," not in str(flags["n"]):
            assert study.groups(flags["n"], study.PROBLEMS) * flags["n"] == study.PROBLEMS, name
    assert set(study.PROGRAMS) < set(study.ARMS)
    assert {arm for pair in study.PAIRS for arm in pair} <= set(study.ARMS)


def test_differences_are_taken_seed_by_seed_and_intervals_are_students():
    """Without this, intervals could be too narrow for five seeds, seeds could be paired with others, or a
    difference could have the wrong sign."""
    middle, half = study.interval([1, 2, 3, 4, 5])
    assert middle == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=3e-3)
    arms = {"grpo-n1": {0: 50, 1: 40, 2: 99}, "base": {1: 25, 0: 100}}
    arms = {arm: {seed: {"tokens, N=1": x, "right %, N=1": x} for seed, x in seeds.items()}
            for arm, seeds in arms.items()}
    row = [cell.strip() for cell in study.differences_table(arms).splitlines()[-1].split("|")]
    assert row[1] == "grpo-n1 against base"
    assert row[2].split()[0] == "5.0" and row[3].split()[0] == "-17.5"  # of -50 and 60%, of -50 and 15


def test_the_anatomy_counts_what_it_names():
    """Without this, waits, restatements and repetitions could be counted as each other, and solutions without
    a heading could be left out."""
    text = ("### Problem 1\nWe need 2 + 3. 2 + 3 = 5. Wait, check: 5 - 3 = 2, ok. Wait, let me do it again. "
            "2 + 3 = 5.\nAnswer 1: \\boxed{5}\n\n### Problem 2\nAnswer 2: \\boxed{7}")
    assert study.anatomy([{"completion": text}]) == {
        "waits": 1.0, "equations": 1.5, "restated %": 50, "done again %": 50, "hurried %": 0,
        "no steps %": 50}
    one = study.anatomy([{"completion": "### 1\n2 + 3 - 4 = 1. 1 + 1 = 2.\nAnswer 1: \\boxed{2}"}])
    assert one["equations"] == 2 and one["hurried %"] == 100


def test_the_word_problems_have_the_answers_that_they_ask_for(tmp_path):
    """Without this, answers could be wrong, or held-out problems could be in the training data."""
    study_real.make_problems(tmp_path)
    train, heldout = (lines_of(tmp_path / f"{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (study_real.TRAIN, study_real.HELDOUT)
    assert len({one["problem"] for one in train + heldout}) == len(train) + len(heldout)
    for one in train + heldout:
        a, b = map(int, re.findall(r"\d+", one["problem"]))
        expected = a + b
        if "gives" in one["problem"]:
            expected = a - b
        elif "cost" in one["problem"] or "boxes" in one["problem"]:
            expected = a * b
        assert int(one["answer"]) == expected


def test_the_warm_up_teaches_the_format_that_the_reward_reads():
    """Without this, the arms could start from a model whose correct solutions earn nothing."""
    solved = [{"solution": "He has 2 + 3 = 5 pens.", "answer": "5"},
              {"solution": "6 - 2 is 4.\n#### 4", "answer": "4"}]
    text, one = study_real.in_format(solved), study_real.in_format(solved[1:])
    assert reward.score(text, ["5", "4"]) == [1.0, 1.0] and reward.score(text, ["4", "5"]) == [0.0, 0.0]
    assert [number for number, _ in reward.find_headers(text)] == [1, 2]
    records = [{"completion": part, "problems": ["a"]} for part in (one, one.split("\n", 1)[1])]
    assert study_real.anatomy(records, {"a": "4"}) == {
        "headed": 0.5, "words": 7.0, "equations": 0.0, "answer_said": 2.0}
