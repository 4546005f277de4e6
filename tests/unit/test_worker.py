"""RolloutWorker without Ray: what it asks of engines, tools and reward workers, and in which order."""

import asyncio
import types
from dataclasses import replace

import numpy as np
import pytest

from rltk.errors import ConfigError
from rltk.rollout import worker as worker_module
from rltk.rollout.engine import Completion, Request
from rltk.rollout.job import Job, Sampling
from rltk.rollout.tools.executor import ToolExecutor
from rltk.rollout.tools.options import DtsrOptions, ToolOptions
from rltk.rollout.tools.types import ToolResult
from rltk.rollout.worker import RolloutWorker
from rltk.trajectory import Record, RewardRecord
from tests.integration.places import TINY
from tests.unit.some_tokenizers import QWEN, THINKING
from tests.unit.turning import CODE, completion

ANSWER = "\\boxed{42}"
SAMPLING = Sampling(1.0, 48, 96)
PYTHON = ToolOptions(name="python", use=["python"])


class Remote:
    """A method of an actor: `.remote(...)`, and `.options(...).remote(...)` for streams."""

    def __init__(self, method):
        self._method = method

    def options(self, **given):
        assert given == {"num_returns": "streaming"}
        return self

    def remote(self, *arguments):
        made = self._method(*arguments)
        return asyncio.ensure_future(made) if asyncio.iscoroutine(made) else made


class Engine:
    """`say(request)` makes each completion; those asked for together come back together."""

    def __init__(self, say, version=(0, 0)):
        self.say, self.version = say, version
        self.first, self.extended, self.closed = [], [], 0
        self._done = {}
        self.generate, self.extend = Remote(self._generate), Remote(self._extend)
        self.close, self.stacks = Remote(self._close), Remote(self._stacks)

    def _complete(self, requests):
        return [replace(self.say(request), weight_version=self.version) for request in requests]

    async def _generate(self, requests, channel=None):
        self.first.append((list(requests), channel))
        done = self._done[channel] = asyncio.Queue()
        if requests:
            done.put_nowait(self._complete(requests))
        while batch := await done.get():
            yield self._come(batch)
            if channel is None:
                return

    async def _come(self, batch):
        await asyncio.sleep(0)
        return batch

    async def _extend(self, channel, requests):
        self.extended.append(list(requests))
        self._done[channel].put_nowait(self._complete(requests))

    async def _close(self, channel):
        self.closed += 1
        self._done[channel].put_nowait(None)

    async def _stacks(self):
        return ""


class Scorer:
    """A reward worker: 1.0 for everything, and a word for whoever waits for it."""

    def __init__(self):
        self.scored, self.score = [], Remote(self._score)

    async def _score(self, pairs, deadline, evaluation):
        self.scored += [trajectory.uid for trajectory, _ in pairs]
        return [RewardRecord(1.0, "scored") for _ in pairs]


class Executor:
    def __init__(self, run):
        self.call, self.stacks = Remote(run), Remote(self._stacks)

    async def _stacks(self):
        return ""


def worker(engines, run=None, tools=PYTHON, **more):
    scorer = Scorer()
    executors = [Executor(run)] if run else []
    deadlines = {"rollout": 20.0, "reward": 20.0}
    return RolloutWorker(str(TINY), engines, [scorer], deadlines, None, tools, executors, **more), scorer


