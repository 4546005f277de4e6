"""How a model does on held-out problems: sampled by transformers; where a task has tools, Python runs in the jail."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from rltk.errors import InfrastructureError
from rltk.models.generation import plain
from rltk.rollout.formats.python_block import STOP, PythonBlock
from rltk.rollout.steps import shown_text
from rltk.rollout.tokens import ends, render_prompt
from rltk.rollout.tools.options import JailOptions
from rltk.tasks import Task

MAX_CALLS = 4  # of a response, as conf/tools/python.yaml has it
_STOP_WINDOW = 16  # sampled tokens that are searched for the stop string: it has at most nine


@dataclass
class _Response:
    """A response on its way: all ids, what the model wrote of it, and how much of that there is."""

    ids: list[int]
    text: str = ""
    sampled: int = 0
    calls: list[str] = field(default_factory=list)  # how each ended


@torch.no_grad()
def measure(
    model, tokenizer, task: Task, problems: int, samples: int, max_tokens: int, tools: bool = False, rows: int = 2048
) -> dict:
    """Accuracy on held-out problems: `samples` a problem at T = 1, or greedy where `samples` is 0.

    A response has at most `max_tokens` sampled tokens; `rows` are sampled at once. `tools`: Python blocks are run.

    Returns accuracy, the flawed share of the right answers, mean sampled tokens of a response, and accuracy by level;
    with tools also the share of responses that call one, calls a response, and the share of calls by how they ended.
    """
    model.eval()
    records = [r for r in task.held_out(problems) for _ in range(max(1, samples))]
    records.sort(key=lambda r: len(r.messages[-1]["content"]))
    responses = [_Response(render_prompt(tokenizer, r.messages)) for r in records]
    own = model.generation_config
    stops = ends(tokenizer, own.eos_token_id)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if samples else {"do_sample": False}
    # generate() takes what it is not told from the model's own: a penalty or a top_k would change what is measured.
    model.generation_config = plain(own, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **options)
    try:
        for begin in range(0, len(records), rows):
            _respond(model, tokenizer, responses[begin : begin + rows], stops, max_tokens, tools)
    finally:
        model.generation_config = own
    scores = [task.score(record, response.text) for record, response in zip(records, responses, strict=True)]
    right = [score for score in scores if score.correct]
    levels = {}
    for level in sorted({r.level for r in records}, key=int):
        of_level = [s.correct for r, s in zip(records, scores, strict=True) if r.level == level]
        levels[level] = round(sum(of_level) / len(of_level), 3)
    figures = {
        "accuracy": round(len(right) / len(scores), 4),
        "flawed_among_right": round(sum(bool(s.flawed) for s in right) / max(1, len(right)), 4),
        "mean_tokens": round(sum(r.sampled for r in responses) / len(scores), 1),
        "levels": levels,
    }
    return figures | (_tool_figures(responses) if tools else {})


def _tool_figures(responses: list[_Response]) -> dict:
    ended = [status for r in responses for status in r.calls]
    return {
        "tool_use": round(sum(bool(r.calls) for r in responses) / len(responses), 4),
        "calls": round(len(ended) / len(responses), 3),
        "ended": {status: round(ended.count(status) / len(ended), 4) for status in sorted(set(ended))},
    }


def _respond(model, tokenizer, responses: list[_Response], stops: list[int], max_tokens: int, tools: bool) -> None:
    """Sample until every response has ended; between two rounds, run what those that stopped at a call have written."""
    run = python_in_jail() if tools else None
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        going = responses
        while going:
            texts = _sample(model, tokenizer, going, stops, max_tokens, tools)
            called = [(r, text) for r, text in zip(going, texts, strict=True) if tools and STOP in text]
            called = [(r, text) for r, text in called if len(r.calls) < MAX_CALLS]
            outcomes = threads.map(run, [text for _, text in called]) if run else []
            going = []
            for (response, text), (status, output) in zip(called, outcomes, strict=True):
                appended = PythonBlock().appended(text, "", [output])
                response.ids += tokenizer.encode(appended, add_special_tokens=False)
                response.calls.append(status)
                if response.sampled < max_tokens:
                    going.append(response)


def _sample(model, tokenizer, going: list[_Response], stops: list[int], max_tokens: int, tools: bool) -> list[str]:
    """One turn of each: what was written is added to it, and returned."""
    device = next(model.parameters()).device
    inputs = tokenizer.pad({"input_ids": [r.ids for r in going]}, return_tensors="pt", padding_side="left").to(device)
    width = inputs["input_ids"].shape[1]
    at_call = _AtCall(tokenizer, width)
    criteria = StoppingCriteriaList([at_call] if tools else [])
    most = max(max_tokens - r.sampled for r in going)
    out = model.generate(**inputs, max_new_tokens=most, stopping_criteria=criteria)[:, width:]
    texts = []
    for number, (response, row) in enumerate(zip(going, out.tolist(), strict=True)):
        # What follows its end is padding, which may be one of `stops` itself.
        end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
        ids = row[: min(end, at_call.lengths.get(number, end), max_tokens - response.sampled)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        response.ids += ids
        response.text += text
        response.sampled += len(ids)
        texts.append(text)
    return texts


class _AtCall(StoppingCriteria):
    """Rows whose sampled text, from token `width` on, ends in the stop string. `lengths`: tokens that such a row had
    sampled by then, by its number."""

    def __init__(self, tokenizer, width: int):
        self.tokenizer, self.width = tokenizer, width
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        sampled = input_ids[:, self.width :]
        found = [STOP in tail for tail in self.tokenizer.batch_decode(sampled[:, -_STOP_WINDOW:])]
        for row, stopped in enumerate(found):
            if stopped:
                self.lengths.setdefault(row, sampled.shape[1])
        return torch.tensor(found, device=input_ids.device)


def python_in_jail() -> Callable[[str], tuple[str, str]]:
    """From the text of a turn that stopped at a call to (how the call ended, what the model is shown)."""
    from rltk.rollout.jail import Jail

    jail = Jail(JailOptions())

    def run(text: str) -> tuple[str, str]:
        call = PythonBlock().calls(text, ended=False)[0]
        if call.problem:
            return "parse_error", call.problem
        result = jail.run(call.arguments["code"])
        if result.status == "infra_error":
            raise InfrastructureError(f"the jail failed: {result.text}")
        return result.status, shown_text(result)

    return run
