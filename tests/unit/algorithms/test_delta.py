"""DelTA: the weights against an oracle that goes token by token, over any ranks; DAPO for the rest."""

import math
import sys
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
import yaml

from rltk.algorithms import TokenBatch, Totals, build_correction, build_objective, delta
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, with_needs


def batch_of(seed=0, rows=6, width=4, padding=False, **fields):
    batch = properties.filled_batch(seed, rows=rows, padding=padding)
    return replace(with_needs(batch, seed, width), **fields)


def mean_of(vectors, counts):
    total = sum(counts)
    if total == 0:
        return [0.0] * len(vectors[0])
    return [sum(c * v[i] for c, v in zip(counts, vectors, strict=True)) / total for i in range(len(vectors[0]))]


def deviation(values):
    if not values:
        return 1e-4
    mean = sum(values) / len(values)
    return math.sqrt(max(sum((v - mean) ** 2 for v in values) / len(values), 1e-8))


def oracle(batch, refinements=1, low=0.8, high=1.2):
    """w of each masked token in the order of `batch.mask.nonzero()`, with squared distances written out."""
    places = batch.mask.nonzero().tolist()
    advantage = [batch.advantage[row].item() for row, _ in places]
    vectors = [((1 - batch.old[row, t].exp()) * batch.hidden[row, t]).tolist() for row, t in places]

    def margins(right, wrong):
        found = []
        for v, a in zip(vectors, advantage, strict=True):
            to_right = sum((x - y) ** 2 for x, y in zip(v, right, strict=True))
            to_wrong = sum((x - y) ** 2 for x, y in zip(v, wrong, strict=True))
            found.append(to_right - to_wrong if a < 0 else to_wrong - to_right)
        return found

    def spreads(margin):
        return [deviation([m for m, a in zip(margin, advantage, strict=True) if sign * a > 0]) for sign in (1, -1)]

    def shares(margin, spread):
        return [1 / (1 + math.exp(-m / spread[a < 0])) for m, a in zip(margin, advantage, strict=True)]

    counts = [[max(a, 0.0) for a in advantage], [max(-a, 0.0) for a in advantage]]
    margin = margins(*(mean_of(vectors, side) for side in counts))
    spread = spreads(margin)
    for _ in range(refinements):
        spread = spreads(margin)
        share = shares(margin, spread)
        margin = margins(*(mean_of(vectors, [c * s for c, s in zip(side, share, strict=True)]) for side in counts))
    weight = [low if a == 0 else low + (high - low) * s for a, s in zip(advantage, shares(margin, spread), strict=True)]
    mean = sum(weight) / len(weight)
    return torch.tensor([w / mean for w in weight], dtype=torch.float64)


def weights(objective, batch):
    """w of each masked token, read off the advantages that `prepare` returns."""
    prepared = objective.prepare(batch)
    return (prepared.advantage / batch.advantage[:, None])[batch.mask]


