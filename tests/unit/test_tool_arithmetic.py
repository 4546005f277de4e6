"""What bench.tool_arithmetic makes of runs and evaluations."""

import pytest

from bench.tool_arithmetic import INTERVENTIONS, difference, interval, markdown
from rltk.checks import check
from rltk.compose import load
from rltk.model_folder import resolve_model


def rows(values):
    return [{"prompt_id": problem, "tokens": tokens} for problem, each in values.items() for tokens in each]


def test_differences_are_taken_by_problem():
    off = rows({"a": [10, 20], "b": [100, 100], "c": [0, None]})
    with_it = rows({"a": [5, 15], "b": [93, 97], "c": [-5, -5]})
    assert difference(with_it, off, "tokens") == pytest.approx([-5.0, -5.0, -5.0])
    assert difference(off, off, "tokens") == [0.0, 0.0, 0.0]


def test_an_interval_is_of_the_mean_over_problems():
    mean, low, high = interval({"a": 1.0, "b": 3.0, "c": 5.0, "d": 7.0})
    assert mean == 4.0 and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(1.96 * (20 / 3) ** 0.5 / 2)


@pytest.mark.parametrize("arm", INTERVENTIONS)
def test_every_intervention_of_the_bench_is_a_valid_evaluation(arm):
    config = resolve_model(load(["experiment=tool_arithmetic", "cluster.device=cpu", *INTERVENTIONS[arm]]))
    assert check(config, training=False, writes=False) == []
    assert (config.attc.mode, config.dtsr.mode) == (
        "eval" if arm in ("ATTC", "both") else "off",
        "eval" if arm in ("DTSR", "both") else "off",
    )
    assert config.dtsr.mode == "off" or config.dtsr.opens == ""


def test_the_table_says_what_there_is():
    row = {"step": 0, "avg@4": 0.25, "greedy": 0.5, "tools/used": 0.4}
    without = {"step": 0, "avg@4": 0.0, "greedy": 0.0}
    found = {"accuracy": 0.3, "accuracy_ci": [0.2, 0.4], "tokens": [50.0, 48.0, 52.0]}
    found_with = found | {"against off": {"correct": [0.05, 0.01, 0.09], "tokens": [-3.0, -4.0, -2.0]}}
    text = "\n".join(
        markdown(
            {
                "command": "c",
                "hardware": "h",
                "runs": {
                    "tool": {"curve": [row, row | {"avg@4": 0.95}], "wall_seconds": 600},
                    "no tool": {"curve": [without, without], "wall_seconds": 60},
                },
                "interventions": {"before": {"off": found, "ATTC": found_with}},
            }
        )
    )
    assert "| tool | 25.0% | 95.0% | 50.0% | 40.0% | 40.0% | 10.0 |" in text
    assert "| no tool | 0.0% | 0.0% | 0.0% | - | - | 1.0 |" in text
    assert (
        "| before | ATTC | 30.0% (20.0% to 40.0%) | +5.0 (+1.0 to +9.0) | 50.0 (48.0 to 52.0) | -3.0 (-4.0 to -2.0) |"
        in text
    )
