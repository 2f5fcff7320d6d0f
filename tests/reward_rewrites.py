"""Mechanical rewrites of an answer: some that keep what it is worth, some that change it.

Each function returns {name of the rewrite: text} with those that apply to the answer at hand.
"""

import re
from fractions import Fraction

INTEGER = re.compile(r"-?\d+")
NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+")
FRACTION = re.compile(r"\\d?frac\{(-?\d+)\}\{(\d+)\}")
PAIRED = re.compile(r"([(\[])([^()\[\]]*,[^()\[\]]*)([)\]])")


def top_level_items(text):
    """Return the items of a list that no bracket holds together."""
    items, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    return items


def keeping(gold):
    """Return rewrites that keep the value."""
    core = re.sub(r"(?<!\\)\$", "", gold).strip().rstrip(".")
    inside = re.search(r"\\text|\\mbox|where|np\.", gold) is not None
    rewrites = {
        "dollars": f"${core}$",
        "display": f"\\[ {core} \\]",
        "spaces": f"  {core} ",
        "box": f"\\boxed{{{core}}}",
        "style": f"\\displaystyle {core}",
        "stop": f"{core}.",
    }
    spaced = re.sub(r"(?<!\\)([+=()\[\]{}<>])", r" \1 ", core)
    if not inside and "begin" not in core and not re.search(r"\\[{}]", core):
        rewrites["spacing"] = spaced
    if "\\frac" in core:
        rewrites["dfrac"] = core.replace("\\frac", "\\dfrac")
    if "\\left" not in core and PAIRED.fullmatch(core):
        rewrites["left right"] = PAIRED.sub(r"\\left\1\2\\right\3", core)
    if "\\left" in core:
        rewrites["no left right"] = core.replace("\\left", "").replace("\\right", "")
    if FRACTION.fullmatch(core):
        top, bottom = map(int, FRACTION.fullmatch(core).groups())
        rewrites["slash"] = f"{top}/{bottom}"
        rewrites["unreduced"] = f"\\frac{{{3 * top}}}{{{3 * bottom}}}"
        if not (10**6 * Fraction(top, bottom)).denominator > 1:
            rewrites["decimal"] = f"{top / bottom:.6f}"
    if NUMBER.fullmatch(core):
        rewrites["zeros"] = core + ("0" if "." in core else ".00")
        doubled = f"\\frac{{{2 * int(core)}}}{{2}}" if "." not in core else None
        rewrites["fraction"] = doubled or str(Fraction(core))
        rewrites["unit"] = core + "\\text{ cm}"
        rewrites["currency"] = "\\$" + core
        rewrites["name"] = f"x = {core}"
    if INTEGER.fullmatch(core) and len(core.lstrip("-0")) > 3:
        rewrites["thousands"] = f"{int(core):,}"
        rewrites["LaTeX thousands"] = f"{int(core):,}".replace(",", "{,}")
    if GROUPED.fullmatch(core):
        rewrites["no thousands"] = core.replace(",", "")
    items = top_level_items(core)
    if len(items) > 1 and not GROUPED.fullmatch(core) and not inside and "\\!" not in core:
        rewrites["order"] = ", ".join(reversed(items))
    union = core.split("\\cup")
    if len(union) > 1:
        rewrites["order of the union"] = " \\cup ".join(reversed(union))
    return rewrites


def changing(gold):
    """Return rewrites that change the value."""
    core = re.sub(r"(?<!\\)\$", "", gold).strip().rstrip(".")
    rewrites = {"more": f"{core}, 7", "hedge": f"{core} or 7", "not": f"not {core}"}
    if re.search(r"[1-9]$|[A-Za-z0-9]\}?[1-9a-zA-Z]$", core) and "box" not in core:
        rewrites["shorter"] = core[:-1]
    if core[-1:].isdigit() and "\\pm" not in core:
        inside = core[-2:-1] in ("^", "_")
        rewrites["longer"] = f"{core[:-1]}{{{core[-1]}5}}" if inside else f"{core}5"
    digit = re.search(r"\d(?!.*\d)", core, re.DOTALL) if "box" not in core else None
    if digit and re.search(r"[1-9]", core):
        other = str((int(digit[0]) + 1) % 10)
        rewrites["digit"] = core[:digit.start()] + other + core[digit.end():]
    first = re.search(r"[1-9]", core)
    if first:
        other = str(int(first[0]) % 9 + 1)
        rewrites["first digit"] = core[:first.start()] + other + core[first.end():]
    fixed_sign = re.search(r"[a-zA-Z] ?=|\\in |\\text|_|\\pm", core) or core[0] in "([\\{0"
    if first and not fixed_sign:
        rewrites["sign"] = core[1:] if core[0] == "-" else "-" + core
    exponent = re.search(r"\^\{?(\d)\}?", core) if "box" not in core else None
    if exponent:
        raised = f"^{{{int(exponent[1]) + 1}}}"
        rewrites["exponent"] = core[:exponent.start()] + raised + core[exponent.end():]
    if PAIRED.fullmatch(core):
        swap = {"(": "[", "[": "("}
        rewrites["bracket"] = swap[core[0]] + core[1:]
    items = top_level_items(core)
    if len(items) > 1 and not GROUPED.fullmatch(core):
        rewrites["dropped"] = ",".join(items[:-1])
    inner = PAIRED.fullmatch(core)
    if inner:
        rewrites["dropped inside"] = inner[1] + ",".join(inner[2].split(",")[:-1]) + inner[3]
        rewrites["turned"] = inner[1] + ",".join(reversed(inner[2].split(","))) + inner[3]
    return {name: text for name, text in rewrites.items() if text.strip() and text != core}
