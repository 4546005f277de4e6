"""What scores a trajectory: an import path, how it is loaded in a reward process, and how its mistakes are named."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import numbers
import os
import pkgutil
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rltk.errors import ConfigError
from rltk.trajectory import Record, RewardRecord, Trajectory

Scorer = Callable[[Trajectory, Record], RewardRecord] | Callable[[Trajectory, Record], Awaitable[RewardRecord]]


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer by its import path: what travels to the reward processes.

    kind "task": `target` is a task class, built once a process with `options`; it scores by
    `task.score(record, text)`, of what the model itself wrote: an answer that a tool printed is nobody's. A task with
    `score_trajectory(record, trajectory)` is given the whole trajectory instead, its tool calls and their results
    included. A task may have `warm_up()`, called once before its first sample.
    kind "function": `target` is the user's plain or async function `score(trajectory, record, **options)`, or a class
    that is built with `options` and then called so. It returns a number, None (mask the sample) or a RewardRecord.
    """

    target: str  # module:attribute
    options: dict[str, Any] = field(default_factory=dict)
    kind: Literal["task", "function"] = "task"
    on_timeout: Literal["mask", "wrong"] = "mask"  # "wrong": a sample whose scoring passes its deadline gets 0.0
    concurrency: int = 32  # samples that one process awaits at once; async functions only


def masked(cause: str, reason: str, seconds: float = 0.0) -> RewardRecord:
    """A record without a value. `cause` is one word of a small set (metrics count by it), `reason` is for people."""
    return RewardRecord(None, reason=reason, seconds=seconds, detail={"cause": cause})


def timed_out(spec: ScorerSpec, seconds: float, where: str = "") -> RewardRecord:
    """The record of a sample whose scoring passed its deadline: masked, or 0.0 where the spec says so."""
    record = masked("timeout", f"timeout after {seconds:g} s" + (f" in {where}" if where else ""), seconds)
    return replace(record, value=0.0, correct=False) if spec.on_timeout == "wrong" else record


def check_scorer(spec: ScorerSpec) -> None:
    """Import and build the scorer here, in the driver, so that a mistake shows before Ray starts.

    Raises ConfigError naming the module, attribute or option that is wrong and the nearest one there is.
    """
    load_scorer(spec, warm_up=False)


def load_scorer(spec: ScorerSpec, warm_up: bool = True) -> Scorer:
    """The scorer as a function (trajectory, record) -> RewardRecord; an async function where the user's is one.

    What the scorer raises or returns wrongly becomes a record without a value; only MemoryError and KeyboardInterrupt
    come through. Raises ConfigError as `check_scorer` says.
    """
    target = _import_target(spec.target)
    if spec.kind == "task":
        return _task_scorer(spec, target, warm_up)
    if inspect.isclass(target):
        function, keywords = _build(spec, target), {}
        _check_call(spec, function)
    else:
        function, keywords = target, spec.options
        _check_call(spec, function, keywords)
    source = _source_file(target)
    if not _is_async(function):
        return lambda trajectory, record: _guard(lambda: function(trajectory, record, **keywords), source)

    async def score(trajectory: Trajectory, record: Record) -> RewardRecord:
        try:
            return as_record(await function(trajectory, record, **keywords))
        except (Exception, SystemExit) as error:
            return _failure(error, source)

    return score


def as_record(value: Any) -> RewardRecord:
    """What a scorer returned, as a record. A number counts as a correct answer from 1.0 on, else as a wrong one."""
    if isinstance(value, RewardRecord):
        if value.value is None:
            return value if "cause" in value.detail else replace(value, detail={**value.detail, "cause": "scorer"})
        number = _number(value.value)
        if number is not None and math.isfinite(number):
            return replace(value, value=number)
        return masked("not_a_number", f"the scorer returned a RewardRecord with the value {_short(value.value)}")
    if value is None:
        return masked("scorer", "the scorer returned None")
    number = _number(value)
    if number is None:
        return masked("not_a_number", f"the scorer returned {_short(value)}, not a number, None or a RewardRecord")
    if not math.isfinite(number):
        return masked("not_a_number", f"the scorer returned {number}, not a finite number")
    return RewardRecord(number, reason="scored", correct=number >= 1.0)


