r"""
The reward: which of the N problems a completion answers correctly.

gold               | right                                      | wrong
-------------------|--------------------------------------------|------------------------------
1234               | 1,234   1\,234   1234.0   x = 1234         | (1,234)   1,235
\frac{3}{4}        | 3/4   0.75   \dfrac34   P(A) = \frac{6}{8} | 0.7   3:4   1/4+1/2
23                 | 23 \text{ cm}   14+6+3=23   m+n=23         | 14+6+3   x=2 or x=23   23x
50\%               | 0.5   1/2   50                             | 5\%   25\%+25\%
4.5e33             | 4.5 \times 10^{33}                         | 4.5 \times 10^{32}
2\sqrt{3}          | \sqrt{12}   3.46410162                     | 3.46   2\sqrt{2}
2^{2018}           | 4^{1009}   2 \cdot 2^{2017}                | 2^{2017}   2^{2018}+1
n(n+1)             | n^2+n   f(n)=n+n^2                         | n(n-1)   6
1 \pm \sqrt{2}     | 1-\sqrt2, 1+\sqrt2                         | 1+\sqrt{2}
(1,2]              | 1 < x \le 2   ]1,2]                        | [1,2]   (1,2)   \{1,2\}
y = 2x+3           | 2x - y + 3 = 0                             | y = 2x-3
\text{no solution} | No solution                                | No

A plain gold asks for a plain answer, so that copying "14 + 6 + 3" out of a problem earns nothing. A
plain gold is an integer, a decimal, a fraction of integers, a mixed number or a percentage, with or
without a unit. A plain answer is one of these, scientific notation, or one power of a number; sums,
products, factorials, roots and functions leave the work undone. An equation with a variable on its
left is the answer on its right. Any other gold is compared by value. This applies to each item of a
list, set, tuple or interval.

Fractions are compared exactly, other numbers to 1e-9, texts without regard to case. Expressions in
variables are equal if their values agree at points that are drawn from both texts. No text makes
this file raise, and everything that could grow is bounded before it is computed.
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


def score(completion, golds):
    """One bool for each gold: whether the completion answers that problem correctly."""
    return list(map(answers_equal, extract_answers(completion, len(golds)), golds))


# ------------------------------------------------------------------------------------------
# Extraction: a completion is a sequence of headers `### Problem i`, labels `Answer i:` and boxes.

MAX_LENGTH = 500  # characters of an answer; a longer one equals only itself
MAX_MARKS = 2000  # headers, labels and boxes of a completion, counted from its end
MAX_TRIES = 8     # boxes of one problem that are read, counted from its last
# The number or letter of a problem, and perhaps another: `Answers 1-3` belong to no problem.
INDEX = (r"[ \t*_#(]{0,4}(?:([0-9]{1,99})|i)(?![0-9A-Za-z])"
         r"([ \t]?(?:[-–,&]|and|to)[ \t]?[0-9])?")
HEADER = re.compile("Problem" + INDEX)
HEADER_START = re.compile(r"(?:^|\n)[ \t]{0,3}(?:#{1,6}|\*\*)[ \t*]{0,4}$")
LABEL = re.compile(r"Answer(?:[ \t](?:to|for))?(?:[ \t]Problem)?" + INDEX + r"[ \t*_)]{0,4}[:：]")
# A label begins its line, apart from markup, or follows the end of a sentence or of a box.
LABEL_START = re.compile(
    r"(?:^|[\n.!?;}>])(?:[\s*_#>|$()\\\]\",-]|\d\)|and ){0,20}(?:[Ff]inal )?$")
# A label owns the boxes of its line or, if that has none, the box that follows immediately.
LABEL_REACH = re.compile(r"[^\n]{0,1000}|[\s$*_:>\\\[\](){}-]{0,100}")
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-z])\s{0,9}")
ANYWHERE = re.compile("")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
UNBRACED = re.compile(r"[-+]?\.?\d[^\s$\\{}]*|[-+]?\\[A-Za-z]+[^\s$]*|[A-Za-z](?![A-Za-z])")
PLACEHOLDER = re.compile(r"(?:[\s.…?_]|\\[cl]?dots(?![a-z])|\\[,;:! ]|\\text\{[\s.…]*\})*")


def extract_answers(completion, n):
    """n entries: the text of the box that answers problem i, or None if there is none.

    A box labelled `Answer i:` belongs to problem i wherever it is; any other box belongs to the
    section it is in. The last box of a problem counts, a labelled one before all others; one without
    braces never overrides one with braces. What follows `</think>` overrides what precedes it."""
    completion = completion if isinstance(completion, str) else ""
    thinking, _, reply = completion.rpartition("</think>")
    answers = {index: (False, None) for index in range(1, n + 1)}  # (has braces, content)
    for part in (thinking, reply):
        for (index, _), starts in sorted(_boxes(part, n).items()):  # labelled boxes come second
            for start in starts[-MAX_TRIES:] if index in answers else []:
                braced, content = _box(part, start)
                if not PLACEHOLDER.fullmatch(content) and (braced or not answers[index][0]):
                    answers[index] = (braced, content)
    return [content for _, content in answers.values()]


def find_headers(completion):
    """The headers `### Problem i` as pairs: the problem's number (0 if there is not exactly one),
    and the offset in the completion at which the header's line starts."""
    text = _normalize(completion)
    headers = _marks(text, "Problem", HEADER, HEADER_START)
    return [(_index(mark, 0), text.rfind("\n", 0, mark.start()) + 1) for mark in headers]


