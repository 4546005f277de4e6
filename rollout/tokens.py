"""Token discipline: text becomes ids once, in one place, and sampled ids are never encoded again."""

from __future__ import annotations

import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rltk.errors import ConfigError
from rltk.rollout.new_text import NewText

SAID = "xyzzy"  # an assistant's dummy turn: no template writes it by itself


def load_tokenizer(path: str, chat_template: str | None = None, key: str = "model") -> Any:
    """The model folder's tokenizer, with its chat template (or the one in the file `chat_template`). `key`: where the
    config has it, which an error names."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no usable tokenizer in model folder {path!r}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text()
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {path!r} has no chat template. Fix: {key}.chat_template=<file with a Jinja template>."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {path!r} names no end-of-sequence token (eos_token); set one in its config."
        )
    return tokenizer


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    more: bool = False,
    otherwise: str = "",
    key: str = "model",
) -> str:
    """A conversation as the chat template writes it; `more`: up to where the assistant starts.

    Raises ConfigError if the template cannot; `otherwise`: what else the user may change; `key` as in
    `load_tokenizer`.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=more)
    except Exception as error:  # whatever a template raises: jinja's errors, or Python's on an odd value
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the chat template cannot render a conversation of {roles}: {type(error).__name__}: {error}. "
            f"Fix: a template that can ({key}.chat_template=<file>){otherwise}."
        ) from error


def render_prompt(
    tokenizer: Any, messages: tuple[dict[str, str], ...], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The ids of a conversation up to where the assistant starts; `tools` are what the template tells the model of."""
    system = any(message["role"] == "system" for message in messages)
    otherwise = ", or prompts without a system message (task.system=null)" if system else ""
    text = render(tokenizer, messages, tools, more=True, otherwise=otherwise)
    return tokenizer.encode(text, add_special_tokens=False)


def check_template(tokenizer: Any) -> None:
    """The prefix property, on a fixed dummy conversation: what was rendered never changes when a turn is appended.

    Later turns are appended as the difference of two renderings, which is only right where this holds. A run in which
    nothing is ever appended does not need it: templates of thinking models, which drop earlier thoughts, will do there.
    """
    turn = [{"role": "user", "content": "one"}]
    longer = [*turn, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    first, second = render_prompt(tokenizer, tuple(turn)), render_prompt(tokenizer, tuple(longer))
    if second[: len(first)] != first:
        raise ConfigError(
            "the chat template is not append-only: rendering a longer conversation changes the ids of its beginning, "
            "so trajectories would train on tokens that were never sampled. Fix: a template without look-ahead "
            "(model.chat_template=<file>), or a run of single turns (tools=none attc.mode=off dtsr.mode=off)."
        )


def stop_ids(tokenizer: Any, path: str) -> list[int]:
    """Ids that end a response: the tokenizer's eos, those of generation_config.json in the model folder `path` (chat
    models list several), and the one that the chat template ends a turn with."""
    file = Path(path) / "generation_config.json"
    return ends(tokenizer, json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None)


def ends(tokenizer: Any, named: int | list[int] | None) -> list[int]:
    """As `stop_ids`. `named`: eos_token_id of a generation config."""
    ids = {int(tokenizer.eos_token_id), *(named if isinstance(named, list) else [] if named is None else [named])}
    end = turn_end(tokenizer)
    return sorted(ids if end is None else ids | {tokenizer.convert_tokens_to_ids(end)})


def turn_end(tokenizer: Any) -> str | None:
    """The special token that the chat template ends an assistant's turn with; None if none follows what was said.

    Of two renderings only what they share counts: some templates write the end of the text behind the last turn (Phi),
    some end that one otherwise (gpt-oss), and some end none, so that a marker of the next follows (GLM).
    """
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": SAID}]
    try:
        last, inner = (render(tokenizer, messages) for messages in (turns, [*turns, turns[0]]))
    except ConfigError:  # it may still render prompts, which is all that a single turn needs
        return None
    if SAID not in last or SAID not in inner:
        return None
    rest = os.path.commonprefix([text.rpartition(SAID)[2] for text in (last, inner)])
    special, found = NewText(tokenizer).special, []
    while token := next((token for token in special if rest.startswith(token)), None):
        found, rest = [*found, token], rest.removeprefix(token)
    # A mark of its own may stand before the end (Cohere), or one of the next turn behind it (Llama 3).
    return tokenizer.eos_token if tokenizer.eos_token in found else next(iter(found), None)


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
