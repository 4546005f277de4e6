"""FAPO's generative reward model (2510.22543): the index of the first wrong paragraph of a solution, or -1.

The task is ProcessBench's (2412.06559). Wording and escaping are ours, and so is one retry in place of a guess.
"""

from __future__ import annotations

from rltk.rewards.genrm.asking import Interview, Messages, Sampling, as_verdict
from rltk.rewards.genrm.paragraphs import split_paragraphs
from rltk.rewards.genrm.parse import parse_index
from rltk.rewards.genrm.template import Template
from rltk.rewards.genrm.types import Ask, JudgeUnavailable, Question, Verdict


class FlawFinder:
    """value 1.0 and flawed False for -1, value 0.0 and flawed True for an index, which is `detail["index"]`.

    `template`: `fapo.v1`, `fapo_short.v1` (for judges trained on it), or the path of a .txt file. A question whose
    `data` holds `paragraphs`, a list of texts, is judged by these; otherwise the response is split. A response without
    any text has the cause `empty`.
    """

    name = "fapo"
    when = "right"  # a wrong answer needs nobody to find its flaw

    def __init__(
        self, template: str = "fapo.v1", max_tokens: int = 4096, temperature: float = 0.0, seed: int = 0
    ) -> None:
        places = {"user": ("problem", "reference", "parts"), "part": ("index", "text")}
        self.template = Template(template, places, optional=("reference",))
        self.sampling = Sampling(max_tokens, temperature, seed)
        self.version = f"{self.name}/{self.template.version}/{self.sampling}"

    async def judge(self, question: Question, ask: Ask) -> Verdict:
        return await as_verdict(self._judge(question, ask))

    def paragraphs(self, question: Question) -> list[str]:
        given = question.data.get("paragraphs")
        return list(given) if given is not None else split_paragraphs(question.response)

    def messages(self, question: Question) -> Messages:
        """The chat put to the model, also for training one."""
        parts = [{"index": str(index), "text": text} for index, text in enumerate(self.paragraphs(question))]
        return self.template.messages({"problem": question.problem, "reference": question.reference}, parts)

    async def _judge(self, question: Question, ask: Ask) -> Verdict:
        count = len(self.paragraphs(question))
        if count == 0:
            raise JudgeUnavailable("empty", "the response holds no text")
        interview = Interview(ask, self.sampling)
        index, _ = await interview.answer(self.messages(question), lambda reply: parse_index(reply, count))
        detail = {"index": index, "paragraphs": count, "template": self.template.version, **interview.counts}
        return Verdict(float(index < 0), flawed=index >= 0, detail=detail)
