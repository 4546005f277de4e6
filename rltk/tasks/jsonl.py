"""The user's own problems: a JSON-lines file with a question and an answer column, scored by math-verify."""

from __future__ import annotations

import json
from pathlib import Path

from rltk.errors import ConfigError
from rltk.tasks.generated import is_held_out
from rltk.trajectory import Record, RewardRecord

INSTRUCTION = r"Reason step by step and put the final answer in \boxed{}."


class Jsonl:
    """Options: `path`, the columns `question`, `answer` and (optional) `level`, `instruction` (appended to every
    question after a blank line; empty: none), `system` (a system message), and the held-out part: a `held_out` share
    in (0, 1) by hash of the question, so that equal questions fall on the same side, or a file of its own,
    `held_out_path`, whose questions are then kept out of training.

    A line that is not a JSON object, or lacks a column, is refused with file and line number; blank lines are skipped.
    """

    name = "jsonl"

    def __init__(
        self,
        max_prompt_tokens: int,
        max_response_tokens: int,
        path: str,
        question: str = "question",
        answer: str = "answer",
        level: str | None = None,
        instruction: str = INSTRUCTION,
        system: str | None = None,
        held_out: float = 0.1,
        held_out_path: str | None = None,
    ):
        if not 0 < held_out < 1:
            raise ConfigError(f"task.held_out={held_out} must be a share between 0 and 1, e.g. 0.1")
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self._columns = {"question": question, "answer": answer, "level": level}
        self._instruction = instruction
        self._system = system
        records = self._read(path, "task.path")
        if held_out_path:
            self._held_out = self._read(held_out_path, "task.held_out_path")
            kept_out = {r.data["question"] for r in self._held_out}
            self._training = [r for r in records if r.data["question"] not in kept_out]
        else:
            self._held_out = [r for r in records if is_held_out(r.data["question"], held_out)]
            self._training = [r for r in records if not is_held_out(r.data["question"], held_out)]
        if not self._training:
            raise ConfigError(
                f"task.path={path}: no training problem is left of {len(records)} after the held-out part"
            )
        if not self._held_out:
            raise ConfigError(
                f"task.path={path}: {len(records)} problems at task.held_out={held_out} leave none held out; "
                "raise the share or give task.held_out_path=..."
            )
        self.size = len(self._training)

    def problem(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"task jsonl: problem index {index} is outside 0..{self.size - 1}")
        return self._training[index]

    def held_out(self, count: int) -> list[Record]:
        return self._held_out[:count]

    def warm_up(self) -> None:
        """Called once in each reward process: loading sympy must not count against the first sample's deadline."""
        from rltk.rewards.math import warm_up

        warm_up()

    def score(self, record: Record, text: str) -> RewardRecord:
        from rltk.rewards.math import score_math  # loads sympy: only where answers are scored

        return score_math(record.answer, text)

    def _read(self, path: str, option: str) -> list[Record]:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"{option}={path}: no such file")
        lines = file.read_bytes().split(b"\n")
        records = [self._record(file, n, line) for n, line in enumerate(lines, 1) if line.strip()]
        if not records:
            raise ConfigError(f"{option}={path}: the file holds no problem; one JSON object a line is expected")
        return records

    def _record(self, file: Path, number: int, line: bytes) -> Record:
        where = f"{file}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
            raise ConfigError(f"{where}: not a line of JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a JSON {type(row).__name__}, not an object with named columns")
        question, answer = self._text(row, "question", where), self._text(row, "answer", where)
        level = self._text(row, "level", where) if self._columns["level"] else ""
        content = f"{question}\n\n{self._instruction}" if self._instruction else question
        messages = [{"role": "user", "content": content}]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        return Record(f"{file.name}:{number}", tuple(messages), answer, level, {"question": question})

    def _text(self, row: dict, role: str, where: str) -> str:
        column = self._columns[role]
        if column not in row:
            raise ConfigError(
                f"{where}: no column {column!r} (has: {', '.join(map(str, row)) or 'none'}); set task.{role}=<column>"
            )
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise ConfigError(f"{where}: column {column!r} is {value!r}; a non-empty text or a number is expected")
        return str(value)
