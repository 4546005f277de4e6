"""The driver: a plain loop that decides what happens next. It owns no tensors.

    ledger --jobs--> rollout pool --trajectories--> rewards --scored groups--> learner --weights--> engines
       ^                                                                                              |
       +------------- committed with every checkpoint <---- evaluate, checkpoint <--------------------+

Synchronous (max_staleness = 0): every step samples with the weights that the step before made.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import ray

from rltk import watch
from rltk.checkpoint import Checkpoints
from rltk.config import Config
from rltk.errors import MismatchError, RltkError
from rltk.evaluation import evaluate
from rltk.interrupt import first_interrupt_calls
from rltk.learner.packing import ragged
from rltk.learner.settings import TrainResult
from rltk.ledger import Ledger
from rltk.metrics import LearnedArrays, step_metrics
from rltk.placement import Placement
from rltk.pool import RolloutPool
from rltk.roles import Roles, replace_dead
from rltk.rollout.worker import Job, RolloutResult, Sampling
from rltk.summary import Summary
from rltk.sync.probe import LENGTH, TEXTS, TOLERANCE
from rltk.sync.shared_memory import Published, SharedMemoryTransfer
from rltk.tasks import Task
from rltk.time_ledger import TimeLedger
from rltk.tracker import Tracker, sample_row
from rltk.trajectory import Record, Trajectory

PATIENCE = 3  # steps in a row without anything to learn from, before that is an error
RECOVERIES = 3  # of dead engines, within one rollout
T = TypeVar("T")
SAMPLES_SHOWN = 4  # trajectories a step in samples.jsonl


class Driver:
    """One run. `run()` trains to the end, or to an interrupt, and returns the summary's status."""

    def __init__(
        self,
        config: Config,
        placement: Placement,
        folder: Path,
        task: Task,
        tracker: Tracker,
        roles: Roles,
        run_id: str,
        incarnation: int,
    ) -> None:
        assert roles.learner is not None
        self.config, self.placement, self.folder = config, placement, folder
        self.task, self.tracker, self.roles, self.learner = task, tracker, roles, roles.learner
        self.clock = TimeLedger()
        self.rollouts = RolloutPool(roles, config.deadlines, self._phase)
        self.sampling = Sampling(
            config.rollout.temperature, config.task.max_prompt_tokens, config.task.max_response_tokens
        )
        texts = watch.get(roles.workers[0].encode.remote(TEXTS), "encode the probe", "driver", "rollout worker", 60)
        room = config.task.max_prompt_tokens + config.task.max_response_tokens
        probe = [ids[: min(LENGTH, room)] for ids in texts]
        self.transfer = SharedMemoryTransfer(
            self.learner, roles.engines, run_id, probe, _tolerance(config), config.deadlines.sync
        )
        self.checkpoints = Checkpoints(folder, config.checkpoint.keep)
        self.ledger = Ledger(config.seed, task.size)
        self.step, self.version = 0, (incarnation, 0)
        self.summary = Summary(config)
        self.held_out: list[Record] = []
        self._interrupted = False
        self._busy = [0.0] * len(roles.engines)
        self._idle = 0  # steps in a row without a trained sample

    def run(self) -> str:
        """Train. Returns "finished" or "interrupted"; whatever fails is raised, with the last checkpoint in place."""
        with first_interrupt_calls(self.interrupt):
            self.held_out = self.task.held_out(self.config.evaluation.problems)
            resumed = self._restore()
            self._publish()
            if not resumed:
                self._evaluate()
                self._checkpoint()
            while self.step < self.config.steps and not self._interrupted:
                self.train_step()
            if self._interrupted and self.step < self.config.steps:
                if self.step not in self.checkpoints.steps():
                    self._checkpoint()
                return "interrupted"
            self._phase("write the model")
            self._write_model("model")
            return "finished"

    # -- a step ------------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        self.step += 1
        issues = self.ledger.issue(self.config.batch.prompts, self.config.batch.samples)
        records = {issue.group: self.task.problem(issue.index) for issue in issues}
        rolled = self._rollout(records)
        trajectories = self._account(rolled)
        learned = self._learn(trajectories)
        published = self._publish()
        last = self.step == self.config.steps
        if last or _due(self.step, self.config.evaluation.every):
            self._evaluate()
        self._record(trajectories, learned, rolled, published, records)
        if last or _due(self.step, self.config.checkpoint.every):
            self._checkpoint()

    def _rollout(self, records: dict[str, Record]) -> RolloutResult:
        """Sample and score what the ledger has in flight."""

        def roll() -> RolloutResult:
            flying = self.ledger.in_flight.values()
            jobs = [Job(i.uid, i.group, records[i.group], i.seed(self.config.seed)) for i in flying]
            return self.rollouts(jobs, self.sampling)

        result = self._surviving(roll)
        self.clock.add("generate", result.generate_seconds)
        self.clock.add("reward", result.reward_seconds)
        return result

    def _surviving(self, call: Callable[[], T]) -> T:
        """`call()`, again if an engine dies in it: a new one joins at the current version, what was in flight is issued
        anew. A request's seed does not know of the attempt, so the run goes on as if nothing had happened."""
        for left in reversed(range(RECOVERIES + 1)):
            try:
                return call()
            except ray.exceptions.RayActorError as error:
                if not left:
                    raise
                self._replace_engines(error)
        raise AssertionError("unreachable")

    def _replace_engines(self, error: ray.exceptions.RayActorError) -> None:
        """Raises `error` if it was not an engine that died: another role's death ends the run at its checkpoint."""
        self.tracker.console.message(f"an actor died ({type(error).__name__}): replacing dead engines")
        replaced = replace_dead(self.roles, self.config, self.placement)
        if not replaced:
            raise error
        self.transfer.engines = list(self.roles.engines)
        for number in replaced:
            self._busy[number] = 0.0
        for uid in list(self.ledger.in_flight):
            self.ledger.retry(uid)
        with suppress(ray.exceptions.RayActorError):  # another death: the next call meets it and comes back here
            self.transfer.publish(self.version)

    def _account(self, rolled: RolloutResult) -> list[Trajectory]:
        """Enter what came back into the ledger. Samples that cannot be used end here, each with its reason."""
        for uid in rolled.failed:
            self.ledger.drop(uid, "broken sample")
        for trajectory in rolled.trajectories:
            self.ledger.score(trajectory.uid)
        if self.ledger.in_flight:
            raise MismatchError(
                f"{len(self.ledger.in_flight)} samples never came back: {list(self.ledger.in_flight)[:3]}"
            )
        self._say("unusable", list(rolled.failed.values()))
        unknown = [t.reward.reason for t in rolled.trajectories if t.reward is not None and t.reward.value is None]
        self._say("without a reward, and left out,", unknown)
        if self.config.debug.permute_rewards:
            return _permuted(rolled.trajectories, self.config.seed, self.step)
        return rolled.trajectories

    def _say(self, what: str, reasons: list[str]) -> None:
        if reasons:
            self.tracker.console.message(f"step {self.step}: {len(reasons)} samples {what} first: {reasons[0]}")

    def _learn(self, trajectories: list[Trajectory]) -> TrainResult:
        if not trajectories:
            raise RltkError("every sample of this step was unusable; the first reason is above")
        self._phase("train")
        batch = ragged(trajectories)
        with self.clock.stage("train"):
            learned = self.learner.train(batch, _seed(self.config.seed, self.step))
        self._idle = 0 if learned.trained else self._idle + 1
        if self._idle == PATIENCE:
            raise RltkError(
                f"{PATIENCE} steps in a row had nothing to learn from: no group had two samples with a "
                "reward. Fix: see the reasons above; the reward function or its workers fail."
            )
        # The rank timed its own passes; what is left of the call (transport) stays under train.
        self.clock.add("logprobs", learned.seconds["logprobs"])
        self.clock.add("train", -learned.seconds["logprobs"])
        trained = set(learned.trained)
        for number, trajectory in enumerate(trajectories):
            if number in trained:
                self.ledger.train(trajectory.uid)
            else:
                masked = trajectory.reward is None or trajectory.reward.value is None
                reason = "reward unknown" if masked else "group too small"
                self.ledger.drop(trajectory.uid, reason, trajectory.length)
        return learned

    def _publish(self) -> Published:
        self.version = (self.version[0], self.step)
        self._phase("sync")
        with self.clock.stage("sync"):
            return self._surviving(lambda: self.transfer.publish(self.version))

    def _evaluate(self) -> None:
        with self.clock.stage("evaluate"):

            def rollouts(jobs: Sequence[Job], sampling: Sampling, what: str) -> RolloutResult:
                return self._surviving(lambda: self.rollouts(jobs, sampling, what))

            figures, _ = evaluate(
                rollouts, self.held_out, self.config.evaluation.samples, self.sampling, self.config.seed,
                self.config.evaluation.greedy,
            )  # fmt: skip
            self.tracker.evaluation(self.step, figures)
            if self.summary.evaluated(self.step, figures):
                self._write_model("best")

    def _record(
        self,
        trajectories: list[Trajectory],
        learned: TrainResult,
        rolled: RolloutResult,
        published: Published,
        records: dict[str, Record],
    ) -> None:
        levels = [records[t.group_id].level for t in trajectories]
        row = step_metrics(trajectories, LearnedArrays(learned.old, learned.new, learned.entropy), levels)
        row |= learned.metrics
        for name in ("log_rho", "log_ratio"):
            if f"{name}/square" in row:
                row[f"{name}/sd"] = max(0.0, row.pop(f"{name}/square") - row[f"{name}/mean"] ** 2) ** 0.5
        row |= {"probe/max": published.probe.largest, "probe/mean": published.probe.mean}
        row |= {"weight_version": float(self.step), "failed": float(len(rolled.failed))}
        row |= {f"dropped/{reason}": float(count) for reason, count in self.ledger.dropped.items()}
        busy = self._vllm_seconds()
        times = self.clock.close()
        inside = busy + learned.seconds["deepspeed"]
        row["overhead"] = max(0.0, 1.0 - inside / times["time/step"])  # neither in vLLM nor in DeepSpeed
        sampled = sum(t.length for t in trajectories)
        row |= times
        row["tokens_per_s/rollout"] = sampled / max(times["time/generate"], 1e-9)
        row["tokens_per_s/learner"] = learned.tokens / max(times["time/train"] + times["time/logprobs"], 1e-9)
        self.summary.trained(row, sampled, sum(trajectories[i].length for i in learned.trained))
        self.tracker.log(self.step, row)
        shown = trajectories[:: max(1, len(trajectories) // SAMPLES_SHOWN)][:SAMPLES_SHOWN]
        self.tracker.samples(self.step, [sample_row(t, records[t.group_id]) for t in shown])

    def _vllm_seconds(self) -> float:
        """Seconds since the last call that an engine spent inside vLLM; of the busiest, as engines run side by side."""

        def ask() -> list[dict[str, float]]:
            return watch.get(
                [e.stats.remote() for e in self.roles.engines], "statistics", "driver", "rollout engines", 30
            )

        stats = self._surviving(ask)
        before, self._busy = self._busy, [s["busy_seconds"] for s in stats]
        return max(now - then for now, then in zip(self._busy, before, strict=True))

    def _phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is going on. `debug.die_at=<step>:<phase>` ends the process here as kill -9 would (chaos tests)."""
        if self.config.debug.die_at == f"{self.step}:{name}":
            os.kill(os.getpid(), signal.SIGKILL)
        self.tracker.phase(name, done, total)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        self._phase("checkpoint")
        state = {
            "step": self.step,
            "version": list(self.version),
            "ledger": self.ledger.state(),
            "summary": self.summary.state(),
        }

        def save(path: str) -> None:
            self.learner.save(path)
            self._phase("commit")

        self.checkpoints.save(self.step, state, save)

    def _write_model(self, name: str) -> None:
        """The weights as a Hugging Face folder of that name. At any instant it or `<name>.old` is whole."""
        final, partial = self.folder / name, self.folder / f"{name}.partial"
        old = self.folder / f"{name}.old"
        shutil.rmtree(partial, ignore_errors=True)
        self.learner.save_hugging_face(str(partial))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def _restore(self) -> bool:
        """Go on from the newest checkpoint, if the run is a resumed one and has any."""
        found = self.checkpoints.latest() if self.config.resume == "auto" else None
        if found is None:
            self.tracker.rollback(-1)  # killed before its first checkpoint: whatever it wrote is set aside
            return False
        state, learner_file = found
        self.tracker.phase(f"resume from step {state['step']}")
        self.tracker.rollback(state["step"])
        self.learner.load(learner_file)
        self.step = state["step"]
        self.version = (self.version[0], state["step"])
        self.ledger = Ledger.restore(state["ledger"])
        self.summary.restore(state["summary"])
        return True

    def interrupt(self) -> None:
        """Ask the run to stop after the step that is under way."""
        self._interrupted = True
        self.tracker.console.message("interrupted: finishing this step, then a checkpoint. Ctrl-C again stops at once.")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _seed(run_seed: int, step: int) -> int:
    """The minibatch shuffle's seed: a function of run and step, so that a resumed run shuffles alike."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/minibatch/{step}".encode(), digest_size=8).digest(), "big")


def _tolerance(config: Config) -> tuple[float, float]:
    """Of the probe. The looser of the two sides' precisions counts."""
    loose = "bfloat16" if "bfloat16" in (config.rollout.dtype, config.learner.dtype) else "float32"
    largest, mean = TOLERANCE[loose]
    return config.sync.probe_max or largest, config.sync.probe_mean or mean


def _permuted(trajectories: list[Trajectory], seed: int, step: int) -> list[Trajectory]:
    """The control: rewards dealt out anew over the whole batch, so that they say nothing about the sample."""
    from dataclasses import replace

    order = np.random.default_rng(_seed(seed, step)).permutation(len(trajectories))
    return [replace(t, reward=trajectories[other].reward) for t, other in zip(trajectories, order, strict=True)]
