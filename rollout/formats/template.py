"""What a chat template puts between an assistant's turn and its next one: the difference of two renderings.

    rendered(user, assistant)            <user> ... <assistant> ... <end>\\n
    rendered(user, assistant, answers)   <user> ... <assistant> ... <end>\\n<answers> ... <assistant>
    appended after the sampled <end>                                     \\n<answers> ... <assistant>

The conversation is a dummy and always the same: what the model sampled is never rendered. That is right only where the
longer rendering begins with the shorter one, which is checked when a run starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rltk.errors import ConfigError, MismatchError
from rltk.rollout.tokens import render

USER = {"role": "user", "content": "one"}
Message = dict[str, Any]


class TemplateTurns:
    """`reply`: the dummy assistant message; `answers(results)`: the messages that answer it.

    Raises ConfigError if the template cannot render them, looks ahead, or ends no turn with one of `stop_ids`.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        reply: Message,
        answers: Callable[[Sequence[str]], list[Message]],
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        self.tokenizer, self.tools, self.answers = tokenizer, tools, answers
        # Templates that show earlier thoughts show this one in both renderings; the others ignore the key.
        self.beginning = [USER, {"reasoning_content": "two", **reply}]
        self._shorter = self.render(self.beginning)
        self._check(tokenizer)
        ends = [tokenizer.decode([i]) for i in stop_ids]
        found = [(self._shorter.rfind(end) + len(end), end) for end in ends if end in self._shorter[-64:]]
        if not found:
            raise ConfigError(
                f"the chat template ends an assistant's turn with {self._shorter[-24:]!r}, which holds none of the "
                f"tokens that end a response ({', '.join(ends)}). Fix: list the turn's end token in the model's "
                "generation_config.json (eos_token_id)."
            )
        at, self._end = max(found)
        self._rest = self._shorter[at:]

    def after(self, end: str, results: Sequence[str]) -> str:
        """What follows a sampled turn, up to where the model goes on. `end`: the token that ended it; "" for none, and
        the template's own is added.

        Raises MismatchError for results that this template treats otherwise than those it was checked with.
        """
        try:
            longer = self.render([*self.beginning, *self.answers(results)], more=True)
        except ConfigError as error:
            raise MismatchError(f"for the results {list(results)!r:.200}: {error}") from error
        if not longer.startswith(self._shorter):
            raise MismatchError(f"{LOOKS_AHEAD}, with the results {list(results)!r:.200}")
        return ("" if end else self._end) + self._rest + longer[len(self._shorter) :]

    def render(self, messages: Sequence[Message], more: bool = False) -> str:
        return render(self.tokenizer, messages, self.tools, more, otherwise=", or another tools.format")

    def _check(self, tokenizer: Any) -> None:
        reply, one, two = self.beginning[-1], self.answers(["three"]), self.answers(["three", "four"])
        rounds = [self.beginning, [*self.beginning, *one], [*self.beginning, *one, reply, *one]]
        for shorter, longer in [*zip(rounds, rounds[1:], strict=False), (self.beginning, [*self.beginning, *two])]:
            before, after = self.render(shorter), self.render(longer)
            ids = tokenizer.encode(before, add_special_tokens=False)
            if not after.startswith(before) or tokenizer.encode(after, add_special_tokens=False)[: len(ids)] != ids:
                raise ConfigError(f"{LOOKS_AHEAD}. {FIX}")


LOOKS_AHEAD = (
    "the chat template looks ahead: it renders a turn otherwise once another follows, so that what is appended to a "
    "sampled turn cannot be told"
)
FIX = "Fix: a template that only ever appends (model.chat_template=<file>), or another tools.format."
