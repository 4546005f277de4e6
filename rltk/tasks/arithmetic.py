r"""Multi-step arithmetic, worked from left to right.

What is 47 + 35 - 18?    ->    47 + 35 = 82 <blank line> 82 - 18 = 64 <blank line> \boxed{64}
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from rltk.errors import ConfigError
from rltk.tasks.generated import GeneratedTask
from rltk.tasks.paragraphs import score_paragraphs
from rltk.trajectory import Record, RewardRecord

_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
MOST_STEPS = 4
COMBINED = 5  # the level of most steps and larger numbers


class Arithmetic(GeneratedTask):
    """Levels 1 to 4 are the number of steps. Up to level 3, every other problem starts from a number of one digit more.
    Level 5 combines what the others keep apart: four steps, and the larger start.

    Options: `levels`, `operators` (of + - *), `digits` of a number, `system` (a system message for models that were not
    brought up on this task), `check_steps` (False: `flawed` stays None), `seed`.

    Every value on the way is at least 0, so that no sign has to be read. Products come first, so that working from left
    to right is the usual precedence too.
    """

    name = "arithmetic"

    def __init__(
        self,
        max_prompt_tokens: int,
        max_response_tokens: int,
        levels: Iterable[int] = (1, 2, 3, 4, 5),
        operators: str = "+-",
        digits: int = 2,
        system: str | None = None,
        check_steps: bool = True,
        seed: int = 0,
    ):
        super().__init__(levels, seed, max_prompt_tokens, max_response_tokens)
        if not operators or set(operators) - set(_APPLY):
            raise ConfigError(f"task.operators={operators!r} must be one or more of + - *")
        if not 1 <= digits <= 12:
            raise ConfigError(f"task.digits={digits} must be between 1 and 12")
        if any(level > COMBINED for level in self.levels):
            raise ConfigError(f"task.levels={list(self.levels)}: the hardest level is {COMBINED}")
        self.operators = operators
        self.digits = digits
        self.system = system
        self.check_steps = check_steps

    def draw(self, rng: random.Random, level: int) -> Record:
        lowest, highest = 10 ** (self.digits - 1), 10**self.digits - 1
        large = level == COMBINED or (level < MOST_STEPS and rng.random() < 0.5)
        start = rng.randint(10 * lowest, 40 * lowest - 1) if large else rng.randint(lowest, highest)
        value, ops, steps = start, [], []
        count = min(level, MOST_STEPS)
        for operator in sorted((rng.choice(self.operators) for _ in range(count)), key=lambda o: o != "*"):
            number = rng.randint(1 if operator != "*" else lowest, highest)
            if operator == "-" and number > value:
                operator = "+" if "+" in self.operators else operator
                number = min(number, value) if operator == "-" else number
            result = _APPLY[operator](value, number)
            ops.append([operator, number])
            steps.append(f"{value} {operator} {number} = {result}")
            value = result
        question = f"What is {start}{''.join(f' {o} {n}' for o, n in ops)}?"
        messages = [{"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        data = {"start": start, "ops": ops, "steps": steps}
        return Record(id="", messages=tuple(messages), answer=str(value), level=str(level), data=data)

    def score(self, record: Record, text: str) -> RewardRecord:
        return score_paragraphs(record.data["steps"], record.answer, text, self.check_steps)
