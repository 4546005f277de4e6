r"""Solutions with a planted error, for judges: the styles of `demonstrations`, and four that leave the answer right.

operand  a step copies a number of the problem wrongly and is right by it; the next goes on from the right value
swap     two neighbouring steps are taken in the other order: sound as a sum, but not the problem's own steps
extra    a needless step that adds 0
again    a step is told a second time, with another result; the next goes on from the right one
"""

from __future__ import annotations

import random

from rltk.tasks import demonstrations
from rltk.trajectory import Record

SOUND = "sound"
STYLES = (*demonstrations.STYLES, "operand", "swap", "extra", "again")
TWO_STEPS = ("jump", "swap")  # what a problem of one step has no room for
_ERRORS = (-20, -10, -2, -1, 1, 2, 10, 20)


def solve(record: Record, style: str, rng: random.Random) -> str:
    """A solution of `record` (of `Arithmetic`) in this style. Guesses and jumps land right: a rule lets them pass.

    A swap that changes no step's text leaves the solution sound, so the label is the rule's (`score_paragraphs`), never
    the style's. ValueError: an unknown style.
    """
    if style in demonstrations.STYLES:
        return demonstrations.demonstrate(record, style, rng, right=1.0)
    plant = {"operand": _operand, "swap": _swap, "extra": _extra, "again": _again}.get(style)
    if plant is None:
        raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")
    return "\n\n".join([*plant(record, rng), rf"\boxed{{{record.answer}}}"])


def _lines(start: int, ops: list) -> list[str]:
    lines, value = [], start
    for operator, number in ops:
        result = _apply(value, operator, number)
        lines.append(f"{value} {operator} {number} = {result}")
        value = result
    return lines


def _apply(value: int, operator: str, number: int) -> int:
    return {"+": value + number, "-": value - number, "*": value * number}[operator]


def _value_before(record: Record, at: int) -> int:
    return int(record.data["steps"][at].split()[0])


def _operand(record: Record, rng: random.Random) -> list[str]:
    steps, at = list(record.data["steps"]), rng.randrange(len(record.data["steps"]))
    operator, number = record.data["ops"][at]
    before = _value_before(record, at)
    near = [number + error for error in _ERRORS if number + error > 0]
    copied = rng.choice([other for other in near if _apply(before, operator, other) >= 0] or near)
    return [*steps[:at], *_lines(before, [[operator, copied]]), *steps[at + 1 :]]


def _swap(record: Record, rng: random.Random) -> list[str]:
    """A pair whose values stay at least 0, where there is one; of one step, the step itself."""
    ops = record.data["ops"]
    pairs = [at for at in range(len(ops) - 1) if _apply(_value_before(record, at), *ops[at + 1]) >= 0]
    if not pairs:
        return list(record.data["steps"])
    at = rng.choice(pairs)
    return _lines(record.data["start"], [*ops[:at], ops[at + 1], ops[at], *ops[at + 2 :]])


def _extra(record: Record, rng: random.Random) -> list[str]:
    steps, at = record.data["steps"], rng.randrange(len(record.data["steps"]))
    value = _value_before(record, at)
    return [*steps[:at], f"{value} + 0 = {value}", *steps[at:]]


def _again(record: Record, rng: random.Random) -> list[str]:
    steps, at = record.data["steps"], rng.randrange(len(record.data["steps"]))
    told, _, result = steps[at].rpartition(" ")
    other = rng.choice([int(result) + error for error in _ERRORS if int(result) + error >= 0])
    return [*steps[: at + 1], f"{told} {other}", *steps[at + 1 :]]
