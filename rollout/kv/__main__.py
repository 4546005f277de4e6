"""`python -m rltk.rollout.kv NAME [key=value ...]`: the arguments that give `vllm serve` a compressed cache.

    python -m rltk.rollout.kv longflow budget=1800 context=16384
    vllm serve MODEL $(...)            # the line it prints; LLM(...) takes engine_args(...) of the same options

Keys: budget, context, heads, sinks, record, and the policy's own options.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields

from rltk.errors import ConfigError
from rltk.rollout.kv.arguments import serve_line
from rltk.rollout.kv.options import KVOptions, policies


def main(words: list[str]) -> str:
    """The line. Raises ConfigError for what it does not understand."""
    pairs = [word.partition("=") for word in words[1:]]
    if not words or words[0] not in policies() or any(not sep for _, sep, _ in pairs):
        raise ConfigError(f"{__doc__}\nNAME is one of {', '.join(policies())}.")
    values = {key: _value(text) for key, _, text in pairs}
    context = values.pop("context", None)
    if not isinstance(context, int):
        raise ConfigError("name the longest sequence, prompt and response: context=16384")
    own = {f.name for f in fields(KVOptions)} - {"name", "options"}
    options = {key: value for key, value in values.items() if key not in own}
    return serve_line(KVOptions(words[0], **{k: values[k] for k in own & set(values)}, options=options), context)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
