"""One of reasoning-gym's generated data sets (arXiv 2505.24760), scored by the data set's own scorer.

    task=reasoning_gym task.dataset=chain_sum task.options.max_terms=3

The library draws item i of a data set from Random(seed + i), so two seeds give the same items, shifted. Here every
chunk of problems has a data set of its own, whose seed is a hash; and, as for every generated task, the hash of a
question's text decides whether it is held out.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import numpy as np

from rltk.errors import ConfigError, InfrastructureError
from rltk.nearest import meant
from rltk.rewards.screen import screen
from rltk.tasks.generated import is_held_out
from rltk.trajectory import Record, RewardRecord

INSTRUCTION = "Put the final answer, and nothing else, between <answer> and </answer>."
CHUNK = 256  # problems that come from one data set object: making one takes up to a second
TRIES = 2_000  # draws in vain before we say that the options leave no problem, or no further one

# Their scorers call Python's eval on the model's answer, and need its power: that eval runs in a jail.
JAILED = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
REFUSED = {
    "composite": "it mixes data sets",
    "game_of_life_halting": "its scorer (0.1.25) gives every answer full marks",
}
# Their scorers give the answer to sympy.parse_expr, which is Python's eval too: `open("f", "w")` opens the file. They
# get only numbers, operators, brackets and these names; every other answer is wrong unread.
NUMBERS = frozenset[str]()
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
FUNCTIONS = frozenset(
    ["sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln",
     "sqrt", "pi", "Abs"]
)  # fmt: skip
PARSED_BY_SYMPY = {
    "countdown": NUMBERS,
    "puzzle24": NUMBERS,
    "polynomial_multiplication": LETTERS,
    "simple_integration": LETTERS | FUNCTIONS,
    "intermediate_integration": LETTERS | FUNCTIONS,
}
# Possessive: one way to read it. With `+`, twenty digits and a letter that does not belong are read for half a minute.
EXPRESSION = re.compile(r"(?:\d++(?:\.\d*+)?|\.\d++|[A-Za-z]\w*+|[-+*/^()\s])*+", re.ASCII)
NAME = re.compile(r"(?<![\d.])[A-Za-z]\w*", re.ASCII)
CALL_OF_A_LETTER = re.compile(r"\b[A-Za-z]\s*\(")  # sympy has functions S, N and O
HUGE_NUMBER = re.compile(r"[-+]?[\d_.,]+e[-+]?[\d_,]{5,}", re.IGNORECASE)  # as a Fraction it is written out in full
# They draw from Python sets of strings, which every process orders in its own way.
UNORDERED = ("codeio", "isomorphic_strings", "polynomial_multiplication", "ransom_note")


class ReasoningGym:
    """Options: `dataset`, its name; `seed`, another training stream of the same problems; `instruction`, appended to
    every question after a blank line (empty: none); `system`, a system message; `longest`, the characters that a
    question may have (longer ones are not drawn); `untagged`, what a response without answer tags is worth: `wrong`, or
    its `last_line` is its answer, for models too small to be asked for tags; `isolation`, strict or best_effort, of
    the jail that four data sets evaluate answers in (docs/security.md); and, as `task.options.<key>`, those of the data
    set's own config.

    A record's `data` is the library's entry (question, answer, metadata), which its scorer needs: plain Python values,
    not always JSON's.
    """

    name = "reasoning_gym"
    size: int | None = None

    def __init__(
        self,
        max_prompt_tokens: int,
        max_response_tokens: int,
        dataset: str,
        seed: int = 0,
        instruction: str = INSTRUCTION,
        system: str | None = None,
        longest: int | None = None,
        untagged: str = "wrong",
        isolation: str = "strict",
        **options: Any,
    ):
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.dataset, self.options, self.seed = str(dataset), options, seed
        self.instruction, self.system, self.longest, self.untagged = instruction, system, longest, untagged
        self.isolation = isolation
        if isolation not in ("strict", "best_effort"):
            raise ConfigError(f"task.isolation={isolation!r} must be strict or best_effort")
        if untagged not in ("wrong", "last_line"):
            raise ConfigError(f"task.untagged={untagged!r} must be wrong or last_line")
        if longest is not None and (not isinstance(longest, int) or longest < 1):
            raise ConfigError(f"task.longest={longest!r} must be a number of characters, or null")
        _check_name(self.dataset)
        _check_options(self.dataset, options)
        self._data_set(0)
        self._scorer()

    def problem(self, index: int) -> Record:
        if index < 0:
            raise IndexError(f"task reasoning_gym: problem index {index} is negative")
        for attempt in range(TRIES):
            entry = self._entry(f"train/{self.seed}", index, attempt)
            if not is_held_out(entry["question"]) and self._fits(entry):
                return self._record(entry, str(index))
        raise ConfigError(f"{self._self} has no training problem{self._fitting} in {TRIES} draws; widen its options")

    def held_out(self, count: int) -> list[Record]:
        found: dict[str, Record] = {}
        index = last = 0
        while len(found) < count:
            entry = self._entry("held-out", index, 0)
            question = entry["question"]
            if is_held_out(question) and self._fits(entry) and question not in found:
                found[question] = self._record(entry, f"held-out/{len(found)}")
                last = index
            if index - last > TRIES:
                raise ConfigError(
                    f"{self._self} has {len(found)} distinct held-out problems{self._fitting}, not {count}; "
                    "widen its options, or ask for fewer (evaluation.problems)"
                )
            index += 1
        return list(found.values())

    def warm_up(self) -> None:
        """Called once in each reward process: loading sympy must not count against the first sample's deadline."""
        import rltk.rewards.math

        if self.dataset in PARSED_BY_SYMPY:
            rltk.rewards.math.warm_up()

    def _scorer(self) -> Callable[[str, dict[str, Any]], float]:
        data_set = self._data_set(0)
        if self.dataset not in JAILED:
            return data_set.score_answer
        return partial(_jailed(type(data_set).score_answer, self.isolation), data_set)

    def score(self, record: Record, text: str) -> RewardRecord:
        """What the data set's scorer says, mostly in [0, 1]; from 1 on the answer is right. See `final_answer`."""
        answer = final_answer(text)
        if answer is None and self.untagged == "last_line":
            answer = text.strip().rpartition("\n")[2].strip()
        if not answer:
            return RewardRecord(0.0, reason="no final answer", correct=False)
        problem = self._unread(answer)
        if problem:
            return RewardRecord(0.0, reason=f"the answer {problem}", correct=False)
        scorer = self._scorer()
        try:
            value = float(scorer(answer, record.data))
        except (MemoryError, InfrastructureError):
            raise
        except Exception as error:  # they raise anything on a malformed answer
            scorer(record.answer, record.data)  # but not on the reference: if they do, nobody can tell, and it raises
            return RewardRecord(0.0, reason=f"scoring the answer raised {type(error).__name__}", correct=False)
        if not math.isfinite(value):  # an answer of "nan"
            return RewardRecord(0.0, reason=f"the answer's score is {value}", correct=False)
        if value >= 1.0 and self.dataset == "coin_flip" and not _same_probability(answer, record.answer):
            return RewardRecord(0.0, reason="the answer is but the first digits", correct=False)
        return RewardRecord(value, reason="scored", correct=value >= 1.0)

    def _unread(self, answer: str) -> str | None:
        """Why the scorer must not see the answer, or None."""
        if self.dataset == "complex_arithmetic" and re.search("nan|inf", answer, re.IGNORECASE):
            return "is not a finite number"  # the scorer's exp(-distance), clipped, makes NaN a 1
        if HUGE_NUMBER.fullmatch(answer):
            return "has an exponent of over four digits"
        if self.dataset not in PARSED_BY_SYMPY:
            return None
        if not EXPRESSION.fullmatch(answer):
            return "is not made of numbers, names, brackets and + - * / ^ alone"
        unknown = set(NAME.findall(answer)) - PARSED_BY_SYMPY[self.dataset]
        if unknown:
            return f"has the name {min(unknown)}"
        if CALL_OF_A_LETTER.search(answer):
            return "calls a letter as a function"
        return screen(answer)

    def _entry(self, stream: str, index: int, attempt: int) -> dict[str, Any]:
        if self.dataset in UNORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ConfigError(
                f"task.dataset={self.dataset} draws from Python's sets, whose order differs in every process, so a "
                "resumed run would meet other problems; set PYTHONHASHSEED=0 in the environment"
            )
        key = f"{self.name}/{self.dataset}/{stream}/{index // CHUNK}/{attempt}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")
        try:
            with _global_generators(seed, index):
                return self._data_set(seed)[index % CHUNK]
        except Exception as error:  # the library's own, for options that fit no problem
            raise ConfigError(f"{self._self}: drawing a problem raised {type(error).__name__}: {error}") from error

    def _data_set(self, seed: int) -> Any:
        return _create(self.dataset, seed, tuple(sorted((key, _frozen(value)) for key, value in self.options.items())))

    def _record(self, entry: dict[str, Any], name: str) -> Record:
        question = f"{entry['question']}\n\n{self.instruction}" if self.instruction else entry["question"]
        messages = [{"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        answer = "" if entry["answer"] is None else str(entry["answer"])  # some have many right answers and name none
        return Record(f"{self.dataset}/{name}", tuple(messages), answer, data=entry)

    def _fits(self, entry: dict[str, Any]) -> bool:
        return self.longest is None or len(entry["question"]) <= self.longest

    @property
    def _fitting(self) -> str:
        return "" if self.longest is None else f" of at most task.longest={self.longest} characters"

    @property
    def _self(self) -> str:
        return f"task.dataset={self.dataset} with task.options={self.options}"


def final_answer(text: str) -> str | None:
    r"""What stands in the last complete <answer>...</answer>, reasoning-gym's own convention; without one, in the last
    complete \boxed{...}, which models trained on mathematics write. None if there is neither."""
    before, closing, _ = text.rpartition("</answer>")
    _, opening, inside = before.rpartition("<answer>")
    if opening and closing:
        return inside.strip()
    from rltk.rewards.math import last_boxed  # loads sympy: only where answers are scored

    boxed = last_boxed(text)
    return None if boxed is None else boxed.strip()


def _same_probability(answer: str, reference: str) -> bool:
    """coin_flip's scorer (0.1.25) gives marks for digits in common, and full marks to "0", with which 0.375 begins."""
    return abs(Fraction(answer.replace(",", "")) - Fraction(reference)) <= 1e-4


@lru_cache(maxsize=16)  # a chunk's data set for the usual number of attempts, and the scorer's
def _create(name: str, seed: int, options: tuple[tuple[str, Any], ...]) -> Any:
    given = {key: _thawed(value) for key, value in options}
    try:
        return _library().create_dataset(name, seed=seed, size=CHUNK, **given)
    except Exception as error:  # mostly AssertionError, from a config's validate()
        raise ConfigError(
            f"task.dataset={name} refuses task.options={given}: {type(error).__name__}: {error}"
        ) from error


@lru_cache(maxsize=2)
def _jailed(score: Callable[..., float], isolation: str) -> Callable[..., float]:
    """The data set's scorer, its eval in a jail. ConfigError where this machine cannot build one."""
    from rltk.rewards.jailed import scoring_jail, with_jailed_eval

    return with_jailed_eval(score, scoring_jail(isolation))


@contextmanager
def _global_generators(seed: int, index: int) -> Iterator[None]:
    """Seeds Python's and numpy's global generators, which some data sets draw from, and leaves them as they were."""
    python, array = random.getstate(), np.random.get_state()
    random.seed(f"{seed}/{index}")
    np.random.seed((seed + index) % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _check_name(name: str) -> None:
    if name in REFUSED:
        raise ConfigError(f"task.dataset={name} is refused: {REFUSED[name]}; choose another data set")
    known = sorted(set(_library().DATASETS) - set(REFUSED))
    if name not in known:
        raise ConfigError(f"task.dataset={name!r} is not known{meant(name, known)}. Data sets: {', '.join(known)}")


def _check_options(name: str, options: dict[str, Any]) -> None:
    known = [field.name for field in fields(_library().DATASETS[name][1]) if field.name not in ("seed", "size")]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"task.options.{key}={value!r}: {name} has no such option{meant(key, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )


def _library() -> Any:
    """reasoning_gym.factory, with every data set registered. Importing it takes seconds."""
    try:
        import reasoning_gym.factory
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task=reasoning_gym needs the package {error.name}: pip install reasoning-gym==0.1.25"
        ) from error
    return reasoning_gym.factory


def _frozen(value: Any) -> Any:
    """As a key of a cache: lists as tuples, mappings as tagged tuples."""
    if isinstance(value, dict):
        return ("mapping", tuple((key, _frozen(item)) for key, item in value.items()))
    return ("list", tuple(map(_frozen, value))) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    kind, items = value
    return {key: _thawed(item) for key, item in items} if kind == "mapping" else [_thawed(item) for item in items]
