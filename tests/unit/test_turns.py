"""The turn loop's state machine: what is sampled stays as it was sampled, budgets hold, and a pause changes nothing."""

import itertools
import json
import pickle
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.errors import ConfigError, InfrastructureError, MismatchError
from rltk.rollout.interventions import Question
from rltk.rollout.steps import Call, Done, Sample
from rltk.rollout.tools.types import STATUSES, Signature, ToolResult
from rltk.rollout.turns import Turns
from rltk.trajectory import Record
from tests.unit import turning
from tests.unit.some_tokenizers import NAMES
from tests.unit.turning import CODE, completion, job, play, script

ANSWER = "So it is \\boxed{42}."


@dataclass
class Nosy:
    """Asks at every "Wait"; says something after every call and after every second question."""

    spans: list = field(default_factory=list)
    views: list = field(default_factory=list)
    stops: tuple = ("Wait",)

    def after_tools(self, calls):
        self.spans += [span for span, _ in calls]
        return "I see.\n"

    def at_stop(self, view):
        self.views.append(view)
        return Question(({"role": "user", "content": "enough?"},), 7, "Sufficiency:")

    def answered(self, reply):
        return "</think>\n" if len(self.views) % 2 == 0 else None

    def notes(self):
        return {"nosy": {"views": len(self.views)}}


# -- properties ------------------------------------------------------------------------------------------------------