def jobs(count, groups=1):
    records = [Record(f"p{g}", ({"role": "user", "content": f"What is {g} + 1?"},), "42") for g in range(groups)]
    return [Job(f"u{n}", f"g{n * groups // count}", records[n * groups // count], seed=7 + n) for n in range(count)]


def by_turns(*texts):
    """The text by the number of the request: first, after one result, ..."""

    def say(request):
        made = running.settings
        return completion(request, made, texts[min(int(request.uid.rpartition("/")[2]), len(texts) - 1)])

    class running:
        settings = None

    say.running = running
    return say


def roll(chosen, some, sampling=SAMPLING):
    for engine in chosen.engines:
        if hasattr(engine.say, "running"):
            engine.say.running.settings = chosen._settings(sampling)
    results = []

    async def scene():  # returns nothing: asyncio.run looks at the result's repr, which takes longer than the rollout
        results.append(await asyncio.wait_for(chosen.rollout(some, sampling), 60))

    asyncio.run(scene())
    return results[0]


async def forty_two(request):
    return ToolResult("ok", "42")


# -- one turn --------------------------------------------------------------------------------------------------------


def test_without_tools_an_engine_is_asked_what_it_always_was():
    """One request a job, in their order, contiguous shares, the jobs' own ids and seeds; and no strings to stop at."""

    def say(request):
        return Completion(request.uid, np.asarray([30, 2]), np.float32([-0.5, -0.25]), "stop", (0, 0))

    engines = [Engine(say), Engine(say)]
    for more in ({}, {"dtsr": DtsrOptions("eval")}):  # which acts in evaluations alone
        chosen, scorer = worker(engines, tools=ToolOptions(), **more)
        some = jobs(5, groups=2)
        result = roll(chosen, some)
        prompts = [chosen.tokenizer.encode(f"<|im_start|>user\nWhat is {g} + 1?<|im_end|>\n<|im_start|>assistant\n")
                   for g in (0, 1)]  # fmt: skip
        expected = [Request(j.uid, prompts[int(j.record.id[1])], 96, 1.0, j.seed, (2,)) for j in some]
        assert [engine.first.pop() for engine in engines] == [(expected[:3], None), (expected[3:], None)]
        assert not any(engine.extended or engine.closed for engine in engines)
        assert [t.uid for t in result.trajectories] == [j.uid for j in some] and sorted(scorer.scored) == sorted(
            j.uid for j in some
        )
        first = result.trajectories[0]
        assert first.ids.tolist() == [*prompts[0], 30, 2] and first.text == chosen.tokenizer.decode([30])
        assert (first.response, first.calls, first.notes, result.partial) == ("", (), {}, {})
        assert first.reward.value == 1.0


class Trickles(Engine):
    """One sample at a time: after each, `between` is awaited."""

    between = None

    async def _generate(self, requests, channel=None):
        for request in requests:
            yield self._come(self._complete([request]))
            await self.between()


def one_token(request):
    return Completion(request.uid, np.asarray([30, 2]), np.float32([-0.5, -0.25]), "stop", (0, 0))


def test_a_sample_is_scored_while_others_are_still_being_sampled():
    engine = Trickles(one_token)
    chosen, scorer = worker([engine], tools=ToolOptions())

    async def until_scored():
        asked = chosen.progress()[0]
        while len(scorer.scored) < asked:
            await asyncio.sleep(0)

    engine.between = until_scored
    assert len(roll(chosen, jobs(4)).trajectories) == 4 and scorer.scored == ["u0", "u1", "u2", "u3"]


def test_what_is_being_scored_is_given_up_with_the_rollout(monkeypatch):
    """Or a judge reads on for samples that nobody will learn from."""
    monkeypatch.setattr(worker_module.ray, "cancel", lambda reference: reference.cancel())
    engine, events = Trickles(one_token), []
    chosen, scorer = worker([engine], tools=ToolOptions())

    async def judged_for_long(*asked):
        events.append("asked")
        try:
            await asyncio.sleep(3600)
        finally:
            events.append("given up")

    async def fails_once_one_is_asked():
        while not events:
            await asyncio.sleep(0)
        raise ConnectionError("the engine died")

    scorer.score, engine.between = Remote(judged_for_long), fails_once_one_is_asked

    async def scene():
        with pytest.raises(ConnectionError, match="the engine died"):
            await chosen.rollout(jobs(2), SAMPLING)
        for _ in range(100):
            await asyncio.sleep(0)
        return events

    assert asyncio.run(scene()) == ["asked", "given up"]


def test_a_template_that_looks_ahead_will_do_where_nothing_is_appended(tmp_path):
    (tmp_path / "template").write_text(THINKING)

    def made(*options):
        return RolloutWorker(str(TINY), [], [], {"rollout": 20.0}, str(tmp_path / "template"), *options)

    assert made(ToolOptions()).stop_ids == (2,)
    for options in ([PYTHON], [ToolOptions(), (), None, DtsrOptions("eval")]):
        with pytest.raises(ConfigError, match="not append-only"):
            made(*options)


def test_a_prompt_over_its_limit_names_the_key():
    chosen, _ = worker([Engine(lambda request: None)], tools=ToolOptions())
    with pytest.raises(ConfigError, match=r"over task\.max_prompt_tokens=4"):
        roll(chosen, jobs(1), Sampling(1.0, 4, 8))


# -- turns -----------------------------------------------------------------------------------------------------------


def test_first_turns_are_added_in_the_order_of_the_jobs_and_later_ones_to_the_same_engine_together():
    engines = [Engine(by_turns(CODE.format("6 * 7"), ANSWER)), Engine(by_turns(CODE.format("6 * 7"), ANSWER))]
    chosen, scorer = worker(engines, forty_two)
    some = jobs(40, groups=4)
    result = roll(chosen, some)
    assert result.failed == {} == result.partial
    assert [t.uid for t in result.trajectories] == [j.uid for j in some] and len(scorer.scored) == 40
    for number, engine in enumerate(engines):
        mine = [j.uid for j in some[20 * number : 20 * number + 20]]
        ((first, channel),) = engine.first
        assert [r.uid for r in first] == [f"{uid}/0" for uid in mine] and channel is not None
        assert all(r.stops == ("```output",) for r in first)
        assert sorted(r.uid for batch in engine.extended for r in batch) == sorted(f"{uid}/1" for uid in mine)
        assert len(engine.extended) == 1 and engine.closed >= 1
    for trajectory in result.trajectories:
        assert [s.kind for s in trajectory.segments] == ["prompt", "model", "tool", "model"]
        assert trajectory.reward.value == 1.0 and trajectory.calls[0].output == "42"
    assert chosen.progress() == (40, 40)


def test_thousands_are_in_flight_and_a_slow_tool_keeps_none_of_the_others_waiting():
    """No call ends before every trajectory has one under way; that of one ends when all others have been scored."""
    count, under_way = 2048, set()
    everyone, others = asyncio.Event(), asyncio.Event()

    async def run(request):
        under_way.add(request.trajectory)
        if len(under_way) == count:
            everyone.set()
        await (others if request.trajectory == "u3" else everyone).wait()
        return ToolResult("ok", "42")

    engine = Engine(by_turns(CODE.format(1), CODE.format(2), ANSWER))
    chosen, scorer = worker([engine], run)
    score = scorer._score

    async def tells(*asked):
        found = await score(*asked)
        if len(scorer.scored) == count - 1:
            others.set()
        return found

    scorer.score = Remote(tells)
    result = roll(chosen, jobs(count))
    assert len(result.trajectories) == count and scorer.scored[-1] == "u3"
    assert all(len(t.calls) == 2 for t in result.trajectories)
    assert len(engine.extended) < 10  # what came in one tick goes to the engine together


def test_a_trajectory_past_its_own_deadline_is_masked_and_the_others_are_scored(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("rltk.rollout.loop.time", clock)

    async def run(request):
        assert 200 < request.wait_s <= 300  # for a place: as long as the trajectory may live
        while request.trajectory == "u1" and len(scorer.scored) < 3:
            await asyncio.sleep(0)
        clock.now += 301.0 if request.trajectory == "u1" else 0.0
        return ToolResult("ok", "42")

    chosen, scorer = worker([Engine(by_turns(CODE.format(1), ANSWER))], run, replace(PYTHON, deadline_s=300.0))
    late, *rest = sorted(roll(chosen, jobs(4)).trajectories, key=lambda t: t.uid != "u1")
    assert late.reward.value is None and late.reward.detail == {"cause": "deadline"}
    assert late.notes["turns"]["ended"] == "deadline" and [use.status for use in late.calls] == ["ok"]
    assert sorted(scorer.scored) == ["u0", "u2", "u3"] and all(t.reward.value == 1.0 for t in rest)


def test_what_fails_ends_alone_and_says_why(monkeypatch):
    from rltk.rollout.tools import client

    monkeypatch.setattr(client, "PAUSE_S", 0.0)

    async def run(request):
        return ToolResult("infra_error", "no jail") if request.trajectory == "u1" else ToolResult("ok", "42")

    plain = by_turns(CODE.format(1), ANSWER)

    def say(request):
        said = plain(request)
        return replace(said, logprobs=said.logprobs[:-1]) if request.uid == "u2/1" else said

    say.running = plain.running
    chosen, scorer = worker([Engine(say)], run)
    result = roll(chosen, jobs(4))
    assert [t.uid for t in result.trajectories] == ["u0", "u3"] == sorted(scorer.scored)
    assert "no jail" in result.failed["u1"] and "log-probs of shape" in result.failed["u2"]


def test_an_engine_that_fails_ends_the_rollout_with_its_error():
    class Broken(Exception):
        pass

    class Dies(Engine):
        async def _extend(self, channel, requests):
            raise Broken("out of memory")

    engines = [Dies(by_turns(CODE.format(1), ANSWER)), Engine(by_turns(CODE.format(1), ANSWER))]
    chosen, _ = worker(engines, forty_two)
    with pytest.raises(Broken, match="out of memory"):
        roll(chosen, jobs(4))
    assert all(engine.closed for engine in engines)
    engines[0] = Engine(engines[0].say)
    chosen.set_engines(engines)
    assert len(roll(chosen, jobs(4)).trajectories) == 4  # and the worker is as good as before


def test_a_paused_rollout_goes_on_under_other_weights():
    """No turn begins after the pause, no call is cut off, and what comes of it is what would have come."""
    texts = (CODE.format(1), CODE.format(2), ANSWER)
    chosen, _ = worker([Engine(by_turns(*texts))], forty_two)
    whole = {t.uid: t for t in roll(chosen, jobs(3)).trajectories}

    async def run(request):
        if request.trajectory == "u1" and request.turn == 0:
            chosen.pause()
            await asyncio.sleep(0.05)
        return ToolResult("ok", "42")

    engine = Engine(by_turns(*texts))
    chosen, scorer = worker([engine], run)
    first = roll(chosen, jobs(3))
    assert set(first.partial) == {"u0", "u1", "u2"} and not first.trajectories and not scorer.scored
    engine.version = (0, 1)
    second = roll(chosen, [replace(job, partial=first.partial[job.uid]) for job in jobs(3)])
    assert second.partial == {} and [t.uid for t in second.trajectories] == ["u0", "u1", "u2"]
    for trajectory in second.trajectories:
        versions = [s.weight_version for s in trajectory.segments if s.kind == "model"]
        assert versions == [(0, 0), (0, 1), (0, 1)] and trajectory.version == (0, 0)
        same = whole[trajectory.uid]
        assert trajectory.ids.tolist() == same.ids.tolist() and trajectory.calls == same.calls
        assert trajectory.logprobs.tolist() == same.logprobs.tolist()
    chosen.pause()  # of nothing
    assert len(roll(chosen, jobs(1)).trajectories) == 1


@pytest.mark.parametrize("evaluation", [False, True])
def test_void_turns_are_dropped_from_learning_alone(evaluation):
    tools = replace(PYTHON, void_turns="drop")
    chosen, scorer = worker([Engine(by_turns("I give up."))], forty_two, tools)
    (trajectory,) = roll(chosen, jobs(1), replace(SAMPLING, evaluation=evaluation)).trajectories
    assert scorer.scored == (["u0"] if evaluation else [])
    assert trajectory.reward.value == (1.0 if evaluation else None)
    assert evaluation or trajectory.reward.detail == {"cause": "void_turn"}


def test_dtsr_works_by_turns_where_it_acts_and_without_tools():
    dtsr = DtsrOptions("eval", gap_tokens=1, opens="")

    def say(request):
        made = chosen._settings(SAMPLING)
        if request.uid.endswith("/question"):
            return completion(request, made, " 100")
        return completion(request, made, ("Hm.\nWait", ANSWER)[int(request.uid.rpartition("/")[2])])

    chosen, _ = worker([Engine(say)], tools=ToolOptions(), dtsr=dtsr)
    (trajectory,) = roll(chosen, jobs(1), replace(SAMPLING, evaluation=True)).trajectories
    assert [s.kind for s in trajectory.segments] == ["prompt", "model", "control", "model"]
    assert trajectory.notes["dtsr"]["checks"] == 1 and trajectory.notes["dtsr"]["closed_at"] is not None
    assert "turns" not in trajectory.notes and trajectory.answer_text.endswith(ANSWER)


def test_functions_and_environments_through_their_executor(tmp_path):
    """The real executor behind the real client, a function told by the model's template, and an environment."""

    def through(use, template, texts):
        tools = ToolOptions(name="custom", use=[f"tests.unit.turning:{use}"], format="json")
        executor = ToolExecutor(tools)
        deadlines = {"rollout": 20.0, "reward": 20.0}
        engine, handle = Engine(by_turns(*texts)), Executor(executor.call)
        chosen = RolloutWorker(str(TINY), [engine], [Scorer()], deadlines, template, tools, [handle])
        record = Record("p", ({"role": "user", "content": "Go."},), "5", data={"start": 3})
        result = roll(chosen, [Job("u", "g", record, 1)], Sampling(1.0, 400, 200))
        assert result.failed == {}
        (trajectory,) = result.trajectories
        return trajectory, chosen.tokenizer.decode(trajectory.segments[0].ids)

    (tmp_path / "template").write_text(QWEN)
    call = '<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call>'
    texts = (call % '{"first": 40, "second": 2}', call % '{"first": "x"}', "\\boxed{42}")
    summed, told = through("add", str(tmp_path / "template"), texts)
    assert '"name": "add"' in told and "The sum of two numbers." in told
    assert [use.status for use in summed.calls][0] == "ok" and summed.calls[0].output == "42"
    assert summed.calls[1].status == "parse_error"
    assert "<tool_response>\n42\n</tool_response>" in summed.text
    walked, told = through("Stairs", str(tmp_path / "template"), ("up", "down", "up"))
    assert told == "<|im_start|>user\nGo.\n\nYou stand at 3.<|im_end|>\n<|im_start|>assistant\n"  # no word of tools
    assert walked.notes["turns"]["ended"] == "done" and [u.output for u in walked.calls][-1] == "Now at 5."
    assert walked.text.startswith("up") and "You stand at 3." not in walked.text


def test_a_template_that_cannot_show_tools_keeps_a_worker_from_starting():
    with pytest.raises(ConfigError, match="does not tell the model of its tools"):
        worker([], forty_two, replace(PYTHON, format="json"))
