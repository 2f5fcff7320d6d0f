"""The reward of Batched Contextual Reinforcement: the share of N problems answered correctly.

    extract_answers(completion, n)    what the model answered to problem 1..n
    answers_equal(prediction, gold)   whether one answer is worth the other
    score(completion, golds)          both together: one bool a problem

No function here raises, whatever it is given, and the work is bounded before it is done.
"""

import cmath
import math
import re
import unicodedata
import zlib
from fractions import Fraction

MAX_LENGTH = 1000  # characters of an answer that is read; a longer one equals only itself
MAX_MARKS = 2000   # boxes of one completion that are read, from its end; labels; headers
MAX_TRIES = 8      # boxes of one problem that are tried, from the last backwards
MAX_DEPTH = 30     # brackets within brackets, and commands by fives
MAX_ITEMS = 64     # items of a list that are compared in any order
MAX_BITS = 4096    # size of a numerator or denominator
MAX_FACTORIAL = 500
PLAIN = re.compile(r"[+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?")

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
# Clean: one spelling for everything that LaTeX, Unicode and plain text spell in several ways.

SMALL = dict(zip(map(ord, "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉"), "0123456789+-0123456789"))
SYMBOLS = {ord(char): name for chars, name in {
    "−–—‐‑‒": "-", "×": "*", "·⋅∙": "*", "÷⁄∕": "/", "∞": r"\infty ", "√": r"\sqrt ", "≤⩽": r"\le ",
    "≥⩾": r"\ge ", "≠": r"\ne ", "≈": "=", "∈": r"\in ", "∪": r"\cup ", "∅": r"\emptyset ", "°": r"^\circ ",
    "±": r"\pm ", "∓": r"\mp ", "′’": "'", "€£¥": "", "\u200b\u200c\u200d\u2060\ufeff": "",
}.items() for char in chars}
SYMBOLS.update((code, "\\" + unicodedata.name(chr(code)).split()[-1].lower().replace("lamda", "lambda") + " ")
               for code in range(ord("α"), ord("ω") + 1))
COMMANDS = {"\\" + command: meaning for commands, meaning in {
    "left right big Big bigl bigr Bigl Bigr bigg Bigg displaystyle textstyle limits boxed fbox operatorname "
    "mathbb mathcal $ ( ) [ ] !": "",
    ", ; : quad qquad": " ", "dfrac tfrac cfrac": r"\frac", "leq leqslant": r"\le", "geq geqslant": r"\ge",
    "neq": r"\ne", "lt": "<", "gt": ">", "approx": "=", "times cdot ast": "*", "div": "/", "lbrace": r"\{",
    "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")", "vert lvert rvert mid": "|",
    "varnothing": r"\emptyset", "%": "%", "degree": r"^\circ", "arcsin asin": r"\arcsin", "lg": r"\log_{10}",
    "textbf textit textrm textsf textnormal mathrm mathbf mathit mathsf mbox rm bf": r"\text",
}.items() for command in commands.split()}
COMMANDS["\\ "] = " "
RULES = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in (
    (r"(?<=\d)(?:\{,\}|,\\!|\\!,|\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),               # 1{,}234  10,\!080  1\,234
    (r"\\(?:[A-Za-z]+|.)", lambda command: COMMANDS.get(command[0], command[0])),
    (r"\\text\{[\s.,]*\}|\$", ""),
    (r"[\s~]+", " "),
    (r"(?<![\d.,/^_]) ?(?<!\d )\b\d{1,3}(?: \d{3})+(?![\d/]| \d)", lambda number: number[0].replace(" ", "")),  # 1 234
    (r"\b10 ?\^ ?(-?\d{2,4})(?!\d)", r"10^{\1}"),                                   # 4.5*10^33
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r" ?(?:percent|\\text\{ ?percent ?\})$", "%"),
    (r"(?<![\d.^_}])(\d+) ?\\frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))", lambda number: _mixed(number)),
    (r"(?<![\d.^_}/])(\d+) (\d+)()/(\d+)()(?![\d.])", lambda number: _mixed(number)),
)]


