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
from rltk.rewards.time_limit import TimeLimitError, time_limit
from rltk.trajectory import RewardRecord

# Together below the usual deadline of a sample, 10 s, as a number crunched inside C code is deaf to them and is ended
# only with its process. math-verify's own limits are off (so is its warning that they are): they interrupt only once.
math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = True
PARSE_S = 3
VERIFY_S = 3
LONGEST_ANSWER = 500  # characters
LARGEST_EXPONENT = 9_999
LARGEST_FACTORIAL = 999
DEEPEST_BRACKETS = 30

BOXED = [LatexExtractionConfig(boxed_match_priority=0)]
ANCHORED = [
    LatexExtractionConfig(try_extract_without_anchor=False),
    ExprExtractionConfig(try_extract_without_anchor=False),
]
BOX = re.compile(r"\\f?boxed\s*(?=\{)")
FINAL_ANSWER = re.compile(r"answer\s*(?:is|:|=)\s*(.*)", re.IGNORECASE)
MARKDOWN_BOLD = re.compile(r"\*\*(.+?)\*\*")
FACTORIAL = re.compile(r"(\d+)[\s)}\]]*!")
NESTED_FACTORIAL = re.compile(r"!\s*[)}\]][\s)}\]]*!")
BINOMIAL = re.compile(r"\\[dt]?binom\s*\{?\s*(\d+)")


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
        raise InfrastructureError("score_math needs the process's main thread (SIGALRM); score through RewardPool")
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


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces are balanced."""
    for match in reversed(list(BOX.finditer(text))):
        content = _group(text, match.end())
        if content is not None:
            return content
    return None


def screen(expression: str) -> str | None:
    """Why the expression must not be given to sympy, or None. What slips through meets the deadlines."""
    if len(expression) > LONGEST_ANSWER:
        return f"has {len(expression)} characters; at most {LONGEST_ANSWER} are parsed"
    text = expression.replace("**", "^")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST_BRACKETS:
        return f"nests brackets {deepest} deep; at most {DEEPEST_BRACKETS} are parsed"
    of_brackets = 1  # (((9^9)^9)^9): exponents of brackets multiply
    for match in re.finditer(r"\^\s*", text):
        exponent = _operand(text, match.end())
        if ("^" in exponent or "!" in exponent) and not _symbolic(exponent):
            return "has a tower of exponents"
        size = _product(exponent)
        if text[: match.start()].rstrip()[-1:] in (")", "}", "]"):
            of_brackets *= size
        if max(size, of_brackets) > LARGEST_EXPONENT:
            return f"has an exponent above {LARGEST_EXPONENT}"
    if NESTED_FACTORIAL.search(text) or any(int(n) > LARGEST_FACTORIAL for n in FACTORIAL.findall(text)):
        return f"has a factorial above {LARGEST_FACTORIAL}, or of a factorial"
    if any(int(n) > LARGEST_EXPONENT for n in BINOMIAL.findall(text)):
        return f"has a binomial of more than {LARGEST_EXPONENT}"
    return None


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


def _group(text: str, start: int) -> str | None:
    """The content of the bracket that opens at `start`; None if it is never closed."""
    closing = {"{": "}", "(": ")"}[text[start]]
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == text[start]) - (text[position] == closing)
        if depth == 0:
            return text[start + 1 : position]
    return None


def _operand(text: str, start: int) -> str:
    """What an exponent sign at `start - 1` applies to itself: a bracket, a number with what sticks to it, a symbol."""
    if text[start : start + 1] in ("{", "("):
        return _group(text, start) or text[start:]
    match = re.compile(r"[-+]?\w+\s*[\^!]?|\S?").match(text, start)
    return match[0] if match else ""


def _symbolic(exponent: str) -> bool:
    """It holds a variable (or e, pi): sympy will not multiply it out."""
    return re.search(r"\\pi|[a-zA-Z]", re.sub(r"\\(?!pi)[a-zA-Z]+", "", exponent)) is not None


def _product(exponent: str) -> int:
    product = 1
    for number in re.findall(r"\d+", exponent):
        product *= max(1, int(number))
    return product
