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
MAX_MARKS = 4000   # headers, labels and boxes of one completion that are read, from its end
MAX_TRIES = 8      # boxes of one problem that are tried, from the last backwards

# ---------------------------------------------------------------------------------------------
# Extraction. A completion is a row of marks: headers, labels and boxes.

_INDEX = r"[ \t*_#(]{0,4}(?P<%s>[0-9]+|i\b)(?P<%s>[ \t]?(?:[-–,&]|and|to)[ \t]?[0-9])?"
MARK = re.compile(
    r"\\(?P<box>boxed|fbox)(?![a-z])"
    r"|(?:(?<![^\n])|(?<=\n )|(?<=\n  )|(?<=\n   ))(?:#{1,6}|\*\*)[ \t*]{0,4}problem"
    + _INDEX % ("header", "headers")
    + r"|(?<![a-z])answer(?:[ \t](?:to|for))?(?:[ \t]problem)?"
    + _INDEX % ("label", "labels")
    + r"[ \t*_)]{0,4}[:：]",
    re.IGNORECASE | re.ASCII,
)
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
        thinking, _, reply = completion.replace("\r", "\n").rpartition("</think>")
        for part in (thinking, reply):
            for index, answer in _boxed_answers(part, n).items():
                answers[index - 1] = answer
    return answers


def _boxed_answers(text, n):
    """Return {index: answer} of one stretch of text."""
    marks = deque(MARK.finditer(text), maxlen=MAX_MARKS)
    # Without any header a lone problem owns every box.
    section = 1 if n == 1 and not any(mark["header"] for mark in marks) else 0
    label, label_end, used = 0, 0, True
    boxes = {}  # (index, labelled) -> where its boxes begin, in order
    for mark in marks:
        if mark["header"]:
            section, used, label_end = _index(mark, "header"), True, len(text)
        elif mark["label"]:
            label, used, label_end = _index(mark, "label"), False, mark.end()
        else:
            start = mark.end()
            same_line = text.find("\n", label_end, start) < 0 and label_end <= start
            if same_line and label_end:
                boxes.setdefault((label, True), []).append(start)
                used = True
            elif not used and ONLY_MARKUP.fullmatch(text, label_end, mark.start()):
                boxes.setdefault((label, True), []).append(start)
                used, label_end = True, start
            else:
                boxes.setdefault((section, False), []).append(start)
    answers = {}
    for (index, labelled), starts in sorted(boxes.items()):  # labelled after unlabelled: it wins
        answer = _last_box(text, starts)
        if 1 <= index <= n and answer is not None:
            if answer != "i" or index not in answers:
                answers[index] = answer
    return answers


def _index(mark, name):
    """Return the number of a header or label, 0 where it names none or several problems."""
    digits = mark[name]
    return int(digits) if len(digits) < 10 and digits.isdigit() and not mark[name + "s"] else 0


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
    while text[start:start + 1] in (" ", "\t"):
        start += 1
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
