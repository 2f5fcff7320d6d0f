"""The reward of Batched Contextual Reinforcement: which of N problems a completion answers correctly.

    extract_answers(completion, n)      what the completion answers to problem 1, ..., n
    answers_equal(prediction, gold)     whether an answer is worth the gold one
    score(completion, golds)            both together: one bool a problem

An answer is cleaned (one spelling for each thing), parsed (into lists, tuples, intervals, equations and
leaves, whose values are computed) and compared (fractions exactly, other numbers to 1e-9, text as text).
Nothing here raises, whatever it is given, and whatever could grow is bounded before it is computed.
"""

import cmath
import math
import re
import unicodedata
import zlib
from fractions import Fraction
from itertools import accumulate

MAX_LENGTH = 500     # characters of an answer; a longer one equals only itself
MAX_MARKS = 2000     # boxes, labels and headers of a completion, counted from its end
MAX_TRIES = 8        # boxes of one problem, counted from its last
MAX_DEPTH = 30       # brackets within brackets
MAX_COMMANDS = 100   # LaTeX commands of one answer, which may nest without brackets
MAX_PARTS = 64       # signs that part an answer into items, cells or sides
MAX_BITS = 4096      # size of a numerator or a denominator
MAX_FACTORIAL = 500


# ------------------------------------------------------------------------------------------------------------
# Extract: a completion is a row of headers `### Problem i`, labels `Answer i:` and boxes.
# Each pattern begins with a fixed word: so 400,000 characters are searched in a millisecond.

INDEX = r"[ \t*_#(]{0,4}([0-9]{1,99}|i)(?![0-9a-z])([ \t]?(?:[-–,&]|and|to)[ \t]?[0-9])?"
HEADER = re.compile(r"roblem" + INDEX)
HEADER_START = re.compile(r"\n[ \t]{0,3}(?:#{1,6}|\*\*)[ \t*]{0,4}[Pp]$")
LABEL = re.compile(r"nswer(?:[ \t](?:to|for))?(?:[ \t][Pp]roblem)?" + INDEX + r"[ \t*_)]{0,4}[:：]")
BOX = re.compile(r"box(?:(?<=\\fbox)|ed(?<=\\boxed))(?![a-z])\s{0,9}")
MARKS = ((HEADER, "roblem"), (LABEL, "nswer"), (BOX, "box"))
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
UNBRACED = re.compile(r"\\[A-Za-z]+[^\s$]*|[^\s$\\{}]+")
MARKUP = re.compile(r"[\s$*_:>\\\[\](){}-]{0,100}")
PLACEHOLDER = re.compile(r"(?:[\s.…?_]|\\[cl]?dots(?![a-z])|\\[,;:! ]|\\text\{[\s.…]*\})*")


def extract_answers(completion, n):
    """Return n entries: the text of the box that answers problem i, or None where there is none.

    A box labelled `Answer i:` belongs to i wherever it stands; another one serves the section it stands in;
    the last one counts. What follows `</think>` wins over what precedes it.
    """
    answers = [None] * n if isinstance(n, int) else []
    text = completion if isinstance(completion, str) else ""
    text = text.replace("\r", "\n").replace("ANSWER", "Answer").replace("PROBLEM", "Problem")
    thinking, _, reply = text.rpartition("</think>")
    for part in (thinking, reply):
        for index, answer in _boxed_answers("\n" + part, n).items():
            answers[index - 1] = answer
    return answers


