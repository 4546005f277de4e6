"""What bench.tool_arithmetic makes of runs and evaluations."""

import argparse
import json

import pytest

from bench.tool_arithmetic import INTERVENTIONS, difference, interval, intervene, markdown, parts
from rltk.checks import check
from rltk.compose import load
from rltk.model_folder import resolve_model
from tests.integration.places import ROOT


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
    found_with = found | {
        "attc/trust": 0.5,
        "against off": {"correct": [0.05, 0.01, 0.09], "tokens": [-3.0, -4.0, -2.0]},
    }
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
    assert "| before | off | 30.0% (20.0% to 40.0%) | - | 50.0 (48.0 to 52.0) | - | - |" in text
    differences = "+5.0 (+1.0 to +9.0) | 50.0 (48.0 to 52.0) | -3.0 (-4.0 to -2.0)"
    did = "trusted 50.0% of the turns with calls"
    assert f"| before | ATTC | 30.0% (20.0% to 40.0%) | {differences} | {did} |" in text


def test_parts_are_chosen_and_a_model_that_was_never_trained_is_named(tmp_path):
    assert parts("tool,after") == ["tool", "after"]
    with pytest.raises(argparse.ArgumentTypeError, match="aftr: the parts are tool, no-tool, before, after"):
        parts("aftr")
    with pytest.raises(SystemExit, match="no trained model in .*train it with --only tool,after"):
        intervene(tmp_path / "model", "after", tmp_path)


def test_the_committed_figures_are_those_of_a_tool_that_was_learned():
    """What docs/results says: the base of the shipped warm start, and where each run ended."""
    shipped = sum(file.stat().st_size for file in (ROOT / "rltk/models/tiny_tool").iterdir())
    results = json.loads((ROOT / "docs/results/tool_arithmetic.json").read_text())
    run, without = (results["runs"][f"{arm}, seed 0"] for arm in ("tool", "no tool"))
    first, last = run["curve"][0], run["curve"][-1]
    assert shipped <= 6e6 and 0.15 <= first["avg@4"] <= 0.5 and 0.2 <= first["tools/used"] <= 0.6
    assert min(last["avg@4"], last["tools/used"]) >= 0.9 and without["curve"][-1]["avg@4"] < 0.4
    for model in ("before", "after"):
        arms = results["interventions"][model]
        assert list(arms) == list(INTERVENTIONS)
        for arm, found in arms.items():
            low, high = found["accuracy_ci"]
            assert low <= found["accuracy"] <= high and ("against off" in found) == (arm != "off")
