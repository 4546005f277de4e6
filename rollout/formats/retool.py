"""Python between tags, as in ReTool (arXiv 2504.11536).

| <code>
| print(6 * 7)
| </code>            <- sampling halts here
| <interpreter>      <- appended, to the end
| 42
| </interpreter>
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rltk.rollout.tools.types import ToolCall

OPENING, STOP = "<code>", "</code>"
FENCED = re.compile(r"\s*```(?:python|py)?[ \t]*\r?\n(.*?)(?:^[ \t]*```\s*)?\Z", re.DOTALL | re.MULTILINE)


class Retool:
    stops = (STOP,)

    def calls(self, text: str, ended: bool) -> tuple[ToolCall, ...]:
        """The code before the closing tag; a fence around it (as in ReTool's data) is not part of it."""
        if ended:
            return ()
        close = text.rfind(STOP)
        start = text.rfind(OPENING, 0, close)
        if start < 0:
            return (ToolCall("python", {}, (close, close + len(STOP)), "there is no <code> before </code>"),)
        code = text[start + len(OPENING) : close]
        fenced = FENCED.fullmatch(code)
        code = fenced.group(1) if fenced else code.removeprefix("\n")
        return (ToolCall("python", {"code": code}, (start, close + len(STOP))),)

    def appended(self, text: str, end: str, results: Sequence[str]) -> str:
        lead = "" if text.endswith("\n") else "\n"
        return f"{lead}<interpreter>\n{results[0]}\n</interpreter>\n"
