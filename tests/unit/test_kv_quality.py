"""The parts of the quality study: texts, intervals, pictures, and forced tokens at once as one after the other."""

import json
import math

import pytest
import torch

from bench.kv_heatmaps import draw
from bench.kv_model import StudyModel
from bench.kv_quality import HEADS, SHARES, SIZES, Cell, Rows, Size, cells, parts, samples_of, write
from bench.kv_quality_figures import bootstrap, figures, wilson
from bench.kv_texts import continuations, needles
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.policies.policy import build_policy
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


def test_rounds_share_the_samples_out_and_each_has_every_depth_and_source(tokenizer):
    size = Size((900, 1000), depths=3, each=2, contexts=(300,), pieces=8, scored=15, rounds=2)
    every = parts(size)
    order = ["continuations 300", "needles 900", "needles 1000"]
    assert [part.name for part in every] == [f"{kind} {number}" for number in (0, 1) for kind in order]
    found = [samples_of(part, size, tokenizer) for part in every if part.length == 900]
    assert [[sample.depth for sample in samples] for samples in found] == [[0, 0.5, 1]] * 2
    assert {s.answer for samples in found for s in samples} == {s.answer for s in needles(tokenizer, 900, 3, 2)}
    read = [samples_of(part, size, tokenizer) for part in every if part.kind == "continuations"]
    assert [[sample.source for sample in samples] for samples in read] == [["reference"] * 2 + ["story"] * 2] * 2
    assert all(size.each % size.rounds == 0 and size.pieces % size.rounds == 0 for size in SIZES.values())


def test_what_is_done_is_written_and_read_again(tmp_path):
    every = cells(["dapq"], HEADS)
    size = Size((900,), 1, 2, (300,), 2, 15, rounds=2)
    rows = Rows.of(every)
    rows.needles["full"].append([900, 0.5, True, 7])
    rows.done["needles 900 0"] = 12.5
    result = write(tmp_path, {"bench": "kv_quality"}, rows, size, every)
    assert result["full"]["retrieval"][0] == 1 and result["dapq/shared@3%"]["retrieval"] is None
    assert Rows(**json.loads((tmp_path / "kv_quality_rows.json").read_text())) == rows
    written = json.loads((tmp_path / "kv_quality.json").read_text())
    assert written["not_done"] == ["continuations 300 0", "continuations 300 1", "needles 900 1"]
    table = (tmp_path / "kv_quality_table.md").read_text()
    assert "1 of 4 parts" in table and "| cache | found in 900 | found in all |" in table
    assert "| full | 100 (21-100) | 100 (21-100) |" in table
    assert written["seconds"] == 12.5 and (tmp_path / "kv_quality_shared.png").stat().st_size > 10_000


@pytest.mark.parametrize("policy", ["full", "dapq", "snapkv", "streaming"])
@pytest.mark.parametrize("heads", HEADS)
def test_forced_tokens_at_once_are_as_one_after_the_other(policy, heads):
    """Budgets of less than the prompt, of the prompt and a part of the answer, and of both."""
    generator = torch.Generator().manual_seed(0)
    prompts, answers = (torch.randint(3, 380, (3, n), generator=generator).tolist() for n in (60, 20))
    model = StudyModel(str(TINY), {} if policy == "full" else {policy: build_policy(policy, {})})
    prefilled = model.prefill(prompts)
    for budget in (30, 70, 90):
        options = KVOptions(sinks=0) if policy == "full" else KVOptions(policy, budget=budget, heads=heads, sinks=4)
        assert model.at_once
        at_once = model.continued(prefilled, options, answers)
        model.at_once = False
        torch.testing.assert_close(at_once, model.continued(prefilled, options, answers), atol=1e-4, rtol=0)
        model.at_once = True
