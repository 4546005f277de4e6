"""Python between fences, run when the model opens an output block itself: ToRA (arXiv 2309.17452), Qwen2.5-Math.

| ```python
| print(6 * 7)
| ```
| ```output          <- sampling halts here
| 42                 <- appended
| ```                <- appended
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rltk.rollout.tools.types import ToolCall

STOP = "```output"
OPENING = re.compile(r"```(?:python|py)[ \t]*\r?\n")
CLOSING = re.compile(r"^[ \t]*```", re.MULTILINE)


class PythonBlock:
    stops = (STOP,)

    def calls(self, text: str, ended: bool) -> tuple[ToolCall, ...]:
        """The turn's last Python block. Code that the model never asked the output of is not run."""
        if ended:
            return ()
        head = text.rpartition(STOP)[0]
        opening = next(reversed(list(OPENING.finditer(head))), None)
        if opening is None:
            problem = "there is no ```python block before ```output"
            return (ToolCall("python", {}, (len(head), len(text)), problem),)
        closing = CLOSING.search(head, opening.end())
        code = head[opening.end() : closing.start() if closing else None]
        end = closing.end() if closing else len(head)
        return (ToolCall("python", {"code": code}, (opening.start(), end)),)

    def appended(self, text: str, end: str, results: Sequence[str]) -> str:
        lead = "" if text.endswith("\n") else "\n"
        return f"{lead}{results[0]}\n```\n"