HERMES = '<tool_call>\n{{"name": "{}", "arguments": {{"code": "é"}}}}\n</tool_call>'
BARE = '{{"name": "{}", "parameters": {{"code": "1"}}}}'
CALLS = {
    "python_block": [CODE.format(1), CODE.format("é")],
    "retool": ["<code>print(1)</code>"],
    "qwen": [HERMES.format("python"), HERMES.format("pyth")],
    "llama": [BARE.format("python"), BARE.format("pyth")],
}
WORDS = [
    "Let me see. ",
    "print(1)",
    "```",
    "\n",
    "Wait",
    "é漢",
    "```output",
    "</code>",
    "<tool_call>",
    '{"name":',
    ANSWER,
]
RESULTS = ["", "42", "x" * 300, "<|im_end|>", "a <tool_call> b", "漢字\n" * 40, "```output\n", "\\boxed{1}"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(data=st.data())
def test_whatever_model_and_tools_do(name, data):
    format = data.draw(st.sampled_from(["python_block", "retool"]), "format")
    whatever_is_played(data, some_settings(data, name, format), CALLS[format])


@pytest.mark.parametrize("name", ["qwen", "llama"])
@settings(max_examples=40)
@given(data=st.data())
def test_whatever_is_called_as_the_models_own_template_writes_it(name, data):
    whatever_is_played(data, some_settings(data, name, "json"), CALLS[name])


def some_settings(data, name, format):
    return turning.settings(
        name,
        response=data.draw(st.sampled_from([600, 250, 100, 30, 1]), "response"),
        max_calls=data.draw(st.sampled_from([3, 2, 1]), "calls"),
        turn_tokens=data.draw(st.sampled_from([0, 0, 60]), "turn"),
        output_tokens=data.draw(st.integers(8, 40), "output"),
        total_tokens=data.draw(st.sampled_from([400, 160, 60, 20]), "total"),
        void_turns=data.draw(st.sampled_from(["keep", "mask", "drop"]), "void"),
        format=format,
    )


def whatever_is_played(data, made, calls):
    """A model that says anything, often a call and cut anywhere; tools that end in any way; pauses between turns."""

    def say(request, number):
        words = st.lists(st.sampled_from(WORDS), max_size=2)
        call = data.draw(st.sampled_from([calls[:1], calls[:1], calls[1:], []]))
        said = [*data.draw(words), *call, *data.draw(words)]
        end = data.draw(st.sampled_from([None, None, True, False]))
        return completion(request, made, "".join(said), end, said)

    def run(request):
        return ToolResult(data.draw(st.sampled_from(STATUSES[:-1])), data.draw(st.sampled_from(RESULTS)), "cpu 4 s")

    def between(turns):
        if not data.draw(st.booleans()):
            return turns
        kept = pickle.loads(pickle.dumps(turns.pause(0.0)))
        return Turns.resume(turns.job, replace(made, prompts={}), kept)

    nosy = [Nosy()] if data.draw(st.booleans(), "interventions") else []
    reply = script(made, "Sufficiency: 100")
    played = play(Turns(job(), made, nosy), say, run, lambda request: reply(request, 0), between)
    trajectory = played.turns.trajectory()
    kinds = [segment.kind for segment in trajectory.segments]

    # What was sent is what had come before, and the trajectory is all of it: no id was ever made anew.
    whole = trajectory.ids.tolist()
    for request, said in zip(played.requests, played.completions, strict=True):
        sent = [*request.prompt_ids, *said.ids.tolist()]
        assert whole[: len(sent)] == sent
        assert request.max_tokens > 0 and len(request.prompt_ids) + request.max_tokens <= made.context
    assert [r.uid for r in played.requests] == [f"u/{n}" for n in range(len(played.requests))]
    assert len({r.seed for r in played.requests}) == len(played.requests)

    # Masks and log-probs line up, and are the sampler's own.
    sampled = np.concatenate([said.ids for said in played.completions])
    logprobs = np.concatenate([said.logprobs for said in played.completions])
    learned = sum(kind == "model" for kind in kinds)
    if made.options.void_turns != "mask":
        assert learned == len(played.completions)
        assert trajectory.ids[trajectory.mask].tolist() == sampled.tolist()
        assert trajectory.logprobs.tolist() == logprobs.tolist()
    else:
        assert learned + kinds.count("boundary") == len(played.completions)
        assert trajectory.logprobs.tolist() == logprobs[: trajectory.length].tolist()
    assert len(trajectory.mask) == len(whole) and trajectory.mask.sum() == len(trajectory.logprobs)

    # Budgets.
    assert len(sampled) <= made.max_response_tokens and len(trajectory.calls) <= made.options.max_calls
    new = [segment for segment in trajectory.segments if segment.kind in ("tool", "control")]
    assert sum(len(segment.ids) for segment in new) <= made.options.total_tokens
    if made.options.turn_tokens:
        ends = [i for i, kind in enumerate(kinds) if kind == "tool"]
        for a, b in itertools.pairwise([0, *ends, len(kinds)]):
            turn = [s for s in trajectory.segments[a:b] if s.kind in ("model", "boundary")]
            assert sum(len(s.ids) for s in turn) <= made.options.turn_tokens

    # Results bring no special token along: there are those that stand around harmless ones, and no others.
    answered = [number for _, number in sorted(Counter(use.turn for use in trajectory.calls).items())]
    for number, (before, segment) in zip(answered, tools_of(trajectory), strict=False):  # the last may have no room
        end = made.new_text.decode(before.ids[-1:]) if before.ids[-1] in made.stop_ids else ""
        around = made.new_text.encode(made.format.appended("", end, ["0"] * number))
        assert made.new_text.specials(segment.ids.tolist()) == made.new_text.specials(around)
    for use in trajectory.calls:
        shown = made.new_text.encode(use.output)
        assert len(shown) <= made.options.output_tokens or trajectory.notes["turns"]["ended"] == "total_tokens"


def tools_of(trajectory):
    """Each tool segment, behind what the model wrote before it."""
    return [(a, b) for a, b in itertools.pairwise(trajectory.segments) if b.kind == "tool"]


@pytest.mark.parametrize("name", ["tiny", "qwen", "prefix"])
@settings(max_examples=20)
@given(cut=st.sets(st.integers(0, 5)))
def test_a_pause_between_turns_changes_nothing(name, cut):
    made = turning.settings(name)
    texts = ["Wait", "hm " + CODE.format(1), "Wait", "Wait", CODE.format(2), ANSWER]
    reply = script(made, "Sufficiency: 1")

    def through(pauses):
        count = itertools.count()

        def between(turns):
            if next(count) not in pauses:
                return turns
            return Turns.resume(turns.job, made, pickle.loads(pickle.dumps(turns.state())))

        played = play(Turns(job(), made, [Nosy()]), script(made, *texts), reply=lambda r: reply(r, 0), between=between)
        return played.turns.trajectory(), played.requests

    (one, requests), (other, again) = through(set()), through(cut)
    assert requests == again and one.ids.tolist() == other.ids.tolist()
    assert one.logprobs.tolist() == other.logprobs.tolist()
    assert (one.text, one.response, one.calls, one.notes) == (other.text, other.response, other.calls, other.notes)


# -- one thing at a time ---------------------------------------------------------------------------------------------


def test_a_call_its_result_and_an_answer():
    made = turning.settings()
    played = play(Turns(job(), made, []), script(made, "Let me see. " + CODE.format("6 * 7"), ANSWER))
    trajectory = played.turns.trajectory()
    assert [segment.kind for segment in trajectory.segments] == ["prompt", "model", "tool", "model"]
    assert trajectory.text == "Let me see. " + CODE.format("6 * 7") + "\n42\n```\n" + ANSWER
    assert trajectory.response == "Let me see. " + CODE.format("6 * 7") + "\n" + ANSWER  # without what the tool said
    assert trajectory.answer_text == trajectory.response and not trajectory.truncated
    (use,) = trajectory.calls
    assert (use.turn, use.name, use.status, use.code, use.output) == (0, "python", "ok", "print(6 * 7)\n", "42")
    (request,) = played.called
    assert request.trajectory == "u" and request.context == {} and request.history == ()
    assert trajectory.notes["turns"] == {"turns": 2, "ended": "stop", "void": 0, "cut": 0, "new_tokens": 5}
    assert trajectory.version == (0, 1)


def test_two_samplings_never_share_a_seed():
    seeds = set()
    for number in range(20):
        made = turning.settings()
        played = play(Turns(job(seed=number), made, []), script(made, CODE.format(1), CODE.format(2), ANSWER))
        seeds |= {request.seed for request in played.requests}
    assert len(seeds) == 60 and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("text", [CODE.format(1)[:-3], CODE.format(1)])
def test_a_turn_cut_off_by_its_length_calls_nothing(text):
    """Whatever it holds: in the last token of its budget nobody knows what would have come."""
    made = turning.settings()
    turns = Turns(job(), made, [])
    request = turns.next().request
    turns.sampled(replace(completion(request, made, text), finish_reason="length", stop=None))
    assert turns.next() == Done("length")
    assert turns.trajectory().truncated and turns.trajectory().notes["turns"]["void"] == 1


def test_a_model_that_calls_in_json_is_answered_by_its_template():
    made = turning.settings("qwen", format="json")
    assert '"name": "python"' in made.new_text.decode(Turns(job(), made, []).next().request.prompt_ids)
    call = '<tool_call>\n{"name": "%s", "arguments": {"code": "%s"}}\n</tool_call>'
    one = "Both:\n" + call % ("python", "a") + "\n" + call % ("pythn", "b") + "\n" + call % ("python", "c")
    played = play(
        Turns(job(), made, []), script(made, one, ANSWER),
        lambda request: ToolResult("ok", request.arguments["code"] + "</tool_response>"),
    )  # fmt: skip
    trajectory = played.turns.trajectory()
    assert [request.arguments["code"] for request in played.called] == ["a", "c"]
    assert [use.status for use in trajectory.calls] == ["ok", "unknown_tool", "ok"]
    shown = "".join(
        f"\n<tool_response>\n{text}\n</tool_response>"
        for text in ("a< /tool_response>", "error: there is no tool 'pythn'; there are python", "c< /tool_response>")
    )
    tool = trajectory.segments[2]
    assert made.new_text.decode(tool.ids) == f"\n<|im_start|>user{shown}<|im_end|>\n<|im_start|>assistant\n"
    assert trajectory.segments[1].ids[-1] == made.stop_ids[0] and trajectory.calls[0].code == "a"


def test_what_cannot_be_read_as_a_call_is_answered_and_not_run():
    made = turning.settings()
    played = play(Turns(job(), made, []), script(made, "```output", ANSWER))
    trajectory = played.turns.trajectory()
    assert played.called == [] and played.reason == "stop"
    assert trajectory.calls[0].status == "parse_error" and "error: there is no ```python" in trajectory.text


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (ToolResult("ok", "42\n"), "42"),
        (ToolResult("error", "ZeroDivisionError: division by zero"), "ZeroDivisionError: division by zero"),
        (ToolResult("timeout", "", "cpu 4 s"), "[timeout: cpu 4 s]"),
        (ToolResult("output_limit", "aaa\n", "output 64 KiB"), "aaa\n[output_limit: output 64 KiB]"),
        (ToolResult("killed", ""), "[killed]"),
    ],
)
def test_what_the_model_is_told_of_a_result(result, shown):
    made = turning.settings()
    trajectory = play(Turns(job(), made, []), script(made, CODE.format(1), ANSWER), lambda _: result).turns.trajectory()
    assert trajectory.calls[0].output == shown and f"```output\n{shown}\n```\n" in trajectory.text
    assert trajectory.calls[0].status == result.status


