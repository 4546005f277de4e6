r"""Solutions to learn from before RL: sound ones and shortcuts, for the records of `Arithmetic` and `ArithmeticLong`.

sound   every step, then the answer
guess   the bare answer; right with a given chance
jump    some steps are skipped, and what stands after the gap is right with a given chance
slip    one step has a wrong result, carried on: the answer is wrong
patch   one step has a wrong result, and the next goes on from the right one: right answer, wrong step
"""

from __future__ import annotations

import random

from rltk.trajectory import Record

STYLES = ("sound", "guess", "jump", "slip", "patch")
_ERRORS = (-20, -10, -2, -1, 1, 2, 10, 20)  # how far off a wrong result is


def demonstrate(record: Record, style: str, rng: random.Random, right: float = 0.0) -> str:
    """A response to `record` in this style. `right`: the chance that a guess or a jump lands on the right number."""
    if style == "sound":
        return _join(record.data["steps"], record.answer)
    if style == "guess":
        return _join([], _land(int(record.answer), rng, right))
    if style == "jump":
        return _jump(record, rng, right)
    if style in ("slip", "patch"):
        return _misstep(record, rng, carry=style == "slip")
    raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")


def _join(steps: list[str], answer: int | str) -> str:
    return "\n\n".join([*steps, rf"\boxed{{{answer}}}"])


def _wrong(value: int, rng: random.Random) -> int:
    return rng.choice([value + e for e in _ERRORS if value + e >= 0])


def _land(value: int, rng: random.Random, right: float) -> int:
    return value if rng.random() < right else _wrong(value, rng)


def _steps(record: Record, start: int, first: int) -> tuple[list[str], list[int]]:
    """The steps from index `first` on, as they read if the value before them is `start`, and all values from there."""
    numbered = "early" in record.data
    lines, values = [], [start]
    for index, (operator, number) in enumerate(record.data["ops"][first:], first):
        result = values[-1] + number if operator == "+" else values[-1] - number
        lines.append(f"{f'{index + 1}: ' if numbered else ''}{values[-1]} {operator} {number} = {result}")
        values.append(result)
    return lines, values


def _finish(record: Record, lines: list[str], values: list[int]) -> str:
    """Close a solution that passed through `values` (from the start value on): a long one looks up its early result."""
    if "early" not in record.data:
        return _join(lines, values[-1])
    early = record.data["early"]
    answer = values[early] + values[-1]
    return _join([*lines, lines[early - 1], f"{values[early]} + {values[-1]} = {answer}"], answer)


def _misstep(record: Record, rng: random.Random, carry: bool) -> str:
    count = len(record.data["ops"])
    lines, values = _steps(record, record.data["start"], 0)
    at = rng.randrange(count)
    shown = _wrong(values[at + 1], rng)
    wrong_line = f"{lines[at].rpartition(' ')[0]} {shown}"
    if not carry:
        return _finish(record, [*lines[:at], wrong_line, *lines[at + 1 :]], values)
    later_lines, later_values = _steps(record, shown, at + 1)
    return _finish(record, [*lines[:at], wrong_line, *later_lines], [*values[: at + 1], *later_values])


def _jump(record: Record, rng: random.Random, right: float) -> str:
    """Two steps told as one; in a long solution, everything between an early step and the last result left out."""
    ops = record.data["ops"]
    lines, values = _steps(record, record.data["start"], 0)
    if "early" in record.data:
        told = rng.randint(record.data["early"], record.data["early"] + 3)
        return _finish(record, lines[:told], [*values[: told + 1], _land(values[-1], rng, right)])
    if len(ops) < 2:
        return _join([], _land(values[-1], rng, right))
    at = rng.randrange(len(ops) - 1)
    landed = _land(values[at + 2], rng, right)
    (first, a), (second, b) = ops[at], ops[at + 1]
    later_lines, later_values = _steps(record, landed, at + 2)
    merged = f"{values[at]} {first} {a} {second} {b} = {landed}"
    return _finish(record, [*lines[:at], merged, *later_lines], [*values[: at + 1], *later_values])
