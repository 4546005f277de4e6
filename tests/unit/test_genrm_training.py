"""What bench.genrm_training makes of policies, runs and evaluations."""

import pytest

from bench.genrm_training import ARMS, POLICIES, enumerate_policies, markdown
from rltk.checks import check
from rltk.compose import load
from rltk.model_folder import resolve_model
from rltk.tasks import build_task

TASK = build_task(load(["experiment=train_genrm"]).task)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_of_the_bench_is_a_valid_run(arm):
    config = resolve_model(load(["experiment=train_genrm", "model=tiny", "cluster.device=cpu", *ARMS[arm]]))
    check(config, writes=False)
    assert config.task.name == "judging" and config.task.options["reward"] == arm
    assert config.model.name == "tiny"  # the experiment leaves the last word to the command line


def test_policies_earn_what_they_earn_one_by_one():
    records = [TASK.problem(index) for index in range(300)]
    found = enumerate_policies(records)
    for name, policy in POLICIES.items():
        scored = [TASK.score(r, rf"\boxed{{{policy(r.data['label'], r.data['paragraphs'])}}}") for r in records]
        assert found[name]["distance"] == pytest.approx(sum(s.value for s in scored) / len(records))
        assert found[name]["outcome"] == pytest.approx(sum(2 * s.correct - 1 for s in scored) / len(records))
    assert found["every verdict and index right"] == {"distance": 1, "outcome": 1, "step_ratio": 1, "f1": 1}


def test_the_step_ratio_tells_reading_from_not_reading_least():
    """A judge that is always right about "flawed", an index off, against the best of those that read nothing."""
    found = enumerate_policies([TASK.problem(index) for index in range(1000)])
    reads = found["every verdict right, the index one off"]
    blind = [row for name, row in found.items() if not name.startswith("every")]
    assert reads["f1"] == 1.0 > max(row["f1"] for row in blind)
    assert reads["distance"] - max(row["distance"] for row in blind) > 0.8
    assert reads["step_ratio"] - max(row["step_ratio"] for row in blind) < 0.05


def test_the_tables_say_what_there_is():
    figures = {"greedy/genrm/f1": 0.9, "genrm/f1": 0.8, "greedy/genrm/recall/kind/patch": 0.95}
    row = {"distance": 1.0, "outcome": 0.5, "step_ratio": 0.25, "f1": 0.125}
    results = {"command": "c", "hardware": "h", "runs": {}, "judges": {"start": figures}, "policies": {"p": row}}
    text = "\n".join(markdown(results))
    assert "| start | 90.0% (80.0%) | - (-) |" in text
    assert "| judge | patch |" in text and "| start | 95.0% |" in text
    assert "| p | 1.000 | 0.500 | 0.250 | 0.125 |" in text
