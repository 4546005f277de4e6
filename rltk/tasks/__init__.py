"""Tasks: problems to train on, held-out problems, and the rule that scores an answer. No torch, no Ray, no vLLM."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Protocol

from rltk.config import Task as TaskConfig
from rltk.errors import ConfigError
from rltk.trajectory import Record, RewardRecord


class Task(Protocol):
    """What the driver asks of a task. Instances are pickled into reward processes: hold plain data only."""

    name: str
    size: int | None  # number of training problems; None: generated, endless

    def problem(self, index: int) -> Record:
        """The training problem at `index` (from 0, below `size`): a pure function of the task's options and index."""
        ...

    def held_out(self, count: int) -> list[Record]:
        """The first `count` held-out problems (fewer, if there are no more): fixed, never met in training."""
        ...

    def score(self, record: Record, text: str) -> RewardRecord:
        """The reward of `text`, a whole response. A pure rule; it runs on a reward process's main thread."""
        ...


def build_task(config: TaskConfig) -> Task:
    """Import `config.target` ("module:Class") and call it with the token limits and the options.

    Raises ConfigError: the module or class is missing, or an option is unknown (the nearest one is named), or absent.
    """
    task_class = _import_class(config.target)
    arguments = {
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_response_tokens": config.max_response_tokens,
        **config.options,
    }
    parameters = inspect.signature(task_class).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in arguments:
        if option not in parameters and not takes_any:
            raise ConfigError(f"task.{option}: {config.target} has no such option{_nearest(option, list(parameters))}")
    for option, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and option not in arguments:
            raise ConfigError(f"task.{option} is not set and {config.target} needs it: add task.{option}=...")
    return task_class(**arguments)


def _import_class(target: str):
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"task.target={target!r} is not of the form module:Class, e.g. my_module:MyTask")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"task.target={target!r}: no module {module_name!r} on the Python path") from error
        raise ConfigError(f"task.target={target!r}: {module_name!r} needs the missing module {error.name!r}") from error
    if not hasattr(module, attribute):
        found = _nearest(attribute, [n for n, v in vars(module).items() if inspect.isclass(v)])
        raise ConfigError(f"task.target={target!r}: {module_name!r} has no {attribute!r}{found}")
    return getattr(module, attribute)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]!r}" if close else f"; known: {', '.join(sorted(known)) or 'none'}"
