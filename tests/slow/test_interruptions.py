"""Runs of bcr.py that are killed or stopped from outside: resumed, they end with the same bytes."""

import os
import random
import signal
import time

import pytest

from conftest import QUICK, outcome, start, wait_for
from data.runs import checkpoints


def test_a_run_killed_again_and_again_ends_as_if_it_was_not(finished, tmp_path):
    """A kill -9 while sampling, training, evaluating or writing loses a step, repeats one or leaves
    half a file. BCR_KILLS=20 kills the run 20 times."""
    most, kills, out = int(os.environ.get("BCR_KILLS", "4")), 0, tmp_path / "out"
    rng = random.Random(most)
    while True:
        begun = (out / "settings.json").exists()
        process = start("bcr.py", *(["--resume", out] if begun else [*QUICK, "--out", out]))
        if kills < most:
            process.stdout.readline()  # the settings are written
            time.sleep(rng.random() * 2.5)
            if process.poll() is None:
                kills += 1
                process.kill()
                process.communicate()
                continue
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        break
    assert kills > 0
    assert outcome(out) == outcome(finished[0])
    assert len(checkpoints(out)) == 2 and not (out / "checkpoint.tmp").exists()


@pytest.mark.parametrize("processes, number", [(1, signal.SIGINT), (3, signal.SIGTERM)])
def test_a_stopped_run_says_how_to_go_on(finished, tmp_path, processes, number):
    """Ctrl-C or preemption ends in a traceback, in a message per process, or takes long. The
    terminal sends Ctrl-C to all processes, a scheduler SIGTERM to the first."""
    out = tmp_path / "out"
    process = start("bcr.py", *QUICK, "--processes", processes, "--out", out,
                    start_new_session=True)
    wait_for("step 3/", process)
    clock = time.time()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and time.time() - clock < 10
    assert "--resume" in stderr and len(stderr.strip().splitlines()) == 1
    process = start("bcr.py", "--resume", out)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming from step 2" in stdout, stderr
    assert outcome(out) == outcome(finished[0])
