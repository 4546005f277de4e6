import threading

import pytest

from rltk.errors import InfrastructureError
from rltk.rewards.math import last_boxed, score_math, screen


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("42", r"first \boxed{41}, no: \boxed{42}"),
        ("42", r"\boxed{42} and then \boxed{4"),  # the last box that is complete
        ("1/2", r"\boxed{0.5}"),
        (r"\frac12", r"\boxed{\dfrac{1}{2}}"),
        (r"$\frac{1}{2}$", r"\boxed{\frac{2}{4}}"),
        ("x^2+2x+1", r"\boxed{(x+1)^2}"),
        ("1,2,3", r"\boxed{3, 2, 1}"),
        ("1000", r"\boxed{1,000}"),
        (r"50\%", r"\boxed{50}"),
        ("e^{-x^2}", r"\boxed{e^{-x^{2}}}"),
        ("42", "The final answer is: **42**."),
        ("42", "the answer is 41\nso the answer is 42"),
        ("A long solution.\n#### 1,234", r"\boxed{1234}"),
        (r"We find \boxed{7}.", "Answer: 7"),
    ],
)
def test_right_answers(answer, text):
    record = score_math(answer, text)
    assert (record.value, record.correct) == (1.0, True), record.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"\boxed{8}", "different"),
        ("I found 7 apples", "no final answer"),  # a number on the way is not an answer
        (r"\boxed{}", "no final answer"),
        (r"\boxed{7", "no final answer"),
        (r"\boxed{\frac{}{}}", "cannot be parsed"),
        (r"\boxed{9^{9^{9}}}", "tower of exponents"),
        (r"\boxed{9**9**9**9}", "tower of exponents"),
        (r"\boxed{(((9^9)^{999})^{999})}", "exponent above"),
        (r"\boxed{9^{9999 \cdot 9999}}", "exponent above"),
        (r"\boxed{123456789!}", "factorial"),
        (r"\boxed{((5!)!)!}", "factorial"),
        (r"\boxed{\binom{1000000}{500000}}", "binomial"),
        (r"\boxed{" + "(" * 100 + "1" + ")" * 100 + "}", "nests brackets"),
        (r"\boxed{" + "9" * 5000 + "}", "5000 characters"),
    ],
)
def test_wrong_answers_say_why(text, reason):
    record = score_math("7", text)
    assert (record.value, record.correct) == (0.0, False)
    assert reason in record.reason


@pytest.mark.parametrize("answer", ["", "%%%", r"\frac{1}{", "9^{9^{9}}"])
def test_a_reference_that_cannot_be_parsed_masks_even_an_equal_answer(answer):
    for text in (r"\boxed{3}", f"\\boxed{{{answer}}}"):
        record = score_math(answer, text)
        assert record.value is None and record.correct is None and record.detail == {"cause": "gold"}
        assert repr(answer) in record.reason


def test_a_comparison_that_takes_too_long_is_wrong(monkeypatch):
    monkeypatch.setattr("rltk.rewards.math.VERIFY_S", 1)
    record = score_math("7", r"\boxed{\prod_{i=1}^{9999} i^{i}}")
    assert (record.value, record.reason) == (0.0, "comparing the answer took over 1 s")


@pytest.mark.parametrize(
    "expression",
    ["2^{10}", "10^{-3}", "x^{10}+x^{9}+x^8", "e^{i\\pi}", "n!/(k!(n-k)!)", "5!", r"\binom{10}{3}", "2^{n^2}"],
)
def test_ordinary_expressions_pass_the_screen(expression):
    assert screen(expression) is None


@pytest.mark.parametrize(
    ("text", "content"),
    [(r"\boxed{a{b}c}", "a{b}c"), (r"\boxed {1}", "1"), (r"\fbox{1}", None), (r"\boxed 1", None), ("", None)],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_off_the_main_thread_it_refuses():
    caught = []

    def run():
        try:
            score_math("1", r"\boxed{1}")
        except InfrastructureError as error:
            caught.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught and "main thread" in caught[0]
