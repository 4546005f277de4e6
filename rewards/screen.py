"""Expressions that sympy would never finish, told by their text alone."""

from __future__ import annotations

import math
import re

LONGEST_ANSWER = 500  # characters
LARGEST_EXPONENT = 9_999
LARGEST_FACTORIAL = 999
DEEPEST_BRACKETS = 30
TOO_LARGE = 10**9
BRACKETS = {"(": ")", "[": "]", "{": "}"}

# How LaTeX is read: powers as ^, every bracket a bracket, without sizes, spaces and separators of thousands.
PLAIN = [
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\[,;:! ]|~"), " "),
    (re.compile(r"\\(?:\{|l(?:floor|ceil|brace|brack|vert|group)\b)"), "("),
    (re.compile(r"\\(?:\}|r(?:floor|ceil|brace|brack|vert|group)\b)"), ")"),
    (re.compile(r"(?<=\d)(?:\{,\}|[,\s])(?=\d{3})"), ""),
]
POWER = re.compile(r"(\d+)\s*\^\s*([-+]?\d+)")
FACTORIAL = re.compile(r"(\d+)\s*!(?!=)")
BRACKETED_NUMBER = re.compile(r"[({\[]\s*([-+]?\d+)\s*[)}\]]")
SCIENTIFIC = re.compile(r"\d[eE][-+]?(\d+)")
GROWING = re.compile(r"[!^]|binom|choose")
FUNCTION = re.compile(r"\\(?:([dt]?binom)|[gG]amma|operatorname\s*\{(?:eye|zeros|ones)\})\s*")


def screen(expression: str) -> str | None:
    """Why the expression must not be given to sympy, or None. What slips through meets the deadlines."""
    if len(expression) > LONGEST_ANSWER:
        return f"has {len(expression)} characters; at most {LONGEST_ANSWER} are parsed"
    text = expression
    for pattern, replacement in PLAIN:
        text = pattern.sub(replacement, text)
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST_BRACKETS:
        return f"nests brackets {deepest} deep; at most {DEEPEST_BRACKETS} are parsed"
    return _powers(text) or _factorials(text) or _functions(text)


def _powers(text: str) -> str | None:
    for match in re.finditer(r"\^\s*", text):
        exponent = _operand(text, match.end())
        bound = _bound(exponent)
        if bound > LARGEST_EXPONENT and GROWING.search(exponent):
            return "has a tower of exponents"
        base = _operand_before(text, match.start())
        if not _symbolic(base):
            for inner in re.finditer(r"\^\s*", base):  # (((9^9)^9)^9): they multiply
                bound *= _bound(_operand(base, inner.end()))
        if bound > LARGEST_EXPONENT:
            return f"has an exponent above {LARGEST_EXPONENT}"
    if any(int(exponent) > LARGEST_EXPONENT for exponent in SCIENTIFIC.findall(text)):
        return f"has an exponent above {LARGEST_EXPONENT}"
    return None


def _factorials(text: str) -> str | None:
    for match in re.finditer(r"!(?!=)", text):
        operand = _operand_before(text, match.start())
        if not _symbolic(operand) and _bound(operand) > LARGEST_FACTORIAL:
            return f"has a factorial above {LARGEST_FACTORIAL}, or of a factorial"
    return None


def _functions(text: str) -> str | None:
    operands = []
    for match in re.finditer(r"\\choose", text):
        operands += [text[: match.start()].rpartition("{")[2], text[match.end() :].partition("}")[0]]
    for match in FUNCTION.finditer(text):
        operand = _operand(text, match.end())
        if match[1]:
            after = match.end() + len(operand) + 2 * (text[match.end() : match.end() + 1] in BRACKETS)
            operands += [operand, _operand(text.rstrip(), after)]
        elif not _symbolic(operand) and _bound(operand) > LARGEST_FACTORIAL:
            return f"has {match[0][1:].strip()} of more than {LARGEST_FACTORIAL}"
    if any(_bound(operand) > LARGEST_EXPONENT for operand in operands):
        return f"has a binomial of more than {LARGEST_EXPONENT}"
    return None


def _bound(text: str) -> int:
    """No less than what a numeric expression amounts to: powers and factorials worked out, then all numbers multiplied.
    What cannot be worked out is too large, or counts as its numbers if it holds a variable: then sympy leaves it be."""
    before = ""
    while text != before:
        before = text
        text = BRACKETED_NUMBER.sub(r" \1 ", text)
        text = FACTORIAL.sub(lambda match: f" {math.factorial(min(int(match[1]), 12))} ", text)
        text = POWER.sub(lambda match: f" {_power(int(match[1]), abs(int(match[2])))} ", text)
    if GROWING.search(text) and not _symbolic(text):
        return TOO_LARGE
    product = 1
    for number in re.findall(r"\d+", text):
        product = min(TOO_LARGE, product * max(1, int(number)))
    return product


def _power(base: int, exponent: int) -> int:
    return min(TOO_LARGE, base**exponent) if exponent * base.bit_length() < 64 else TOO_LARGE


def _group(text: str, start: int) -> str | None:
    """The content of the bracket that opens at `start`; None if it is never closed."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == text[start]) - (text[position] == BRACKETS[text[start]])
        if depth == 0:
            return text[start + 1 : position]
    return None


def _operand(text: str, start: int) -> str:
    """What an exponent sign or a function before `start` applies to itself: a bracket, a command with its brackets, a
    number with what sticks to it, a symbol."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if text[start : start + 1] in BRACKETS:
        content = _group(text, start)
        return text[start:] if content is None else content
    command = re.compile(r"\\[a-zA-Z]+").match(text, start)
    if command:
        end = command.end()
        while text[end : end + 1] in BRACKETS:
            content = _group(text, end)
            if content is None:
                return text[start:]
            end += len(content) + 2
        return text[start:end]
    match = re.compile(r"[-+]?\w+\s*[\^!]?|\S?").match(text, start)
    return match[0] if match else ""


def _operand_before(text: str, end: int) -> str:
    """What a sign at `end` applies to: all that multiplies out first, with the commands and bases it belongs to."""
    start = len(text[:end].rstrip())
    last = text[start - 1 : start]
    if last == "!":
        return _operand_before(text, start - 1) + "!"
    if last == "|":
        return text[:start]
    if last in BRACKETS.values():
        depth = 0
        for position in range(start - 1, -1, -1):
            depth += (text[position] in ")}]") - (text[position] in "({[")
            if depth == 0:
                break
        operand, before = text[position:start], text[:position].rstrip()
        if operand[0] == "{" and before[-1:] in ("}", "]"):  # \frac{1}{2}
            return _operand_before(text, len(before)) + operand
    else:
        word = re.search(r"\w*$", text[:start])
        operand = word[0] if word else ""
        before = text[: start - len(operand)].rstrip()
    return f"{_operand_before(text, len(before) - 1)}^{operand}" if before[-1:] == "^" else operand


def _symbolic(text: str) -> bool:
    """It holds a variable (or e, pi): sympy will not multiply it out."""
    return re.search(r"\\pi|[a-zA-Z]", re.sub(r"\\(?!pi)[a-zA-Z]+", "", text)) is not None
