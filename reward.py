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
without a unit; a plain answer may also be scientific notation or one power of a number. An equation
with a variable on its left is the answer on its right. Any other gold is compared by value. This
applies to each item of a list, set, tuple or interval.

Fractions are compared exactly, other numbers to 1e-9, texts without regard to case, and expressions
by their values at points drawn from both texts. No text makes this file raise, and whatever could
grow is bounded.
"""

import cmath
import math
import operator
import re
import unicodedata
import zlib
from fractions import Fraction
from functools import lru_cache


def score(completion, golds):
    """One bool for each gold: whether the completion answers that problem correctly."""
    return list(map(answers_equal, extract_answers(completion, len(golds)), golds))


# Extraction: a completion is a sequence of headers `### Problem i`, labels `Answer i:` and boxes.

MAX_LENGTH = 500  # characters of an answer; a longer one equals only itself
MAX_MARKS = 1000  # headers, labels and boxes of a completion, counted from its end
MAX_TRIES = 8     # boxes of a problem that are read, counted from its last
# The number of a problem or the letter i, but no number if there are several, as in `Answers 1-3`.
SEVERAL = r"[ \t]?(?:[-–,&]|and|to)[ \t]?[0-9]"
INDEX = (rf"[ \t*_#($]{{0,4}}(?:([0-9]{{1,99}})(?!{SEVERAL})|(i)|[0-9]{{1,99}})(?![0-9A-Za-z])"
         rf"(?:{SEVERAL})?")
HEADER = re.compile("Problem" + INDEX)
HEADER_START = re.compile(r"(?:^|\n)[ \t]{0,3}(?:#{1,6}|\*\*)[ \t*]{0,4}$")
LABEL = re.compile(r"Answer(?:[ \t](?:to|for))?(?:[ \t]Problem)?" + INDEX + r"[ \t*_)$]{0,4}[:：]")
# A label begins its line, apart from markup, or follows the end of a sentence or of a box.
LABEL_START = re.compile(r"(?:^|[\n.!?;>]|boxed ?\{[^\n]{1,40}\})"
                         r"(?:[\s*_#>|$()\\\]\",;&-]|\d\)|and ){0,20}(?:[Ff]inal )?$")
# A label owns the boxes of its line or, if that has none, the box that follows immediately.
LABEL_REACH = re.compile(r"[^\n]{0,1000}|[\s$*_:>\\\[\](){}-]{0,100}")
# A box without braces needs a value: digits, a command or a letter; "\boxed as asked" is prose.
BOX = re.compile(
    r"\\(?:boxed|fbox)(?![a-z])\s{0,9}(?:(?=\{)|([-+]?\.?\d[^\s$\\{}()]{0,99}"
    r"|[-+]?\\(?!boxed|fbox)[A-Za-z]+[^\s$]{0,99}|[A-Za-z](?![A-Za-z])[^\s$\\{}()]{0,99}))")
ANYWHERE = re.compile("")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
PLACEHOLDER = re.compile(r"(?:[\s.…?_]|\\[cl]?dots(?![a-z])|\\[,;:! ]|\\text\{[\s.…]*\})*")


def extract_answers(completion, n):
    """n entries: the text of the box that answers problem i, or None if there is none.

    A box labelled `Answer i:` belongs to problem i wherever it is; any other box belongs to its
    section. The last box of a problem counts, a labelled one before all others; one without braces
    never overrides one with braces. What follows `</think>` overrides what precedes it."""
    completion = completion if isinstance(completion, str) else ""
    thinking, _, reply = completion.rpartition("</think>")
    answers = {index: (False, None) for index in range(1, n + 1)}  # (has braces, content)
    for part in (thinking, reply):
        for (index, _), boxes in sorted(_boxes(part, n).items()):  # labelled boxes come second
            for box in boxes[-MAX_TRIES:] if index in answers else []:
                content = box[1] or _braced(part, box.end())
                braced = not box[1] and content != "i"  # the i of the prompt's `Answer i:`
                if not PLACEHOLDER.fullmatch(content) and (braced or not answers[index][0]):
                    answers[index] = (braced, content)
    return [content for _, content in answers.values()]


def find_headers(completion):
    """The headers `### Problem i` as pairs: the problem's number (0 if there is not exactly one),
    and the offset in the completion at which the header's line starts."""
    return [(int(mark[1] or 0), mark.string.rfind("\n", 0, mark.start()) + 1)
            for mark in _marks(completion) if mark.re is HEADER]


