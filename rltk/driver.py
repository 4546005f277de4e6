"""The driver: a plain loop that decides what happens next. It owns no tensors.

    ledger --jobs--> rollout pool --trajectories--> rewards --scored groups--> learner --weights--> engines
       ^                                                                                              |
       +------------- committed with every checkpoint <---- evaluate, checkpoint <--------------------+

Synchronous (max_staleness = 0): every step samples with the weights that the step before made. What a step samples is
`rltk.gathering`, what happens when a role dies `rltk.recovery`, what a checkpoint holds `rltk.run_state`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ray

from rltk import manifest
from rltk.algorithms import Objective
from rltk.causes import MismatchAlarm
from rltk.checkpoint import Checkpoints
from rltk.config import Config
from rltk.errors import RltkError
from rltk.evaluation import evaluate
from rltk.gathering import Gathered, gather
from rltk.genrm_metrics import unjudged
from rltk.interrupt import first_interrupt_calls
from rltk.judges import JudgeWatch
from rltk.learner.group import LearnerGroup, RankDiedError
from rltk.learner.packing import ragged
from rltk.learner.settings import TrainResult
from rltk.placement import Placement
from rltk.pool import RolloutPool
from rltk.recovery import Recovery
from rltk.roles import Roles
from rltk.rollout.worker import Job, RolloutResult, Sampling
from rltk.run_state import RunState
from rltk.seeds import minibatch_seed
from rltk.step_row import step_row
from rltk.sync.shared_memory import Published, SharedMemoryTransfer
from rltk.tasks import Task
from rltk.time_ledger import TimeLedger
from rltk.tracker import Tracker, sample_row
from rltk.trajectory import Record, Trajectory

PATIENCE = 3  # steps in a row without anything to learn from, before that is an error
SAMPLES_SHOWN = 4  # trajectories a step in samples.jsonl
NOTHING_LEARNED = TrainResult({}, [], [], [], [], 0, {"logprobs": 0.0, "train": 0.0, "deepspeed": 0.0})


class Driver:
    """One run. `run()` trains to the end, or to an interrupt, and returns the summary's status."""

    def __init__(
        self,
        config: Config,
        placement: Placement,
        folder: Path,
        task: Task,
        objective: Objective,
        tracker: Tracker,
        roles: Roles,
        run_id: str,
    ) -> None:
        self.config, self.folder, self.task, self.objective = config, folder, task, objective
        self.tracker, self.roles = tracker, roles
        self.clock = TimeLedger()
        self.alarm = MismatchAlarm(config)
        self.rollouts = RolloutPool(roles, config, self._phase)
        self.judge = JudgeWatch(roles.judges, config, tracker.console.message)
        self.recovery = Recovery(config, placement, roles, self._rejoin, tracker.console.message)
        self.sampling = Sampling(
            config.rollout.temperature, config.task.max_prompt_tokens, config.task.max_response_tokens
        )
        self.transfer = SharedMemoryTransfer(config, roles, run_id)
        self.checkpoints = Checkpoints(folder, config.checkpoint.keep)
        self.state = self._beginning(incarnation=0, spent=0.0)
        self.held_out: list[Record] = []
        self._interrupted = False
        self._idle = 0  # steps in a row without a trained sample

    @property
    def learner(self) -> LearnerGroup:
        assert self.roles.learner is not None
        return self.roles.learner

    def run(self) -> str:
        """Train. Returns "finished" or "interrupted"; whatever fails is raised, with the last checkpoint in place."""
        with first_interrupt_calls(self.interrupt):
            self.held_out = self.task.held_out(self.config.evaluation.problems)
            while True:
                try:
                    return self._train()
                except RankDiedError as error:
                    self.recovery.restart_learner(error)

    def _train(self) -> str:
        """From the newest checkpoint, or from the beginning where there is none, to the end."""
        restored = self._restore()
        self._publish()
        self.judge.begin()
        if not restored:
            self._evaluate()
            self._checkpoint()
        while self.state.step < self.config.steps and not self._interrupted:
            self.train_step()
        if self._interrupted and self.state.step < self.config.steps:
            if self.state.step not in self.checkpoints.steps():
                self._checkpoint()
            return "interrupted"
        self._phase("write the model")
        self.learner.write_model(self.folder / "model")
        return "finished"

    # -- a step ------------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        state = self.state
        state.step += 1
        gathered = gather(self.config.batch, self.task, state.ledger, state.prompting, self.objective, self._roll_out)
        for line in gathered.failures():
            self._say(f"step {state.step}: {line}")
        if self.config.debug.permute_rewards:
            gathered.permute_rewards(minibatch_seed(self.config.seed, state.step))
        learned = self._learn(gathered)
        published = self._publish()
        last = state.step == self.config.steps
        if last or _due(state.step, self.config.evaluation.every):
            self._evaluate()
        self._record(gathered, learned, published)
        if last or _due(state.step, self.config.checkpoint.every):
            self._checkpoint()

    def _roll_out(self, records: dict[str, Record]) -> RolloutResult:
        """Sample and score what the ledger has in flight. `records` by group."""

        def roll() -> RolloutResult:
            flying = self.state.ledger.in_flight.values()
            jobs = [Job(i.uid, i.group, records[i.group], i.seed(self.config.seed)) for i in flying]
            return self.rollouts(jobs, self.sampling)

        result = self.recovery.surviving(roll)
        self.clock.add("generate", result.generate_seconds)
        self.clock.add("reward", result.reward_seconds)
        return result

    def _learn(self, gathered: Gathered) -> TrainResult:
        if not gathered.sampled:
            raise RltkError("every sample of this step was unusable; the first reason is above")
        self._phase("train")
        learned = self._train_on(gathered.admitted) if gathered.admitted else NOTHING_LEARNED
        self._idle = 0 if learned.trained else self._idle + 1
        if self._idle == PATIENCE:
            raise RltkError(f"{PATIENCE} steps in a row had nothing to learn from: {self._why_idle(gathered)}")
        trained = set(learned.trained)
        for number, trajectory in enumerate(gathered.admitted):
            if number in trained:
                self.state.ledger.train(trajectory.uid)
            else:
                masked = trajectory.reward is None or trajectory.reward.value is None
                reason = "reward unknown" if masked else "group too small"
                self.state.ledger.drop(trajectory.uid, reason, trajectory.length)
        return learned

    def _train_on(self, trajectories: Sequence[Trajectory]) -> TrainResult:
        batch = ragged(trajectories)
        with self.clock.stage("train"):
            learned = self.learner.train(batch, minibatch_seed(self.config.seed, self.state.step))
        # The rank timed its own passes; what is left of the call (transport) stays under train.
        self.clock.add("logprobs", learned.seconds["logprobs"])
        self.clock.add("train", -learned.seconds["logprobs"])
        return learned

    def _why_idle(self, gathered: Gathered) -> str:
        if gathered.admitted:
            return (
                "no group had two samples with a reward. Fix: see the reasons above; the reward function or its "
                "workers fail."
            )
        return (
            f"{type(self.objective).__name__} admitted none of {len(gathered.records)} groups in {gathered.refills} "
            "refills. Fix: problems of another difficulty (all right or all wrong teaches nothing), more "
            "batch.samples, or more batch.refills."
        )

    def _publish(self) -> Published:
        self.state.version = (self.state.version[0], self.state.step)
        self._phase("sync")
        with self.clock.stage("sync"):
            return self.recovery.surviving(lambda: self.transfer.publish(self.state.version))

    def _rejoin(self) -> None:
        """New engines stand in for dead ones: at the current version, and with what was in flight issued anew."""
        for uid in list(self.state.ledger.in_flight):
            self.state.ledger.retry(uid)
        with suppress(ray.exceptions.RayActorError):  # another death: the next call meets it and comes back here
            self.transfer.publish(self.state.version)

    def _evaluate(self) -> None:
        with self.clock.stage("evaluate"):

            def rollouts(jobs: Sequence[Job], sampling: Sampling, what: str) -> RolloutResult:
                return self.recovery.surviving(lambda: self.rollouts(jobs, sampling, what))

            figures, drawn = evaluate(
                rollouts, self.held_out, self.config.evaluation.samples, self.sampling, self.config.seed,
                self.config.evaluation.greedy, getattr(self.task, "figures", None),
            )  # fmt: skip
            if line := unjudged(drawn):
                self._say(f"held out after step {self.state.step}: {line}")
            self.tracker.evaluation(self.state.step, figures)
            if self.state.summary.evaluated(self.state.step, figures):
                self.learner.write_model(self.folder / "best")

    def _record(self, gathered: Gathered, learned: TrainResult, published: Published) -> None:
        busy = self.recovery.surviving(self.rollouts.busy_seconds)
        judged = self.judge.figures(self.state.step, self.state.step == self.config.steps)
        row = step_row(gathered, learned, published, self.state.ledger, self.config.kv, busy, self.clock.close())
        row |= judged
        sampled = gathered.sampled
        trained = sum(gathered.admitted[number].length for number in learned.trained)
        self.state.summary.trained(row, sum(t.length for t in sampled), trained)
        self.tracker.log(self.state.step, row)
        if line := self.alarm.hear(row):
            self._say(f"step {self.state.step}: {line}")
        shown = sampled[:: max(1, len(sampled) // SAMPLES_SHOWN)][:SAMPLES_SHOWN]
        self.tracker.samples(self.state.step, [sample_row(t, gathered.records[t.group_id]) for t in shown])

    def _phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is going on. `debug.die_at=<step>:<phase>` ends the process here as kill -9 would (chaos tests)."""
        if self.config.debug.die_at == f"{self.state.step}:{name}":
            os.kill(os.getpid(), signal.SIGKILL)
        self.tracker.phase(name, done, total)

    def _say(self, line: str) -> None:
        self.tracker.console.message(line)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        self._phase("checkpoint")

        def save(path: str) -> None:
            self.learner.save(path)
            self._phase("commit")

        self.checkpoints.save(self.state.step, self.state.plain(), save)
        self.recovery.checkpointed()

    def _restore(self) -> bool:
        """Go where the newest checkpoint was: a run that is resumed and one that lost a learner rank alike. Without a
        checkpoint, to the beginning; returns False. Versions get a new incarnation, later rows are set aside."""
        spent = self.state.summary.state()["wall_seconds"]
        self._idle = 0
        self.state = self._beginning(manifest.next_incarnation(self.folder), spent)
        found = self.checkpoints.latest()
        if found is None:
            self.tracker.rollback(-1)
            return False
        saved, learner_file = found
        self.tracker.phase(f"resume from step {saved['step']}")
        self.tracker.rollback(saved["step"])
        self.learner.load(learner_file)
        self.state.restore(saved)
        return True

    def _beginning(self, incarnation: int, spent: float) -> RunState:
        return RunState.fresh(self.config, self.task, self.objective.prompt_sampler(), incarnation, spent)

    def interrupt(self) -> None:
        """Ask the run to stop after the step that is under way."""
        self._interrupted = True
        self._say("interrupted: finishing this step, then a checkpoint. Ctrl-C again stops at once.")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