def _boxed_answers(text, n):
    """Return {index: answer} of one stretch of text."""
    marks = [mark for pattern, word in MARKS
             for mark in pattern.finditer(text, len(text.rsplit(word, MAX_MARKS)[0]))
             if pattern is not HEADER or HEADER_START.search(text, max(0, mark.start() - 20), mark.start())]
    section = int(n == 1 and all(mark.re is not HEADER for mark in marks))  # a lone problem needs no header
    label, label_end, used = 0, None, False
    boxes = {}  # (index, labelled): where its boxes begin, in order
    for mark in sorted(marks, key=re.Match.start):
        if mark.re is HEADER:
            section, label_end = _index(mark), None
        elif mark.re is LABEL:
            label, label_end, used = _index(mark), mark.end(), False
        else:
            # A label owns the boxes of its line or, where that has none, the box that follows at once.
            if label_end is not None and text.find("\n", label_end, mark.start()) >= 0:
                if used or not MARKUP.fullmatch(text, label_end, mark.start()):
                    label_end = None
            owner = (section, False) if label_end is None else (label, True)
            boxes.setdefault(owner, []).append(mark.end())
            label_end, used = label_end and mark.end(), True
    answers = {}
    for (index, labelled), starts in sorted(boxes.items()):  # labelled boxes come second: they win
        contents = [_box(text, start) for start in starts[-MAX_TRIES:] if 1 <= index <= n]
        contents = [content for content in contents if not PLACEHOLDER.fullmatch(content)]
        # The i of the prompt's `Answer i:` is an answer only where there is no other.
        if contents and (contents[-1] != "i" or index not in answers):
            answers[index] = contents[-1]
    return answers


def _index(mark):
    """Return the number of a header or label, 0 where it names none or several problems."""
    return int(mark[1]) if len(mark[1]) < 10 and mark[1] != "i" and not mark[2] else 0


def _box(text, start):
    """Return what stands in the box whose braces begin at start, "" where they never end."""
    if text[start:start + 1] != "{":
        token = UNBRACED.match(text, start, start + MAX_LENGTH)
        return token[0] if token else ""
    depth = 0
    for brace in BRACE.finditer(text, start, start + MAX_LENGTH):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[start + 1:brace.start()].strip()
    return ""


# ------------------------------------------------------------------------------------------------------------
# Clean: one spelling for what LaTeX, Unicode and plain text spell in several ways.

SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
GREEK = {chr(code): unicodedata.name(chr(code)).split()[-1].lower().replace("lamda", "lambda")
         for code in range(ord("α"), ord("ω") + 1)}
SYMBOLS = {ord(letter): f"\\{name} " for letter, name in GREEK.items()}
SYMBOLS |= {ord(char): meaning for chars, meaning in {
    "−–—‐‑‒": "-", "×·⋅∙": "*", "÷⁄∕": "/", "∞": r"\infty ", "√": r"\sqrt ", "≤⩽": r"\le ", "≥⩾": r"\ge ",
    "≠": r"\ne ", "≈": "=", "∈": r"\in ", "∪": r"\cup ", "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ",
    "∓": r"\mp ", "′’": "'", "€£¥": "", "\u200b\u200c\u200d\u2060\ufeff": "",
}.items() for char in chars}
COMMANDS = {"\\" + command: meaning for commands, meaning in {
    "left right big Big bigl bigr Bigl Bigr displaystyle textstyle limits boxed fbox operatorname mathbb": "",
    "$ ( ) [ ] !": "", ", ; : quad qquad": " ", "dfrac tfrac cfrac": r"\frac", "leq leqslant": r"\le",
    "geq geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">", "approx": "=", "times cdot ast": "*", "div": "/",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")",
    "vert lvert rvert": "|", "varnothing": r"\emptyset", "%": "%", "degree": r"^\circ", "lg": r"\log_{10}",
    "textbf textit textrm textsf textnormal mathrm mathbf mathit mathsf mbox": r"\text",
}.items() for command in commands.split()} | {"\\ ": " "}


def _mixed(match):
    r"""1\frac{4}{5} and 1 4/5 are sums; 2\frac{3}{2}, whose fraction is not proper, is a product."""
    whole, top, bottom = match[1], match[2] or match[3], match[4] or match[5]
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})" if (len(top), top) < (len(bottom), bottom) else match[0]


