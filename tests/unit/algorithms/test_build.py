"""Building by name: the package's own, a user's own, options, and conf/algorithm saying the same as the code."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rltk.algorithms import Correction, Objective, Totals, build_correction, build_objective, option
from rltk.algorithms.registry import available, find_class
from tests.unit.algorithms import properties
from tests.unit.algorithms.tables import gradient, random_batch, with_needs

OBJECTIVES = available("rltk.algorithms", Objective)
CORRECTIONS = available("rltk.algorithms.corrections", Correction)


class Reinforce(Objective):
    """A user's objective: no ratio, a default of its own, an option of its own, token metrics."""

    std = False
    strength: float = option(1.0, above=0.0)

    def token_loss(self, batch):
        loss = -self.strength * self.token_advantage(batch) * torch.where(batch.mask, batch.new, 0.0)
        return loss, {"reinforce/loss": loss}


class CountsEverywhere(Objective):
    """Careless about the mask: loss 1 and penalty beta on every position."""

    def token_loss(self, batch):
        return torch.ones_like(batch.old), {}

    def penalty(self, batch):
        return torch.full_like(batch.old, self.beta), {}


class HalfWeight(Correction):
    def __call__(self, batch):
        return torch.full_like(batch.old, 0.5), batch.mask


HERE = __name__


def test_an_objective_from_outside_the_package():
    objective = build_objective(f"{HERE}:Reinforce", strength=2, aggregation="token-sum")
    assert type(objective).__name__ == "Reinforce" and objective.std is False and objective.clip_low == 0.2
    batch = random_batch(0)
    expected = torch.where(batch.mask, -2.0 * batch.advantage[:, None], 0.0)
    torch.testing.assert_close(gradient(objective, batch), expected)
    loss, metrics = objective.loss(batch)
    assert metrics["reinforce/loss"].item() == pytest.approx(loss.item() / batch.mask.sum().item())


OUTSIDE = """
import torch
from rltk.algorithms import Objective, option


class Tempered(Objective):
    'REINFORCE with a bounded pull, and a norm of its own over all ranks.'

    aggregation = "token-mean"
    default_minibatches = 2
    pull: float = option(2.0, above=0.0)
    norm = 1.0

    @property
    def needs(self):
        return super().needs | {"entropy"}

    def prepare(self, shard, reduce=None, first=True):
        shard = super().prepare(shard, reduce, first)
        total = shard.advantage.abs().sum()
        self.norm = float(total if reduce is None else reduce(total))
        return shard

    def token_loss(self, batch):
        gain = (self.pull * torch.where(batch.mask, batch.new, 0.0)).tanh()
        sure = 1 - torch.where(batch.mask, batch.entropy, 0.0)
        return -gain * sure * self.token_advantage(batch) / self.norm, {"gain": gain}
"""


