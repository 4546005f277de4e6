"""What only the model's tokenizer can tell before a run: whether its template can do what is asked, and prompts fit."""

from __future__ import annotations

from collections.abc import Iterable

from rltk.config import Config
from rltk.errors import ConfigError
from rltk.trajectory import Record


def check_prompts(config: Config, records: Iterable[Record]) -> None:
    """Raises ConfigError where the chat template cannot show the tools or take their results, and where prompts, with
    what it says of tools, are longer than task.max_prompt_tokens: known before Ray starts, not in the middle of it."""
    from rltk.rollout.formats import build_format, told
    from rltk.rollout.tokens import check_template, load_tokenizer, render_prompt, stop_ids
    from rltk.rollout.tools import registry
    from rltk.rollout.tools.options import appends

    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    if appends(config.tools, config.attc, config.dtsr):
        check_template(tokenizer)
    signatures, environment = registry.signatures(config.tools), registry.environment(config.tools)
    build_format(config.tools, tokenizer, signatures, stop_ids(tokenizer, config.model.path), environment)
    tools, limit = told(config.tools, signatures, environment), config.task.max_prompt_tokens
    lengths = {record.id: len(render_prompt(tokenizer, record.messages, tools)) for record in records}
    long = {name: length for name, length in lengths.items() if length > limit}
    if long:
        worst = max(long, key=lambda name: long[name])
        said = ", with what they say of tools" if tools else ""
        raise ConfigError(
            f"{len(long)} of {len(lengths)} prompts have more than task.max_prompt_tokens={limit} tokens{said}; the "
            f"longest is {worst} with {long[worst]}. Fix: task.max_prompt_tokens={long[worst]}, or take them out of "
            "the data."
        )
