"""The parity matrix: every ZeRO stage, number of ranks and micro-batching takes the same step as plain PyTorch."""

import contextlib
import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rltk.algorithms import TokenBatch, build_correction, build_objective
from rltk.learner.group import LearnerGroup
from rltk.learner.packing import RaggedBatch, minibatches
from rltk.learner.settings import LearnerSettings
from rltk.rollout import weight_file
from tests.integration.everything import FIELDS, recorded
from tests.integration.places import TINY

# Random weights, not trained ones: a trained model finds random tokens so unlikely that rounding is all one compares.
MODEL = Path(tempfile.gettempdir()) / f"rltk-model-{os.getpid()}"

# A large eps makes Adam's step proportional to the gradient; with the usual one rounding decides near zero.
EPS, LR, SEED = 1e-2, 1e-3, 11
# Stage, ranks, tokens a micro-batch. Two ranks with a small budget give ranks unequal micro-batches, and empty ones.
MATRIX = [(1, 2, 90), (3, 2, 90)]
FULL = [(0, 1, 10_000), (1, 1, 90), (0, 2, 90), (2, 1, 90), (2, 2, 90), (3, 1, 90), (3, 2, 10_000)]


@pytest.fixture(scope="module", autouse=True)
def model_folder():
    """The small model's architecture with the weights it is born with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shutil.copytree(TINY, MODEL, dirs_exist_ok=True)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.float32).save_pretrained(MODEL)
    yield
    shutil.rmtree(MODEL)


def settings(stage=1, budget=90, **other):
    base = dict(
        model=str(MODEL), device="cpu", algorithm="grpo", algorithm_options={"beta": 0.1}, correction="tis",
        correction_options={}, reference="old", minibatches=2, temperature=0.8, max_response_tokens=64, seed=0,
        zero_stage=stage, tokens_per_micro_batch=budget, lr=LR, eps=EPS, max_grad_norm=1e9, threads=1,
        head_chunk=16,  # several calls of the head a micro-batch, and not as many on every rank
    )  # fmt: skip
    return LearnerSettings(**(base | other))


def batch(sequences=10, group=5, seed=0):
    """Random sequences; one has a tool segment in the middle, one an unknown reward."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(sequences):
        prompt, sampled = random.integers(2, 6), random.integers(3, 30)
        mask = np.arange(prompt + sampled) >= prompt
        if number == 3:
            mask[prompt + 1 : prompt + 3] = False
        rows.append((random.integers(3, 200, len(mask)).astype(np.int32), mask))
    masks = np.concatenate([mask for _, mask in rows])
    mu = np.where(masks, -5.0 + 0.3 * random.standard_normal(len(masks)), np.nan).astype(np.float32)
    reward = random.integers(0, 2, sequences).astype(np.float32)
    reward[7] = np.nan
    labels = np.where(np.isnan(reward), -1, np.nan_to_num(reward)).astype(np.int8)
    offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    ids = np.concatenate([ids for ids, _ in rows])
    return RaggedBatch(
        ids, masks, mu, offsets, reward, np.arange(sequences) // group, labels, -np.ones(sequences, np.int8)
    )


