"""Where a run stands: everything that a checkpoint holds beside the learner's own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rltk.algorithms.prompts import PromptSampler
from rltk.config import Config
from rltk.ledger import Ledger
from rltk.prompting import Prompting
from rltk.summary import Summary
from rltk.tasks import Task
from rltk.trajectory import Version


@dataclass
class RunState:
    """`step`: training steps done, or the one under way. `version`: of the weights that engines sample with."""

    step: int
    version: Version
    ledger: Ledger
    prompting: Prompting
    summary: Summary

    @classmethod
    def fresh(
        cls, config: Config, task: Task, sampler: PromptSampler | None, incarnation: int, spent: float
    ) -> RunState:
        """`spent`: seconds that the run has taken already, in this process."""
        summary = Summary(config)
        summary.values["wall_seconds"] = spent
        prompting = Prompting(task, sampler, config.seed)
        return cls(0, (incarnation, 0), Ledger(config.seed, task.size), prompting, summary)

    def plain(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint: taken between steps."""
        return {
            "step": self.step,
            "version": list(self.version),
            "ledger": self.ledger.state(),
            "prompting": self.prompting.state(),
            "summary": self.summary.state(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go where `saved` was. The incarnation stays, as versions never repeat, and wall time does not go back."""
        self.step = saved["step"]
        self.version = (self.version[0], saved["step"])
        self.ledger = Ledger.restore(saved["ledger"])
        self.prompting.restore(saved["prompting"])
        seconds = max(self.summary.values["wall_seconds"], saved["summary"]["wall_seconds"])
        self.summary.restore(saved["summary"] | {"wall_seconds": seconds})
