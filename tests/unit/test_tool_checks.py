"""What tools, ATTC and DTSR keep a run from starting, and what they make room for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rltk.checks import check
from rltk.compose import load
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.kv_size import cache_size, context, trajectory_tokens
from rltk.model_folder import resolve_model
from rltk.plan import make_plan
from rltk.prompt_checks import check_prompts
from rltk.rollout.dtsr import OPENING, QUESTION, QUESTION_TOKENS
from rltk.rollout.interventions import build_interventions
from rltk.rollout.tokens import load_tokenizer, render_prompt
from rltk.rollout.tools.options import AttcOptions, DtsrOptions, JailOptions, ToolOptions
from rltk.tasks import build_task
from tests.unit.checking import changed, refusal
from tests.unit.some_tokenizers import QWEN, THINKING

PYTHON = ToolOptions(name="python", use=["python"])


def with_tools(config: Config, jail: dict | None = None, **options) -> Config:
    return replace(config, tools=replace(PYTHON, jail=JailOptions(**(jail or {})), **options))


def search(query: str) -> str:
    """Looks `query` up."""
    return query


class Maze:
    """A tool of the run's own that acts by turns."""

    def reset(self, record_data: dict) -> str | None:
        return None

    def step(self, action: str) -> tuple[str, bool]:
        return "", True


SEARCH, MAZE = "tests.unit.test_tool_checks:search", "tests.unit.test_tool_checks:Maze"


@pytest.mark.parametrize("choice", ["python", "retool", "calculator"])
def test_every_choice_can_start(base, choice):
    assert check(replace(base, tools=load([f"tools={choice}"]).tools)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"use": ["python", "calculator", SEARCH], "format": "json"},
        {"use": [MAZE]},  # an environment has no format: every turn is an action
        {"session": "replay"},
        {"jail": {"isolation": "remote", "url": "http://sandbox:8080"}},
    ],
)
def test_tools_that_go_together(base, options):
    assert check(with_tools(base, **options)) == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"use": ["pyton"]}, ["'pyton'", "did you mean python?"]),
        ({"use": ["no_such_module:search"]}, ["no_such_module", "PYTHONPATH"]),
        ({"use": ["python", "python"]}, ["'python'", "rename one"]),
        ({"use": [MAZE, "python"]}, ["Maze", "only tool"]),
        ({"use": []}, ["tools=python", "tools.use = []", "tools.use=[python]"]),
        ({"use": ["calculator"]}, ["tools.format = 'python_block'", "[calculator]", "tools.format=json"]),
        ({"use": ["python", SEARCH], "format": "retool"}, ["tools.format = 'retool'", "tools.format=json"]),
        ({"format": "python-block"}, ["tools.format = 'python-block'", "did you mean python_block?"]),
        ({"use": ["calculator"], "format": "json", "session": "replay"}, ["'replay'", "tools.session=stateless"]),
        ({"session": "kept"}, ["tools.session = 'kept'", "stateless, replay"]),
        ({"void_turns": "masked"}, ["tools.void_turns = 'masked'", "did you mean mask?"]),
        ({"max_calls": 0}, ["tools.max_calls = 0", "at least 1"]),
        ({"turn_tokens": -1}, ["tools.turn_tokens = -1", "at least 0"]),
        ({"output_tokens": 0}, ["tools.output_tokens = 0", "at least 1"]),
        ({"output_tokens": 513}, ["tools.output_tokens = 513", "tools.total_tokens = 512", "= 2052"]),
        ({"slots": 0}, ["tools.slots = 0"]),
        ({"call_deadline_s": 0.0}, ["tools.call_deadline_s = 0.0", "above 0"]),
        ({"call_deadline_s": 301.0}, ["tools.call_deadline_s = 301", "tools.deadline_s = 300"]),
        ({"call_deadline_s": 16.0}, ["4 * 4 = 16 s", "tools.call_deadline_s = 16"]),
        ({"deadline_s": 600.0}, ["tools.deadline_s = 600", "deadlines.rollout = 600"]),
        ({"jail": {"isolation": "strickt"}}, ["tools.jail.isolation = 'strickt'", "did you mean strict?"]),
        ({"jail": {"cpu_s": 0.0}}, ["tools.jail.cpu_s = 0.0", "above 0"]),
        ({"jail": {"wall_factor": 0.5}}, ["tools.jail.wall_factor = 0.5", "at least 1"]),
        ({"jail": {"isolation": "remote"}}, ["'remote'", "tools.jail.url=http://"]),
        ({"jail": {"url": "http://sandbox"}}, ["tools.jail.url = 'http://sandbox'", "tools.jail.isolation=remote"]),
        ({"jail": {"isolation": "remote", "url": "sandbox:80"}}, ["'sandbox:80'", "http://<host>:<port>"]),
    ],
)
def test_tools_that_cannot_work_are_refused(base, options, parts):
    message = refusal(with_tools(base, **options))
    for part in parts:
        assert part in message