@pytest.mark.parametrize("refinements", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_the_weights_against_the_oracle(seed, refinements):
    batch = batch_of(seed, padding=True)
    found = weights(build_objective("delta", refinements=refinements), batch)
    torch.testing.assert_close(found, oracle(batch, refinements), rtol=1e-9, atol=1e-12)
    assert found.mean().item() == pytest.approx(1.0) and found.std() > 0.02
    assert found.max() / found.min() <= 1.2 / 0.8


def test_the_range_is_an_option_and_one_value_of_it_is_dapo():
    batch = batch_of(2)
    found = weights(build_objective("delta", weight_low=0.2, weight_high=3.0), batch)
    torch.testing.assert_close(found, oracle(batch, low=0.2, high=3.0))
    flat = build_objective("delta", weight_low=1.0, weight_high=1.0)
    dapo = build_objective("dapo")
    loss, slopes, metrics = properties.step(flat, batch)
    expected, expected_slopes, _ = properties.step(dapo, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slopes, expected_slopes)
    assert metrics["weight/sd"].item() == pytest.approx(0, abs=1e-6)


def test_tokens_without_advantage_get_the_least():
    batch = batch_of(3)
    batch = replace(batch, advantage=torch.tensor([1.0, 0.0, -1.0, 0.0, 2.0, -0.5]).double())
    prepared = build_objective("delta").prepare(batch)
    expected = oracle(batch)
    idle = (batch.advantage[:, None] == 0).expand_as(batch.mask)[batch.mask]
    assert (expected[idle] == expected.min()).all() and idle.sum() > 4
    torch.testing.assert_close(
        prepared.advantage[batch.mask], expected * batch.advantage[:, None].expand(6, 7)[batch.mask]
    )


def test_one_side_alone_is_measured_against_the_origin():
    batch = batch_of(4)
    for sign in (1, -1):
        one_sided = replace(batch, advantage=sign * (batch.advantage.abs() + 0.1))
        torch.testing.assert_close(weights(build_objective("delta"), one_sided), oracle(one_sided))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_side_beside_tokens_without_advantage(sign):
    """No deviation of the empty side reaches a token that is on neither."""
    batch = batch_of(16)
    plain = replace(batch, advantage=sign * torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 0.7]).double())
    mixed = replace(plain, advantage=plain.advantage * torch.tensor([1, 0, 1, 1, 0, 1]))
    found = build_objective("delta").prepare(mixed).advantage
    rows = batch.mask & (mixed.advantage != 0)[:, None]
    alone = build_objective("delta").prepare(replace(mixed, mask=rows)).advantage
    ratio = found[rows] / alone[rows]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))  # alike but for the mean weight
    assert found.isfinite().all() and (found[batch.mask & ~rows] == 0).all()


def test_margins_without_spread_are_measured_by_the_floor():
    """One token a side: both margins are (2x)^2 = 1e-4, and their deviation counts as sqrt(1e-8)."""
    x = 0.005 / (1 - math.exp(-1))
    hidden = torch.tensor([[[x]], [[-x]], [[0.0]]], dtype=torch.float64)
    old = torch.full((3, 1), -1.0).double()
    advantage = torch.tensor([1.0, -1.0, 0.0]).double()
    batch = TokenBatch(old, old, old, torch.ones(3, 1), advantage, torch.zeros(3).long(), hidden=hidden)
    right = build_objective("delta").prepare(batch).advantage[0, 0].item()
    active, idle = 0.8 + 0.4 / (1 + math.exp(-1)), 0.8
    assert right == pytest.approx(active / ((2 * active + idle) / 3), rel=1e-6)


def test_the_margin_of_a_sides_only_token_has_no_spread():
    """It is beyond any: the token weighs 1.2 where one without advantage weighs .8."""
    batch = batch_of(20)
    only = torch.zeros(6, 7).bool()
    for row in (0, 2, 3):
        only[row, batch.mask[row].nonzero()[0]] = True
    batch = replace(batch, mask=only, advantage=torch.tensor([1.0, 0.0, 0.0, -2.0, 0.0, 0.0]).double())
    prepared = build_objective("delta").prepare(batch).advantage[only]
    torch.testing.assert_close(prepared, torch.tensor([1.2, 0.0, -2.4]).double() / (3.2 / 3))


def test_what_tells_the_sides_apart_counts_for_more():
    """Right and wrong answers share one direction and differ in another: tokens of the latter weigh more."""
    shared, own = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()
    hidden = torch.stack([torch.stack([shared, own]), torch.stack([shared, -own])])
    old = torch.full((2, 2), -2.0).double()
    batch = TokenBatch(
        old, old, old, torch.ones(2, 2), torch.tensor([1.0, -1.0]).double(), torch.zeros(2).long(), hidden=hidden
    )
    found = weights(build_objective("delta"), batch).view(2, 2)
    assert (found[:, 1] > 1.05).all() and (found[:, 0] < 0.95).all()
    torch.testing.assert_close(found[0], found[1])


