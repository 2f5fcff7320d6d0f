"""The report about a GPU (cuda_report.py), rehearsed on a CPU."""

import json
import subprocess
import sys

import cuda_report

from conftest import REPO


def test_every_part_is_rehearsed(tmp_path):
    """A part of the report fails on a machine with a GPU because what it calls has changed."""
    out = tmp_path / "report.json"
    command = [sys.executable, "tests/slow/cuda_report.py", "--rehearse", "--out", out]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    parts = json.loads(out.read_text())
    assert [part["part"] for part in parts] == [part.__name__ for part in cuda_report.PARTS]
    assert {part["part"]: part["result"] for part in parts if part["result"] != "rehearsed"} == {}
    assert done.returncode == 0 and all(part["cases"] for part in parts)
    assert done.stdout.count("| **rehearsed** |") == len(parts)


def test_a_part_that_fails_is_reported(capsys):
    """A part that raises ends the report, or goes unnoticed."""

    def parity(s):
        yield "tokens", {"equal": 0.5}
        raise AssertionError("the tokens are not those of the CPU")

    found = cuda_report.report(parity, cuda_report.FULL)
    assert found["cases"] == {"tokens": {"equal": 0.5}}
    assert found["result"] == "FAILS: AssertionError: the tokens are not those of the CPU"
    assert found["result"] in capsys.readouterr().out
