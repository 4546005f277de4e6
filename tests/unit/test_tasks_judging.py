"""Judging as a task: labels, the split, rewards by enumeration, the replies to learn from, the figures."""

import asyncio
import json
import pickle
import random
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from rltk.errors import ConfigError
from rltk.evaluation import evaluate
from rltk.rewards.genrm.benchmarks import EXAMPLES
from rltk.rewards.genrm.judges.fapo import FlawFinder
from rltk.rewards.genrm.types import Question, Reply
from rltk.rollout.tokens import load_tokenizer, render_prompt
from rltk.rollout.worker import RolloutResult, Sampling
from rltk.sft import CONF, load_config, task_config
from rltk.sft_data import check_shares
from rltk.tasks import build_task
from rltk.tasks.arithmetic import Arithmetic
from rltk.tasks.judge_demonstrations import STYLES as REPLIES
from rltk.tasks.judge_demonstrations import demonstrate
from rltk.tasks.judged import REWARDS, distance, outcome, step_ratio
from rltk.tasks.judging import Judging
from rltk.tasks.judging_jsonl import JudgingJsonl
from rltk.tasks.planted import SOUND, STYLES, TWO_STEPS, solve
from rltk.trajectory import RewardRecord, Segment, Trajectory

CONFIG = task_config("judging")
TASK = build_task(CONFIG)
ARITHMETIC = Arithmetic(64, 64)
FLAWED = [style for style in STYLES if style != SOUND]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(CONF.parent / "models" / "tiny"))


def reply(record, style="work"):
    messages, parts = demonstrate(record, style, random.Random(record.id))
    assert messages == record.messages and all(learnt for _, learnt in parts)
    return "".join(text for text, _ in parts)


# Solutions


@pytest.mark.parametrize("style", FLAWED)
def test_a_planted_error_is_flawed_by_the_rule_and_right_but_for_a_slip(style):
    rng = random.Random(style)
    for level in (2, 3, 4, 5):
        for _ in range(20):
            problem = ARITHMETIC.sample(rng, level)
            scored = ARITHMETIC.score(problem, solve(problem, style, rng))
            assert scored.correct is (style != "slip")
            assert style == "swap" or "first_flawed" in scored.detail


def test_a_sound_solution_is_sound_and_an_unknown_style_is_refused():
    problem = ARITHMETIC.problem(0)
    assert ARITHMETIC.score(problem, solve(problem, SOUND, random.Random(0))).flawed is False
    with pytest.raises(ValueError, match="'luck'"):
        solve(problem, "luck", random.Random(0))


def test_planted_errors_are_what_they_are_called():
    problem = next(p for p in map(ARITHMETIC.problem, range(99)) if p.level == "4")
    steps = problem.data["steps"]
    for seed in range(20):
        rng = random.Random(seed)
        paragraphs = {
            style: solve(problem, style, rng).split("\n\n") for style in ("operand", "swap", "extra", "again")
        }
        for style, extra in (("operand", 0), ("swap", 0), ("extra", 1), ("again", 1)):
            assert len(paragraphs[style]) == len(steps) + 1 + extra
        (wrong,) = [line for line in paragraphs["operand"][:-1] if line not in steps]
        left, _, right = wrong.partition(" = ")
        assert eval(left) == int(right)
        assert [line for line in steps if line not in paragraphs["extra"]] == []
        assert " + 0 = " in next(line for line in paragraphs["extra"] if line not in steps)
        told = next(n for n, line in enumerate(paragraphs["again"][:-1]) if line not in steps)
        assert paragraphs["again"][told].split(" = ")[0] == paragraphs["again"][told - 1].split(" = ")[0]
        assert all(eval(line.replace("=", "==")) for line in paragraphs["swap"][:-1])


def test_labels_are_the_rules_whatever_was_planted():
    rng = random.Random(0)
    for level, style in product((1, 2, 3, 4, 5), STYLES):
        if level == 1 and style in TWO_STEPS:
            continue
        problem = ARITHMETIC.sample(rng, level)
        record = TASK.about(problem, style, rng)
        label = ARITHMETIC.score(problem, record.data["solution"]).detail.get("first_flawed", -1)
        assert record.data["label"] == label and record.data["flawed"] == (label >= 0) and record.answer == str(label)
        assert record.data["kind"] == (style if label >= 0 else SOUND)