def test_a_rotation_of_the_hidden_space_changes_nothing():
    batch = batch_of(5)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = replace(batch, hidden=torch.where(batch.mask[..., None], batch.hidden, 0.0) @ turn)
    objective = build_objective("delta")
    torch.testing.assert_close(weights(objective, turned), weights(objective, batch))


def test_the_gradient_is_that_of_the_weighted_advantages():
    batch = batch_of(6)
    advantage = torch.zeros(6, 7).double()
    advantage[batch.mask] = oracle(batch) * batch.advantage[:, None].expand(6, 7)[batch.mask]
    properties.check_on_policy(build_objective("delta"), replace(batch, old=batch.new), advantage_of(batch))
    objective, dapo = build_objective("delta"), build_objective("dapo")
    shaped = replace(batch, advantage=advantage, hidden=None)
    torch.testing.assert_close(properties.step(objective, batch)[1], properties.step(dapo, shaped)[1])


def advantage_of(batch):
    """Its own A_t when old is new, as in `check_on_policy`."""
    batch = replace(batch, old=batch.new)
    advantage = torch.zeros(batch.mask.shape).double()
    advantage[batch.mask] = oracle(batch) * batch.advantage[:, None].expand_as(batch.mask)[batch.mask]
    return advantage


def test_the_probability_is_the_old_one():
    """A token that was certain asks nothing of the head: its hidden state does not matter."""
    batch = batch_of(7)
    certain = torch.where(torch.arange(7) == 2, 0.0, batch.old)
    moved = batch.hidden.clone()
    moved[:, 2] = 50.0
    objective = build_objective("delta")
    found = [objective.prepare(replace(batch, old=certain, hidden=h)).advantage for h in (batch.hidden, moved)]
    torch.testing.assert_close(*found)
    other = objective.prepare(replace(batch, hidden=moved)).advantage
    assert not torch.allclose(other[batch.mask], found[0][batch.mask])
    assert torch.equal(
        objective.prepare(replace(batch, new=batch.new + 1)).advantage, objective.prepare(batch).advantage
    )


def test_ranks_and_micro_batches():
    batch = batch_of(8, rows=8, padding=True)
    properties.check_splits(lambda: build_objective("delta"), batch, [3, 3], [1, 4, 6])
    properties.check_splits(lambda: build_objective("delta", refinements=2), batch, [1, 7], [2])


def test_order_and_equal_rewards():
    batch = batch_of(9, padding=True)
    properties.check_order(build_objective("delta"), batch)
    properties.check_equal_rewards(build_objective("delta"), batch)


def test_masked_tokens_are_transparent():
    """Without the tool tokens and padding between them, the sampled tokens weigh the same, whatever stands there."""
    batch = batch_of(10, padding=True)
    lengths = batch.mask.sum(dim=1)
    packed_mask = torch.arange(8) < lengths[:, None]

    def pack(value):
        packed = torch.full((6, 8, *value.shape[2:]), torch.nan if value.ndim == 2 else -50.0).double()
        packed[packed_mask] = value[batch.mask]
        return packed

    fields = {name: pack(getattr(batch, name)) for name in ("new", "old", "mu", "hidden")}
    none = dict.fromkeys(("ref", "entropy", "hellinger", "forward_kl"))
    loss, slopes, metrics = properties.step(build_objective("delta"), batch)
    other, other_slopes, other_metrics = properties.step(
        build_objective("delta"), replace(batch, **none, mask=packed_mask, **fields)
    )
    assert loss.isfinite() and (slopes[~batch.mask] == 0).all()
    torch.testing.assert_close(other, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_slopes[packed_mask], slopes[batch.mask], rtol=0, atol=1e-12)
    assert all(torch.allclose(other_metrics[name], value) for name, value in metrics.items())


