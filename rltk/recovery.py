"""What happens when a role dies. Engines are replaced while the step waits; a dead learner rank takes the run back.

    an engine        a new one joins at the current version, what was in flight is issued anew, the call is repeated
    a learner rank   the others are ended, a new group starts, the driver goes back to the last checkpoint; the engines
                     stay as they are and are sent the weights of that checkpoint under a new incarnation
    any other role   the run ends with the error, its last checkpoint in place

Metrics of the run are those of an undisturbed one, times apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray

from rltk.config import Config
from rltk.learner.group import RankDiedError
from rltk.placement import Placement
from rltk.roles import Roles, replace_dead, restart_learner

RECOVERIES = 3  # of dead engines within one call; of the learner between two checkpoints
T = TypeVar("T")


class Recovery:
    """`rejoin()` is called when new engines stand, which still have the model folder's weights; `say(line)` tells."""

    def __init__(
        self,
        config: Config,
        placement: Placement,
        roles: Roles,
        rejoin: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.placement, self.roles = config, placement, roles
        self.rejoin, self.say = rejoin, say
        self._restarts = 0  # of the learner, since the last checkpoint

    def surviving(self, call: Callable[[], T]) -> T:
        """`call()`, again if an engine dies in it. A request's seed does not know of the attempt, so the run goes on as
        if nothing had happened."""
        for left in reversed(range(RECOVERIES + 1)):
            try:
                return call()
            except ray.exceptions.RayActorError as error:
                if not left:
                    raise
                self._replace_engines(error)
        raise AssertionError("unreachable")

    def _replace_engines(self, error: ray.exceptions.RayActorError) -> None:
        """Raises `error` if it was not an engine that died."""
        self.say(f"{self.roles.name_of(error.actor_id)} died ({type(error).__name__}): replacing dead engines")
        if not replace_dead(self.roles, self.config, self.placement):
            raise error
        self.rejoin()

    def restart_learner(self, error: RankDiedError) -> None:
        """A new learner group, at the weights of the model folder: load a checkpoint next. Raises `error` if the group
        died `RECOVERIES` times already and no checkpoint came in between: then it is not by accident."""
        if self._restarts == RECOVERIES:
            raise error
        self._restarts += 1
        self.say(f"{error}: restarting the learner ({self._restarts} of {RECOVERIES} times until the next checkpoint)")
        try:
            restart_learner(self.roles, self.config, self.placement)
        except RankDiedError as again:
            self.restart_learner(again)

    def checkpointed(self) -> None:
        """The run got somewhere."""
        self._restarts = 0
