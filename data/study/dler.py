"""
The advantages of DLER (arXiv 2510.15110): those of bcr.py, divided by their standard deviation over
all completions of the step instead of over a group. With a hard cap at N = 1 it is the strongest
way that we know of training with truncation alone. Like credit_togo.py it replaces one function of
bcr.py, and takes all of its flags.

    python -m data.study.dler --n 1 --budget 45
"""

import numpy as np

import bcr


def token_advantages(rollout, chat, s):
    """Replaces bcr.token_advantages. Returns R arrays (T,).

    A_g = (r_g - mean over the group of r) / std over the step of (r - mean over the group of r).
    Source: DLER, batch-wise reward normalization, which is REINFORCE++ with a baseline for each
    prompt (arXiv 2501.03262)."""
    advantages = bcr.group_advantages(rollout.rewards)  # (P, G)
    advantages /= advantages.std() + 1e-6
    return [np.full(len(c.tokens), a) for c, a in zip(rollout.completions, advantages.flat)]


if __name__ in ("__main__", "__mp_main__"):  # the second is its name in processes that it starts
    bcr.token_advantages = token_advantages
if __name__ == "__main__":
    bcr.main()