def test_an_objective_in_a_file_of_the_users_own(tmp_path, monkeypatch):
    """A module anywhere on the path, nothing of the package touched: built, split, corrected, and refused alike."""
    (tmp_path / "my_tempered.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "my_tempered:Tempered"
    objective = build_objective(name, pull=3, clip_low=0.1, correction=build_correction("tis"))
    assert (objective.pull, objective.clip_low, objective.aggregation) == (3.0, 0.1, "token-mean")
    batch = with_needs(random_batch(0))
    loss, slopes, metrics = properties.step(objective, batch)
    weight = (batch.old - batch.mu).exp().clamp(max=2.0)
    values = -(3 * batch.new).tanh() * (1 - batch.entropy) * batch.advantage[:, None] / batch.advantage.abs().sum()
    torch.testing.assert_close(loss, (weight * values)[batch.mask].mean())
    assert slopes[batch.mask].count_nonzero() == batch.mask.sum() and metrics["gain"] < 0
    properties.check_splits(lambda: build_objective(name), replace(batch, hidden=None), [2, 2], [1, 4])
    with pytest.raises(ValueError, match="Tempered: unknown option 'pul' .nearest known: pull"):
        build_objective(name, pul=1.0)
    with pytest.raises(ValueError, match="Tempered.*needs entropy"):
        build_objective(name).loss(replace(batch, entropy=None))
    assert "my_tempered" not in OBJECTIVES


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_with_every_correction(name, correction):
    """With defaults: a finite loss, a gradient on sampled tokens and there alone, in two micro-batches as in one."""
    if find_class(name, "rltk.algorithms", Objective).refuses_corrections and correction != "none":
        with pytest.raises(ValueError, match="refuses correction="):
            build_objective(name, correction=build_correction(correction))
        return
    objective = build_objective(name, correction=build_correction(correction))
    batch = with_needs(random_batch(0, ratio=0.05))
    batch = replace(batch, mu=batch.old - 0.0005)  # inside the narrowest band, so that no correction drops everything
    loss, slopes, metrics = properties.step(objective, batch)
    assert loss.isfinite() and slopes.isfinite().all() and all(value.isfinite() for value in metrics.values())
    assert slopes[batch.mask].count_nonzero() > 0 and (slopes[~batch.mask] == 0).all()
    assert ("correction/tokens" in metrics) == (correction != "none")

    prepared, totals = objective.prepare(batch), Totals.of(batch.mask)
    parts = [replace(prepared.select(rows), new=batch.new[rows]) for rows in (slice(0, 2), slice(2, 6))]
    halves = [objective.loss(part, totals) for part in parts]
    torch.testing.assert_close(halves[0][0] + halves[1][0], loss)
    assert halves[0][1].keys() == metrics.keys()


def test_what_an_objective_says_under_the_mask_is_left_out():
    batch = random_batch(0)
    objective = build_objective(f"{HERE}:CountsEverywhere", beta=0.5, aggregation="token-sum")
    assert objective.loss(batch)[0].item() == pytest.approx(1.5 * batch.mask.sum().item())


def test_a_correction_from_outside_the_package():
    batch = random_batch(0)
    halved = build_objective("grpo", correction=build_correction(f"{HERE}:HalfWeight"))
    torch.testing.assert_close(halved.loss(batch)[0], 0.5 * build_objective("grpo").loss(batch)[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("grpo2", "unknown objective 'grpo2' .nearest known: grpo.; known: apo, cispo, .*, grpo, .*, sapo"),
        ("batch", "unknown objective 'batch'"),  # a module of the package that defines none
        ("../grpo", "unknown objective"),
        ("no_such_module:X", "importing module 'no_such_module' failed"),
        (f"{HERE}:Reinforced", "no 'Reinforced' .nearest known: Reinforce"),
        (f"{HERE}:HalfWeight", "must be a subclass of rltk.algorithms.objective.Objective"),
        (f"{HERE}:HERE", "must be a subclass"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        build_objective(name)


def test_a_module_stands_for_the_one_class_it_defines(tmp_path, monkeypatch):
    package = tmp_path / "shelf_of_objectives"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "child.py").write_text(
        "from rltk.algorithms.grpo import GRPO\nclass Child(GRPO):\n    clip_high = 0.28\n"
    )
    (package / "twins.py").write_text("from rltk.algorithms.grpo import GRPO\nclass A(GRPO): ...\nclass B(GRPO): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    child = find_class("child", package.name, Objective)()
    assert type(child).__name__ == "Child" and child.clip_high == 0.28 and child.clip_low == 0.2
    with pytest.raises(ValueError, match="twins defines A, B; a module defines one objective"):
        find_class("twins", package.name, Objective)


def test_an_unknown_correction_names_the_nearest():
    with pytest.raises(
        ValueError, match="unknown correction 'tiss' .nearest known: tis.; known: geo_mask, .*none.*, tis"
    ):
        build_correction("tiss")
    with pytest.raises(ValueError, match="TIS: unknown option 'cpa' .nearest known: cap"):
        build_correction("tis", cpa=3.0)
    with pytest.raises(ValueError, match="cap=0.5 .*a number >= 1"):
        build_correction("tis", cap=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_hi": 0.1}, "GRPO: unknown option 'clip_hi' .nearest known: clip_high"),
        ({"position_power": 0.5}, "GRPO: unknown option 'position_power'"),
        ({"clip_low": 1.5}, "clip_low=1.5 .*a number >= 0 and <= 1"),
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"clip_high": float("nan")}, "clip_high=nan"),
        ({"clip_high": float("inf")}, "clip_high=inf"),
        ({"clip_low": None}, "clip_low=None"),
        ({"clip_low": "0.2"}, "clip_low='0.2'"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 .*a number > 1 or null"),
        ({"beta": -1}, "beta=-1"),
        ({"kl": "k4"}, "kl='k4' .*one of k1, k2, k3"),
        ({"aggregation": "mean"}, "aggregation='mean' .*token-mean, seq-mean-token-mean"),
        ({"ddof": 2}, "ddof=2 .*one of 0, 1"),
        ({"ddof": True}, "ddof=True"),
        ({"std": 1}, "std=1 .*true or false"),
        ({"min_group": 1}, "min_group=1 .*an integer >= 2"),
        ({"reference": "new"}, "reference='new' .*one of old, mu"),
    ],
)
def test_an_option_that_cannot_be_is_named_with_its_range(options, words):
    with pytest.raises(ValueError, match=words):
        build_objective("grpo", **options)


def test_whole_numbers_and_null_are_fine_where_they_make_sense():
    objective = build_objective("ctpo", beta=1, dual_clip=None, position_power=0)
    assert objective.beta == 1.0 and isinstance(objective.beta, float) and objective.dual_clip is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_configuration_says_what_the_code_does(name):
    properties.check_configuration(name)


def test_the_published_defaults():
    ctpo, grpo = build_objective("ctpo"), build_objective("grpo")
    assert (ctpo.clip_low, ctpo.clip_high, ctpo.dual_clip, ctpo.position_power) == (0.025, 0.05, 0.05, 0.5)
    assert (grpo.clip_low, grpo.clip_high, grpo.dual_clip, grpo.beta) == (0.2, 0.2, None, 0.0)
    assert ctpo.aggregation == grpo.aggregation == "seq-mean-token-mean"


def test_rewards_pass_through_unshaped_and_none_stays_none():
    group = [SimpleNamespace(length=3, reward=SimpleNamespace(value=v, correct=None, flawed=None)) for v in (1.0, None)]
    assert build_objective("grpo").shape_rewards([*group, SimpleNamespace(length=1, reward=None)]) == [1.0, None, None]
