"""
The reward: which of the N problems a completion answers correctly.

An answer is cleaned (one spelling for each thing), parsed (into lists, intervals, equations and leaves with
their values) and compared: fractions exactly, other numbers to 1e-9, text as text without regard to case.

A plain gold asks for a plain answer, so that copying "14 + 6 + 3" out of a problem earns nothing:

- A plain gold is an integer, a decimal, a fraction of integers, a mixed number or a percentage, with or
  without a unit. A plain answer is one of these, scientific notation, or one power of a number (10^3). Sums,
  products, factorials, binomials, roots and functions of numbers are not: they leave the work undone.
- Any other gold (2^{10}, 3+2\\sqrt{2}, x+1) is compared by value.
- The rule applies to each item of a list, set, tuple or interval, and to the right side of an equation.

Nothing in this file raises, whatever it is given, and everything that could grow is bounded before it is
computed. The file reads from `score` down: extraction, comparison, cleaning, parsing.
"""

import cmath
import math
import operator
import re
import unicodedata
import zlib
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_LENGTH = 500     # characters of an answer; a longer one equals only itself
MAX_DEPTH = 30       # nested brackets and commands
MAX_BITS = 2048      # size of a number: numerator and denominator together
MAX_FACTORIAL = 200
MAX_WORK = 300       # parsing steps of an answer; one with a large number counts as several
MAX_ITEMS = 30       # items of a list in any order
MAX_MARKS = 2000     # boxes, labels and headers of a completion, counted from its end
MAX_TRIES = 8        # boxes of one problem, counted from its last
LABEL_REACH = 1000   # characters between a label and its box


def score(completion, golds):
    """One bool for each gold: whether the completion answers that problem correctly."""
    golds = golds if isinstance(golds, (list, tuple)) else []
    return list(map(answers_equal, extract_answers(completion, len(golds)), golds))


def extract_answers(completion, n):
    """n entries: the text of the box that answers problem i, or None if there is none.

    A box labelled `Answer i:` belongs to problem i wherever it is; any other box belongs to the section it is
    in. The last box of a problem counts. What follows `</think>` overrides what precedes it."""
    thinking, _, reply = _normalize(completion).rpartition("</think>")
    answers = _boxed_answers(thinking, n) | _boxed_answers(reply, n)
    return [answers.get(index) for index in range(1, n + 1)] if isinstance(n, int) else []


def answers_equal(prediction, gold):
    """Whether the prediction equals the gold. An empty gold equals nothing, and neither does a value that is
    not a string. An answer beyond the bounds above equals only itself."""
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return False
    prediction, gold = prediction.strip(), gold.strip()
    if max(len(prediction), len(gold)) > MAX_LENGTH:
        return prediction == gold
    texts = [_clean(prediction), _clean(gold)]
    if CHOICE.fullmatch(texts[1]):
        texts[0] = CHOICE_WITH_VALUE.sub(r"\1", texts[0])
    if not all(text.strip("{} ") for text in texts):
        return False
    if prediction == gold or texts[0] == texts[1]:
        return True
    if PLAIN.fullmatch(texts[0]) and PLAIN.fullmatch(texts[1]):
        number = Fraction if "." in texts[0] + texts[1] else int
        return number(texts[0]) == number(texts[1])
    # 100,200 is one number or, unless a group begins with 0, two: whichever makes the answers equal.
    both, readings = "\n".join(sorted(texts)), [texts]
    if "," in both:
        joined = [text if BRACKET.search(text) else GROUPED.sub(lambda group: group[0].replace(",", ""), text)
                  for text in texts]
        readings = [joined] if joined == texts or re.search(r",0\d\d", both) else [joined, texts]
    try:
        return any(_equal(Parser(reading[0], both, PLAIN_ANSWER).answer(),
                          Parser(reading[1], both, PLAIN_GOLD).answer()) for reading in readings)
    except FAILURES:  # beyond a bound
        return False


# ----------------------------------------------------------------------------------------------
# Extraction: a completion is a sequence of headers `### Problem i`, labels `Answer i:` and boxes.
# Each pattern begins with a fixed word, so that 400,000 characters are searched in a millisecond.

