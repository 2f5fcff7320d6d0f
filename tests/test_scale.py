"""The arithmetic of bench_scale.py, on numbers that can be checked by hand."""

import pytest

from bench_scale import bytes_replicated, bytes_sharded, step_on_paper


def test_bytes_sent_in_a_step():
    """README's table of what goes over the network, wrong by a factor."""
    assert bytes_replicated(1, 100) == 0
    assert bytes_replicated(2, 100) == 400  # half to the other, and half back
    assert bytes_replicated(8, 100) == pytest.approx(2 * 400 * 7 / 8)
    # To sample, the pass without gradient, and one pass each of completions and prompts: 100 weights 2 + 2 * 2
    # times, of the 20 beside the layers 2 + 2 - 1 times; gradients twice.
    assert bytes_sharded(2, 80, 20, 1, 1, 4) == (4 * (80 * 6 + 20 * 3) + 2 * 400) / 2


def test_a_step_on_paper():
    """A table of GPUs that no formula stands behind."""
    t = step_on_paper("4B", "H100", 8)
    assert t["held"] == pytest.approx(2 * 4.02e9 + 12 * 4.02e9 / 8) and t["rows"] == 32 and t["waves"] == 1
    cache = 4 * 36 * 8 * 128 * 5000 * 32  # 32 rows, on average 1,000 + 4,000 tokens long
    assert t["sampling"] == pytest.approx(8000 * (2 * 4.02e9 + cache) / (0.4 * 3.35e12))
    assert step_on_paper("4B", "H100", 64)["sampling"] > t["floor"]
    assert step_on_paper("32B", "H100", 64)["rows"] == 0  # weights gathered on one GPU leave no room
    assert step_on_paper("4B", "H100", 64)["step"] > t["step"] / 3  # eight times the GPUs, not a third of the time
