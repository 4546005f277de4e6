"""A user's function as a tool: its typed signature becomes the JSON schema that the model sees and calls are held to.

    def search(query: Annotated[str, "what to look for"], count: int = 3) -> list[str]:
        "Finds passages of the manual."

Sync functions run in threads, async ones on the executor's loop; what they return is shown as it is (text) or as JSON.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

from rltk.errors import ConfigError, InfrastructureError
from rltk.rollout.tools.threads import Threads
from rltk.rollout.tools.types import Signature, ToolRequest, ToolResult

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
PYTHON = {name: kind for kind, name in PLAIN.items()} | {"array": list, "object": dict}
SUPPORTED = "str, int, float, bool, list[...], dict[str, ...], Literal[...], these | None, Any"


class FunctionTool:
    """`slots`: threads of a sync function.

    A call that does not fit the schema is parse_error, and what the function raises is error: both are told to the
    model. The function's own failures (a server that is down) must not be: let it raise InfrastructureError or
    ConnectionError, and the call is tried elsewhere, then the sample left out.
    """

    def __init__(self, function: Callable[..., Any], signature: Signature, slots: int) -> None:
        self.signature, self._function = signature, function
        self._threads = None if inspect.iscoroutinefunction(function) else Threads(signature.name, slots)

    async def run(self, request: ToolRequest) -> ToolResult:
        problem = misfit(request.arguments, self.signature.parameters, self.signature.name)
        if problem:
            return ToolResult("parse_error", problem)
        try:
            if self._threads is None:
                value = await self._function(**request.arguments)
            else:
                value = await self._threads.run(lambda: self._function(**request.arguments))
        except (InfrastructureError, ConnectionError, MemoryError):
            raise
        except TimeoutError as error:
            return ToolResult("timeout", _words(error), limit="the function's own")
        except (Exception, SystemExit) as error:
            return ToolResult("error", _words(error))
        return ToolResult("ok", shown(value))


def signature_of(function: Callable[..., Any], path: str) -> Signature:
    """Raises ConfigError naming the parameter that has no type, or one that no schema describes."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # a name in an annotation that does not exist, or what importing it raises
        raise ConfigError(f"tools.use: the types of {path} cannot be read: {error}") from error
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"tools.use: {path} takes {parameter}; a tool's parameters have a name and a type each")
        if parameter.name not in hints:
            raise ConfigError(
                f"tools.use: parameter {parameter.name!r} of {path} has no type; write {parameter.name}: str, say"
            )
        schema = _schema(hints[parameter.name], f"parameter {parameter.name!r} of {path}")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif isinstance(parameter.default, (str, int, float, bool)):
            schema = {**schema, "default": parameter.default}
        properties[parameter.name] = schema
    return Signature(
        function.__name__,
        inspect.getdoc(function) or "",
        {"type": "object", "properties": properties, "required": required},
    )


def misfit(arguments: dict[str, Any], parameters: dict[str, Any], name: str) -> str:
    """Why a call does not fit a tool's schema, for the model; "": it does."""
    known = parameters["properties"]
    for key in arguments:
        if key not in known:
            return f"{name} has no argument {key!r}; it takes {', '.join(known) or 'none'}"
    for key in parameters["required"]:
        if key not in arguments:
            return f"{name} needs the argument {key!r}"
    for key, value in arguments.items():
        if not _fits(value, known[key]):
            wanted = json.dumps({part: entry for part, entry in known[key].items() if part != "description"})
            return f"argument {key!r} of {name} is {_short(value)}; it must be {wanted}"
    return ""


def shown(value: Any) -> str:
    """What a function returned, as the model reads it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _schema(annotation: Any, where: str) -> dict[str, Any]:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        notes = [note for note in inner[1:] if isinstance(note, str)]
        return _schema(inner[0], where) | ({"description": notes[0]} if notes else {})
    if annotation is Any:
        return {}
    if annotation in PLAIN:
        return {"type": PLAIN[annotation]}
    if origin is Literal and all(type(choice) in PLAIN for choice in inner):
        kinds = {type(choice) for choice in inner}
        return ({"type": PLAIN[kinds.pop()]} if len(kinds) == 1 else {}) | {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(option, where) for option in inner]}
    if annotation is list or origin is list:
        return {"type": "array"} | ({"items": _schema(inner[0], where)} if inner else {})
    if annotation is dict or (origin is dict and inner[0] is str):
        return {"type": "object"} | ({"additionalProperties": _schema(inner[1], where)} if inner else {})
    raise ConfigError(f"tools.use: {where} is a {annotation}, which no call can carry; use {SUPPORTED}")


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(_fits(value, option) for option in schema["anyOf"])
    if "enum" in schema and not any(type(value) is type(choice) and value == choice for choice in schema["enum"]):
        return False
    kind = schema.get("type")
    if kind is None:
        return True
    if kind in ("integer", "number"):
        return type(value) is int or (kind == "number" and type(value) is float)  # bool is an int to isinstance
    if not isinstance(value, PYTHON[kind]):
        return False
    if kind == "array":
        return all(_fits(item, schema.get("items", {})) for item in value)
    if kind == "object":
        return all(_fits(item, schema.get("additionalProperties", {})) for item in value.values())
    return True


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
