r"""
The reward: which of the N problems a completion answers correctly.

gold               | right                                      | wrong
-------------------|--------------------------------------------|------------------------------
1234               | 1,234   1\,234   1234.0   x = 1234         | (1,234)   1,235
\frac{3}{4}        | 3/4   0.75   \dfrac34   P(A) = \frac{6}{8} | 0.7   3:4   1/4+1/2
23                 | 23 \text{ cm}   14+6+3=23   m+n=23         | 14+6+3   x=2 or x=23   23x
50\%               | 0.5   1/2   50                             | 5\%   25\%+25\%
4.5e33             | 4.5 \times 10^{33}                         | 4.5 \times 10^{32}
2^{2018}           | 4^{1009}   2 \cdot 2^{2017}                | 2^{2017}   2^{2018}+1
n(n+1)             | n^2+n   f(n)=n+n^2                         | n(n-1)   6
[1,2]              | 1 \le x \le 2                              | [1,2)   1,2   \{1,2\}
y = 2x+3           | 2x - y + 3 = 0                             | y = 2x-3

A plain gold (an integer, decimal, fraction of integers, mixed number or percentage, with or without
a unit) asks for a plain answer, which may also be scientific notation or one power of a number: to
copy "14 + 6 + 3" out of a problem earns nothing. An equation with a variable on its left is its
right side. Other golds are compared by value: fractions exactly, other numbers to 1e-9, expressions
at a few points; texts without regard to case. Lists, sets, tuples and intervals are compared item
by item. No text makes this file raise, and whatever could grow is bounded.
"""

import cmath
import math
import operator
import random
import re
import zlib
from fractions import Fraction
from functools import lru_cache
from unicodedata import normalize


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

SPELLINGS = {"\\ ": " "} | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
for line in r"""
nothing \left \right \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \textstyle \limits \boxed \fbox
nothing \operatorname \mathbb \mathbf \mathit \mathsf \mathcal \boldsymbol \! \( \) \[ \] $ \$ €
space ~ \, \; \: \quad \qquad  - − – —  * × · ⋅ \times \cdot \ast  / ÷ ⁄ \div  = ≈ \approx \in ∈
< \lt  > \gt  \le ≤ <= \leq \leqslant  \ge ≥ >= \geq \geqslant  \ne ≠ \neq  , ∪ \cup \lor  \pm ± +/-
' ′ ’ \prime  % \%  \infty ∞  \pi π  \sqrt √  ( \langle  ) \rangle  \{ \lbrace  \} \rbrace
\{\} \emptyset ∅ \varnothing  \frac \dfrac \tfrac \cfrac  \frac{1}{2} ½  ^{2} ²  ^{3} ³
° \degree \circ  \floor{ \lfloor  \ceil{ \lceil  } \rfloor \rceil  text \text \textbf \mathrm \mbox
""".replace("  ", "\n").strip().splitlines():
    meaning, *names = line.split()
    meaning = {"nothing": "", "space": " ", "text": " \\text"}.get(meaning, meaning)
    SPELLINGS |= dict.fromkeys(names, meaning + " " * meaning[-1:].isalpha())
WORD = r"(?:\\text ?\{[^{}]*\}|(?:[A-Za-z]{4,}|per|[cmk]?m|[mk]?g|s|h|ft|in|lbs?)(?![A-Za-z]))"
UNIT = (  # it follows a number and ends an answer or an item: 5 cm^2, 20 dollars per hour
    rf"(?<=[\d.)}}%!i])(?:[ /]+{WORD}(?: ?\^ ?\{{ ?-?\d ?\}})?)+(?= ?\.?(?:[,;)}}\]]|\\\}}|$))")
HEDGE = re.compile(  # but words that express doubt, offer a choice or change the number are no unit
    r"(?<![a-z^{-])\d|[=<>,;?:]|\b(?:not?|if|but|maybe|or|nor|to|than|more|less|least|most|over"
    r"|under|about|around|nearly|almost|approx\w*|negative|plus|minus|times|half|squared|cubed|mod"
    r"|base|wrong|(?:hundred|thousand|[mbtr]+illion|dozen|pair)s?)\b", re.IGNORECASE)