def _marks(completion):
    """The headers, labels and boxes, in order. Words get one spelling, so that each pattern begins
    with a fixed word and 10^6 characters are searched in a millisecond."""
    text = completion.replace("\r", "\n")
    marks = []
    for pattern, word, start in ((HEADER, "Problem", HEADER_START), (LABEL, "Answer", LABEL_START),
                                 (BOX, "box", ANYWHERE)):
        text = text.replace(word.upper(), word).replace(word.lower(), word)
        first = max(0, len(text.rsplit(word, MAX_MARKS)[0]) - 2)
        marks += [mark for mark in pattern.finditer(text, first)
                  if start.search(text, max(0, mark.start() - 60), mark.start())]
    return sorted(marks, key=re.Match.start)


def _boxes(completion, n):
    """{(index, whether they are labelled): its boxes, in order}."""
    marks = _marks(completion)
    section = int(n == 1 and all(mark.re is not HEADER for mark in marks))  # one needs no header
    label = None
    found = {}
    for mark in marks:
        if mark.re is HEADER:
            section = int(mark[1] or 0)
            label = None
        elif mark.re is LABEL:
            label = mark
        else:
            labelled = label and LABEL_REACH.fullmatch(mark.string, label.end(), mark.start())
            index = section
            if labelled and not label[2]:  # the letter i stands for the section's number
                index = int(label[1] or 0)
            found.setdefault((index, bool(labelled)), []).append(mark)
    return found


def _braced(text, start):
    """What the braces at `start` enclose, "" if they never close."""
    depth = 0
    for brace in BRACE.finditer(text, start, start + MAX_LENGTH):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1:brace.start()].strip()
    return ""


# Cleaning: one spelling for what LaTeX, Unicode and plain text write in several ways.

SPELLINGS = {}
for line in r"""
nothing \left \right \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \limits \boxed \fbox
nothing \operatorname \mathbb \mathbf \mathit \mathsf \mathcal \bm \boldsymbol \! \( \) \[ \] $ \$
nothing $ \$ € £ ¥
space ~ \, \; \: \quad \qquad  - − – — ‐ ‑ ‒  * × · ⋅ ∙ \times \cdot \ast  / ÷ ⁄ ∕ \div
= ≈ := \approx  < \lt  > \gt  \le ≤ ⩽ <= \leq \leqslant  \ge ≥ ⩾ >= \geq \geqslant  \ne ≠ \neq
, ∪ \cup \lor \land  \pm ± +/-  \mp ∓  ' ′ ’  % \%  | \vert \lvert \rvert \mid  \infty ∞  \sqrt √
( \langle  ) \rangle  [ \lbrack  ] \rbrack  \{ \lbrace  \} \rbrace  \floor{ \lfloor  \ceil{ \lceil
\in ∈  } \rfloor \rceil  \emptyset ∅ \varnothing  ° \degree  \frac \dfrac \tfrac \cfrac
\text \textbf \textit \textrm \textsf \textnormal \mathrm \mbox
\alpha α  \beta β  \gamma γ  \delta δ  \epsilon ε  \zeta ζ  \eta η  \theta θ  \iota ι  \kappa κ
\lambda λ  \mu μ  \nu ν  \xi ξ  \omicron ο  \pi π  \rho ρ  \varsigma ς  \sigma σ  \tau τ
\upsilon υ  \phi φ  \chi χ  \psi ψ  \omega ω
""".replace("  ", "\n").strip().splitlines():
    meaning, *names = line.split()
    meaning = {"nothing": "", "space": " "}.get(meaning, meaning)
    SPELLINGS |= dict.fromkeys(names, meaning + " " * meaning[-1:].isalpha())