def test_hidden_states_do_their_work_in_prepare_and_are_let_go():
    batch = batch_of(11)
    objective, totals = build_objective("delta"), Totals.of(batch.mask)
    with pytest.raises(ValueError, match="delta: call prepare"):
        objective.loss(batch, totals)
    with pytest.raises(ValueError, match="delta: call prepare"):
        objective.loss(replace(batch, hidden=batch.hidden[..., :1]), totals)
    prepared = objective.prepare(batch)
    assert prepared.hidden.shape == (6, 7, 0) and prepared.hidden.untyped_storage().nbytes() == 0
    assert not prepared.advantage.requires_grad and objective.needs == {"hidden"}
    torch.testing.assert_close(objective.loss(prepared, totals)[0], objective.loss(batch)[0])  # alone: prepares itself
    torch.testing.assert_close(gradient(objective, prepared, totals), gradient(objective, batch))
    for call in (objective.prepare, objective.loss):
        with pytest.raises(ValueError, match="needs hidden"):
            call(replace(batch, hidden=None))


def test_the_batch_given_stays_as_it_was():
    batch = batch_of(12)
    before = batch.advantage.clone()
    spread = replace(batch, advantage=batch.advantage[:, None].expand(6, 7).clone())
    kept = spread.advantage.clone()
    build_objective("delta").prepare(spread)
    build_objective("delta").prepare(batch)
    assert torch.equal(batch.advantage, before) and torch.equal(spread.advantage, kept)


def test_the_spread_of_the_weights_is_reported():
    batch = batch_of(13)
    metrics = properties.step(build_objective("delta"), batch)[2]
    assert metrics["weight/sd"].item() == pytest.approx(oracle(batch).std(correction=0).item())


def test_weights_that_are_all_the_same_have_no_spread():
    """Whatever rounding makes of their squares: for 5 to 7 weights of .7, less than nothing."""
    batch, objective = batch_of(21, rows=1), build_objective("delta", weight_low=0.7)
    full = {name: torch.full((1, 7), -1.0).double() for name in ("new", "old", "mu")}
    for count in range(1, 8):
        mask = torch.arange(7)[None] < count
        idle = replace(batch, **full, mask=mask, advantage=torch.zeros(1).double())
        assert properties.step(objective, idle)[2]["weight/sd"].item() == pytest.approx(0, abs=1e-6)