INDEX = r"[ \t*_#(]{0,4}(?:([0-9]{1,99})|i)(?![0-9a-z])([ \t]?(?:[-–,&]|and|to)[ \t]?[0-9])?"
HEADER = re.compile(r"roblem" + INDEX)
HEADER_START = re.compile(r"(?:^|\n)[ \t]{0,3}(?:#{1,6}|\*\*)[ \t*]{0,4}[Pp]$")
LABEL = re.compile(r"nswer(?:[ \t](?:to|for))?(?:[ \t][Pp]roblem)?" + INDEX + r"[ \t*_)]{0,4}[:：]")
BOX = re.compile(r"box(?:(?<=\\fbox)|ed(?<=\\boxed))(?![a-z])\s{0,9}")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
UNBRACED = re.compile(r"\\[A-Za-z]+[^\s$]*|[^\s$\\{}]+")
MARKUP = re.compile(r"[\s$*_:>\\\[\](){}-]{0,100}")
PLACEHOLDER = re.compile(r"(?:[\s.…?_]|\\[cl]?dots(?![a-z])|\\[,;:! ]|\\text\{[\s.…]*\})*")


def find_headers(completion):
    """The headers `### Problem i` as pairs: the problem's number (0 if there is not exactly one), and the
    offset in the completion at which the header's line starts."""
    text = _normalize(completion)
    return [(_index(mark), text.rfind("\n", 0, mark.start()) + 1) for mark in _header_marks(text)]


def _normalize(completion):
    """The completion with one spelling of line breaks and labels, of the same length."""
    text = completion if isinstance(completion, str) else ""
    return text.replace("\r", "\n").replace("ANSWER", "Answer").replace("PROBLEM", "Problem")


def _last_marks(pattern, word, text):
    """The matches of a pattern that contains `word`, from the last MAX_MARKS of them."""
    return pattern.finditer(text, len(text.rsplit(word, MAX_MARKS)[0]))


def _header_marks(text):
    marks = _last_marks(HEADER, "roblem", text)
    return [mark for mark in marks if HEADER_START.search(text, max(0, mark.start() - 20), mark.start())]


def _index(mark):
    """The problem of a header or label: 0 for the letter i and for several problems, as in 1-3."""
    return 0 if mark[2] else int(mark[1] or 0)


def _boxed_answers(text, n):
    """{index: answer} of one stretch of text."""
    headers = _header_marks(text)
    section = int(n == 1 and not headers)  # a single problem needs no header
    label = label_end = -LABEL_REACH
    boxes = {}  # (index, labelled): where its boxes begin, in order
    marks = [*headers, *_last_marks(LABEL, "nswer", text), *_last_marks(BOX, "box", text)]
    for mark in sorted(marks, key=re.Match.start):
        if mark.re is HEADER:
            section, label_end = _index(mark), -LABEL_REACH
        elif mark.re is LABEL:
            label, label_end = _index(mark), mark.end()
        else:
            # A label owns the boxes of its line or, if that has none, the box that follows immediately.
            near = mark.start() - label_end < LABEL_REACH
            between = text[label_end:mark.start()] if near else ""
            labelled = near and ("\n" not in between or MARKUP.fullmatch(between) is not None)
            boxes.setdefault((label if labelled else section, labelled), []).append(mark.end())
    answers = {}
    for (index, labelled), starts in sorted(boxes.items()):  # labelled boxes come second and override
        contents = [_box(text, start) for start in starts[-MAX_TRIES:]]
        contents = [content for content in contents if not PLACEHOLDER.fullmatch(content)]
        # The i of the prompt's `Answer i:` is an answer only if nothing else is.
        if contents and (contents[-1] != "i" or index not in answers):
            answers[index] = contents[-1]
    return answers


def _box(text, start):
    """The content of the box whose braces begin at `start`, "" if they never close."""
    if text[start:start + 1] != "{":
        token = UNBRACED.match(text, start, start + MAX_LENGTH)
        return token[0] if token else ""
    depth = 0
    for brace in BRACE.finditer(text, start, start + MAX_LENGTH):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[start + 1:brace.start()].strip()
    return ""


# ----------------------------------------------------------------------------------------------
# Comparison

# The forms of a plain gold and of a plain answer, as the text of a leaf.
_OPEN, _CLOSE, _NUMBER = r"[-+({]*", r"[)}]*", r"(?:\d+\.?\d*|\.\d+)"
_MIXED = r"\(\d+\+\\frac\{\d+\}\{\d+\}\)"
_FRACTION = (rf"\\frac\{{{_OPEN}{_NUMBER}{_CLOSE}\}}\{{{_OPEN}{_NUMBER}{_CLOSE}\}}"
             rf"|{_NUMBER}(?:{_CLOSE}/{_OPEN}{_NUMBER})+")