def _clean(text):
    """Return text in one spelling of each sign, command, space, grouped number and mixed number."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda power: "^{" + power[0].translate(SMALL) + "}", text)
        text = re.sub("[₀-₉]+", lambda index: "_{" + index[0].translate(SMALL) + "}", text)
        text = re.sub("([¼-¾⅐-⅞])", r" \1", re.sub(r"√(\d+)", r"\\sqrt{\1}", text))
        text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)[:2 * MAX_LENGTH]
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(" .,;")


def _mixed(number):
    """1\frac{4}{5} and 1 4/5 are sums; 2\frac{3}{2}, whose fraction is not proper, is a product."""
    whole, top, bottom = number[1], number[2] or number[3], number[4] or number[5]
    proper = (len(top), top) < (len(bottom), bottom)
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if proper else number[0]


# ---------------------------------------------------------------------------------------------
# Parse: an answer becomes nested tuples, the kind first.
#   ("list", items), ("set", items), ("union", items)        their order is ignored
#   ("()", items), ("[)", items) ..., ("matrix", rows)       tuples and intervals; order counts
#   ("=", left, right, difference, droppable)                an equation
#   ("leaf", text, values, percent, digits, base)            a number, an expression, a word

NEST = r"\\\\|\\begin\b|\\end\b|\\?[{}]|[()\[\]]"
BRACKET = re.compile(f"(){NEST}")
COMMA = re.compile(rf"(,|;|\\text\{{[\s,]*(?:and|or)\s*\}}|\b(?:and|or)\b)|{NEST}")
UNION = re.compile(rf"(\\cup\b)|{NEST}")
RELATION = re.compile(rf"(\\(?:in|le|ge|ne)(?![a-z])|:?=|<|>)|{NEST}")
ROW = re.compile(rf"(\\\\)|{NEST}")
CELL = re.compile(rf"(&)|{NEST}")
OPENING, CLOSING = {"(", "[", "{", r"\{", r"\begin"}, {")", "]", "}", r"\}", r"\end"}
FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}

GROUPED = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)", re.ASCII)
MATRIX = re.compile(r"\\begin ?\{([A-Za-z]*)\}(?:\{[lcr| ]*\})?(.*)\\end ?\{\1\}", re.DOTALL)
NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+|\\text\{[^{}]*\})(?:_(?:\w|\{[^{}]*\}))?'?(?:\([\w,]{1,9}\))?"
                  r"|\((?:[A-Za-z],)+[A-Za-z]\)", re.ASCII)
WORD = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z']+)*")
BASE = re.compile(r"\(?([0-9A-F]+)\)?_(?:\{([0-9]{1,2})\}|([0-9]))")
LITERAL = re.compile(r"[+-]? ?([0-9]*)(\.?)([0-9]*)")
INFINITY = re.compile(r"([+-]?) ?(?:\\infty|infinity)", re.IGNORECASE)

# What may follow a number without changing it, and the words that would change it.
UNIT = re.compile(
    r"(?: ?[*/]? ?\\text ?\{[^{}]*\}(?: ?\^ ?(?:\{-?\d\}|\d))?){1,4}$"
    r"| ?\^ ?\{? ?\\circ ?\}? ?(?:[CF]|\\text\{ ?[CF] ?\})$"
    r"| (?:[A-Za-z]{4,}|sq|[cmk]m|ft|in|mi|yd|[mk]g|oz|lbs?|hrs?|min|sec|ms|mph|m/s|USD|men|day|way|cup|box)\.?"
    r"(?:\^ ?\{?\d\}?)?(?:[ /][A-Za-z]+(?:\^ ?\{?\d\}?)?){0,4}$"
    r"|(?<=\d)(?:[cmk]m|[mk]g)(?:\^ ?\{?\d\}?)?$", re.ASCII)
HEDGE = re.compile(
    r"\d|[=<>,;?]|\b(?:and|or|not?|nor|if|but|maybe|perhaps|possibly|either|unless|about|around|approx\w*|to|than"
    r"|more|less|least|most|over|under|above|below|up|plus|minus|times|half|hundred|thousand|[mbtr]+illion|dozen|pairs?"
    r"|squared|cubed|factorial|infinity|pi|mod|choose|sqrt|root|wrong|incorrect|except|base|negative|alpha|beta|gamma"
    r"|delta|theta|sigma|omega|lambda)s?\b", re.IGNORECASE)


def _split(text, separator):
    """Return [piece, separator, piece, ...], cut where no bracket is open."""
    pieces, start, depth = [], 0, 0
    for token in separator.finditer(text):
        if token[1] and depth == 0:
            pieces += [text[start:token.start()].strip(), token[1]]
            start = token.end()
        depth += (token[0] in OPENING) - (token[0] in CLOSING)
    return pieces + [text[start:].strip()]


def _brackets(text):
    """Return (opening, inside, closing) of a text that one pair of brackets encloses, or None."""
    depth = 0
    for token in BRACKET.finditer(text):
        depth += (token[0] in OPENING) - (token[0] in CLOSING)
        if depth <= 0:
            opening = text[:2] if text[0] == "\\" else text[0]
            enclosed = token.end() == len(text) and opening in OPENING
            return (opening, text[len(opening):token.start()], token[0]) if enclosed else None


def _parse(text, seed):
    """Return the tree of a cleaned text. The seed is handed on to _values."""
    text = text.strip().rstrip(" .")
    wrapped = re.fullmatch(r"\\text ?\{([^{}]*)\}", text)
    if wrapped:
        text = wrapped[1].strip().rstrip(" .")
    brackets = _brackets(text)
    if brackets and brackets[0] == "{":
        return _parse(brackets[1], seed)
    pieces = [piece for piece in _split(text, COMMA)[::2] if piece]
    if len(pieces) > 1 or re.search(r"\\[pm][mp]\b", text) and not text.startswith(r"\{"):
        return "list", _items(pieces, seed)
    text = pieces[0] if pieces else ""
    parts = _split(text, UNION)[::2]
    if len(parts) > 1:
        return "union", [_parse(part, seed) for part in parts]
    parts = _split(text, RELATION)
    if len(parts) > 1:
        return _relation(parts, text, seed)
    if brackets:
        items = _items([piece for piece in _split(brackets[1], COMMA)[::2] if piece], seed)
        kind = "set" if brackets[0] == r"\{" else brackets[0] + brackets[2]
        # (5) is 5, and the brackets around an array are those of a matrix.
        return items[0] if len(items) == 1 and (kind == "()" or items[0][0] == "matrix") else (kind, items)
    matrix = MATRIX.fullmatch(text)
    if matrix and matrix[1] != "cases":
        rows = [("()", [_parse(cell, seed) for cell in _split(row, CELL)[::2]])
                for row in _split(matrix[2], ROW)[::2] if row]
        return ("determinant" if "v" in matrix[1].lower() else "matrix"), rows
    return ("set", []) if text == r"\emptyset" else _leaf(text, seed)


def _items(pieces, seed):
    """Return the trees of the pieces; one that holds ± gives two."""
    items = []
    for piece in pieces:
        if re.search(r"\\[pm][mp]\b", piece):
            items.append(_parse(piece.replace(r"\pm", "+").replace(r"\mp", "-"), seed))
            piece = piece.replace(r"\pm", "-").replace(r"\mp", "+")
        items.append(_parse(piece, seed))
    return items


def _relation(parts, text, seed):
    """Return the tree of [left, sign, right, ...]: an equation, an interval, or plain text."""
    signs, sides = parts[1::2], parts[::2]
    named = [bool(NAME.fullmatch(side.replace(" ", ""))) for side in sides]
    if signs[0] == r"\in":
        return _parse(" ".join(parts[2:]), seed)
    if signs[0].endswith("="):
        left, right = sides[0], " ".join(parts[2:])
        if named == [False, True]:
            left, right, named = right, left, [True]
        tree, difference = _parse(right, seed), _values(f"({left})-({right})", seed)
        constant = tree[0] == "leaf" and tree[2] and tree[2][0] == tree[2][1]
        droppable = named[0] or difference == [0, 0, 0] or bool(constant and WORD.fullmatch(left))
        return "=", left.replace(" ", ""), tree, difference, droppable
    if len(sides) == 2 and named[1] or len(sides) == 3 and signs[0] in (">", r"\ge"):
        signs, sides, named = [FLIP.get(sign) for sign in signs[::-1]], sides[::-1], named[::-1]
    below, above = ("<", r"\le"), (">", r"\ge")
    if named == [False, True, False] and signs[0] in below and signs[1] in below:
        opening, low, high, closing = "([", sides[0], sides[2], signs[1]
        opening = "[" if signs[0] == r"\le" else "("
    elif named == [True, False] and signs[0] in below:
        opening, low, high, closing = "(", r"-\infty", sides[1], signs[0]
    elif named == [True, False] and signs[0] in above:
        opening, low, high, closing = "[" if signs[0] == r"\ge" else "(", sides[1], r"\infty", "<"
    else:
        return "leaf", text.replace(" ", ""), None, False, 0, None
    return opening + ("]" if closing == r"\le" else ")"), [_parse(low, seed), _parse(high, seed)]


def _leaf(text, seed):
    """Return the tree of a text without structure, with its values where it has any."""
    key = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    key = re.sub(r"(?<!\d) | (?!\d)", "", key)
    key = key.casefold() if re.fullmatch(r"[^\W\d_]+", key) else key
    base = BASE.fullmatch(text.replace(" ", ""))
    if base:
        return "leaf", key, None, False, 0, (base[1].lstrip("0"), int(base[2] or base[3]))
    unit, number, values = UNIT.search(text), text, None
    if unit and not HEDGE.search(re.sub(r"\^ ?\{?-?\d\}?|(?<=[a-z])[23]\b", "", unit[0].replace(r"\circ", ""))):
        number = text[:unit.start()]
        values = _values(number.rstrip("% "), seed)
        if values and values[0] != values[1]:  # not a number: 3x\text{ cm} keeps its unit
            values = None
    if not values:
        number = text
        values = _values(number.rstrip("% "), seed)
    literal = LITERAL.fullmatch(number.strip())
    digits = 0 if not literal else len((literal[1] + literal[3]).lstrip("0")) if literal[3] else -1
    return "leaf", key, values, number.rstrip().endswith("%"), digits, None


# ---------------------------------------------------------------------------------------------
# Evaluate: LaTeX arithmetic by recursive descent, in fractions as long as they are exact and in
# complex floats beyond. The tokens lie in a reversed list, "" at its bottom: pop() is the next.

LEXER = re.compile(
    r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|\^ ?\{? ?\\circ ?\}?(?![a-z])|\\[A-Za-z]+|\\."
    r"|(?:sqrt|arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|pi)(?![A-Za-z])|[^\s]", re.ASCII)
DIGITS = set("0123456789")
GROUPS = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
FUNCTIONS = {"\\" + name: getattr(cmath, name.replace("arc", "a")) for name in (
    "sin cos tan sinh cosh tanh arcsin arccos arctan exp log").split()}
FUNCTIONS.update({r"\ln": cmath.log, r"\cot": lambda z: 1 / cmath.tan(z),
                  r"\sec": lambda z: 1 / cmath.cos(z), r"\csc": lambda z: 1 / cmath.sin(z)})
TRIGONOMETRIC = re.compile(r"sin|cos|tan|cot|sec|csc")
# The commands that stand for a variable or, like \vec, for a part of its name.
SYMBOL = re.compile(r"[A-Za-z]|\\(?:var|[A-Z])?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu"
                    r"|nu|xi|omicron|rho|sigma|tau|upsilon|phi|chi|psi|omega|amma|elta|heta|ambda|i|igma|hi|si|mega)"
                    r"|\\(?:hbar|ell|mho|partial|prime|angle|d?dot|hat|bar|vec|tilde|overline|widehat|star)")
FAILURES = (ArithmeticError, ValueError, LookupError, TypeError, RecursionError)


def _values(text, seed):
    """Return the values of an expression at three points (of a constant: thrice the same), or None."""
    if INFINITY.fullmatch(text.strip()):
        return [-math.inf if text.strip()[0] == "-" else math.inf] * 3
    tokens = LEXER.findall(text)[::-1]
    if WORD.fullmatch(text) and len(max(tokens, key=len)) == 1:
        return None  # a word, not a product of letters
    values = []
    for number in "123":
        point = {"^": math.pi / 180 if TRIGONOMETRIC.search(text) else 1, "seed": seed + number}
        rest = [""] + tokens
        try:
            values.append(_sum(rest, point))
        except FAILURES:
            return None
        if rest != [""]:
            return None
        if len(point) == 2:  # no variable was met
            return values * 3
    return values


def _variable(name, point):
    """Return the value of a variable at a point: random, yet the same for both answers."""
    seed = point["seed"]
    if name not in point:
        draw = zlib.crc32(f"{name} {seed}".encode(errors="replace"))
        size = 50 if "floor" in seed or "ceil" in seed else 1
        sign = -1 if "|" in seed and draw & 65536 else 1
        point[name] = Fraction(sign * size * (500 + draw % 2500), 997)
    return point[name]


def _sum(tokens, point):
    value = _product(tokens, point)
    while tokens[-1] in ("+", "-"):
        minus, term = tokens.pop() == "-", _product(tokens, point)
        total = _bounded(value - term if minus else value + term)
        # What is left of two floats that cancel is noise.
        noise = isinstance(total, complex) and abs(total) < 1e-14 * abs(value)
        value = Fraction(0) if noise else total
    return value


def _product(tokens, point):
    value = _signed(tokens, point)
    while True:
        token = tokens[-1]
        if token in ("*", "/"):
            tokens.pop()
            factor = _signed(tokens, point)
        elif _begins_factor(token):
            factor = _power(tokens, point)
        else:
            return value
        product = _bounded(value / factor if token == "/" else value * factor)
        if product == 0 and value != 0 and factor != 0:
            raise OverflowError("underflow")
        value = product


def _begins_factor(token):
    """Whether a token right after a factor multiplies it. A number does not: 2 3 is no product."""
    return token.isalpha() or token in ("(", "[", "{") or (token[:1] == "\\" and token not in GROUPS.values())


def _signed(tokens, point):
    sign = 1
    while tokens[-1] in ("+", "-"):
        sign = -sign if tokens.pop() == "-" else sign
    return sign * _power(tokens, point)


def _power(tokens, point):
    value = _atom(tokens, point)
    while True:
        if tokens[-1] == "^":
            tokens.pop()
            value = _raise(value, _argument(tokens, point))
        elif tokens[-1] == "!" and tokens[-2:-1] != ["!"]:
            tokens.pop()
            value = _factorial(value)
        elif tokens[-1].startswith("^"):
            tokens.pop()
            value = value * point["^"]  # a degree
        else:
            return value


def _argument(tokens, point):
    """What a command or ^ applies to: a group or one token; of a number one digit, as in TeX."""
    token = tokens[-1]
    if token == "-":
        tokens.pop()
        return -_atom(tokens, point)
    if token[:1] in DIGITS and len(token) > 1:
        tokens[-1] = token[1:]
        return Fraction(token[0])
    return _atom(tokens, point)


def _atom(tokens, point):
    token = tokens.pop()
    if token[:1] in DIGITS or token[:1] == "." != token:
        mantissa, _, exponent = token.lower().partition("e")
        if len(exponent) > 5 or abs(int(exponent or 0)) > MAX_BITS // 4:
            raise OverflowError("exponent")
        return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))
    if token in GROUPS:
        value = _sum(tokens, point)
        if tokens.pop() != GROUPS[token]:
            raise ValueError("bracket")
        if token in (r"\lfloor", r"\lceil"):
            value = value if isinstance(value, Fraction) else _real(value)
            return Fraction(math.floor(value + 1e-12) if token == r"\lfloor" else math.ceil(value - 1e-12))
        return abs(value) if token == "|" else value
    if token == r"\frac":
        return _bounded(_argument(tokens, point) / _argument(tokens, point))
    if token == r"\binom":
        above, below = _argument(tokens, point), _argument(tokens, point)
        return _factorial(above) / (_factorial(below) * _factorial(above - below))
    if token in (r"\sqrt", "sqrt"):
        degree = Fraction(2)
        if tokens[-1] == "[":
            tokens.pop()
            degree = _sum(tokens, point)
            if tokens.pop() != "]":
                raise ValueError("bracket")
        return _raise(_argument(tokens, point), 1 / degree)
    if "\\" + token.lstrip("\\") in FUNCTIONS:
        return _function("\\" + token.lstrip("\\"), tokens, point)
    if token == r"\text":
        token = _raw(tokens)
    if tokens[-1] != "_":
        constant = {"e": math.e + 0j, "i": 1j, r"\pi": math.pi + 0j, "pi": math.pi + 0j}.get(token)
        if constant:
            return constant
    if not SYMBOL.fullmatch(token):
        raise ValueError("unknown symbol")
    if token[0] == "\\" and tokens[-1] == "{":
        token += _raw(tokens)
    while tokens[-1] in ("_", "'"):
        token += tokens.pop().replace("_", "_" + _raw(tokens) if tokens[-1] != "'" else "_")
    return _variable(token, point)


def _raw(tokens):
    """Return the text of one argument that is not computed, such as a subscript."""
    token, depth, text = tokens.pop(), 0, ""
    while True:
        depth += (token == "{") - (token == "}")
        text += token.strip("{}")
        if depth == 0:
            return text
        token = tokens.pop()


def _function(name, tokens, point):
    """Return the value of a function, of which only the name has been read."""
    base, exponent = None, None
    if tokens[-1] == "_" and name == r"\log":
        tokens.pop()
        base = _argument(tokens, point)
    if tokens[-1] == "^":
        tokens.pop()
        exponent = _argument(tokens, point)
    if tokens[-1] in GROUPS:
        value = _atom(tokens, point)
    else:  # without brackets it takes the factors that follow: \sin 2x
        value = _signed(tokens, point)
        while _begins_factor(tokens[-1]) and tokens[-1] not in FUNCTIONS:
            value = _bounded(value * _power(tokens, point))
    if exponent == -1:
        name, exponent = r"\arc" + name[1:], None
    result = FUNCTIONS[name](value) / (cmath.log(base) if base else 1)
    if abs(result) > 1e15 or result == 0 and name == r"\exp":
        raise OverflowError(name)
    if abs(result) < 1e-14 * abs(value):  # \sin\pi
        result = 0j
    return result if exponent is None else _raise(result, exponent)


def _raise(base, exponent):
    """Return base to the exponent, refused before it is computed where it would be too large."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1:
            if abs(exponent) * bits > MAX_BITS:
                raise OverflowError("power")
            return base ** int(exponent)
        if base < 0 and exponent.denominator % 2:  # the real root
            return (-1) ** (exponent.numerator % 2) * _raise(-base, exponent)
    result = complex(base) ** complex(exponent)
    if result == 0 and base != 0:
        raise OverflowError("underflow")
    return _bounded(result)


