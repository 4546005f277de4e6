"""BR-RM, branch and rethink (2510.23596): a judge of two responses that first chooses where to look, then looks again.

Turn 1 takes one to three dimensions and says where the responses may be at fault in them; turn 2 reads again for these
alone and decides. Template, list of dimensions and strict parsing are ours; asked in both orders, as `pairwise`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rltk.rewards.genrm.asking import Interview, Sampling, as_comparison, both
from rltk.rewards.genrm.escape import escape
from rltk.rewards.genrm.judges.pairwise import agreed, tie, two
from rltk.rewards.genrm.parse import final_part, parse_choice, parse_numbers
from rltk.rewards.genrm.template import Template
from rltk.rewards.genrm.types import Ask, Comparison

DIMENSIONS = (
    "correctness of facts",
    "soundness of the reasoning",
    "accuracy of calculations",
    "code that runs and does what it should",
    "following the instructions and the format asked for",
    "completeness",
    "safety",
    "clarity and length",
)
MOST_DIMENSIONS = 3


class BranchRethink:
    """As `pairwise`, of two turns in each order. `detail["dimensions"]` holds what turn 1 chose, order by order."""

    name = "branch_rethink"

    def __init__(
        self, template: str = "branch_rethink.v1", max_tokens: int = 4096, temperature: float = 0.0, seed: int = 0
    ) -> None:
        places = {"user": ("problem", "parts", "dimensions"), "part": ("letter", "text"), "rethink": ("chosen",)}
        self.template = Template(template, places)
        self.sampling = Sampling(max_tokens, temperature, seed)
        self.version = f"{self.name}/{self.template.version}/{self.sampling}"

    async def compare(self, problem: str, responses: Sequence[str], ask: Ask) -> Comparison:
        """ConfigError unless there are two responses."""
        return await as_comparison(self._compare(problem, two(self.name, responses), ask))

    async def _compare(self, problem: str, responses: Sequence[str], ask: Ask) -> Comparison:
        if responses[0] == responses[1]:
            return tie(None, {"reason": "equal texts"})
        interview = Interview(ask, self.sampling)
        (forward, seen), (backward, seen_back) = await both(
            self._choose(problem, responses, interview), self._choose(problem, responses[::-1], interview)
        )
        detail = {"template": self.template.version, "dimensions": [seen, seen_back], **interview.counts}
        return agreed(forward, 1 - backward, detail)

    async def _choose(self, problem: str, responses: Sequence[str], interview: Interview) -> tuple[int, list[str]]:
        listed = "\n".join(f"{number}. {dimension}" for number, dimension in enumerate(DIMENSIONS, 1))
        parts = [{"letter": letter, "text": text} for letter, text in zip("AB", responses, strict=True)]
        chat = self.template.messages({"problem": problem, "dimensions": listed}, parts)
        numbers, branch = await interview.answer(
            chat, lambda reply: parse_numbers(reply, len(DIMENSIONS), MOST_DIMENSIONS)
        )
        chosen = [DIMENSIONS[number - 1] for number in numbers]
        # Its own words go back without the reasoning, and escaped: they may quote a response.
        said = {"role": "assistant", "content": escape((final_part(branch) or "").strip())}
        asked = {"role": "user", "content": self.template.fill("rethink", {"chosen": ", ".join(chosen)})}
        choice, _ = await interview.answer((*chat, said, asked), lambda reply: parse_choice(reply, "AB"))
        return choice, chosen