def _task_scorer(spec: ScorerSpec, target: Any, warm_up: bool) -> Scorer:
    task = _build(spec, target)
    if not callable(getattr(task, "score", None)):
        raise ConfigError(f"reward: {spec.target} has no method score(record, text), which a rule needs")
    if warm_up and hasattr(task, "warm_up"):
        task.warm_up()
    source = _source_file(target)
    if callable(getattr(task, "score_trajectory", None)):
        return lambda trajectory, record: _guard(lambda: task.score_trajectory(record, trajectory), source)
    return lambda trajectory, record: _guard(lambda: task.score(record, trajectory.answer_text), source)


def _guard(call: Callable[[], Any], source: str) -> RewardRecord:
    try:
        return as_record(call())
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # a scorer that calls sys.exit() must not end its process
        return _failure(error, source)


def _failure(error: BaseException, source: str) -> RewardRecord:
    if isinstance(error, MemoryError):
        raise error
    message = str(error)
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return masked("exception", f"{_short(text, quote=False)} ({_place(error, source)})")


def _place(error: BaseException, source: str) -> str:
    """file:line of the innermost frame in the scorer's own file: libraries below it are rarely the mistake."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if os.path.abspath(frame.filename) == source]
    frame = (own or frames)[-1]
    return f"{_nice_path(frame.filename)}:{frame.lineno}"


def _nice_path(path: str) -> str:
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return path if relative.startswith("..") else relative


def _source_file(target: Any) -> str:
    try:
        return os.path.abspath(inspect.getsourcefile(inspect.unwrap(target)) or "")
    except TypeError:  # an instance or a builtin: there is no file to prefer
        return ""


def _number(value: Any) -> float | None:
    """A real number, or a numpy or torch scalar, as float; None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) else None


def _short(value: Any, quote: bool = True, limit: int = 300) -> str:
    try:
        text = f"{type(value).__name__} {value!r}" if quote else str(value)
    except Exception as error:  # a broken __repr__ is the user's too
        text = f"{type(value).__name__} (its repr raised {type(error).__name__})"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _import_target(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"reward: {path!r} is not an import path; write module:attribute, as in my_module:score")
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(_missing_module(path, module_name, error)) from error
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # the user's module runs here for the first time
        line = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{line.filename}:{line.lineno}"
        if isinstance(error, SyntaxError):
            place = f"{error.filename}:{error.lineno}"
        raise ConfigError(
            f"reward: importing {module_name} raised {type(error).__name__}: {error} ({place})"
        ) from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            hint = _nearest(name, [n for n in dir(target) if not n.startswith("__")])
            raise ConfigError(f"reward: {module_name} has no attribute {name!r} (asked for as {path}){hint}")
        target = getattr(target, name)
    if not callable(target):
        raise ConfigError(f"reward: {path} is a {type(target).__name__}, not a function or a class")
    return target


def _missing_module(path: str, module_name: str, error: ModuleNotFoundError) -> str:
    missing = error.name or module_name
    if missing != module_name and not module_name.startswith(missing + "."):
        return f"reward: {module_name} was found, but it imports {missing!r}, which is not installed here"
    parent, _, leaf = missing.rpartition(".")
    folders = getattr(importlib.import_module(parent), "__path__", []) if parent else None
    names = [module.name for module in pkgutil.iter_modules(folders)]
    hint = _nearest(leaf, names) or ". Is its folder the working directory or on PYTHONPATH?"
    return f"reward: there is no module {missing!r} (asked for as {path}){hint}"


def _build(spec: ScorerSpec, target: Any) -> Any:
    if spec.kind == "task" and not inspect.isclass(target):
        raise ConfigError(f"reward: {spec.target} is a {type(target).__name__}; a task is a class")
    _bind(spec, target, (), spec.options)
    try:
        return target(**spec.options)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        place = _place(error, _source_file(target))
        raise ConfigError(
            f"reward: building {spec.target} with {spec.options} raised {type(error).__name__}: {error} ({place})"
        ) from error


def _check_call(spec: ScorerSpec, function: Any, keywords: dict[str, Any] | None = None) -> None:
    if not callable(function):
        raise ConfigError(
            f"reward: an instance of {spec.target} cannot be called; give it __call__(trajectory, record)"
        )
    _bind(spec, function, ("trajectory", "record"), keywords or {})


def _bind(spec: ScorerSpec, function: Any, positional: tuple[str, ...], keywords: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none: the first call will tell
        return
    parameters = signature.parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for name in keywords:
            if name not in names:
                raise ConfigError(f"reward: {spec.target} takes no option {name!r}{_nearest(name, names)}")
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        call = ", ".join([*positional, *(f"{k}={v!r}" for k, v in keywords.items())])
        raise ConfigError(f"reward: {spec.target}{signature} cannot be called as ({call}): {error}") from error


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""
