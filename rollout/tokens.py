"""Token discipline: text becomes ids once, in one place, and sampled ids are never encoded again."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    """The model folder's tokenizer, with its chat template (or the one in the file `chat_template`)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no usable tokenizer in model folder {path!r}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text()
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {path!r} has no chat template. Fix: model.chat_template=<file with a Jinja template>."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path!r} names no end-of-sequence token (eos_token); set one in its config."
        )
    return tokenizer


def render_prompt(
    tokenizer: Any, messages: tuple[dict[str, str], ...], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The ids of a conversation up to where the assistant starts; `tools` are what the template tells the model of."""
    shown = {} if tools is None else {"tools": tools}
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **shown)
    return tokenizer.encode(text, add_special_tokens=False)


def check_template(tokenizer: Any) -> None:
    """The prefix property, on a fixed dummy conversation: what was rendered never changes when a turn is appended.

    Later turns are appended as the difference of two renderings, which is only right where this holds.
    """
    turn = [{"role": "user", "content": "one"}]
    longer = [*turn, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    first, second = render_prompt(tokenizer, tuple(turn)), render_prompt(tokenizer, tuple(longer))
    if second[: len(first)] != first:
        raise ConfigError(
            "the chat template is not append-only: rendering a longer conversation changes the ids of its beginning, "
            "so trajectories would train on tokens that were never sampled. Fix: a template without look-ahead "
            "(model.chat_template=<file>)."
        )


def stop_ids(tokenizer: Any, path: str) -> list[int]:
    """Ids that end a response: the tokenizer's eos and those of generation_config.json (chat models list several)."""
    import json

    ids = {int(tokenizer.eos_token_id)}
    file = Path(path) / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text()).get("eos_token_id") or []
        ids |= {int(i) for i in (named if isinstance(named, list) else [named])}
    return sorted(ids)


def decode(tokenizer: Any, ids: Sequence[int], special: bool = True) -> str:
    """Sampled ids as text, for reading: special tokens shown or left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def token_span(tokenizer: Any, ids: Sequence[int], text: str, start: int, end: int) -> tuple[int, int] | None:
    """The tokens [a, b) of `ids` that hold the characters [start, end) of their text; None where that cannot be told.

    text: `decode(tokenizer, ids)`. A token belongs to the span if one of its characters does.
    """

    def characters(count: int) -> int:
        """Of the text, that the first `count` ids give; a character cut in the middle does not count.

        While one is (for three tokens at most), some tokenizers do not give those before it either: never fewer than
        earlier ids gave."""
        prefixes = [decode(tokenizer, ids[:n]) for n in range(max(0, count - 3), count + 1)]
        return max(len(os.path.commonprefix([prefix.rstrip("\ufffd"), text])) for prefix in prefixes)

    if not 0 <= start < end <= len(text) or characters(len(ids)) < end:
        return None
    counts = range(len(ids) + 1)
    before = characters(bisect_right(counts, start, key=characters) - 1)  # whole characters of the tokens before
    first = bisect_left(counts, before, key=characters)  # those that give no whole one yet are of the next
    last = bisect_left(counts, end, key=characters)
    return first, last