def test_an_infrastructure_failure_ends_the_sample_with_its_reason():
    made = turning.settings()
    with pytest.raises(InfrastructureError, match="the jail is gone"):
        play(
            Turns(job(), made, []),
            script(made, CODE.format(1)),
            lambda _: ToolResult("infra_error", "the jail is gone"),
        )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"logprobs": np.float32([-0.5])}, "log-probs of shape"),
        ({"logprobs": np.full(20, np.nan, np.float32)}, "log-prob"),
        ({"finish_reason": "abort"}, "ended with 'abort'"),
        ({"uid": "u/7"}, "waits for u/0, not for u/7"),
    ],
)
def test_a_sample_without_its_log_probs_is_never_repaired(change, problem):
    made = turning.settings()
    turns = Turns(job(), made, [])
    with pytest.raises(MismatchError, match=problem):
        turns.sampled(replace(completion(turns.next().request, made, ANSWER), **change))


def test_what_does_not_belong_is_refused():
    made = turning.settings()
    turns = Turns(job(), made, [])
    with pytest.raises(MismatchError, match="not for a Call"):
        turns.results([ToolResult("ok")])
    with pytest.raises(MismatchError, match="has not ended"):
        turns.trajectory()
    turns.sampled(completion(turns.next().request, made, CODE.format(1)))
    with pytest.raises(MismatchError, match="inside a Call, not between turns"):
        turns.state()
    with pytest.raises(MismatchError, match="2 results of 1 calls"):
        turns.results([ToolResult("ok")] * 2)
    with pytest.raises(ConfigError, match=r"over task\.max_prompt_tokens=3"):
        Turns(job(), replace(made, max_prompt_tokens=3, prompts={}), [])


