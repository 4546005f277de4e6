r"""Long solutions whose answer needs an early result: hundreds of tokens lie between a number and its second use.

    Start at 47 and repeat + 7, - 3, - 4 for 36 steps. Add the results of steps 4 and 36.
    1: 47 + 7 = 54  |  2: 54 - 3 = 51  |  ...  |  36: 51 - 4 = 47  |  4: 47 + 7 = 54  |  54 + 47 = 101  |  \boxed{101}
    (each | a blank line; after the last step the early one is told again, then used)

Each step is easy and the prompt short; what is hard is to keep the whole response at hand. With the project's
tokenizer a sound solution of 30 to 42 steps is 340-485 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from rltk.tasks.generated import GeneratedTask
from rltk.tasks.paragraphs import score_paragraphs
from rltk.trajectory import Record, RewardRecord

CYCLE = 3  # operations that repeat
EARLY = 9  # the early result is one of the first so many


class ArithmeticLong(GeneratedTask):
    """Options: `levels` (number of steps), `system`, `check_steps`, `seed`, as for `Arithmetic`."""

    name = "arithmetic_long"

    def __init__(
        self,
        max_prompt_tokens: int,
        max_response_tokens: int,
        levels: Iterable[int] = (30, 33, 36, 39, 42),
        system: str | None = None,
        check_steps: bool = True,
        seed: int = 0,
    ):
        super().__init__(levels, seed, max_prompt_tokens, max_response_tokens)
        self.system = system
        self.check_steps = check_steps

    def draw(self, rng: random.Random, level: int) -> Record:
        start, cycle, values = self._chain(rng, level)
        ops = [cycle[i % CYCLE] for i in range(level)]
        early = rng.randint(1, min(EARLY, level))
        steps = [f"{i + 1}: {values[i]} {o} {n} = {values[i + 1]}" for i, (o, n) in enumerate(ops)]
        answer = values[early] + values[level]
        steps += [steps[early - 1], f"{values[early]} + {values[level]} = {answer}"]
        rule = ", ".join(f"{o} {n}" for o, n in cycle)
        question = (
            f"Start at {start} and repeat {rule} for {level} steps. Add the results of steps {early} and {level}."
        )
        messages = [{"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        data = {"start": start, "ops": ops, "early": early, "steps": steps}
        return Record(id="", messages=tuple(messages), answer=str(answer), level=str(level), data=data)

    def _chain(self, rng: random.Random, level: int) -> tuple[int, list[list], list[int]]:
        """A start, a cycle of operations and all values on the way, each of two digits (drawn until they are)."""
        while True:
            start = rng.randint(10, 99)
            cycle = [[rng.choice("+-"), rng.randint(1, 9)] for _ in range(CYCLE)]
            values = [start]
            for i in range(level):
                operator, number = cycle[i % CYCLE]
                values.append(values[-1] + number if operator == "+" else values[-1] - number)
            if all(10 <= v <= 99 for v in values):
                return start, cycle, values

    def score(self, record: Record, text: str) -> RewardRecord:
        return score_paragraphs(record.data["steps"], record.answer, text, self.check_steps)
