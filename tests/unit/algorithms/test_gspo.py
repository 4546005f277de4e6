"""GSPO: the sequence ratio against its definition, clipped as a whole; the two forms; finite differences."""

import math
from dataclasses import replace

import pytest
import torch

from rltk.algorithms import Totals, build_objective
from rltk.algorithms.aggregation import AGGREGATIONS
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, make_batch, random_batch

FORMS = ["sequence", "token"]
WIDE = {"clip_low": 1.0, "clip_high": 9.0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{"clip_low": 0.02, "clip_high": 0.03}, WIDE, {**WIDE, "dual_clip": 1.02}])
def test_against_the_definition(form, options):
    batch = random_batch(0)
    objective = build_objective("gspo", form=form, **options)
    losses, slopes = [], torch.zeros_like(batch.old)
    for row in range(6):
        mask, advantage = batch.mask[row], batch.advantage[row].item()
        count = int(mask.sum())
        s = math.exp((batch.new - batch.old)[row, mask].sum().item() / count)
        inside = min(max(s, 1 - options["clip_low"]), 1 + options["clip_high"])
        loss, clipped = max(-advantage * s, -advantage * inside), -advantage * inside > -advantage * s
        dual = options.get("dual_clip")
        if dual is not None and advantage < 0 and loss > -advantage * dual:
            loss, clipped = -advantage * dual, True
        losses.append(loss)
        slopes[row, mask] = 0.0 if clipped else -advantage * s / count / 6
    loss, metrics = objective.loss(batch)
    assert loss.item() == pytest.approx(sum(losses) / 6)
    torch.testing.assert_close(gradient(objective, batch), slopes)
    log_s = torch.stack([(batch.new - batch.old)[row, batch.mask[row]].mean() for row in range(6)])
    torch.testing.assert_close(metrics["log_s/mean"], log_s.mean())
    torch.testing.assert_close(metrics["log_s/square"], (log_s**2).mean())


def test_a_sequence_is_clipped_as_a_whole():
    old = torch.full((2, 4), -1.0).double()
    log_ratio = torch.tensor([[0.5, -0.5, 0.001, 0.001], [0.0, 0.0, 0.0, 0.0021]]).double()  # means 5.0e-4, 5.25e-4
    batch = make_batch(old + log_ratio, old, torch.ones(2).double())
    objective = build_objective("gspo")
    assert torch.equal(gradient(objective, batch), torch.zeros(2, 4).double())
    assert objective.loss(batch)[1]["clip/high"] == 1
    inside = replace(batch, new=old + 0.7 * log_ratio)  # means 3.5e-4, 3.7e-4
    assert (gradient(objective, inside) < 0).all()
    below = replace(batch, new=old - 0.65 * log_ratio, advantage=torch.full((2,), -1.0).double())  # -3.25e-4, -3.4e-4
    assert torch.equal(gradient(objective, below), torch.zeros(2, 4).double())


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("options", [{}, {"clip_low": 0.05, "clip_high": 0.05}, WIDE])
def test_both_forms_have_the_same_value_and_gradient(how, options):
    batch = properties.filled_batch(1, padding=True)
    sequence, token = (build_objective("gspo", form=form, aggregation=how, **options) for form in FORMS)
    torch.testing.assert_close(sequence.loss(batch)[0], token.loss(batch)[0])
    torch.testing.assert_close(gradient(sequence, batch), gradient(token, batch))
    assert build_objective("gspo").form == "sequence"


def test_with_an_advantage_for_each_token_the_forms_differ_as_they_say():
    """Token form: only the token that has an advantage is moved. Sequence form: all of its sequence are, alike."""
    batch = random_batch(2)
    only = torch.zeros(6, 7).double()
    only[0, 2] = 1.0
    batch = replace(batch, advantage=only)
    token, sequence = (gradient(build_objective("gspo", form=form, **WIDE), batch) for form in ("token", "sequence"))
    assert token.nonzero().tolist() == [[0, 2]]
    count = int(batch.mask[0].sum())
    assert count > 1
    torch.testing.assert_close(sequence[0, batch.mask[0]], (token[0, 2] / count).expand(count))


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_of_one_token_is_grpos(form):
    batch = random_batch(5)
    single = replace(batch, mask=torch.arange(7).expand(6, 7) == 2)
    clip = {"clip_low": 0.05, "clip_high": 0.05}
    gspo, grpo = build_objective("gspo", form=form, **clip), build_objective("grpo", **clip)
    torch.testing.assert_close(gspo.loss(single)[0], grpo.loss(single)[0])
    torch.testing.assert_close(gradient(gspo, single), gradient(grpo, single))


def test_finite_differences():
    batch = random_batch(3)
    objective, totals = build_objective("gspo", **WIDE), Totals.of(batch.mask)
    slopes = gradient(objective, batch)
    for row, t in batch.mask.nonzero().tolist()[::4]:
        move = torch.zeros(6, 7).double()
        move[row, t] = 1e-6
        up, down = (objective.loss(replace(batch, new=batch.new + sign * move), totals)[0] for sign in (1, -1))
        assert ((up - down) / 2e-6).item() == pytest.approx(slopes[row, t].item(), abs=1e-7)


def test_against_the_sampler():
    batch = random_batch(4)
    expected = build_objective("gspo", **WIDE).loss(replace(batch, old=batch.mu))[0]
    torch.testing.assert_close(build_objective("gspo", reference="mu", **WIDE).loss(batch)[0], expected)


@pytest.mark.parametrize("form", FORMS)
def test_what_holds_for_every_objective(form):
    objective, batch = build_objective("gspo", form=form, **WIDE), properties.filled_batch(8, padding=True)
    properties.check_on_policy(objective, batch, batch.advantage[:, None])
    properties.check_masked_tokens(objective, batch)
    properties.check_order(objective, batch)
    properties.check_equal_rewards(objective, batch)
    properties.check_extremes(objective)
    properties.check_splits(lambda: build_objective("gspo", form=form, **WIDE), batch, [2, 2], [1, 4])


def test_the_configuration_and_its_values():
    properties.check_configuration("gspo")
    objective = build_objective("gspo")
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (3e-4, 4e-4, None)
    assert objective.aggregation == "seq-mean-token-mean" and objective.needs == frozenset()
    with pytest.raises(ValueError, match="form='geometric' .*one of sequence, token"):
        build_objective("gspo", form="geometric")