def plain_step(batch, s):
    """The same training step in plain PyTorch and transformers: padded, one process, no micro-batches, every field of a
    `TokenBatch` from whole tables. Returns weights before and after, fp32, the mean loss, and `old` [B, T]."""
    from transformers import AutoModelForCausalLM

    model, reference = (AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, s.dtype)) for _ in range(2))
    options = {"reference": s.reference, **s.algorithm_options}
    objective = build_objective(s.algorithm, correction=build_correction(s.correction), **options)
    start = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    master = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(master.values(), lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=0)
    count, width = len(batch.reward), int(batch.lengths.max())
    ids, mask, mu = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width), torch.zeros(count, width)
    for i in range(count):
        part, n = batch.sequence(i), int(batch.lengths[i])
        ids[i, :n] = torch.from_numpy(batch.ids[part].astype(np.int64))
        mask[i, :n] = torch.from_numpy(batch.mask[part]).float()
        mu[i, :n] = torch.from_numpy(np.nan_to_num(batch.mu[part]))

    def run(which, rows):
        """Hidden states [B, T, d] and log-probs [B, T, V]; logits in fp32 also of a bf16 model."""
        states = which.model(ids[rows]).last_hidden_state[:, :-1]
        return states, (states.float() @ which.lm_head.weight.float().t() / s.temperature).log_softmax(-1)

    def measured(table, rows):
        with torch.no_grad():
            ref, new = run(reference, rows)[1], table
            return {
                "ref": ref.gather(-1, ids[rows][:, 1:, None])[..., 0],
                "entropy": -(new.exp() * new).sum(-1) / math.log(new.shape[-1]),
                "hellinger": 1 - ((new + ref) / 2).exp().sum(-1),
                "forward_kl": (ref.exp() * (ref - new)).sum(-1),
            }

    known = torch.from_numpy(np.isfinite(batch.reward))
    group = torch.from_numpy(batch.group)
    advantage = objective.advantages(torch.from_numpy(np.nan_to_num(batch.reward)), group, known)
    columns = {"reward": torch.from_numpy(batch.reward), "pass_rate": advantage * 0, "group_length": advantage * 0}
    for i in range(count):
        right = [j for j in range(count) if batch.group[j] == batch.group[i] and batch.reward[j] == 1]
        scored = [j for j in range(count) if batch.group[j] == batch.group[i] and known[j]]
        columns["pass_rate"][i] = len(right) / len(scored)
        columns["group_length"][i] = np.mean([batch.masked_lengths[j] for j in right])
    everyone = torch.arange(count)
    with torch.no_grad():
        hidden, table = run(model, everyone)
        old = table.gather(-1, ids[:, 1:, None])[..., 0]
        before = measured(table, everyone) | {"hidden": hidden}
    losses = []
    for number, part in enumerate(minibatches(np.flatnonzero(known), s.minibatches, SEED)):
        rows = torch.from_numpy(part)
        late = {"hellinger", "forward_kl"}
        fields = {n: v[rows] for n, v in (before | columns).items() if n in objective.needs - late}
        shard = TokenBatch(
            new=old[rows], old=old[rows], mu=mu[rows, 1:], mask=mask[rows, 1:], advantage=advantage[rows],
            group=group[rows], **fields,
        )  # fmt: skip
        shard = objective.prepare(shard, None, number == 0)
        table = run(model, rows)[1]
        now = {n: v for n, v in measured(table.detach(), rows).items() if n in objective.needs}
        now["new"] = table.gather(-1, ids[rows][:, 1:, None])[..., 0]
        if shard.hidden is not None:
            now["hidden"] = shard.hidden[..., :0]
        loss, _ = objective.loss(replace(shard, **now))
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            master[name].grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(master[name])
        losses.append(loss.item())
    return start, {name: value.detach() for name, value in master.items()}, float(np.mean(losses)), old


@pytest.fixture(scope="module")
def expected(model_folder):
    return plain_step(batch(), settings())


@contextlib.contextmanager
def learner(s, ranks):
    """The ranks of a learner, ended afterwards."""
    import ray

    group = LearnerGroup(s, ranks, cpus=0.5, gpus=0, deadline=120, start_deadline=180)
    try:
        ray.get(group.start(), timeout=180)
        yield group
    finally:
        for rank in group.ranks:
            ray.kill(rank)


def published(group, path):
    group.publish(str(path), (0, 1))
    return weight_file.read(path)[1]


def apart(one, other):
    assert set(one) == set(other)
    return max((one[name] - value).abs().max().item() for name, value in other.items())


def check(s, ranks, expected, path):
    """One training step; its log-probs, loss, weights and what it reports against plain PyTorch."""
    import ray

    start, want, loss, old = expected
    scored = batch()
    with learner(s, ranks) as group:
        asked = ray.get([rank.__ray_call__.remote(lambda self: self.learner.logprobs(scored)) for rank in group.ranks])
        result = group.train(scored, SEED)
        weights = published(group, path)
    assert result.metrics["loss"] == pytest.approx(loss, abs=2e-6)
    assert apart(weights, start) > 1e-4
    assert apart(weights, want) < 2e-6, f"{ranks} ranks: weights differ from plain PyTorch's by {apart(weights, want)}"
    assert [i for i, array in enumerate(result.new) if array is None] == [7]  # the unknown reward, and it alone
    for i in range(len(old)):
        sampled = scored.mask[scored.sequence(i)][1:]
        exact = old[i, : len(sampled)].numpy()[sampled]
        (of_one_rank,) = [arrays[i] for arrays in asked if arrays[i] is not None]
        assert of_one_rank.dtype == np.float32 and np.abs(of_one_rank - exact).max() < 1e-5
        assert result.old[i] is None or np.abs(result.old[i] - exact).max() < 1e-5
    return result


@pytest.mark.parametrize(("stage", "ranks", "budget"), MATRIX)
def test_a_step_equals_plain_pytorch(ray_cluster, expected, tmp_path, stage, ranks, budget):
    check(settings(stage, budget), ranks, expected, tmp_path / "w")