PLAIN = re.compile(r"[+-]?[0-9]{1,100}(?:\.[0-9]{1,100})?")
RULES = [(needs, re.compile(pattern, re.ASCII), meaning) for needs, pattern, meaning in (
    ("", r"(?<=\d)(?:\{,\}|,\\!|\\!,|\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),                 # 1{,}234  10,\!080  1\,234
    ("\\", r"\\(?:[A-Za-z]+|.)", lambda match: COMMANDS.get(match[0], match[0])),
    ("\\text", r"\\text ?\{ ?([ei]) ?\}", r"\1"),
    ("\\text", r"\\text ?\{[\s.,]*\}", ""),
    ("$", r"\$", ""),
    ("", r"[\s~]+", " "),
    (" ", r"(?<![\d.,/^_])(?<!\d )\d{1,3}(?: \d{3}){1,9}(?![\d/]| \d)",               # 1 234
     lambda match: match[0].replace(" ", "")),
    ("^", r"\b10 ?\^ ?(-?\d{2,4})(?!\d)", r"10^{\1}"),                                    # 4.5*10^33, not 2^12
    ("<=", r"<=", r"\\le "), (">=", r">=", r"\\ge "), ("percent", r" ?(?:percent|\\text ?\{ ?percent ?\})$", "%"),
    ("\\frac", r"(?<![\d.^_}])(\d+) ?\\frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))", _mixed),
    ("/", r"(?<![\d.^_}/])(\d+) (\d+)()/(\d+)()(?![\d.])", _mixed),
    (")", r"\)(?= ?\d)", ")*"),
)]


def _clean(text):
    """Return text in one spelling of each sign, command, space, grouped number and mixed number."""
    if PLAIN.fullmatch(text):  # most golds are
        return text
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda power: "^{" + power[0].translate(SMALL) + "}", text)
        text = re.sub("[₀-₉]+", lambda index: "_{" + index[0].translate(SMALL) + "}", text)
        text = re.sub("([¼-¾⅐-⅞])", r" \1", re.sub(r"√([0-9]+)", r"\\sqrt{\1}", text))  # 1½ is 1 1/2
        text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)[:MAX_LENGTH]
    for needs, pattern, meaning in RULES:
        text = pattern.sub(meaning, text) if needs in text else text
    return text.strip(" *`\"").lstrip("= ").rstrip(" .,;\\")


# ------------------------------------------------------------------------------------------------------------
# Parse: an answer becomes nested tuples, the kind first.
#   ("list", items), ("set", items), ("union", items)            their order does not count
#   ("()", items), ("[)", items), ..., ("matrix", rows)          it does in tuples, intervals and matrices
#   ("=", left, tree of the right, left - right, droppable)      x = 5, whose left side may be dropped
#   ("leaf", text, values, percent, literal digits, base)        a number, an expression, a word

NEST = r"\\\\|\\(?:begin|end)(?![a-z])|\\?[{}]|[()\[\]]"
BRACKET, COMMA, UNION, RELATION, ROW, CELL = (re.compile(f"({separator})|{NEST}") for separator in (
    r"(?!)", r",|;|\\text ?\{[\s,]*(?:and|or)\s*\}|\b(?:and|or)\b", r"\\cup(?![a-z])",
    r"\\(?:in|le|ge|ne)(?![a-z])|:?=|<|>", r"\\\\", "&"))
OPENING, CLOSING = {"(", "[", "{", r"\{", r"\begin"}, {")", "]", "}", r"\}", r"\end"}
MATRIX = re.compile(r"\\begin ?\{([A-Za-z]*)\}(?:\{[lcr| ]*\})?(.*)\\end ?\{\1\}", re.DOTALL)
WRAPPED = re.compile(r"\\text ?\{([^{}]*)\}")
PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-z])")
GROUPED = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)", re.ASCII)
NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+|\\text\{[^{}]*\})(?:_(?:\w|\{[^{}]*\}))?'?(?:\([\w,]{1,9}\))?"
                  r"|\((?:[A-Za-z],)+[A-Za-z]\)", re.ASCII)
WORD = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z']+)*")
BASE = re.compile(r"\(?((?=[A-F]*[0-9])[0-9A-F]+)\)?_(?:\{([0-9]{1,2})\}|([0-9]))")
LITERAL = re.compile(r"[+-]? ?0*([0-9]*)(\.?[0-9]*)")
# What may follow a number without changing it, and the words that would change it.
UNIT = re.compile(
    r"(?: ?[*/]? ?\\text ?\{[^{}]*\}(?: ?\^ ?(?:\{-?\d\}|\d))?){1,4}$"
    r"| ?\^ ?\{? ?\\circ ?\}? ?(?:[CF]|\\text ?\{ ?[CF] ?\})$"
    r"| (?:[A-Za-z]{4,}|sq|[cmk]m|ft|in|mi|yd|[mk]g|oz|lbs?|hrs?|min|sec|ms|mph|m/s|USD|men|day|way|cup|box)\.?"
    r"(?:\^ ?\{?\d\}?)?(?:[ /][A-Za-z]+(?:\^ ?\{?\d\}?)?){0,4}$"
    r"|(?<=\d)(?:[cmk]m|[mk]g)(?:\^ ?\{?\d\}?)?$", re.ASCII)
