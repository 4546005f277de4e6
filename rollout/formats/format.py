"""A format: how a model writes a call, and how the result is written back to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rltk.errors import ConfigError
from rltk.rollout.tools.options import FORMATS, ToolOptions
from rltk.rollout.tools.types import Signature, ToolCall


class Format(Protocol):
    """`stops`: strings at which sampling halts for a call; (): calls are read once the model has ended its turn.

    `text` below is what the model wrote since the last result or control text, special tokens included, without the
    token that ended the turn. Where sampling halted at a string, the last token may reach past that string.
    """

    stops: tuple[str, ...]

    def calls(self, text: str, ended: bool) -> tuple[ToolCall, ...]:
        """The calls to answer now, in order. ended: the model ended its turn; else sampling halted at a stop."""
        ...

    def appended(self, text: str, end: str, results: Sequence[str]) -> str:
        """What follows the turn: the results with all that stands around them, up to where the model goes on.

        end: the token that ended the turn, "" for none. Special tokens in `results` are the caller's to escape.
        """
        ...


class NoCalls:
    """Of a run without tools, where an intervention may still step in."""

    stops = ()

    def calls(self, text: str, ended: bool) -> tuple[ToolCall, ...]:
        return ()

    def appended(self, text: str, end: str, results: Sequence[str]) -> str:
        raise AssertionError("a run without tools has no results")


def told(options: ToolOptions, signatures: Sequence[Signature], environment: bool) -> list[dict[str, Any]] | None:
    """What the chat template tells the model of its tools; None: nothing. An environment's turns are actions, not
    calls, and the formats that write Python are the model's own habit or the prompt's business."""
    if not options.enabled or environment or options.format != "json":
        return None
    return [signature.function() for signature in signatures]


def build_format(
    options: ToolOptions,
    tokenizer: Any,
    signatures: Sequence[Signature],
    stop_ids: Sequence[int],
    environment: bool = False,
) -> Format:
    """The run's format, checked against its tokenizer and tools. Raises ConfigError for what cannot work together."""
    from rltk.rollout.formats.environment import EnvironmentFormat
    from rltk.rollout.formats.json import JsonFormat
    from rltk.rollout.formats.python_block import PythonBlock
    from rltk.rollout.formats.retool import Retool

    if not options.enabled:
        return NoCalls()
    if environment:
        return EnvironmentFormat(tokenizer, stop_ids, signatures[0].name)
    if options.format == "json":
        return JsonFormat(tokenizer, stop_ids, signatures)
    formats = {"python_block": PythonBlock, "retool": Retool}
    if options.format not in formats:
        raise ConfigError(f"tools.format={options.format!r} is not one of {', '.join(FORMATS)}")
    names = [signature.name for signature in signatures]
    if names != ["python"]:
        raise ConfigError(
            f"tools.format={options.format} writes Python and nothing else, but tools.use names {', '.join(names)}. "
            "Fix: tools.use=[python], or tools.format=json."
        )
    return formats[options.format]()
