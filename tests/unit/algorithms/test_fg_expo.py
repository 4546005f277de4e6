"""FG-ExPO: beta as a function of the batch's accuracy over all ranks, and the curriculum."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import TokenBatch, Totals, build_correction, build_objective
from rltk.algorithms.fg_expo import GaussianCurriculum
from rltk.algorithms.prompts import PromptSampler
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import random_batch, with_needs


def batch_of(seed=0, rates=(0.5, 0.5, 0.0, 0.0, 1.0, 1.0)):
    return replace(with_needs(random_batch(seed), seed), pass_rate=torch.tensor(rates).double())


def scale(accuracy):
    return (math.tanh(accuracy) + 1) / 2


@pytest.mark.parametrize("rates", [(0.0,) * 6, (1.0,) * 6, (0.5, 0.5, 0.0, 0.0, 1.0, 1.0), (0.25,) * 6])
def test_beta_follows_the_accuracy_of_the_batch(rates):
    """The loss is GRPO's with beta (tanh(acc) + 1) / 2, acc the mean over all samples."""
    batch = batch_of(1, rates)
    accuracy = sum(rates) / 6
    objective = build_objective("fg_expo", beta=0.3)
    grpo = build_objective("grpo", beta=0.3 * scale(accuracy), ddof=0)
    loss, slopes, metrics = properties.step(objective, batch)
    expected, expected_slopes, _ = properties.step(grpo, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slopes, expected_slopes)
    assert metrics["kl/beta"].item() == pytest.approx(0.3 * scale(accuracy))


def test_a_failing_policy_is_held_less():
    betas = [
        properties.step(build_objective("fg_expo"), batch_of(2, (rate,) * 6))[2]["kl/beta"].item()
        for rate in (0.0, 0.3, 0.7, 1.0)
    ]
    assert betas == sorted(betas)
    assert betas[0] == pytest.approx(0.01) and betas[-1] == pytest.approx(0.02 * 0.8808, rel=1e-4)


def test_accuracy_is_over_all_ranks_and_leaves_padding_out():
    batch = replace(batch_of(3), mask=random_batch(3).mask & (torch.arange(6)[:, None] != 4))  # loses one of the right
    batch = replace(batch, pass_rate=torch.where(torch.arange(6) == 4, torch.nan, batch.pass_rate))
    objectives = [build_objective("fg_expo") for _ in range(3)]
    shards = [batch.select(slice(0, 1)), batch.select(slice(1, 1)), batch.select(slice(1, 6))]
    properties.prepare_on_ranks(objectives, shards)
    totals = Totals.of(batch.mask)
    for rank in (0, 2):
        metrics = objectives[rank].loss(shards[rank], totals)[1]
        share = shards[rank].mask.any(dim=1).sum().item() / totals.sequences
        assert metrics["kl/beta"].item() == pytest.approx(0.02 * scale(2 / 5) * share)


def test_one_sequence_is_a_batch():
    batch = batch_of(3, (1.0,) * 6).select(slice(0, 1))
    assert properties.step(build_objective("fg_expo"), batch)[2]["kl/beta"].item() == pytest.approx(0.02 * scale(1.0))


def test_each_optimizer_batch_has_its_own():
    objective = build_objective("fg_expo")
    totals = Totals.of(batch_of(4).mask)
    for first, rate in ((True, 1.0), (False, 0.0)):
        batch = batch_of(4, (rate,) * 6)
        objective.prepare(batch, first=first)
        assert objective.loss(batch, totals)[1]["kl/beta"].item() == pytest.approx(0.02 * scale(rate))


def test_a_micro_batch_needs_prepare_and_the_whole_batch_does_not():
    batch = batch_of(5)
    with pytest.raises(ValueError, match="fg_expo: call prepare"):
        build_objective("fg_expo").loss(batch, Totals.of(batch.mask))
    alone = build_objective("fg_expo").loss(batch)[0]
    assert torch.equal(alone, properties.step(build_objective("fg_expo"), batch)[0])
    with pytest.raises(ValueError, match="needs pass_rate"):
        build_objective("fg_expo").prepare(replace(batch, pass_rate=None))
    free = build_objective("fg_expo", beta=0.0)
    plain = replace(batch, pass_rate=None, ref=None)
    assert free.prepare(plain) is plain
    assert torch.equal(free.loss(plain, Totals.of(batch.mask))[0], build_objective("grpo").loss(plain)[0])


def test_prompts_solved_half_of_the_time_are_drawn_most():
    sampler = build_objective("fg_expo").prompt_sampler()
    assert isinstance(sampler, PromptSampler)
    means = [0.0, 0.25, 0.5, 0.75, 1.0]
    expected = [math.exp(-((p - 0.5) ** 2) / (2 * 0.35**2)) for p in means]
    assert sampler.weights(means) == pytest.approx(expected)
    assert max(expected) == sampler.weights([0.5])[0] == 1.0
    assert (sampler.start, sampler.decay, GaussianCurriculum().width) == (0.5, 0.9, 0.35)
    assert sampler.update(0.5, 1.0) == pytest.approx(0.55)


def test_the_width_is_an_option():
    narrow = build_objective("fg_expo", curriculum_width=0.1).prompt_sampler()
    assert narrow.weights([0.3])[0] == pytest.approx(math.exp(-2.0))
    assert build_objective("fg_expo", curriculum_width=1e6).prompt_sampler().weights([0.0, 0.5]) == pytest.approx(
        [1, 1]
    )
    with pytest.raises(ValueError, match="curriculum_width=0.0 .*a number > 0"):
        build_objective("fg_expo", curriculum_width=0.0)


def test_the_population_deviation():
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), torch.zeros(4).long()
    advantage = build_objective("fg_expo").advantages(rewards, group, torch.ones(4).bool())
    assert advantage[0].item() == pytest.approx(0.75 / math.sqrt(3 / 16), rel=1e-5)


def test_what_holds_for_every_objective():
    batch = replace(with_needs(properties.filled_batch(6, padding=True), 6), hidden=None)
    objective = build_objective("fg_expo", beta=0.3)
    properties.check_on_policy(build_objective("fg_expo", beta=0.0), batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(build_objective("fg_expo", beta=0.0), batch)
    properties.check_splits(lambda: build_objective("fg_expo", beta=0.3), batch, [2, 2], [1, 4])


def test_extremes_stay_finite_in_float32():
    old = torch.tensor([[-900.0, -0.001, -50.0]] * 2)
    new = torch.tensor([[-0.001, -900.0, -50.0]] * 2)
    batch = TokenBatch(
        new, old, old, torch.ones(2, 3), torch.tensor([1.0, -1.0]), torch.zeros(2).long(), ref=old,
        pass_rate=torch.tensor([0.5, 0.5]),
    )  # fmt: skip
    loss, slopes, metrics = properties.step(build_objective("fg_expo"), batch)
    assert loss.isfinite() and slopes.isfinite().all() and all(value.isfinite() for value in metrics.values())


def test_the_correction_is_prepared_too():
    objective = build_objective("fg_expo", correction=build_correction("seq_mask"))
    assert "correction/dropped_q1" in properties.step(objective, batch_of(7))[2]


def test_the_configuration_and_its_values():
    properties.check_configuration("fg_expo")
    objective = build_objective("fg_expo")
    assert (objective.beta, objective.ddof, objective.curriculum_width, objective.kl) == (0.02, 0, 0.35, "k3")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.2, 0.2, None)
    assert objective.needs == {"ref", "pass_rate"} and build_objective("fg_expo", beta=0.0).needs == frozenset()
