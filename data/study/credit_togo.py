"""
Credit to go: BCR in which a token is credited only with the problems that it can still change. This
is a worked example of a fork: it replaces one function of bcr.py, `token_advantages`, and takes all
of its flags.

    python -m data.study.credit_togo --n 4 --budget 160
    torchrun --nproc-per-node 8 -m -- data.study.credit_togo --n 4 --out out/togo ...

The reward of a completion is r = 1/N sum_j c_j - penalty, where c_j is the mark of problem j. Let
i(t) be the problem in whose section token t stands. The gradient of E[r] is

    E[sum_t grad log pi(y_t) (r - b)]
        = E[sum_t grad log pi(y_t) (1/N sum_{j >= i(t)} c_j - penalty - b_i(t))].

The mark c_j of an earlier problem, j < i(t), is known before y_t is drawn, and the expectation of
grad log pi(y_t), given the tokens before y_t, is 0. The earlier marks therefore add only variance.
For the same reason each section can have its own baseline b_i. It is the mean over the group, as in
bcr.py; for the first section the two kinds of credit are equal.

The condition is that no later token changes an earlier mark. `section_starts` checks it. A
completion that fails the check keeps the credit of the complete answer. This is a small bias;
`unsure_share` measures how many completions it affects.
"""

from bisect import bisect_right

import numpy as np

import bcr
import reward
from data.chat import decode
from evaluate import load_reward


def section_starts(text, golds, score):
    """The offsets in `text` where the sections of problems 2, 3, ... start. None if the headers are
    not 1, 2, 3, ... in order, or if a later section changes the mark of an earlier problem."""
    headers = reward.find_headers(text)
    numbers = [number for number, _ in headers]
    if not 0 < len(headers) <= len(golds) or numbers != list(range(1, len(headers) + 1)):
        return None
    starts = [start for _, start in headers[1:]]
    marks = list(score(text, golds))
    for i, start in enumerate(starts, start=1):
        if list(score(text[:start], golds))[:i] != marks[:i]:
            return None
    return starts


def token_sections(chat, tokens, starts):
    """The section of each token, counted from 0: (T,). Text before the first header belongs to
    section 0."""

    def decoded_length(t):  # the number of characters of tokens 0..t
        return len(decode(chat, [tokens[: t + 1]])[0])

    first_tokens = [bisect_right(range(len(tokens)), start, key=decoded_length) for start in starts]
    return np.searchsorted(first_tokens, np.arange(len(tokens)), side="right")


def section_advantages(correct, rewards, normalize_std=False):
    """The advantage of each section. correct: (P, G, N), rewards: (P, G) -> (P, G, N)."""
    n = correct.shape[2]
    penalties = correct.mean(axis=2) - rewards  # (P, G)
    advantages = np.zeros(correct.shape)
    for i in range(n):
        to_go = correct[:, :, i:].sum(axis=2) / n - penalties  # (P, G)
        advantages[:, :, i] = bcr.group_advantages(to_go, normalize_std)
    return advantages


def token_advantages(rollout, chat, s):
    """Replaces bcr.token_advantages. Returns R arrays (T,)."""
    _, score = load_reward(s.reward)
    samples = rollout.correct.shape[1]
    by_section = section_advantages(rollout.correct, rollout.rewards, s.normalize_std)  # (P, G, N)
    by_section = by_section.reshape(len(rollout.completions), -1)  # (R, N)
    advantages = []
    for r, (completion, text) in enumerate(zip(rollout.completions, rollout.texts)):
        golds = [problem["answer"] for problem in rollout.groups[r // samples]]
        # If the sections are unknown, every token counts as one of section 0, which has the
        # complete credit.
        starts = section_starts(text, golds, score) or []
        advantages.append(by_section[r, token_sections(chat, completion.tokens, starts)])
    return advantages


def unsure_share(texts, golds):
    """The share of completions whose sections are unknown. golds: a list of N for each text."""
    starts = [section_starts(text, some, reward.score) for text, some in zip(texts, golds)]
    return starts.count(None) / len(starts)


if __name__ in ("__main__", "__mp_main__"):  # the second is its name in processes that it starts
    bcr.token_advantages = token_advantages
if __name__ == "__main__":
    bcr.main()