SPELLINGS["\\ "] = " "
UNIT = (  # texts or words that follow a number and end an answer or an item
    r"(?<=[\d.)}°%!i])(?:(?: \\text ?\{[^{}]*\}POWER)+| (?:[A-Za-z]{4,}|[cmk]?m|[mk]?g|s|ft|in|sq"
    r"|oz|lbs?|min|sec|hrs?|mph|USD|men|day)(?![A-Za-z])\.?POWER(?:(?: [A-Za-z]{2,}"
    r"|/[A-Za-z]+)POWER){0,4})(?= ?\.?(?:[,;)}\]]|\\\}|$))"
    ).replace("POWER", r"(?: ?\^ ?(?:\{ ?-?\d ?\}|\d))?")
HEDGE = re.compile(  # but words that express doubt, offer a choice or change the number are no unit
    r"(?<![a-z^{-])\d|[=<>,;?:]|\b(?:not?|base|if|but|maybe|perhaps|possibly|either|unless|about"
    r"|around|roughly|nearly|almost|approx\w*|nor|to|negative|than|more|less|least|most|over|under"
    r"|above|below|up|plus|minus|times|half|hundreds?|thousands?|[mbtr]+illions?|dozens?|pairs?"
    r"|squared|cubed|factorial|mod|wrong|incorrect|except)\b", re.IGNORECASE)