# The task


def test_no_problem_of_the_held_out_set_is_judged_in_training_or_held_out_of_arithmetic():
    held_out = {record.messages[-1]["content"].split(" = ")[0] for record in TASK.held_out(300)}
    training = {TASK.problem(i).messages[-1]["content"].split(" = ")[0] for i in range(600)}
    assert not held_out & training
    assert all(
        question not in held_out for question in (ARITHMETIC.problem(i).messages[-1]["content"] for i in range(300))
    )


def test_unseen_kinds_are_held_out_alone_and_a_third_of_that():
    training = [TASK.problem(i) for i in range(600)]
    assert {r.data["kind"] for r in training} == {SOUND, *TASK.styles}
    assert not any(r.data["unseen"] for r in training)
    assert 0.42 < sum(r.data["flawed"] for r in training) / len(training) < 0.58
    held_out = TASK.held_out(600)
    assert {r.data["kind"] for r in held_out} == {SOUND, *TASK.styles, *TASK.unseen}
    assert all(r.data["unseen"] == (r.data["kind"] in TASK.unseen) for r in held_out)
    for part in ([r for r in held_out if not r.data["flawed"]], [r for r in held_out if r.data["unseen"]]):
        assert 0.27 < len(part) / len(held_out) < 0.42
    assert [r.data for r in TASK.held_out(50)] == [r.data for r in held_out[:50]]


def test_it_asks_in_the_words_of_the_judge_that_a_run_has():
    record = next(r for r in map(TASK.problem, range(99)) if r.data["label"] > 0)
    problem = record.messages[-1]["content"].split(" = ")[0]
    question = Question("u", problem, record.data["solution"], record.data["reference"])
    asked = []

    async def ask(prompt):
        asked.append(prompt.messages)
        return Reply(reply(record), "stop", 9)

    verdict = asyncio.run(FlawFinder("fapo_short.v1").judge(question, ask))
    assert asked == [record.messages]
    assert verdict.flawed is True and verdict.detail["index"] == record.data["label"]


