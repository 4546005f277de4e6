"""The parts of the quality study that need no model: texts, intervals, pictures."""

import math

import pytest

from bench.kv_heatmaps import draw
from bench.kv_quality import HEADS, SHARES, Cell, bootstrap, cells, figures, wilson
from bench.kv_texts import continuations, needles
from rltk.rollout.tokens import load_tokenizer
from tests.integration.places import TINY


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY))


def test_needles_have_the_length_the_depth_and_the_answer_that_they_say(tokenizer):
    samples = needles(tokenizer, 900, depths=3, each=2)
    assert [sample.depth for sample in samples] == [0, 0, 0.5, 0.5, 1, 1]
    for sample in samples:
        text, digits = tokenizer.decode(sample.prompt), tokenizer.decode(sample.answer)
        assert len(sample.prompt) == 900 and len(digits) == 7 and text.count(digits) == 1
        assert text.endswith(" is ") and f" is {digits}." in text
        assert text.index(digits) / len(text) == pytest.approx((sample.depth + 0.1) / 1.3, abs=0.1)
    assert samples == needles(tokenizer, 900, depths=3, each=2)
    assert len({sample.answer for sample in samples}) == 6
    with pytest.raises(ValueError, match="no room"):
        needles(tokenizer, 40, 1, 1)


def test_continuations_follow_their_prompts_and_do_not_overlap(tokenizer):
    samples = continuations(tokenizer, 300, answer=16, count=7)
    assert [sample.source for sample in samples] == ["reference"] * 4 + ["story"] * 3
    assert len({sample.answer for sample in samples}) == 7
    assert all(len(sample.prompt) == 300 and len(sample.answer) == 16 for sample in samples)
    whole = tokenizer.decode([*samples[0].prompt, *samples[0].answer])
    from bench.kv_texts import reference

    assert whole in reference()


def test_intervals():
    assert wilson(5, 10) == pytest.approx([0.5, 0.2366, 0.7634], abs=1e-4)  # the textbook's
    assert wilson(0, 10)[1] == 0 and wilson(10, 10)[2] == 1 and math.isnan(wilson(0, 0)[0])
    middle, low, high = bootstrap([1.0, 2.0, 3.0, 4.0] * 25)
    assert middle == pytest.approx(math.exp(2.5)) and low < middle < high
    assert math.log(high) - math.log(low) == pytest.approx(2 * 1.96 * 1.118 / 10, rel=0.1)
    assert bootstrap([1.5, 2.5, 9.5], [1.0, 2.0, 9.0]) == pytest.approx([math.exp(0.5)] * 3)  # the same everywhere


def test_cells_have_a_name_each_and_budgets_of_the_prompt():
    every = cells(["dapq", "streaming"], HEADS)
    assert len({cell.name for cell in every}) == len(every) == 1 + 3 * len(SHARES)
    assert Cell("snapkv", 0.25, "shared").options(1024).budget == 256
    assert not Cell("snapkv", 0.03, "shared").fits(512) and Cell("full", 1.0, "").fits(16)


def test_the_picture_is_drawn(tmp_path):
    every = cells(["dapq", "streaming"], HEADS)
    found = {c.name: [[n, d, d > 0.5, 3] for n in (512, 1024) for d in (0.0, 1.0) if c.fits(n)] for c in every}
    read = {c.name: [[512, "story", 2.0 + c.share + i / 9] for i in range(9) if c.fits(512)] for c in every}
    result = figures(found, read, every, [512])
    assert result["full"]["retrieval"][0] == 0.5 and result["full"]["perplexity_over_full_512"] == [1.0] * 3
    assert "perplexity_512" not in result["streaming@3%"]
    draw(tmp_path / "picture.png", found, result, every, "shared", [512])
    assert (tmp_path / "picture.png").stat().st_size > 10_000