@pytest.mark.full
@pytest.mark.parametrize(("stage", "ranks", "budget"), FULL)
def test_a_step_equals_plain_pytorch_on_the_rest_of_the_matrix(ray_cluster, expected, tmp_path, stage, ranks, budget):
    check(settings(stage, budget), ranks, expected, tmp_path / "w")


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), pytest.param(3, 2, marks=pytest.mark.full)])
def test_a_bf16_step_is_as_near_to_plain_pytorch_as_bf16_allows(ray_cluster, model_folder, tmp_path, stage, ranks):
    """On the fp32 master weights, whose move in plain bf16 is about 1 % from that in plain fp32: every layer rounds
    activations and gradients to 2^-9 of their size. Two such moves, rounded in different order, are sqrt(2) times that
    apart, and each micro-batch's gradient is rounded once more: hence 1.5. A factor of 2 in the gradient is 40 %."""
    s = settings(stage, dtype="bfloat16")
    with learner(s, ranks) as group:
        group.train(batch(), SEED)
        group.save(str(tmp_path / "c.pt"))
    found = {n: p["weight"] for n, p in torch.load(tmp_path / "c.pt")["parameters"].items()}
    start, want, *_ = plain_step(batch(), s)
    exact_start, exact, *_ = plain_step(batch(), settings())

    def moved(weights, origin):
        return torch.cat([(weights[name] - origin[name]).flatten() for name in sorted(origin)])

    size = moved(want, start).norm()
    off = (moved(found, start) - moved(want, start)).norm() / size
    rounding = (moved(exact, exact_start) - moved(want, start)).norm() / size
    assert off < 1.5 * rounding < 0.03, (off, rounding)


@pytest.mark.parametrize(
    ("ranks", "other"),
    [
        (2, dict(algorithm="ctpo", algorithm_options={}, correction="none", reference="mu")),
        pytest.param(1, dict(old="detach", minibatches=1), marks=pytest.mark.full),
        pytest.param(1, dict(correction="none", reference="mu"), marks=pytest.mark.full),
    ],
    ids=["ctpo-mu", "grpo-detach", "grpo-mu"],
)
def test_a_step_without_a_pass_before_it_equals_plain_pytorch(ray_cluster, model_folder, tmp_path, ranks, other):
    s = settings(**other)
    result = check(s, ranks, plain_step(batch(), s), tmp_path / "w")
    parts = minibatches(np.flatnonzero(np.isfinite(batch().reward)), s.minibatches, SEED)
    assert [i for i, array in enumerate(result.old) if array is not None] == sorted(parts[0])
    assert result.reference == s.reference
    if s.reference == "mu":  # every minibatch's ratio is new / mu
        scored = batch()
        mu = [scored.mu[scored.sequence(i)][scored.mask[scored.sequence(i)]] for i in range(len(result.new))]
        means = [np.concatenate([result.new[i] - mu[i] for i in part]).mean() for part in parts]
        assert result.metrics["log_ratio/mean"] == pytest.approx(np.mean(means), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "ranks"), [(3, 2), *(pytest.param(s, r, marks=pytest.mark.full) for s, r in ((1, 1), (1, 2), (3, 1)))]
)
def test_every_field_that_an_objective_can_need_is_that_of_plain_pytorch(
    ray_cluster, model_folder, tmp_path, stage, ranks
):
    def made(folder):
        folder.mkdir()
        name, options = "tests.integration.everything:Everything", {"record": str(folder)}
        return settings(stage, algorithm=name, algorithm_options=options, lr=1e-2)

    folders = [tmp_path / "found", tmp_path / "want"]
    found, want = map(made, folders)
    check(found, ranks, plain_step(batch(), want), tmp_path / "w")
    for where, late in (("prepare", {"hellinger", "forward_kl"}), ("loss", set())):
        found, want = (recorded(folder, where) for folder in folders)
        assert set(found) == set(want) and len(want) == 9
        for key, fields in want.items():
            assert set(found[key]) == set(fields) and set(FIELDS) - set(fields) == late
            for name, value in fields.items():
                torch.testing.assert_close(
                    found[key][name], value, atol=1e-5, rtol=1e-5, msg=lambda m, at=(where, name): f"{at}: {m}"
                )
    assert max(fields["hellinger"].max() for fields in want.values()) > 1e-3  # the second minibatch's


@pytest.mark.parametrize(("before", "after"), [((1, 1), (3, 2)), pytest.param((3, 2), (0, 1), marks=pytest.mark.full)])
def test_a_checkpoint_loads_under_another_stage_and_number_of_ranks(ray_cluster, tmp_path, before, after):
    """Save after one step, go on; load elsewhere, go on: the same weights."""
    with learner(settings(before[0]), before[1]) as one:
        one.train(batch(), SEED)
        start = published(one, tmp_path / "w")
        one.save(str(tmp_path / "c.pt"))
        one.train(batch(seed=1), 5)
        want = published(one, tmp_path / "one")
    with learner(settings(after[0]), after[1]) as two:
        two.load(str(tmp_path / "c.pt"))
        two.train(batch(seed=1), 5)
        found = published(two, tmp_path / "two")
    assert apart(start, want) > 1e-4 and apart(found, want) < 2e-6
