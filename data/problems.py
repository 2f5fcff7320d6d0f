"""
Problems: the text of prompts and answers, groups of about equal difficulty, JSONL files. The format
of an answer is defined here: `batch_prompt` asks for it, and reward.py reads it.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np

from data.files import UserError, read_lines
from reward import score

def batch_prompt(problems):
    """The user message for N problems (dicts with "problem"). The wording is the same for every N
    and every model, so that results at different N differ by N alone."""
    lines = [f"Problem {i}: {p['problem']}" for i, p in enumerate(problems, start=1)]
    return ('Solve the problems below in order. For each problem i write a section that starts '
            'with "### Problem i" and ends with "Answer i: \\boxed{...}".\n\n' + "\n".join(lines))


def answer_section(i, work, answer):
    """The section of a completion that answers problem i, as `batch_prompt` asks for it."""
    return f"### Problem {i}\n{work}Answer {i}: \\boxed{{{answer}}}"


@functools.lru_cache(maxsize=8)
def strata(difficulties, n, seed, epoch):
    """The problems sorted by difficulty (ties in random order) and cut into n equal parts, each
    shuffled: (n, len // n) indices. The remainder of the division is left out of this epoch."""
    rng = np.random.default_rng([seed, n, epoch])
    order = rng.permutation(len(difficulties))
    order = rng.permutation(order[: len(order) // n * n])
    by_difficulty = np.argsort(np.array(difficulties)[order], kind="stable")
    return rng.permuted(order[by_difficulty].reshape(n, -1), axis=1)


def draw_groups(problems, n, seed, first, count):
    """Groups first .. first + count - 1 of an endless sequence: (count, n) indices into `problems`.

    Each group has one problem of each stratum, in random order: groups are about equally hard, and
    a problem's position says nothing about its difficulty. The result depends on the arguments
    alone. Raises UserError for fewer than n problems."""
    size = len(problems) // n
    if not size:
        raise UserError(f"N = {n} problems in a prompt, but only {len(problems)} in all: lower N")
    difficulties = tuple(problem["difficulty"] for problem in problems)
    groups = []
    for index in range(first, first + count):
        epoch, column = divmod(index, size)
        group = strata(difficulties, n, seed, epoch)[:, column]
        groups.append(np.random.default_rng([seed, n, index]).permutation(group))
    return np.stack(groups)


def evaluation_groups(problems, n, seed):
    """Every problem once: (ceil(len / n), n) indices, and a bool array of the same shape that is
    False for problems that only fill up the last prompt. Those do not count."""
    groups = draw_groups(problems, n, seed, 0, len(problems) // n)
    if rest := sorted(set(range(len(problems))) - set(groups.flat)):
        groups = np.append(groups, [rest + groups.flat[: n - len(rest)].tolist()], axis=0)
    return groups, np.arange(groups.size).reshape(groups.shape) < len(problems)


def load_problems(path, answers=True):
    """A JSONL file as a list of {"id": str, by default the line number, "problem": str, "answer":
    str, or None where answers=False, "difficulty": float, "where": its file and line}. Raises
    UserError, naming the line, for a line that is not of this form."""
    problems = []
    seen = set()
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            problem = read_problem(line, number, answers) | {"where": where}
        except ValueError as error:  # json's own errors, too
            raise UserError(f"{where}: {error}") from None
        if problem["id"] in seen:  # an id that is used again gets its line number
            problem["id"] += f" (line {number})"
        seen.add(problem["id"])
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} has no problems in it")
    return problems


def read_problem(line, number, answers):
    """One line of a JSONL file as a problem. Raises ValueError if it is not one."""
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object with problem and answer")
    answer = entry.get("answer")
    difficulty = entry.get("difficulty") or 0
    if is_number(answer):
        answer = str(answer)
    if not is_text(entry.get("problem")):
        raise ValueError("the field problem has no text")
    if not is_text(answer) and (answers or answer is not None):
        raise ValueError("the field answer has no text or number")
    if not is_number(difficulty):
        raise ValueError("the field difficulty is not a finite number")
    return {"id": str(entry.get("id", number)), "problem": entry["problem"], "answer": answer,
            "difficulty": difficulty}


def is_number(value):  # not true, NaN or Infinity, which JSON can hold
    return type(value) in (int, float) and abs(value) < math.inf


def is_text(value):  # encode raises ValueError for half of a surrogate pair
    return isinstance(value, str) and bool(value.encode().strip())


def load_benchmarks(paths, most):
    """The first `most` problems of each file, {name of the file: problems}."""
    benchmarks = {}
    for path in paths.split(","):
        if Path(path).stem in benchmarks:
            raise UserError(f"two data files are called {Path(path).stem}: rename one of them")
        benchmarks[Path(path).stem] = load_problems(path)[:most]
    return benchmarks


def doubtful_golds(problems):
    """A sentence about the answers in the data that reward.py can hardly find in a completion:
    whole solutions, and answers that do not equal themselves. None if there are none."""
    doubtful = []
    for problem in problems:
        gold = problem["answer"] or "0"
        solution = len(gold) > 300 or any(mark in gold for mark in ("####", "\\boxed", "\n"))
        if solution or not score(answer_section(1, "", gold), [gold])[0]:
            doubtful.append(f"{problem['where']}: {gold[:60]!r}")
    if doubtful:
        return (f"warning: {len(doubtful)} of {len(problems)} answers in the data look like whole "
                f"solutions or do not equal themselves; the first is {doubtful[0]}")
