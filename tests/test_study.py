"""The study, with its main comparison in short: BCR, a cap at N = 1 and plain GRPO, one seed."""

import json

import pytest

from conftest import TINY, lines_of, start
from data.chat import load_chat
from data.study import study

ARMS = ("base", "bcr-n4", "cap-n1", "grpo-n1")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The directory of a study of one seed."""
    out = tmp_path_factory.mktemp("study")
    process = start("data.study.study", "--out", out, "--arms", ",".join(ARMS), "--seeds", 1,
                    "--steps", 12, "--evaluated", 80, "--jobs", 1)
    stdout, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert (out / "report.txt").read_text() in stdout
    assert (out / "examples.txt").read_text().count("--- ") == 16  # four problems, four arms
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
    assert bcr["right % in 40, N=4"] > base["right % in 40, N=4"] + 15


@pytest.mark.slow
def test_a_shared_budget_answers_hard_problems_that_a_cap_cannot(found):
    """What tells BCR from a cap, loosely: the budget is divided among the problems."""
    bcr = found["bcr-n4"]
    cap = found["cap-n1"]
    assert bcr["hardest right % in 40, N=4"] > cap["hardest right % in 40, N=1"] + 20
    assert bcr["right % in 40, N=4"] > cap["right % in 40, N=1"]


@pytest.mark.slow
def test_problems_of_more_steps_take_more_tokens(found):
    """The results of one number of steps are reported under another."""
    tokens = [found["base"][f"{low}-{low + 1} steps, tokens"] for low in (1, 3, 5, 7)]
    assert tokens == sorted(tokens) and tokens[-1] > 2 * tokens[0]


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


def test_every_arm_sees_as_many_problems():
    """Arms learn from more problems than others: a comparison of data, not of methods."""
    for name, flags in study.ARMS.items():
        if flags and name not in ("mixed", "mixed-long"):
            assert flags["groups"] * flags["n"] == 24, name
    assert {arm for pair in study.PAIRS for arm in pair} <= set(study.ARMS)


def test_differences_are_taken_seed_by_seed_and_intervals_are_students():
    """Intervals are too narrow for five seeds, or seeds are paired with others."""
    middle, half = study.interval([1, 2, 3, 4, 5])
    assert middle == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=3e-3)
    right = {f"{what}right %, N={n}": 0 for what in ("", "hardest ") for n in (1, 4, 8)}
    found = {"grpo-n1": {seed: right | {"tokens, N=1": x} for seed, x in enumerate((50, 40, 99))},
             "base": {1: right | {"tokens, N=1": 25}, 0: right | {"tokens, N=1": 100}}}
    row = study.differences_table(found).splitlines()[-1].split("|")
    assert row[1] == " grpo-n1 against base " and row[2].split()[0] == "5.0"  # of -50 and 60%


def test_the_anatomy_counts_what_it_names():
    """Waits, restatements and repetitions are counted as each other, or solutions without a heading
    are left out."""
    text = ("### Problem 1\nWe need 2 + 3. 2 + 3 = 5. Wait, check: 5 - 3 = 2, ok. Wait, let me do "
            "it again. 2 + 3 = 5.\nAnswer 1: \\boxed{5}\n\n### Problem 2\nAnswer 2: \\boxed{7}")
    assert study.anatomy([{"completion": text}]) == {
        "waits": 1.0, "equations": 1.5, "restated %": 50, "done again %": 50, "hurried %": 0,
        "no steps %": 50}
    one = study.anatomy([{"completion": "2 + 3 - 4 = 1. 1 + 1 = 2.\nAnswer 1: \\boxed{2}"}])
    assert one["equations"] == 2 and one["hurried %"] == 100
