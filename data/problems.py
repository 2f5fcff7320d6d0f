"""
Problems: JSONL files, groups of N problems of about equal difficulty, and the text of a prompt and an answer.

The format of an answer is defined here and nowhere else: `batch_prompt` asks for it, `answer_section` writes
it (the tiny world's solutions), and reward.py reads it.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np

from data.files import UserError, read_lines

MAX_LINE = 10**6  # characters

# ----------------------------------------------------------------------------------------------
# Prompts and answers


def batch_prompt(problems):
    """The user message for N problems (dicts with "problem"). The wording is the same for every N and every
    model, so that results at different N differ by N alone."""
    listed = "\n".join(f"Problem {i}: {problem['problem']}" for i, problem in enumerate(problems, start=1))
    return ('Solve the problems below in order. For each problem i write a section that starts with '
            '"### Problem i" and ends with "Answer i: \\boxed{...}".\n\n' + listed)


def answer_section(i, work, answer):
    """The section of a completion that answers problem i, in the format that `batch_prompt` asks for."""
    return f"### Problem {i}\n{work}Answer {i}: \\boxed{{{answer}}}"


# ----------------------------------------------------------------------------------------------
# Groups


@functools.lru_cache(maxsize=8)
def strata(difficulties, n, seed, epoch):
    """The problems sorted by difficulty (ties in random order) and cut into n equal parts, each shuffled:
    (n, len // n) indices. The remainder of the division is left out of this epoch."""
    rng = np.random.default_rng([seed, n, epoch])
    order = rng.permutation(len(difficulties))
    order = rng.permutation(order[: len(order) // n * n])
    order = order[np.argsort(np.array(difficulties)[order], kind="stable")].reshape(n, -1)
    return rng.permuted(order, axis=1)


def draw_groups(problems, n, seed, first, count):
    """Groups first .. first + count - 1 of an endless sequence: (count, n) indices into `problems`.

    Each group has one problem of each stratum, so groups are about equally hard. Within a group the order is
    random, so a problem's position says nothing about its difficulty. The result depends on the arguments
    alone: a resumed run continues with the next group. Raises UserError for fewer than n problems."""
    size = len(problems) // n
    if not size:
        raise UserError(f"N = {n} problems in a prompt, but there are only {len(problems)}: lower N")
    difficulties = tuple(problem["difficulty"] for problem in problems)
    groups = []
    for index in range(first, first + count):
        epoch, column = divmod(index, size)
        group = strata(difficulties, n, seed, epoch)[:, column]
        groups.append(np.random.default_rng([seed, n, index]).permutation(group))
    return np.stack(groups)


def evaluation_groups(problems, n, seed):
    """Every problem once: (ceil(len / n), n) indices, and a bool array of the same shape that is False for
    problems that only fill up the last prompt. Those do not count."""
    groups = draw_groups(problems, n, seed, 0, len(problems) // n)
    if rest := sorted(set(range(len(problems))) - set(groups.flat)):
        groups = np.append(groups, [rest + groups.flat[: n - len(rest)].tolist()], axis=0)
    return groups, np.arange(groups.size).reshape(groups.shape) < len(problems)


# ----------------------------------------------------------------------------------------------
# JSONL files


def load_problems(path, answers=True):
    """A JSONL file as a list of {"id", "problem": str, "answer": str, "difficulty": float, "where": its file
    and line}. The id is the line number if the line has none. With answers=False a line may lack its answer
    (None).

    Raises UserError, with the number of the line, for a line that is not of this form."""
    problems, seen = [], {}
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            problem = read_problem(line, number, answers) | {"where": where}
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        seen[problem["id"]] = seen.get(problem["id"], 0) + 1
        if seen[problem["id"]] > 1:  # an id that is used again gets its line number
            problem["id"] += f" (line {number})"
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} has no problems in it")
    return problems


def load_benchmarks(paths, most):
    """The first `most` problems of each file, {name of the file: problems}."""
    benchmarks = {}
    for path in paths.split(","):
        if Path(path).stem in benchmarks:
            raise UserError(f"two data files are called {Path(path).stem}: rename one of them")
        benchmarks[Path(path).stem] = load_problems(path)[:most]
    return benchmarks


def read_problem(line, number, answers=True):
    """One line of a JSONL file as a problem. Raises ValueError if it is not one."""
    if len(line) > MAX_LINE:
        raise ValueError(f"{len(line)} characters; expected one JSON problem per line")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object with problem and answer")
    problem, answer, difficulty = entry.get("problem"), entry.get("answer"), entry.get("difficulty") or 0
    if is_number(answer):
        answer = str(answer)
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("the field problem has no text")
    answered = isinstance(answer, str) and answer.strip()
    if not answered and (answers or answer is not None):
        raise ValueError("the field answer has no text or number")
    try:
        (problem + (answer or "")).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text has half of a surrogate pair, which is not a character") from None
    if not is_number(difficulty):
        raise ValueError("the field difficulty is not a finite number")
    name = str(entry.get("id", number))
    return {"id": name, "problem": problem, "answer": answer, "difficulty": difficulty}


def is_number(value):
    """Whether a JSON value is a number that a float can hold: not true, NaN, Infinity or 10**400."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023
    return isinstance(value, float) and math.isfinite(value)