@pytest.mark.parametrize("style", REPLIES)
def test_replies_to_learn_from_fit_and_box_one_verdict(tokenizer, style):
    right = []
    for index in range(200):
        record = TASK.problem(index)
        text = reply(record, style)
        prompt = tokenizer.apply_chat_template(
            list(record.messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert len(prompt) <= CONFIG.max_prompt_tokens
        assert len(tokenizer.encode(text)) < CONFIG.max_response_tokens
        assert text.count("boxed") == 1
        scored = TASK.score(record, text)
        assert scored.detail["index"] is not None
        right.append(scored.correct)
        if style == "work":
            assert scored.value == 1.0 and scored.detail["index"] == record.data["label"]
    assert all(right) if style == "work" else 0.2 < sum(right) / len(right) < 0.8


def test_a_working_reply_says_what_each_step_should_be_and_agrees_with_itself():
    rng = random.Random(0)
    for level, style in product((2, 3, 5), STYLES):
        problem = ARITHMETIC.sample(rng, level)
        record = TASK.about(problem, style, rng)
        lines = reply(record).split("\n")
        wanted = [*problem.data["steps"], problem.answer]
        for number, line in enumerate(lines[:-1]):
            step, _, told = line.rpartition(" = ")
            told, says = told.split()
            assert step == f"{number}: {wanted[number]}"
            assert (told == wanted[number].split()[-1]) == (says == "right") == (number != record.data["label"])


def test_the_warm_start_has_known_styles_and_leaves_the_hardest_level_to_rl():
    part = load_config(CONF / "sft_judge.yaml", [])["tasks"]["judging"]
    assert set(TASK.levels) - set(part["levels"]) == {5}
    for level, shares in part["levels"].items():
        check_shares(level, shares, TASK)
    with pytest.raises(ConfigError, match="'right'"):
        check_shares(1, {"work": 1.0, "right": 0.5}, TASK)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"reward": "steps"}, "task.reward='steps'"),
        ({"styles": ["luck"]}, "task.styles: 'luck'"),
        ({"unseen": ["sound"]}, "task.unseen: 'sound'"),
        ({"styles": ["swap"]}, "task.unseen"),
        ({"styles": []}, "task.styles"),
        ({"template": "fapo_long"}, "fapo_long"),
        ({"levels": [6]}, "6"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        Judging(192, 96, **options)


def test_it_travels_to_reward_processes_and_imports_nothing_heavy():
    record = TASK.problem(3)
    assert pickle.loads(pickle.dumps(TASK)).score(record, reply(record)) == TASK.score(record, reply(record))
    code = "import sys, rltk.tasks.judging, rltk.tasks.judging_jsonl; print({'torch', 'ray', 'vllm'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# The reward


@pytest.mark.parametrize("paragraphs", [1, 2, 5])
def test_rewards_are_the_papers_for_every_verdict_and_label(paragraphs):
    verdicts = [None, *range(-1, paragraphs)]
    for index, label in product(verdicts, range(-1, paragraphs)):
        flawed = label >= 0
        if index is None:
            expected = -1.0
        elif index < 0 or label < 0:
            expected = 1.0 if index == label else -1.0
        else:
            expected = 1.0 - abs(index - label) / paragraphs
        assert distance(index, label, flawed, paragraphs) == pytest.approx(expected)
        said_right = index is not None and (index >= 0) == flawed
        assert outcome(index, label, flawed, paragraphs) == (1.0 if said_right else -1.0)
        judged = [place == index for place in range(paragraphs)]
        true = [place == label for place in range(paragraphs)]
        share = np.mean([a == b for a, b in zip(judged, true, strict=True)]) if index is not None else 0.0
        assert step_ratio(index, label, flawed, paragraphs) == pytest.approx(share)


def test_where_only_flawed_is_known_the_index_costs_nothing():
    assert distance(3, None, True, 5) == 1.0 and distance(-1, None, True, 5) == -1.0
    assert step_ratio(3, None, True, 5) == 1.0 and step_ratio(-1, None, True, 5) == 0.8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "wrong",
        r"\boxed{}",
        r"\boxed{1.0}",
        r"\boxed{9}",
        r"\boxed{-2}",
        r"\boxed{0} \boxed{x}",
        r"<think>\boxed{0}",
    ],
)
def test_a_reply_without_a_verdict_is_worth_the_least(text):
    record = next(r for r in map(TASK.problem, range(99)) if r.data["flawed"])
    scored = TASK.score(record, text)
    assert (scored.value, scored.correct, scored.detail["index"]) == (-1.0, False, None)


def test_the_last_box_counts():
    record = next(r for r in map(TASK.problem, range(99)) if r.data["label"] == 1)
    assert TASK.score(record, r"\boxed{0} no, \boxed{1}").value == 1.0
    assert TASK.score(record, r"\boxed{1} no, \boxed{-1}").value == -1.0


def test_a_judge_that_reads_nothing_beats_one_that_finds_every_flaw_by_step_ratio():
    """By enumeration over every solution of n paragraphs, half of them sound, the flaws anywhere: never to say "flawed"
    beats an always right verdict whose index is one off. By the distance it is the other way round, for every n."""
    for paragraphs in range(2, 30):
        solutions = [-1] * paragraphs + list(range(paragraphs))
        near = [label if label < 0 else label + (1 if label == 0 else -1) for label in solutions]

        def mean(reward, verdicts, labels=solutions, n=paragraphs):
            return np.mean([reward(v, label, label >= 0, n) for v, label in zip(verdicts, labels, strict=True)])

        blind = [-1] * len(solutions)
        assert mean(step_ratio, blind) > mean(step_ratio, near)
        assert mean(step_ratio, blind) == pytest.approx(1 - 1 / (2 * paragraphs))
        assert mean(distance, blind) == 0.0 < mean(distance, near)
        assert mean(outcome, near) == 1.0


