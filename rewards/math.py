"""Mathematical answers compared by math-verify, behind a screen for expressions that would never finish."""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import Any

import math_verify.grader
import math_verify.parser
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rltk.errors import InfrastructureError
from rltk.rewards.scorer import masked
from rltk.rewards.screen import screen
from rltk.rewards.time_limit import TimeLimitError, time_limit
from rltk.trajectory import RewardRecord

# CPU seconds, together below the usual deadline of a sample, 10 s: a number crunched inside C code is deaf to them and
# is ended only with its process. math-verify's own limits, and its warning that they are off, are off: they interrupt
# only once.
math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = True
PARSE_S = 3
VERIFY_S = 3

BOXED = [LatexExtractionConfig(boxed_match_priority=0)]
ANCHORED = [
    LatexExtractionConfig(try_extract_without_anchor=False),
    ExprExtractionConfig(try_extract_without_anchor=False),
]
BOX = re.compile(r"\\f?boxed\s*(?=\{)")
BRACE = re.compile(r"[{}]")
FINAL_ANSWER = re.compile(r"answer\s*(?:is|:|=)\s*(.*)", re.IGNORECASE)
MARKDOWN_BOLD = re.compile(r"\*\*(.+?)\*\*")


class _Unparsable(Exception):
    pass


def score_math(answer: str, text: str) -> RewardRecord:
    """1.0 if the final answer of `text` equals `answer`, else 0.0; None if `answer` itself cannot be parsed.

    The final answer is the last complete \\boxed{}, or else what follows the last "answer is". An answer that is
    missing, unparsable, refused by the screen or slower than the time limits is wrong; `reason` says which.
    `answer` may be an expression, or a solution that ends in \\boxed{...} or in "#### ...". A percent sign is ignored.
    Raises InfrastructureError off the main thread, where those time limits cannot work.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InfrastructureError("score_math needs the process's main thread (signals); score through RewardPool")
    try:
        gold = _parse_gold(answer)
    except _Unparsable as error:
        return masked("gold", f"the reference answer {answer[:200]!r} {error}")
    boxed = last_boxed(text)
    final = boxed if boxed is not None else _after_anchor(text)
    if final is None or not final.strip():
        return _wrong("no final answer")
    if final.strip() == answer.strip():
        return RewardRecord(1.0, reason="equal text", correct=True)
    try:
        prediction = _parse(final, boxed is not None)
        with time_limit(VERIFY_S):
            equal = verify(gold, prediction, timeout_seconds=None, raise_on_error=True)
    except _Unparsable as error:
        return _wrong(f"the answer {error}")
    except TimeLimitError:
        return _wrong(f"comparing the answer took over {VERIFY_S} s")
    except (Exception, MemoryError) as error:  # sympy raises anything; the reference was parsed, so it is the answer's
        return _wrong(f"comparing the answer raised {type(error).__name__}")
    return RewardRecord(1.0, reason="equal", correct=True) if equal else _wrong("different")


def warm_up() -> None:
    """Load what sympy loads when it first compares, over a second of CPU time: not at the first sample's expense."""
    score_math("x^2+2x+1", r"\boxed{(x+1)^2}")


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces are balanced."""
    boxes = {match.end() for match in BOX.finditer(text)}
    if not boxes:
        return None
    last, opened = None, []
    for brace in BRACE.finditer(text, min(boxes)):  # once over the text, however many boxes are never closed
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened and (start := opened.pop()) in boxes and (last is None or start > last[0]):
            last = start, brace.start()
    return None if last is None else text[last[0] + 1 : last[1]]


@lru_cache(maxsize=4096)  # a group's samples share their reference
def _parse_gold(answer: str) -> list[Any]:
    boxed = last_boxed(answer)
    return _parse(boxed if boxed is not None else answer.rpartition("####")[2], boxed=True)


def _parse(final: str, boxed: bool) -> list[Any]:
    """math-verify's parse of a final answer: a list of one sympy object. Raises _Unparsable."""
    final = re.sub(r"\\?%", "", final).strip()
    problem = screen(final)
    if problem:
        raise _Unparsable(problem)
    source, config = (f"\\boxed{{{final}}}", BOXED) if boxed else (f"The final answer is {final}", ANCHORED)
    try:
        with time_limit(PARSE_S):
            parsed = parse(source, config, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    except TimeLimitError:
        raise _Unparsable(f"took over {PARSE_S} s to parse") from None
    except (Exception, MemoryError) as error:  # antlr and sympy raise anything on malformed text
        raise _Unparsable(f"cannot be parsed ({type(error).__name__})") from None
    if not parsed:
        raise _Unparsable("cannot be parsed")
    return parsed


def _wrong(reason: str) -> RewardRecord:
    return RewardRecord(0.0, reason=reason, correct=False)


def _after_anchor(text: str) -> str | None:
    anchors = FINAL_ANSWER.findall(text[-2000:])
    return MARKDOWN_BOLD.sub(r"\1", anchors[-1]) if anchors else None