def test_what_does_not_count_is_not_refused(base):
    """Keys of tools that the run does not have."""
    assert check(replace(base, tools=ToolOptions(call_deadline_s=1e6, output_tokens=9999))) == []


@pytest.mark.parametrize(
    ("key", "options", "parts"),
    [
        ("attc", AttcOptions(mode="on"), ["attc.mode = 'on'", "off, eval, rollout"]),
        ("attc", AttcOptions(threshold=0.0), ["attc.threshold = 0.0", "above 0"]),
        ("attc", AttcOptions(threshold=1.1), ["attc.threshold = 1.1", "at most 1"]),
        ("dtsr", DtsrOptions(mode="yes"), ["dtsr.mode = 'yes'", "off, eval, rollout"]),
        ("dtsr", DtsrOptions(threshold=101), ["dtsr.threshold = 101", "at most 100"]),
        ("dtsr", DtsrOptions(threshold=0), ["dtsr.threshold = 0", "at least 1"]),
        ("dtsr", DtsrOptions(gap_tokens=-1), ["dtsr.gap_tokens = -1"]),
        ("dtsr", DtsrOptions(max_checks=0), ["dtsr.max_checks = 0"]),
        ("dtsr", DtsrOptions(reply_tokens=0), ["dtsr.reply_tokens = 0"]),
        ("dtsr", DtsrOptions(mode="eval", signals=[]), ["dtsr.signals = []", "[Wait]"]),
        ("dtsr", DtsrOptions(mode="eval", signals=["Wait", " "]), ["dtsr.signals = ['Wait', ' ']"]),
        ("dtsr", DtsrOptions(mode="eval", closes=""), ["dtsr.opens = '<think>'", "dtsr.closes=</think>"]),
    ],
)
def test_interventions_that_cannot_work_are_refused(base, key, options, parts):
    message = refusal(replace(with_tools(base), **{key: options}))
    for part in parts:
        assert part in message


def test_attc_needs_tools_and_in_training_a_temperature_of_1(base):
    attc = AttcOptions(mode="rollout")
    assert "attc.mode=off" in refusal(replace(base, attc=attc))
    assert "Maze is an environment" in refusal(replace(with_tools(base, use=[MAZE]), attc=attc))
    hot = changed(replace(with_tools(base), attc=attc), {"rollout.temperature": 0.7})
    assert "needs rollout.temperature = 1, not 0.7" in refusal(hot)
    (warning,) = check(hot, training=False)  # an evaluation may, and is told what the threshold means there
    assert "attc.threshold = 0.97" in warning and "T = 1" in warning


def test_warnings(base):
    tools = with_tools(base, jail={"isolation": "best_effort"})
    assert ["best_effort" in line for line in check(tools)] == [True]
    trained = replace(with_tools(base), attc=AttcOptions(mode="rollout"))
    assert ["at inference alone, as attc.mode=eval does" in line for line in check(trained)] == [True]
    assert check(replace(trained, attc=AttcOptions(mode="eval"))) == []
    thinking = replace(base, dtsr=DtsrOptions(mode="rollout", gap_tokens=63))
    assert ["as dtsr.mode=eval does" in line for line in check(thinking)] == [True]
    (late,) = check(replace(base, dtsr=DtsrOptions(mode="eval", gap_tokens=64)))
    assert "dtsr.gap_tokens = 64" in late and "task.max_response_tokens = 64" in late