NAMES = "sqrt|arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp"
MIXED = r"\\mixed{\1}{\2}{\3}"
RULES = [(needs, re.compile(pattern, re.ASCII), meaning) for needs, pattern, meaning in (
    # what a text must contain for the rule to be tried, pattern, replacement    # example
    ("", r"(?<=\d)(?:\{,\}|,\\!|\\!,|\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),       # 1{,}234  10,\!080
    ("\\begin", r"\\begin ?\{[vV]matrix\}", r"\\determinant{("),              # a matrix is spelled
    ("\\begin", r"\\begin ?\{\w+\}(?:\{[lcr| ]*\})?", r"\\matrix{("),        # \matrix{(1,2),(3,4)}
    ("\\end", r"(?:\\\\)?\s*\\end ?\{\w+\}", r")}"), ("{(", "&", ","), ("{(", r"\\\\", "),("),
    ("", r"\\(?:[A-Za-z]+|.)|[$~]|[<>:]=|\+/-|[^\x00-\x7f]", lambda m: SPELLINGS.get(m[0], m[0])),
    ("\\text", r"\\text", r" \\text"),
    ("", r"\s+", " "),
    ("\\text", r" ?\\text ?\{ ?([ei]|[\d., -]*) ?\}|^[ {]*\\text ?\{([^{}]*)\}[ .}]*$", r"\1\2"),
    ("", r" ?\\text ?\{[ ,]*(?:and|or) ?\}|\b(?:and|or)\b", ","),               # 1 \text{ or } 2
    ("percent", r" ?(?:percent|\\text ?\{ ?percent ?\})$", "%"),                # 50 percent
    ("", r"\* ?(?=\\text)|(?<=\d)(?=(?:[cmk]m|[mk]g)\b)", " "),                 # 5cm
    (" ", r"(?<!\d{4})(?<=\d) (?=\d{3}(?: \d{3})*(?![\d/]| \d))", ""),          # 1 234
    ("°", r"°(?: ?[CF]\b)?", "°"),                                              # 5°C
    ("circ", r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ)(?: ?[CF]\b)?", "°"),             # 90^\circ
    ("prime", r" ?\^ ?(?:\{ ?\\prime ?\}|\\prime)", "'"),                       # y^{\prime}
    ("^", r"\b10 ?\^ ?(-?\d{2,4})(?!\d)", r"10^{\1}"),                          # 4.5*10^33
    ("^", r"\^ ?(\d)(?!\.\d)", r"^{\1}"),                                       # 2^12 is 2^1 2
    ("\\", r"(\\(?:frac|binom|sqrt)) ?(\d)", r"\1{\2}"),                        # \frac12
    ("\\", r"(\\(?:frac|binom) ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),                 # \frac{1}2
    ("\\frac", r"(?<![\d.^_}/])(\d+) ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}", MIXED),
    ("/", r"(?<![\d.^_}/])(\d+) (\d+)/(\d+)(?![\d.])", MIXED),                  # 1 4/5
    ("\\over", r"\{?([^{}]*)\\over(?![a-z])([^{}]*)\}?", r"\\frac{\1}{\2}"),    # {1 \over 2}
    ("\\choose", r"\{?([^{}]*)\\choose(?![a-z])([^{}]*)\}?", r"\\binom{\1}{\2}"),
    ("line", r"(\d*\.\d*)\\overline ?\{ ?(\d{1,30}) ?\}", r"\1" + 9 * r"\2"),   # 0.\overline{3}
    ("\\sqrt", r"\\sqrt ?\[([^\[\]]*)\]", r"\\root{\1}"),                       # \sqrt[3]{7}
    ("-1", r"\\(sin|cos|tan) ?\^ ?\{ ?-1 ?\}", r"\\arc\1"),                     # \tan^{-1}
    ("|", r"\|([^|]*)\|", r"\\abs{\1}"),                                        # |x|
    ("_", r"_ ?(?:\{ ?(\w+) ?\}|\{ ?\\text ?\{ ?(\w+) ?\} ?\}|(\d+|[A-Za-z]))", r"_{\1\2\3}"),
    ("_", r"\(([\dA-F]+)\)(?=_)", r"\1"),                                       # (52)_8
    ("", rf"(?<!\\)(?<![A-Za-z][A-Za-z])(?:({NAMES})(?![A-Za-z]|$)|(pi)(?![A-Za-z]))", r"\\\1\2"),
    ("log", r"\\log ?_", r"\\logbase"),                                         # \log_2 8
    ("inf", r"\\?\b(?:[Ii]nfinity|inf)\b", r"\\infty"),
    ("", r"^\(?([A-Za-z])[).:]*$", r"\1"),                                      # (C)  C.  C)
    ("]", r"(^|,|\\in|=) ?\]", r"\1("), ("[", r"\[(?= ?,| ?$)", ")"),           # ]1,2[ is (1,2)
    (" ", UNIT, lambda m: m[0] if HEDGE.search(m[0]) else ""),                  # 5 cm
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


# Value: an expression is computed by recursive descent over its tokens.

MAX_BITS = 130_000  # of a power
MAX_FACTORIAL = 5000
MAX_WORK = 350_000  # of a comparison: bits read and written, and 350 for each step
TOLERANCE = Fraction(1, 10**12)  # of floor and ceil


def _log(a):
    if isinstance(a, Fraction) and a > 0:  # perhaps too large for a float
        return math.log(a.numerator) - math.log(a.denominator)
    return cmath.log(a)


def _power(a, b):
    if not isinstance(a, Fraction) or not isinstance(b, Fraction):
        return a ** b
    if abs(b) * math.log2(max(abs(a.numerator), a.denominator)) > MAX_BITS:
        raise OverflowError
    if a < 0 and b.denominator % 2:  # the real root of a negative number
        return (-1) ** b.numerator * _power(-a, b)
    root = Fraction(math.isqrt(abs(a.numerator)), math.isqrt(a.denominator))
    if b.denominator == 2 and root * root == a:
        return root ** b.numerator
    return math.exp(b * _log(a)) if a > 0 and b.denominator > 1 else a ** b


def _factorial(a):
    whole = isinstance(a, Fraction) and a.denominator == 1 and 0 <= a <= MAX_FACTORIAL
    return Fraction(math.factorial(int(a))) if whole else math.gamma(a + 1)


def _binomial(n, k):
    if n in range(MAX_FACTORIAL) and k in range(MAX_FACTORIAL):
        return Fraction(math.comb(int(n), int(k)))
    return _factorial(n) / (_factorial(k) * _factorial(n - k))


def _bits(value):
    exact = isinstance(value, Fraction)
    return value.numerator.bit_length() + value.denominator.bit_length() if exact else 64


FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda a: 1 / cmath.tan(a),
    "sec": lambda a: 1 / cmath.cos(a), "csc": lambda a: 1 / cmath.sin(a), "sinh": cmath.sinh,
    "cosh": cmath.cosh, "tanh": cmath.tanh, "arcsin": cmath.asin, "arccos": cmath.acos,
    "arctan": cmath.atan, "exp": cmath.exp, "ln": _log, "log": _log,
    "logbase": lambda b, a: _log(a) / _log(b)}
OPERATIONS = FUNCTIONS | {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": _power,
    "!": _factorial, "frac": operator.truediv, "mixed": lambda a, b, c: a + b / c, "abs": abs,
    "sqrt": lambda a: _power(a, Fraction(1, 2)), "root": lambda n, a: _power(a, 1 / n),
    "binom": _binomial, "floor": lambda a: Fraction(math.floor(a.real + TOLERANCE)),
    "ceil": lambda a: Fraction(math.ceil(a.real - TOLERANCE))}
GROUPS = {"frac": 2, "mixed": 3, "abs": 1, "sqrt": 1, "root": 2, "binom": 2, "floor": 1, "ceil": 1,
          "logbase": 1}  # how many follow a command
CONSTANTS = {"e": math.e, "i": 1j, "pi": math.pi, "%": Fraction(1, 100)}
TOKEN = re.compile(
    r"_\{(?:[^{}]|\{[^{}]*\})*\}|\\text ?\{[^{}]*\}|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
    r"|\\[A-Za-z]+|\\.|[A-Za-z]{4,}|[A-Za-z]'*(?:\(0\))?|\S", re.ASCII)
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
CLOSING = {"(": ")", "[": "]", "{": "}"}
RELATIONS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
END, SUM, PRODUCT, FACTOR, POWER = range(5)  # how strongly a token binds to what precedes it
BINDING = {"\\" + name: PRODUCT for name in FUNCTIONS} | {
    "+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER, "!": POWER}
BINDING |= dict.fromkeys(["", ",", ")", "]", "}", *RELATIONS], END)


class Evaluator:
    """The values of expressions in one comparison. Numbers are fractions while they are exact, else
    floats. Variables have values at a few points, which are drawn from the texts of both sides."""

    def __init__(self, both):
        self.both = both
        self.whole = r"\floor" in both or r"\ceil" in both  # variables are whole numbers
        self.work = 0
        self.known = {}

    def values(self, text):
        """The values of an expression at all points, [] if it has none within the bounds."""
        if text in self.known:
            return self.known[text]
        values = self.known[text] = []
        points = 10 if self.whole else 2
        try:
            while len(values) < points:
                self.point = len(values)
                self.tokens = ["", *reversed(TOKEN.findall(text))]  # the next one is the last
                self.varies = False
                values.append(self.expression(END))
                if self.tokens != [""]:
                    raise ValueError("a stray bracket")
                if not self.varies:
                    values *= points
        except (ArithmeticError, ValueError, LookupError, TypeError, RecursionError):
            values.clear()
        return values

    def expression(self, strength):
        """The value of an operand and of what binds to it more strongly than `strength`."""
        if self.tokens[-1] in ("+", "-"):
            value = self.apply(self.tokens.pop(), Fraction(0), self.expression(FACTOR))
        else:
            value = self.atom()
        while (binding := BINDING.get(self.tokens[-1], FACTOR)) > strength:
            operands = [value]
            token = self.tokens.pop() if self.tokens[-1] in OPERATIONS else "*"
            if token != "!":
                operands.append(self.expression(FACTOR if binding == PRODUCT else binding))
            value = self.apply(token, *operands)
        return value

    def atom(self):
        """The value of a number, name or group, or of a command with its arguments."""
        token = self.tokens.pop()
        name = TEXT.sub(r"\1", token).strip("\\ ")
        if self.tokens[-1][:1] == "_":  # a subscript
            return self.variable(name + self.tokens.pop())
        if token in CLOSING:
            value = self.expression(END)
            if self.tokens.pop() != CLOSING[token]:
                raise ValueError("brackets")
            return value
        if token[0] in "0123456789.":
            return Fraction(token)
        if name in CONSTANTS:
            return CONSTANTS[name]
        if token == "°":
            return math.pi / 180 if re.search("sin|cos|tan|cot|sec|csc", self.both) else Fraction(1)
        return self.command(name) if name in OPERATIONS else self.variable(name)

    def command(self, name):
        r"""A command takes groups; a function then takes all factors that follow, as in \sin 2x."""
        operands = [self.atom() for _ in range(GROUPS.get(name, 0))]
        exponent = Fraction(1)
        if name in FUNCTIONS:
            if self.tokens[-1] == "^":
                self.tokens.pop()
                exponent = self.expression(POWER)
            grouped = self.tokens[-1] in CLOSING
            operands.append(self.atom() if grouped else self.expression(PRODUCT))
        return self.apply("^", self.apply(name, *operands), exponent)

    def variable(self, name):
        if not name[:1].isalnum():
            raise ValueError("an operand is missing")
        self.varies = True
        draw = zlib.crc32(f"{self.point}{name}{self.both}".encode(errors="replace"))
        if self.whole:  # the last bits of similar texts are alike: mix them
            return Fraction(1 + (draw * 2654435761 >> 20) % 16)
        negative = self.point and r"\abs" in self.both
        return Fraction(500 + draw % 2500, -997 if negative else 997)

    def apply(self, name, *operands):
        """The value of an operation. Raises where it has none, or none that can be held."""
        self.work += 350 + sum(map(_bits, operands))
        if name == "binom":
            self.work += 16 * int(operands[0].real)
        if self.work > MAX_WORK:
            raise OverflowError
        value = OPERATIONS[name](*operands)
        self.work += _bits(value)
        if isinstance(value, Fraction):
            return value
        if name in ("*", "/", "frac", "^", "exp"):
            if value == 0 and all(operands) or not cmath.isfinite(value):
                raise OverflowError  # too small or too large for a float
        elif abs(value) < 1e-9 and abs(value) < 1e-14 * abs(operands[0]):
            value = 0.0  # what is left of floats that cancel, as in sin(pi)
        return value


# Comparison: an answer is a leaf (a number, expression or text), an equation, or a group of answers
# (a list, set, tuple, interval or matrix).

CHOICE = re.compile("[A-Ea-e]")  # whatever its case; `(B) 5`, with its value, is the choice B
CHOICE_WITH_VALUE = re.compile(
    r"^(?:\\text ?\{)?\(([A-E])\)\}?[ ~*]*[-+]?(?:\d|\.\d|\\(?:frac|sqrt|pi))[^A-Z,()]*$")
GROUPED = re.compile(  # the comma of 1,234, outside of brackets
    r"(?<!\d{4})(?<!\d,\d)(?<!\d,\d\d)(?<!\.\d)(?<!\.\d\d)(?<!\.\d{3})(?<=\d),"
    r"(?=\d{3}(?:,\d{3})*(?!\d|,\d))(?![^(\[]*(?:[)\]]|\\\}))", re.ASCII)


def answers_equal(answer, gold):
    """Whether the answer equals the gold. An empty gold equals nothing, and neither does a value
    that is not a string. An answer beyond the bounds above equals only itself."""
    if not isinstance(answer, str) or not isinstance(gold, str):
        return False
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return answer.strip() == gold.strip()
    a = _clean(answer.strip())
    b = _clean(gold.strip())
    if CHOICE.fullmatch(b):
        a = CHOICE_WITH_VALUE.sub(r"\1", a)
    if not a.strip("{} ") or not b.strip("{} "):
        return False
    if a == b or answer.strip() == gold.strip():
        return True
    if PLAIN.fullmatch(a) and PLAIN.fullmatch(b):
        return Fraction(a) == Fraction(b)
    # 100,200 is one number or, unless a group begins with 0, two: whichever makes them equal.
    joined = [GROUPED.sub("", a), GROUPED.sub("", b)]
    separate = joined != [a, b] and not re.search(r",0\d\d", a + b)
    values = Evaluator("\n".join(sorted([a, b]))).values
    try:
        return _equal(*joined, values) or separate and _equal(a, b, values)
    except OverflowError:  # a fraction too large for a float
        return False


MAX_DEPTH = 30  # nested brackets
STRUCTURE = re.compile(r"\\[{}]|[()\[\]{}]|[,;]|[=<>]|\\(?:le|ge|ne|in)(?![A-Za-z])")
OPENING = re.compile(r"\\matrix ?\{|\\determinant ?\{|\\\{|[(\[{]")
KINDS = {r"\{\}": "set", "{}": "list", r"\matrix{}": "matrix"}  # others are their own brackets
NAME = r"(?:\\?[A-Za-z]+(?:_\{[^{}]*\})?'*(?:\([\w,]+\))?|\((?:[A-Za-z],)+[A-Za-z]\))"
TURNED = {">": "<", r"\ge": r"\le"}
NAMED = re.compile(rf"(?![A-Za-z]{{2,}}=[A-Za-z]+$){NAME}=", re.ASCII)  # SRAC = LRAC are two


def _split(text, separators):
    """The parts of a text between separators that no brackets hold, and the separators."""
    parts = []
    start = 0
    depth = 0
    for mark in STRUCTURE.finditer(text):
        if depth == 0 and mark[0] in separators:
            parts += [text[start:mark.start()].strip(), mark[0]]
            start = mark.end()
        else:
            depth += (mark[0][-1] in "([{") - (mark[0][-1] in ")]}")
        if depth > MAX_DEPTH:
            break
    return [text] if depth else [*parts, text[start:].strip()]  # a stray bracket makes it a text


def _items(text):
    """The texts between commas; one with ± is two, unless it is a set."""
    items = []
    for item in filter(None, _split(text, ",;")[::2]):
        if re.search(r"^(?!\{?\\\{).*\\(?:pm|mp)\b", item):
            items.append(item.replace(r"\pm", "+").replace(r"\mp", "-"))
            item = item.replace(r"\pm", "-").replace(r"\mp", "+")
        items.append(item)
    return items


@lru_cache(maxsize=4096)
def _read(text):
    """(kind, items) of a cleaned text: a leaf is one text, and an equation has two sides."""
    items = _items(text)
    if len(items) != 1:
        return "list", items
    text = items[0]
    parts = _split(text, RELATIONS)
    if len(parts) > 1:
        return _read_relation(text, parts[::2], parts[1::2])
    opening = OPENING.match(text)
    closing = _split(text[opening.end():], (")", "]", "}", r"\}")) if opening else []
    if closing[2:] != [""]:  # no brackets enclose all of the text
        return ("set", []) if text == r"\emptyset" else ("leaf", [text])
    brackets = opening[0].replace(" ", "") + closing[1]
    items = _items(closing[0])
    if len(items) == 1 and brackets == r"\matrix{}":
        return "row", _read(items[0])[1]
    if len(items) == 1 and brackets in ("{}", r"\{\}", "()", "[]"):
        return _read(items[0])
    return KINDS.get(brackets, brackets), items


def _read_relation(text, sides, signs):
    """An equation, or an interval that is written as an inequality."""
    if signs[0] in TURNED:  # so that they rise
        signs = [TURNED.get(sign, sign) for sign in reversed(signs)]
        sides = sides[::-1]
    named = [bool(NAMED.match(_letters(side) + "=")) for side in sides]
    if signs == [r"\in"] and named[0]:
        return _read(sides[1])
    if set(signs) == {"="}:
        turned = named[-1] and not named[0]  # 5 = x
        return "=", [sides[-1], sides[0]] if turned else [sides[0], sides[-1]]
    ordered = {"<", r"\le"}.issuperset(signs)
    if ordered and named in ([True, False], [False, True], [False, True, False]):
        low = r"(-\infty" if named[0] else {"<": "("}.get(signs[0], "[") + sides[0]
        high = r"\infty)" if named[-1] else sides[-1] + {"<": ")"}.get(signs[-1], "]")
        return _read(f"{low},{high}")
    return "leaf", [text]


@lru_cache(maxsize=4096)
def _letters(text):
    """A text without spaces; words also without case."""
    text = TEXT.sub(r"\1", text).replace(" ", "")
    word = text.isalpha() and (len(text) > 1 or CHOICE.fullmatch(text))  # the variable m is not M
    return text.casefold() if word or re.search(r"(?<![\\A-Za-z])[A-Za-z]{4}", text) else text


# The forms of a plain gold and of a plain answer.
_OPEN = r"[-+({]*"
_CLOSE = r"[)}]*"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_GOLD = (r"\\mixed\{\d+\}\{\d+\}\{\d+\}"
         rf"|\\frac\{{{_OPEN}{_NUMBER}{_CLOSE}\}}\{{{_OPEN}{_NUMBER}{_CLOSE}\}}"
         rf"|{_NUMBER}(?:{_CLOSE}/{_OPEN}{_NUMBER})*")
_POWER = (  # 1e5, 4*10^{5}, 10^{5}
    rf"{_NUMBER}(?:[eE][-+]?\d+|{_CLOSE}\*{_OPEN}10\^\{{[-+]?\d+\}}|{_CLOSE}\^\{{[-+]?\d+\}})")
PLAIN_GOLD = re.compile(rf"{_OPEN}(?:{_GOLD}){_CLOSE}[%°]?")
PLAIN_ANSWER = re.compile(rf"{_OPEN}(?:{_GOLD}|{_POWER}){_CLOSE}[%°]?")
BASE = re.compile(r"^([0-9A-F]*[0-9][0-9A-F]*)_\{[0-9]{1,2}\}$")  # 52_{8}
DECIMAL = re.compile(r"[+-]?0*([0-9]*)\.([0-9]+)")
MAX_ITEMS = 30  # of a list in any order


def _equal(answer, gold, values):
    """Whether two cleaned texts are equal."""
    kind, items = _read(answer)
    other, golds = _read(gold)
    kinds = {kind, other}
    if kinds == {"leaf"}:
        return _equal_leaves(items[0], golds[0], values)
    if kinds == {"="} and _letters(items[0]) != _letters(golds[0]):
        xs = values("({})-({})".format(*items))
        ys = values("({})-({})".format(*golds))
        varies = len(set(xs)) > 1 and len(set(ys)) > 1
        return varies and all(_close(xs[0] * y, ys[0] * x) for x, y in zip(xs, ys))
    if "=" in kinds:
        plain = PLAIN_GOLD.fullmatch(_letters(gold))
        left, right = items if kind == "=" else golds
        named = kind == other or _names(left, right, plain, values)
        answer = right if kind == "=" else answer
        return named and _equal(answer, golds[1] if other == "=" else gold, values)
    if len(items) != len(golds):
        return False
    if kinds <= {"list", "set"} and len(items) <= MAX_ITEMS:  # in any order
        golds = list(golds)
        for item in items:
            found = [gold for gold in golds if _equal(item, gold, values)]
            if not found:
                return False
            golds.remove(found[0])
        return True
    # A tuple may lose its parentheses, and a vector may be written as a tuple.
    alike = len(kinds) == 1 or "()" in kinds and kinds <= {"()", "list", "matrix", "row"}
    return alike and all(_equal(x, y, values) for x, y in zip(items, golds))


def _names(left, right, plain, values):
    """Whether an equation stands for its right side."""
    if NAMED.match(f"{_letters(left)}={_letters(right)}"):  # x = 5
        return True
    difference = values(f"({left})-({right})")
    if difference and not any(difference):  # 2 + 3 = 5
        return True
    points = values(left)
    letter = re.search(r"(?<![\\A-Za-z])[A-Za-z]", left)
    return bool(plain and (len(set(points)) > 1 or letter and not points))  # m + n = 113


def _equal_leaves(answer, gold, values):
    """Whether two numbers, expressions or texts are equal."""
    a = _letters(answer)
    b = _letters(gold)
    if a == b:
        return True
    if "_" in a + b and BASE.sub(r"\1", a) == BASE.sub(r"\1", b):
        return not (BASE.match(a) and BASE.match(b))  # 52 is 52_8, 52_9 is not
    if PLAIN_GOLD.fullmatch(b) and not PLAIN_ANSWER.fullmatch(a):
        return False  # the work is left undone
    if a.isalpha() and b.isalpha() and not len(a) == len(b) == 2:
        return False  # words, but xy is yx
    xs = values(answer)
    ys = values(gold)
    if not xs or not ys:
        return False
    if a.endswith("%") != b.endswith("%"):  # the sign may be lost: 50% is 0.5 and 50
        scale = 100 if a.endswith("%") else Fraction(1, 100)
        return _close(xs[0], ys[0]) or _close(xs[0] * scale, ys[0])
    return all(_close(x, y) or _rounds(a, x, y) or _rounds(b, y, x) for x, y in zip(xs, ys))


def _rounds(text, x, y):
    """Whether a decimal with eight digits or more, worth x, is y rounded or cut off."""
    decimal = DECIMAL.fullmatch(text)
    if not decimal or len((decimal[1] + decimal[2]).lstrip("0")) < 8:
        return False
    step = 10.0 ** -len(decimal[2])
    return abs(y - x) <= step / 2 or abs(x) < abs(y) and abs(y - x) < step


def _close(a, b):
    """Whether two values are equal: exactly if both are fractions, else to 1e-9 of their size."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    try:
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    except OverflowError:
        return False
