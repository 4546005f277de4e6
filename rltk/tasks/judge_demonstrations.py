r"""Replies to learn from before RL as a judge, for the records of `Judging`. They box nothing but the verdict.

work    a line for each paragraph: the step as it should be, the result that stands there (? where the answer is told
        too early), and whether the two agree; after the first that does not, the verdict
glance  the bare verdict, a guess

    0: 47 + 35 = 82 = 82 right
    1: 82 - 18 = 64 = 74 wrong
    \boxed{1}
"""

from __future__ import annotations

import random
import re

from rltk.tasks.paragraphs import split_paragraphs
from rltk.trajectory import Record

STYLES = ("work", "glance")
_NUMBER = re.compile(r"\d+")
Part = tuple[str, bool]  # text, and whether the model wrote it


def demonstrate(record: Record, style: str, rng: random.Random) -> tuple[tuple[dict[str, str], ...], list[Part]]:
    """The question and a reply in this style; the model writes all of it."""
    if style == "work":
        reply = _work(record)
    elif style == "glance":
        reply = rf"\boxed{{{_glance(record.data['paragraphs'], rng)}}}"
    else:
        raise ValueError(f"style {style!r} is not one of {', '.join(STYLES)}")
    return record.messages, [(reply, True)]


def _work(record: Record) -> str:
    label, steps = record.data["label"], record.data["steps"]
    lines = []
    for number, paragraph in enumerate(split_paragraphs(record.data["solution"])):
        wanted = steps[number] if number < len(steps) else record.data["reference"]
        told = "?" if number < len(steps) and paragraph.startswith("\\boxed") else _NUMBER.findall(paragraph)[-1]
        lines.append(f"{number}: {wanted} = {told} {'wrong' if number == label else 'right'}")
        if number == label:
            break
    return "\n".join([*lines, rf"\boxed{{{label}}}"])


def _glance(paragraphs: int, rng: random.Random) -> int:
    return -1 if rng.random() < 0.5 else rng.randrange(paragraphs)
