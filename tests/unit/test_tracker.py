"""What a run leaves: rows that survive a kill and a resume, and W&B that can neither hold up nor end it."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as Terminal

from rltk import tracker as tracker_module
from rltk.config import Config
from rltk.config import Tracker as TrackerConfig
from rltk.console import Console
from rltk.tracker import Tracker, rewind, sample_row
from rltk.trajectory import Record, RewardRecord, Segment, Trajectory
from rltk.wandb_follower import Follower


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def config(name="none", steps=10):
    return dataclasses.replace(Config(), steps=steps, tracker=TrackerConfig(name=name, console=False))


def test_rows_carry_step_time_and_sorted_metrics(tmp_path):
    tracker = Tracker(tmp_path, config())
    before = time.time()
    tracker.log(1, {"b": 2, "a": 1.5})
    tracker.evaluation(1, {"step": 1, "avg@4": 0.5, "levels": {"1": {"avg@4": 1.0}}})
    tracker.samples(1, [{"prompt": "1+1", "reward": None}])
    (row,) = read(tmp_path / "metrics.jsonl")
    assert list(row) == ["step", "wall_time", "a", "b"]
    assert (row["step"], row["a"], row["b"]) == (1, 1.5, 2.0)
    assert before <= row["wall_time"] <= time.time()
    assert read(tmp_path / "evaluations.jsonl")[0]["levels"] == {"1": {"avg@4": 1.0}}
    assert read(tmp_path / "samples.jsonl")[0]["reward"] is None


def test_a_value_that_is_not_finite_is_null_and_named(tmp_path, capsys):
    tracker = Tracker(tmp_path, config())
    tracker.log(3, {"grad_norm": float("nan"), "loss": float("inf"), "lr": 0.1})
    (row,) = read(tmp_path / "metrics.jsonl")
    assert row["grad_norm"] is None and row["loss"] is None and row["lr"] == 0.1
    assert row["not_finite"] == ["grad_norm", "loss"]
    assert "step 3: not finite: grad_norm, loss" in capsys.readouterr().out


def test_rollback_moves_later_rows_and_deletes_none(tmp_path):
    tracker = Tracker(tmp_path, config())
    for step in range(1, 6):
        tracker.log(step, {"x": float(step)})
    tracker.evaluation(5, {"avg@4": 0.5})
    tracker = Tracker(tmp_path, config())
    tracker.rollback(3)
    tracker.log(4, {"x": 40.0})
    assert [row["x"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]
    assert [row["x"] for row in read(tmp_path / "metrics.discarded.jsonl")] == [4, 5]
    assert read(tmp_path / "evaluations.jsonl") == []
    assert read(tmp_path / "evaluations.discarded.jsonl")[0]["avg@4"] == 0.5


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(-1, 10), st.integers(0, 40))
def test_rewind_keeps_every_line_in_one_of_two_files(tmp_path_factory, steps, last, cut):
    """Whatever is torn off the end by a kill: whole rows up to `last` stay, all the rest is set aside unchanged."""
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    text = "".join(json.dumps({"step": step, "index": i}) + "\n" for i, step in enumerate(steps))
    path.write_text(text[: max(0, len(text) - cut)])
    before = [line for line in path.read_text().split("\n") if line]
    rewind(path, last)
    kept = path.read_text().split("\n")
    assert kept[-1] == "" and all(json.loads(line)["step"] <= last for line in kept[:-1])
    aside = path.with_suffix(".discarded.jsonl")
    discarded = aside.read_text().splitlines() if aside.exists() else []
    assert sorted(kept[:-1] + discarded) == sorted(before)


def test_a_torn_line_never_joins_the_next_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n{"step": 2, "x"')
    Tracker(tmp_path, config()).log(2, {"x": 2.0})
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == '{"step": 2, "x"\n'


def test_finish_writes_the_summary_whole_or_not_at_all(tmp_path):
    tracker = Tracker(tmp_path, config())
    tracker.finish({"status": "completed", "steps": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "completed", "steps": 2}
    with pytest.raises(ValueError):
        tracker.finish({"status": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "completed"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_wandb_off_leaves_no_id_and_no_process(tmp_path):
    tracker = Tracker(tmp_path, config("none"))
    tracker.log(1, {"x": 1.0})
    assert tracker.wandb_id is None and not (tmp_path / "wandb.log").exists()


def test_wandb_that_dies_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    tracker = Tracker(tmp_path, config("wandb"))
    tracker.log(1, {"x": 1.0})
    tracker._follower.wait(10)
    for step in (2, 3):
        tracker.log(step, {"x": 1.0})
    tracker.finish({"status": "completed"})
    assert len(read(tmp_path / "metrics.jsonl")) == 3
    assert capsys.readouterr().out.count("W&B stopped (1)") == 1


def test_wandb_that_cannot_start_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    tracker = Tracker(tmp_path, config("wandb"))
    for step in (1, 2):
        tracker.log(step, {"x": 1.0})
    tracker.finish({"status": "finished"})
    assert len(read(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().out.count("W&B stopped") == 1


def test_wandb_that_hangs_is_ended_at_the_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracker_module, "WANDB_DEADLINE_S", 0.2)
    tracker = Tracker(tmp_path, config("wandb"))
    hung = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, start_new_session=True)
    tracker._follower = hung
    tracker.log(1, {"x": 1.0})
    tracker.finish({"status": "completed"})
    assert hung.poll() is not None
    assert "no answer within" in capsys.readouterr().out
    assert (tmp_path / "summary.json").exists()


def test_wandb_keeps_its_id_and_records_offline(tmp_path):
    tracker = Tracker(tmp_path, config("wandb"), wandb_id="abcd1234")
    assert tracker.wandb_id == "abcd1234"
    tracker.log(1, {"reward/mean": 0.25})
    tracker.evaluation(1, {"avg@4": 0.5, "avg@4_ci": [0.4, 0.6]})
    tracker.finish({"status": "completed"})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-abcd1234.wandb")
    content = file.read_bytes()  # protobuf, not compressed: a key, a few bytes of framing, its value
    for key, value in ((b"reward/mean", b"0.25"), (b"held_out/avg@4", b"0.5"), (b"held_out/avg@4_ci/0", b"0.4")):
        assert re.search(re.escape(key) + rb".{1,4}" + re.escape(value), content, re.DOTALL), key


def test_the_follower_sends_each_row_once_through_a_rollback(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "wall_time": 100.0 + step}) + "\n" for step in range(1, 5)]
    path.write_text("".join(rows[:2]) + rows[2][:9])
    follower = Follower(path, since=101.0)  # step 1 was sent by an earlier follower
    assert [row["step"] for row in follower.rows()] == [2]
    path.write_text("".join(rows[:3]))
    assert [row["step"] for row in follower.rows()] == [3]
    rewind(path, 1)
    with open(path, "a") as stream:
        stream.write(json.dumps({"step": 2, "wall_time": 110.0}) + "\n")
    assert [row["wall_time"] for row in follower.rows()] == [110.0]
    assert follower.rows() == []


def test_a_sample_row_says_what_the_reward_said():
    segments = (Segment("prompt", [1, 2]), Segment("model", [3, 4, 5], [-0.1, -0.2, -0.3], (0, 7), "length"))
    reward = RewardRecord(1.0, "right answer", correct=True, flawed=True, detail={"first_flawed": 1})
    trajectory = Trajectory("u", "p", "g", segments, "a\n\nb", reward)
    record = Record("p", ({"role": "user", "content": "2+2"},), "4", "easy")
    row = sample_row(trajectory, record)
    expected = {"prompt": "2+2", "response": "a\n\nb", "answer": "4", "level": "easy", "reward": 1.0, "correct": True}
    expected |= {"flawed": True, "first_flawed": 1, "tokens": 3, "truncated": True, "weight_version": [0, 7]}
    assert {key: row[key] for key in expected} == expected
    json.dumps(row, allow_nan=False)


def console_text(live, act):
    stream = io.StringIO()
    console = Console(total=4, live=live, terminal=Terminal(file=stream, force_terminal=live, width=100, _environ={}))
    act(console)
    console.close()
    return stream.getvalue()


def two_steps(console):
    console.phase("start engines")
    for step in (1, 2):
        console.phase("generate", 3, 16)
        row = {"reward/mean": 0.5, "accuracy": 0.25, "time/step": 2.0, "time/generate": 1.5, "time/train": 0.5}
        console.step(step, row)
    console.evaluation(2, {"avg@4": 0.75, "greedy": 0.5, "levels": {"3 steps": {"avg@4": 0.1}}})


def test_without_a_terminal_each_step_is_one_plain_line():
    text = console_text(False, two_steps)
    lines = text.splitlines()
    assert "\x1b" not in text and "generate" not in text
    assert lines[0] == "start engines ..."
    assert lines[1] == "step 1/4 | reward 0.500 | accuracy 25.0% | 2.0 s"
    assert lines[2].startswith("step 2/4 | ") and lines[2].endswith(" left")
    assert lines[3] == "held-out after step 2: avg@4 75.0%, greedy 50.0% (3 steps 10%)"
    assert len(lines) == 4


def test_the_live_panel_shows_the_step_its_time_and_the_evaluation():
    panels = []

    def act(console):
        two_steps(console)
        console.phase("generate", 7, 16)
        plain = Terminal(file=io.StringIO(), width=100)
        plain.print(console._panel())
        panels.append(plain.file.getvalue())

    console_text(True, act)
    for expected in ("step 2/4", "accuracy 25.0%", "generate 75%", "train 25%", "avg@4 75.0%", "generate 7/16"):
        assert expected in panels[0]


def test_eta_is_the_pace_of_recent_steps():
    console = Console(total=10, live=False, terminal=Terminal(file=io.StringIO()))
    assert console.eta_s() is None
    console._ends.extend([(2, 100.0), (3, 104.0), (4, 110.0)])
    assert console.eta_s() == pytest.approx(5.0 * 6)
