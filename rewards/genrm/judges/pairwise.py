"""Which of two responses is better, asked in both orders."""

from __future__ import annotations

from collections.abc import Sequence

from rltk.errors import ConfigError
from rltk.rewards.genrm.asking import Interview, Sampling, as_comparison, both
from rltk.rewards.genrm.parse import parse_choice
from rltk.rewards.genrm.template import Template
from rltk.rewards.genrm.types import Ask, Comparison


class Pairwise:
    """scores (1, 0) or (0, 1) and consistency 1.0 where both orders choose the same response.

    Where they do not, the choice was of a place: scores (.5, .5), no best, cause `tie`, consistency 0.0. Equal texts
    are a tie without a question.
    """

    name = "pairwise"

    def __init__(
        self, template: str = "pairwise.v1", max_tokens: int = 2048, temperature: float = 0.0, seed: int = 0
    ) -> None:
        self.template = Template(template, {"user": ("problem", "parts"), "part": ("letter", "text")})
        self.sampling = Sampling(max_tokens, temperature, seed)
        self.version = f"{self.name}/{self.template.version}/{self.sampling}"

    async def compare(self, problem: str, responses: Sequence[str], ask: Ask) -> Comparison:
        """ConfigError unless there are two responses."""
        return await as_comparison(self._compare(problem, two(self.name, responses), ask))

    async def _compare(self, problem: str, responses: Sequence[str], ask: Ask) -> Comparison:
        if responses[0] == responses[1]:
            return tie(None, {"reason": "equal texts"})
        interview = Interview(ask, self.sampling)
        forward, backward = await both(
            self._choose(problem, responses, interview), self._choose(problem, responses[::-1], interview)
        )
        return agreed(forward, 1 - backward, {"template": self.template.version, **interview.counts})

    async def _choose(self, problem: str, responses: Sequence[str], interview: Interview) -> int:
        parts = [{"letter": letter, "text": text} for letter, text in zip("AB", responses, strict=True)]
        chat = self.template.messages({"problem": problem}, parts)
        choice, _ = await interview.answer(chat, lambda reply: parse_choice(reply, "AB"))
        return choice


def two(judge: str, responses: Sequence[str]) -> Sequence[str]:
    if len(responses) != 2:
        raise ConfigError(f"judge {judge} compares two responses, not {len(responses)}; best_of_n takes any number")
    return responses


def agreed(forward: int, backward: int, detail: dict) -> Comparison:
    """The comparison of two responses from the choices in both orders, both as indices into the first order."""
    detail = {**detail, "choices": [forward, backward]}
    if forward != backward:
        return tie(0.0, detail)
    return Comparison(forward, scores=(float(forward == 0), float(forward == 1)), consistency=1.0, detail=detail)


def tie(consistency: float | None, detail: dict) -> Comparison:
    return Comparison(None, scores=(0.5, 0.5), consistency=consistency, cause="tie", detail=detail)
