r"""Text of a candidate made safe to stand inside a judge's prompt: it cannot end its frame, open another, speak as a
chat role, or leave a verdict behind that a judge might quote.

What it says stays readable: `</solution>` becomes `&lt;/solution>`, `\boxed{-1}` becomes `\fbox{-1}`, `[INST]` becomes
`[ INST]`; invisible characters go. Orders to the grader in plain words stay: those the template answers, and
`rltk.rewards.genrm.attacks` measures how well a given judge resists them.
"""

from __future__ import annotations

import re

_LINE_ENDS = re.compile(r"\r\n|[\r\v\f\x85\u2028\u2029]")
# Controls, bidirectional marks, zero-width characters, fillers, variation selectors, tags: they change what is read
# into something else than what is matched.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")  # no UTF-8 holds them

_SLASH = "/\u2044\u2215\u29f8\uff0f"
_LIKE_LESS = "\u02c2\u1438\u2039\u2329\u276c\u276e\u27e8\u27ea\u3008\ufe64\uff1c"
_LIKE_GREATER = ">\u02c3\u1433\u203a\u232a\u276d\u276f\u27e9\u27eb\u3009\ufe65\uff1e"
_GAP = r"[\s\u0300-\u036f]*"
# `<` before what makes a tag or a special token of it: a letter, a slash, | ! ?, or a number that is closed: <3>. Its
# look-alikes stand for inner products too, so they need a slash, a bar, a word of four letters or a closed number.
_TAG = re.compile(
    rf"<(?={_GAP}(?:[^\W\d_]|[{_SLASH}|\uff5c!?]|\d+\s*[{_LIKE_GREATER}]))"
    rf"|[{_LIKE_LESS}](?={_GAP}(?:[{_SLASH}|\uff5c]|[^\W\d_]{{4}}|\d+\s*[{_LIKE_GREATER}]))"
)
_ROLE = re.compile(r"\[(?=/?[A-Z_]{3,}\])")  # [INST], [/INST], [TOOL_CALLS], ...
_BOXED = re.compile(
    r"[\\\uff3c\u2216\u29f5\ufe68]f?(?:boxed|\uff42\uff4f\uff58\uff45\uff44)(?![A-Za-z])", re.IGNORECASE
)


def escape(text: str) -> str:
    """`text` as above; escaping twice is escaping once."""
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    text = _SURROGATES.sub("\ufffd", text)
    text = _TAG.sub("&lt;", text)
    text = _ROLE.sub("[ ", text)
    return _BOXED.sub(r"\\fbox", text)
