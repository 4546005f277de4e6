"""The run's judge as the driver sees it, without Ray."""

import pytest
from ray.exceptions import RayError

from rltk import judges as module
from rltk.compose import load
from rltk.errors import InfrastructureError
from rltk.judges import Judges, JudgeWatch
from rltk.rewards.genrm.canary import CanaryReport


def watching(monkeypatch, answer):
    class Service:
        def __getattr__(self, method):
            return type("Method", (), {"remote": staticmethod(lambda: method)})

    def get(asked, *_, **__):
        if isinstance(answer, Exception):
            raise answer
        return {"canary": answer}[asked]

    monkeypatch.setattr(module.watch, "get", get)
    said = []
    config = load(["algorithm=fapo", "reward.genrm=tiny"])
    return JudgeWatch(Judges(services=[Service()]), config, said.append), said


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            CanaryReport(None, None, 1.0, {}, "too_long: it has 900 tokens"),
            "the first: too_long",
        ),
        (
            RayError("a traceback\nTypeError: not a Verdict"),
            "asked its canaries: TypeError: not a Verdict",
        ),
    ],
)
def test_a_judge_that_answers_nothing_stops_the_run_before_it_begins(monkeypatch, answer, words):
    """Or with on_failure=not_flawed it would train to its end without one."""
    watch, _ = watching(monkeypatch, answer)
    with pytest.raises(InfrastructureError, match=words):
        watch.begin()


def test_one_that_answers_some_is_looked_at_again_later(monkeypatch):
    watch, said = watching(monkeypatch, CanaryReport(None, 0.75, 0.9, {}, "timeout: "))
    watch.begin()
    assert said == []
    JudgeWatch(Judges(), load([]), said.append).begin()  # no judge at all
