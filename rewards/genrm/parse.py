r"""Verdicts out of a judge's reply, strictly: the last \boxed{} after the reasoning, or nothing.

A reply that was cut off, is still reasoning, boxes something else last, or names what there is not, holds no verdict:
an earlier box is never taken instead, as it may be a thought or a quotation. Nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rltk.rewards.genrm.types import Reply

FINISHED = ("stop", "eos_token")  # anything else (length, abort, content_filter) left the reply incomplete
_BOX = re.compile(r"\\boxed\{([^{}]{0,64})\}")
_INTEGER = re.compile(r"-1|0|[1-9][0-9]{0,5}")
_BRACES = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)


def final_part(reply: Reply) -> str | None:
    """What the reply says after its reasoning; None if it was cut off or never left it."""
    if reply.finish_reason not in FINISHED:
        return None
    _, closed, rest = reply.text.rpartition("</think>")
    return rest if closed or "<think>" not in rest else None


def last_verdict(reply: Reply) -> str | None:
    r"""The stripped content of the last \boxed of the final part, if that one is whole and short."""
    part = final_part(reply)
    start = -1 if part is None else part.rfind(r"\boxed")
    match = _BOX.match(part, start) if part is not None and start >= 0 else None
    return match[1].strip() if match else None


def parse_index(reply: Reply, paragraphs: int) -> int | None:
    """The index of a paragraph, 0 <= index < `paragraphs`, or -1; None if that is not what the last box holds."""
    verdict = last_verdict(reply)
    if verdict is None or not _INTEGER.fullmatch(verdict):
        return None
    return int(verdict) if int(verdict) < paragraphs else None


def parse_choice(reply: Reply, choices: Sequence[str]) -> int | None:
    """Which of `choices` the last box holds, in any case; None if none."""
    verdict = last_verdict(reply)
    known = [choice.lower() for choice in choices]
    return known.index(verdict.lower()) if verdict is not None and verdict.lower() in known else None


def parse_numbers(reply: Reply, highest: int, most: int) -> list[int] | None:
    """One to `most` different numbers from 1 to `highest`, separated by commas."""
    verdict = last_verdict(reply)
    if verdict is None:
        return None
    parts = [part.strip() for part in verdict.split(",")]
    if len(parts) > most or len(set(parts)) < len(parts) or not all(_INTEGER.fullmatch(part) for part in parts):
        return None
    numbers = [int(part) for part in parts]
    return numbers if all(1 <= number <= highest for number in numbers) else None


def final_answer(text: str) -> str | None:
    r"""The content of a response's last \boxed{...} with balanced braces. One pass: endless boxes cost no more."""
    open_at: list[tuple[int, bool]] = []  # (where the content begins, whether it is a box)
    best: tuple[int, int] | None = None
    for mark in _BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != r"\{":
            open_at.append((mark.end(), mark[0] != "{"))
        elif mark[0] == "}" and open_at:
            start, box = open_at.pop()
            if box and (best is None or start > best[0]):
                best = (start, mark.start())
    return text[best[0] : best[1]].strip() if best else None
