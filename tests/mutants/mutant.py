"""One mutant: a module with one mistake in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    file: str  # path in the repository, such as algorithms/ctpo.py
    line: int  # of the file as it is
    where: str  # the function or class, such as CTPO.token_loss; "" for the module itself
    kind: str  # sign, prefix, detach, denominator, mask, ...
    change: str  # "before -> after", or what is broken, in words
    source: str  # the whole mutated file

    @property
    def module(self) -> str:
        """ctpo, corrections/tis."""
        return self.file.removeprefix("algorithms/").removesuffix(".py")

    @property
    def name(self) -> str:
        """What tells it from every other, and stays when lines move."""
        return f"{self.module}:{self.where} {self.change}" if self.where else f"{self.module}:{self.change}"


def line_of(source: str, line: int) -> int:
    """The offset in bytes at which a line (from 1) begins."""
    return sum(len(text.encode()) for text in source.splitlines(keepends=True)[: line - 1])