def _factorial(value):
    if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
        if value > MAX_FACTORIAL:
            raise OverflowError("factorial")
        return Fraction(math.factorial(int(value)))
    return _bounded(complex(math.gamma(_real(value) + 1)))


def _real(value):
    value = complex(value)
    if abs(value.imag) > 1e-12 * abs(value):
        raise ValueError("complex")
    return value.real


def _bounded(value):
    """Return value, or raise where it is too large to go on with."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > 2 * MAX_BITS:
            raise OverflowError("digits")
    elif not cmath.isfinite(value):
        raise OverflowError("infinite")
    return value


# ---------------------------------------------------------------------------------------------
# Compare.

def answers_equal(prediction, gold):
    """Return whether prediction is worth gold. An empty gold equals nothing, and so does what is
    no string. An answer of more than MAX_LENGTH characters or MAX_DEPTH brackets deep equals only itself.
    """
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return False
    prediction, gold = prediction.strip(), gold.strip()
    if max(len(prediction), len(gold)) > MAX_LENGTH:
        return prediction == gold
    if PLAIN.fullmatch(prediction) and PLAIN.fullmatch(gold):
        return Fraction(prediction) == Fraction(gold)
    same = prediction == gold
    prediction, gold = _clean(prediction), _clean(gold)
    if not prediction or not gold or same or prediction == gold:
        return bool(gold) and bool(prediction)
    if max(_depth(prediction), _depth(gold)) > MAX_DEPTH:
        return False
    seed = min(prediction, gold) + "\n" + max(prediction, gold)
    grouped = [text if re.search(r"[(\[]|\\\{", text) else GROUPED.sub(lambda number: number[0].replace(",", ""), text)
               for text in (prediction, gold)]
    if _equal(_parse(grouped[0], seed), _parse(grouped[1], seed)):
        return True
    # 100,200 was read as one number. Unless a group begins with 0 it may be two.
    if grouped == [prediction, gold] or re.search(r",0\d\d", prediction + gold):
        return False
    return _equal(_parse(prediction, seed), _parse(gold, seed))


def _depth(text):
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return max(deepest, text.count("\\") // 5)


def _equal(a, b):
    """Whether two trees are worth the same."""
    if a[0] == b[0] == "leaf":
        return _equal_leaves(a, b)
    if a[0] == b[0] == "=":
        return a[1] == b[1] and _equal(a[2], b[2]) or _proportional(a[3], b[3])
    if b[0] == "=":
        a, b = b, a
    if a[0] == "=":
        return a[4] and _equal(a[2], b)
    unordered = ("list", "set", "union")
    if b[0] in unordered and a[0] not in unordered:
        a, b = b, a
    if a[0] in unordered and b[0] in unordered:
        return _same_items(a[1], b[1])
    if a[0] in unordered and len(a[1]) == 1:
        return _equal(a[1][0], b)
    if a[0] == "matrix" and b[0] == "()":
        a, b = b, a
    if b[0] == "matrix" and a[0] == "()":  # a vector written as a tuple
        cells = [row[1] for row in b[1]]
        b = ("()", cells[0] if len(cells) == 1 else [row[0] for row in cells if len(row) == 1])
    same_kind = a[0] == b[0] or a[0] == "list" and b[0] == "()"  # a tuple may lose its parentheses
    return same_kind and "leaf" not in (a[0], b[0]) and len(a[1]) == len(b[1]) and all(map(_equal, a[1], b[1]))


def _same_items(a, b):
    """Whether two rows of items are the same in some order, each as often."""
    if len(a) != len(b) or len(a) > MAX_ITEMS:
        return a == b
    left = list(b)
    for item in a:
        match = next((index for index, other in enumerate(left) if _equal(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _proportional(a, b):
    """Whether two equations, given by left minus right, differ by a constant factor."""
    if not a or not b or a[0] == a[1] or b[0] == b[1]:
        return False
    return all(_close(a[0] * b[point], b[0] * a[point]) for point in (1, 2))


def _equal_leaves(a, b):
    _, key, values, percent, digits, base = a
    _, other_key, other_values, other_percent, other_digits, other_base = b
    if key == other_key:
        return True
    if base or other_base:  # a dropped base is forgiven, another base is not
        return base == other_base or not (base and other_base) and (
            key.lstrip("0") == other_base[0] if other_base else other_key.lstrip("0") == base[0])
    if not values or not other_values:
        return False
    if all(map(_close, values, other_values)):
        return True
    if percent != other_percent:  # 50% is 0.5, and its sign may be lost
        scale = Fraction(1, 100) if percent else 100
        return all(_close(value * scale, other) for value, other in zip(values, other_values))
    if digits and other_digits:
        return False
    return _agree(values[0], other_values[0], max(digits, other_digits))


def _close(a, b):
    """Whether two values are equal: exactly where both are fractions, else to 1e-9 of their size."""
    if a == b or isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    try:
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b)) < math.inf
    except OverflowError:
        return False


def _agree(a, b, digits):
    """Whether a decimal of so many digits, at least 8, is the other value, rounded or cut off."""
    try:
        a, b = _real(a), _real(b)
    except FAILURES:
        return False
    digits = min(digits, 15)
    if digits < 8 or a * b <= 0:
        return False
    cut = [f"{value:.17e}" for value in (a, b)]
    cut = [text[:text.index(".") + digits] + text[text.index("e"):] for text in cut]
    return cut[0] == cut[1] or f"{a:.{digits - 1}e}" == f"{b:.{digits - 1}e}"


def score(completion, golds):
    """Return one bool a gold: whether the completion answers that problem correctly."""
    answers = extract_answers(completion, len(golds))
    return [answers_equal(answer, gold) for answer, gold in zip(answers, golds)]
