r"""Answers that would hang, exhaust or take over a scorer that trusts them: `pathological_answers.jsonl`, one a line.

`answer`, or `parts`, [text, times] each, in its place; `family`; `runs`: under which of eval, exec and sympy's
`parse_expr` the answer makes the file that stands for @FILE in it; `slow`: no screen knows it, and math-verify works
on it until its time is over. The family `texts` are whole responses, broken
around the answer; the others go into a box or tags. No entry is a right answer to any question asked of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECRET = "RLTK_CANARY_SECRET"  # the environment variable that some of them read


@dataclass(frozen=True)
class Answer:
    family: str
    text: str
    runs: str = ""
    slow: bool = False

    def to(self, file: Path) -> str:
        """The answer, whose code makes `file` where it is run."""
        return self.text.replace("@FILE", str(file))


def answers() -> Iterator[Answer]:
    with open(Path(__file__).with_name("pathological_answers.jsonl")) as lines:
        for line in lines:
            row = json.loads(line)
            text = row["answer"] if "answer" in row else "".join(part * times for part, times in row["parts"])
            yield Answer(row["family"], text, row.get("runs", ""), row.get("slow", False))
