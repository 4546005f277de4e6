"""A stack of runs from start to end: sample, score, learn, evaluate; the same order of things as the driver's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rltk.lab.arm import Arm, Settings
from rltk.lab.data import Problems, Rolled, score, with_label_errors
from rltk.lab.learner import StackLearner
from rltk.lab.model import Weights, load
from rltk.lab.sampler import Sampler
from rltk.rollout.tokens import load_tokenizer, render_prompt, stop_ids
from rltk.seeds import minibatch_seed
from rltk.statistics import evaluate_summary
from rltk.tasks import Task
from rltk.trajectory import RewardRecord


class Lab:
    """Arms side by side. `run()` yields each training step's metrics, one mapping an arm."""

    def __init__(self, task: Task, arms: Sequence[Arm], settings: Settings, prompt: int, response: int) -> None:
        """`prompt`, `response`: the longest allowed, in tokens."""
        self.task, self.arms, self.settings = task, list(arms), settings
        self.tokenizer = load_tokenizer(settings.model)
        device = torch.device("cuda" if settings.device == "gpu" else "cpu")
        self.shape, self.weights = load(settings.model, len(self.arms), device)
        self.learner = StackLearner(self.shape, self.weights, self.arms, settings, response)
        self.problems = [Problems(task, self.tokenizer, arm.seed) for arm in self.arms]
        stop = stop_ids(self.tokenizer, settings.model)

        def sampler(rows: int, **cache: Any) -> Sampler:
            return Sampler(self.shape, self.weights, rows, prompt, response, stop, **cache)

        self.sampler = sampler(settings.prompts * settings.samples, kv_bits=settings.kv_bits, kv=settings.kv)
        self.held_out = task.held_out(settings.problems)
        self.judge = sampler(len(self.held_out) * settings.eval_samples)
        self.greedy = sampler(len(self.held_out))
        self.history: deque[Weights] = deque(maxlen=1 + max(arm.staleness for arm in self.arms))
        self.step = 0

    def run(self) -> Iterator[list[dict[str, Any]]]:
        """Rows of steps 0 (only the evaluation before training) to `settings.steps`."""
        yield self.evaluate()
        while self.step < self.settings.steps:
            rows = self.train_step()
            every = self.settings.evaluate_every
            if self.step == self.settings.steps or (every and self.step % every == 0):
                rows = [row | held for row, held in zip(rows, self.evaluate(), strict=True)]
            yield rows

    def train_step(self) -> list[dict[str, Any]]:
        """Sample with the weights that each arm's staleness allows, and learn: `minibatches` optimizer steps."""
        self.step += 1
        self.remember()
        rolled = self._misjudged(self.roll())
        batches = [rolled.ragged(run, self.settings.samples, o) for run, o in enumerate(self.learner.objectives)]
        seeds = [minibatch_seed(arm.seed, self.step) for arm in self.arms]
        every = self.settings.noise_every
        learned = self.learner.train(batches, seeds, bool(every) and self.step % every == 1 % every)
        return [
            {"step": self.step, **_figures(rolled, run), **metrics, "broken": self.learner.broken[run] is not None}
            for run, metrics in enumerate(learned)
        ]

    def remember(self) -> None:
        """The weights as they are now become the newest version; what no arm's staleness reaches is forgotten."""
        self.history.append({name: value.detach().clone() for name, value in self.weights.items()})

    def roll(self) -> Rolled:
        """A training batch of every arm, scored; sampled from the remembered weights."""
        drawn = [problems.take(self.settings.prompts, self.settings.samples) for problems in self.problems]
        records, prompts, seeds = ([d[i] for d in drawn] for i in range(3))
        samples = self.sampler(self._stale(), prompts, seeds, self.settings.temperature)
        return Rolled(records, prompts, samples, score(self.task, self.tokenizer, records, samples))

    def _misjudged(self, rolled: Rolled) -> Rolled:
        """With the labels that each arm's judge would give."""
        rewards = [
            with_label_errors(found, arm.label_miss, arm.label_alarm, minibatch_seed(arm.seed, self.step))
            if arm.label_miss or arm.label_alarm
            else found
            for arm, found in zip(self.arms, rolled.rewards, strict=True)
        ]
        return replace(rolled, rewards=rewards)

    def _stale(self) -> Weights:
        """Each arm's weights as of `staleness` versions ago, or the first ones before there are as many."""
        newest = self.history[-1]
        mixed = {name: value.clone() for name, value in newest.items()} if len(self.history) > 1 else newest
        for age in sorted({arm.staleness for arm in self.arms} - {0}):
            runs = torch.tensor([run for run, arm in enumerate(self.arms) if arm.staleness == age])
            old = self.history[max(0, len(self.history) - 1 - age)]
            for name, value in mixed.items():
                value[runs] = old[name][runs]
        return mixed

    def evaluate(self) -> list[dict[str, Any]]:
        """Held-out figures of every arm, by its own samples and greedily; with a full cache."""
        n, runs = self.settings.eval_samples, len(self.arms)
        prompts = [render_prompt(self.tokenizer, record.messages) for record in self.held_out]
        records = [r for r in self.held_out for _ in range(n)]
        drawn = self.judge(
            self.weights, [[p for p in prompts for _ in range(n)]] * runs, [arm.seed for arm in self.arms],
            self.settings.temperature,
        )  # fmt: skip
        likeliest = self.greedy(self.weights, [prompts] * runs, [0] * runs, greedy=True)
        sampled = score(self.task, self.tokenizer, [records] * runs, drawn)
        greedy = score(self.task, self.tokenizer, [self.held_out] * runs, likeliest)
        rolled = Rolled([records] * runs, [[p for p in prompts for _ in range(n)]] * runs, drawn, sampled)
        far = self.learner.distance([rolled.ragged(run, n) for run in range(runs)])
        return [
            {"step": self.step, **self._summary(s, g), "kl/start": kl}
            for s, g, kl in zip(sampled, greedy, far, strict=True)
        ]

    def _summary(self, sampled: list[RewardRecord], greedy: list[RewardRecord]) -> dict[str, Any]:
        n = self.settings.eval_samples
        groups = [sampled[i : i + n] for i in range(0, len(sampled), n)]
        figures = evaluate_summary(
            [[r.correct for r in group] for group in groups],
            [record.level for record in self.held_out],
            [r.correct for r in greedy],
            [[r.flawed for r in group] for group in groups],
        )
        return {"accuracy": figures[f"avg@{n}"], "greedy": figures["greedy"], "flawed": figures.get("flawed"),
                "levels": {level: row[f"avg@{n}"] for level, row in figures["levels"].items()}}  # fmt: skip


def _figures(rolled: Rolled, run: int) -> dict[str, float]:
    """What the samples of one run say by themselves."""
    rewards = rolled.rewards[run]
    right = [r for r in rewards if r.correct]
    return {
        "reward": float(np.mean([np.nan if r.value is None else r.value for r in rewards])),
        "accuracy/train": len(right) / len(rewards),
        "flawed/train": sum(bool(r.flawed) for r in right) / max(1, len(right)),
        "length": float(rolled.samples.length[run].mean()),
        "truncated": float(rolled.samples.truncated[run].mean()),
    }
