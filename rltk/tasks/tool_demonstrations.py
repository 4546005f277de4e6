r"""Responses to learn from before RL with a tool: sound ones and flawed ones, for the records of `ArithmeticTool`.

solve   the problem's expression in Python, then its result in the box
guess   no tool: a bare estimate, two digits and zeros
slip    a digit of the code is not the problem's: a wrong result, taken over
ignore  the code is right, and an estimate stands in the box all the same
broken  the code's bracket stays open: after the error, an estimate
retry   as broken, but after the error the code is mended
check   the code is run a second time before its result is taken over

So that the interventions of a rollout are met with sense (they are never seen without them):
trust   ATTC believes the result: it is taken over
doubt   ATTC reconsiders the result of right, miscopied or broken code: the right code follows
close   DTSR closes the thought where it would have been checked: the result is taken over
judge   DTSR's question about a thought: 100 if it ends in a result, 0 if it ends in an error

A response is parts, as a rollout would have them: what the model wrote, and what was appended after it stopped.
"""

from __future__ import annotations

import random

from rltk.rollout.attc import RECONSIDER, TRUST
from rltk.rollout.dtsr import CLOSING, OPENING, QUESTION
from rltk.rollout.formats.python_block import STOP, PythonBlock
from rltk.trajectory import Record

STYLES = ("solve", "guess", "slip", "ignore", "broken", "retry", "check", "trust", "doubt", "close", "judge")
ERROR = "SyntaxError: '(' was never closed (<tool>, line 1)"
Part = tuple[str, bool]  # text, and whether the model wrote it
Messages = tuple[dict[str, str], ...]


def demonstrate(record: Record, style: str, rng: random.Random) -> tuple[Messages, list[Part]]:
    """The conversation that the response is to (but for `judge`, the record's) and a response in this style."""
    if style not in STYLES:
        raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")
    if style == "judge":
        return _judge(record, rng)
    return record.messages, _response(record, style, rng)


def _response(record: Record, style: str, rng: random.Random) -> list[Part]:
    code, answer = record.data["expression"], (rf"\boxed{{{record.answer}}}", True)
    estimate = (rf"\boxed{{{_estimate(int(record.answer))}}}", True)
    if style == "guess":
        return [estimate]
    if style == "slip":
        wrong = _miscopied(code, rng)
        return [*_call(wrong), (rf"\boxed{{{_value(wrong)}}}", True)]
    if style == "ignore":
        return [*_call(code), estimate]
    if style == "broken":
        return [*_call(code, broken=True), estimate]
    if style == "retry":
        return [*_call(code, broken=True), *_call(code, before=rng.choice(["", "Wait.\n"])), answer]
    if style == "check":
        return [*_call(code), *_call(code, before="Wait.\n"), answer]
    if style == "trust":
        return [*_call(code), (TRUST, False), answer]
    if style == "doubt":
        first = rng.choice([_call(code), _call(_miscopied(code, rng)), _call(code, broken=True)])
        return [*first, (RECONSIDER, False), *_call(code), (rng.choice([TRUST, RECONSIDER]), False), answer]
    if style == "close":
        return [*_call(code), ("Wait", True), (CLOSING, False), answer]
    return [*_call(code), answer]


def _judge(record: Record, rng: random.Random) -> tuple[Messages, list[Part]]:
    broken = rng.random() < 0.5
    thought = "".join(text for text, _ in _call(record.data["expression"], broken))
    text = QUESTION.format(problem=record.messages[-1]["content"], thought=thought.strip())
    return ({"role": "user", "content": text},), [(OPENING, False), (" 0" if broken else " 100", True)]


def _call(expression: str, broken: bool = False, before: str = "") -> list[Part]:
    turn = f"{before}```python\nprint({expression}{'' if broken else ')'}\n```\n{STOP}"
    result = ERROR if broken else str(_value(expression))
    return [(turn, True), (PythonBlock().appended(turn, "", [result]), False)]


def _value(expression: str) -> int:
    """a * b + c - d ..., as ArithmeticTool draws it."""
    first, _, second, *rest = expression.split()
    value = int(first) * int(second)
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        value += int(number) if operator == "+" else -int(number)
    return value


def _estimate(value: int) -> int:
    return round(value, 2 - len(str(value)))


def _miscopied(expression: str, rng: random.Random) -> str:
    """One digit, not the first of its number, replaced by another."""
    inner = [i for i, c in enumerate(expression) if c.isdigit() and i and expression[i - 1].isdigit()]
    at = rng.choice(inner)
    other = rng.choice([d for d in "0123456789" if d != expression[at]])
    return expression[:at] + other + expression[at + 1 :]
