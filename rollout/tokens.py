"""Token discipline: text becomes ids once, in one place, and sampled ids are never encoded again."""

from __future__ import annotations

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


def render_prompt(tokenizer: Any, messages: tuple[dict[str, str], ...]) -> list[int]:
    """The ids of a conversation up to where the assistant starts."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
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
