"""What the benches of the judge service count, and when and whom their seeded faults strike."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import genrm_service, genrm_step
from bench.genrm_accounts import Outcome, percentile, service_faults, tally, violations, wrong_values
from bench.genrm_faults_plan import APART_S, HANGING, SOUND, make_plan
from bench.genrm_parts import Lengthy, Reader, Solver, model_folder, unending
from rltk.rewards.genrm.cache import cache_key
from rltk.rewards.genrm.types import Question, Reply
from rltk.rollout.tokens import load_tokenizer, stop_ids


def outcome(uid, value=1.0, cause="", replies=1, seconds=0.1):
    return Outcome(uid, value, cause, replies, seconds)


def counts(**changed):
    router = {
        "asked": 3, "answered": 2, "cancelled": 0, "failed": {"timeout": 1}, "in_flight": 0, "waiting": 0,
        "most_waiting": 5, "replicas": [{"load": 0}],
    }  # fmt: skip
    stats = {"asked": 3, "answered": 2, "causes": {"timeout": 1}, "cancelled": 0, "in_flight": 0}
    return {**stats, "router": {**router, **changed}}


# -- the accounts ------------------------------------------------------------------------------------------------------


def test_a_uid_is_lost_doubled_or_once_and_waits_are_those_of_answers():
    outcomes = [outcome("a"), outcome("a"), outcome("b", None, "timeout", 0, 9.0), outcome("stranger")]
    figures = tally(["a", "b", "c"], outcomes)
    assert (figures["requests"], figures["lost"], figures["doubled"]) == (3, 1, 2)
    assert figures["answered"] == 3 and figures["unanswered"] == {"timeout": 1}
    assert figures["p50_ms"] == figures["p99_ms"] == 100.0
    assert violations(figures, [], []) == ["lost: 1", "doubled: 2"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 6)), st.lists(st.integers(0, 8)))
def test_asked_plus_doubled_is_told_plus_lost(asked, told):
    uids = [f"u{number}" for number in set(asked)]
    figures = tally(uids, [outcome(f"u{number}") for number in told])
    assert len(uids) + figures["doubled"] == len(told) + figures["lost"]


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_smallest_that_enough_do_not_pass(seconds, share):
    found = percentile(seconds, share / 100)
    assert 100 * sum(s <= found for s in seconds) >= share * len(seconds)
    assert 100 * sum(s < found for s in seconds) < share * len(seconds)


def test_a_value_must_be_a_sound_judges_after_as_many_replies():
    sound = {("a", 1): 1.0, ("b", 2): 0.0, ("c", 1): None, ("d", 1): 1.0}
    told = [outcome("a"), outcome("b", 0.0, replies=2), outcome("c"), outcome("d", 0.0), outcome("e", None, "timeout")]
    assert wrong_values(told, sound) == [
        "c: the value is 1, a sound judge's after 1 replies None",
        "d: the value is 0, a sound judge's after 1 replies 1.0",
    ]


def test_only_what_faults_and_a_full_queue_bring_about_is_allowed():
    figures = tally(["a", "b"], [outcome("a", None, "queue_full"), outcome("b", None, "internal")])
    assert violations(figures, ["x"], ["y"]) == ["1 verdicts with the cause 'internal'", "x", "y"]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({}, None),
        ({"asked": 4}, "generations asked 4, it should be 3"),
        ({"replicas": [{"load": 2}]}, "load 2, it should be 0"),
        ({"waiting": 1}, "waiting 1, it should be 0"),
        ({"most_waiting": 15}, "15 waited at once: the bound is 10, and 4 places"),
        ({"most_waiting": 14}, None),
    ],
)
def test_the_services_counts_add_up_and_are_its_clients(changed, words):
    figures = {"requests": 3, "answered": 2, "unanswered": {"timeout": 1}}
    found = service_faults(figures, counts(**changed), places=4, queue=10)
    assert (not found) if words is None else (len(found) == 1 and words in found[0])
    assert len(service_faults({**figures, "answered": 1}, counts(), 4, 10)) == 1


# -- the plan ----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_a_plan_strikes_apart_bursts_before_each_fault_and_asks_each_question_once(seed):
    plan = make_plan(seed, requests=300, clients=8, burst=40)
    kills = [fault for fault in plan.faults if fault.kind == "kill"]
    (stop,) = [fault for fault in plan.faults if fault.kind == "stop"]
    assert len(kills) == 3 and {kill.replica for kill in kills} == set(SOUND) and stop.replica == HANGING
    assert all(b.at - a.at >= APART_S for a, b in zip(kills, kills[1:], strict=False))
    assert kills[0].at < stop.at < kills[1].at and kills[2].at + 60 <= plan.seconds
    assert sorted(question.uid for question in plan.questions) == sorted(f"u{number}" for number in range(300))
    for fault in plan.faults:
        before = [at for client in plan.calls for at, _ in client if fault.at - 1 <= at < fault.at]
        assert len(before) >= 40
    assert make_plan(seed, 300, 8, 40) == plan


def test_a_plan_with_fewer_questions_than_its_bursts_is_refused():
    with pytest.raises(ValueError, match="100 requests are fewer than 4 bursts of 40"):
        make_plan(0, 100, 8, 40)


# -- judges and files --------------------------------------------------------------------------------------------------


def judged(judge, *texts):
    import asyncio

    left = list(texts)

    async def ask(prompt):
        text = left.pop(0)
        return Reply(text, "stop", len(text))

    return asyncio.run(judge.judge(Question("q", "What is 1 + 1?", "1 + 1 = 2\n\n\\boxed{2}", "2"), ask))


@pytest.mark.parametrize(
    "texts, value, replies",
    [(["\\boxed{2}"], 1.0, 1), (["\\boxed{3}"], 0.0, 1), (["\\boxed{1e9}", "\\boxed{2}"], 1.0, 2)],
)
def test_the_solver_compares_its_answer_with_the_responses(texts, value, replies):
    verdict = judged(Solver(), *texts)
    assert (verdict.value, verdict.flawed, verdict.detail["replies"]) == (value, value == 0.0, replies)


def test_garbage_is_no_verdict_and_a_reply_of_another_length_no_throughput():
    assert judged(Solver(), "\\boxed{02}", "\\boxed{}").cause == "parse_fail"
    assert judged(Lengthy(max_tokens=4), "1234").value == 1.0
    assert judged(Lengthy(max_tokens=4), "123").cause == "short"


def test_the_reader_finds_all_sound_and_asks_every_question():
    reader, asked = Reader(max_tokens=4), Question("q", "What is 1 + 1?", "\\boxed{3}", "2")
    verdict = judged(reader, "no verdict")
    assert (verdict.value, verdict.flawed, verdict.detail["tokens"]) == (1.0, False, 10)
    assert len({cache_key("m", reader, asked) for _ in range(3)}) == 3


def test_splits_are_one_word_so_that_no_key_is_taken_for_one():
    arguments = genrm_service.arguments_of(["step", "--shares", "0.30:0.10,.3:.25", "learner.lr=1e-6", "steps=2"])
    assert arguments.shares == ["0.30:0.10", ".3:.25"] and arguments.keys == ["learner.lr=1e-6", "steps=2"]
    assert genrm_service.arguments_of(["step"]).shares == ["0.30:0.20", "0.30:0.10"]


@pytest.mark.parametrize("split", ["learner.lr=1e-6", "0.3", "0.9:0.2", "0.3:0.1,", "1.2:0.1"])
def test_what_is_no_split_is_refused_by_name(split, capsys):
    with pytest.raises(SystemExit):
        genrm_service.arguments_of(["step", "--shares", split])
    assert "is not two shares under 1 together" in capsys.readouterr().err


def trained(right=0.9, asked=9, seconds=(9.0, 2.0, 4.0)):
    return {"step_s": 3.0, "steps_s": list(seconds), "right": right, "stages": {}, "judge": {},
            "counts": {"asked": asked}, "tokens_per_reply": 256.0}  # fmt: skip


@pytest.mark.parametrize("right, asked, words", [(0.02, 9, "the policy got 2.0% right"), (0.9, 0, "asked nothing")])
def test_a_step_in_which_the_judge_has_nothing_to_read_is_no_measurement(right, asked, words, monkeypatch):
    monkeypatch.setattr(genrm_step, "_train", lambda keys: trained(right, asked))
    with pytest.raises(RuntimeError, match=words):
        genrm_step.run(genrm_service.arguments_of(["step", "--device", "cpu"]), print, print)


def test_a_step_with_the_judge_is_held_against_runs_alone_before_and_after(monkeypatch):
    runs = iter([trained(), trained(), trained(seconds=(9.0, 1.0, 1.0))])
    monkeypatch.setattr(genrm_step, "_train", lambda keys: next(runs))
    kept = []
    figures = genrm_step.run(genrm_service.arguments_of(["step", "--device", "cpu"]), print, kept.append)
    assert [found["added_step_share"] for found in (*kept, figures)] == [0.0, 1.0]  # 3 s to 2 and 4; to 1, 1, 2 and 4


@pytest.mark.full  # converts the weights where that is not done yet
def test_an_unending_judge_ends_its_turns_in_a_token_that_it_never_writes(tmp_path):
    folder = unending(Path(model_folder("smollm2")), tmp_path / "long")
    tokenizer = load_tokenizer(str(folder))
    end = tokenizer.convert_tokens_to_ids("<file_sep>")
    assert stop_ids(tokenizer, str(folder)) == [end] and end != load_tokenizer(model_folder("smollm2")).eos_token_id
    assert (folder / "model.safetensors").resolve() == (Path(model_folder("smollm2")) / "model.safetensors").resolve()


def test_each_arms_figures_and_lines_stay_when_another_is_measured():
    faults = {"figures": {"lost": 0, "doubled": 0, "p50_ms": 1.0, "p99_ms": 2.0}}
    first = genrm_service.merged({}, "faults", faults)
    both = genrm_service.merged(first["arms"], "throughput", {"figures": {"throughput_over_vllm": 0.9}})
    assert both["lost"] == 0 and both["throughput_over_vllm"] == 0.9 and set(both["arms"]) == {"faults", "throughput"}
    assert "added_step_share" not in both and json.loads(json.dumps(both)) == both
    log = genrm_service.merged_log("", "throughput", ["old"])
    log = genrm_service.merged_log(log, "faults", ["one", "two"])
    log = genrm_service.merged_log(log, "throughput", ["new"])
    assert log == "== faults\none\ntwo\n\n== throughput\nnew\n"
