"""`python -m rltk.train algorithm=ctpo`: compose, check, start the roles, train, leave a run folder behind."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rltk import manifest
from rltk.checks import check, run_dir
from rltk.cli import run_entry, usage, wants_help
from rltk.compose import load
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.kv_size import describe
from rltk.model_folder import resolve_model
from rltk.plan import Plan, make_plan
from rltk.plan_view import render
from rltk.prompt_checks import check_prompts
from rltk.tasks import Task, build_task

if TYPE_CHECKING:  # these import torch and Ray, which a dry run does without
    from rltk.algorithms import Objective
    from rltk.driver import Driver
    from rltk.tracker import Tracker


GENERATED_CHECKED = 64  # problems of an endless task whose prompts are measured before the start


def main(argv: list[str]) -> int:
    if wants_help(argv):
        print(usage())
        return 0
    config = resolve_model(load(argv))
    for warning in check(config):
        print(f"rltk: warning: {warning}", file=sys.stderr)
    plan = make_plan(config)
    task = build_task(config.task)
    if config.dry_run:
        print(render(plan))
        return 0
    objective = _check_code(config, task)
    folder = run_dir(config)
    return _train(config, plan, folder, task, objective, _open(folder, config))


def _check_code(config: Config, task: Task) -> Objective:
    """Everything that needs torch or the user's modules, before Ray starts. The objective is the driver's own."""
    from rltk.algorithms import build_correction, build_objective
    from rltk.learner.needs import needs_of
    from rltk.learner.settings import learner_settings
    from rltk.rewards.scorer import check_scorer
    from rltk.roles import scorer_spec

    try:
        correction = build_correction(config.correction, **config.correction_options)
        options = {"reference": config.ratio.reference, **config.algorithm.options}
        objective = build_objective(config.algorithm.path or config.algorithm.name, correction=correction, **options)
    except ValueError as error:
        raise ConfigError(f"algorithm={config.algorithm.path or config.algorithm.name}: {error}") from error
    needs_of(objective, learner_settings(config, device="", threads=0))
    check_scorer(scorer_spec(config))
    some = task.size if task.size is not None else GENERATED_CHECKED
    check_prompts(config, [*task.held_out(config.evaluation.problems), *(task.problem(index) for index in range(some))])
    return objective


def _open(folder: Path, config: Config) -> dict[str, Any]:
    """The run's manifest; for a resume, checked against the one that is there."""
    record = manifest.make_manifest(config, None)
    if config.resume == "auto" and (folder / "manifest.json").is_file():
        old = manifest.read(folder)
        accepted = manifest.check_resume(old, record)
        record |= {key: old[key] for key in ("created", "wandb_id", "incarnation") if key in old}
        record["resumes"] = [*old.get("resumes", []), {"accepted": accepted}]
        for difference in accepted:
            print(f"rltk: resuming with a difference that does not change results: {difference}", file=sys.stderr)
    return record


def _train(config: Config, plan: Plan, folder: Path, task: Task, objective: Objective, record: dict[str, Any]) -> int:
    from rltk.cluster import connect
    from rltk.driver import Driver
    from rltk.roles import cache_report, start_roles, tool_report
    from rltk.tracker import Tracker

    tracker = Tracker(folder, config, record["wandb_id"])
    manifest.write(folder, config, record | {"wandb_id": tracker.wandb_id})
    with suppress(FileNotFoundError):  # of an earlier, interrupted part of the run
        (folder / "summary.json").rename(folder / "summary.previous.json")
    run_id = f"{os.getpid()}-{secrets.token_hex(4)}"
    status, driver, cache, tools, problem = "failed", None, {}, {}, ""
    try:
        tracker.phase("start Ray")
        with connect(config.cluster, plan.placement) as logs:
            roles = start_roles(config, plan.placement, say=tracker.phase)
            try:
                if cache := cache_report(roles, config):
                    held = f"{cache['blocks']} blocks hold {cache['blocks'] // cache['cap_blocks']} sequences"
                    tracker.console.message(f"kv: {describe(config)}; {held} ({cache['runner']} runner)")
                if tools := tool_report(roles, config):
                    isolation = f"; isolation {tools['isolation']}" if tools["isolation"] else ""
                    tracker.console.message(f"tools: {', '.join(tools['tools'])}{isolation}")
                driver = Driver(config, plan.placement, folder, task, objective, tracker, roles, run_id)
                status = driver.run()
            except BaseException:
                tracker.console.message(f"the roles' logs are in {logs}")
                raise
            finally:
                roles.stop()
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        proved = {"kv_engine": cache} if cache else {}
        proved |= {"tools": tools} if tools else {}
        _finish(tracker, driver, proved, status, problem, record["config_hash"])
    files = "  (report.html, summary.json, model/)" if status == "finished" else ""
    print(f"{status}: {folder}{files}")
    return 0 if status == "finished" else 130


def _finish(
    tracker: Tracker, driver: Driver | None, proved: dict[str, Any], status: str, problem: str, config_hash: str
) -> None:
    """Summary and report, whatever the run came to. `proved`: what runs, as its roles said at their start."""
    if driver is None:  # it never began
        tracker.finish({"status": status, "error": problem, "steps": 0})
        return
    from rltk import report

    state, ledger = driver.state, driver.state.ledger
    counts = {"issued": ledger.issued, "trained": ledger.trained, "dropped": dict(ledger.dropped)}
    summary = state.summary.result(status, state.version, config_hash, counts)
    summary |= proved
    tracker.finish(summary | ({"error": problem} if problem else {}))
    report.build(driver.folder)


if __name__ == "__main__":
    run_entry(main)