def test_limits_end_a_trajectory_and_say_so():
    made = turning.settings(max_calls=2)
    played = play(Turns(job(), made, []), script(made, CODE.format(1)))
    assert played.reason == "max_calls" and len(played.called) == 2 and len(played.turns.trajectory().calls) == 2

    made = turning.settings(total_tokens=30, output_tokens=20, max_calls=9)
    played = play(Turns(job(), made, []), script(made, CODE.format(1)), lambda _: ToolResult("ok", "0123456789" * 9))
    trajectory = played.turns.trajectory()
    assert played.reason == "total_tokens" and trajectory.notes["turns"]["cut"] == 1
    assert trajectory.notes["turns"]["new_tokens"] <= 30

    made = turning.settings(turn_tokens=10)
    played = play(Turns(job(), made, []), script(made, "0" * 50))
    assert played.reason == "length" and [r.max_tokens for r in played.requests] == [10]


def test_past_its_deadline_no_turn_begins_and_no_reward_is_asked_for():
    made = turning.settings(deadline_s=10)
    turns = Turns(job(), made, [])
    turns.sampled(completion(turns.next(0.0).request, made, CODE.format(1)))
    assert isinstance(turns.next(11.0), Call)  # what runs is waited for
    turns.results([ToolResult("ok", "42")])
    later = Turns.resume(job(), made, turns.pause(9.0))
    assert isinstance(turns.next(9.0), Sample)
    assert later.next(2.0) == Done("deadline")  # 9 s in the rollout before this one
    trajectory = later.trajectory()
    assert trajectory.reward.value is None and trajectory.reward.detail == {"cause": "deadline"}
    assert "tools.deadline_s=10" in trajectory.reward.reason and trajectory.notes["turns"]["ended"] == "deadline"