# -- room ------------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_runs(base):
    notes = [next(role.note for role in make_plan(tools).roles if role.name == "tool executor")
             for tools in (with_tools(base), with_tools(base, use=[MAZE], max_calls=9))]  # fmt: skip
    assert notes[0] == "python (python_block), at most 4 calls a trajectory, isolation strict"
    assert notes[1] == f"{MAZE} (an environment), at most 9 actions a trajectory"


def test_the_context_has_room_for_results_and_for_the_question(base):
    prompt, response = base.task.max_prompt_tokens, base.task.max_response_tokens
    assert context(base) == prompt + response + 1
    tools = with_tools(base, total_tokens=300)
    assert context(tools) == prompt + response + 300 + 1 and trajectory_tokens(tools) == prompt + response + 300
    thinking = replace(tools, dtsr=DtsrOptions(mode="eval", reply_tokens=20))
    assert context(thinking) == context(tools) + QUESTION_TOKENS + 20
    assert trajectory_tokens(thinking) == trajectory_tokens(tools)
    assert cache_size(thinking).tokens == context(thinking) - 1


def test_a_context_without_that_room_is_refused_with_the_sum(base):
    message = refusal(with_tools(base, total_tokens=1000, output_tokens=100))
    assert "task.max_prompt_tokens + task.max_response_tokens + tools.total_tokens = 48 + 64 + 1000 = 1112" in message
    assert "or tools.total_tokens" in message


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_the_question_fits_its_room(model):
    tokenizer = load_tokenizer(resolve_model(load([f"model={model}"])).model.path, None)
    asked = QUESTION.format(problem="", thought="") + f"<think>\n\n</think>\n\n{OPENING}"
    assert len(render_prompt(tokenizer, ({"role": "user", "content": asked},))) <= QUESTION_TOKENS


def test_before_ray_starts_the_template_must_show_the_tools_and_prompts_fit_with_them(tmp_path):
    def ask(*arguments):
        config = resolve_model(load(list(arguments)))
        check_prompts(config, build_task(config.task).held_out(8))

    ask("tools=python")
    with pytest.raises(ConfigError, match=r"does not tell the model of its tools \(calculator\).*Fix:"):
        ask("tools=calculator")
    (tmp_path / "template").write_text(QWEN)
    template = f"model.chat_template={tmp_path / 'template'}"
    with pytest.raises(ConfigError, match=r"8 of 8 prompts have .*=48 tokens, with what they say of tools"):
        ask("tools=calculator", template)
    ask("tools=calculator", template, "task.max_prompt_tokens=800")
    ask(f"tools={MAZE}", template)  # of an environment the model is told nothing


def test_only_a_run_that_appends_needs_a_template_that_only_appends(tmp_path):
    (tmp_path / "template").write_text(THINKING)

    def ask(*arguments):
        config = resolve_model(load([f"model.chat_template={tmp_path / 'template'}", *arguments]))
        check_prompts(config, build_task(config.task).held_out(2))

    ask()
    for arguments in (["tools=python"], ["tools=python", "attc.mode=eval"], ["dtsr.mode=eval"], [f"tools={MAZE}"]):
        with pytest.raises(ConfigError, match=r"not append-only.*model\.chat_template=<file>.*tools=none"):
            ask(*arguments)


def test_defaults_act_nowhere():
    config = Config()
    for evaluation in (True, False):
        assert build_interventions(config.attc, config.dtsr, evaluation) == []


def test_a_prompt_policy_compresses_later_turns_whose_prompt_is_all_that_there_is(base):
    dapq = changed(base, {"kv.name": "dapq", "kv.budget": 60.0, "ratio.reference": "mu"})
    (warning,) = check(dapq)
    assert "task.max_prompt_tokens = 48: nothing is ever compressed" in warning
    assert check(with_tools(dapq)) == []