_SCIENTIFIC = rf"{_NUMBER}(?:[eE][-+]?\d+|{_CLOSE}\*{_OPEN}10\^\{{[-+]?\d+\}})"
_POWER = rf"{_NUMBER}{_CLOSE}\^\{{[-+]?\d+\}}"
PLAIN_GOLD = re.compile(rf"{_OPEN}(?:{_MIXED}|{_FRACTION}|{_NUMBER}){_CLOSE}[%°]?")
PLAIN_ANSWER = re.compile(
    rf"{_OPEN}(?:{_MIXED}|{_FRACTION}|{_SCIENTIFIC}|{_POWER}|{_NUMBER}){_CLOSE}[%°]?")
# A choice is a letter from A to E, whatever its case; `(B) 5`, with its value, is the choice B.
CHOICE = re.compile("[A-Ea-e]")
CHOICE_WITH_VALUE = re.compile(
    r"^(?:\\text ?\{)?\(([A-E])\)\}?[ ~*]*[-+]?(?:\d|\.\d|\\(?:frac|sqrt|pi))[^A-Z,()]*$")
GROUPED = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)", re.ASCII)
BRACKET = re.compile(r"[(\[]|\\\{")
BASE = re.compile(r"^([0-9A-F]*[0-9][0-9A-F]*)_\{[0-9]{1,2}\}$")
DECIMAL = re.compile(r"[+-]?0*([0-9]*)\.([0-9]+)")


def _equal(a, b):
    """Whether two nodes are equal."""
    if a.kind == b.kind == "leaf":
        return _equal_leaves(a, b)
    if a.kind == b.kind == "=":
        if a.text == b.text:
            return _equal(a.items[0], b.items[0])
        if not a.values or not b.values or a.values[0] == a.values[-1] or b.values[0] == b.values[-1]:
            return False
        # proportional: 2x - y = 0 is y = 2x
        return all(_close(a.values[0] * y, b.values[0] * x) for x, y in zip(a.values, b.values))
    a, b = (b, a) if b.kind == "=" else (a, b)
    if a.kind == "=":
        return a.named and _equal(a.items[0], b)
    a, b = (b, a) if b.kind in ("list", "set", "matrix") else (a, b)
    if {a.kind, b.kind} <= {"list", "set"} and len(a.items) <= MAX_ITEMS:
        left = list(b.items)
        for item in a.items:
            found = next((place for place, other in enumerate(left) if _equal(item, other)), None)
            if found is None:
                return False
            del left[found]
        return not left
    if a.kind in ("list", "set", "matrix") and len(a.items) == 1 and b.kind != "matrix":
        return _equal(a.items[0], b)
    # A tuple may lose its parentheses, and a vector may be written as a tuple.
    alike = a.kind == b.kind != "leaf" or a.kind in ("list", "matrix") and b.kind == "()"
    return alike and len(a.items) == len(b.items) and all(map(_equal, a.items, b.items))


def _equal_leaves(a, b):
    """Whether two numbers, expressions or texts are equal."""
    if a.text and a.text == b.text:
        return True
    if "_" in a.text + b.text and BASE.sub(r"\1", a.text) == BASE.sub(r"\1", b.text):
        return not (BASE.match(a.text) and BASE.match(b.text))  # 52 is 52_8, 52_9 is not
    if a.gold and a.plain and not b.plain or b.gold and b.plain and not a.plain:
        return False  # the work is left undone
    if a.text.isalpha() and b.text.isalpha() and not len(a.text) == len(b.text) == 2:
        return False  # words, but xy is yx
    if not a.values or not b.values:
        return False
    pairs = list(_pairs(a.values, b.values))
    if all(_close(x, y) for x, y in pairs):
        return True
    percent = a.text.endswith("%") - b.text.endswith("%")
    if percent:  # the sign may be lost: 50% is 0.5 and 50
        return all(_close(x * 100, y) if percent > 0 else _close(x, y * 100) for x, y in pairs)
    if "." not in a.text + b.text or len(pairs) > 1:
        return False
    a, b, (x, y) = (a, b, pairs[0]) if DECIMAL.fullmatch(a.text) else (b, a, pairs[0][::-1])
    decimal = DECIMAL.fullmatch(a.text)
    if not decimal or DECIMAL.fullmatch(b.text) or len((decimal[1] + decimal[2]).lstrip("0")) < 8:
        return False
    step = 10.0 ** -len(decimal[2])  # rounded or cut off
    return abs(y - x) <= step / 2 or abs(x) < abs(y) and abs(y - x) < step