UNIT_POWER = re.compile(r"\^ ?\{?-?\d\}?|(?<=[a-z])[23]\b|\\circ")
HEDGE = re.compile(
    r"\d|[=<>,;?]|\b(?:and|or|not?|nor|if|but|maybe|perhaps|possibly|either|unless|about|around|approx\w*|to|than|more"
    r"|less|least|most|over|under|above|below|up|plus|minus|times|half|hundred|thousand|[mbtr]+illion|dozen|pairs?"
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
    """Return the tree of a cleaned text. The seed (a number; whether variables are whole, whether they may be
    negative) draws the values of variables, the same ones for both answers."""
    text = text.strip().rstrip(" .")
    if PLAIN.fullmatch(text):
        return _leaf(text, seed)
    wrapped = WRAPPED.fullmatch(text)
    text = wrapped[1].strip().rstrip(" .") if wrapped else text
    brackets = _brackets(text)
    opening, inside, closing = brackets or ("", "", "")
    if opening == "{":
        return _parse(inside, seed)
    pieces = [piece for piece in _split(text, COMMA)[::2] if piece]
    if len(pieces) > 1 or PLUS_MINUS.search(text) and opening != r"\{":
        return "list", _items(pieces, seed)
    text = pieces[0] if pieces else ""
    parts = _split(text, UNION)[::2] if r"\cup" in text else []
    if len(parts) > 1:
        return "union", [_parse(part, seed) for part in parts]
    parts = _split(text, RELATION)
    if len(parts) > 1:
        return _relation(parts, text, seed)
    if brackets:
        items = _items([piece for piece in _split(inside, COMMA)[::2] if piece], seed)
        # (5) is 5, and the brackets around an array are those of a matrix.
        single = len(items) == 1 and (opening + closing == "()" or items[0][0] == "matrix")
        return items[0] if single else ("set" if opening == r"\{" else opening + closing, items)
    matrix = MATRIX.fullmatch(text)
    if matrix and matrix[1] != "cases":
        rows = [_split(row, CELL)[::2] for row in _split(matrix[2], ROW)[::2] if row]
        rows = [("()", [_parse(cell, seed) for cell in row]) for row in rows]
        return ("determinant" if "v" in matrix[1].lower() else "matrix"), rows
    return ("set", []) if text == r"\emptyset" else _leaf(text, seed)


def _items(pieces, seed):
    """Return the trees of the pieces; a piece with ± gives two."""
    items = []
    for piece in pieces:
        if PLUS_MINUS.search(piece):
            items.append(_parse(piece.replace(r"\pm", "+").replace(r"\mp", "-"), seed))
            piece = piece.replace(r"\pm", "-").replace(r"\mp", "+")
        items.append(_parse(piece, seed))
    return items


def _relation(parts, text, seed):
    """Return the tree of [left, sign, right, ...]: an equation, an interval, or plain text."""
    signs, sides = parts[1::2], parts[::2]
    named = [bool(NAME.fullmatch(side.replace(" ", ""))) for side in sides]
    if signs == [r"\in"] and named[0]:
        return _parse(sides[1], seed)
    if signs[0].endswith("=") and len(signs) < 4:
        left, right = sides[0], " ".join(parts[2:])
        if named == [False, True]:
            left, right, named = right, left, [True]
        tree, difference = _parse(right, seed), _values(f"({left})-({right})", seed)
        number = tree[0] == "leaf" and tree[2] and tree[2][0] == tree[2][1]
        # Dropped may be a name in front of anything, a word in front of a number, and what is equal: 2+3 = 5.
        droppable = named[0] or bool(number and WORD.fullmatch(left)) or difference is not None and not any(difference)
        return "=", left.replace(" ", ""), tree, difference, droppable
    # -2 < x \le 7 and x > 3 are intervals. Turn them so that they rise.
    if signs[0] in (">", r"\ge"):
        signs = [{">": "<", r"\ge": r"\le"}.get(sign) for sign in signs[::-1]]
        sides, named = sides[::-1], named[::-1]
    if not {"<", r"\le"}.issuperset(signs) or named not in ([True, False], [False, True], [False, True, False]):
        return "leaf", text.replace(" ", ""), None, False, None, None
    low, high = (r"-\infty" if named[0] else sides[0]), (r"\infty" if named[-1] else sides[-1])
    opening = "[" if signs[0] == r"\le" and not named[0] else "("
    closing = "]" if signs[-1] == r"\le" and not named[-1] else ")"
    return opening + closing, [_parse(low, seed), _parse(high, seed)]


def _leaf(text, seed):
    """Return the tree of a text without structure, with its values where it has any."""
    key = WRAPPED.sub(r"\1", text)
    key = re.sub(r"(?<!\d) | (?!\d)", "", key) if " " in key else key
    key = key.rstrip(")").casefold() if re.fullmatch(r"[^\W\d_]+\)?", key) else key
    base = BASE.fullmatch(text.replace(" ", ""))
    if base:
        return "leaf", key, None, False, None, (base[1].lstrip("0"), int(base[2] or base[3]))
    number, values, unit = text, None, UNIT.search(text)
    if unit and not HEDGE.search(UNIT_POWER.sub("", unit[0])):
        number = text[:unit.start()]
        values = _values(number.rstrip("% "), seed)
    if not values or values[0] != values[1]:  # only a number loses its unit: 3x\text{ cm} does not
        number = text
        values = _values(number.rstrip("% "), seed)
    literal = LITERAL.fullmatch(number.strip())
    return "leaf", key, values, number.rstrip().endswith("%"), literal and literal[1] + literal[2], None


# ------------------------------------------------------------------------------------------------------------
# Evaluate: LaTeX arithmetic by recursive descent, in fractions while they are exact, in complex floats beyond.
# The tokens lie in a reversed list with "" at the bottom, so that pop() gives the next one.

SYMBOL = (  # a variable: a letter, or a letter with an accent, and its subscript
    r"(?:[A-Za-z]|\\(?:d?dot|hat|bar|vec|tilde|overline|mathcal)(?: ?\{[^{}]*\}| [a-z])|\\(?:var|(?=[A-Z]))?(?i:"
    + "|".join(sorted(GREEK.values(), reverse=True)) + r"|hbar|ell|mho|partial|prime|angle)(?![A-Za-z]))"
    r"(?: ?_ ?(?:[A-Za-z0-9]|\\[a-z]+|\{(?:[^{}]|\{[^{}]*\})*\}))?'*(?: ?\( ?0 ?\))?")
PLAIN_NAMES = r"(?:sqrt|arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|ln|log|exp|pi)(?![A-Za-z])"
LEXER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|\^ ?\{? ?\\circ ?\}?(?![a-z])|" + PLAIN_NAMES + "|" + SYMBOL
                   + r"|\\[A-Za-z]+|\\.|[^\s]", re.ASCII)
