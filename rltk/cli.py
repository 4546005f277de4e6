"""What every entry point does alike: `run_entry(main)`, and the usage text of `rltk.train`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import reduce
from typing import NoReturn

from rltk.compose import groups
from rltk.config import Config
from rltk.errors import ConfigError

# The keys that people change most.
MAIN_KEYS = {
    "steps": "training steps",
    "seed": "same seed, same run (fp32, one engine)",
    "name": "of the run folder; empty: <task>-<algorithm>-s<seed>",
    "resume": "never | auto: go on from the last checkpoint",
    "batch.prompts": "prompts a training step",
    "batch.samples": "samples a prompt: the group size",
    "algorithm.minibatches": "optimizer steps a training step",
    "learner.lr": "learning rate",
    "learner.ranks": "DeepSpeed processes",
    "task.max_response_tokens": "longest response",
    "tracker.mode": "offline | online (with WANDB_API_KEY in the environment)",
    "dry_run": "true: print the plan and stop",
}
EXAMPLES = (
    "python -m rltk.train algorithm=ctpo",
    "python -m rltk.train model=path/to/folder task=jsonl task.path=problems.jsonl",
    "python -m rltk.train reward=my_module:score learner.lr=5e-5 dry_run=true",
    "python -m rltk.train experiment=smoke",
)


def run_entry(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main(argv)` and exits: 2 and a message for a ConfigError, 130 for Ctrl-C, else 1 and a traceback."""
    try:
        code = main(sys.argv[1:]) or 0
    except ConfigError as error:
        print(f"rltk: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("rltk: interrupted", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    sys.exit(code)


def wants_help(argv: list[str]) -> bool:
    return any(argument in ("-h", "--help", "help") for argument in argv)


def usage() -> str:
    """The text of `python -m rltk.train --help`."""
    choices = [f"  {group.replace('/', '.'):<14}{' | '.join(names)}" for group, names in groups().items()]
    keys = [f"  {f'{key}={_default(key)}':<34}{meaning}" for key, meaning in MAIN_KEYS.items()]
    return "\n".join(
        [
            "Trains a language model by reinforcement learning.",
            "",
            "  python -m rltk.train [<group>=<choice>] [<key>=<value>] ...",
            "",
            "Groups and their choices",
            *choices,
            "",
            "  Your own: algorithm, task or reward =my_module:name; model=<Hugging Face folder or owner/name>",
            "",
            "Keys people change most, with their defaults (all of them: docs/configuration.md)",
            *keys,
            "",
            "Examples",
            *(f"  {example}" for example in EXAMPLES),
        ]
    )


def _default(key: str) -> str:
    value = reduce(getattr, key.split("."), Config())
    return str(value).lower() if isinstance(value, bool) else str(value)