def _close(a, b):
    """Whether two values are equal: exactly where both are fractions, else to 1e-9 of their size."""
    if a == b or isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b)) < math.inf


# ----------------------------------------------------------------------------------------------
# Cleaning: one spelling for what LaTeX, Unicode and plain text write in several ways.

SYMBOLS = {code: f"\\{unicodedata.name(chr(code)).split()[-1].lower()} ".replace("lamda", "lambda")
           for code in range(ord("α"), ord("ω") + 1)}
SYMBOLS |= {ord(char): meaning for chars, meaning in {
    "−–—‐‑‒": "-", "×·⋅∙": "*", "÷⁄∕": "/", "∞": r"\infty ", "√": r"\sqrt ",
    "≤⩽": r"\le ", "≥⩾": r"\ge ", "≠": r"\ne ", "≈": "=", "∈": r"\in ", "∪": ",",
    "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "′’": "'",
    "€£¥\u200b\u200c\u200d\u2060\ufeff": "",
}.items() for char in chars}
COMMANDS = {"\\" + command: meaning for commands, meaning in {
    "left right big Big bigl bigr Bigl Bigr displaystyle textstyle limits boxed fbox operatorname": "",
    "mathbb mathbf mathit mathsf mathcal bm boldsymbol ! ( ) [ ] $": "", ", ; : quad qquad": " ", "%": "%",
    "text textbf textit textrm textsf textnormal mathrm mbox": r" \text", "dfrac tfrac cfrac": r"\frac",
    "times cdot ast": "*", "div": "/", "lt": "<", "gt": ">", "approx": "=", "leq leqslant": r"\le",
    "geq geqslant": r"\ge", "neq": r"\ne", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]",
    "langle": "(", "rangle": ")", "vert lvert rvert mid": "|", "lfloor": r"\floor{", "lceil": r"\ceil{",
    "rfloor rceil": "}", "cup lor land": ",", "varnothing": r"\emptyset", "degree": r"^\circ",
}.items() for command in commands.split()}
COMMANDS |= {"\\ ": " ", "~": " ", "$": "", "<=": r"\le ", ">=": r"\ge ", ":=": "=", "+/-": r"\pm "}


def _matrix(match):
    r"""\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} is spelled \matrix{(1,2),(3,4)}."""
    rows = [f"({row.replace('&', ',')})" for row in match[2].split(r"\\") if row.strip()]
    name = "matrix" if match[1].lower() in ("pmatrix", "bmatrix", "matrix", "array") else "determinant"
    return f"\\{name}{{{','.join(rows)}}}"


def _mixed(match):
    r"""1\frac{4}{5} and 1 4/5 are sums; 2\frac{3}{2}, whose fraction is not proper, is a product."""
    whole, top, bottom = match.groups()
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if (len(top), top) < (len(bottom), bottom) else match[0]


def _repeating(match):
    r"""0.1\overline{6} is the fraction (16 - 1) / 90."""
    whole, digits, period = match.groups()
    top = int(whole + digits + period) - int(whole + digits or 0)
    return rf"\frac{{{top}}}{{{10 ** len(digits) * (10 ** len(period) - 1)}}}"


