"""tools=calculator: one arithmetic expression, evaluated exactly. No eval, no floats; size and work are bounded.

Integers, decimals (0.1 is one tenth) and fractions; + - * / // % ** (also ^), brackets, and the functions below.
Every value is a fraction of at most MAX_BITS bits above and below the line, looked at before a power is computed.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable
from fractions import Fraction

from rltk.rollout.tools.types import Signature, ToolRequest, ToolResult

MAX_CHARACTERS = 1000
MAX_BITS = 4096  # about 1 200 digits
MAX_DEPTH = 64  # of brackets; a sum of many terms is not deep
DECIMALS = 12  # significant digits of what is only nearly a value: 1/3 (about 0.333333333333)
EXACT_DECIMALS = 30  # a terminating decimal is written out up to as many places

SIGNATURE = Signature(
    "calculator",
    "Evaluates one arithmetic expression exactly: integers, decimals and fractions with + - * / // % ** and brackets; "
    "abs, min, max, floor, ceil, round, sqrt, gcd, lcm, factorial, comb.",
    {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "for example (12.5 + 7) * 3 / 4"}},
        "required": ["expression"],
    },
)


class CalculatorError(Exception):
    """Why an expression has no value; the text is for the model."""


class Calculator:
    signature = SIGNATURE

    async def run(self, request: ToolRequest) -> ToolResult:
        """Bounded to a few milliseconds, so it needs no thread."""
        expression = request.arguments.get("expression")
        if not isinstance(expression, str) or len(request.arguments) != 1:
            return ToolResult("parse_error", "calculator takes one argument, expression, a text")
        try:
            return ToolResult("ok", show(evaluate(expression)))
        except CalculatorError as error:
            return ToolResult("error", f"error: {error}")


def evaluate(expression: str) -> Fraction:
    """The exact value. Raises CalculatorError."""
    text = " ".join(expression.split()).replace("^", "**")
    text = text.replace("\N{MULTIPLICATION SIGN}", "*").replace("\N{DIVISION SIGN}", "/")
    text = text.replace("\N{MINUS SIGN}", "-")
    if len(text) > MAX_CHARACTERS:
        raise CalculatorError(f"the expression has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    if not text.isascii():
        odd = next(character for character in text if not character.isascii())
        raise CalculatorError(f"{odd!r} is not understood")
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # of "1and 2": nobody reads it
            tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculatorError("this is not an arithmetic expression") from None
    return _value(tree.body, text, 0)


def show(value: Fraction) -> str:
    """An integer or a terminating decimal in full; else the fraction with a rounded decimal behind it."""
    if value.denominator == 1:
        return str(value.numerator)
    places = _decimal_places(value.denominator)
    if places is not None and places <= EXACT_DECIMALS:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    return f"{value.numerator}/{value.denominator} (about {_rounded(value)})"


def _value(node: ast.expr, text: str, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise CalculatorError(f"the expression is nested deeper than {MAX_DEPTH} levels")
    match node:
        case ast.Constant():
            return _number(text[node.col_offset : node.end_col_offset])
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand, text, depth + 1)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp():
            return _chain(node, text, depth)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _bounded(_apply(name, [_value(argument, text, depth + 1) for argument in arguments]))
        case ast.Call(func=ast.Name(id=name)):
            raise CalculatorError(f"there is no function {name}; there are {', '.join(FUNCTIONS)}")
        case ast.Name(id=name):
            raise CalculatorError(f"{name} has no value here; write numbers")
        case ast.Tuple():
            raise CalculatorError("a comma stands only between a function's arguments; write 1234, not 1,234")
    raise CalculatorError("only numbers, + - * / // % ** and brackets are understood")


def _chain(node: ast.BinOp, text: str, depth: int) -> Fraction:
    """a + b - c ... leans to the left as deep as it is long: walked, not recursed into."""
    rest: list[ast.BinOp] = []
    first: ast.expr = node
    while isinstance(first, ast.BinOp):
        rest.append(first)
        first = first.left
    value = _value(first, text, depth + 1)
    for step in reversed(rest):
        operate = OPERATORS.get(type(step.op))
        if operate is None:
            raise CalculatorError("only numbers, + - * / // % ** and brackets are understood")
        value = _bounded(operate(value, _value(step.right, text, depth + 1)))
    return value


def _number(written: str) -> Fraction:
    if not re.fullmatch(r"\d[\d_]*\.?[\d_]*(?:[eE][+-]?\d+)?|\.\d[\d_]*(?:[eE][+-]?\d+)?", written):
        raise CalculatorError(f"{written[:40]} is not a decimal number")
    mantissa, _, exponent = written.replace("_", "").lower().partition("e")
    if len(exponent) > 5 or abs(int(exponent or 0)) > MAX_BITS:
        raise CalculatorError(f"{written[:40]} is too large or too small")
    return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError(f"a value needs more than {MAX_BITS} bits, about {MAX_BITS * 3 // 10} digits")
    return value


def _divide(left: Fraction, right: Fraction) -> Fraction:
    if right == 0:
        raise CalculatorError("division by zero")
    return left / right


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculatorError(f"an exponent must be an integer, not {show(exponent)}; sqrt takes exact roots")
    count = exponent.numerator
    if base == 0 and count < 0:
        raise CalculatorError("division by zero")
    size = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1  # of an exact power of 2: no less
    if abs(base) != 1 and base != 0 and size * abs(count) > MAX_BITS or abs(count) > 2**31:
        raise CalculatorError(f"a power needs more than {MAX_BITS} bits, about {MAX_BITS * 3 // 10} digits")
    return base**count


OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: _divide,
    ast.FloorDiv: lambda left, right: Fraction(math.floor(_divide(left, right))),
    ast.Mod: lambda left, right: left - right * math.floor(_divide(left, right)),
    ast.Pow: _power,
}


def _apply(name: str, arguments: list[Fraction]) -> Fraction:
    least, most, function = FUNCTIONS[name]
    if not least <= len(arguments) <= most:
        wanted = str(least) if least == most else f"at least {least}"
        raise CalculatorError(f"{name} takes {wanted} arguments, not {len(arguments)}")
    return Fraction(function(*arguments))


def _whole(value: Fraction, name: str, most: int = 2**MAX_BITS) -> int:
    if value.denominator != 1:
        raise CalculatorError(f"{name} takes integers, not {show(value)}")
    if name in ("factorial", "comb") and not 0 <= value <= most:
        raise CalculatorError(f"{name} takes integers from 0 to {most}")
    return value.numerator


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise CalculatorError("the square root of a negative number is not a number here")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise CalculatorError(f"sqrt({show(value)}) is not a fraction; only exact roots have a value here")
    return root


def _round(value: Fraction, places: Fraction = Fraction(0)) -> Fraction:
    if not abs(places) <= DECIMALS * 10:
        raise CalculatorError("round takes at most 120 places")
    return round(value, _whole(places, "round"))


MOST = 2**31
FUNCTIONS: dict[str, tuple[int, int, Callable[..., Fraction | int]]] = {
    "abs": (1, 1, Fraction.__abs__),
    "min": (1, MOST, lambda *values: min(values)),
    "max": (1, MOST, lambda *values: max(values)),
    "floor": (1, 1, Fraction.__floor__),
    "ceil": (1, 1, Fraction.__ceil__),
    "round": (1, 2, _round),
    "sqrt": (1, 1, _root),
    "gcd": (1, MOST, lambda *values: math.gcd(*(_whole(value, "gcd") for value in values))),
    "lcm": (1, 8, lambda *values: math.lcm(*(_whole(value, "lcm") for value in values))),
    "factorial": (1, 1, lambda value: math.factorial(_whole(value, "factorial", 500))),
    "comb": (2, 2, lambda n, k: math.comb(_whole(n, "comb", MAX_BITS), _whole(k, "comb", MAX_BITS))),
}


def _decimal_places(denominator: int) -> int | None:
    """Places after the point that 1/denominator needs; None: it never ends."""
    twos = fives = 0
    while denominator % 2 == 0:
        denominator, twos = denominator // 2, twos + 1
    while denominator % 5 == 0:
        denominator, fives = denominator // 5, fives + 1
    return max(twos, fives) if denominator == 1 else None


def _rounded(value: Fraction) -> str:
    """DECIMALS significant digits, computed with integers: a float would not hold the range."""
    magnitude = len(str(abs(value.numerator))) - len(str(value.denominator))
    if -5 <= magnitude <= DECIMALS:
        places = DECIMALS - magnitude
        digits = str(round(abs(value) * 10**places)).rjust(places + 1, "0")
        text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    else:
        shifted = abs(value) / Fraction(10) ** magnitude
        if shifted < 1:
            magnitude, shifted = magnitude - 1, shifted * 10
        text = f"{float(shifted):.{DECIMALS - 1}f}e{magnitude:+d}"
    return f"-{text}" if value < 0 else text
