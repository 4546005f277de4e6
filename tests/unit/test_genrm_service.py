"""The service with the real judges over replicas that do as they are told: cache, ledger, typed results, canaries."""

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.errors import ConfigError
from rltk.rewards.genrm import benchmarks
from rltk.rewards.genrm import router as router_module
from rltk.rewards.genrm.cache import VerdictCache, cache_key
from rltk.rewards.genrm.canary import SHIPPED, CanaryWatch, differ, load_canaries
from rltk.rewards.genrm.judges import build_judge
from rltk.rewards.genrm.service import GenRMService
from rltk.rewards.genrm.types import Question, Verdict
from tests.unit.genrm_fakes import FLAWED, QUICK, REFUSED, SOUND, Fake, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(router_module, "PAUSE_S", 0.001)


def question(number, response=None, **more):
    return Question(f"u{number}", "1 + 1?", response or f"It is {number}.\n\n\\boxed{{2}}", "2", **more)


def service(*fakes, **options):
    return GenRMService(replace(QUICK, **options), backends=fakes)


async def settled(judges):
    stats = await judges.stats()
    assert stats["asked"] == stats["answered"] + stats["unanswered"] + stats["cancelled"] and stats["in_flight"] == 0
    assert stats["unanswered"] == sum(stats["causes"].values())
    assert stats["router"]["in_flight"] == stats["router"]["waiting"] == 0
    return stats


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_those_who_ask_the_same_at_once_share_one_question():
    async def scene():
        cache, asked, gate = VerdictCache(10), [], asyncio.Event()

        async def ask():
            asked.append(1)
            await gate.wait()
            return Verdict(1.0)

        waiting = [asyncio.ensure_future(cache.get(b"k", ask)) for _ in range(8)]
        await until(lambda: asked)
        waiting[0].cancel()  # the one that began it
        await asyncio.sleep(0)
        gate.set()
        found = [how for _, how in await asyncio.gather(*waiting[1:])]
        found.append((await cache.get(b"k", ask))[1])
        return len(asked), found

    assert asyncio.run(scene()) == (1, ["joined"] * 7 + ["cached"])