PLAIN = re.compile(r"[+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?")
FUNCTION = "sqrt|arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp"
RULES = [(needs, re.compile(pattern, re.ASCII), meaning) for needs, pattern, meaning in (
    # what a text must contain for the rule to be tried, pattern, replacement
    ("", r"(?<=\d)(?:\{,\}|,\\!|\\!,|\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),      # 1{,}234  10,\!080  1\,234
    ("\\begin", r"\\begin ?\{([A-Za-z]*)\}(?:\{[lcr| ]*\})?((?s:.*?))\\end ?\{\1\}", _matrix),
    ("", r"\\(?:[A-Za-z]+|.)|[$~]|[<>:]=|\+/-", lambda match: COMMANDS.get(match[0], match[0])),
    ("", r"\s+", " "),
    ("\\text", r" ?\\text ?\{ ?([ei]|[\d., -]*) ?\}|^[ {]*\\text ?\{([^{}]*)\}[ .}]*$", r"\1\2"),  # \text{5}
    ("", r" ?\\text ?\{[ ,]*(?:and|or) ?\}|\b(?:and|or)\b", ","),
    ("percent", r" ?(?:percent|\\text ?\{ ?percent ?\})$", "%"),
    ("", r"\* ?(?=\\text)|(?<=\d)(?=(?:[cmk]m|[mk]g)\b)", " "),                # 5\cdot\text{cm}  5cm
    (" ", r"(?<![\d.,/^_])(?<!\d )\d{1,3}(?: \d{3}){1,9}(?![\d/]| \d)",      # 1 234
     lambda match: match[0].replace(" ", "")),
    ("°", r"°(?: ?[CF]\b)?", "°"),
    ("circ", r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ)(?: ?[CF]\b)?", "°"),
    ("prime", r" ?\^ ?(?:\{ ?\\prime ?\}|\\prime)", "'"),
    ("^", r"\b10 ?\^ ?(-?\d{2,4})(?!\d)", r"10^{\1}"),                         # 4.5*10^33
    ("^", r"\^ ?(\d)(?!\.\d)", r"^{\1}"),                                      # 2^12 is 2^1 2
    ("\\", r"(\\(?:frac|binom|sqrt)) ?(\d)", r"\1{\2}"),
    ("\\", r"(\\(?:frac|binom) ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    ("\\frac", r"(?<![\d.^_}/])(\d+) ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}", _mixed),
    ("/", r"(?<![\d.^_}/])(\d+) (\d+)/(\d+)(?![\d.])", _mixed),
    ("\\over", r"\{?([^{}]*)\\over(?![a-z])([^{}]*)\}?", r"\\frac{\1}{\2}"),
    ("\\choose", r"\{?([^{}]*)\\choose(?![a-z])([^{}]*)\}?", r"\\binom{\1}{\2}"),
    ("line", r"(\d{0,30})\.(\d{0,30})\\overline ?\{ ?(\d{1,30}) ?\}", _repeating),
    ("\\sqrt", r"\\sqrt ?\[([^\[\]]*)\]", r"\\root{\1}"),
    ("-1", r"\\(sin|cos|tan) ?\^ ?\{ ?-1 ?\}", r"\\arc\1"),
    ("|", r"\|([^|]*)\|", r"\\abs{\1}"),
    (")", r"\)(?= ?\d)", ")*"),                                                # (n-2)2^n
    ("_", r"_ ?(?:\{ ?(\w+) ?\}|\{ ?\\text ?\{ ?(\w+) ?\} ?\}|(\d+|[A-Za-z]))", r"_{\1\2\3}"),
    ("_", r"\(([\dA-F]+)\)(?=_)", r"\1"),                                      # (52)_8
    ("", rf"(?<!\\)(?<![A-Za-z][A-Za-z])(?:({FUNCTION})(?![A-Za-z]|$)|(pi)(?![A-Za-z]))", r"\\\1\2"),
    ("inf", r"\\?\b(?:[Ii]nfinity|inf)\b", r"\\infty"),
    ("", r"^\(?([A-Za-z])[).:]*$", r"\1"),                                     # (C)  C.  C)
    ("]", r"(^|,|\\in|=) ?\]", r"\1("), ("[", r"\[(?= ?,| ?$)", ")"),          # ]1,2[
    (" ", r"(?<=\d) (?=\d)", "~"),                                             # 1 2 is not 12
)]


@lru_cache(maxsize=4096)  # a gold is compared with the answers of a complete group
def _clean(text):
    """Return text in one spelling of each sign, command, space, grouped number and mixed number."""
    if PLAIN.fullmatch(text):  # most golds are
        return text
    if not text.isascii():
        text = re.sub("[₀-₉]+", r"_{\g<0>}", re.sub("[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", text))
        text = re.sub("([¼-¾⅐-⅞])", r" \1", re.sub(r"√([0-9]+)", r"\\sqrt{\1}", text))  # 1½ is 1 1/2
        text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)[:MAX_LENGTH]
    for needs, pattern, meaning in RULES:
        text = pattern.sub(meaning, text) if needs in text else text
    return text.strip(" *`\"").lstrip("= ").rstrip(" .,;\\")


# ----------------------------------------------------------------------------------------------
# Parsing: recursive descent from lists to numbers and names, computing values along the way.

POWER = r"(?: ?\^ ?(?:\{ ?-?\d ?\}|\d))?"
WORD = r"(?:[A-Za-z]{4,}|[cmk]?m|[mk]?g|s|ft|in|sq|oz|lbs?|min|sec|hrs?|mph|USD|men|day)(?![A-Za-z])\.?"
TOKEN = re.compile(  # first a unit: texts or words that end an item. No other token begins with a space.
    rf"(?:(?: \\text ?\{{[^{{}}]*\}}{POWER})+| {WORD}{POWER}(?:(?: [A-Za-z]{{2,}}|/[A-Za-z]+){POWER}){{0,4}})"
    r"(?= ?(?:[,;)}\]]|\\\}|$))|_\{(?:[^{}]|\{[^{}]*\})*\}|\\text ?\{[^{}]*\}|\\(?:matrix|determinant)\{"
    r"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
    r"|\\[A-Za-z]+|\\.|[A-Za-z]{4,}|[A-Za-z]'*(?:\(0\))?|\S", re.ASCII)
