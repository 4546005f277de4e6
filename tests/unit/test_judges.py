"""The run's judge as the driver sees it, without Ray."""

import pytest

from rltk import judges as module
from rltk.compose import load
from rltk.errors import InfrastructureError
from rltk.judges import Judges, JudgeWatch
from rltk.rewards.genrm.canary import CanaryReport


def watching(monkeypatch, unanswered):
    class Service:
        def __getattr__(self, method):
            return type("Method", (), {"remote": staticmethod(lambda: method)})

    answers = {
        "canary": CanaryReport(None, 0.75, unanswered, {}),
        "stats": {"router": {"failed": {"too_long": 12}}},
    }
    monkeypatch.setattr(module.watch, "get", lambda asked, *_, **__: answers[asked])
    said = []
    config = load(["algorithm=fapo", "reward.genrm=tiny"])
    return JudgeWatch(Judges(services=[Service()]), config, said.append), said


def test_a_judge_that_answers_nothing_stops_the_run_before_it_begins(monkeypatch):
    """Or with on_failure=not_flawed it would train to its end without one."""
    watch, _ = watching(monkeypatch, 1.0)
    with pytest.raises(InfrastructureError, match=r"none of its canaries: \{'too_long': 12\}"):
        watch.begin()


def test_one_that_answers_some_is_looked_at_again_later(monkeypatch):
    watch, said = watching(monkeypatch, 0.9)
    watch.begin()
    assert said == []
    JudgeWatch(Judges(), load([]), said.append).begin()  # no judge at all
