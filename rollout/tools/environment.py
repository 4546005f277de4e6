"""An environment as a tool: reset, then every turn of the model is an action.

Its state lives in the executor, by trajectory. What is lost with an executor is rebuilt: a new environment, reset with
the same data, is given the actions so far. So an environment must be a function of its data and its actions; one that
draws random numbers takes its seed from the data.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rltk.errors import InfrastructureError
from rltk.rollout.tools.threads import Threads
from rltk.rollout.tools.types import Signature, ToolRequest, ToolResult

EPISODES = 10_000  # held at once; beyond, the one longest unused goes, and is rebuilt if it is asked for again

PARAMETERS = {"type": "object", "properties": {"action": {"type": "string"}}, "required": ["action"]}


class Environment(Protocol):
    """What a user writes, built without arguments for every trajectory. Both methods may be async.

    What it raises is a failure of the environment, never told to the model: the sample is left out. An action that
    makes no sense is the model's, and is answered with an observation.
    """

    def reset(self, record_data: dict[str, Any]) -> str | None:
        """Begin: `record_data` is the record's `data`. Returns what is shown before the first action, or None."""
        ...

    def step(self, action: str) -> tuple[str, bool]:
        """Take the model's turn as an action. Returns (observation, done)."""
        ...


@dataclass
class Episode:
    environment: Environment
    actions: list[str] = field(default_factory=list)


class EnvironmentTool:
    """Requests: without arguments, reset (an observation of None is ""); {"action": text}, step, where `history` holds
    the actions before it and `context` the record's data."""

    def __init__(self, make: Callable[[], Environment], signature: Signature, slots: int) -> None:
        self.signature, self._make = signature, make
        self._threads = Threads(signature.name, slots)
        self._episodes: OrderedDict[str, Episode] = OrderedDict()

    async def run(self, request: ToolRequest) -> ToolResult:
        # Out of the store while it is used: what fails or is given up on half-way is never met again.
        held = self._episodes.pop(request.trajectory, None)
        if not request.arguments:
            episode, observation = await self._begin(request)
            self._keep(request.trajectory, episode)
            return ToolResult("ok", observation)
        actions = [str(earlier["action"]) for earlier in request.history]
        episode = held if held is not None and held.actions == actions else await self._rebuild(request, actions)
        observation, done = await self._step(episode, str(request.arguments["action"]))
        if not done:
            self._keep(request.trajectory, episode)
        return ToolResult("ok", observation, done=done)

    async def _begin(self, request: ToolRequest) -> tuple[Episode, str]:
        environment = self._make()
        observation = await self._call(environment.reset, request.context)
        if observation is not None and not isinstance(observation, str):
            raise InfrastructureError(
                f"environment {self.signature.name}: reset returned a {type(observation).__name__}, not a text or None"
            )
        return Episode(environment), observation or ""

    async def _rebuild(self, request: ToolRequest, actions: list[str]) -> Episode:
        episode, _ = await self._begin(request)
        for action in actions:
            _, done = await self._step(episode, action)
            if done:
                raise InfrastructureError(
                    f"environment {self.signature.name} ended at action {len(episode.actions)} when its actions were "
                    "repeated, and had not before: it must be a function of its data and its actions"
                )
        return episode

    async def _step(self, episode: Episode, action: str) -> tuple[str, bool]:
        answer = await self._call(episode.environment.step, action)
        match answer:
            case (str() as observation, done) if done in (True, False):
                episode.actions.append(action)
                return observation, bool(done)
        raise InfrastructureError(
            f"environment {self.signature.name}: step returned {answer!r:.100}, not (observation: str, done: bool)"
        )

    async def _call(self, method: Callable[..., Any], argument: Any) -> Any:
        if inspect.iscoroutinefunction(method):
            return await method(argument)
        return await self._threads.run(method, argument)

    def _keep(self, trajectory: str, episode: Episode) -> None:
        self._episodes[trajectory] = episode
        while len(self._episodes) > EPISODES:
            self._episodes.popitem(last=False)