def _normalize(completion):
    """One spelling of line breaks, headers and labels; the length stays. Each pattern begins with a
    fixed word, so that 10^6 characters are searched in a millisecond."""
    text = completion.replace("\r", "\n")
    for word in ("Problem", "Answer"):
        text = text.replace(word.upper(), word).replace(word.lower(), word)
    return text


def _marks(text, word, pattern, start):
    """The matches of a pattern that follow `start`, among the last MAX_MARKS of its word."""
    first = max(0, len(text.rsplit(word, MAX_MARKS)[0]) - 1)
    return [mark for mark in pattern.finditer(text, first)
            if start.search(text, max(0, mark.start() - 40), mark.start())]


def _index(mark, section):
    """The problem of a header or label: the section's for the letter i, 0 for several."""
    return 0 if mark[2] else int(mark[1] or section)


def _boxes(completion, n):
    """{(index, whether they are labelled): where its boxes begin, in order}."""
    text = _normalize(completion)
    headers = _marks(text, "Problem", HEADER, HEADER_START)
    labels = _marks(text, "Answer", LABEL, LABEL_START)
    boxes = _marks(text, "box", BOX, ANYWHERE)
    section = int(n == 1 and not headers)  # a single problem needs no header
    label = None
    found = {}
    for mark in sorted([*headers, *labels, *boxes], key=re.Match.start):
        if mark.re is HEADER:
            section = _index(mark, 0)
            label = None
        elif mark.re is LABEL:
            label = mark
        else:
            labelled = bool(label and LABEL_REACH.fullmatch(text, label.end(), mark.start()))
            index = _index(label, section) if labelled else section
            found.setdefault((index, labelled), []).append(mark.end())
    return found


def _box(text, start):
    """(whether the box at `start` has braces, its content: "" if it has none or never closes)."""
    if text[start:start + 1] != "{":
        value = UNBRACED.match(text, start, start + MAX_LENGTH)
        return False, value[0] if value else ""
    depth = 0
    for brace in BRACE.finditer(text, start, start + MAX_LENGTH):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            content = text[start + 1:brace.start()].strip()
            return content != "i", content  # the i of the prompt's `Answer i:` overrides nothing
    return False, ""


# ------------------------------------------------------------------------------------------
# Cleaning: one spelling for what LaTeX, Unicode and plain text write in several ways.


GREEK = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
         "varsigma sigma tau upsilon phi chi psi omega").split()
SPELLINGS = {chr(code): rf"\{name} " for code, name in enumerate(GREEK, ord("α"))} | {"\\ ": " "}
for meaning, names in {
    "": r"\left \right \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \limits \boxed \fbox "
        r"\mathbb \mathbf \mathit \mathsf \mathcal \bm \boldsymbol \operatorname \! \( \) \[ \] $ \$ € £ ¥",
    " ": r"~ \, \; \: \quad \qquad", "-": "− – — ‐ ‑ ‒", "*": r"× · ⋅ ∙ \times \cdot \ast",
    "/": r"÷ ⁄ ∕ \div", "=": r"≈ := \approx", "<": r"\lt", ">": r"\gt", ",": r"∪ \cup \lor \land",
    r"\le": r"≤ ⩽ <= \leq \leqslant", r"\ge": r"≥ ⩾ >= \geq \geqslant", r"\ne": r"≠ \neq", r"\in": "∈",
    r"\pm": "± +/-", r"\mp": "∓", "'": "′ ’", "%": r"\%", "|": r"\vert \lvert \rvert \mid",
    "(": r"\langle", ")": r"\rangle", "[": r"\lbrack", "]": r"\rbrack", r"\{": r"\lbrace",
    r"\}": r"\rbrace", r"\floor{": r"\lfloor", r"\ceil{": r"\lceil", "}": r"\rfloor \rceil",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\sqrt": "√", r"\infty": "∞", r"\emptyset": r"∅ \varnothing",
    r" \text": r"\textbf \textit \textrm \textsf \textnormal \mathrm \mbox \text", "°": r"\degree",
}.items():
    SPELLINGS |= dict.fromkeys(names.split(), meaning + " " * meaning[-1:].isalpha())
