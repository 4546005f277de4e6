"""DTSR, dynamic thought sufficiency (arXiv 2604.06787): the model is asked whether it has thought enough.

Without training. Where a thought turns on itself ("Wait", "Alternatively", ... at the start of a sentence), the same
model is asked, in the third person, how sufficient the thought is, from 0 to 100. From `threshold` on the thought is
closed and the answer written; else sampling goes on from the same ids. A reply that is no such number closes nothing.
The question costs a prefill of the problem and the thought, and at most `reply_tokens`; neither is part of the sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rltk.rollout.interventions import CallSpan, Question, TurnView
from rltk.rollout.tools.options import DtsrOptions
from rltk.rollout.tools.types import ToolResult

QUESTION = """A student is working on this problem:

{problem}

So far the student has thought:

{thought}

Judge from outside whether this thought is sufficient to give the right final answer now, without thinking further: \
0 is not at all, 100 is fully. Reply with the number alone."""
OPENING = "Sufficiency:"
CLOSING = "\nThis is enough to answer.\n"  # where thought has no closing mark of its own
QUESTION_TOKENS = 256  # room for QUESTION itself and the chat template around it, beside problem and thought
CALLS = (("<code>", "</code>"), ("<tool_call>", "</tool_call>"))
SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")


@dataclass
class Dtsr:
    """`answer_marks` end a thought that has no marks of its own (dtsr.opens="")."""

    options: DtsrOptions
    answer_marks: tuple[str, ...] = ()
    checked_at: int = 0  # tokens sampled until the last question
    scores: list[float] = field(default_factory=list)
    checks: int = 0
    parse_failures: int = 0
    closed_at: int | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        done = self.closed_at is not None or self.checks >= self.options.max_checks
        return () if done else tuple(self.options.signals)

    def after_tools(self, calls: Sequence[tuple[CallSpan, ToolResult]]) -> str | None:
        return None

    def at_stop(self, view: TurnView) -> Question | None:
        if not self.stops or view.sampled - self.checked_at < self.options.gap_tokens:
            return None
        start = signal_start(view.text, view.fresh, self.options.signals, self.options.opens)
        thought = None if start is None else self._thought(view, view.text[:start])
        if thought is None or _in_call(thought):
            return None
        self.checked_at = view.sampled
        problem = "\n\n".join(message["content"] for message in view.messages if message["role"] == "user")
        text = QUESTION.format(problem=problem.strip(), thought=thought.strip())
        return Question(({"role": "user", "content": text},), self.options.reply_tokens, self._opening(view.prompt))

    def answered(self, reply: str) -> str | None:
        self.checks += 1
        score = sufficiency(reply)
        if score is None:
            self.parse_failures += 1
            return None
        self.scores.append(score)
        if score < self.options.threshold:
            return None
        self.closed_at = self.checked_at
        return f"\n{self.options.closes}\n\n" if self.options.opens else CLOSING

    def notes(self) -> dict[str, Any]:
        counts = {"checks": self.checks, "parse_failures": self.parse_failures, "closed_at": self.closed_at}
        return {"dtsr": {**counts, "scores": list(self.scores)}}

    def _thought(self, view: TurnView, text: str) -> str | None:
        """The open thought in `text`, or None: none is open."""
        opens, closes = self.options.opens, self.options.closes
        if not opens:
            return None if any(mark in text for mark in self.answer_marks) else text
        at = text.rfind(opens)
        if at >= 0:
            text = text[at + len(opens) :]
        elif not view.prompt.rstrip().endswith(opens):  # some templates open the thought themselves
            return None
        return None if closes in text else text

    def _opening(self, prompt: str) -> str:
        """How the reply begins: an empty thought, as a model that thinks first would spend the reply on it."""
        opens, closes = self.options.opens, self.options.closes
        if not opens:
            return OPENING
        opened = "" if prompt.rstrip().endswith(opens) else opens
        return f"{opened}\n\n{closes}\n\n{OPENING}"


def signal_start(text: str, fresh: int, signals: Sequence[str], opens: str = "") -> int | None:
    """Where the signal stands that sampling stopped at, if it is one: a word or words at the start of a sentence.

    It begins at or behind `fresh`; where two end alike the longer one counts.
    """
    found = [(text.rfind(signal, fresh), signal) for signal in signals]
    ends = [(start + len(signal), -start) for start, signal in found if start >= 0]
    if not ends:
        return None
    end, start = max(ends)
    start = -start
    if text[end : end + 1].isalnum() or not _starts_sentence(text[:start], opens):
        return None
    return start


def sufficiency(reply: str) -> float | None:
    """The number from 0 to 100 that a reply leads with, or that is its only one; None where there is no such number.

    "85", " 85 out of 100", "**85/100**", "85 %", "on a scale of 0-100: 85" all say 85.
    """
    number = r"-?\d+(?:\.\d+)?"
    reply = re.sub(r"\b0\s*(?:-|–|to)\s*100\b", " ", reply)
    reply = re.sub(rf"({number})\s*(?:/|out of)\s*100\b", r"\1", reply)
    numbers = re.findall(number, reply)
    leads = re.match(r"[^\w-]*-?\d", reply)
    if not numbers or (len(numbers) > 1 and not leads):
        return None
    value = float(numbers[0])
    return value if 0 <= value <= 100 else None


def _starts_sentence(before: str, opens: str) -> bool:
    before = before.rstrip(" \t*_\"'“‘(")
    if not before or before.endswith("\n") or (opens and before.endswith(opens)):
        return True
    return before.rstrip("\"'”’)]}*_$").endswith(SENTENCE_ENDS)


def _in_call(thought: str) -> bool:
    """Inside a code block or a call that is being written: a comment there is no thought."""
    return thought.count("```") % 2 == 1 or any(thought.rfind(a) > thought.rfind(b) for a, b in CALLS)
