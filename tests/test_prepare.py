"""data/prepare.py: the real files if they are present, and made-up rows with the columns of the
Hub's datasets."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import REPO, lines_of, status_of
from data import prepare
from data.files import write_json, write_lines
from data.problems import load_problems
from reward import answers_equal

SHARED = REPO.parent / "shared/benchmarks"
DEEPMATH = prepare.BENCHMARKS["deepmath"]._replace(counts=(100,))  # of 103,022
SMALLER = f"from data import prepare; prepare.BENCHMARKS['deepmath'] = prepare.{DEEPMATH}"


@pytest.fixture(scope="module", autouse=True)
def a_smaller_training_set():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.BENCHMARKS, "deepmath", DEEPMATH)
        yield


def raw_rows():
    """{name: rows with the columns that the dataset on the Hub has}"""
    rows = {
        "aime25": [{"problem": f"AIME problem {i}", "answer": str(i), "id": str(i)}
                   for i in range(30)],
        "amc23": [{"id": i, "question": f"AMC problem {i}", "answer": float(i)} for i in range(40)],
        "math500": [{"problem": f"MATH problem {i}", "answer": rf"\frac{{{i}}}{{7}}",
                     "level": i % 5 + 1, "unique_id": f"test/{i}.json"} for i in range(500)],
        "olympiadbench": [{"id": 1606 + i, "question": f"Olympiad problem {i}",
                           "final_answer": [f"${i}^{{n}}$"], "context": None} for i in range(674)],
        "deepmath": [{"question": f"DeepMath problem {i}", "difficulty": i % 19 / 2 + 0.5,
                      "final_answer": str(i), "r1_solution_1": "Okay, so I need to ..."}
                     for i in range(100)]}
    rows["aime25"][17]["problem"] = "\\prod \frac{a}{b} in \triangle ABC"  # Python's \f and \t
    rows["olympiadbench"][0]["final_answer"] = ["$1$", "$-1$"]
    rows["olympiadbench"][1]["context"] = "Let $T=5$."
    rows["deepmath"][3]["question"] = "AIME  problem\n$7$."  # a benchmark's, in another spelling
    rows["deepmath"][5]["final_answer"] = " "
    rows["deepmath"][6]["question"] = ""
    return rows


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """(output directory, what the second run printed). It keeps a benchmark, and replaces a
    training set that was written without the benchmarks."""
    folder = tmp_path_factory.mktemp("raw")
    for name, rows in raw_rows().items():
        write_lines(folder / f"{name}.jsonl", rows)
    flags = ["--from", folder, "--out", folder / "out"]
    assert status_of(prepare.main, "aime25", *flags) == 0
    write_lines(folder / "out/deepmath.jsonl", [{"problem": "AIME problem 7"}])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert status_of(prepare.main, *flags) == 0
    return folder / "out", printed.getvalue()


def test_the_shapes_of_the_hub_become_one_schema(raw):
    """A gold keeps the form of its source (27.0, a list, dollars); the model is trained on test
    problems; ids change if a problem is left out; finished files are written again; or the licence
    is not named."""
    out, printed = raw
    rows = {name: lines_of(out / f"{name}.jsonl") for name in raw_rows()}
    assert rows["aime25"][17]["problem"] == r"\prod \frac{a}{b} in \triangle ABC"
    assert list(rows["amc23"][27].values()) == ["amc23/27", "AMC problem 27", "27", 0, "amc23"]
    assert list(rows["math500"][8].values()) == [
        "math500/test/8.json", "MATH problem 8", r"\frac{8}{7}", 4, "math500"]
    olympiad = rows["olympiadbench"]
    assert olympiad[0]["id"] == "olympiadbench/1606" and olympiad[0]["answer"] == "$1$, $-1$"
    assert olympiad[1]["problem"] == "Let $T=5$.\nOlympiad problem 1"
    assert olympiad[1]["answer"] == "1^{n}"
    deepmath = rows["deepmath"]
    assert [row["id"] for row in deepmath[:4]] == [f"deepmath/{i}" for i in (0, 1, 2, 4)]
    assert len(deepmath) == 97 and deepmath[2]["difficulty"] == 1.5
    assert "minerva: not in" in printed and printed.count("is kept") == 1
    assert "shares problems with a benchmark: written again" in printed
    for fault in ("found in a benchmark", "without a gold answer", "without a text"):
        assert f"left out 1 {fault}" in printed
    assert re.search("math500.jsonl +500 +MIT", printed)


@pytest.mark.skipif(not SHARED.is_dir(), reason="there are no real benchmark files")
def test_the_real_benchmarks_come_out_whole_and_load_in_bcr(tmp_path):
    """Problems or golds change or are lost between the published files and bcr.py."""
    names = [path.stem for path in SHARED.glob("*.jsonl")]
    assert status_of(prepare.main, *names, "--from", SHARED, "--out", tmp_path) == 0
    for name in names:
        rows = load_problems(tmp_path / f"{name}.jsonl")
        for before, row in zip(lines_of(SHARED / f"{name}.jsonl"), rows, strict=True):
            assert row["id"] == before["id"] and row["problem"] == before["problem"].strip()
            assert answers_equal(row["answer"], before["answer"]) and "$$" not in row["answer"]
            assert row["difficulty"] == before.get("level", 0)


@pytest.mark.parametrize("name, count, row, gold", [
    ("minerva", 272, {"solution": r"Not \boxed{1} but $\boxed{\frac{5}{3}}$."}, r"\frac{5}{3}"),
    ("gsm8k_test", 1319, {"answer": "2*3=<<2*3=6>>6.\n#### 1,318"}, "1318"),
    ("aime24", 30, {"solution": r"\boxed{025}"}, "25")])
def test_golds_inside_solutions_are_found(tmp_path, name, count, row, gold):
    """Golds at the end of a solution are missed."""
    write_json(tmp_path / f"{name}.json", [{"problem": "?"} | row] * count)  # a list, not lines
    assert status_of(prepare.main, name, "--from", tmp_path, "--out", tmp_path / "out") == 0
    assert lines_of(tmp_path / f"out/{name}.jsonl")[5]["answer"] == gold


def test_mistakes_are_one_sentence_with_status_2(tmp_path, capsys):
    """A traceback, a message that does not name what to fix, or a file that is not complete."""
    rows = raw_rows()["aime25"]
    write_lines(tmp_path / "aime25.jsonl", [*rows[:29], rows[29] | {"answer": "x"}])
    write_lines(tmp_path / "amc23.jsonl", rows)
    for name, message in (("aime52", "unknown benchmark 'aime52': known are aime25, amc23"),
                          ("aime24", "has no aime24.jsonl"),
                          ("aime25", "without a gold answer that can be read: aime25/29"),
                          ("amc23", "has 30 problems, but amc23 has 40")):
        flags = [name, "--from", tmp_path, "--out", tmp_path / "out"]
        assert status_of(prepare.main, *flags) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_the_hub_and_parquet_give_the_same_problems(raw, tmp_path):
    """A configuration, a split or a choice of columns does not reach the Hub, or parquet gives
    other problems. The package `datasets` takes a folder with a repository's name for the
    repository."""
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet

    names = ("olympiadbench", "deepmath")
    for name in names:
        repo, config, split, *_ = prepare.BENCHMARKS[name]
        folder = tmp_path / repo
        folder.mkdir(parents=True)
        parquet.write_table(Table.from_pylist(raw_rows()[name]), folder / f"{name}.parquet")
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n"
            f"  - split: {split}\n    path: {name}.parquet\n---\n")
    (tmp_path / "hub").mkdir()
    shutil.copy(raw[0] / "aime25.jsonl", tmp_path / "hub")
    environment = {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SMALLER + "; prepare.main()", *names, "--out", "hub"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | environment)
    assert status_of(prepare.main, "olympiadbench", "--from", tmp_path / "Hothan/OlympiadBench",
                     "--out", tmp_path / "parquet") == 0
    for folder, name in (("hub", names[0]), ("parquet", names[0]), ("hub", names[1])):
        assert lines_of(tmp_path / folder / f"{name}.jsonl") == lines_of(raw[0] / f"{name}.jsonl")
