"""What may step into a rollout between two samplings: with text that the model did not write, or a question aside.

One object of each kind a trajectory. It sees text, log-probs and results, and answers with text or a question; the turn
loop tokenizes that text into `control` segments, which carry no log-probs and are never learned from. What the model
sampled stays as it was sampled. Objects are plain data: they are pickled with a trajectory that is paused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rltk.rollout.tools.options import AttcOptions, DtsrOptions
from rltk.rollout.tools.types import ToolCall, ToolResult

if TYPE_CHECKING:
    import numpy as np  # checks before a run read this module's neighbours, and wait for nothing they do not need


@dataclass(frozen=True)
class CallSpan:
    """A call and the sampler's own log-probs of its tokens, fences included: float32 [n], of softmax(logits / T).

    A token belongs to the call if one of its characters does. `logprobs` None: the call's characters could not be
    told apart as tokens (or there are none), so that nothing can be said of it.
    """

    call: ToolCall
    logprobs: np.ndarray | None


@dataclass(frozen=True)
class TurnView:
    """A trajectory at a halt: sampling stopped at one of the intervention's `stops`, and no call is to be executed.

    `prompt`: the prompt's text with its special tokens. `text`: everything after it, tool results and control text
    included, up to and with the token that completed the stop string. `fresh`: where in `text` the latest
    sampling began. `sampled`: tokens that the model sampled so far, over all turns. `messages`: the problem's.
    """

    prompt: str
    text: str
    fresh: int
    sampled: int
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Question:
    """What the same model is asked beside the trajectory, of which question and reply are no part.

    `messages` go through the model's chat template with its generation prompt; `opening` is tokenized behind that, and
    the reply is sampled from there, greedily (temperature 0), at most `max_tokens`.
    """

    messages: tuple[dict[str, str], ...]
    max_tokens: int
    opening: str = ""


class Intervention(Protocol):
    @property
    def stops(self) -> tuple[str, ...]:
        """Strings at which sampling halts for it. Read before every sampling: () once it has nothing more to do."""
        ...

    def after_tools(self, calls: Sequence[tuple[CallSpan, ToolResult]]) -> str | None:
        """Once a turn, with all calls of the turn in order: control text that follows the last result, or None.

        Calls that were not run are here too (parse_error, unknown_tool); a turn with an infra_error never is.
        """
        ...

    def at_stop(self, view: TurnView) -> Question | None:
        """Sampling halted at one of `stops`. None: it goes on from the same ids."""
        ...

    def answered(self, reply: str) -> str | None:
        """The reply to the question that `at_stop` asked: control text to append, after which sampling goes on; None:
        sampling goes on from the same ids."""
        ...

    def notes(self) -> dict[str, Any]:
        """Plain data for Trajectory.notes, under a key of its own: {"attc": {...}}."""
        ...


def build_interventions(
    attc: AttcOptions, dtsr: DtsrOptions, evaluation: bool, answer_marks: Sequence[str] = ()
) -> list[Intervention]:
    """Those that act in this rollout, fresh, for one trajectory. `answer_marks`: tools.answer_marks."""
    from rltk.rollout.attc import Attc
    from rltk.rollout.dtsr import Dtsr

    modes = ("eval", "rollout") if evaluation else ("rollout",)
    built: list[Intervention] = []
    if attc.mode in modes:
        built.append(Attc(attc))
    if dtsr.mode in modes:
        built.append(Dtsr(dtsr, tuple(answer_marks)))
    return built
