"""data/prepare.py, run as a user runs it: subprocesses, the real files if they are present, and made-up rows
with the columns of the Hub's datasets. A small local server takes the place of the Hub."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

from conftest import REPO, lines_of as made
from data.problems import load_problems
from reward import answers_equal

SHARED = REPO.parent / "shared" / "benchmarks"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real benchmark files are not present")
FIELDS = ["id", "problem", "answer", "difficulty", "source"]
COMMAND = [sys.executable, str(REPO / "data" / "prepare.py")]
DEEPMATH = 103022
SIX = ("aime25", "amc23", "minerva", "math500", "olympiadbench", "deepmath")


def prepare(*args, env=(), **kwargs):
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, env=os.environ | dict(env), **kwargs)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def raw_rows(name):
    """Rows with the columns that the dataset on the Hub has."""
    of = {
        "aime25": (30, lambda i: {"problem": f"AIME problem {i}", "answer": str(i), "id": str(i)}),
        "aime24": (30, lambda i: {"id": 60 + i, "problem": f"Older AIME problem {i}",
                                  "url": "https://example.org", "solution": f"\\boxed{{{i:03}}}"}),
        "amc23": (40, lambda i: {"id": i, "question": f"AMC problem {i}", "answer": float(i), "url": ""}),
        "minerva": (272, lambda i: {"question": f"Minerva problem {i}", "answer": f"{i}.5e33"}),
        "math500": (500, lambda i: {"problem": f"MATH problem {i}", "solution": "We see \\boxed{7}.",
                                    "answer": f"\\frac{{{i}}}{{7}}", "subject": "Algebra", "level": i % 5 + 1,
                                    "unique_id": f"test/algebra/{i}.json"}),
        "olympiadbench": (674, lambda i: {"id": 1606 + i, "question": f"Olympiad problem {i}",
                                          "final_answer": [f"${i}^{{n}}$"] if i else ["$1$", "$-1$"],
                                          "context": "Let $T=5$." if i == 1 else None, "unit": None,
                                          "difficulty": "Competition", "solution": ["Long."]}),
        "gsm8k_test": (1319, lambda i: {"question": f"School problem {i}",
                                        "answer": f"One has 2*{i}=<<2*{i}={2 * i}>>{2 * i}.\n#### {i:,}"}),
        "deepmath": (DEEPMATH, lambda i: {"question": f"DeepMath problem {i}", "difficulty": i % 19 / 2 + 0.5,
                                          "final_answer": str(i) if i > 9 else f"$\\frac{{{i}}}{{7}}$",
                                          "topic": "Mathematics", "r1_solution_1": "Okay, so I need to ..."}),
    }
    count, row = of[name]
    rows = [row(i) for i in range(count)]
    if name == "deepmath":
        rows[3]["question"] = "AIME  problem\n$7$."  # a benchmark's, in another spelling
        rows[5]["final_answer"], rows[6]["question"], rows[7]["difficulty"] = " ", "", -1.0
    return rows


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """(folder with raw rows of the six default names, output directory of two runs, its files between
    them, the second run). The first run is killed while it writes DeepMath; the second one finds a
    DeepMath file that was written without the benchmarks."""
    folder = tmp_path_factory.mktemp("raw")
    for name in SIX:
        write_rows(folder / f"{name}.jsonl", raw_rows(name))
    out = folder / "out"
    killed = subprocess.Popen([*COMMAND, "--from", folder, "--out", out], stdout=subprocess.DEVNULL)
    while killed.poll() is None and not (out / "deepmath.jsonl.tmp").exists():
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    between = {path.name: path.stat() for path in out.iterdir()}
    write_rows(out / "deepmath.jsonl", [
        {"id": f"deepmath/{i}", "problem": "AIME problem 7" if i == 7 else f"Another DeepMath problem {i}",
         "answer": "1", "difficulty": 5.0, "source": "deepmath"} for i in range(DEEPMATH)])
    done = prepare("--from", folder, "--out", out)
    assert done.returncode == 0, done.stderr
    return folder, out, between, done


# ----------------------------------------------------------------------------------------------
# What comes out


@shared
def test_the_real_benchmarks_come_out_whole_and_load_in_bcr(tmp_path):
    """Problems or golds change or are lost between the published files and bcr.py."""
    done = prepare("--from", SHARED, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "deepmath: not in" in done.stdout  # there is no copy of it
    assert prepare("aime24", "gsm8k", "--from", SHARED, "--out", tmp_path).returncode == 0
    counts = {"aime25": 30, "amc23": 40, "minerva": 272, "math500": 500, "olympiadbench": 675, "aime24": 30,
              "gsm8k_train": 7473, "gsm8k_test": 1319}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in counts)
    for name, count in counts.items():
        raw, rows = made(SHARED / f"{name}.jsonl"), made(tmp_path / f"{name}.jsonl")
        assert len(rows) == count == len({row["id"] for row in rows})
        assert len(load_problems(tmp_path / f"{name}.jsonl")) == count
        for before, row in zip(raw, rows):
            assert list(row) == FIELDS and row["source"] == name.split("_")[0] and row["id"] == before["id"]
            assert row["problem"] == before["problem"].strip() and "$$" not in row["answer"]
            assert answers_equal(row["answer"], before["answer"])
            assert answers_equal(before["answer"], row["answer"])
            assert row["difficulty"] == before.get("level", 0)


def test_the_shapes_of_the_hub_become_one_schema(raw):
    """A gold keeps the form of its source (27.0, a list, dollars) or comes from the wrong column."""
    folder, out, _, done = raw
    first = {name: made(out / f"{name}.jsonl") for name in SIX}
    assert all(list(row) == FIELDS for rows in first.values() for row in rows)
    assert first["amc23"][27] == {
        "id": "amc23/27", "problem": "AMC problem 27", "answer": "27", "difficulty": 0, "source": "amc23"}
    assert first["minerva"][3]["answer"] == "3.5e33" and first["minerva"][3]["id"] == "minerva/3"
    assert first["math500"][8] == {"id": "math500/test/algebra/8.json", "problem": "MATH problem 8",
                                   "answer": r"\frac{8}{7}", "difficulty": 4, "source": "math500"}
    olympiad = first["olympiadbench"]
    assert olympiad[0]["answer"] == "$1$, $-1$" and olympiad[0]["id"] == "olympiadbench/1606"
    assert olympiad[1]["answer"] == "1^{n}" and olympiad[673]["answer"] == "673^{n}"
    assert olympiad[1]["problem"] == "Let $T=5$.\nOlympiad problem 1" and olympiad[1]["difficulty"] == 0
    table = done.stdout[done.stdout.index("file "):]
    assert re.search(rf"deepmath\.jsonl +103,019 +MIT +{re.escape(str(folder))}", table)
    for expected in (
            "minerva.jsonl +272 +CC BY-NC-SA 4.0", "amc23.jsonl +40 +MAA", "math500.jsonl +500 +MIT"):
        assert re.search(f"{expected}.* kept", table)


def test_deepmath_is_kept_apart_from_the_benchmarks_and_says_what_it_leaves_out(raw):
    """The model is trained on test problems, ids change if a problem is left out, or that is not reported."""
    _, out, _, done = raw
    rows = made(out / "deepmath.jsonl")
    assert "103,019 problems; left out: 1 found in a benchmark" in done.stdout
    assert "1 without a gold answer that can be read" in done.stdout and "1 without a text" in done.stdout
    assert [row["id"] for row in rows[:5]] == [f"deepmath/{i}" for i in (0, 1, 2, 4, 7)]
    assert len(rows) == DEEPMATH - 3 and rows[2]["answer"] == r"\frac{2}{7}"
    assert rows[2]["difficulty"] == 1.5 and rows[4]["difficulty"] == -1
    assert list(rows[0]) == FIELDS and rows[0]["source"] == "deepmath"


def test_golds_inside_solutions_are_found(tmp_path):
    """Golds at the end of a solution (AIME 2024, GSM8K, Minerva's first form) are missed."""
    minerva = [{"problem": f"Minerva {i}", "solution": rf"Not \boxed{{1}} but $\boxed{{\frac{{{i}}}{{3}}}}$."}
               for i in range(272)]
    write_rows(tmp_path / "minerva.jsonl", minerva)
    (tmp_path / "aime24.json").write_text(json.dumps(raw_rows("aime24"), indent=1))  # a list, not lines
    write_rows(tmp_path / "gsm8k_test.jsonl", raw_rows("gsm8k_test"))
    done = prepare("minerva", "aime24", "gsm8k_test", "--from", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    answers = {name: [row["answer"] for row in made(tmp_path / "out" / f"{name}.jsonl")]
               for name in ("minerva", "aime24", "gsm8k_test")}
    assert answers["minerva"][5] == r"\frac{5}{3}"
    assert answers["aime24"] == [str(i) for i in range(30)]  # \boxed{025} is 25
    assert answers["gsm8k_test"] == [str(i) for i in range(1319)]  # 1,318 is 1318


def test_escapes_that_json_swallowed_come_back(tmp_path):
    """A copy of AIME 2025 has a form feed in place of the \\f of \\frac, and the model reads "rac{m}{n}"."""
    rows = raw_rows("aime25")
    rows[17]["problem"] = "\\prod \frac{a}{b} in \triangle ABC, \times\theta"  # Python's escapes, not LaTeX
    write_rows(tmp_path / "aime25.jsonl", rows)
    assert prepare("aime25", "--from", tmp_path, "--out", tmp_path / "out").returncode == 0
    problem = made(tmp_path / "out" / "aime25.jsonl")[17]["problem"]
    assert problem == r"\prod \frac{a}{b} in \triangle ABC, \times\theta"


# ----------------------------------------------------------------------------------------------
# Interrupted runs and damaged files


def test_finished_files_are_kept_and_others_are_written_again(tmp_path):
    """Files are written twice, or a truncated, changed or foreign file counts as a benchmark."""
    write_rows(tmp_path / "aime25.jsonl", raw_rows("aime25"))
    path = tmp_path / "out" / "aime25.jsonl"
    run = partial(prepare, "aime25", "--from", tmp_path, "--out", path.parent)
    run()
    good, before = path.read_bytes(), path.stat()
    assert "valid, and is kept" in run().stdout and path.stat().st_mtime_ns == before.st_mtime_ns
    assert "valid, and is kept" not in run("--force").stdout and path.stat().st_mtime_ns != before.st_mtime_ns
    assert path.read_bytes() == good
    lines = good.splitlines(keepends=True)
    for damaged in (good[:-9], b"".join(lines[:-1]), lines[0] + good[: -len(lines[-1])], b"",
                    good.replace(b'"answer": "4"', b'"answer": ""'), good.replace(b"aime25/4", b"aime24/4"),
                    good.replace(b', "difficulty": 0.0', b"", 1), good.replace(b"0.0", b'"hard"', 1)):
        assert damaged != good
        path.write_bytes(damaged)
        done = run()
        assert done.returncode == 0 and "written again" in done.stdout and path.read_bytes() == good


def test_a_deepmath_file_with_a_benchmarks_problem_is_not_kept(raw):
    """A DeepMath file of an earlier run is kept, although it has a problem of a later benchmark file."""
    _, out, _, done = raw
    assert re.search("deepmath.jsonl is .* shares problems with a benchmark: written again", done.stdout)
    assert "Another DeepMath problem" not in (out / "deepmath.jsonl").read_text()


def test_a_killed_run_leaves_no_partial_file_and_the_next_one_continues(raw):
    """A part of the training set counts as all of it, or finished files are written again."""
    _, out, between, done = raw
    assert set(between) == {f"{name}.jsonl" for name in SIX[:5]} | {"deepmath.jsonl.tmp"}
    assert {path.name for path in out.iterdir()} == {f"{name}.jsonl" for name in SIX}
    for name in SIX[:5]:
        assert f"{name}.jsonl is complete and valid, and is kept" in done.stdout
        assert (out / f"{name}.jsonl").stat().st_mtime_ns == between[f"{name}.jsonl"].st_mtime_ns


@pytest.mark.parametrize("accident", ["a full disk", "a bad gold", "a missing row"])
def test_a_failing_run_does_not_damage_what_is_there(tmp_path, accident):
    """A good file is lost because its new version is wrong or cannot be written."""
    rows = raw_rows("math500")
    write_rows(tmp_path / "math500.jsonl", rows)
    run = partial(prepare, "math500", "--force", "--from", tmp_path, "--out", tmp_path / "out")
    run()
    good = (tmp_path / "out" / "math500.jsonl").read_bytes()
    if accident == "a bad gold":
        rows[400]["answer"] = rows[400]["solution"] = "  "
    write_rows(tmp_path / "math500.jsonl", rows[1:] if accident == "a missing row" else rows)
    limit = 20000 if accident == "a full disk" else resource.RLIM_INFINITY
    done = run(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    check_error(done, {
        "a full disk": "cannot write", "a missing row": "has 499 problems, but math500 has 500",
        "a bad gold": "without a gold answer that can be read: math500/test/algebra/400.json"}[accident])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["math500.jsonl"]
    assert (tmp_path / "out" / "math500.jsonl").read_bytes() == good


# ----------------------------------------------------------------------------------------------
# Errors that a user can fix


def check_error(done, *parts):
    """One sentence that has all these parts, exit status 2, no traceback."""
    assert done.returncode == 2 and done.stderr.startswith("prepare.py: error: "), done.stderr
    assert done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts), done.stderr


def test_user_errors_are_one_sentence(tmp_path):
    """A traceback, or a message that does not name what to fix."""
    out = ("--out", tmp_path / "out")
    run = partial(prepare, "--from", tmp_path, *out)
    check_error(prepare("aime25", "aime52", *out), "'aime52'", "aime25, amc23, minerva", "deepmath")
    check_error(prepare("--from", tmp_path / "nowhere", *out), "nowhere is not a directory")
    check_error(run(), "has no aime25.jsonl")
    check_error(run("amc23"), "has no amc23.jsonl")
    rows = raw_rows("aime25")
    write_rows(tmp_path / "aime25.jsonl", rows)
    check_error(run("aime25", "amc23"), "has no amc23.jsonl")  # before anything is made
    check_error(prepare("aime25", "--from", tmp_path, "--out", tmp_path / "aime25.jsonl"), "cannot make")
    bad = {
        "aime25.jsonl, line 3: not valid JSON": [json.dumps(row) for row in rows[:2]] + ['{"problem": '],
        "aime25.jsonl: entry 2 is not a JSON object": [json.dumps(rows[0]), "7"],
        "without a text: aime25/4": [json.dumps(row | {"problem": "x" * (row["id"] != "4")}) for row in rows],
        "without a gold answer that can be read: aime25/9, of the columns problem, answer, id":
            [json.dumps(row | {"answer": "x" if row["id"] == "9" else "1"}) for row in rows],
        "two problems with the id aime25/1": [json.dumps(row | {"id": "1"}) for row in rows],
    }
    for message, lines in bad.items():
        (tmp_path / "aime25.jsonl").write_text("\n".join(lines))
        check_error(run("aime25"), message)
    (tmp_path / "aime25.jsonl").write_bytes(b"\xff\xfe{}")
    check_error(run("aime25"), "aime25.jsonl is not UTF-8 text")
    assert not list((tmp_path / "out").iterdir())


def test_a_deepmath_file_of_other_columns_is_refused(tmp_path):
    """A hundred thousand problems are left out one by one, and the training set is empty."""
    write_rows(tmp_path / "deepmath.jsonl", [{"prompt": "What is 1 + 1?", "final_answer": "2"}] * DEEPMATH)
    done = prepare("deepmath", "--from", tmp_path, "--out", tmp_path / "out")
    check_error(done, "too many problems to leave out", "without a text", "columns prompt, final_answer")


def test_without_datasets_or_without_a_network_one_sentence_says_so(tmp_path):
    """A library's traceback, without a hint of pip install or --from."""
    (tmp_path / "stub").mkdir()
    env = {"PYTHONPATH": str(tmp_path / "stub")}
    for package in ("datasets", "pyarrow"):
        (tmp_path / "stub" / f"{package}.py").write_text("raise ImportError")
    check_error(prepare("aime25", "--out", tmp_path, env=env), "pip install datasets", "--from DIR")
    (tmp_path / "aime25.parquet").write_bytes(b"PAR1")
    check_error(prepare("aime25", "--from", tmp_path, "--out", tmp_path, env=env), "pip install datasets")
    (tmp_path / "stub" / "datasets.py").write_text(
        "def load_dataset(*args, **kwargs):\n    raise ConnectionError('no route\\nsecond line')\n")
    check_error(prepare("aime25", "--out", tmp_path, env=env), "math-ai/aime25", "no route", "--from DIR")


# ----------------------------------------------------------------------------------------------
# Parquet and the Hub, with the real package `datasets`


def write_parquet(path, rows):
    from pyarrow import Table, parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(Table.from_pylist(rows), path)


def test_local_parquet_gives_the_same_files(raw, tmp_path):
    """Parquet files, one or several in a folder, give other problems than JSON lines."""
    pytest.importorskip("datasets")
    rows = raw_rows("math500")
    write_parquet(tmp_path / "math500" / "test-00000-of-00002.parquet", rows[:300])
    write_parquet(tmp_path / "math500" / "test-00001-of-00002.parquet", rows[300:])
    for name in ("aime25", "amc23", "minerva", "olympiadbench"):
        write_parquet(tmp_path / f"{name}.parquet", raw_rows(name))
    done = prepare("--from", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for name in SIX[:5]:
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (raw[1] / f"{name}.jsonl").read_bytes()
    (tmp_path / "aime24.parquet").write_bytes(b"PAR1 this is none")
    done = prepare("aime24", "--from", tmp_path, "--out", tmp_path / "out")
    check_error(done, "cannot read", "aime24.parquet")


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that `datasets` uses: revisions, trees and files of repositories in `root`."""
    root = None

    def do_GET(self):
        path, commit = unquote(urlparse(self.path).path), "a" * 40
        repo = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(resolve|revision|tree)/[^/]+/?(.*))?$", path)
        base = self.root / repo[1] if repo else None
        if not repo or not base.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo[2] == "resolve":
            if not (base / repo[3]).is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            data = (base / repo[3]).read_bytes()
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(200, data, {"ETag": etag, "X-Repo-Commit": commit})
        content = {"id": repo[1], "sha": commit, "private": False, "disabled": False, "gated": False,
                   "tags": [], "downloads": 0, "likes": 0, "siblings": []}
        if repo[2] == "tree":
            content = [{"type": "directory" if p.is_dir() else "file", "oid": "b" * 40,
                        "size": p.stat().st_size, "path": str(p.relative_to(base))}
                       for p in sorted((base / repo[3]).glob("*"))]
            if not content:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def answer(self, status, data, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def card(split, path, config="default"):
    return (f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n"
            f"    path: {path}\n---\n")


def test_the_hub_gives_the_same_files(raw, tmp_path):
    """The repository, configuration, split or column is wrong, and the Hub gives other problems."""
    pytest.importorskip("datasets")
    Hub.root = hub = tmp_path / "hub"
    for name, repo in {"aime25": "math-ai/aime25", "minerva": "math-ai/minervamath",
                       "math500": "HuggingFaceH4/MATH-500"}.items():
        write_rows(hub / repo / "test.jsonl", raw_rows(name))
        (hub / repo / "README.md").write_text(card("test", "test*"))
    write_parquet(hub / "math-ai/amc23/test-00000-of-00001.parquet", raw_rows("amc23"))
    write_parquet(hub / "zwhe99/DeepMath-103K/data/train-00000-of-00001.parquet", raw_rows("deepmath"))
    (hub / "zwhe99/DeepMath-103K/README.md").write_text(card("train", "data/train-*"))
    olympiad = "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"
    write_parquet(hub / "Hothan/OlympiadBench" / olympiad, raw_rows("olympiadbench"))
    (hub / "Hothan/OlympiadBench/README.md").write_text(card("train", olympiad, "OE_TO_maths_en_COMP"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        done = prepare("--out", tmp_path / "out", env=env)
        assert done.returncode == 0, done.stderr
        for path in raw[1].iterdir():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert re.search(r"math500.jsonl +500 +MIT +HuggingFaceH4/MATH-500", done.stdout)
        check_error(prepare("aime24", "--out", tmp_path / "out", env=env), "cannot load math-ai/aime24")
    finally:
        server.shutdown()
        server.server_close()
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    check_error(prepare("aime24", "--out", tmp_path / "out", env=env), "math-ai/aime24", "--from DIR")
