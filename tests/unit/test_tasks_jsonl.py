import json

import pytest

from rltk.errors import ConfigError
from rltk.tasks.jsonl import Jsonl


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return str(path)


def problems(count, first=0):
    return [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(first, first + count)]


def test_every_record_is_on_one_side_and_the_split_ignores_order(tmp_path):
    rows = problems(200)
    task = Jsonl(512, 1024, path=write(tmp_path / "a.jsonl", rows))
    turned = Jsonl(512, 1024, path=write(tmp_path / "b.jsonl", rows[::-1]))
    training = [task.problem(i).data["question"] for i in range(task.size)]
    held_out = [r.data["question"] for r in task.held_out(200)]
    assert sorted(training + held_out) == sorted(r["question"] for r in rows)
    assert 5 <= len(held_out) <= 40
    assert set(held_out) == {r.data["question"] for r in turned.held_out(200)}


def test_equal_questions_fall_on_the_same_side(tmp_path):
    rows = problems(60) + [{**r, "answer": 0} for r in problems(60)]
    task = Jsonl(512, 1024, path=write(tmp_path / "a.jsonl", rows))
    training = {task.problem(i).data["question"] for i in range(task.size)}
    assert training.isdisjoint(r.data["question"] for r in task.held_out(120))


def test_a_held_out_file_is_kept_out_of_training(tmp_path):
    task = Jsonl(
        512,
        1024,
        path=write(tmp_path / "train.jsonl", problems(20)),
        held_out_path=write(tmp_path / "test.jsonl", problems(5, first=18)),
    )
    assert task.size == 18 and [r.answer for r in task.held_out(9)] == ["19", "20", "21", "22", "23"]


def test_columns_instruction_system_and_level(tmp_path):
    rows = [{"q": f"p{i}", "a": "x", "kind": "easy"} for i in range(50)]
    task = Jsonl(
        512,
        1024,
        path=write(tmp_path / "a.jsonl", rows),
        question="q",
        answer="a",
        level="kind",
        instruction="Box it.",
        system="Be brief.",
    )
    record = task.problem(0)
    assert [m["role"] for m in record.messages] == ["system", "user"] and record.level == "easy"
    assert record.messages[1]["content"] == f"{record.data['question']}\n\nBox it."
    with pytest.raises(IndexError):
        task.problem(task.size)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{oops"], [":3", "JSON"]),
        (["[1, 2]"], [":3", "list"]),
        ([{"question": "q"}], [":3", "'answer'"]),
        ([{"question": "", "answer": 1}], [":3", "'question'"]),
        ([{"question": "q", "answer": None}], [":3", "'answer'"]),
        ([{"question": "q", "answer": True}], [":3", "'answer'"]),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, rows, words):
    path = write(tmp_path / "data.jsonl", [problems(1)[0], "", *rows])
    with pytest.raises(ConfigError) as error:
        Jsonl(512, 1024, path=path)
    assert all(word in str(error.value) for word in ["data.jsonl", *words]), str(error.value)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"question": "\xff", "answer": 1}\n')
    with pytest.raises(ConfigError, match=r"data\.jsonl:1"):
        Jsonl(512, 1024, path=str(tmp_path / "data.jsonl"))


def test_empty_or_missing_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no problem"):
        Jsonl(512, 1024, path=write(tmp_path / "a.jsonl", ["", " "]))
    with pytest.raises(ConfigError, match="no such file"):
        Jsonl(512, 1024, path=str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="held"):
        Jsonl(512, 1024, path=write(tmp_path / "b.jsonl", problems(1)))


def test_answers_are_scored_by_math_verify(tmp_path):
    task = Jsonl(512, 1024, path=write(tmp_path / "a.jsonl", [{**r, "answer": "1/2"} for r in problems(60)]))
    assert task.score(task.problem(0), r"so \boxed{\frac{1}{2}}").value == 1.0
    assert task.score(task.problem(0), r"so \boxed{\frac{1}{3}}").value == 0.0
