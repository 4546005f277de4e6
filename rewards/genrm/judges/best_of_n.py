"""The best of several responses, chosen from the list and from the list turned round."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from rltk.errors import ConfigError
from rltk.rewards.genrm.asking import Interview, Sampling, as_comparison, both
from rltk.rewards.genrm.parse import parse_choice
from rltk.rewards.genrm.template import Template
from rltk.rewards.genrm.types import Ask, Comparison


class BestOfN:
    """score 1.0 and consistency 1.0 for the response that both orders choose, by its text.

    Where they choose two, each of these has score .5; there is no best, the cause is `tie` and consistency 0.0. Up to
    26 responses; equal texts are shown once and share their score's place: the first of them is named.
    """

    name = "best_of_n"

    def __init__(
        self, template: str = "best_of_n.v1", max_tokens: int = 2048, temperature: float = 0.0, seed: int = 0
    ) -> None:
        self.template = Template(template, {"user": ("problem", "parts"), "part": ("letter", "text")})
        self.sampling = Sampling(max_tokens, temperature, seed)
        self.version = f"{self.name}/{self.template.version}/{self.sampling}"

    async def compare(self, problem: str, responses: Sequence[str], ask: Ask) -> Comparison:
        """ConfigError unless there are 1 to 26 responses."""
        if not 1 <= len(responses) <= len(ascii_uppercase):
            raise ConfigError(f"judge best_of_n chooses among 1 to {len(ascii_uppercase)} responses: {len(responses)}")
        return await as_comparison(self._compare(problem, list(responses), ask))

    async def _compare(self, problem: str, responses: list[str], ask: Ask) -> Comparison:
        different = list(dict.fromkeys(responses))
        interview = Interview(ask, self.sampling)
        consistency = None
        chosen = [different[0]] * 2
        if len(different) > 1:
            chosen = list(
                await both(
                    self._choose(problem, different, interview), self._choose(problem, different[::-1], interview)
                )
            )
            consistency = float(chosen[0] == chosen[1])
        places = [responses.index(text) for text in chosen]
        scores = tuple(places.count(index) / 2 for index in range(len(responses)))
        detail = {"template": self.template.version, "choices": places, **interview.counts}
        best = places[0] if places[0] == places[1] else None
        return Comparison(best, scores, consistency, cause="" if best is not None else "tie", detail=detail)

    async def _choose(self, problem: str, responses: Sequence[str], interview: Interview) -> str:
        letters = ascii_uppercase[: len(responses)]
        parts = [{"letter": letter, "text": text} for letter, text in zip(letters, responses, strict=True)]
        chat = self.template.messages({"problem": problem}, parts)
        choice, _ = await interview.answer(chat, lambda reply: parse_choice(reply, letters))
        return responses[choice]
