"""What an objective may ask for in `needs`, and what supplies it. No objective is known here by name.

    field                             comes from                                                  goes to
    reward, pass_rate, group_length   the scored groups, before any split                         prepare, loss
    hidden                            the pass before the step, the one that finds `old`          prepare (loss: d = 0)
    entropy                           that pass; at the current weights, the loss pass            prepare; loss
    hellinger, forward_kl             the loss pass, policy and reference side by side, in chunks loss
    ref                               the loss pass too; before the steps if there is a `prepare` prepare, loss

With ratio.reference=mu no pass before the step covers all of its minibatches: `prepare` goes without entropy, and
hidden states are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from rltk.algorithms import Objective
from rltk.algorithms.distributions import MEASURES, OF_REFERENCE
from rltk.errors import ConfigError
from rltk.learner.settings import LearnerSettings

OF_GROUPS = frozenset({"reward", "pass_rate", "group_length"})
WITH_REFERENCE = OF_REFERENCE | {"ref"}  # what the frozen reference has a part in
KNOWN = OF_GROUPS | WITH_REFERENCE | set(MEASURES) | {"hidden"}


@dataclass(frozen=True)
class Needs:
    """The fields of `asked`, by what supplies them.

    prepares: the objective or its correction has a `prepare` of its own; passes: the pass before the step covers every
    minibatch.
    """

    asked: frozenset[str]
    prepares: bool
    passes: bool

    @property
    def of_groups(self) -> frozenset[str]:
        """Columns of the scored groups."""
        return self.asked & OF_GROUPS

    @property
    def before(self) -> frozenset[str]:
        """What the policy adds to `old` in the pass before the step."""
        return self.asked & ({"entropy", "hidden"} if self.prepares and self.passes else set())

    @property
    def ref_before(self) -> bool:
        """Whether the reference runs before the steps."""
        return "ref" in self.asked and self.prepares

    @property
    def in_loss(self) -> frozenset[str]:
        """What the policy adds to `new` in the loss pass."""
        return (self.asked & (WITH_REFERENCE | set(MEASURES))) - ({"ref"} if self.prepares else set())

    @property
    def reference(self) -> bool:
        """Whether a frozen copy of the starting weights must be held."""
        return bool(self.asked & WITH_REFERENCE)


def needs_of(objective: Objective, settings: LearnerSettings) -> Needs:
    """Raises ConfigError for a field that nothing supplies, and where the pass that would supply it is not made."""
    name, asked = settings.algorithm, frozenset(objective.needs)
    if unknown := sorted(asked - KNOWN):
        raise ConfigError(
            f"algorithm={name} needs {', '.join(unknown)}, which the learner cannot supply. "
            f"Fix: `needs` may name {', '.join(sorted(KNOWN))}."
        )
    if "hidden" in asked and objective.reference == "mu":
        raise ConfigError(
            f"algorithm={name} needs the hidden states of before the step; ratio.reference=mu makes no pass before it. "
            "Fix: ratio.reference=old."
        )
    prepares = type(objective).prepare is not Objective.prepare or objective.correction.batch_statistic
    if settings.old == "detach" and (prepares or "hidden" in asked):
        why = "to give it hidden states" if "hidden" in asked else "before its loss"
        raise ConfigError(
            f"learner.old=detach skips the pass that algorithm={name} needs {why}. Fix: learner.old=recompute."
        )
    return Needs(asked, prepares, passes=objective.reference == "old" and settings.old == "recompute")
