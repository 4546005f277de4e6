"""Building by name: the package's own, a user's own, options, and conf/algorithm saying the same as the code."""

from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
import yaml

from rltk.algorithms import Correction, Objective, build_correction, build_objective, option
from rltk.algorithms.registry import find_class
from tests.unit.algorithms.tables import gradient, random_batch


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
        ("gpro", "unknown objective 'gpro' .nearest known: grpo.; known: ctpo, grpo"),
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
    with pytest.raises(ValueError, match="unknown correction 'tiss' .nearest known: tis.; known: none, tis"):
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


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_the_configuration_says_what_the_code_does(name):
    tree = yaml.safe_load((files("rltk.conf") / "algorithm" / f"{name}.yaml").read_text())
    kind = type(build_objective(name))
    assert tree.pop("name") == name and tree.pop("minibatches") == kind.default_minibatches == 4
    rules = kind.options()
    assert set(tree) == set(rules) - {"reference"}, "ratio.reference stands beside the groups"
    assert {key: rules[key].default for key in tree} == tree
    assert repr(build_objective(name, **tree)) == repr(build_objective(name))


def test_the_published_defaults():
    ctpo, grpo = build_objective("ctpo"), build_objective("grpo")
    assert (ctpo.clip_low, ctpo.clip_high, ctpo.dual_clip, ctpo.position_power) == (0.025, 0.05, 0.05, 0.5)
    assert (grpo.clip_low, grpo.clip_high, grpo.dual_clip, grpo.beta) == (0.2, 0.2, None, 0.0)
    assert ctpo.aggregation == grpo.aggregation == "seq-mean-token-mean"


def test_rewards_pass_through_unshaped_and_none_stays_none():
    group = [SimpleNamespace(length=3, reward=SimpleNamespace(value=v, correct=None, flawed=None)) for v in (1.0, None)]
    assert build_objective("grpo").shape_rewards([*group, SimpleNamespace(length=1, reward=None)]) == [1.0, None, None]
