"""What a person wrote about a file, in tables/<file>.txt: mutants that no operator makes, and mutants no test can see.

A block each, with an empty line between. A mutant is its kind and what is wrong in words, then the old text, which
stands exactly once in the file, and the new:

    prefix: the sum leaves token t out
    - self.log_ratio(batch).cumsum(dim=1)
    + (self.log_ratio(batch).cumsum(dim=1) - self.log_ratio(batch))

An equivalent is a reason and the names of the mutants it holds for, as `--list` prints them:

    equivalent: an advantage of 0 has loss 0 either way
    = CISPO.token_loss advantage < 0 -> advantage <= 0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants.mutant import Mutant

TABLES = Path(__file__).with_name("tables")


@dataclass
class Block:
    kind: str
    words: str
    lines: dict[str, list[str]] = field(default_factory=lambda: {"-": [], "+": [], "=": []})


def table_of(file: str) -> str:
    """The text of a file's table, empty if it has none."""
    path = TABLES / Path(file).relative_to("algorithms").with_suffix(".txt")
    return path.read_text() if path.exists() else ""


def chosen(file: str, source: str, table: str) -> list[Mutant]:
    """The mutants of one file. Raises ValueError if an old text is not found, or more than once."""
    found = []
    for block in _blocks(file, table):
        if block.kind == "equivalent":
            continue
        old, new = "\n".join(block.lines["-"]), "\n".join(block.lines["+"])
        if (count := source.count(old)) != 1 or not old:
            raise ValueError(f"{file}: the text of mutant {block.words!r} is found {count} times, not once:\n{old}")
        line = source[: source.index(old)].count("\n") + 1
        found.append(Mutant(file, line, "", block.kind, block.words, source.replace(old, new)))
    return found


def equivalents(file: str, table: str) -> dict[str, str]:
    """Reason by name of the mutants of one file that no test can see."""
    blocks = [block for block in _blocks(file, table) if block.kind == "equivalent"]
    return {name: block.words for block in blocks for name in block.lines["="]}


def _blocks(file: str, table: str) -> list[Block]:
    blocks: list[Block] = []
    for line in table.splitlines():
        if line[:2].rstrip() in ("-", "+", "=") and blocks:
            blocks[-1].lines[line[0]].append(line[2:])
        elif line.strip():
            kind, colon, words = line.partition(": ")
            if not colon:
                raise ValueError(f"{file}: {line!r} begins no block of a table: write 'kind: words'")
            blocks.append(Block(kind, words))
    return blocks