def test_float32_and_half_precision_states():
    batch = batch_of(14, width=64)
    exact = weights(build_objective("delta"), batch)
    single = {name: getattr(batch, name).float() for name in ("new", "old", "mu", "advantage")}
    none = dict.fromkeys(("ref", "entropy", "hellinger", "forward_kl", "reward", "pass_rate", "group_length"))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        low = replace(batch, **none, **single, hidden=batch.hidden.to(dtype) * 100)
        prepared = build_objective("delta").prepare(low)
        assert prepared.advantage.dtype == torch.float32
        found = (prepared.advantage / low.advantage[:, None])[batch.mask].double()
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("part", "rows"), [(1, 1), (2 * 7 * 4, 2), (3 * 7 * 4, 3), (2**25, 6)])
def test_half_precision_is_read_in_parts_and_full_precision_where_it_lies(monkeypatch, part, rows):
    """The weights are those of the same states in full precision, whatever the parts."""
    batch = batch_of(17)
    states = batch.hidden.bfloat16()
    monkeypatch.setattr(delta, "PART", part)
    parts = list(delta._Vectors(states, batch.old)._parts())
    assert [len(one) for one in parts] == [rows] * (6 // rows) and parts[0].dtype == torch.float64
    (whole,) = delta._Vectors(batch.hidden, batch.old)._parts()
    assert whole.data_ptr() == batch.hidden.data_ptr()
    found = weights(build_objective("delta"), replace(batch, hidden=states))
    torch.testing.assert_close(found, oracle(replace(batch, hidden=states.double())))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(value):
    batch = batch_of(18)
    hidden = torch.where(batch.mask[..., None], batch.hidden, value)
    assert not batch.mask.all()
    objective, totals = build_objective("delta"), Totals.of(batch.mask)
    for prepared, counted in (
        (objective.prepare(replace(batch, hidden=hidden)), totals),
        (replace(batch, hidden=hidden), None),
    ):
        with pytest.raises(ValueError, match="hidden is not finite everywhere; it must be, where the mask is 0 too"):
            objective.loss(prepared, counted)
    assert objective.loss(objective.prepare(batch), totals)[0].isfinite()  # it is forgotten with the next batch


def test_prepare_reads_no_figure_back():
    """Tensors on torch's meta device have none: a GPU runs on while the host goes on to the loss."""
    batch = batch_of(19)
    nowhere = TokenBatch(
        **{n: None if v is None else v.to("meta") for n, v in vars(batch).items() if n != "masked_lengths"}
    )
    prepared = build_objective("delta", refinements=2).prepare(nowhere)
    assert prepared.advantage.is_meta and prepared.advantage.shape == (6, 7)


def test_on_a_gpu_the_kernels_weights_are_used(monkeypatch):
    """With kernels that say what they were given: tests/unit/test_kernels_delta.py has the real ones."""
    batch, given = batch_of(22), []

    def delta_weights(*arguments):
        given.append(arguments)
        return batch.old.nan_to_num(), torch.tensor(0.25), torch.tensor(math.nan)

    kernels = SimpleNamespace(delta_weights=delta_weights)
    monkeypatch.setitem(sys.modules, "rltk.kernels.delta_weights", kernels)
    monkeypatch.setattr(delta, "_fused", lambda shard: True)
    objective = build_objective("delta", refinements=3, weight_low=0.5, weight_high=1.5)
    prepared = objective.prepare(batch, torch.clone)
    ((hidden, old, mask, advantage, reduce, *options),) = given
    assert hidden is batch.hidden and old is batch.old and mask is batch.mask
    assert reduce is torch.clone and options == [3, 0.5, 1.5]
    assert torch.equal(advantage, torch.where(batch.mask, batch.advantage[:, None], 0.0))
    assert torch.equal(prepared.advantage, batch.old.nan_to_num() * advantage)
    with pytest.raises(ValueError, match="hidden is not finite"):
        objective.loss(prepared, Totals.of(batch.mask))
    assert objective.loss(prepared, Totals.of(batch.mask))[1]["weight/sd"].item() == pytest.approx(0.25)


def test_a_rank_without_sequences_and_a_step_of_padding():
    batch = batch_of(15)
    empty = build_objective("delta").prepare(batch.select(slice(0, 0)))
    assert empty.advantage.shape == (0, 7)
    padding = build_objective("delta").prepare(replace(batch, mask=torch.zeros(6, 7)))
    assert torch.equal(padding.advantage, torch.zeros(6, 7).double())


def test_no_group_is_refused():
    group = [SimpleNamespace(length=3, reward=SimpleNamespace(value=1.0, correct=True, flawed=None))] * 2
    assert build_objective("delta").admit(group) and not build_objective("dapo").admit(group)


def test_the_correction_is_prepared_too():
    objective = build_objective("delta", correction=build_correction("seq_mask"))
    assert "correction/dropped_q1" in properties.step(objective, batch_of(16))[2]


def test_the_configuration_and_its_values():
    properties.check_configuration("delta")
    objective = build_objective("delta")
    assert (objective.weight_low, objective.weight_high, objective.refinements) == (0.8, 1.2, 1)
    assert (objective.clip_low, objective.clip_high, objective.dual_clip) == (0.2, 0.28, 10.0)
    assert objective.aggregation == "token-mean" and objective.overlong_buffer == 4096
    tree = yaml.safe_load((files("rltk.conf") / "algorithm" / "delta.yaml").read_text())
    assert tree["max_length"] == "${task.max_response_tokens}"  # the run's own
    for options in ({"weight_low": 0.0}, {"weight_low": 1.1}, {"weight_high": 0.9}, {"refinements": -1}):
        with pytest.raises(ValueError, match="DelTA: option"):
            build_objective("delta", **options)
