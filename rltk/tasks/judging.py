r"""Solutions of arithmetic problems, sound or with a planted error, for a judge to learn from.

What is 47 + 35 - 18? = 64
<0>47 + 35 = 72</0>
<1>82 - 18 = 64</1>
<2>\fbox{64}</2>           ->    0: 47 + 35 = 82 wrong <newline> \boxed{0}
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from rltk.errors import ConfigError
from rltk.rewards.genrm.types import Question
from rltk.tasks.arithmetic import Arithmetic
from rltk.tasks.generated import GeneratedTask
from rltk.tasks.judged import Judged
from rltk.tasks.planted import SOUND, STYLES, TWO_STEPS, solve
from rltk.trajectory import Record


class Judging(Judged, GeneratedTask):
    """Half of the training solutions are sound, the others flawed in one of `styles`. Of the held-out ones a third is
    sound, a third has an error of `styles`, a third one of `unseen`, which training never has: both F1 are of halves.

    Options: `levels` of `Arithmetic`, `styles` and `unseen` (of rltk/tasks/planted.py, none in both), `template`,
    `reward` (rltk/tasks/judged.py), `seed`. Labels are those of Arithmetic's rule: the first paragraph that is not the
    sound solution's. On which side of the split a solution stands, its problem alone decides, by the hash that
    `task=arithmetic` has: held-out problems of one are held-out problems of the other.
    """

    name = "judging"

    def __init__(
        self,
        max_prompt_tokens: int,
        max_response_tokens: int,
        levels: Iterable[int] = (1, 2, 3, 4, 5),
        styles: Iterable[str] = ("patch", "guess", "jump", "slip"),
        unseen: Iterable[str] = ("operand", "swap", "extra", "again"),
        template: str = "fapo_short.v1",
        reward: str = "distance",
        seed: int = 0,
    ):
        Judged.__init__(self, template, reward)
        GeneratedTask.__init__(self, levels, seed, max_prompt_tokens, max_response_tokens)
        self.arithmetic = Arithmetic(max_prompt_tokens, max_response_tokens, self.levels)
        self.styles, self.unseen = tuple(styles), tuple(unseen)
        for option, given in (("styles", self.styles), ("unseen", self.unseen)):
            unknown = [style for style in given if style not in STYLES or style == SOUND]
            if unknown:
                known = ", ".join(style for style in STYLES if style != SOUND)
                raise ConfigError(f"task.{option}: {unknown[0]!r} is not one of {known}")
        if not self.styles or set(self.styles) & set(self.unseen):
            raise ConfigError(f"task.styles={list(self.styles)} must name a style, and none of task.unseen")

    def sample(self, rng: random.Random, level: int, held_out: bool = False) -> Record:
        problem = self.arithmetic.sample(rng, level, held_out)
        kinds = [(SOUND,), self.styles, *([self.unseen] if held_out and self.unseen else [])]
        styles = rng.choice(kinds)
        roomy = [style for style in styles if len(problem.data["ops"]) > 1 or style not in TWO_STEPS]
        return self.about(problem, rng.choice(roomy or [SOUND]), rng)

    def about(self, problem: Record, style: str, rng: random.Random) -> Record:
        """The question about a solution of `problem` (of `Arithmetic`) in this style."""
        text = solve(problem, style, rng)
        label = self.arithmetic.score(problem, text).detail.get("first_flawed", -1)
        question = Question("", problem.messages[-1]["content"], text, problem.answer)
        kind = style if label >= 0 else SOUND
        told = {"steps": problem.data["steps"], "reference": problem.answer, "unseen": kind in self.unseen}
        return self.asked(question, label, label >= 0, kind, problem.level, solution=text, **told)
