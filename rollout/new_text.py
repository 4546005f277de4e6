"""New text on its way into a trajectory: made harmless, cut to length, tokenized once."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from rltk.errors import MismatchError

ANCHOR = 16  # tokens of the trajectory's end that new text is tokenized behind
MOST = 1 << 17  # characters that are looked at; tools cap their output far below
NOTE = "\n[... {} characters cut ...]\n"
SPACE = "\u2581"  # how SentencePiece writes a space in its vocabulary; Gemma's added tokens hold runs of it


class NewText:
    """Text that the model did not write, for one tokenizer. Not safe for several threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> dict[str, int]:
        """Every added token that is not mere white space: these and no others can say something to a template, a
        format or an engine. Longest first."""
        added = self.tokenizer.get_added_vocab()
        named = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        every = {text: i for text, i in {**added, **named}.items() if len(text.replace(SPACE, " ").strip()) > 1}
        return dict(sorted(every.items(), key=lambda item: -len(item[0])))

    def specials(self, ids: Sequence[int]) -> list[int]:
        known = set(self.special.values())
        return [i for i in ids if i in known]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def escape(self, text: str) -> str:
        """The text with no special token in it: `<|im_end|>` becomes `< |im_end|>`."""
        for token in self.special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        if not self.specials(self.encode(text)):
            return text
        # A tokenizer that normalizes may still find one, as in another case or width: leave it nothing to begin with.
        first = {unicodedata.normalize("NFKC", token)[0] for token in self.special}
        return "".join(c for c in unicodedata.normalize("NFKC", text) if c not in first)

    def shorten(self, text: str, tokens: int) -> str:
        """At most `tokens` tokens of an escaped text: its head and its tail, and between them how much is gone."""
        if len(text) <= MOST and len(self.encode(text)) <= tokens:
            return text
        head, tail = self.encode(text[: MOST // 2]), self.encode(text[-MOST // 2 :])
        room = tokens - len(self.encode(NOTE.format(len(text))))
        for keep in range(room, 1, -1):  # what is decoded and encoded again may take a token more
            first = self.decode(head[: (keep + 1) // 2]).rstrip("\ufffd")
            last = self.decode(tail[-(keep // 2) :]).lstrip("\ufffd")
            short = self.escape(f"{first}{NOTE.format(len(text) - len(first) - len(last))}{last}")
            if len(self.encode(short)) <= tokens:
                return short
        for keep in range(tokens, 0, -1):  # no room for the note
            first = self.decode(head[:keep]).rstrip("\ufffd")
            if len(self.encode(first)) <= tokens:
                return first
        return ""

    def append(self, before: Sequence[int], write: Callable[[Sequence[str]], str], results: Sequence[str]) -> list[int]:
        """The ids of `write(results)`, to follow the ids `before`. Results bring no special token along.

        Raises MismatchError if they would.
        """
        ids = self.after(before, write(results))
        expected = self.specials(self.after(before, write(["0"] * len(results))))
        if self.specials(ids) != expected:
            raise MismatchError("a tool's output would become special tokens of this tokenizer")
        return ids

    def after(self, before: Sequence[int], text: str) -> list[int]:
        """Tokenized behind the end of what is there, so that a tokenizer which marks the beginning of a text (as
        SentencePiece does) marks none here; on its own where the two would melt into one token."""
        anchor = self.decode(before[-ANCHOR:]).lstrip("\ufffd")
        if anchor and not anchor.endswith("\ufffd"):
            alone, joined = self.encode(anchor), self.encode(anchor + text)
            if joined[: len(alone)] == alone:
                return joined[len(alone) :]
        return self.encode(text)