NAMES = "sqrt|arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|ln|log|exp"
RULES = [(needs, re.compile(pattern, re.ASCII), meaning) for needs, pattern, meaning in (
    # what a text must contain for the rule to be tried, pattern, replacement    # example
    ("", r"(?<=\d)(?:\{,\}|,\\!|\\!,|\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),       # 1{,}234  10,\!080
    ("\\end", r"(?:\\\\)?\s*\\end ?\{\w+\}", "))"),                             # a matrix becomes
    ("\\begin", r"\\\\", "),("), ("\\begin", "&", ","),                         # ((1,2),(3,4))
    ("\\begin", r"\\begin ?\{(?:[pb]?matrix|array)\}(?:\{[lcr| ]*\})?", "(("),
    ("", r"\\(?:[A-Za-z]+|.)|[$~]|[<>:]=|\+/-|[^\x00-\x7f]",
     lambda match: SPELLINGS.get(match[0], normalize("NFKC", match[0]))),
    ("", r"\s+", " "),
    ("", r" ?\\text ?\{[ ,]*(?:and|or) ?\}|\b(?:and|or)\b", ","),               # 1 \text{ or } 2
    (" ", r"(?<!\d{4})(?<=\d) (?=\d{3}(?: \d{3})*(?![\d/]| \d))", ""),          # 1 234
    ("^", r"(?<=\b10)\^(-?\d{2,4})(?!\d)|\^ ?(\d)(?!\.\d)", r"^{\1\2}"),         # 10^33, but 2^1 2
    ("'", r" ?\^ ?\{ ?' ?\}", "'"),                                             # y^{\prime}
    ("°", r"(\\(?:sin|cos|tan) ?\(?\d+) ?\^? ?(?:°|\{ ?° ?\})", r"\1\\degree"),  # \sin 30^\circ
    ("°", r" ?\^ ?(?:°|\{ ?° ?\})|°", ""),                                      # 90^\circ
    ("\\", r"(\\(?:frac|binom|sqrt)) ?(\d)", r"\1{\2}"),                        # \frac12
    ("\\", r"(\\(?:frac|binom) ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),                 # \frac{1}2
    ("/", r"(?<![\d.^_}/])(\d+) (\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),    # 1 4/5
    ("\\frac", r"(?<![\d.^_}/])(\d+) ?\\frac ?(\{ ?\d+ ?\} ?\{ ?\d+ ?\})", r"\\mixed{\1}\2"),
    ("binom", r"\\binom ?\{([^{}]*)\} ?\{([^{}]*)\}", r"\\frac{(\1)!}{(\2)!(\1-{\2})!}"),
    ("!", r"(\d+|[A-Za-z]|\([^()]*\)) ?!", r"\\factorial{\1}"),                 # n!  (2n)!
    ("\\sqrt", r"\\sqrt ?\[([^\[\]]*)\] ?(\{[^{}]*\})", r"\2^{1/(\1)}"),        # \sqrt[3]{7}
    ("-1", r"\\(sin|cos|tan) ?\^ ?\{ ?-1 ?\}", r"\\arc\1"),                     # \tan^{-1}
    ("^", r"\\(sin|cos|tan) ?(\^ ?\{ ?\d ?\}) ?(\\?[A-Za-z]+|\([^()]*\))", r"(\\\1(\3))\2"),
    ("_", r"_ ?(?:\{ ?(\w+) ?\}|\{ ?\\text ?\{ ?(\w+) ?\} ?\}|(\d+|[A-Za-z]))", r"_{\1\2\3}"),
    ("", rf"(?<!\\)(?<![A-Za-z][A-Za-z])(?:({NAMES})(?![A-Za-z]|$)|(pi)(?![A-Za-z]))", r"\\\1\2"),
    ("log", r"\\log ?_", r"\\logbase"),                                         # \log_2 8
    ("inf", r"\\?\b(?:[Ii]nfinity|inf)\b", r"\\infty"),
    ("<", r"^([^<,]+)< ?[A-Za-z] ?<([^<,]+)$", r"(\1,\2)"),                     # 1 < x < 2
    ("\\le", r"^([^<,]+)\\le ?[A-Za-z] ?\\le([^<,]+)$", r"[\1,\2]"),
    ("\\pm", r"(^|,|\\\{)((?:(?!\\\{)[^,(])*?)\\pm([^,]*?)(?=,|\.?$|\\\})", r"\1\2+\3,\2-\3"),
    (" ", UNIT, lambda match: match[0] if HEDGE.search(match[0]) else ""),      # 5 cm
    (",", r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)(?![^(\[]*(?:[)\]]|\\\}))",  # 1,234, not (1,234)
     lambda match: match[0].replace(",", "")),
    ("\\text", r"\\text ?\{([^{}]*)\}", r"\1"),
    ("", r"^[ {]*\(?([A-Za-z])[).: }]*$", r"\1"),                               # (C)  C.  C)
    (" ", r"(?<=\d) (?=\d)", "~"),                                              # 1 2 is not 12
    (" ", r"(?<![A-Za-z]) +| +(?![A-Za-z])", ""),
    ("", r"^(?:[A-E]|[A-Za-z* ]{2,}|.*\b(?<!\\)[A-Za-z]{4}.*)$", lambda match: match[0].lower()),
)]
PLAIN = re.compile(r"[+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?")  # needs no cleaning; most golds are


@lru_cache(maxsize=4096)  # a gold is compared with the answers of a complete group
def _clean(text):
    if PLAIN.fullmatch(text):
        return text
    for needs, pattern, meaning in RULES:
        if needs in text:
            text = pattern.sub(meaning, text)[:2 * MAX_LENGTH]  # some characters grow
    return text.strip(" *`\"").lstrip("= ").rstrip(" .,;\\")


# Value: an expression is computed by recursive descent over its tokens.

MAX_BITS = 8_000  # of a fraction; a larger one has no value


def _power(a, b):
    """a^b, exact if it is a fraction, and real if a negative number has a real root."""
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    if exact and abs(b) * math.log2(max(abs(a.numerator), a.denominator)) > MAX_BITS:
        raise OverflowError
    if exact and a < 0 and b.denominator % 2:
        return (-1) ** abs(b.numerator) * _power(-a, b)
    return a ** b


FUNCTIONS = {name: getattr(cmath, name) for name in "sin cos tan sinh cosh tanh exp log".split()}
FUNCTIONS |= {
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log,
    "cot": lambda a: 1 / cmath.tan(a), "logbase": lambda base, a: cmath.log(a, base)}
OPERATIONS = FUNCTIONS | {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": _power,
    "frac": operator.truediv, "mixed": lambda whole, a, b: whole + a / b,
    "sqrt": lambda a: _power(a, Fraction(1, 2)), "factorial": lambda a: math.gamma(a + 1),
    "floor": lambda a: Fraction(math.floor(a.real + 1e-12)),
    "ceil": lambda a: Fraction(math.ceil(a.real - 1e-12))}
GROUPS = {"frac": 2, "mixed": 3, "sqrt": 1, "floor": 1, "ceil": 1, "logbase": 1, "factorial": 1}
CONSTANTS = {"e": math.e, "i": 1j, "pi": math.pi, "degree": math.pi / 180, "%": Fraction(1, 100)}
TOKEN = re.compile(
    r"(?:\\?[A-Za-z]+|\d+)_\{(?:[^{}]|\{[^{}]*\})*\}|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
    r"|\\[A-Za-z]+|\\.|[A-Za-z]{4,}|[A-Za-z]'*(?:\(0\))?|\S", re.ASCII)
CLOSING = {"(": ")", "[": "]", "{": "}"}
END, SUM, PRODUCT, FACTOR, POWER = range(5)  # how strongly a token binds to what precedes it
BINDING = {"\\" + name: PRODUCT for name in FUNCTIONS} | {
    "+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER}
BINDING |= dict.fromkeys(["", *",)]}=<>", r"\le", r"\ge", r"\ne"], END)


@lru_cache(maxsize=1024)
def _values(text):
    """The values of an expression at a few points, one if it is constant, none if it has none."""
    whole = r"\floor" in text or r"\ceil" in text
    values = []
    try:
        for point in range(12 if whole else 2):
            parser = Parser(text, point, whole)
            values.append(parser.expression(END))
            if parser.tokens != [""]:
                raise ValueError("a stray bracket")
            if not parser.varies:
                break
    except (ArithmeticError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return values


class Parser:
    """Computes an expression at one point, with fractions while they are exact, else floats."""

    def __init__(self, text, point, whole):
        self.tokens = ["", *reversed(TOKEN.findall(text))]  # the next one is the last
        self.point = point
        self.whole = whole
        self.varies = False

    def expression(self, strength):
        """The value of an operand and of what binds to it more strongly than `strength`."""
        value = self.atom()
        while (binding := BINDING.get(self.tokens[-1], FACTOR)) > strength:
            token = self.tokens.pop() if self.tokens[-1] in OPERATIONS else "*"
            operand = self.expression(FACTOR if binding == PRODUCT else binding)
            value = self.apply(token, value, operand)
        return value

    def atom(self):
        r"""A number, name, group, or command with its groups or, as in \sin 2x, factors."""
        token = self.tokens.pop()
        name = token.strip("\\")
        if token in ("+", "-"):
            return self.apply(token, Fraction(0), self.expression(FACTOR))
        if token in CLOSING:
            value = self.expression(END)
            if self.tokens.pop() != CLOSING[token]:
                raise ValueError("brackets")
            return value
        if token[0] in "0123456789.":
            return Fraction(token)
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name not in OPERATIONS:
            return self.variable(name)
        operands = [self.atom() for _ in range(GROUPS.get(name, 0))]
        if name in FUNCTIONS:
            grouped = self.tokens[-1] in CLOSING
            operands.append(self.atom() if grouped else self.expression(PRODUCT))
        return self.apply(name, *operands)

    def variable(self, name):
        """A fraction or, beside floor and ceil, a whole number that the name and the point draw."""
        if not name[:1].isalnum():
            raise ValueError("an operand is missing")
        self.varies = True
        if self.whole:
            return Fraction(random.Random(name).sample(range(1, 13), 12)[self.point])
        return Fraction(500 + zlib.crc32(f"{self.point}{name}".encode()) % 2500, 997)

    def apply(self, name, *operands):
        value = OPERATIONS[name](*operands)
        if isinstance(value, Fraction) and max(abs(value.numerator), value.denominator) >> MAX_BITS:
            raise OverflowError
        return value


# Comparison: an answer is a leaf (number, expression or text), an equation, or a group of answers.

MAX_DEPTH = 30  # nested brackets
PIECE = re.compile(r"\\[{}]|[()\[\]{},;=]|[^\\()\[\]{},;=]+|\\")
ENCLOSED = re.compile(r"(\\\{|[(\[{])(.*?)(\\\}|[)\]}])")


def _split(text, separators):
    """The parts of a text between separators outside of brackets, none if brackets are unpaired."""
    parts = [""]
    depth = 0
    for piece in PIECE.findall(text):
        depth += (piece[-1] in "([{") - (piece[-1] in ")]}")
        if not 0 <= depth <= MAX_DEPTH:
            return []
        if depth == 0 and piece in separators:
            parts.append("")
        else:
            parts[-1] += piece
    return [] if depth else [part for part in parts if part]


@lru_cache(maxsize=4096)
def _read(text):
    """(brackets, items) of a group ("{}" of a list), ("=", both sides), or ("leaf", [text])."""
    items = _split(text, ",;")
    if len(items) > 1:
        return "{}", items
    sides = _split(text, "=")
    if len(sides) > 1:
        return "=", [sides[0], sides[-1]]
    enclosed = ENCLOSED.fullmatch(text)
    items = _split(enclosed[2], ",;") if enclosed else []
    if not items:
        return "leaf", [text]
    brackets = enclosed[1] + enclosed[3]
    if len(items) == 1 and brackets in ("{}", r"\{\}", "()", "[]"):
        return _read(items[0])
    return brackets, items


def answers_equal(answer, gold):
    """Whether the answer equals the gold. Empty texts and other types equal nothing."""
    if not isinstance(answer, str) or not isinstance(gold, str):
        return False
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return answer.strip() == gold.strip()
    a = _clean(answer.strip())
    b = _clean(gold.strip())
    if not a.strip("{} ") or not b.strip("{} "):
        return False
    if PLAIN.fullmatch(a) and PLAIN.fullmatch(b):
        return Fraction(a) == Fraction(b)
    return a == b or _equal(a, b)


def _equal(answer, gold):
    """Whether two cleaned texts are equal."""
    kind, items = _read(answer)
    other, golds = _read(gold)
    kinds = {kind, other}
    if kinds == {"leaf"}:
        return _equal_leaves(items[0], golds[0])
    if kinds == {"="} and items[0] != golds[0]:  # y = 2x + 3 and its multiple 2x - y + 3 = 0
        ratios = _values("(({})-({}))/(({})-({}))".format(*items, *golds))
        return len(ratios) > 1 and ratios[0] != 0 and _close(ratios[0], ratios[-1])
    if kinds == {"="}:
        return _equal(items[1], golds[1])
    if kind == "=":
        return _stands_for(*items, gold) and _equal(items[1], gold)
    if other == "=":
        return _stands_for(*golds, gold) and _equal(answer, golds[1])
    if len(items) != len(golds):
        return False
    if kinds <= {"{}", r"\{\}"} and len(items) <= 30:  # in any order, unless it is long
        golds = list(golds)
        for item in items:
            found = [gold for gold in golds if _equal(item, gold)]
            if not found:
                return False
            golds.remove(found[0])
        return True
    alike = len(kinds) == 1 or kinds == {"()", "{}"}  # a tuple may lose its parentheses
    return alike and all(_equal(x, y) for x, y in zip(items, golds))


NAME = r"(?:\\?[A-Za-z]+(?:_\{[^{}]*\})?'*(?:\([\w,]+\))?|\((?:[A-Za-z],)+[A-Za-z]\))"
NAMED = re.compile(rf"(?![A-Za-z]{{2,}}=[A-Za-z]+$){NAME}=", re.ASCII)  # SRAC = LRAC are two
_NUMBER = r"[-+({]*(?:\d+(?:\.\d*)?|\.\d+)[)}]*"  # with its signs and brackets
_QUOTIENT = rf"[-+({{]*\\(?:frac|mixed\{{\d+\}})\{{{_NUMBER}\}}\{{{_NUMBER}\}}[)}}]*"
_POWER_OF_TEN = rf"{_NUMBER}(?:[eE][-+]?\d+|(?:\*[({{]*10)?\^\{{[-+]?\d+\}})[)}}]*"
PLAIN_GOLD = re.compile(rf"(?:{_NUMBER}(?:/{_NUMBER})*|{_QUOTIENT})%?")
PLAIN_ANSWER = re.compile(rf"{PLAIN_GOLD.pattern}|{_POWER_OF_TEN}%?")


def _stands_for(left, right, gold):
    """Whether an equation is its right side: x = 5, 2 + 3 = 5 and, for a plain gold, m + n = 5."""
    plain = PLAIN_GOLD.fullmatch(gold) and len(_values(left)) != 1
    return bool(NAMED.match(f"{left}={right}") or plain or _same_values(left, right))


def _equal_leaves(answer, gold):
    """Whether two numbers, expressions or texts are equal. A percent sign may be lost."""
    if answer in (gold, re.sub(r"(?<=\d)_\{\d{1,2}\}$", "", gold)):  # 52 is 52_8
        return True
    if PLAIN_GOLD.fullmatch(gold) and not PLAIN_ANSWER.fullmatch(answer):
        return False  # the work is left undone
    return _same_values(answer, gold) or _same_values(answer.rstrip("%"), gold.rstrip("%"))


def _same_values(a, b):
    """Whether two expressions have the same values. A constant has one for all points."""
    xs = _values(a)
    ys = _values(b)
    pairs = zip(xs * len(ys), ys * len(xs))
    return bool(xs and ys) and all(_close(x, y) for x, y in pairs)


def _close(a, b):
    """Whether two values are equal: exactly if both are fractions, else to 1e-9 of their size."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    try:
        return abs(a - b) <= 1e-9 * min(abs(a), abs(b))
    except OverflowError:
        return False
