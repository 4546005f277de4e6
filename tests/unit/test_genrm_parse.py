from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.rewards.genrm.parse import final_answer, parse_choice, parse_index, parse_numbers
from rltk.rewards.genrm.types import Reply
from tests.unit.genrm_readers import reply


@pytest.mark.parametrize(
    ("text", "index"),
    [
        (r"\boxed{-1}", -1),
        (r"wrong in 2: \boxed{ 2 }", 2),
        (r"at first \boxed{0}, but no: \boxed{1}", 1),
        (r"<think>perhaps \boxed{0}</think> \boxed{-1}", -1),
        (r"\boxed{0}</think>\boxed{2}", 2),
        (r"\boxed{3}", None),  # there are three paragraphs
        (r"\boxed{-2}", None),
        (r"\boxed{-1} and \boxed{all right}", None),  # the last box decides, be it none
        (r"\boxed{-1} \boxed{", None),
        (r"\boxed{-1} \boxed{\boxed{1}", 1),
        (r"\boxed{\boxed{1}}", 1),
        (r"\boxed{{1}}", None),
        (r"<think>\boxed{-1}", None),  # still thinking
        (r"<think>\boxed{-1}</think> I am not sure.", None),
        ("-1", None),
        (r"\boxed{}", None),
        (r"\boxed{+1}", None),
        (r"\boxed{01}", None),
        (r"\boxed{1.0}", None),
        (r"\boxed{1+0}", None),
        (r"\boxed{__import__('os').getpid()}", None),
        ("\\boxed{\u22121}", None),  # a minus sign that is no hyphen
        ("\\boxed{\uff11}", None),  # a wide digit
        ("\\boxed{\u0661}", None),  # an Arabic one
        (r"\fbox{1}", None),
        (r"\boxed{" + "9" * 100_000 + "}", None),
        (r"\boxed{" * 100_000, None),
    ],
)
def test_index(text, index):
    assert parse_index(reply(text), paragraphs=3) == index


@pytest.mark.parametrize("finish_reason", ["length", "abort", "content_filter", ""])
def test_a_reply_that_was_cut_off_holds_no_verdict(finish_reason):
    assert parse_index(Reply(r"\boxed{1}", finish_reason, 3), 3) is None
    assert parse_choice(Reply(r"\boxed{A}", finish_reason, 3), "AB") is None


@given(st.text("\\boxed{}-019 <think>/", max_size=60), st.integers(1, 5))
def test_what_is_found_is_in_range(text, paragraphs):
    index = parse_index(reply(text), paragraphs)
    assert index is None or -1 <= index < paragraphs


def test_choice():
    assert parse_choice(reply(r"\boxed{A} no, \boxed{b}"), "AB") == 1
    assert parse_choice(reply(r"\boxed{Yes}"), ("no", "yes")) == 1
    assert parse_choice(reply(r"\boxed{C}"), "AB") is None
    assert parse_choice(reply(r"\boxed{AB}"), "AB") is None
    assert parse_choice(reply("A"), "AB") is None


@pytest.mark.parametrize(
    ("box", "numbers"),
    [
        ("2, 5", [2, 5]),
        ("8", [8]),
        ("1,2,3,4", None),
        ("2,2", None),
        ("0", None),
        ("9", None),
        ("2,", None),
        ("", None),
    ],
)
def test_numbers(box, numbers):
    assert parse_numbers(reply(rf"\boxed{{{box}}}"), highest=8, most=3) == numbers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b} c}", "b"),
        ("none", None),
        (r"\boxed{" * 50_000, None),
        ("}" * 50_000 + r"\boxed{1}" + "{" * 50_000, "1"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer
