"""What the learner supplies to an objective: columns of whole groups, shards, micro-batches. No model, no ranks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rltk.algorithms import Objective, build_objective
from rltk.errors import ConfigError
from rltk.learner.needs import needs_of
from rltk.learner.packing import RaggedBatch
from rltk.learner.scored import sequence_columns
from rltk.learner.settings import LearnerSettings
from rltk.learner.step import Step, accumulate, mean_of_steps, pack_sequences

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(vocab_size=100, hidden_size=3)
MODEL = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: CONFIG), dtype=torch.bfloat16)
ALL = {"ref", "entropy", "hellinger", "forward_kl", "reward", "pass_rate", "group_length", "hidden"}


def settings(**other):
    base = dict(
        model="", device="cpu", algorithm="wanting", algorithm_options={}, correction="none", correction_options={},
        reference="old", minibatches=2, temperature=1.0, max_response_tokens=9, seed=0,
    )  # fmt: skip
    return LearnerSettings(**(base | other))


def wanting(*needs, prepare=None, **options):
    """An objective with these needs; `prepare` takes the place of its own."""
    members = {"needs": frozenset(needs)}
    if prepare is not None:
        members["prepare"] = lambda self, shard, reduce=None, first=True: prepare(shard)
    return type("Wanting", (Objective,), members)(**options)


def batch(reward=(1, 0, np.nan, 0.5), correct=(-1, -1, 1, 0), group=(0, 0, 0, 0), sampled=(2, 3, 4, 5)):
    """Sequences of one prompt token and `sampled` others; mu of token t of sequence i is -i - t / 10."""
    masks = [np.arange(n + 1) > 0 for n in sampled]
    mus = [np.where(mask, -i - np.arange(len(mask)) / 10, np.nan) for i, mask in enumerate(masks)]
    offsets, unchecked = np.cumsum([0, *(n + 1 for n in sampled)]), -np.ones(len(sampled), np.int8)
    return RaggedBatch(
        np.arange(offsets[-1], dtype=np.int32), np.concatenate(masks), np.concatenate(mus).astype(np.float32), offsets,
        np.asarray(reward, np.float32), np.asarray(group), np.asarray(correct, np.int8), unchecked,
    )  # fmt: skip


def test_pass_rate_and_length_are_of_the_whole_scored_group():
    # Right by reward; wrong; right but without a reward, so not scored; wrong by its verdict, though the reward is not.
    columns = sequence_columns(batch())
    assert columns["pass_rate"].tolist() == pytest.approx([1 / 3] * 4)
    assert columns["group_length"].tolist() == [2.0] * 4
    assert columns["reward"].isnan().tolist() == [False, False, True, False]
    two = sequence_columns(batch((1, 1, -1, np.nan), (1, -1, -1, -1), (5, 5, 2, 2)))
    assert two["pass_rate"].tolist() == [1, 1, 0, 0]
    assert two["group_length"].tolist() == [2.5, 2.5, np.inf, np.inf]
    assert all(column.dtype == torch.float32 for column in two.values())


def filled(objective, needs, scored):
    """A step whose pass before has been made: hidden is sequence number, place and 1; entropy ln(100) / 2."""
    step = Step(scored, objective, needs, MODEL, CPU)
    for s in range(len(scored.reward)):
        n = int(scored.masked_lengths[s])
        hidden = torch.stack([torch.full((n,), float(s)), torch.arange(n), torch.ones(n)], 1).bfloat16()
        values = dict(old=torch.full((n,), -1.0), ref=torch.full((n,), -2.0), hidden=hidden)
        step.tables.put(scored.masked_lengths, [s], entropy=torch.full((n,), np.log(100) / 2), **values)
    return step


def loss_pass(step, shard, row, sequences):
    packed = pack_sequences(step.batch, sequences, CPU)
    flat = torch.zeros(len(packed.predict))
    found = {name: flat + i for i, name in enumerate(("entropy", "hellinger", "forward_kl", "ref"), start=1)}
    found["logprobs"] = (flat - 3).requires_grad_()
    return step.micro_batch(shard, row, sequences, packed, found), found


def test_prepare_sees_what_is_of_before_the_step_and_the_loss_what_is_of_now():
    seen = []

    def prepare(shard):
        seen.append(shard)
        return replace(shard, advantage=shard.advantage[:, None] * torch.ones_like(shard.mu))

    objective = wanting(*ALL, prepare=prepare)
    step = filled(objective, needs_of(objective, settings()), batch())
    assert step.kept.tolist() == [0, 1, 3]
    shard = step.prepare([3, 1, 0], lambda x: x, True)
    assert seen[0].hidden.shape == (3, 5, 3) and seen[0].hidden.dtype == torch.bfloat16
    assert seen[0].hidden[0, :, 0].tolist() == [3] * 5 and seen[0].hidden[2, :2, 1].tolist() == [0, 1]
    assert torch.equal(seen[0].new, seen[0].old) and seen[0].old[2].tolist() == [-1, -1, 0, 0, 0]
    assert seen[0].entropy[0].tolist() == pytest.approx([0.5] * 5)
    assert seen[0].hellinger is None and seen[0].forward_kl is None and seen[0].ref[0].tolist() == [-2] * 5
    assert step.tables.flat("hidden", [3]) is None  # let go of
    tokens, _ = loss_pass(step, shard, 1, [1, 0])
    assert tokens.hidden.shape == (2, 3, 0) and tokens.new.requires_grad and tokens.new[0].tolist() == [-3] * 3
    assert tokens.mu[0].tolist() == pytest.approx([-1.1, -1.2, -1.3]) and tokens.mask.sum(1).tolist() == [3, 2]
    assert tokens.old[1].tolist() == [-1, -1, 0] and tokens.ref[1].tolist() == [-2, -2, 0]
    assert tokens.entropy[0].tolist() == pytest.approx([1 / np.log(100)] * 3)
    assert tokens.hellinger[0].tolist() == [2] * 3 and tokens.forward_kl[1].tolist() == [3, 3, 0]
    assert tokens.advantage.shape == (2, 3) and tokens.advantage[0, 0] == step.advantage[1]
    assert tokens.pass_rate.tolist() == pytest.approx([1 / 3] * 2) and tokens.reward.tolist() == [0, 1]


def test_what_prepare_puts_in_place_of_a_measured_field_stays():
    objective = wanting(
        "entropy", "hellinger", prepare=lambda shard: replace(shard, entropy=shard.mu, hellinger=shard.mu)
    )
    step = filled(objective, needs_of(objective, settings()), batch())
    tokens, _ = loss_pass(step, step.prepare([1], lambda x: x, True), 0, [1])
    assert torch.equal(tokens.entropy, tokens.mu) and torch.equal(tokens.hellinger, tokens.mu)


def test_an_objective_is_given_what_it_named_and_no_more():
    for need in sorted(ALL - {"hidden"}):
        objective = wanting(need)
        step = filled(objective, needs_of(objective, settings()), batch())
        tokens, _ = loss_pass(step, step.prepare([0, 1], lambda x: x, True), 0, [0, 1])
        assert {name for name in ALL if getattr(tokens, name) is not None} == {need}


def test_a_rank_without_sequences_prepares_tables_of_the_same_kind():
    seen = []
    objective = wanting(*ALL, prepare=lambda shard: seen.append(shard) or shard)
    step = filled(objective, needs_of(objective, settings()), batch())
    for sequences in ([], [0]):
        step.prepare(sequences, lambda x: x, True)
    none, one = seen
    for name, value in vars(one).items():
        other = getattr(none, name)
        assert (value is None) == (other is None), name
        if value is not None:
            assert len(other) == 0 and other.dtype == value.dtype and other.shape[2:] == value.shape[2:], name


def test_with_reference_mu_old_is_known_of_the_first_minibatch_alone():
    objective = wanting(reference="mu")
    step = Step(batch(), objective, needs_of(objective, settings()), MODEL, CPU)
    for first, sequences in ((True, [0]), (False, [3, 1])):
        shard = step.prepare(sequences, lambda x: x, first)
        assert torch.equal(shard.old, shard.mu)
        tokens, found = loss_pass(step, shard, 0, sequences)
        assert torch.equal(tokens.old, tokens.new.detach()) and not tokens.old.requires_grad
        step.note(sequences, found, first)
    assert [array is None for array in step.tables.arrays("old")] == [False, True, True, True]
    assert [array is None for array in step.tables.arrays("new")] == [False, False, True, False]
    assert step.tables.arrays("old")[0].tolist() == [-3, -3]


def test_the_reference_runs_in_one_pass_whichever():
    assert needs_of(wanting("ref", "hellinger"), settings()).in_loss == {"ref", "hellinger"}
    before = needs_of(wanting("ref", "hellinger", prepare=lambda shard: shard), settings())
    assert before.ref_before and before.in_loss == {"hellinger"}
    assert not needs_of(wanting("entropy"), settings()).reference


def test_needs_that_nothing_supplies_are_refused():
    with pytest.raises(ConfigError, match="algorithm=wanting needs helinger.*entropy, forward_kl"):
        needs_of(wanting("helinger"), settings())
    with pytest.raises(ConfigError, match="hidden states.*ratio.reference=mu.*Fix: ratio.reference=old"):
        needs_of(wanting("hidden", reference="mu"), settings())
    with pytest.raises(ConfigError, match="old=detach.*give it hidden states.*Fix: learner.old=recompute"):
        needs_of(wanting("hidden"), settings(old="detach"))
    with pytest.raises(ConfigError, match="old=detach.*needs before its loss"):
        needs_of(wanting(prepare=lambda shard: shard), settings(old="detach"))
    assert needs_of(build_objective("grpo"), settings(old="detach")).before == frozenset()


def test_figures_add_up_within_a_step_and_are_averaged_over_steps():
    sums = {}
    for found in ({"a": 1.0, "b_max": 2.0}, {"a": 0.5, "b_max": 1.0}):
        accumulate(sums, found)
    assert sums == {"a": 1.5, "b_max": 2.0}
    assert mean_of_steps([sums, {"a": 0.5, "b_max": 7.0}]) == {"a": 1.0, "b_max": 7.0, "optimizer_steps": 2.0}
