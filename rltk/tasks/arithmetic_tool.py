r"""Products too large to work out in the head, then sums and differences: a tool gets them right.

What is 48213 * 73921 - 12345?    ->    \boxed{3563940828}
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from rltk.errors import ConfigError
from rltk.tasks.generated import GeneratedTask
from rltk.tasks.paragraphs import score_paragraphs
from rltk.trajectory import Record, RewardRecord

MOST_STEPS = 6


class ArithmeticTool(GeneratedTask):
    """Levels are the number of operations. The first is a product of two numbers of `digits` digits, so no problem is
    easy; the others add or subtract a number of as many digits. Only the answer is checked, not the way to it.

    Options: `levels` (1 to 6), `digits` of every number (3 to 12: fewer, and differences could fall below 0), `system`
    (a system message for models that were not brought up on this task), `seed`.
    """

    name = "arithmetic_tool"

    def __init__(
        self,
        max_prompt_tokens: int,
        max_response_tokens: int,
        levels: Iterable[int] = (1, 2, 3),
        digits: int = 5,
        system: str | None = None,
        seed: int = 0,
    ):
        super().__init__(levels, seed, max_prompt_tokens, max_response_tokens)
        if not 3 <= digits <= 12:
            raise ConfigError(f"task.digits={digits} must be between 3 and 12")
        if any(level > MOST_STEPS for level in self.levels):
            raise ConfigError(f"task.levels={list(self.levels)}: the hardest level is {MOST_STEPS}")
        self.digits = digits
        self.system = system

    def draw(self, rng: random.Random, level: int) -> Record:
        numbers = [rng.randint(10 ** (self.digits - 1), 10**self.digits - 1) for _ in range(level + 1)]
        value, expression = numbers[0] * numbers[1], f"{numbers[0]} * {numbers[1]}"
        for number in numbers[2:]:
            operator = rng.choice("+-")
            value += number if operator == "+" else -number
            expression += f" {operator} {number}"
        messages = [{"role": "user", "content": f"What is {expression}?"}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        data = {"expression": expression}
        return Record(id="", messages=tuple(messages), answer=str(value), level=str(level), data=data)

    def score(self, record: Record, text: str) -> RewardRecord:
        return score_paragraphs([], record.answer, text, check_steps=False)