EXACT = (int, Fraction)
DIGITS = set("0123456789")
GROUPS = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
CONSTANTS = {"e": math.e + 0j, "i": 1j, "pi": math.pi + 0j}
FUNCTIONS = {name: getattr(cmath, name.replace("arc", "a")) for name in (
    "sin cos tan sinh cosh tanh arcsin arccos arctan exp log").split()} | {
    "ln": cmath.log, "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z)}
INFINITY = re.compile(r"([+-]?) ?(?:\\infty|infinity|inf)", re.IGNORECASE)
KNOWN = {*FUNCTIONS, *CONSTANTS, "sqrt"}
TRIGONOMETRIC = re.compile(r"sin|cos|tan|cot|sec|csc")
FAILURES = (ArithmeticError, ValueError, LookupError, TypeError, RecursionError)


def _values(text, seed):
    """Return the values of an expression at a few random points (of a constant always the same), or None."""
    draw, whole, signed = seed
    points = 20 if whole else 2
    if PLAIN.fullmatch(text):
        return [_exact(text)] * points
    infinity = INFINITY.fullmatch(text.strip())
    if infinity:
        return [-math.inf if infinity[1] == "-" else math.inf] * points
    tokens = [re.sub(r"[{}\s]|\\text", "", token) if len(token) > 2 else token for token in LEXER.findall(text)]
    if not tokens or any(len(word) > 1 and word.isalpha() and word.lower() not in KNOWN for word in text.split()):
        return None  # a word, not a product of letters
    values = []
    for number in range(points):
        point = {"seed": (draw + number, whole, signed), "degree": math.pi / 180 if TRIGONOMETRIC.search(text) else 1}
        rest = [""] + tokens[::-1]
        try:
            values.append(_sum(rest, point))
        except FAILURES:
            return None
        if rest != [""]:
            return None
        if len(point) == 2:  # no variable was met
            return values * points
    return values


def _exact(digits):
    return Fraction(digits) if "." in digits else int(digits)


def _sum(tokens, point):
    value = _product(tokens, point)
    while tokens[-1] in ("+", "-"):
        value = _apply(tokens.pop(), value, _product(tokens, point))
    return value


def _product(tokens, point):
    value = _power(tokens, point)
    while tokens[-1] in ("*", "/") or _begins_factor(tokens[-1]):
        sign = tokens.pop() if tokens[-1] in ("*", "/") else "*"
        value = _apply(sign, value, _power(tokens, point))
    return value


def _begins_factor(token):
    """Whether a token right after a factor multiplies it. A number does not: 2 3 is no product."""
    return token[:1].isalpha() or token in ("(", "[", "{") or token[:1] == "\\" and token not in GROUPS.values()


def _power(tokens, point):
    sign = 1
    while tokens[-1] in ("+", "-"):
        sign = -sign if tokens.pop() == "-" else sign
    value = _atom(tokens, point)
    while tokens[-1][:1] in ("^", "!"):
        token = tokens.pop()
        if token == "^":
            value = _apply("^", value, _argument(tokens, point))
        elif token == "!":
            value = _factorial(value)
        else:
            value = value * point["degree"]
    return value if sign == 1 else -value


def _argument(tokens, point):
    """Return what a command or ^ applies to: a group or one token; of a number one digit, as in TeX."""
    token = tokens[-1]
    if token == "-":
        tokens.pop()
        return -_atom(tokens, point)
    if token[:1] in DIGITS and len(token) > 1:
        tokens[-1] = token[1:]
        return int(token[0])
    return _atom(tokens, point)


def _atom(tokens, point):
    token = tokens.pop()
    name = token.lstrip("\\")
    if token[:1] in DIGITS or token[:1] == "." != token:
        mantissa, _, exponent = token.lower().partition("e")
        value = _exact(mantissa)
        return value * _apply("^", Fraction(10), int(exponent)) if exponent else value
    if token in GROUPS:
        value = _sum(tokens, point)
        if tokens.pop() != GROUPS[token]:
            raise ValueError("bracket")
        if name in ("lfloor", "lceil"):
            value = value if isinstance(value, EXACT) else _real(value)
            return math.floor(value + 1e-12) if name == "lfloor" else math.ceil(value - 1e-12)
        return abs(value) if token == "|" else value
    if name == "frac":
        return _apply("/", _argument(tokens, point), _argument(tokens, point))
    if name == "binom":
        above, below = _argument(tokens, point), _argument(tokens, point)
        return _apply("/", _factorial(above), _factorial(below) * _factorial(above - below))
    if name == "sqrt":
        degree = _atom(tokens, point) if tokens[-1] == "[" else 2
        return _apply("^", _argument(tokens, point), _apply("/", 1, degree))
    if name in FUNCTIONS:
        return _function(name, tokens, point)
    if name in CONSTANTS:
        return CONSTANTS[name]
    if not re.match(SYMBOL, token):
        raise ValueError("unknown symbol")
    if token not in point:  # a variable is a random fraction
        seed, whole, signed = point["seed"]
        draw = zlib.crc32(token.encode(), seed)
        size = 2 + draw % 20 if whole else Fraction(500 + draw % 2500, 997)
        point[token] = -size if signed and draw & 65536 else size
    return point[token]


def _function(name, tokens, point):
    """Return the value of a function of which only the name has been read."""
    base, exponent = None, None
    if tokens[-1] == "_" and name == "log":
        tokens.pop()
        base = _argument(tokens, point)
    if tokens[-1] == "^":
        tokens.pop()
        exponent = _argument(tokens, point)
    if tokens[-1] in GROUPS:
        value = _atom(tokens, point)
    else:  # without brackets it takes the factors that follow: \sin 2x
        value = _power(tokens, point)
        while _begins_factor(tokens[-1]) and tokens[-1].lstrip("\\") not in FUNCTIONS:
            value = _apply("*", value, _power(tokens, point))
    if exponent == -1:
        name, exponent = "arc" + name, None
    result = FUNCTIONS[name](value) / (cmath.log(base) if base else 1)
    if abs(result) > 1e15 or result == 0 and name == "exp":
        raise OverflowError(name)
    if abs(result) < 1e-14 * abs(value):  # \sin\pi
        result = 0j
    return result if exponent is None else _apply("^", result, exponent)


def _apply(sign, a, b):
    """Return a sign b, or raise where it would be too large or, other than 0, too small to hold."""
    if sign == "^":
        if isinstance(a, EXACT) and isinstance(b, EXACT):
            if b.denominator == 1:
                if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > MAX_BITS:
                    raise OverflowError("power")
                return a ** int(b) if b >= 0 else Fraction(1) / a ** int(-b)
            if a < 0 and b.denominator % 2:  # the real root of a negative number
                return (-1) ** (b.numerator % 2) * _apply("^", -a, b)
        value = complex(a) ** complex(b)
    elif sign in "+-":
        value = a + b if sign == "+" else a - b
        if isinstance(value, complex) and abs(value) < 1e-14 * abs(a):  # what is left of floats that cancel
            return 0
    elif sign == "*":
        value = a * b
    else:
        value = Fraction(a, b) if isinstance(a, EXACT) and isinstance(b, EXACT) else a / b
    if isinstance(value, EXACT):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise OverflowError("digits")
    elif not cmath.isfinite(value) or value == 0 and sign not in "+-" and a != 0 != b:
        raise OverflowError("float")
    return value


def _factorial(value):
    if isinstance(value, EXACT) and value.denominator == 1 and value >= 0:
        if value > MAX_FACTORIAL:
            raise OverflowError("factorial")
        return math.factorial(int(value))
    return complex(math.gamma(_real(value) + 1))


def _real(value):
    value = complex(value)
    if abs(value.imag) > 1e-12 * abs(value):
        raise ValueError("complex")
    return value.real


# ------------------------------------------------------------------------------------------------------------
# Compare.

PARTING = re.compile(r"[,;&=<>]|\\\\|\\(?:cup|in|le|ge|ne|pm|mp)|and|or")


def answers_equal(prediction, gold):
    """Return whether prediction is worth gold. An empty gold is worth nothing, and so is what is no string.

    What lies beyond the bounds at the top of this file equals only itself.
    """
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return False
    prediction, gold = prediction.strip(), gold.strip()
    if max(len(prediction), len(gold)) > MAX_LENGTH:
        return prediction == gold
    texts = [_clean(prediction), _clean(gold)]
    if PLAIN.fullmatch(texts[0]) and PLAIN.fullmatch(texts[1]):
        return _exact(texts[0]) == _exact(texts[1])
    if not all(text.strip("{} ") for text in texts):
        return False
    if prediction == gold or texts[0] == texts[1]:
        return True
    if not all(map(_within_bounds, texts)):
        return False
    both = "\n".join(sorted(texts))
    seed = zlib.crc32(both.encode(errors="replace")), "floor" in both or "ceil" in both, "|" in both
    grouped = [text if re.search(r"[(\[]|\\\{", text) else GROUPED.sub(lambda match: match[0].replace(",", ""), text)
               for text in texts]
    try:
        # 100,200 is one number or, unless a group begins with 0, two: whichever the other answer makes true.
        return _equal(*(_parse(text, seed) for text in grouped)) or (
            grouped != texts and not re.search(r",0\d\d", both) and _equal(*(_parse(text, seed) for text in texts)))
    except FAILURES:  # such as a fraction too large for a float
        return False


def _within_bounds(text):
    depths = accumulate((char in "([{") - (char in ")]}") for char in text)
    return text.count("\\") <= MAX_COMMANDS and max(depths) <= MAX_DEPTH and len(PARTING.findall(text)) <= MAX_PARTS


def _equal(a, b):
    """Whether two trees are worth the same."""
    if a[0] == b[0] == "leaf":
        return _equal_leaves(a, b)
    if a[0] == b[0] == "=":
        return a[1] == b[1] and _equal(a[2], b[2]) or _proportional(a[3], b[3])
    a, b = (b, a) if b[0] == "=" else (a, b)
    if a[0] == "=":
        return a[4] and _equal(a[2], b)
    unordered = ("list", "set", "union")
    if a[0] in unordered and b[0] in unordered:
        return _same_items(a[1], b[1])
    a, b = (b, a) if b[0] in unordered or b[0] == "matrix" else (a, b)
    if a[0] in unordered and len(a[1]) == 1:
        return _equal(a[1][0], b)
    if a[0] == "matrix" and b[0] == "()":  # a vector may be written as a tuple
        rows = [row[1] for row in a[1]]
        a = "()", rows[0] if len(rows) == 1 else [row[0] for row in rows if len(row) == 1]
    if a[0] == "list" and b[0] == "()":  # a tuple may lose its parentheses
        a = "()", a[1]
    return a[0] == b[0] != "leaf" and len(a[1]) == len(b[1]) and all(map(_equal, a[1], b[1]))


def _same_items(a, b):
    """Whether two lists hold the same items in some order, each as often."""
    if len(a) != len(b):
        return False
    left = list(b)
    for item in a:
        index = next((index for index, other in enumerate(left) if _equal(item, other)), None)
        if index is None:
            return False
        del left[index]
    return True


def _equal_leaves(a, b):
    _, key, values, percent, literal, base = a
    _, other_key, other_values, other_percent, other_literal, other_base = b
    if key == other_key:
        return True
    if base or other_base:  # a dropped base is forgiven, another one is not
        return base == other_base or not (base and other_base) and (
            key.lstrip("0") == other_base[0] if other_base else other_key.lstrip("0") == base[0])
    if not values or not other_values:
        return False
    if all(map(_close, values, other_values)):
        return True
    if percent != other_percent:  # 50% is 0.5, and its sign may be lost
        scale = Fraction(1, 100) if percent else 100
        return all(_close(value * scale, other) for value, other in zip(values, other_values))
    if literal and not other_literal:
        return _rounds(literal, values[0], other_values[0])
    return bool(other_literal and not literal) and _rounds(other_literal, other_values[0], values[0])


def _proportional(a, b):
    """Whether two equations, given by left - right, differ by a constant factor."""
    if not a or not b or a[0] == a[1] or b[0] == b[1]:
        return False
    return all(_close(a[0] * other, b[0] * value) for value, other in zip(a, b))


def _close(a, b):
    """Whether two values are equal: exactly where both are fractions, else to 1e-9 of their size."""
    if a == b or isinstance(a, EXACT) and isinstance(b, EXACT):
        return a == b
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b)) < math.inf


def _rounds(literal, decimal, value):
    """Whether a decimal of 8 significant digits or more is value, rounded or cut off."""
    digits, _, places = literal.partition(".")
    if not places or len((digits + places).lstrip("0")) < 8 or isinstance(value, complex) and value.imag:
        return False
    step, value = 10.0 ** -len(places), value.real
    return abs(value - decimal) <= step / 2 or abs(decimal) < abs(value) and abs(value - decimal) < step


def score(completion, golds):
    """Return one bool a gold: whether the completion answers that problem correctly."""
    golds = golds if isinstance(golds, (list, tuple)) else []
    return [answers_equal(answer, gold) for answer, gold in zip(extract_answers(completion, len(golds)), golds)]