NAMES = "sqrt|arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp"
RULES = [(needs, re.compile(pattern, re.ASCII), meaning) for needs, pattern, meaning in (
    # what a text must contain for the rule to be tried, pattern, replacement    # example
    ("", r"(?<=\d)(?:\{,\}|,\\!|\\!,|\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),       # 1{,}234  10,\!080
    ("\\end", r"(?:\\\\)?\s*\\end ?\{\w+\}", r")}"),                            # a matrix is spelled
    ("\\begin", r"\\begin ?\{[vV]matrix\}", r"\\determinant{("),                # \matrix{(1,2),(3,4)}
    ("\\begin", r"\\begin ?\{\w+\}(?:\{[lcr| ]*\})?", r"\\matrix{("),
    ("{(", r"&", ","),
    ("{(", r"\\\\", "),("),
    ("", r"\\(?:[A-Za-z]+|.)|[$~]|[<>:]=|\+/-|[^\x00-\x7f]",                    # \dfrac  \leq  ∞
     lambda match: SPELLINGS.get(match[0], match[0])),
    ("", r"\s+", " "),
    ("\\text", r" ?\\text ?\{ ?([ei]|[\d., -]*) ?\}|^[ {]*\\text ?\{([^{}]*)\}[ .}]*$", r"\1\2"),
    ("", r" ?\\text ?\{[ ,]*(?:and|or) ?\}|\b(?:and|or)\b", ","),               # 1 \text{ or } 2
    ("percent", r" ?(?:percent|\\text ?\{ ?percent ?\})$", "%"),                # 50 percent
    ("", r"\* ?(?=\\text)|(?<=\d)(?=(?:[cmk]m|[mk]g)\b)", " "),                 # 5cm
    (" ", r"(?<![\d.,/^_])(?<!\d )\d{1,3}(?: \d{3}){1,9}(?![\d/]| \d)",         # 1 234
     lambda match: match[0].replace(" ", "")),
    ("°", r"°(?: ?[CF]\b)?", "°"),                                              # 5°C
    ("circ", r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ)(?: ?[CF]\b)?", "°"),             # 90^\circ
    ("prime", r" ?\^ ?(?:\{ ?\\prime ?\}|\\prime)", "'"),                       # y^{\prime}
    ("^", r"\b10 ?\^ ?(-?\d{2,4})(?!\d)", r"10^{\1}"),                          # 4.5*10^33
    ("^", r"\^ ?(\d)(?!\.\d)", r"^{\1}"),                                       # 2^12 is 2^1 2
    ("\\", r"(\\(?:frac|binom|sqrt)) ?(\d)", r"\1{\2}"),                        # \frac12
    ("\\", r"(\\(?:frac|binom) ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),                 # \frac{1}2
    ("\\frac", r"(?<![\d.^_}/])(\d+) ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}", r"(\1+\\frac{\2}{\3})"),
    ("/", r"(?<![\d.^_}/])(\d+) (\d+)/(\d+)(?![\d.])", r"(\1+\\frac{\2}{\3})"),  # 1 4/5
    ("\\over", r"\{?([^{}]*)\\over(?![a-z])([^{}]*)\}?", r"\\frac{\1}{\2}"),    # {1 \over 2}
    ("\\choose", r"\{?([^{}]*)\\choose(?![a-z])([^{}]*)\}?", r"\\binom{\1}{\2}"),
    ("line", r"(\d*\.\d*)\\overline ?\{ ?(\d{1,30}) ?\}", r"\1" + 9 * r"\2"),   # 0.\overline{3}
    ("\\sqrt", r"\\sqrt ?\[([^\[\]]*)\]", r"\\root{\1}"),                       # \sqrt[3]{7}
    ("-1", r"\\(sin|cos|tan) ?\^ ?\{ ?-1 ?\}", r"\\arc\1"),                     # \tan^{-1}
    ("|", r"\|([^|]*)\|", r"\\abs{\1}"),                                        # |x|
    (")", r"\)(?= ?\d)", ")*"),                                                 # (n-2)2^n
    ("_", r"_ ?(?:\{ ?(\w+) ?\}|\{ ?\\text ?\{ ?(\w+) ?\} ?\}|(\d+|[A-Za-z]))", r"_{\1\2\3}"),
    ("_", r"\(([\dA-F]+)\)(?=_)", r"\1"),                                       # (52)_8
    ("", rf"(?<!\\)(?<![A-Za-z][A-Za-z])({NAMES}|pi)(?![A-Za-z]|$)", r"\\\1"),  # sqrt(2)  2 pi
    ("", r"(?<![\\A-Za-z])pi$", r"\\pi"),
    ("log", r"\\log ?_", r"\\logbase"),                                         # \log_2 8
    ("inf", r"\\?\b(?:[Ii]nfinity|inf)\b", r"\\infty"),
    ("", r"^\(?([A-Za-z])[).:]*$", r"\1"),                                      # (C)  C.  C)
    ("]", r"(^|,|\\in|=) ?\]", r"\1("),                                         # ]1,2[ is (1,2)
    ("[", r"\[(?= ?,| ?$)", ")"),
    (" ", r"(?<=\d) (?=\d)", "~"),                                              # 1 2 is not 12
)]
PLAIN = re.compile(r"[+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?")  # needs no cleaning; most golds are


@lru_cache(maxsize=4096)  # a gold is compared with the answers of a complete group
def _clean(text):
    if PLAIN.fullmatch(text):
        return text
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", text)
        text = re.sub("[₀-₉]+", r"_{\g<0>}", text)
        text = re.sub(r"√([0-9]+)", r"√{\1}", text)
        text = re.sub("([¼-¾⅐-⅞])", r" \1", text)  # 1½ is 1 1/2
        text = re.sub("[\u200b\u200c\u200d\u2060\ufeff]", "", text)
        text = unicodedata.normalize("NFKC", text)[:MAX_LENGTH]
    for needs, pattern, meaning in RULES:
        if needs in text:
            text = pattern.sub(meaning, text)
    return text.strip(" *`\"").lstrip("= ").rstrip(" .,;\\")


# ------------------------------------------------------------------------------------------
# Value: an expression is computed by recursive descent over its tokens.

MAX_DEPTH = 30      # nested brackets and commands
MAX_BITS = 130_000  # of a number; the factorial of 5000 has 54,000
MAX_WORK = 500_000  # bits computed in one comparison, and 100 for each step
TOKEN = re.compile(
    r"_\{(?:[^{}]|\{[^{}]*\})*\}|\\text ?\{[^{}]*\}|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
    r"|\\[A-Za-z]+|\\.|[A-Za-z]{4,}|[A-Za-z]'*(?:\(0\))?|\S", re.ASCII)
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
TRIGONOMETRIC = re.compile("sin|cos|tan|cot|sec|csc")
CONSTANTS = {"e": math.e, "i": 1j, "pi": math.pi, "%": Fraction(1, 100), "infty": math.inf}
CLOSING = {"(": ")", "[": "]", "{": "}"}
END, SUM, PRODUCT, FACTOR, POWER = range(5)  # how strongly a token binds to what precedes it
BINDING = {"+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER, "!": POWER}
BINDING |= dict.fromkeys(["", ",", ")", "]", "}"], END)
FAILURES = (ArithmeticError, ValueError, LookupError, TypeError, RecursionError)


def _log(a):
    if isinstance(a, Fraction) and a > 0:  # perhaps too large for a float
        return math.log(a.numerator) - math.log(a.denominator)
    return cmath.log(a)


def _power(a, b):
    if not isinstance(a, Fraction) or not isinstance(b, Fraction) or b.denominator == 1:
        return a ** b
    if a < 0 and b.denominator % 2:  # the real root of a negative number
        return (-1) ** b.numerator * _power(-a, b)
    if a <= 0 or b.denominator > 2:
        return math.exp(b * _log(a)) if a > 0 else a ** b
    root = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
    return root ** b.numerator if root * root == a else math.exp(b * _log(a))


def _factorial(a):
    whole = isinstance(a, Fraction) and a.denominator == 1 and a >= 0
    return Fraction(math.factorial(int(a))) if whole else math.gamma(a + 1)


FUNCTIONS = {"log": _log, "ln": _log, "logbase": lambda b, a: _log(a) / _log(b)}
FUNCTIONS |= {name: getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")}
FUNCTIONS |= {"arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan}
FUNCTIONS |= {"cot": lambda a: 1 / cmath.tan(a), "sec": lambda a: 1 / cmath.cos(a)}
FUNCTIONS |= {"csc": lambda a: 1 / cmath.sin(a)}
OPERATIONS = FUNCTIONS | {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": _power,
    "frac": operator.truediv, "root": lambda n, a: _power(a, 1 / n), "!": _factorial, "abs": abs,
    "sqrt": lambda a: _power(a, Fraction(1, 2)),
    "binom": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n - k)),
    "floor": lambda a: Fraction(math.floor(a.real + Fraction(1, 10**12))),
    "ceil": lambda a: Fraction(math.ceil(a.real - Fraction(1, 10**12)))}
ARGUMENTS = {"frac": 2, "binom": 2, "root": 2, "sqrt": 1, "abs": 1, "floor": 1, "ceil": 1, "logbase": 1}


def _size(name, a, b=0):
    """About how many bits the result of an operation has."""
    if name in ("!", "binom"):
        return abs(a.real) * math.log2(2 + abs(a.real))
    if name == "^" and isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(b) * math.log2(max(abs(a.numerator), a.denominator))
    return sum(value.numerator.bit_length() + value.denominator.bit_length()
               for value in (a, b) if isinstance(value, Fraction))


class Evaluator:
    """The values of expressions in one comparison. Numbers are fractions while they are exact, else
    floats. Variables have values at a few points, which are drawn from the text of both answers."""

    def __init__(self, texts):
        both = "\n".join(sorted(texts))
        self.seed = zlib.crc32(both.encode(errors="replace"))
        self.whole = r"\floor" in both or r"\ceil" in both  # variables are whole numbers
        self.signed = r"\abs" in both
        self.degree = math.pi / 180 if TRIGONOMETRIC.search(both) else Fraction(1)
        self.work = 0
        self.known = {"": []}

    def values(self, text):
        """[its value] for a constant, its values at all points for an expression with variables, and
        [] for a text without a value, or without one within the bounds."""
        if text in self.known:
            return self.known[text]
        values = self.known[text] = []
        tokens = ["", *reversed(TOKEN.findall(text))]  # the next one is the last
        self.varies = True
        try:
            while self.varies and len(values) < (10 if self.whole else 2):
                self.tokens = tokens.copy()
                self.point = len(values)
                self.depth = 0
                self.varies = False
                values.append(self.expression(END))
                assert self.tokens == [""]
        except FAILURES:
            values.clear()
        return values

    def binding(self):
        """How strongly the next token binds to what precedes it."""
        token = self.tokens[-1]
        return BINDING.get(token, PRODUCT if token[1:] in FUNCTIONS else FACTOR)

    def expression(self, strength):
        """The value of an operand and of what binds to it more strongly than `strength`."""
        signs = []
        while self.tokens[-1] in ("+", "-"):
            signs.append(self.tokens.pop())
        value = self.expression(FACTOR) if signs else self.atom()
        if signs.count("-") % 2:
            value = -value
        while (binding := self.binding()) > strength:
            token = self.tokens.pop() if self.tokens[-1] in BINDING else "*"
            if token == "!":
                value = self.apply("!", value)
            else:
                right = self.expression(FACTOR if binding == PRODUCT else binding)
                value = self.apply(token, value, right)
        return value

    def atom(self):
        """The value of a number, variable or group, or of a command with its arguments."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RecursionError
        token = self.tokens.pop()
        name = TEXT.sub(r"\1", token).strip("\\ ")
        if self.tokens and self.tokens[-1][:1] == "_" and name != "logbase":
            value = self.variable(name + self.tokens.pop())  # with its subscript
        elif token in CLOSING:
            value = self.expression(END)
            if self.tokens.pop() != CLOSING[token]:
                raise ValueError("brackets")
        elif token[0].isdigit() or token[0] == ".":
            value = Fraction(token)
        elif name in ARGUMENTS or name in FUNCTIONS:
            value = self.command(name)
        elif token == "°":
            value = self.degree
        elif name in CONSTANTS:
            value = CONSTANTS[name]
        else:
            value = self.variable(name)
        self.depth -= 1
        return value

    def command(self, name):
        r"""A command takes groups; a function then takes all factors that follow, as in \sin 2x."""
        operands = [self.atom() for _ in range(ARGUMENTS.get(name, 0))]
        power = Fraction(1)
        if name in FUNCTIONS:
            if self.tokens[-1] == "^":
                self.tokens.pop()
                power = self.expression(POWER)
            grouped = self.tokens[-1] in CLOSING
            operands.append(self.atom() if grouped else self.expression(PRODUCT))
        return self.apply("^", self.apply(name, *operands), power)

    def variable(self, name):
        if not name[:1].isalnum():
            raise ValueError("an operand is missing")
        self.varies = True
        draw = zlib.crc32(name.encode(errors="replace"), self.seed + self.point)
        if self.whole:
            return Fraction(1 + draw % 16)
        return Fraction(500 + draw % 2500, -997 if self.signed and self.point else 997)

    def apply(self, name, *operands):
        """The value of an operation. Raises where it has none, or none that can be held."""
        size = _size(name, *operands)
        self.work += size + 100
        if size > MAX_BITS or self.work > MAX_WORK:
            raise OverflowError
        value = OPERATIONS[name](*operands)
        if isinstance(value, Fraction):
            return value
        if name in ("*", "/", "frac", "^", "exp"):
            if value == 0 and all(operands) or cmath.isinf(value) and math.inf not in operands:
                raise OverflowError  # too small or too large for a float
        elif abs(value) < 1e-14 * abs(operands[0]):  # floats that cancel, as in sin(pi)
            value = 0.0
        return value


# ------------------------------------------------------------------------------------------
# Comparison: an answer is read as a tree of equations, groups (lists, tuples, ...) and leaves.

STRUCTURE = re.compile(r"\\[{}]|[()\[\]{}]|[,;]|[=<>]|\\(?:le|ge|ne|in)(?![A-Za-z])")
OPENING = re.compile(r"\\matrix ?\{|\\determinant ?\{|\\\{|[(\[{]")
KINDS = {r"\{\}": "set", "{}": "list", r"\matrix{}": "matrix", r"\determinant{}": "determinant",
         "()": "()", "[]": "[]", "(]": "(]", "[)": "[)"}
RELATIONS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
TURNED = {">": "<", r"\ge": r"\le"}
NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{[^{}]*\})?'*(?:\([\w,]+\))?|\((?:[A-Za-z],)+[A-Za-z]\)", re.ASCII)
# A unit: texts or words at the end of a leaf, unless they express doubt, offer a choice or change
# the number.
EXPONENT = r"(?: ?\^ ?(?:\{ ?-?\d ?\}|\d))?"
WORD = (r"(?:[A-Za-z]{4,}|[cmk]?m|[mk]?g|s|ft|in|sq|oz|lbs?|min|sec|hrs?|mph|USD|men|day)"
        r"(?![A-Za-z])\.?")
UNIT = re.compile(
    rf"(?:(?: \\text ?\{{[^{{}}]*\}}{EXPONENT})+"
    rf"| {WORD}{EXPONENT}(?:(?: [A-Za-z]{{2,}}|/[A-Za-z]+){EXPONENT}){{0,4}}) ?$", re.ASCII)
HEDGE = re.compile(
    r"(?<![a-z^{-])\d|[=<>,;?:]|\b(?:not?|base|if|but|maybe|perhaps|possibly|either|unless|about"
    r"|around|roughly|nearly|almost|approx\w*|nor|to|negative|than|more|less|least|most|over|under"
    r"|above|below|up|plus|minus|times|half|hundreds?|thousands?|[mbtr]+illions?|dozens?|pairs?"
    r"|squared|cubed|factorial|mod|wrong|incorrect|except)\b", re.I)
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4}")
LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")

# The forms of a plain gold and of a plain answer.
_OPEN = r"[-+({]*"
_CLOSE = r"[)}]*"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_GOLD = (  # a mixed number, a fraction, a number
    rf"\(\d+\+\\frac\{{\d+\}}\{{\d+\}}\)"
    rf"|\\frac\{{{_OPEN}{_NUMBER}{_CLOSE}\}}\{{{_OPEN}{_NUMBER}{_CLOSE}\}}"
    rf"|{_NUMBER}(?:{_CLOSE}/{_OPEN}{_NUMBER})*")
_POWER = (  # 1e5, 4*10^{5}, 10^{5}
    rf"{_NUMBER}(?:[eE][-+]?\d+|{_CLOSE}\*{_OPEN}10\^\{{[-+]?\d+\}}|{_CLOSE}\^\{{[-+]?\d+\}})")
PLAIN_GOLD = re.compile(rf"{_OPEN}(?:{_GOLD}){_CLOSE}[%°]?")
PLAIN_ANSWER = re.compile(rf"{_OPEN}(?:{_GOLD}|{_POWER}){_CLOSE}[%°]?")
CHOICE = re.compile("[A-Ea-e]")  # whatever its case; `(B) 5`, with its value, is the choice B
CHOICE_WITH_VALUE = re.compile(
    r"^(?:\\text ?\{)?\(([A-E])\)\}?[ ~*]*[-+]?(?:\d|\.\d|\\(?:frac|sqrt|pi))[^A-Z,()]*$")
GROUPED = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)", re.ASCII)  # 1,234
BASE = re.compile(r"^([0-9A-F]*[0-9][0-9A-F]*)_\{[0-9]{1,2}\}$")  # 52_{8}
DECIMAL = re.compile(r"[+-]?0*([0-9]*)\.([0-9]+)")
MAX_ITEMS = 30  # of a list in any order


def answers_equal(answer, gold):
    """Whether the answer equals the gold. An empty gold equals nothing, and neither does a value
    that is not a string. An answer beyond the bounds above equals only itself."""
    if not isinstance(answer, str) or not isinstance(gold, str):
        return False
    answer = answer.strip()
    gold = gold.strip()
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return answer == gold
    a = _clean(answer)
    b = _clean(gold)
    if CHOICE.fullmatch(b):
        a = CHOICE_WITH_VALUE.sub(r"\1", a)
    if not a.strip("{} ") or not b.strip("{} "):
        return False
    if answer == gold or a == b:
        return True
    if PLAIN.fullmatch(a) and PLAIN.fullmatch(b):
        number = Fraction if "." in a + b else int
        return number(a) == number(b)
    evaluator = Evaluator([a, b])
    # 100,200 is one number or, unless a group begins with 0, two: whichever makes them equal.
    readings = [(_join_groups(a), _join_groups(b))]
    if readings != [(a, b)] and not re.search(r",0\d\d", a + "\n" + b):
        readings.append((a, b))
    return any(_equal(_read(a, evaluator), _read(b, evaluator), evaluator) for a, b in readings)


def _join_groups(text):
    if "," not in text or re.search(r"[(\[]|\\\{", text):
        return text
    return GROUPED.sub(lambda group: group[0].replace(",", ""), text)


class Node(NamedTuple):
    kind: str          # leaf, text (a leaf without a value), =, list, set, matrix, (), [), ...
    text: str = ""     # of a leaf: its source; of an equation: the left side
    items: list = ()   # of a group; of an equation: the right side, and left - right


def _split(text, separators):
    """The parts of a text between separators that no brackets hold, and the separators."""
    parts = []
    start = 0
    depth = 0
    for mark in STRUCTURE.finditer(text):
        if depth == 0 and mark[0] in separators:
            parts += [text[start:mark.start()], mark[0]]
            start = mark.end()
        else:
            depth += (mark[0][-1] in "([{") - (mark[0][-1] in ")]}")
    return [text] if depth else [*parts, text[start:]]  # a stray bracket makes it a text


def _read(text, evaluator, kind="list", depth=0):
    """The node of a cleaned text, or of what the brackets of a group of this kind enclose."""
    items = []
    for item in _split(text, ",;")[::2]:
        if kind in ("list", "set") and re.search(r"^(?!\\\{).*\\[pm]{2}(?![a-z])", item):
            items.append(item.replace(r"\pm", "+").replace(r"\mp", "-"))
            items.append(item.replace(r"\pm", "-").replace(r"\mp", "+"))
        elif item.strip():
            items.append(item)
    nodes = [_read_item(item.strip(), evaluator, depth) for item in items]
    if len(nodes) == 1 and kind in ("list", "set", "()", "[]"):
        return nodes[0]
    return Node(kind, items=nodes)


def _read_item(text, evaluator, depth):
    """An equation, an interval (also written as an inequality), a group or a leaf."""
    parts = _split(text, RELATIONS)
    sides = parts[::2]
    signs = parts[1::2]
    named = [bool(NAME.fullmatch(_letters(side))) for side in sides]
    if signs == [r"\in"] and named[0]:
        return _read_item(sides[1].strip(), evaluator, depth)
    if signs and set(signs) == {"="}:
        difference = Node("leaf", f"({sides[0]})-({sides[-1]})")
        if named[-1] and not named[0]:  # 5 = x
            sides.reverse()
        return Node("=", _letters(sides[0]), [_read_item(sides[-1].strip(), evaluator, depth), difference])
    if signs and signs[0] in TURNED:  # so that they rise
        signs = [TURNED.get(sign, sign) for sign in signs[::-1]]
        sides.reverse()
        named.reverse()
    if signs:
        interval = named in ([True, False], [False, True], [False, True, False])
        if not interval or not {"<", r"\le"}.issuperset(signs):
            return Node("text", text)
        low = r"-\infty" if named[0] else sides[0]
        high = r"\infty" if named[-1] else sides[-1]
        opening = "[" if signs[0] == r"\le" and not named[0] else "("
        closing = "]" if signs[-1] == r"\le" and not named[-1] else ")"
        return Node(opening + closing, items=[_read_leaf(low, evaluator), _read_leaf(high, evaluator)])
    if text == r"\emptyset":
        return Node("set")
    opening = OPENING.match(text)
    parts = _split(text[opening.end():], (")", "]", "}", r"\}")) if opening else []
    if len(parts) == 3 and not parts[2] and depth < MAX_DEPTH:
        kind = KINDS.get(opening[0].replace(" ", "") + parts[1])
        if kind:
            return _read(parts[0], evaluator, kind, depth + 1)
    return _read_leaf(text, evaluator)


def _read_leaf(text, evaluator):
    """A leaf without its unit. Only a number loses it."""
    unit = UNIT.search(text)
    if not unit:
        return Node("leaf", text)
    number = text[:unit.start()]
    if HEDGE.search(unit[0]) or len(evaluator.values(number)) != 1:
        return Node("text", text)
    return Node("leaf", number)


@lru_cache(maxsize=4096)
def _letters(text):
    """A text without spaces; words also without case."""
    text = TEXT.sub(r"\1", text).replace(" ", "")
    word = text.isalpha() and (len(text) > 1 or CHOICE.fullmatch(text))  # the variable m is not M
    return text.casefold() if word or WORDS.search(text) else text


def _equal(a, b, evaluator):
    """Whether the nodes of an answer and a gold are equal."""
    kinds = {a.kind, b.kind}
    if kinds == {"="}:
        if a.text == b.text:
            return _equal(a.items[0], b.items[0], evaluator)
        xs = evaluator.values(a.items[1].text)
        ys = evaluator.values(b.items[1].text)
        if len(set(xs)) < 2 or len(set(ys)) < 2:
            return False
        return all(_close(xs[0] * y, ys[0] * x) for x, y in zip(xs, ys))  # 2x - y = 0 is y = 2x
    if a.kind == "=":
        return _names(a, b, evaluator) and _equal(a.items[0], b, evaluator)
    if b.kind == "=":
        return _names(b, a, evaluator, gold=True) and _equal(a, b.items[0], evaluator)
    if kinds <= {"leaf", "text"}:
        return _equal_leaves(a, b, evaluator)
    if a.kind == "matrix" != b.kind and len(a.items) == 1:
        return _equal(a.items[0], b, evaluator)
    if b.kind == "matrix" != a.kind and len(b.items) == 1:
        return _equal(a, b.items[0], evaluator)
    if kinds & {"leaf", "text"} or len(a.items) != len(b.items):
        return False
    if kinds > {"list", "set"} or len(a.items) > MAX_ITEMS:
        return False
    if kinds <= {"list", "set"}:  # in any order
        left = list(b.items)
        for item in a.items:
            found = [other for other in left if _equal(item, other, evaluator)]
            if not found:
                return False
            left.remove(found[0])
        return True
    # A tuple may lose its parentheses, and a vector may be written as a tuple.
    alike = len(kinds) == 1 or kinds in ({"list", "()"}, {"matrix", "()"})
    return alike and all(_equal(x, y, evaluator) for x, y in zip(a.items, b.items))


def _names(equation, other, evaluator, gold=False):
    """Whether an equation only names its right side."""
    name = equation.text
    right = equation.items[0]
    words = len(name) > 1 and (name + _letters(right.text)).isalpha()  # SRAC = LRAC are two
    if NAME.fullmatch(name) and not words:
        return True
    difference = evaluator.values(equation.items[1].text)
    if difference and not any(difference):  # 2 + 3 = 5
        return True
    if gold or other.kind != "leaf" or not PLAIN_GOLD.fullmatch(_letters(other.text)):
        return False
    left = evaluator.values(name)
    return len(left) > 1 or not left and LETTER.search(name) is not None  # m + n = 113


def _equal_leaves(a, b, evaluator):
    """Whether two numbers, expressions or texts are equal."""
    one = _letters(a.text)
    two = _letters(b.text)
    if one and one == two:
        return True
    if "_" in one + two and BASE.sub(r"\1", one) == BASE.sub(r"\1", two):
        return not (BASE.match(one) and BASE.match(two))  # 52 is 52_8, 52_9 is not
    if PLAIN_GOLD.fullmatch(two) and not PLAIN_ANSWER.fullmatch(one):
        return False  # the work is left undone
    if one.isalpha() and two.isalpha() and not len(one) == len(two) == 2 or "text" in (a.kind, b.kind):
        return False  # words, but xy is yx
    xs = evaluator.values(a.text)
    ys = evaluator.values(b.text)
    if not xs or not ys:
        return False
    if len(xs) != len(ys):  # a constant has one value
        xs = xs * (len(ys) // len(xs) or 1)
        ys = ys * (len(xs) // len(ys) or 1)
    if all(map(_close, xs, ys)):
        return True
    if one.endswith("%") != two.endswith("%"):  # the sign may be lost: 50% is 0.5 and 50
        scale = 100 if one.endswith("%") else Fraction(1, 100)
        return all(_close(x * scale, y) for x, y in zip(xs, ys))
    return len(xs) == 1 and (_rounds(one, xs[0], ys[0]) or _rounds(two, ys[0], xs[0]))


def _rounds(text, x, y):
    """Whether a decimal with eight digits or more, worth x, is y rounded or cut off."""
    decimal = DECIMAL.fullmatch(text)
    if not decimal or len((decimal[1] + decimal[2]).lstrip("0")) < 8 or isinstance(y, Fraction) and False:
        return False
    step = 10.0 ** -len(decimal[2])
    return abs(y - x) <= step / 2 or abs(x) < abs(y) and abs(y - x) < step


def _close(a, b):
    """Whether two values are equal: exactly where both are fractions, else to 1e-9 of their size."""
    if a == b or isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    try:
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b)) < math.inf
    except OverflowError:  # a fraction too large for a float
        return False
