"""One trajectory on its way: sample until a call, an answer or a budget; append the result; go on.

                    .sampled(completion)                     .results(results)
    Sample ---------------------------------> a call: Call ---------------------> append --> Sample
       ^                  |                                                                    ^
       |                  +-- halted by an intervention: Ask --.asked(completion)--> append ---+
       |                  +-- neither: Done
       +-- .state(), Turns.resume: a partial rollout, between two requests only

A pure state machine: no asyncio, no Ray, no clock. Whoever drives it asks `next`, does that, and feeds what came back.
What was sampled is kept as it was sampled; only new text is tokenized, once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from rltk.errors import ConfigError, InfrastructureError, MismatchError
from rltk.rollout.engine import Completion, Request
from rltk.rollout.finished import finished
from rltk.rollout.interventions import CallSpan, Intervention, TurnView
from rltk.rollout.job import Job
from rltk.rollout.steps import Ask, Call, Done, Sample, State, Step, TurnSettings, shown_text
from rltk.rollout.texts import last_turn, model_segment, observed, tool_use, turn_seed, without_end
from rltk.rollout.tokens import decode, render_prompt, token_span
from rltk.rollout.tools.types import ToolCall, ToolRequest, ToolResult
from rltk.trajectory import Segment, Trajectory

LEAST = 8  # tokens of a result that are worth showing: with less room the trajectory ends


class Turns:
    """`next()` may be asked any number of times; each answer but Done is fed once. Raises MismatchError for what does
    not belong to it, and for a sample that is of no use; InfrastructureError where a tool could not be had."""

    def __init__(self, job: Job, settings: TurnSettings, interventions: list[Intervention]) -> None:
        self.job, self.settings = job, settings
        self._state = State(interventions)
        self._step: Step | None = None  # what is waited for; None: the next sampling is to be prepared
        self._calls: list[tuple[CallSpan, ToolResult | None]] = []  # of the turn; None: asked for
        self._asker: Intervention | None = None
        if settings.environment:
            self._step = Call((self._tool_request(settings.names[0], {}),))
        else:
            self._begin(job.record.messages)

    @classmethod
    def resume(cls, job: Job, settings: TurnSettings, state: State) -> Turns:
        turns = cls.__new__(cls)
        turns.job, turns.settings, turns._state = job, settings, copy.deepcopy(state)
        turns._step, turns._calls, turns._asker = None, [], None
        return turns

    def state(self) -> State:
        """To resume from. Only between two turns, when `next` would be a Sample that nobody has begun."""
        if not (self._step is None or isinstance(self._step, Sample)):
            raise MismatchError(f"trajectory {self.job.uid} is inside a {type(self._step).__name__}, not between turns")
        return copy.deepcopy(self._state)

    def pause(self, spent_s: float) -> State:
        """`state`, with the seconds that this rollout spent on it."""
        state = self.state()
        state.spent_s += spent_s
        return state

    def next(self, spent_s: float = 0.0) -> Step:
        """What is to be done now. `spent_s`: seconds that this rollout has spent on the trajectory."""
        if self._step is None:
            self._step = self._sample(spent_s)
        return self._step

    def left_s(self, spent_s: float) -> float:
        """What is left of tools.deadline_s: a call may wait so long for a place."""
        return max(0.0, self.settings.options.deadline_s - self._state.spent_s - spent_s)

    # -- what came back ----------------------------------------------------------------------------------------------

    def sampled(self, completion: Completion) -> None:
        self._expect(Sample, completion)
        state = self._state
        segment = model_segment(completion)
        state.segments.append(segment)
        state.requests += 1
        state.turn_tokens += len(segment.ids)
        self._step = None
        if completion.finish_reason == "length":
            self._step = Done("length")  # a call that is not complete is never run
            return
        if completion.stop is None or completion.stop in self.settings.format.stops:
            self._turn_over(ended=completion.stop is None)
        else:
            self._halted(completion.stop, len(segment.ids))

    def results(self, results: Sequence[ToolResult]) -> None:
        step = self._expect(Call)
        if len(results) != len(step.requests):
            raise MismatchError(f"trajectory {self.job.uid}: {len(results)} results of {len(step.requests)} calls")
        for result in results:
            if result.status == "infra_error" or (self.settings.environment and result.status != "ok"):
                raise InfrastructureError(f"tool call failed ({result.status}): {result.text or result.limit}")
        if not self._state.segments:
            self._begin(observed(self.job.record.messages, self.settings.new_text, self.settings.options, results[0]))
            self._step = None
            return
        came = iter(results)
        self._answer([(span, result or next(came)) for span, result in self._calls])

    def asked(self, completion: Completion) -> None:
        self._expect(Ask, completion)
        assert self._asker is not None
        self._state.asked_tokens += len(completion.ids)
        self._step = None
        control = self._asker.answered(decode(self.settings.tokenizer, completion.ids.tolist(), special=False))
        if control:
            self._control(control)

    def trajectory(self) -> Trajectory:
        """What has become of it; `reward` is there only where it is masked, whatever a rule would say."""
        if not isinstance(self._step, Done):
            raise MismatchError(f"trajectory {self.job.uid} has not ended")
        return finished(self.job, self.settings, self._state, self._step.reason)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def _begin(self, messages: tuple[dict[str, str], ...]) -> None:
        settings, record = self.settings, self.job.record
        ids = None if settings.environment else settings.prompts.get(record.id)
        if ids is None:
            ids = render_prompt(settings.tokenizer, messages, settings.schemas)
        if len(ids) > settings.max_prompt_tokens:
            # An observation is this sample's alone; a prompt of the task is the run's mistake.
            error = MismatchError if settings.environment else ConfigError
            raise error(
                f"prompt {record.id} has {len(ids)} tokens, with what it says of tools or shows of an environment: "
                f"over task.max_prompt_tokens={settings.max_prompt_tokens}. Fix: raise task.max_prompt_tokens, or drop "
                "long problems from the task."
            )
        if not settings.environment:
            settings.prompts[record.id] = ids
        self._state.segments.append(Segment("prompt", np.asarray(ids)))

    def _sample(self, spent_s: float) -> Step:
        settings, options, state = self.settings, self.settings.options, self._state
        if options.enabled and state.requests and state.spent_s + spent_s > options.deadline_s:
            return Done("deadline")
        ids = self._ids()
        room = min(settings.max_response_tokens - self._sampled(), settings.context - len(ids))
        if options.turn_tokens:
            room = min(room, options.turn_tokens - state.turn_tokens)
        if room <= 0:
            return Done("length")
        number = state.requests
        stops = dict.fromkeys([*settings.format.stops, *(s for i in state.interventions for s in i.stops)])
        return Sample(Request(
            f"{self.job.uid}/{number}", ids, room, settings.temperature, turn_seed(self.job.seed, number),
            settings.stop_ids, tuple(stops),
        ))  # fmt: skip

    def _halted(self, stop: str, fresh: int) -> None:
        """An intervention wanted to look: it may ask, or the sampling goes on from the same ids."""
        settings, state = self.settings, self._state
        prompt, *rest = state.segments
        ids = np.concatenate([s.ids for s in rest]).tolist()
        view = TurnView(
            self._decode(prompt.ids), self._decode(ids), len(self._decode(ids[: len(ids) - fresh])), self._sampled(),
            self.job.record.messages,
        )  # fmt: skip
        for intervention in state.interventions:
            question = intervention.at_stop(view) if stop in intervention.stops else None
            if question is None:
                continue
            asked = render_prompt(settings.tokenizer, question.messages)
            asked += settings.new_text.after(asked, question.opening) if question.opening else []
            if len(asked) + question.max_tokens > settings.context:
                state.not_asked += 1
                continue
            uid = f"{self.job.uid}/{state.requests}/question"
            self._asker = intervention
            self._step = Ask(Request(uid, asked, question.max_tokens, 0.0, 0, settings.stop_ids))
            return

    # -- calls -------------------------------------------------------------------------------------------------------

    def _turn_over(self, ended: bool) -> None:
        settings, state = self.settings, self._state
        ids, logprobs = self._written()
        text = self._decode(ids)
        calls = settings.format.calls(text, ended)
        if not calls:
            # Halted at a string that opens no call (a format may say so): the model goes on.
            self._step = Done("stop") if ended else None
            return
        if len(state.uses) + len(calls) > settings.options.max_calls:
            self._step = Done("max_calls")
            return
        self._calls = [(self._span(call, ids, logprobs, text), self._refused(call)) for call in calls]
        wanted = [span.call for span, result in self._calls if result is None]
        if wanted:
            self._step = Call(tuple(self._tool_request(call.name, call.arguments) for call in wanted))
        else:
            self._answer([(span, result) for span, result in self._calls if result is not None])

    def _span(self, call: ToolCall, ids: list[int], logprobs: np.ndarray, text: str) -> CallSpan:
        if not self._state.interventions:  # nobody asks: it takes a search over the turn
            return CallSpan(call, None)
        found = token_span(self.settings.tokenizer, ids, text, *call.span)
        return CallSpan(call, None if found is None else logprobs[found[0] : found[1]])

    def _refused(self, call: ToolCall) -> ToolResult | None:
        """What a call that is not run is answered with."""
        names = self.settings.names
        if call.problem:
            return ToolResult("parse_error", f"error: {call.problem}")
        if call.name not in names:
            known = ", ".join(names)
            return ToolResult("unknown_tool", f"error: there is no tool {call.name!r:.80}; there are {known}")
        return None

    def _tool_request(self, name: str, arguments: dict[str, Any]) -> ToolRequest:
        state, options = self._state, self.settings.options
        history = tuple(earlier for tool, earlier in state.history if tool == name)
        context = self.job.record.data if self.settings.environment else {}
        return ToolRequest(self.job.uid, state.turn, name, arguments, history, context, options.call_deadline_s)

    def _answer(self, answered: list[tuple[CallSpan, ToolResult]]) -> None:
        """Append the results of the turn, and what interventions say to them; the next turn begins."""
        settings, state = self.settings, self._state
        shown = [shown_text(result) for _, result in answered]
        done = settings.environment and answered[-1][1].done
        if not done:
            fitting = self._fit(shown)
            if fitting is None:
                self._step = Done("total_tokens")
            else:
                shown, ids = fitting
                self._append("tool", ids)
        else:
            self._step = Done("done")
        for (span, result), text in zip(answered, shown, strict=True):
            if result.status == "ok":
                state.history.append((span.call.name, span.call.arguments))
            state.uses.append(tool_use(state.turn, span.call, result, text))
        self._calls = []
        if isinstance(self._step, Done):
            return
        self._step = None
        state.turn += 1
        state.turn_tokens = 0
        for intervention in state.interventions:
            if control := intervention.after_tools(answered):
                self._control(control)

    def _fit(self, texts: list[str]) -> tuple[list[str], list[int]] | None:
        """The texts as they are shown, and the ids of all that is appended with them; None: there is no room."""
        settings, new_text, before = self.settings, self.settings.new_text, self._ids()
        ids, _ = self._written()
        end = self._end()
        text = self._decode(ids)

        def write(results: Sequence[str]) -> str:
            return settings.format.appended(text, end, results)

        harmless = [new_text.escape(each) for each in texts]
        limit = settings.options.output_tokens
        while True:
            shown = [new_text.shorten(each, limit) for each in harmless]
            ids = new_text.append(before, write, shown)
            over = len(ids) - self._room()
            if over <= 0:
                self._state.cut += sum(a != b for a, b in zip(shown, harmless, strict=True))
                return shown, ids
            longest = max(len(new_text.encode(each)) for each in shown)
            limit = min(limit, longest) - max(1, over // len(texts))
            if limit < LEAST:
                return None

    def _control(self, text: str) -> None:
        ids = self.settings.new_text.after(self._ids(), text)
        if len(ids) > self._room():
            self._state.control_left_out += 1
        else:
            self._append("control", ids)

    def _append(self, kind: Any, ids: list[int]) -> None:
        self._state.segments.append(Segment(kind, np.asarray(ids)))
        self._state.new_tokens += len(ids)

    def _room(self) -> int:
        """Tokens of new text that may still come, with one left to sample behind them."""
        left = self.settings.options.total_tokens - self._state.new_tokens
        return min(left, self.settings.context - len(self._ids()) - 1)

    # -- ids and text ------------------------------------------------------------------------------------------------

    def _ids(self) -> list[int]:
        return np.concatenate([s.ids for s in self._state.segments]).tolist()

    def _sampled(self) -> int:
        return sum(len(s.ids) for s in self._state.segments if s.kind == "model")

    def _written(self) -> tuple[list[int], np.ndarray]:
        """Ids and log-probs of what the model wrote last, without the token that ended its turn."""
        last = last_turn(self._state.segments)
        ids = np.concatenate([s.ids for s in last]).tolist()
        logprobs = np.concatenate([s.logprobs for s in last if s.logprobs is not None])
        kept = without_end(ids, self.settings.stop_ids)
        return kept, logprobs[: len(kept)]

    def _end(self) -> str:
        last = int(self._state.segments[-1].ids[-1])
        return self._decode([last]) if last in self.settings.stop_ids else ""

    def _decode(self, ids: Any) -> str:
        return decode(self.settings.tokenizer, list(ids))

    def _expect(self, kind: Any, completion: Completion | None = None) -> Any:
        step = self._step
        if not isinstance(step, kind):
            raise MismatchError(f"trajectory {self.job.uid} waits for {step}, not for a {kind.__name__}")
        if completion is not None and completion.uid != step.request.uid:
            raise MismatchError(f"trajectory {self.job.uid} waits for {step.request.uid}, not for {completion.uid}")
        return step
