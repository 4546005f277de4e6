r"""A solution as paragraphs: whatever blank lines separate, but never inside code or LaTeX.

Kept whole: fenced code (``` or ~~~), $$...$$, \[...\], \(...\) and \begin{x}...\end{x}. What is opened but never
closed keeps nothing together: a stray fence cannot hide the rest in one paragraph. Of text without code
and LaTeX the paragraphs, and so their indices, are those of `rltk.tasks.paragraphs`, by which the tasks label.
"""

from __future__ import annotations

import re
from collections import deque

_BLANK = re.compile(r"\n\s*\n")
_OPENER = re.compile(
    r"(?P<literal>\\[\\$])"  # \\ and \$ open nothing: in \\[2pt] the bracket belongs to the line break
    r"|^[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})"
    r"|(?P<dollars>\$\$)"
    r"|(?P<bracket>\\[\[(])"
    r"|\\begin\{(?P<environment>[A-Za-z]+\*?)\}",
    re.MULTILINE,
)
_CLOSING = {"$$": re.compile(r"(?<!\\)\$\$"), "\\[": re.compile(r"\\\]"), "\\(": re.compile(r"\\\)")}


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`, stripped, empty ones left out. Takes time linear in the text."""
    pieces, start = [], 0
    whole = deque(_kept_whole(text))
    for blank in _BLANK.finditer(text):
        while whole and whole[0][1] <= blank.start():
            whole.popleft()
        if whole and whole[0][0] < blank.start():
            continue
        pieces.append(text[start : blank.start()])
        start = blank.end()
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def _kept_whole(text: str) -> list[tuple[int, int]]:
    """(start, end) of code and LaTeX, in order; of nested ones the outermost."""
    spans: list[tuple[int, int]] = []
    never_closed: set[str] = set()  # searched once to the end of the text, and not again for each further opener
    environments: dict[str, dict[int, int]] = {}
    position = 0
    while opener := _OPENER.search(text, position):
        position = opener.end()
        kind = opener["fence"] or opener["dollars"] or opener["bracket"] or opener["environment"]
        if opener["literal"] or kind in never_closed:
            continue
        if opener["environment"]:
            if kind not in environments:
                environments[kind] = _environments(text, kind)
            end = environments[kind].get(position)
        else:
            closing = _fence_closing(kind) if opener["fence"] else _CLOSING[kind]
            found = closing.search(text, position)
            end = found.end() if found else None
            if end is None:
                never_closed.add(kind)
        if end is not None:
            spans.append((opener.start(), end))
            position = end
    return spans


def _fence_closing(fence: str) -> re.Pattern[str]:
    """A line of nothing but the fence's sign, at least as often."""
    return re.compile(rf"^[ \t]*{re.escape(fence[0])}{{{len(fence)},}}(?=[ \t]*$)", re.MULTILINE)


def _environments(text: str, name: str) -> dict[int, int]:
    """For each \\begin{name} that is closed: the end of its mark -> the end of the \\end{name} that closes it."""
    pairs: dict[int, int] = {}
    begun: list[int] = []
    for mark in re.finditer(rf"\\(begin|end)\{{{re.escape(name)}\}}", text):
        if mark[1] == "begin":
            begun.append(mark.end())
        elif begun:
            pairs[begun.pop()] = mark.end()
    return pairs
