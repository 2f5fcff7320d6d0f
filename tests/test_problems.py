"""Problems: groups of equal difficulty, the format of prompts and answers, and data files."""

import numpy as np
import pytest

from conftest import TINY
from data.files import UserError
from data.problems import (
    answer_section,
    batch_prompt,
    doubtful_golds,
    draw_groups,
    evaluation_groups,
    load_problems,
)
from reward import extract_answers


def made_up(count, levels=5):
    return [{"problem": str(i), "answer": "1", "difficulty": i % levels} for i in range(count)]


def test_an_epoch_uses_each_problem_once():
    """Problems are repeated or left out, so the data is not what was asked for."""
    assert len(set(draw_groups(made_up(103), 4, seed=0, first=0, count=25).flat)) == 100
    assert set(draw_groups(made_up(103), 1, 0, 0, 103).flat) == set(range(103))
    with pytest.raises(UserError, match="only 3"):
        draw_groups(made_up(3), 4, seed=0, first=0, count=1)


def test_groups_are_equally_hard_in_any_order():
    """A group has N easy or N hard problems, and one budget suits neither; or the easy ones always
    come first, and accuracy by position measures difficulty."""
    groups = draw_groups(made_up(4000, levels=4000), 4, seed=0, first=0, count=1000)
    assert (np.sort(groups // 1000, axis=1) == [0, 1, 2, 3]).all()  # one problem of each fourth
    assert np.abs(groups.mean(axis=0) - 2000).max() < 150  # 4 standard errors


def test_groups_depend_on_their_number_alone():
    """A resumed run repeats or skips groups, or epochs and seeds have the same order."""
    problems = made_up(40)
    whole = draw_groups(problems, 4, seed=7, first=0, count=30)
    parts = [draw_groups(problems, 4, seed=7, first=first, count=3) for first in range(0, 30, 3)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole[:10], whole[10:20])
    assert not np.array_equal(whole, draw_groups(problems, 4, seed=8, first=0, count=30))


@pytest.mark.parametrize("count, n", [(30, 8), (8, 8), (9, 8), (30, 1)])
def test_every_problem_counts_once_at_every_n(count, n):
    """At N = 8 six of AIME's 30 problems are left out or counted twice."""
    groups, counted = evaluation_groups(made_up(count), n, seed=0)
    assert groups.shape == counted.shape == (-(-count // n), n)
    assert sorted(groups[counted]) == list(range(count))
    assert all(len(set(group)) == n for group in groups.tolist())


def test_prompt_sections_and_the_checker_share_one_format():
    """The prompt asks for another format than the one that is written or read, or its wording
    depends on N."""
    two = batch_prompt([{"problem": "What is 1 + 2?"}, {"problem": "What is 1/4 + 1/4?"}])
    assert two.endswith("\n\nProblem 1: What is 1 + 2?\nProblem 2: What is 1/4 + 1/4?")
    assert two.split("\n")[0] == batch_prompt([{"problem": "2 + 2"}]).split("\n")[0]
    header, answer = answer_section("i", "", "...").split("\n")
    assert f'starts with "{header}" and ends with "{answer}"' in two
    golds = ["3", "\\frac{1}{2}"]
    text = "\n\n".join(answer_section(i, "Easy.\n", gold) for i, gold in enumerate(golds, start=1))
    assert extract_answers(text, 2) == golds


@pytest.mark.parametrize("line", [
    "{problem", "[1]", '{"problem": "a"}', '{"problem": null, "answer": "1"}',
    '{"problem": "a", "answer": NaN}', '{"problem": "a", "answer": "1", "difficulty": "hard"}'])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    """A line is skipped silently, or raises a traceback."""
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"problem": "What is 1 + 1?", "answer": "2"}}\n\n{line}\n')
    with pytest.raises(UserError, match="^[^\n]*data.jsonl, line 3: [^\n]*$"):
        load_problems(path)


def test_good_lines_and_their_defaults(tmp_path):
    """A missing id, a number as the answer, an id that is used twice or a byte order mark of
    Windows is refused or mixed up."""
    lines = ['{"problem": "a", "answer": 0.5}',
             '{"problem": "b", "answer": "x", "difficulty": 2, "id": 7}',
             '{"problem": "c", "answer": "y", "difficulty": null, "id": "7"}']
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    problems = load_problems(path)
    assert [p["id"] for p in problems] == ["1", "7", "7 (line 5)"]
    assert [p["answer"] for p in problems] == ["0.5", "x", "y"]
    assert [p["difficulty"] for p in problems] == [0, 2, 0]
    path.write_text('{"problem": "a"}\n')
    assert load_problems(path, answers=False)[0]["answer"] is None


def test_golds_that_nobody_can_match_are_named():
    """A column of whole solutions as gold gives every answer 0, and nothing says so (trl#5026)."""
    assert doubtful_golds(load_problems(TINY / "heldout.jsonl")[:100]) is None
    good = [{"answer": "\\frac{1}{2}", "where": "line 1"}, {"answer": None, "where": "line 2"}]
    for gold in ("#### 7", "The answer is \\boxed{3}.", "\\text{}", "so\n7"):
        bad = [{"answer": gold, "where": "line 3"}, {"answer": "#### 8", "where": "line 4"}]
        sentence = doubtful_golds(good + bad)
        assert "2 of 4" in sentence and "line 3" in sentence and "\n" not in sentence