def test_a_question_nobody_waits_for_is_cancelled_and_asked_anew_by_the_next():
    async def scene():
        cache, seen = VerdictCache(10), []

        async def hang():
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        async def ask():
            return Verdict(0.0)

        waiting = [asyncio.ensure_future(cache.get(b"k", hang)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for one in waiting:
            one.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return await cache.get(b"k", ask), seen

    assert asyncio.run(scene()) == ((Verdict(0.0), "asked"), ["cancelled"])


def test_only_verdicts_with_a_value_are_kept_and_the_oldest_unused_goes():
    async def scene():
        cache, asked = VerdictCache(2), []

        async def get(key, verdict):
            async def ask():
                asked.append(key)
                return verdict

            return await cache.get(key, ask)

        for key in (b"a", b"b", b"a", b"c", b"a", b"b"):
            await get(key, Verdict(1.0))
        for _ in range(2):
            await get(b"none", Verdict(None, cause="timeout"))
        return asked, len(cache)

    assert asyncio.run(scene()) == ([b"a", b"b", b"c", b"b", b"none", b"none"], 2)


def test_the_key_holds_all_that_a_verdict_depends_on_and_no_name():
    judge, asked = build_judge("fapo"), question(1)
    key = cache_key("m@1", judge, asked)
    assert key == cache_key("m@1", judge, replace(asked, uid="other", group="g"))
    others = [
        cache_key("m@2", judge, asked),
        cache_key("m@1", build_judge("fapo", temperature=0.5), asked),
        cache_key("m@1", build_judge("answer_equivalence"), asked),
        cache_key("m@1", judge, replace(asked, problem="2 + 2?")),
        cache_key("m@1", judge, replace(asked, response="3")),
        cache_key("m@1", judge, replace(asked, reference=None)),
        cache_key("m@1", judge, replace(asked, data={"correct": True})),
        cache_key("m@1", judge, replace(asked, response="\ud800")),
    ]
    assert len({key, *others}) == 9


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_verdicts_come_in_order_and_copies_in_a_group_cost_one_generation():
    async def scene():
        a = Fake("a", script=[SOUND, FLAWED])
        judges = service(a)
        first, second = question(1), question(2)
        copies = [replace(first, uid=f"copy{n}") for n in range(6)]
        verdicts = await judges.judge([first, *copies, second])
        again = await judges.judge([second])
        stats = await settled(judges)
        assert (len(a.uids), stats["joined"], stats["cached"], stats["answered"]) == (2, 6, 1, 9)
        assert stats["router"]["tokens"] == len(SOUND) + len(FLAWED) and stats["p99_s"] >= stats["p50_s"] > 0
        assert "a: 0 running" in await judges.stacks()
        return [verdict.flawed for verdict in verdicts], again[0].flawed

    assert asyncio.run(scene()) == ([False] * 7 + [True], True)


@pytest.mark.parametrize(
    "default, cause", [("gone", "unavailable"), ("Hmm.", "parse_fail"), (REFUSED, "too_long"), (b"", "garbage")]
)
def test_what_fails_is_a_verdict_without_a_value(default, cause):
    async def scene():
        judges = service(Fake("a", default=default), breaker_failures=100)
        verdicts = await judges.judge([question(1), question(2)])
        stats = await settled(judges)
        assert stats["causes"] == {cause: 2} and stats["p50_s"] is None
        return verdicts

    for verdict in asyncio.run(scene()):
        assert verdict.value is None and verdict.flawed is None and verdict.cause == cause and verdict.detail["reason"]


def test_a_hang_ends_at_the_deadline_and_a_judges_mistake_is_no_verdict(monkeypatch):
    async def scene():
        judges = service(Fake("a", default="hang"))
        (late,) = await judges.judge([question(1)], deadline_s=0.05)
        assert late.cause == "timeout" and late.seconds < 5

        async def broken(question, ask):
            raise KeyError("label")

        judges._judge.judge = broken
        (failed,) = await judges.judge([question(2)])
        assert failed.cause == "internal" and "KeyError" in failed.detail["reason"]
        assert (await settled(judges))["causes"] == {"timeout": 1, "internal": 1}

    asyncio.run(scene())


def test_a_replica_that_writes_garbage_costs_retries_and_no_verdict():
    async def scene():
        a, b = Fake("a", default="\\boxed{\\boxed{}} lorem \\boxed{17}"), Fake("b", default=FLAWED)
        judges = service(a, b)
        verdicts = await judges.judge([question(n) for n in range(12)])
        assert len(a.uids) > 0
        return [verdict.flawed for verdict in verdicts]

    assert asyncio.run(scene()) == [True] * 12


def test_a_replica_that_writes_garbage_is_soon_asked_only_where_no_other_has_a_place():
    async def scene():
        a, b = Fake("a", default="lorem \\boxed{17}"), Fake("b", default=FLAWED)
        judges = service(a, b)
        for number in range(40):
            await judges.judge([question(number)])
        seen = len(a.uids)
        for number in range(40, 60):
            (verdict,) = await judges.judge([question(number)])
            assert verdict.flawed and verdict.detail["replies"] == 1
        assert len(a.uids) == seen < 25
        unread = {one["name"]: one["unread"] for one in (await settled(judges))["router"]["replicas"]}
        assert unread["a"] > 0.5 and unread["b"] == 0.0
        await judges.judge([question(number) for number in range(60, 68)])  # b has four places
        return len(a.uids) > seen

    assert asyncio.run(scene())


def test_replies_that_no_replica_can_give_readably_are_held_against_none():
    async def scene():
        a, b = Fake("a", default="Hmm."), Fake("b", default="Hmm.")
        judges = service(a, b)
        for number in range(40):
            await judges.judge([question(number)])
        return len(a.uids), len(b.uids)

    asked = asyncio.run(scene())
    assert sum(asked) == 80 and min(asked) > 30


def test_who_joined_a_question_with_less_time_asks_again():
    async def scene():
        a = Fake("a", script=["hang"])
        judges = service(a)
        hasty = asyncio.ensure_future(judges.judge([question(1)], deadline_s=0.05))
        await until(lambda: a.running == 1)
        (patient,) = await judges.judge([question(1)])
        (late,) = await hasty
        stats = await settled(judges)
        assert stats["answered"] == stats["unanswered"] == 1
        return late.cause, patient.value

    assert asyncio.run(scene()) == ("timeout", 1.0)


@pytest.mark.parametrize("patient", [2, 5])
def test_several_who_joined_ask_once_more_together_while_others_are_served(patient):
    async def scene():
        a = Fake("a", script=["hang"])
        judges = service(a)
        hasty = asyncio.ensure_future(judges.judge([question(1)], deadline_s=0.05))
        await until(lambda: a.running == 1)
        waiting = [asyncio.ensure_future(judges.judge([question(1)])) for _ in range(patient)]
        await hasty
        others = await judges.judge([question(2)], deadline_s=1.0)
        verdicts = [one for (one,) in await asyncio.gather(*waiting)]
        await settled(judges)
        return hasty.result()[0].cause, [v.value for v in verdicts], others[0].value, len(a.uids)

    assert asyncio.run(scene()) == ("timeout", [1.0] * patient, 1.0, 3)


def test_who_joined_one_that_found_no_replica_in_its_time_waits_for_one():
    async def scene():
        a = Fake("a", script=["gone"])
        judges = service(a, breaker_failures=1, breaker_pause_s=0.4, retries=0)
        assert (await judges.judge([question(0)]))[0].cause == "unavailable"  # its breaker opens
        hasty = asyncio.ensure_future(judges.judge([question(1)], deadline_s=0.1))
        await asyncio.sleep(0)
        (patient,) = await judges.judge([question(1)], deadline_s=5.0)
        await settled(judges)
        return hasty.result()[0].cause, patient.value

    assert asyncio.run(scene()) == ("unavailable", 1.0)


def test_a_caller_that_goes_away_stops_what_nobody_else_waits_for():
    async def scene():
        a = Fake("a", default="hang")
        judges = service(a)
        shared, alone = question(1), question(2)
        leaving = asyncio.ensure_future(judges.judge([shared, alone]))
        await until(lambda: a.running == 2)
        staying = asyncio.ensure_future(judges.judge([shared], deadline_s=0.2))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await until(lambda: a.running == 1)
        await staying
        await until(lambda: a.running == 0)
        return (await settled(judges))["cancelled"]

    assert asyncio.run(scene()) == 2


def test_comparisons_go_the_same_way_and_each_judge_does_what_it_can():
    async def scene():
        judges = GenRMService(
            replace(QUICK, judge="pairwise", breaker_failures=100),
            backends=[Fake("a", script=["\\boxed{A}", "\\boxed{B}"])],
        )
        found = await judges.compare("1 + 1?", ["2", "3"])
        assert (found.best, found.consistency) == (0, 1.0)
        judges._router._replicas[0].backend.script = ["\\boxed{A}", "\\boxed{A}"]
        tie = await judges.compare("1 + 1?", ["2", "4"])
        assert (tie.best, tie.scores, tie.cause) == (None, (0.5, 0.5), "tie")
        judges._router._replicas[0].backend.default = "gone"
        gone = await judges.compare("1 + 1?", ["2", "5"])
        assert (gone.best, gone.cause) == (None, "unavailable")
        stats = await settled(judges)
        assert (stats["answered"], stats["causes"]) == (2, {"unavailable": 1})
        with pytest.raises(ConfigError, match="pairwise compares responses, it judges none alone"):
            await judges.judge([question(1)])
        with pytest.raises(ConfigError, match="fapo judges one response alone: it cannot compare"):
            await service(Fake()).compare("1 + 1?", ["2", "3"])

    asyncio.run(scene())


def test_a_service_without_anybody_to_ask_does_not_start():
    with pytest.raises(ConfigError, match="neither replicas nor reward.genrm.url"):
        GenRMService(QUICK)

    async def scene():
        await service(Fake(default=ConnectionError("refused"))).ready()

    with pytest.raises(ConnectionError):
        asyncio.run(scene())
    assert asyncio.run(service(Fake()).ready()).startswith("fapo ")


ACTS = st.sampled_from([SOUND, FLAWED, "gone", "hang", "Hmm.", None, REFUSED])


@settings(max_examples=25, deadline=None)
@given(
    scripts=st.lists(st.lists(ACTS, max_size=10), min_size=1, max_size=3),
    batches=st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=4),
)
def test_no_uid_is_lost_or_counted_twice_and_no_failure_becomes_a_value(scripts, batches):
    async def scene():
        fakes = [Fake(f"r{n}", script) for n, script in enumerate(scripts)]
        judges = service(*fakes, attempt_s=0.02, queue=6, breaker_pause_s=0.005)
        asked = [judges.judge([question(n) for n in batch], deadline_s=0.2) for batch in batches]
        found = await asyncio.gather(*asked)
        assert [len(verdicts) for verdicts in found] == [len(batch) for batch in batches]
        stats = await settled(judges)
        flat = [verdict for verdicts in found for verdict in verdicts]
        assert stats["asked"] == len(flat)
        assert stats["answered"] == sum(verdict.value is not None for verdict in flat)
        for verdict in flat:
            assert verdict.value is None or verdict.flawed == (verdict.detail["index"] == 0)
        await judges.close()

    asyncio.run(scene())


# -- canaries ----------------------------------------------------------------------------------------------------------


def test_canaries_see_a_replica_that_judges_otherwise_than_at_the_start():
    async def scene():
        a, b = Fake("a", default=FLAWED), Fake("b", default=FLAWED)
        judges = service(a, b, breaker_pause_s=20.0)
        count = len(load_canaries(None))
        first = await judges.canary()
        assert (first.accuracy, first.unanswered) == (0.5, 0.0) and first.drift == 0.0
        b.default = SOUND
        second = await judges.canary()
        assert second.drift == 0.5 and second.replicas == {"a": 0.0, "b": 1.0}
        b.default = "gone"
        third = await judges.canary()
        assert third.replicas == {"a": 0.0, "b": None} and third.unanswered == 0.5  # a failure is no drift
        assert len(a.uids) == 3 * count  # never from the cache
        assert (await judges.stats())["asked"] == 0
        await judges.close()

    asyncio.run(scene())


def test_unreadable_verdicts_are_drift_and_small_differences_are_not():
    watch = CanaryWatch(load_canaries(None)[:2])
    right = [Verdict(1.0, flawed=False), Verdict(0.0, flawed=True)]
    assert watch.compare({"a": right}).drift is None  # nothing to compare with yet
    report = watch.compare({"a": [Verdict(0.95, flawed=False), Verdict(None, cause="parse_fail")]})
    assert report.drift == 0.5 and report.accuracy == 1.0
    assert not differ(Verdict(None, cause="parse_fail"), Verdict(None, cause="parse_fail"))


def test_what_most_replicas_say_at_first_is_what_drift_is_held_against():
    watch = CanaryWatch(load_canaries(None)[:1])
    garbage, unread = [Verdict(0.0, flawed=True)], [Verdict(None, cause="parse_fail")]

    def sound():
        return [Verdict(1.0, flawed=False)]

    report = watch.compare({"a": garbage, "b": sound(), "c": sound()})
    assert report.replicas == {"a": 1.0, "b": None, "c": 0.0}
    two = CanaryWatch(load_canaries(None)[:1])
    assert two.compare({"a": unread, "b": sound()}).replicas == {"a": 1.0, "b": None}  # of two the one that can be read


def test_canaries_of_a_judge_of_wrong_answers_are_asked_of_its_model():
    async def scene(reply):
        a = Fake("a", default=reply)
        judges = service(a, judge="answer_equivalence", retries=0)
        report = await judges.canary()
        await judges.close()
        return report.accuracy, report.unanswered, len(a.uids)

    count = len(load_canaries(None, "wrong"))
    assert asyncio.run(scene("\\boxed{no}")) == (0.5, 0.0, count)
    assert asyncio.run(scene("\\boxed{yes}")) == (0.5, 0.0, 2 * count)  # both orders
    assert asyncio.run(scene("gone"))[:2] == (None, 1.0)


def test_what_is_no_verdict_is_no_reward_and_canaries_say_why():
    class Dict:
        name, version = "dict", "1"

        async def judge(self, question, ask):
            return {"value": 1.0}

    async def scene():
        judges = service(Fake("a"))
        judges._judge = Dict()
        (verdict,) = await judges.judge([question(1)])
        return verdict, await judges.canary()

    verdict, report = asyncio.run(scene())
    assert (verdict.value, verdict.cause) == (None, "internal")
    assert report.unanswered == 1.0 and report.why == "internal: TypeError: the judge dict returned dict, not a Verdict"


def test_a_wrong_canary_is_named_by_its_line(tmp_path):
    file = tmp_path / "canaries.jsonl"
    good = json.dumps({"problem": "p", "response": "r", "reference": None, "flawed": True})
    file.write_text(f"{good}\n\n{good}\nno json\n")
    with pytest.raises(ConfigError, match="line 4: JSONDecodeError"):
        load_canaries(str(file))


def test_a_line_ends_where_json_lines_end(tmp_path):
    file = tmp_path / "canaries.jsonl"
    row = {"problem": "p\u2028q\x85r", "response": "r", "reference": None, "flawed": False}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [canary.question.problem for canary in load_canaries(str(file))] == [row["problem"]]
    assert [solution.question.problem for solution in benchmarks.load("flawed_positive", file)] == [row["problem"]]


def test_shipped_canaries_are_pairs_of_a_sound_and_a_flawed_solution_with_the_right_answer():
    canaries = load_canaries(None)
    assert len(canaries) == 12 and sum(canary.flawed for canary in canaries) == 6
    assert all(f"\\boxed{{{c.question.reference}}}" in c.question.response for c in canaries)
    assert len({c.question.uid for c in canaries}) == 12 and SHIPPED.is_file()
    wrong = load_canaries(None, "wrong")
    assert len(wrong) == 8 and sum(canary.flawed for canary in wrong) == 4


@pytest.mark.parametrize("line", ["", "no json", '{"problem": "p"}', '{"problem": "p", "response": "r", "flawed": 1}'])
def test_a_file_without_canaries_is_refused(tmp_path, line):
    file = tmp_path / "canaries.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigError, match="canaries"):
        load_canaries(str(file))
    file.write_text(json.dumps({"problem": "p", "response": "r", "reference": None, "flawed": True}))
    assert load_canaries(str(file))[0].flawed