@pytest.mark.parametrize("void_turns", ["keep", "mask", "drop"])
def test_void_turns(void_turns):
    made = turning.settings(void_turns=void_turns)
    answered = play(Turns(job(), made, []), script(made, CODE.format(1), ANSWER)).turns.trajectory()
    assert answered.reward is None and answered.notes["turns"]["void"] == 0
    void = play(Turns(job(), made, []), script(made, CODE.format(1), "I give up.")).turns.trajectory()
    kinds = [segment.kind for segment in void.segments]
    assert void.notes["turns"]["void"] == 1 and void.ids.tolist()[-1] == made.stop_ids[0]
    assert kinds == ["prompt", "model", "tool", "boundary" if void_turns == "mask" else "model"]
    assert (void.reward is None) == (void_turns != "drop")
    alone = play(Turns(job(), made, []), script(made, "I give up.")).turns.trajectory()
    if void_turns == "keep":
        assert alone.reward is None and alone.length > 0
    else:
        assert alone.reward.value is None and alone.reward.detail == {"cause": "void_turn"}


def test_a_session_is_given_its_successful_calls():
    made = turning.settings(max_calls=4)
    statuses = iter(["ok", "error", "ok", "ok"])
    played = play(
        Turns(job(), made, []), script(made, *(CODE.format(n) for n in range(4)), ANSWER),
        lambda _: ToolResult(next(statuses), "x"),
    )  # fmt: skip
    assert [[h["code"] for h in request.history] for request in played.called] == [
        [], ["print(0)\n"], ["print(0)\n"], ["print(0)\n", "print(2)\n"],
    ]  # fmt: skip
    assert [request.turn for request in played.called] == [0, 1, 2, 3]


# -- interventions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "qwen", "tiny", "llama"])
def test_an_intervention_sees_the_calls_own_log_probs_and_its_text_is_masked(name):
    made = turning.settings(name)
    nosy = Nosy()
    said = "Hm. " + CODE.format("6 * 7")
    played = play(Turns(job(), made, [nosy]), script(made, said, ANSWER))
    trajectory = played.turns.trajectory()
    assert [segment.kind for segment in trajectory.segments] == ["prompt", "model", "tool", "control", "model"]
    assert made.new_text.decode(trajectory.segments[3].ids).strip() == "I see."
    assert trajectory.text == said + "\n42\n```\nI see.\n" + ANSWER
    (span,) = nosy.spans
    ids, logprobs = played.completions[0].ids.tolist(), played.completions[0].logprobs
    size = len(span.logprobs)
    at = [logprobs[n : n + size].tolist() for n in range(len(ids))].index(span.logprobs.tolist())
    told = made.new_text.decode(ids[at : at + size])
    assert "```python\nprint(6 * 7)\n```" in told and not told.startswith("Hm") and "output" not in told


def test_a_question_is_no_part_of_the_trajectory():
    made = turning.settings("qwen")
    nosy, texts = Nosy(), ["<think>One. Wait", " no. Wait", "so " + ANSWER]
    reply = script(made, " 100")
    played = play(Turns(job(), made, [nosy]), script(made, *texts), reply=lambda request: reply(request, 0))
    trajectory = played.turns.trajectory()
    assert [segment.kind for segment in trajectory.segments] == ["prompt", "model", "model", "control", "model"]
    assert trajectory.text == "<think>One. Wait no. Wait</think>\nso " + ANSWER
    for number, asked in enumerate(played.asked):
        assert asked.temperature == 0 and asked.max_tokens == 7 and asked.uid == f"u/{number + 1}/question"
        assert made.new_text.decode(asked.prompt_ids).endswith("<|im_start|>assistant\nSufficiency:")
    first, second = nosy.views
    assert (first.text, first.fresh) == ("<think>One. Wait", 0)
    assert second.text[second.fresh :] == " no. Wait" and second.sampled == sum(
        len(said.ids) for said in played.completions[:2]
    )
    assert trajectory.notes["nosy"] == {"views": 2}
    assert trajectory.notes["control"] == {
        "asked_tokens": 2 * len(reply(played.asked[0], 0).ids),
        "not_asked": 0,
        "left_out": 0,
    }
    assert second.messages == turning.QUESTION.messages and second.prompt.endswith("<|im_start|>assistant\n")


