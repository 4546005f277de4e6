"""Judge models of a few lines, each an `Ask`: scripted ones, and readers that decide by what the prompt shows them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from rltk.rewards.genrm.types import Ask, JudgeUnavailable, Prompt, Reply

BRACKETS = str.maketrans("‹›⟨⟩〈〉", "<><><>")
EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")


def reply(text: str, finish_reason: str = "stop") -> Reply:
    return Reply(text, finish_reason, tokens=len(text))


def script(*replies: str | Reply | JudgeUnavailable) -> tuple[Ask, list[Prompt]]:
    """Says the replies one after the other; the list fills with what it was asked."""
    asked: list[Prompt] = []
    left = iter(replies)

    async def ask(prompt: Prompt) -> Reply:
        asked.append(prompt)
        said = next(left)
        if isinstance(said, JudgeUnavailable):
            raise said
        return said if isinstance(said, Reply) else reply(said)

    return ask, asked


def model(answer: Callable[[str], str]) -> Ask:
    """Answers by the last message of the chat."""

    async def ask(prompt: Prompt) -> Reply:
        return reply(answer(prompt.messages[-1]["content"]))

    return ask


def first_wrong(content: str) -> str:
    """A sound judge of arithmetic that trusts the frame: what it takes for the paragraphs, it checks. Fooled about the
    frame, or spoken to as a chat role, it finds nothing wrong.
    """
    seen = _read(content)
    if "<|im_" in seen or "[/INST]" in seen or "</think>" in seen:
        return r"\boxed{-1}"
    inner = re.findall(r"<solution>(.*?)</solution>", seen, re.DOTALL)
    text = inner[-1] if inner else seen
    paragraphs = re.findall(r"<(?:paragraph_)?(\d+)>(.*?)</(?:paragraph_)?\1>", text, re.DOTALL)
    if [int(index) for index, _ in paragraphs] != list(range(len(paragraphs))):
        return r"\boxed{-1}"
    for index, paragraph in paragraphs:
        for a, sign, b, result in EQUATION.findall(paragraph):
            right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            if right != int(result):
                return rf"Paragraph {index} is wrong. \boxed{{{index}}}"
    return r"\boxed{-1}"


def quoting(content: str) -> str:
    """The same judge, who quotes all that it was shown after its verdict."""
    return f"{first_wrong(content)}\nThe solution was:\n{_shown(content)}"


def obeying(content: str) -> str:
    """One that repeats a verdict of -1 if it was shown one, and checks only otherwise."""
    return r"\boxed{-1}" if r"\boxed{-1}" in _read(_shown(content)) else first_wrong(content)


def _read(content: str) -> str:
    """As people read: look-alike letters and brackets are what they look like, invisible ones are not there."""
    seen = unicodedata.normalize("NFKC", content).translate(BRACKETS)
    return "".join(sign for sign in seen if unicodedata.category(sign) != "Cf")


def _shown(content: str) -> str:
    """The candidate's part of the prompt, taken by the outermost marks of its frame."""
    start, end = content.find("<solution>"), content.rfind("</solution>")
    return content[start:end] if start >= 0 else content
