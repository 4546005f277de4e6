"""Whether a response's final answer is the reference: the rule first, a judge only where the rule says no."""

from __future__ import annotations

import re

from rltk.rewards.genrm.asking import Interview, Sampling, as_verdict
from rltk.rewards.genrm.parse import final_answer, parse_choice
from rltk.rewards.genrm.template import Template
from rltk.rewards.genrm.types import Ask, JudgeUnavailable, Question, Verdict

LONGEST_ANSWER = 300  # characters; what is longer argues, and the rule's no stands


class AnswerEquivalence:
    """value 1.0: the same answer, 0.0: another one; `detail["by"]` says who decided, `rule` or `judge`.

    The rule is the task's: `question.data["correct"]`, if the caller has its result (math-verify needs the main thread
    of a reward process). True is final. Without it, only answers equal but for spaces are right by rule. The final
    answer is the last \\boxed{}; a response without one is wrong by rule.

    The judge overrules a no only if it says yes in both orders: (reference, answer) and (answer, reference). Its second
    question is asked only after a yes. Without a reference the cause is `no_reference`.
    """

    name = "answer_equivalence"
    when = "wrong"

    def __init__(
        self, template: str = "answer_equivalence.v1", max_tokens: int = 1024, temperature: float = 0.0, seed: int = 0
    ) -> None:
        self.template = Template(template, {"user": ("problem", "first", "second")}, optional=("problem",))
        self.sampling = Sampling(max_tokens, temperature, seed)
        self.version = f"{self.name}/{self.template.version}/{self.sampling}"

    async def judge(self, question: Question, ask: Ask) -> Verdict:
        return await as_verdict(self._judge(question, ask))

    async def _judge(self, question: Question, ask: Ask) -> Verdict:
        if question.data.get("correct") is True:
            return Verdict(1.0, detail={"by": "rule", "reason": "equal by the task's rule"})
        if question.reference is None or not question.reference.strip():
            raise JudgeUnavailable("no_reference", "there is no reference answer to compare with")
        boxed = final_answer(question.reference)
        reference, answer = question.reference if boxed is None else boxed, final_answer(question.response)
        if not answer:
            return Verdict(0.0, detail={"by": "rule", "reason": "no final answer"})
        if _plain(answer) == _plain(reference):
            return Verdict(1.0, detail={"by": "rule", "reason": "equal text"})
        if len(answer) > LONGEST_ANSWER:
            return Verdict(0.0, detail={"by": "rule", "reason": f"an answer of {len(answer)} characters"})
        interview = Interview(ask, self.sampling)
        orders = [(reference, answer), (answer, reference)]
        said_yes = 0
        for first, second in orders:
            chat = self.template.messages({"problem": question.problem, "first": first, "second": second})
            choice, _ = await interview.answer(chat, lambda reply: parse_choice(reply, ("no", "yes")))
            if not choice:
                break
            said_yes += 1
        detail = {"by": "judge", "yes": said_yes, "template": self.template.version, **interview.counts}
        return Verdict(float(said_yes == len(orders)), detail=detail)


def _plain(answer: str) -> str:
    return re.sub(r"\s+", "", answer)