def test_the_reward_is_an_option():
    record = next(r for r in map(TASK.problem, range(99)) if r.data["flawed"] and r.data["paragraphs"] == 2)
    values = {name: Judging(192, 96, reward=name).score(record, r"\boxed{-1}").value for name in REWARDS}
    assert values == {"distance": -1.0, "outcome": -1.0, "step_ratio": 0.5}


# Figures


def trajectory(record, index, number=0):
    text = "no idea" if index is None else rf"\boxed{{{index}}}"
    prompt = Segment("prompt", np.array([1]))
    written = Segment("model", np.array([2]), np.array([-1.0]), (0, 0), "stop")
    uid = f"held-out/{record.id}/{number}"
    return Trajectory(uid, record.id, record.id, (prompt, written), text, TASK.score(record, text))


def test_figures_count_as_the_judges_benchmarks_do():
    records = TASK.held_out(120)
    sound = [r for r in records if not r.data["flawed"]]
    seen = [r for r in records if r.data["flawed"] and not r.data["unseen"]]
    unseen = [r for r in records if r.data["unseen"]]
    say = {r.id: -1 for r in sound} | {r.id: r.data["label"] for r in seen} | {r.id: -1 for r in unseen}
    say[sound[0].id] = 0  # a false alarm
    say[sound[1].id] = None  # no verdict
    say[seen[0].id] = None
    caught, elsewhere = unseen[0], unseen[1]
    say[caught.id] = caught.data["label"]
    say[elsewhere.id] = next(i for i in range(9) if i != elsewhere.data["label"])
    figures = TASK.figures(records, [trajectory(r, say[r.id]) for r in records])
    hits = len(seen) - 1
    assert figures["genrm/precision"] == pytest.approx(hits / (hits + 1))
    assert figures["genrm/recall"] == pytest.approx(hits / len(seen)) == figures["genrm/index_right"]
    assert figures["genrm/f1"] == pytest.approx(2 * hits / (hits + 1 + len(seen)))
    assert figures["genrm/recall/unseen"] == pytest.approx(2 / len(unseen))
    assert figures["genrm/precision/unseen"] == pytest.approx(2 / 3)
    assert figures["genrm/index_right/unseen"] == pytest.approx(1 / len(unseen))
    assert figures["genrm/parse_fail"] == pytest.approx(2 / len(records))
    of_kind = [r for r in seen if r.data["kind"] == seen[0].data["kind"]]
    assert figures[f"genrm/recall/kind/{seen[0].data['kind']}"] == pytest.approx(1 - 1 / len(of_kind))


def test_figures_leave_out_what_there_is_nothing_of():
    assert TASK.figures([], []) == {}
    sound = [r for r in TASK.held_out(30) if not r.data["flawed"]][:3]
    assert TASK.figures(sound, [trajectory(r, -1) for r in sound]) == {"genrm/parse_fail": 0.0}
    masked = Trajectory("u", sound[0].id, "g", trajectory(sound[0], -1).segments, reward=RewardRecord(None))
    assert TASK.figures(sound[:1], [masked]) == {}


def test_an_evaluation_has_the_tasks_own_figures_of_samples_and_of_greedy_answers():
    records = TASK.held_out(60)

    def rollouts(jobs, sampling, what):
        greedy = sampling.temperature == 0.0
        made = [trajectory(j.record, j.record.data["label"] if greedy else -1, j.uid[-1]) for j in jobs]
        return RolloutResult(made, {}, 0.0, 0.0)

    sampling = Sampling(1.0, 192, 96)
    figures, _ = evaluate(rollouts, records, 2, sampling, 0, True, TASK.figures)
    assert figures["genrm/recall"] == 0.0 and figures["greedy/genrm/f1"] == figures["greedy/genrm/f1/unseen"] == 1.0
    without, _ = evaluate(rollouts, records, 2, sampling, 0, True)
    assert not any("genrm/" in name for name in without)


# A file of labelled solutions