def test_what_there_is_no_room_for_is_left_out_and_counted():
    made = turning.settings("qwen", total_tokens=3)
    reply = script(made, "100")
    played = play(
        Turns(job(), made, [Nosy()]), script(made, "Wait", "Wait", ANSWER), reply=lambda request: reply(request, 0)
    )
    assert played.turns.trajectory().notes["control"]["left_out"] == 0
    made = turning.settings("qwen", total_tokens=0)
    played = play(
        Turns(job(), made, [Nosy()]), script(made, "Wait", "Wait", ANSWER), reply=lambda request: reply(request, 0)
    )
    trajectory = played.turns.trajectory()
    assert trajectory.notes["control"]["left_out"] == 1 and trajectory.text == "WaitWait" + ANSWER
    tight = turning.settings("qwen", response=9, context=30)
    played = play(Turns(job(), tight, [Nosy()]), script(tight, "Wait", "x"))
    assert played.asked == [] and played.turns.trajectory().notes["control"]["not_asked"] == 1


# -- environments ----------------------------------------------------------------------------------------------------

WORLD = Signature("World", "", {"type": "object"})


def world(request):
    if not request.arguments:
        return ToolResult("ok", f"You stand at {request.context['start']}.")
    at = request.context["start"] + sum(a["action"] == "up" for a in (*request.history, request.arguments))
    return ToolResult("ok", f"Now at {at}.", done=at == 5)


@pytest.mark.parametrize("name", ["qwen", "llama", "tiny"])
def test_an_environment_is_reset_and_every_turn_is_an_action(name):
    made = turning.settings(name, signatures=[WORLD], environment=True, use=["my:World"])
    played = play(Turns(job(), made, []), script(made, "up", "what?", "up"), world)
    trajectory = played.turns.trajectory()
    assert played.reason == "done" and [r.arguments for r in played.called] == [
        {}, {"action": "up"}, {"action": "what?"}, {"action": "up"},
    ]  # fmt: skip
    assert [len(request.history) for request in played.called] == [0, 0, 1, 2]
    prompt = made.new_text.decode(trajectory.segments[0].ids)
    assert "6 * 7?\n\nYou stand at 3." in prompt
    assert [segment.kind for segment in trajectory.segments][1:] == ["model", "tool", "model", "tool", "model"]
    assert "Now at 4." in trajectory.text and "Now at 5." not in trajectory.text  # nobody would read it
    assert [use.output for use in trajectory.calls] == ["Now at 4.", "Now at 4.", "Now at 5."]
    assert json.loads(trajectory.calls[0].code) == {"action": "up"}


def test_an_environment_that_fails_or_shows_too_much():
    made = turning.settings("qwen", signatures=[WORLD], environment=True, use=["my:World"])
    with pytest.raises(InfrastructureError):
        play(Turns(job(), made, []), script(made, "up"), lambda _: ToolResult("timeout", limit="wall 9 s"))
    with pytest.raises(MismatchError, match="shows of an environment"):
        play(Turns(job(), replace(made, max_prompt_tokens=8), []), script(made, "up"), world)
    told = Record("r", ({"role": "system", "content": "Play."},), "", data={"start": 3})
    quiet = play(Turns(job(record=told), made, []), script(made, "up", "up"), world)
    prompt = made.new_text.decode(quiet.turns.trajectory().segments[0].ids)
    assert "<|im_start|>user\nYou stand at 3.<|im_end|>" in prompt
