"""Runs of bcr.py that are killed or stopped from outside: resumed, they end with the same bytes."""

import os
import random
import re
import signal
import time

import pytest

from conftest import QUICK, metrics_of, outcome, start, wait_for
from distributed import checkpoints


def groups_of(samples):
    return re.split(rb"(?m)^(?===== step )", samples)


def test_a_run_killed_again_and_again_ends_as_if_it_was_not(finished, tmp_path):
    """A kill -9 while sampling, training, evaluating or writing loses a step, repeats one or leaves half a
    file. BCR_KILLS=20 kills the run 20 times."""
    most, kills, out = int(os.environ.get("BCR_KILLS", "4")), 0, tmp_path / "out"
    rng = random.Random(most)
    while True:
        resume = ["--resume"] if (out / "settings.json").exists() else []
        process = start("bcr.py", *QUICK, "--out", out, *resume)
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


@pytest.mark.parametrize("number, line", [(signal.SIGINT, "step 1/"), (signal.SIGTERM, "step 3/")])
def test_a_stopped_run_saves_its_step_and_resumes(finished, tmp_path, number, line):
    """Ctrl-C or preemption loses up to --save-every steps, takes long, or ends in a traceback."""
    out = tmp_path / "out"
    process = start("bcr.py", *QUICK, "--save-every", 100, "--out", out)
    wait_for(line, process)
    clock = time.time()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and time.time() - clock < 10
    assert "--resume" in stderr and len(stderr.strip().splitlines()) == 1
    saved = metrics_of(out)[-1]["step"]
    assert [path.name for path in checkpoints(out)] == [f"checkpoint-{saved:06d}"]
    assert f"saved step {saved}" in stdout
    process = start("bcr.py", *QUICK, "--out", out, "--resume")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert f"resuming from step {saved} " in stdout
    (*ours, files), (*theirs, others) = outcome(out), outcome(finished[0])
    assert ours == theirs
    shown, expected = groups_of(files.pop("samples.txt")), groups_of(others.pop("samples.txt"))
    assert files == others
    extra = [group for group in shown if group not in expected]  # the step of the signal
    assert {shown[1], shown[-1]} <= set(expected) and len(extra) <= 1


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    """A step of minutes cannot be stopped. This one takes many seconds: it is neither finished nor saved."""
    process = start("bcr.py", *QUICK, "--groups", 300, "--out", tmp_path / "out")
    wait_for("before training, heldout, N = 4", process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    wait_for("stopping after this step", process)
    clock = time.time()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and time.time() - clock < 3
    assert "--resume" in stderr and "Traceback" not in stderr
    assert not checkpoints(tmp_path / "out") and not (tmp_path / "out/metrics.jsonl").exists()
