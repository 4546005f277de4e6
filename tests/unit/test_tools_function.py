"""User functions as tools: what the model is told of them, and what calls they take."""

import asyncio
import sys
import threading
from typing import Annotated, Any, Literal

import pytest

from rltk.errors import ConfigError, InfrastructureError
from rltk.rollout.tools import registry
from rltk.rollout.tools.function import FunctionTool, misfit, signature_of
from rltk.rollout.tools.options import ToolOptions
from rltk.rollout.tools.types import ToolRequest


def search(query: Annotated[str, "what to look for"], count: int = 3, kind: Literal["text", "code"] = "text") -> str:
    """Finds passages."""
    return f"{count} {kind} of {query}"


def every(a: float, b: bool, c: list[int], d: dict[str, float], e: str | None, f: Any, g: list):
    return {"a": a, "c": c, "e": e}


def raising(how: str) -> None:
    raise {
        "value": ValueError("bad word"), "down": ConnectionRefusedError("down"), "late": TimeoutError("too slow"),
        "infra": InfrastructureError("index is not loaded"), "exit": SystemExit(3), "bare": KeyError(),
    }[how]  # fmt: skip


async def later(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


def call(function, **arguments):
    tool = FunctionTool(function, signature_of(function, "here"), slots=2)
    return asyncio.run(tool.run(ToolRequest("t", 0, function.__name__, arguments)))


def test_the_schema_is_what_the_types_say():
    described = signature_of(search, "here:search").function()["function"]
    assert described == {
        "name": "search",
        "description": "Finds passages.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "what to look for"},
                "count": {"type": "integer", "default": 3},
                "kind": {"type": "string", "enum": ["text", "code"], "default": "text"},
            },
            "required": ["query"],
        },
    }
    assert signature_of(every, "here:every").parameters["properties"] == {
        "a": {"type": "number"},
        "b": {"type": "boolean"},
        "c": {"type": "array", "items": {"type": "integer"}},
        "d": {"type": "object", "additionalProperties": {"type": "number"}},
        "e": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "f": {},
        "g": {"type": "array"},
    }


GOOD = {"a": 1, "b": True, "c": [1, 2], "d": {"x": 0.5}, "e": None, "f": {"any": [1]}, "g": ["a", 1]}


@pytest.mark.parametrize(
    ("key", "value"),
    [("a", "1"), ("a", True), ("b", 1), ("c", [1, 2.5]), ("c", (1,)), ("d", {"x": "y"}), ("e", 3), ("g", "ab")],
)
def test_a_call_is_held_to_the_schema(key, value):
    parameters = signature_of(every, "here:every").parameters
    assert misfit(GOOD, parameters, "every") == ""
    assert f"argument {key!r} of every is" in misfit(GOOD | {key: value}, parameters, "every")


def test_calls_and_what_comes_of_them():
    assert (call(search, query="a").status, call(search, query="a").text) == ("ok", "3 text of a")
    assert call(every, **GOOD).text == '{"a": 1, "c": [1, 2], "e": null}'
    assert call(later, x=41).text == "42"
    assert call(search).text == "search needs the argument 'query'"
    assert call(search, query="a", size=1).text == "search has no argument 'size'; it takes query, count, kind"
    wrong = call(search, query="a", kind="image")
    assert wrong.status == "parse_error" and '"enum": ["text", "code"]' in wrong.text


@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        ("value", "error", "ValueError: bad word"),
        ("bare", "error", "KeyError"),
        ("exit", "error", "SystemExit: 3"),
        ("late", "timeout", "TimeoutError: too slow"),
    ],
)
def test_what_a_function_raises_is_told_to_the_model(how, status, text):
    result = call(raising, how=how)
    assert (result.status, result.text) == (status, text)


@pytest.mark.parametrize("how", ["down", "infra"])
def test_its_own_failures_are_not(how):
    with pytest.raises((ConnectionError, InfrastructureError)):
        call(raising, how=how)


def test_a_thread_that_never_ends_is_counted_and_freed_when_it_does():
    release = threading.Event()

    def stuck(wait: bool) -> str:
        return str(release.wait(20) if wait else "free")

    async def scene():
        tool = FunctionTool(stuck, signature_of(stuck, "here"), slots=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(tool.run(ToolRequest("t", 0, "stuck", {"wait": True})), 0.05)
        with pytest.raises(InfrastructureError, match=r"each of its 1 threads \(tools.slots\)"):
            await tool.run(ToolRequest("t", 1, "stuck", {"wait": False}))
        release.set()
        while tool._threads._busy:
            await asyncio.sleep(0.01)
        return await tool.run(ToolRequest("t", 2, "stuck", {"wait": False}))

    assert asyncio.run(scene()).text == "free"


MODULE = '''
import json
def untyped(query): ...
def starred(*words: str): ...
def tupled(pair: tuple[int, int]): ...
def unknown(x: "Missing"): ...
def search(query: str) -> str:
    "Finds."
    return query
def python(code: str) -> str: ...
class Game:
    """Guess."""
    def reset(self, record_data): ...
    def step(self, action): ...
class Sized(Game):
    def __init__(self, size): ...
class Halved:
    def reset(self, record_data): ...
number = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "user_tools.py").write_text(MODULE)
    (tmp_path / "broken_tools.py").write_text("import not_there_at_all\n")
    (tmp_path / "raising_tools.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("user_tools", "broken_tools", "raising_tools"):
        sys.modules.pop(name, None)


def test_the_entries_of_use(module):
    options = ToolOptions(use=["python", "calculator", "user_tools:search"])
    assert [signature.name for signature in registry.signatures(options)] == ["python", "calculator", "search"]
    assert not registry.environment(options)
    game = ToolOptions(use=["user_tools:Game"])
    assert registry.environment(game) and list(registry.build(game)) == ["Game"]
    assert registry.signatures(game)[0].description == "Guess."
    assert registry.signatures(ToolOptions()) == [] and not registry.environment(ToolOptions())
    replay = registry.signatures(ToolOptions(use=["python"], session="replay"))[0].description
    assert "kept from one call to the next" in replay


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (["pyton"], ["'pyton' is not known", "did you mean python?"]),
        (["user_tools:serch"], ["no attribute 'serch'", "did you mean search?"]),
        (["no_module_here:search"], ["no module 'no_module_here'", "PYTHONPATH"]),
        (["broken_tools:search"], ["imports 'not_there_at_all', which is not installed"]),
        (["raising_tools:search"], ["importing raising_tools raised ZeroDivisionError"]),
        (["user_tools:untyped"], ["parameter 'query'", "has no type", "query: str"]),
        (["user_tools:starred"], ["takes *words"]),
        (["user_tools:tupled"], ["'pair'", "tuple[int, int]", "list[...]"]),
        (["user_tools:unknown"], ["types of user_tools:unknown cannot be read", "Missing"]),
        (["user_tools:number"], ["is a int"]),
        (["user_tools:Halved"], ["a class without step"]),
        (["user_tools:Sized"], ["cannot be built without arguments", "size"]),
        (["python", "user_tools:python"], ["called 'python', as another tool"]),
        (["user_tools:Game", "python"], ["an environment is a run's only tool"]),
    ],
)
def test_what_is_wrong_in_use_is_named(module, use, words):
    with pytest.raises(ConfigError) as error:
        registry.signatures(ToolOptions(use=use))
    assert all(word in str(error.value) for word in ["tools.use", *words]), str(error.value)
