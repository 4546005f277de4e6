"""The user's own labelled solutions for a judge to learn from: a file as the judges' benchmarks read it."""

from __future__ import annotations

from dataclasses import replace

from rltk.errors import ConfigError
from rltk.rewards.genrm.benchmarks import Solution, load
from rltk.tasks.generated import is_held_out
from rltk.tasks.judged import Judged
from rltk.trajectory import Record

FORMATS = ("flawed_positive", "processbench")


class JudgingJsonl(Judged):
    """Options: `path`, its `format` (rltk/rewards/genrm/benchmarks.py: flawed_positive | processbench), `template`,
    `reward` (rltk/tasks/judged.py), and the held-out part: a `held_out` share in (0, 1) by hash of the problem, so that
    all solutions of a problem fall on the same side, or a file of its own, `held_out_path`, whose problems are then
    kept out of training. ConfigError names file and line of what is not as the format says.
    """

    name = "judging_jsonl"

    def __init__(
        self,
        max_prompt_tokens: int,
        max_response_tokens: int,
        path: str,
        format: str = "flawed_positive",
        template: str = "fapo.v1",
        reward: str = "distance",
        held_out: float = 0.1,
        held_out_path: str | None = None,
    ):
        super().__init__(template, reward)
        if format not in FORMATS:
            raise ConfigError(f"task.format={format!r} is not one of {', '.join(FORMATS)}")
        if not 0 < held_out < 1:
            raise ConfigError(f"task.held_out={held_out} must be a share between 0 and 1, e.g. 0.1")
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        solutions = load(format, path)
        if held_out_path:
            kept = load(format, held_out_path)
            problems = {solution.question.problem for solution in kept}
        else:
            problems = {s.question.problem for s in solutions if is_held_out(s.question.problem, held_out)}
            kept = [solution for solution in solutions if solution.question.problem in problems]
        training = [solution for solution in solutions if solution.question.problem not in problems]
        if not training or not kept:
            side = "training" if not training else "held-out"
            raise ConfigError(
                f"task.path={path}: no {side} solution of {len(solutions)} (task.held_out={held_out}, "
                f"task.held_out_path={held_out_path}); change the share, or name a file of other problems"
            )
        self._training = [self._record(s, f"{self.name}/{n}") for n, s in enumerate(training)]
        self._held_out = [self._record(s, f"{self.name}/held-out/{n}") for n, s in enumerate(kept)]
        self.size = len(self._training)

    def problem(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"task {self.name}: problem index {index} is outside 0..{self.size - 1}")
        return self._training[index]

    def held_out(self, count: int) -> list[Record]:
        return self._held_out[:count]

    def _record(self, solution: Solution, uid: str) -> Record:
        question = replace(solution.question, uid=uid)  # ids of a file need not be unique
        kind = "flawed" if solution.flawed else "sound"
        count, label = len(self.finder.paragraphs(question)), solution.label
        if count == 0 or (label is not None and label >= count):
            name = solution.question.uid
            raise ConfigError(
                f"task.path: solution {name!r} has {count} paragraphs and the label {label}; mend its line"
            )
        return self.asked(question, label, solution.flawed, kind, "")