def written(tmp_path, rows, name="labelled.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count):
    texts = [(f"What is {n} + 1?", f"{n} + 1 = {n + 1}\n\n\\boxed{{{n + 1}}}") for n in range(count)]
    return [{"problem": p, "response": r, "label": n % 3 - 1} for n, (p, r) in enumerate(texts)]


def test_the_examples_of_both_formats_can_be_trained_on():
    for name in ("flawed_positive", "processbench"):
        path = str(EXAMPLES / f"{name}.jsonl")
        task = JudgingJsonl(2048, 2048, path, format=name, held_out=0.5)
        record = task.problem(0)
        assert task.score(record, rf"\boxed{{{record.data['label']}}}").value == 1.0
        assert "<solution>" in record.messages[-1]["content"] and record.messages[0]["role"] == "system"


def test_solutions_of_one_problem_fall_on_one_side(tmp_path):
    task = JudgingJsonl(99, 99, written(tmp_path, [*rows(200), *rows(200)]), template="fapo_short.v1")
    sides = [{r.messages[-1]["content"].split("?")[0] for r in side} for side in (task._training, task._held_out)]
    assert not sides[0] & sides[1] and task.size + len(task.held_out(999)) == 400
    ids = [r.id for r in (*task._training, *task._held_out)]
    assert len(set(ids)) == 400
    with pytest.raises(IndexError, match="400"):
        task.problem(400)


def test_a_file_of_its_own_is_kept_out_of_training(tmp_path):
    path, own = written(tmp_path, rows(20)), written(tmp_path, rows(5), "own.jsonl")
    task = JudgingJsonl(99, 99, path, held_out_path=own)
    assert (task.size, len(task.held_out(99))) == (15, 5)


def test_solutions_known_as_flawed_alone_can_be_learnt_from(tmp_path):
    known = [{k: v for k, v in row.items() if k != "label"} | {"flawed": True} for row in rows(40)]
    record = JudgingJsonl(99, 99, written(tmp_path, known)).problem(0)
    task = JudgingJsonl(99, 99, written(tmp_path, known))
    assert task.score(record, r"\boxed{1}").value == 1.0 and record.answer == "flawed"
    assert task.figures([record], [trajectory_of(task, record, r"\boxed{1}")])["genrm/f1"] == 1.0


def trajectory_of(task, record, text):
    segments = (Segment("prompt", np.array([1])),)
    return Trajectory("u", record.id, record.id, segments, text, task.score(record, text))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"format": "rewardbench"}, "task.format='rewardbench'"),
        ({"held_out": 0.0}, "task.held_out=0.0"),
        ({"reward": "x"}, "task.reward='x'"),
        ({"held_out": 1e-9}, "no held-out solution of 20"),
    ],
)
def test_a_files_options_that_make_no_sense_are_refused(tmp_path, options, word):
    with pytest.raises(ConfigError, match=word):
        JudgingJsonl(99, 99, written(tmp_path, rows(20)), **options)


def test_a_label_that_names_no_paragraph_is_refused(tmp_path):
    bad = [*rows(20), {"problem": "p", "response": "one\n\ntwo", "label": 2, "id": "bad"}]
    with pytest.raises(ConfigError, match="'bad' has 2 paragraphs"):
        JudgingJsonl(99, 99, written(tmp_path, bad))
    with pytest.raises(ConfigError, match="line 1"):
        JudgingJsonl(99, 99, written(tmp_path, [{"problem": "p"}]))


# The weights that ship


def test_the_shipped_judge_finds_flaws_of_problems_it_never_met():
    import torch
    from transformers import AutoModelForCausalLM

    folder = CONF.parent / "models" / "tiny_judge"
    tokenizer = load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    records = TASK.held_out(120)
    prompts = [{"input_ids": render_prompt(tokenizer, r.messages)} for r in records]
    inputs = tokenizer.pad(prompts, return_tensors="pt", padding_side="left")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=CONFIG.max_response_tokens, do_sample=False)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    figures = TASK.figures(records, [trajectory_of(TASK, r, text) for r, text in zip(records, texts, strict=True)])
    assert figures["genrm/f1"] >= 0.85 and figures["genrm/parse_fail"] == 0.0
    assert folder.joinpath("model.safetensors").stat().st_size <= 6e6
