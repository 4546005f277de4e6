from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.rewards.genrm.paragraphs import split_paragraphs
from rltk.tasks import paragraphs as tasks

MARKS = ["```", "```python", "~~~", "$$", r"\[", r"\]", r"\(", r"\)", r"\begin{align}", r"\end{align}", r"\\", r"\$"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("  \n \n\t\n", 0),
        ("one\ntwo", 1),
        ("one\n\ntwo\n \t \n\n\nthree\n", 3),
        ("one\r\n\r\ntwo", 2),
        ("before\n\n```python\na = 1\n\nb = 2\n```\n\nafter", 3),
        ("```\na\n\n``\n\nb\n```", 1),  # two backticks close nothing
        ("````\na\n\n```\n\nb\n````", 1),  # nor do three what four opened
        ("~~~\na\n\n```\n\nb\n~~~", 1),
        ("1. so:\n   ```\n   a\n\n   b\n   ```", 1),
        ("not ``` a fence\n\nafter ```", 2),
        ("so\n$$\na\n\n= b\n$$\n\nthen", 2),
        ("it costs \\$$5\n\nand $$x\n\ny$$", 2),
        ("\\[ a\n\n= b \\]\n\nc \\(d\n\ne\\)", 2),
        (r"\begin{align}" + "\na\n\nb\n" + r"\end{align}", 1),
        (r"\begin{align*}" + "\na\n\nb\n" + r"\end{align*}" + "\n\nc", 2),
        (r"\begin{a}\begin{a}" + "\n\n" + r"\end{a}" + "\n\n" + r"\end{a}" + "\n\nx", 2),
        ("a & b \\\\[2pt]\n\nc", 2),  # a line break with a distance opens no formula
        ("```\none\n\ntwo\n\nthree", 3),  # never closed: hides nothing
        ("$$ one\n\ntwo", 2),
        (r"\begin{align}" + "\n\n" + r"\begin{align}" + "\na\n\nb\n" + r"\end{align}", 2),
        ("$$ a ```\n\nb $$\n\n```\nc", 2),  # what opens inside something else opens nothing
    ],
)
def test_split(text, count):
    found = split_paragraphs(text)
    assert len(found) == count
    assert all(p == p.strip() and p for p in found)


@given(st.text("ab +=\n\t 1\r\u200b", max_size=80))
def test_plain_text_is_split_as_tasks_label_it(text):
    assert split_paragraphs(text) == tasks.split_paragraphs(text)


@given(st.lists(st.sampled_from([*MARKS, "a", "\n", "\n\n", " "]), max_size=40).map("".join))
def test_nothing_is_lost_and_no_more_is_cut_than_in_plain_text(text):
    found = split_paragraphs(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert len(found) <= len(tasks.split_paragraphs(text))


@pytest.mark.parametrize("mark", [r"\[", r"\begin{a}", "$$ x", "```", "~~~ \n", r"\begin{a}\end{b}"])
def test_a_hundred_thousand_openers_end(mark):
    text = "\n\n".join([mark] * 50_000 + ["end"])
    found = split_paragraphs(text)
    assert found[-1].endswith("end")
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)