HEDGE = re.compile(  # words that express doubt, offer a choice or change the number: not a unit
    r"(?<![a-z^{-])\d|[=<>,;?:]|\b(?:not?|base|if|but|maybe|perhaps|possibly|either|unless|about|around"
    r"|roughly|nearly|almost|approx\w*|nor|to"
    r"|negative|than|more|less|least|most|over|under|above|below|up|plus|minus|times|half|hundreds?"
    r"|thousands?|[mbtr]+illions?|dozens?|pairs?|squared|cubed|factorial|mod|wrong|incorrect|except)\b", re.I)
TRIGONOMETRIC = re.compile("sin|cos|tan|cot|sec|csc")
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
NAME = re.compile(r"\\?[A-Za-z]+(?:_\{[^{}]*\})?'*(?:\([\w,]+\))?|\((?:[A-Za-z],)+[A-Za-z]\)", re.ASCII)
CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}", r"\matrix{": "}", r"\determinant{": "}"}
RELATIONS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
SIGNS = ("+", "-", r"\pm", r"\mp")
# How strongly a token binds to what precedes it; 0 ends an expression. All others are factors, bound like *.
BINDING = dict.fromkeys(("", ",", ";", ")", "]", "}", r"\}", *RELATIONS), 0) | dict.fromkeys(SIGNS, 1) | {
    "*": 2, "/": 2, "^": 4, "!": 4}
DIGITS = frozenset("0123456789.")
CONSTANTS = {"e": math.e, "i": 1j, r"\pi": math.pi, "%": Fraction(1, 100), r"\infty": math.inf}
FAILURES = (ArithmeticError, ValueError, LookupError, TypeError, RecursionError)


class Node(NamedTuple):
    """A part of an answer."""
    kind: str = "leaf"    # leaf list set () [) matrix = ...
    text: str = ""        # its tokens
    values: list = None   # of a leaf: its value or, with variables, one a point; of an equation: left - right
    items: list = ()      # of a list, set, ...; of an equation: its right side
    named: bool = False   # whether an equation only names its right side, as x = 5 does
    plain: bool = False   # of a leaf: whether its text has the form of a plain gold or answer
    gold: bool = False    # of a leaf: whether it is part of the gold


def _power(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > MAX_BITS:
            raise OverflowError("power")
        if a < 0 and b.denominator % 2 and b.denominator > 1:  # the real root of a negative number
            return (-1) ** b.numerator * _power(-a, b)
    return a ** b


def _factorial(a):
    if a.real > MAX_FACTORIAL:
        raise OverflowError("factorial")
    whole = isinstance(a, Fraction) and a.denominator == 1 and a >= 0
    return Fraction(math.factorial(int(a))) if whole else math.gamma(a.real + 1)


OPERATIONS = {name: getattr(cmath, name.replace("arc", "a")) for name in (
    "sin cos tan sinh cosh tanh arcsin arccos arctan exp log".split())} | {
    "ln": cmath.log, "cot": lambda a: 1 / cmath.tan(a), "sec": lambda a: 1 / cmath.cos(a),
    "csc": lambda a: 1 / cmath.sin(a), "+": operator.add, "-": operator.sub, "negative": operator.neg,
    "*": operator.mul, "/": operator.truediv, "frac": operator.truediv, "^": _power, "!": _factorial,
    "abs": abs, "sqrt": lambda a: _power(a, Fraction(1, 2)), "root": lambda n, a: _power(a, 1 / n),
    "binom": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n - k)),
    "floor": lambda a: Fraction(math.floor(a.real + Fraction(1, 10**12))),
    "ceil": lambda a: Fraction(math.ceil(a.real - Fraction(1, 10**12)))}
ARGUMENTS = {"frac": 2, "binom": 2, "root": 2, "sqrt": 1, "abs": 1, "floor": 1, "ceil": 1}  # how many follow


def _pairs(*lists):
    """Return what stands at each point in lists of one value, which is constant, or of one for each point."""
    size = max(map(len, lists))
    return zip(*(values * (size // len(values)) for values in lists))


class Parser:
    """Reads a cleaned answer. Each method continues where the last one stopped, and returns a Node.

    Numbers are fractions while they are exact, else floats. Variables have values at a few points, which are
    drawn from the text of both answers."""

    def __init__(self, text, both, plain=PLAIN_ANSWER):
        self.tokens, self.at, self.depth, self.work, self.both = TOKEN.findall(text) + [""], 0, 0, 0, both
        self.plain = plain  # the form of a plain leaf: PLAIN_GOLD or PLAIN_ANSWER

    @property
    def next(self):
        return self.tokens[self.at]

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def text(self, start, end):
        """Return some tokens as one text, without spaces."""
        text = "".join(self.tokens[start:end])
        text = TEXT.sub(r"\1", text).replace(" ", "") if " " in text or r"\text" in text else text
        word = text.isalpha() and (len(text) > 1 or CHOICE.fullmatch(text))  # the variable m is not M
        return text.casefold() if word or re.search(r"(?<![\\A-Za-z])[A-Za-z]{4}", text) else text

    def answer(self):
        """Read the complete answer."""
        items = self.list(True)
        if self.next:  # a stray bracket: compare as text
            return Node(text=self.text(0, -1))
        return items[0] if len(items) == 1 else Node("list", items=items)

    def list(self, expand):
        """Read items between commas; one with ± becomes two if expand."""
        items = []
        while True:
            start, item = self.at, self.relation()
            piece = self.tokens[start:self.at]
            if expand and (r"\pm" in piece or r"\mp" in piece):
                above = [{r"\pm": "+", r"\mp": "-"}.get(token, token) for token in piece]
                below = [{r"\pm": "-", r"\mp": "+"}.get(token, token) for token in piece]
                self.tokens[start:self.at], self.at = [*above, ",", *below], start
                continue
            items += [item] * (self.at > start)
            if self.next not in (",", ";"):
                return items
            self.at += 1

    def relation(self):
        """Read a leaf, an equation, an inequality in one variable, which is an interval, or a text."""
        sides, signs = [self.leaf()], []
        while self.next in RELATIONS:
            signs.append(self.take())
            sides.append(self.leaf())
        named = [bool(NAME.fullmatch(side.text)) for side in sides]
        if not signs or signs == [r"\in"] and named[0]:
            return sides[-1]
        if set(signs) == {"="}:
            left, right = (sides[1], sides[0]) if named == [False, True] else (sides[0], sides[-1])
            difference = self.apply("-", left, right).values
            # A name stands on the left, but SRAC = LRAC are two; or both sides are equal, as in 2 + 3 = 5.
            words = len(left.text) > 1 and (left.text + right.text).isalpha()
            only_named = any(named) and not words or difference is not None and not any(difference)
            return Node("=", left.text, difference, [right], only_named)
        if signs[0] in (">", r"\ge"):  # turned, so that they rise
            signs = [{">": "<", r"\ge": r"\le"}.get(sign, sign) for sign in signs[::-1]]
            sides, named = sides[::-1], named[::-1]
        if {"<", r"\le"}.issuperset(signs) and named in ([True, False], [False, True], [False, True, False]):
            opening = "(" if named[0] or signs[0] == "<" else "["
            closing = ")" if named[-1] or signs[-1] == "<" else "]"
            low = Node(values=[-math.inf]) if named[0] else sides[0]
            high = Node(values=[math.inf]) if named[-1] else sides[-1]
            return Node(opening + closing, items=[low, high])
        return Node(text="".join(side.text + sign for side, sign in zip(sides, signs + [""])))

    def leaf(self):
        """Read a number, expression or text, with or without a unit; or brackets that are not a factor."""
        self.work += 1
        start, node = self.at, self.expression()
        end = self.at
        if self.next[:1] == " ":
            doubtful = HEDGE.search(self.take())
            if doubtful or not node.values or len(node.values) > 1:  # only a number loses its unit
                node, end = Node(), self.at
        text = self.text(start, end)
        plain = self.plain.fullmatch(text) is not None
        return node._replace(text=node.text or text, plain=plain, gold=self.plain is PLAIN_GOLD)

    def binding(self):
        """Return how strongly the next token binds. A unit does not, a subscript does."""
        return BINDING[self.next] if self.next in BINDING else {" ": 0, "_": 5}.get(self.next[0], 2)

    def expression(self, strength=0):
        """Read an atom and what binds to it more strongly than strength."""
        signs, start = [], self.at
        while self.next in SIGNS:
            signs.append(self.take())
        node = self.expression(3) if signs else self.atom()
        node = self.apply("negative", node) if signs.count("-") % 2 else node
        while self.binding() > strength:
            token = self.next
            if token[0] == "_":  # a subscript makes a name of what precedes it
                self.at += 1
                node = self.variable(self.text(start, self.at))
            elif token not in BINDING:  # factors side by side; but 1 2 is not a product
                node = self.apply("*", Node() if token[0] in DIGITS else node, self.expression(2))
            elif self.take() == "!":
                node = self.apply("!", node)
            else:
                node = self.apply(token, node, self.expression(BINDING[token]))
        return node

    def atom(self):
        """Read a number, a name, a group, or a command with its arguments."""
        if self.next in BINDING:
            return Node()  # an operand is missing
        self.depth += 1
        self.work += 1
        if self.depth > MAX_DEPTH or self.work > MAX_WORK:
            raise RecursionError
        token = self.take()
        name = TEXT.sub(r"\1", token).strip("\\ ") if token[0] in "\\ " else token
        if token[0] in DIGITS and token != ".":
            node = Node(values=[Fraction(int(token) if token.isdigit() else token)])
        elif token in CLOSING:
            node = self.group(token)
        elif name in ARGUMENTS:
            node = self.apply(name, *[self.atom() for _ in range(ARGUMENTS[name])])
        elif name in OPERATIONS:
            node = self.function(name)
        elif token in CONSTANTS:
            node = Node(values=[CONSTANTS[token]])
        elif token == "°":
            node = Node(values=[math.pi / 180 if TRIGONOMETRIC.search(self.both) else Fraction(1)])
        else:
            node = Node("set") if name == "emptyset" else self.variable(name)
        self.depth -= 1
        return node

    def variable(self, name):
        """Return the leaf of a variable: whole numbers within floor and ceiling, else fractions."""
        whole = r"\floor" in self.both or r"\ceil" in self.both
        name, seed = name.encode(errors="replace"), zlib.crc32(self.both.encode(errors="replace"))
        draws = [zlib.crc32(name, seed + k) for k in range(10 if whole else 2)]
        if whole:
            return Node(values=[Fraction(1 + draw % 16) for draw in draws])
        signs = (1, -1) if r"\abs" in self.both else (1, 1)
        return Node(values=[Fraction(500 + draw % 2500, 997) * sign for draw, sign in zip(draws, signs)])

    def group(self, opening):
        """Read what a pair of brackets encloses."""
        items = self.list(opening == r"\{")
        closed = self.next and self.next in CLOSING[opening]
        kind = opening + self.take() if closed else "?"
        if len(items) == 1 and kind in ("()", "[]", "{}"):
            return items[0]
        return Node({r"\{\}": "set", "{}": "list", r"\matrix{}": "matrix"}.get(kind, kind), items=items)

    def function(self, name):
        r"""Read what \sin, \log, ... apply to; without brackets, the factors that follow: \sin 2x."""
        base = exponent = None
        if name == "log" and self.next[:1] == "_":
            base = self.apply("log", Parser(self.take()[1:], self.both).answer())
        if self.next == "^":
            self.at += 1
            exponent = self.expression(4)
        factors = self.next not in CLOSING
        node = self.expression(2) if factors else self.atom()
        while factors and self.binding() == 2 and not (self.next in BINDING or self.next[1:] in OPERATIONS):
            node = self.apply("*", node, self.expression(2))
        node = self.apply(name, node)
        node = self.apply("/", node, base) if base else node
        return self.apply("^", node, exponent) if exponent else node

    def apply(self, name, *nodes):
        """Return the leaf of an operation: without values where there are none, or none that can be held."""
        if not all(node.kind == "leaf" and node.values for node in nodes):
            return Node()
        values = []
        for operands in _pairs(*(node.values for node in nodes)):
            try:
                value = OPERATIONS[name](*operands)
            except FAILURES:
                return Node()
            self.work += 1
            if isinstance(value, Fraction):
                bits = value.numerator.bit_length() + value.denominator.bit_length()
                self.work += bits // 64
                lost = bits > MAX_BITS
            elif name in ("*", "/", "frac", "^", "exp"):  # too small or too large for a float
                lost = value == 0 and all(operands) or cmath.isinf(value) and math.inf not in operands
            else:  # what is left of floats that cancel, as in sin(pi), is 0
                value, lost = 0.0 if abs(value) < 1e-14 * abs(operands[0]) else value, False
            if lost:
                return Node()
            values.append(value)
        return Node(values=values)
