"""Formats: what counts as a call, and that what is appended is what the chat template itself would have written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.errors import ConfigError, MismatchError
from rltk.rollout.formats import build_format
from rltk.rollout.formats.python_block import PythonBlock
from rltk.rollout.formats.retool import Retool
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import Signature, ToolCall
from tests.unit.some_tokenizers import CHATML, LOOKS_AHEAD, QWEN, SPECIAL, byte_level, tokenizer

PYTHON = Signature("python", "Runs Python.", {"type": "object", "properties": {"code": {"type": "string"}}})
SEARCH = Signature("search", "Looks up.", {"type": "object", "properties": {"query": {"type": "string"}}})
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2), max_leaves=4,
)  # fmt: skip
arguments = st.dictionaries(st.text(max_size=6), values, max_size=3)
words = st.text(alphabet="ab \n{}\"'é", max_size=12)


def build(name, use=("python",), environment=False, signatures=(PYTHON,), format="json", template=None):
    chosen = tokenizer(name)
    if template is not None:
        chosen = byte_level(SPECIAL, [], template, "<|im_end|>")
    options = ToolOptions(name="x", use=list(use), format=format)
    return build_format(options, chosen, list(signatures), [chosen.eos_token_id], environment), chosen


def test_a_python_block_is_run_where_its_output_is_asked_for():
    block = PythonBlock()
    turn = "Let me see.\n```python\nprint(6 * 7)\n```\n```output"
    (call,) = block.calls(turn, ended=False)
    assert call.arguments == {"code": "print(6 * 7)\n"} and call.name == "python" and not call.problem
    assert turn[slice(*call.span)] == "```python\nprint(6 * 7)\n```"
    assert block.calls(turn[: turn.index("```output")], ended=True) == ()
    assert block.stops == ("```output",)


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        ("```python\na = 1\n```\nno, better:\n```python\nb = 2\n```\n```output", "b = 2\n"),  # the last one
        ("```python\na = 1\n```output", "a = 1\n"),  # its own fence left out
        ("```py\na\n``` and so ```output\n", "a\n"),  # the last token reaches past the stop string
        ("```python\nprint('```')\n```\n```output", "print('```')\n"),  # a fence stands at the start of a line
        ("```python\n```\n```output", ""),
    ],
)
def test_which_code_is_run(turn, code):
    (call,) = PythonBlock().calls(turn, ended=False)
    assert (call.arguments, call.problem) == ({"code": code}, "")


def test_an_output_block_without_code_is_a_problem():
    (call,) = PythonBlock().calls("I guess\n```output", ended=False)
    assert "no ```python block" in call.problem and call.span == (8, 17)


@pytest.mark.parametrize(("overshoot", "lead"), [("", "\n"), ("\n", "")])
def test_a_result_stands_on_lines_of_its_own(overshoot, lead):
    assert PythonBlock().appended(f"...```output{overshoot}", "", ["42"]) == f"{lead}42\n```\n"
    shown = Retool().appended(f"...</code>{overshoot}", "", ["42"])
    assert shown == f"{lead}<interpreter>\n42\n</interpreter>\n"


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        ("So <code>\nprint(1)\n</code>", "print(1)\n"),
        ("<code>print(1)</code>\n", "print(1)"),
        ("<code>\n```python\nprint(1)\n```\n</code>", "print(1)\n"),
        ("<code>old</code> <code>new</code>", "new"),
    ],
)
def test_retool_runs_what_stands_between_the_tags(turn, code):
    (call,) = Retool().calls(turn, ended=False)
    assert call.arguments == {"code": code} and turn[: call.span[1]].endswith("</code>")
    assert turn[call.span[0] :].startswith("<code>") and Retool().calls(turn, ended=True) == ()


def test_retool_without_an_opening_tag_is_a_problem():
    (call,) = Retool().calls("print(1)</code>", ended=False)
    assert call.problem and call.span == (8, 15)


@pytest.mark.parametrize("name", ["qwen", "llama"])
@settings(max_examples=40)
@given(name_of=st.sampled_from(["python", "search", "other"]), given_arguments=arguments, before=words)
def test_a_call_as_the_template_writes_it_is_read_back(name, name_of, given_arguments, before):
    made, chosen = build(name, ["python", "x:search"], signatures=[PYTHON, SEARCH])
    call = {"type": "function", "function": {"name": name_of, "arguments": given_arguments}}
    user = {"role": "user", "content": "one"}
    written = chosen.apply_chat_template(
        [user, {"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False
    )
    header = chosen.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    turn = written[len(header) :].replace(chosen.eos_token, "").rstrip("\n")
    if name == "qwen":
        turn = before + turn
    (read,) = made.calls(turn, ended=True)
    assert (read.name, read.arguments, read.problem) == (name_of, given_arguments, "")
    assert turn[slice(*read.span)].strip() == turn[len(before) if name == "qwen" else 0 :].strip()


def test_several_calls_of_one_turn_are_read_in_order():
    made, _ = build("qwen")
    one, two = (json.dumps({"name": "python", "arguments": {"code": code}}) for code in "ab")
    turn = f"First\n<tool_call>\n{one}\n</tool_call>\n<tool_call>{two}</tool_call> done"
    assert [call.arguments["code"] for call in made.calls(turn, ended=True)] == ["a", "b"]
    assert [turn[slice(*c.span)][:11] for c in made.calls(turn, ended=True)] == ["<tool_call>"] * 2
    assert [c.arguments["code"] for c in made.calls(f"<tool_call>{one}\n{two}</tool_call>", ended=True)] == ["a", "b"]
    bare, _ = build("llama")
    one, two = (json.dumps({"name": "python", "parameters": {"code": code}}) for code in "ab")
    assert [c.arguments["code"] for c in bare.calls(f"{one}; {two}", ended=True)] == ["a", "b"]
    assert [c.arguments["code"] for c in bare.calls(f"<|python_tag|>{one}", ended=True)] == ["a"]


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        ('{"name": "python", "arguments": {"code": ', "not valid JSON"),
        ("", "empty"),
        ("[]", 'no "name"'),
        ('{"name": 3}', 'no "name"'),
        ('{"name": "python", "arguments": [1]}', "not a JSON object"),
        ('{"name": "python", "arguments": "no json"}', "not a JSON object"),
    ],
)
def test_what_is_meant_as_a_call_and_is_none_says_why(inside, problem):
    made, _ = build("qwen")
    (call,) = made.calls(f"So <tool_call>\n{inside}\n</tool_call>", ended=True)
    assert problem in call.problem and call.span[0] == 3


def test_what_is_no_call():
    made, _ = build("qwen")
    call = '<tool_call>{"name": "python", "arguments": {}}</tool_call>'
    assert made.calls("the answer is 42", ended=True) == ()
    assert made.calls(f"<think>perhaps {call}</think> 42", ended=True) == ()  # only thought of
    assert made.calls(f"<think>hm</think> {call}", ended=True)[0].name == "python"
    assert made.calls('<tool_call>{"name": "python", "arguments": "{\\"code\\": \\"1\\"}"}', ended=True) == (
        ToolCall("python", {"code": "1"}, (0, 63)),
    )
    bare, _ = build("llama")
    assert bare.calls('{"x": 1}', ended=True) == () == bare.calls("{a set}", ended=True)
    assert bare.calls('{"name": "python", ', ended=True)[0].problem


RESULTS = st.lists(st.text(alphabet='ab1 \n"{}é', min_size=1, max_size=10), min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["qwen", "llama"])
@settings(max_examples=40)
@given(results=RESULTS)
def test_what_is_appended_is_what_the_template_writes_of_the_whole_conversation(name, results):
    made, chosen = build(name)
    call = {"type": "function", "id": "1", "function": {"name": "python", "arguments": {"code": "1"}}}
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    conversation = [{"role": "user", "content": "anything"}, assistant]
    conversation += [{"role": "tool", "content": text} for text in results]
    tools = [PYTHON.function()]
    whole = chosen.apply_chat_template(conversation, tools=tools, tokenize=False, add_generation_prompt=True)
    begun = chosen.apply_chat_template(conversation[:1], tools=tools, tokenize=False, add_generation_prompt=True)
    turn, end, rest = whole[len(begun) :].partition(chosen.eos_token)
    assert made.appended(turn, end, results) == rest
    assert made.appended(turn, "", results) == end + rest  # a turn that nothing ended is ended


@pytest.mark.parametrize("name", ["tiny", "plain", "qwen", "llama", "prefix"])
def test_an_observation_is_the_next_user_turn(name):
    made, chosen = build(name, ["my:World"], environment=True, signatures=[Signature("World", "", {})])
    assert made.calls("go north", ended=True) == (ToolCall("World", {"action": "go north"}, (0, 8)),)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "go"}]
    seen = [*conversation, {"role": "user", "content": "a wall"}]
    whole = chosen.apply_chat_template(seen, tokenize=False, add_generation_prompt=True)
    assert whole.endswith("go" + chosen.eos_token + made.appended("go", chosen.eos_token, ["a wall"]))


def test_a_template_that_looks_ahead_is_refused():
    with pytest.raises(ConfigError, match=r"looks ahead.*model\.chat_template=<file>"):
        build("qwen", ["my:World"], environment=True, signatures=[Signature("World", "", {})], template=LOOKS_AHEAD)
    ahead = QWEN.replace("{{- '<|im_end|>\\n' }}\n{%- endif %}\n{%- endfor %}", (
        "{% if loop.last %}{{- '<last>' }}{% endif %}{{- '<|im_end|>\\n' }}\n{%- endif %}\n{%- endfor %}"
    ))  # fmt: skip
    assert ahead != QWEN
    with pytest.raises(ConfigError, match="looks ahead"):
        build("qwen", template=ahead)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHATML, r"does not tell the model of its tools \(python\)"),
        (QWEN.replace('{"name": "\'', '["call", "\''), "not as a JSON object"),
        (QWEN.replace("<|im_end|>", "</turn>"), "none of the tokens that end a response"),
        (QWEN.replace("message.role == 'tool'", "raise_exception('no tools')"), "cannot render .*no tools"),
    ],
)
def test_json_needs_a_template_that_shows_tools_and_calls(template, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        build("qwen", template=template)
    assert "Fix:" in str(error.value)


def test_a_result_that_the_template_treats_otherwise_ends_the_sample_alone():
    template = QWEN.replace("{%- if message.role == 'tool' %}", (
        "{%- if message.role == 'tool' and message.content == 'bad' %}{{- raise_exception('bad') }}"
        "{%- elif message.role == 'tool' %}"
    ))  # fmt: skip
    made, _ = build("qwen", template=template)
    assert made.appended("", "<|im_end|>", ["good"])
    with pytest.raises(MismatchError, match="bad"):
        made.appended("", "<|im_end|>", ["bad"])


def test_formats_that_write_python_alone_refuse_other_tools():
    for name in ("python_block", "retool"):
        assert build("plain", format=name)[0].stops
        with pytest.raises(ConfigError, match=r"tools\.use=\[python\]"):
            build("plain", ["x:search"], signatures=[SEARCH], format=name)
    with pytest.raises(ConfigError, match=r"'xml' is not one of python_block"):
        build("plain", format="xml")
    assert build("plain", use=[])[0].stops == ()


def test_llamas_template_writes_results_as_json():
    made, _ = build("llama")
    assert json.dumps("a\nb") in made.appended("", "<|eot_id|>", ["a\nb"])
