r"""Scoring of solutions written as paragraphs: one step each, separated by a blank line, then `\boxed{answer}`.

Where every step of the sound solution is known, so is everything else: whether the answer is right, whether a step is
wrong or missing, and in which paragraph that shows first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rltk.trajectory import RewardRecord

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_INTEGER = re.compile(r"[+-]?\d{1,100}")  # longer strings of digits are nobody's answer, and slow to convert


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`: whatever blank lines separate, stripped, empty ones left out."""
    return [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]


def final_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, stripped of spaces and thousands separators; None without one."""
    boxes = _BOXED.findall(text)
    return boxes[-1].replace(",", "").replace(" ", "") if boxes else None


def score_paragraphs(steps: Sequence[str], answer: str, text: str, check_steps: bool = True) -> RewardRecord:
    """1.0 for the right integer in the last box, else 0.0.

    Of a right answer, `flawed` says whether any paragraph differs (spaces aside) from `steps` followed by the box, and
    `detail["first_flawed"]` is the index of the first that does, from 0; a missing step shows at the paragraph that
    stands in its place. A wrong answer has `flawed` None, and its first flawed paragraph all the same.
    """
    given = final_answer(text)
    if given is None:
        return RewardRecord(0.0, reason="no boxed answer", correct=False)
    if not _INTEGER.fullmatch(given):
        return RewardRecord(0.0, reason="the boxed answer is not an integer", correct=False)
    correct = int(given) == int(answer)
    reason = "right answer" if correct else "wrong answer"
    if not check_steps:
        return RewardRecord(float(correct), reason=reason, correct=correct)
    first_flawed = _first_difference([*steps, rf"\boxed{{{answer}}}"], split_paragraphs(text))
    detail = {} if first_flawed is None else {"first_flawed": first_flawed}
    flawed = first_flawed is not None if correct else None
    return RewardRecord(float(correct), reason=reason, correct=correct, flawed=flawed, detail=detail)


def _first_difference(expected: list[str], found: list[str]) -> int | None:
    plain = [re.sub(r"\s+", "", p) for p in found]
    wanted = [re.sub(r"\s+", "", p) for p in expected]
    for index, (a, b) in enumerate(zip(wanted, plain, strict=False)):
        if a != b:
            return index
    if len(plain) == len(wanted):
        return None
    return min(len(plain), len(wanted)) if len(plain) > len(wanted) else len(plain) - 1
