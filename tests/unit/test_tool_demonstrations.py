"""The examples of the warm start with a tool are what the turn loop would have made of the same responses."""

import random

import numpy as np
import pytest

from rltk.rollout.engine import Completion
from rltk.rollout.formats.python_block import PythonBlock
from rltk.rollout.interventions import build_interventions
from rltk.rollout.jail import Jail
from rltk.rollout.job import Job
from rltk.rollout.new_text import NewText
from rltk.rollout.steps import Ask, Call, Done, TurnSettings
from rltk.rollout.tokens import load_tokenizer, render_prompt
from rltk.rollout.tools.options import AttcOptions, DtsrOptions, JailOptions, ToolOptions
from rltk.rollout.tools.types import ToolResult
from rltk.rollout.turns import Turns
from rltk.sft import CONF, task_config
from rltk.sft_data import draw_examples
from rltk.tasks import build_task
from rltk.tasks.tool_demonstrations import ERROR, STYLES, demonstrate

CONFIG = task_config("arithmetic_tool")
TASK = build_task(CONFIG)
RIGHT = {"solve": True, "guess": False, "slip": False, "ignore": False, "broken": False, "retry": True, "check": True,
         "trust": True, "doubt": True, "close": True}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(CONF.parent / "models" / "tiny"))


def learnt_text(parts):
    return "".join(text for text, learnt in parts if learnt)


@pytest.mark.parametrize("style", RIGHT)
def test_a_style_is_right_or_wrong_as_it_says(style):
    rng = random.Random(style)
    for level in (1, 2, 3):
        record = TASK.sample(rng, level)
        messages, parts = demonstrate(record, style, rng)
        assert messages == record.messages
        assert TASK.score(record, learnt_text(parts)).correct is RIGHT[style]
        assert ("```python" in learnt_text(parts)) == (style != "guess")


def test_every_style_is_named_and_others_are_refused():
    assert set(STYLES) == {*RIGHT, "judge"}
    with pytest.raises(ValueError, match="'luck'"):
        demonstrate(TASK.problem(0), "luck", random.Random(0))


def test_a_slip_changes_one_digit_of_the_code():
    rng = random.Random(0)
    for level in (1, 2, 3):
        record = TASK.sample(rng, level)
        code = demonstrate(record, "slip", rng)[1][0][0].split("print(")[1].split(")")[0]
        assert sum(a != b for a, b in zip(code, record.data["expression"], strict=True)) == 1


def test_the_jail_says_of_the_code_what_the_examples_say():
    jail = Jail(JailOptions(isolation="best_effort"))
    record = TASK.problem(0)
    for style in ("solve", "broken"):
        (turn, _), (shown, learnt), *_ = demonstrate(record, style, random.Random(0))[1]
        result = jail.run(PythonBlock().calls(turn, ended=False)[0].arguments["code"])
        assert not learnt and shown == PythonBlock().appended(turn, "", [result.text.rstrip("\n")])
        assert (result.status == "error") == (style == "broken") == (ERROR in shown)


def rolled_out(tokenizer, record, parts):
    """The trajectory that the turn loop makes of a model that writes the learnt parts, and a question it asked."""
    control = [text for text, learnt in parts if not learnt]
    turns = [text for text, learnt in parts if learnt]
    sure = iter(0.0 if "I am sure" in text else -1.0 for text in control if text.startswith("I am "))
    attc = AttcOptions(mode="eval" if any(text.startswith("I am ") for text in control) else "off")
    dtsr = DtsrOptions(mode="eval" if "Wait" in turns else "off", signals=["Wait"], gap_tokens=1, opens="")
    settings = TurnSettings(
        tokenizer, NewText(tokenizer), PythonBlock(), ToolOptions(use=["python"]), ("python",), None, False,
        (tokenizer.eos_token_id,), 1.0, CONFIG.max_prompt_tokens, CONFIG.max_response_tokens, 1024,
    )  # fmt: skip
    machine = Turns(Job("u", "g", record, 0), settings, build_interventions(attc, dtsr, True, ["\\boxed{"]))
    question = None
    while not isinstance(step := machine.next(), Done):
        if isinstance(step, Call):
            (request,) = step.requests
            code = request.arguments["code"].removeprefix("print(").rstrip()
            bad = not code.endswith(")")
            machine.results([ToolResult("error", ERROR) if bad else ToolResult("ok", f"{eval(code[:-1])}\n")])
            continue
        if isinstance(step, Ask):
            question, text, stop = step.request, " 100", None
        else:
            text = turns.pop(0)
            stop = next((s for s in ("```output", "Wait") if text.endswith(s)), None)
        ids = tokenizer.encode(text + ("" if stop else tokenizer.eos_token))
        logprob = next(sure, 0.0) if stop == "```output" else 0.0
        completion = Completion(step.request.uid, np.array(ids), np.full(len(ids), logprob), "stop", (0, 0), stop=stop)
        (machine.asked if isinstance(step, Ask) else machine.sampled)(completion)
    assert not turns
    return machine.trajectory(), question


@pytest.mark.parametrize("style", [style for style in STYLES if style != "judge"])
def test_examples_have_the_ids_and_the_mask_of_the_turn_loop(tokenizer, style, monkeypatch):
    drawn = []

    def remembered(record, style, rng):
        drawn.append((record, demonstrate(record, style, rng)[1]))
        return record.messages, drawn[-1][1]

    monkeypatch.setattr("rltk.tasks.tool_demonstrations.demonstrate", remembered)
    examples = draw_examples(tokenizer, TASK, {2: {style: 1.0}}, 4, seed=0, processes=1)
    for number, (record, parts) in enumerate(drawn):
        here = slice(int(examples.starts[number]), int(examples.starts[number] + examples.lengths[number]))
        trajectory, _ = rolled_out(tokenizer, record, parts)
        assert trajectory.ids.tolist() == examples.ids[here].tolist()
        assert trajectory.mask.tolist() == examples.learnt[here].tolist()


def test_the_question_of_an_example_is_the_one_that_dtsr_asks(tokenizer):
    record = TASK.problem(0)
    _, question = rolled_out(tokenizer, record, demonstrate(record, "close", random.Random(0))[1])
    rng = random.Random(0)
    for _ in range(20):
        messages, (opening, reply) = demonstrate(record, "judge", rng)
        if reply[0] == " 100":
            asked = [*render_prompt(tokenizer, messages), *tokenizer.encode(opening[0])]
            assert asked == question.prompt_ids
            return
    raise AssertionError("no example says 100")
