"""data/prepare.py, run as a user runs it: subprocesses, the real files if they are present, and
made-up rows with the columns of the Hub's datasets."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPO, lines_of
from data.problems import load_problems
from reward import answers_equal

SHARED = REPO.parent / "shared/benchmarks"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="there are no real benchmark files")
FIELDS = ["id", "problem", "answer", "difficulty", "source"]
COMMAND = [sys.executable, "-m", "data.prepare"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
DEEPMATH = 103022
SIX = ("aime25", "amc23", "minerva", "math500", "olympiadbench", "deepmath")


def prepare(*args, cwd=REPO, **env):
    """Returns what the command printed. Raises ValueError with its one line of error."""
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120,
                          cwd=cwd, env=ENVIRONMENT | env)
    if done.returncode:
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        raise ValueError(done.stderr.splitlines()[-1])
    return done.stdout


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def raw_rows():
    """{name: rows with the columns that the dataset on the Hub has}"""
    rows = {
        "aime25": [{"problem": f"AIME problem {i}", "answer": str(i), "id": str(i)}
                   for i in range(30)],
        "amc23": [{"id": i, "question": f"AMC problem {i}", "answer": float(i)} for i in range(40)],
        "minerva": [{"question": f"Minerva {i}", "answer": f"{i}.5e33"} for i in range(272)],
        "math500": [{"problem": f"MATH problem {i}", "solution": r"We see \boxed{7}.",
                     "answer": rf"\frac{{{i}}}{{7}}", "level": i % 5 + 1,
                     "unique_id": f"test/algebra/{i}.json"} for i in range(500)],
        "olympiadbench": [{"id": 1606 + i, "question": f"Olympiad problem {i}",
                           "final_answer": [f"${i}^{{n}}$"], "context": None,
                           "difficulty": "Competition", "solution": ["Long."]} for i in range(674)],
        "deepmath": [{"question": f"DeepMath problem {i}", "difficulty": i % 19 / 2 + 0.5,
                      "final_answer": str(i), "r1_solution_1": "Okay, so I need to ..."}
                     for i in range(DEEPMATH)]}
    rows["aime25"][17]["problem"] = "\\prod \frac{a}{b} in \triangle ABC"  # Python's \f and \t
    rows["olympiadbench"][0]["final_answer"] = ["$1$", "$-1$"]
    rows["olympiadbench"][1]["context"] = "Let $T=5$."
    rows["deepmath"][3]["question"] = "AIME  problem\n$7$."  # a benchmark's, in another spelling
    rows["deepmath"][5]["final_answer"] = " "
    rows["deepmath"][6]["question"] = ""
    return rows


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """(folder with raw rows, output directory of two runs, output of the second). The first is
    killed while it writes DeepMath. The second finds one that was written without benchmarks."""
    folder = tmp_path_factory.mktemp("raw")
    for name, rows in raw_rows().items():
        write_rows(folder / f"{name}.jsonl", rows)
    out = folder / "out"
    command = [*COMMAND, "--from", folder, "--out", out]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=REPO, env=ENVIRONMENT)
    while killed.poll() is None and not (out / "deepmath.jsonl.tmp").exists():
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (out / "deepmath.jsonl").exists()
    write_rows(out / "deepmath.jsonl", [{"problem": "AIME problem 7"}])
    return folder, out, prepare("--from", folder, "--out", out)


@shared
def test_the_real_benchmarks_come_out_whole_and_load_in_bcr(tmp_path):
    """Problems or golds change or are lost between the published files and bcr.py."""
    names = [path.stem for path in SHARED.glob("*.jsonl")]
    prepare(*names, "--from", SHARED, "--out", tmp_path)
    for name in names:
        raw = lines_of(SHARED / f"{name}.jsonl")
        rows = lines_of(tmp_path / f"{name}.jsonl")
        assert len(rows) == len(raw) == len(load_problems(tmp_path / f"{name}.jsonl"))
        for before, row in zip(raw, rows):
            assert list(row) == FIELDS and row["id"] == before["id"]
            assert row["problem"] == before["problem"].strip() and "$$" not in row["answer"]
            assert answers_equal(row["answer"], before["answer"])
            assert answers_equal(before["answer"], row["answer"])
            assert row["difficulty"] == before.get("level", 0)


def test_the_shapes_of_the_hub_become_one_schema(raw):
    """A gold keeps the form of its source (27.0, a list, dollars), or the licence is not named."""
    _, out, printed = raw
    rows = {name: lines_of(out / f"{name}.jsonl") for name in SIX}
    assert rows["aime25"][17]["problem"] == r"\prod \frac{a}{b} in \triangle ABC"
    assert list(rows["amc23"][27].values()) == ["amc23/27", "AMC problem 27", "27", 0, "amc23"]
    assert rows["minerva"][3]["answer"] == "3.5e33"
    assert list(rows["math500"][8].values()) == [
        "math500/test/algebra/8.json", "MATH problem 8", r"\frac{8}{7}", 4, "math500"]
    olympiad = rows["olympiadbench"]
    assert olympiad[0]["id"] == "olympiadbench/1606" and olympiad[0]["answer"] == "$1$, $-1$"
    assert olympiad[1]["problem"] == "Let $T=5$.\nOlympiad problem 1"
    assert olympiad[1]["answer"] == "1^{n}"
    for line in ("minerva.jsonl +272 +CC BY-NC-SA 4.0", "amc23.jsonl +40 +MAA",
                 "math500.jsonl +500 +MIT", "deepmath.jsonl +103,019 +MIT"):
        assert re.search(line, printed)


def test_deepmath_is_kept_apart_from_the_benchmarks_and_says_what_it_leaves_out(raw):
    """The model is trained on test problems, or ids change if a problem is left out."""
    _, out, printed = raw
    rows = lines_of(out / "deepmath.jsonl")
    assert "shares problems with a benchmark: written again" in printed
    for fault in ("found in a benchmark", "without a gold answer", "without a text"):
        assert f"left out 1 {fault}" in printed
    assert len(rows) == DEEPMATH - 3
    assert [row["id"] for row in rows[:4]] == [f"deepmath/{i}" for i in (0, 1, 2, 4)]
    assert rows[2]["difficulty"] == 1.5


def test_a_killed_run_continues_and_finished_files_are_kept(raw):
    """A part of the training set counts as all of it, or finished files are written again."""
    _, out, printed = raw
    assert {path.name for path in out.iterdir()} == {f"{name}.jsonl" for name in SIX}
    assert printed.count("is kept") == 5


def test_golds_inside_solutions_are_found(tmp_path):
    """Golds at the end of a solution (AIME 2024, GSM8K, Minerva's first form) are missed."""
    minerva = {"problem": "?", "solution": r"Not \boxed{1} but $\boxed{\frac{5}{3}}$."}
    write_rows(tmp_path / "minerva.jsonl", [minerva] * 272)
    gsm8k = [{"question": "?", "answer": f"2*3=<<2*3=6>>6.\n#### {i:,}"} for i in range(1319)]
    write_rows(tmp_path / "gsm8k_test.jsonl", gsm8k)
    aime = [{"problem": "?", "solution": rf"\boxed{{{i:03}}}"} for i in range(30)]
    (tmp_path / "aime24.json").write_text(json.dumps(aime, indent=1))  # a list, not lines
    prepare("minerva", "aime24", "gsm8k_test", "--from", tmp_path, "--out", tmp_path / "out")
    assert lines_of(tmp_path / "out/minerva.jsonl")[5]["answer"] == r"\frac{5}{3}"
    assert lines_of(tmp_path / "out/aime24.jsonl")[25]["answer"] == "25"  # not 025
    assert lines_of(tmp_path / "out/gsm8k_test.jsonl")[1318]["answer"] == "1318"  # not 1,318


def test_user_errors_are_one_sentence(tmp_path):
    """A traceback, or a message that does not name what to fix; a file that is not complete."""
    run = ("--from", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown benchmark 'aime52': known are aime25, amc23"):
        prepare("aime52", *run)
    with pytest.raises(ValueError, match=r"has no amc23\.jsonl"):
        prepare("amc23", *run)
    with pytest.raises(ValueError, match="cannot load math-ai/aime24 .* --from DIR"):
        prepare("aime24", "--out", tmp_path / "out", HF_HOME=str(tmp_path))
    rows = raw_rows()["aime25"]
    for bad, message in (([*rows[:29], rows[29] | {"answer": "x"}], "without a gold .* aime25/29"),
                         (rows[:29], "has 29 problems, but aime25 has 30")):
        write_rows(tmp_path / "aime25.jsonl", bad)
        with pytest.raises(ValueError, match=message):
            prepare("aime25", *run)
    assert not list((tmp_path / "out").iterdir())


def test_parquet_and_the_hub_give_the_same_files(raw, tmp_path):
    """The repository, configuration, split or column is wrong, or parquet gives other problems. The
    package `datasets` takes a folder with a repository's name for the repository."""
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet

    for name, repo, config, split in (
            ("aime25", "math-ai/aime25", "default", "test"),
            ("olympiadbench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
            ("deepmath", "zwhe99/DeepMath-103K", "default", "train")):
        path = tmp_path / repo / f"{name}.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(Table.from_pylist(raw_rows()[name]), path)
        (path.parent / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n"
            f"    path: {path.name}\n---\n")
        prepare(name, "--out", tmp_path / "hub", cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
        made = (tmp_path / f"hub/{name}.jsonl").read_bytes()
        assert made == (raw[1] / f"{name}.jsonl").read_bytes()
    prepare("aime25", "--force", "--from", tmp_path / "math-ai/aime25", "--out", tmp_path / "hub")
    made = (tmp_path / "hub/aime25.jsonl").read_bytes()
    assert made == (raw[1] / "aime25.jsonl").read_bytes()
