"""Turns through the real engine, worker and jail, on Ray: the tiny model's own sums, worked out for it."""

import numpy as np
import pytest

from rltk.rollout.actor import EngineActor
from rltk.rollout.engine import EngineOptions
from rltk.rollout.job import Job, Sampling
from rltk.rollout.tools.executor import ToolExecutor
from rltk.rollout.tools.options import AttcOptions, JailOptions, ToolOptions
from rltk.rollout.worker import RolloutWorker
from rltk.trajectory import Record, RewardRecord
from tests.integration.places import TINY
from tests.integration.turn_cases import EqualsSign

TOOLS = ToolOptions(
    name="python", use=["python"], total_tokens=200, output_tokens=24, jail=JailOptions(isolation="best_effort")
)
SAMPLING = Sampling(1.0, 48, 64)
PROBLEMS = ["What is 31 + 71 - 17 + 72?", "What is 99 - 19 - 13 + 88?", "What is 25 + 35 + 80 + 35 - 71?"]


class Worker(RolloutWorker):
    """Its model needs no teaching to use tools."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.format = EqualsSign()


class Judge:
    async def score(self, pairs, deadline, evaluation):
        return [RewardRecord(float(record.answer in t.answer_text), "scored") for t, record in pairs]


@pytest.fixture(scope="module")
def worker(ray_cluster):
    import ray

    options = EngineOptions(str(TINY), "float32", 313, "cpu", 16, kv_cache_gib=0.1, threads=1)
    engine = ray.remote(EngineActor).options(num_cpus=0.1, max_concurrency=64).remote(options)
    executor = ray.remote(ToolExecutor).options(num_cpus=0.1, max_concurrency=64).remote(TOOLS)
    judge = ray.remote(Judge).options(num_cpus=0).remote()
    deadlines = {"rollout": 120.0, "reward": 30.0}
    made = ray.remote(Worker).options(num_cpus=0.1).remote(
        str(TINY), [engine], [judge], deadlines, None, TOOLS, [executor], AttcOptions("eval")
    )  # fmt: skip
    ray.get([engine.ready.remote(), executor.ready.remote(), made.ready.remote()], timeout=200)
    return made


def jobs(each=4, partial=None):
    records = [Record(f"p{n}", ({"role": "user", "content": text},), "157") for n, text in enumerate(PROBLEMS)]
    made = [Job(f"{r.id}/{k}", r.id, r, 10 * n + k) for n, r in enumerate(records) for k in range(each)]
    return [Job(j.uid, j.group, j.record, j.seed, (partial or {}).get(j.uid)) for j in made]


def roll(worker, some, sampling=SAMPLING):
    import ray

    return ray.get(worker.rollout.remote(some, sampling), timeout=120)


@pytest.fixture(scope="module")
def rolled(worker):
    return roll(worker, jobs())


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def reference_logprobs(model, ids):
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_sums_are_worked_out_in_the_jail_and_every_log_prob_is_the_models(rolled, model):
    assert rolled.failed == {} and [t.uid for t in rolled.trajectories] == [j.uid for j in jobs()]
    uses = [use for t in rolled.trajectories for use in t.calls]
    assert len(uses) >= 8 and {use.status for use in uses} == {"ok"}
    for use in uses:
        assert int(use.output) == eval(use.code.removeprefix("print"))  # the very sum that the model wrote
    stop, checked = 0, 0
    for trajectory in rolled.trajectories:
        expected = reference_logprobs(model, trajectory.ids.tolist())[trajectory.mask[1:]]
        assert np.abs(expected - trajectory.logprobs).max() < 1e-4
        kinds = [segment.kind for segment in trajectory.segments]
        assert kinds == ["prompt", *["model", "tool"] * len(trajectory.calls), "model"]
        stop += sum(s.finish_reason == "stop" for s in trajectory.segments)
        checked += len(trajectory.logprobs)
    assert stop > len(rolled.trajectories) and checked > 100
    assert any(t.reward.value == 1.0 for t in rolled.trajectories)


def test_the_same_seeds_are_the_same_rollout_and_a_pause_changes_nothing(worker, rolled):
    """Paused while first turns run; what is left of each goes on, and ends as if it had never been paused."""
    import ray

    running = worker.rollout.remote(jobs(), SAMPLING)
    partial = {}
    while True:
        worker.pause.remote()
        done, _ = ray.wait([running], timeout=0.05)
        if done:
            break
    first = ray.get(running)
    partial = first.partial
    assert partial, "every trajectory was complete before the pause"
    left = [job for job in jobs(partial=partial) if job.uid in partial]
    again = {t.uid: t for t in (*first.trajectories, *roll(worker, left).trajectories)}
    assert len(again) == len(rolled.trajectories)
    for trajectory in rolled.trajectories:
        other = again[trajectory.uid]
        assert other.ids.tolist() == trajectory.ids.tolist() and other.text == trajectory.text
        assert np.abs(other.logprobs - trajectory.logprobs).max() < 1e-5
        assert [use.code for use in other.calls] == [use.code for use in trajectory.calls]


def test_an_evaluation_with_attc_follows_each_result_with_a_sentence(worker):
    result = roll(worker, jobs(each=2), Sampling(1.0, 48, 64, evaluation=True))
    assert result.failed == {}
    met = [t.notes["attc"] for t in result.trajectories]
    said = sum(segment.kind == "control" for t in result.trajectories for segment in t.segments)
    assert said == sum(n["trusted"] + n["reconsidered"] for n in met) - sum(
        t.notes["control"]["left_out"] for t in result.trajectories
    )
    calls = sum(len(t.calls) for t in result.trajectories)
    assert said > 0 and sum(len(n["confidence"]) + n["unscorable"] for n in met) == calls
    assert all(0 < value <= 1 for n in met for value in n["confidence"])
