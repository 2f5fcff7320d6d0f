"""The reward of Batched Contextual Reinforcement: the share of N problems answered correctly.

    extract_answers(completion, n)    what the model answered to problem 1..n
    answers_equal(prediction, gold)   whether one answer is worth the other
    score(completion, golds)          both together: one bool a problem

No function here raises, whatever it is given, and the work is bounded before it is done.
"""

import re
from collections import deque
from fractions import Fraction

MAX_LENGTH = 1000  # characters of an answer that is read; a longer one equals only itself
MAX_MARKS = 2000   # boxes of one completion that are read, from its end; labels; headers
MAX_TRIES = 8      # boxes of one problem that are tried, from the last backwards

# ---------------------------------------------------------------------------------------------
# Extraction. A completion is a row of marks: headers, labels and boxes.

# Each pattern begins with a fixed word, the one way to search 400,000 characters in a millisecond.
_INDEX = r"[ \t*_#(]{0,4}([0-9]{1,99}|i)(?![0-9a-z])([ \t]?(?:[-–,&]|and|to)[ \t]?[0-9])?"
BOX = re.compile(r"box(?:(?<=\\fbox)|ed(?<=\\boxed))(?![a-z])\s{0,9}")
LABEL = re.compile(r"nswer(?:[ \t](?:to|for))?(?:[ \t][Pp]roblem)?" + _INDEX + r"[ \t*_)]{0,4}[:：]")
HEADER = re.compile(r"roblem" + _INDEX)
HEADER_START = re.compile(r"(?:^|\n)[ \t]{0,3}(?:#{1,6}|\*\*)[ \t*]{0,4}[Pp]$")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
TOKEN = re.compile(r"[ \t]*(\\[A-Za-z]+[^\s$]*|[^\s$\\{}]+)")
ONLY_MARKUP = re.compile(r"[\s$*_:>\\\[\](){}-]*")
PLACEHOLDER = re.compile(r"(?:[\s.…?_]|\\[cl]?dots(?![a-z])|\\[,;:! ]|\\text\{[\s.…]*\})*")


def extract_answers(completion, n):
    """Return n entries: what problem i answers in its last box, or None where it answers nothing.

    A box labelled `Answer i:` belongs to i wherever it stands; a box without a label serves the
    section `### Problem i` it stands in. What follows `</think>` wins over what precedes it.
    """
    if not isinstance(n, int) or n < 1:
        return []
    answers = [None] * n
    if isinstance(completion, str):
        thinking, _, reply = completion.replace("\r", "\n").replace("ANSWER", "Answer").replace("PROBLEM", "Problem").rpartition("</think>")
        for part in (thinking, reply):
            for index, answer in _boxed_answers(part, n).items():
                answers[index - 1] = answer
    return answers


def _boxed_answers(text, n):
    """Return {index: answer} of one stretch of text."""
    headers = [mark for mark in _find(HEADER, "roblem", text)
               if HEADER_START.search("\n" * (mark.start() < 20) + text[max(0, mark.start() - 20):mark.start()])]
    marks = [(mark.start(), BOX, mark) for mark in _find(BOX, "box", text)]
    marks += [(mark.start(), LABEL, mark) for mark in _find(LABEL, "nswer", text)]
    marks += [(mark.start(), HEADER, mark) for mark in headers]
    # Without any header a lone problem owns every box.
    section = 1 if n == 1 and not headers else 0
    label, label_end, used = 0, None, True
    boxes = {}  # (index, labelled) -> where its boxes begin, in order
    for start, kind, mark in sorted(marks, key=lambda mark: mark[0]):
        if kind is HEADER:
            section, label_end = _index(mark), None
        elif kind is LABEL:
            label, label_end, used = _index(mark), mark.end(), False
        else:
            # A label owns the boxes of its line, or else the one that follows it at once.
            if label_end is not None and "\n" in text[label_end:start]:
                if used or start - label_end > 100 or not ONLY_MARKUP.fullmatch(text, label_end, start):
                    label_end = None
            labelled = label_end is not None
            boxes.setdefault((label if labelled else section, labelled), []).append(mark.end())
            if labelled:
                label_end, used = mark.end(), True
    answers = {}
    for (index, labelled), starts in sorted(boxes.items()):  # labelled after unlabelled: it wins
        answer = _last_box(text, starts)
        if 1 <= index <= n and answer is not None:
            if answer != "i" or index not in answers:
                answers[index] = answer
    return answers


def _find(pattern, word, text):
    """Iterate over the matches of a pattern that begins with word, among its last MAX_MARKS."""
    return pattern.finditer(text, len(text.rsplit(word, MAX_MARKS)[0]))


def _index(mark):
    """Return the number of a header or label, 0 where it names none or several problems."""
    return int(mark[1]) if len(mark[1]) < 10 and mark[1] != "i" and not mark[2] else 0


def _last_box(text, starts):
    """Return what stands in the last closed box that holds an answer, or None."""
    answer, outer = None, len(text)
    for start in reversed(starts[-MAX_TRIES:]):
        content, end = _box(text, start)
        if answer is not None and end <= outer:
            break
        if content is not None and not PLACEHOLDER.fullmatch(content):
            answer, outer = content, start
    return answer


def _box(text, start):
    """Return (content, end) of the box whose command ends at start; content None if unclosed."""
    if text[start:start + 1] != "{":
        token = TOKEN.match(text, start, start + MAX_LENGTH)
        return (token[1].rstrip(".,;"), token.end()) if token else (None, start)
    depth = 0
    for brace in BRACE.finditer(text, start, start + MAX_LENGTH):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1:brace.start()].strip(), brace.end()
    return None, start


# ---------------------------------------------------------------------------------------------
# Comparison.

def _clean(text):
    text = re.sub(r"\\left|\\right|\\[,;:! ]|\$|~|\\quad|\\displaystyle", "", text.replace("\\$", ""))
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|boxed)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", "", text).strip(".").lower()


def _number(text):
    percent = re.search(r"\\?%$", text)
    text = text[:percent.start()] if percent else text
    frac = re.fullmatch(r"([+-]?)\\frac(?:\{([+-]?\d{1,300})\}|(\d))(?:\{([+-]?\d{1,300})\}|(\d))", text, re.ASCII)
    if frac:
        text = f"{frac[2] or frac[3]}/{frac[4] or frac[5]}"
    ratio = re.fullmatch(r"([+-]?\d{0,300}\.?\d{0,300})(?:/([+-]?\d{1,300}))?", text, re.ASCII)
    try:
        value = Fraction(ratio[1]) / Fraction(ratio[2] or 1)
        return (-value if frac and frac[1] == "-" else value), bool(percent)
    except (TypeError, ValueError, ZeroDivisionError):
        return None, False


def answers_equal(prediction, gold):
    """Return whether prediction is worth gold. An empty gold equals nothing."""
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return False
    if max(len(prediction), len(gold)) > MAX_LENGTH:
        return prediction.strip() == gold.strip()
    prediction, gold = _clean(prediction), _clean(gold)
    if not gold or prediction == gold:
        return bool(gold)
    (a, a_percent), (b, b_percent) = _number(prediction), _number(gold)
    if a is None or b is None:
        return False
    return a == b or (a_percent != b_percent and (a == b * 100 or a * 100 == b))


def score(completion, golds):
    """Return one bool a gold: whether the completion answers that problem correctly."""
    answers = extract_answers(completion, len(golds))
    return [answers_equal(answer, gold) for answer, gold in zip(answers, golds)]
