"""The parity matrix: every ZeRO stage, number of ranks and micro-batching takes the same step as plain PyTorch."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rltk.algorithms import TokenBatch, build_objective
from rltk.learner.group import LearnerGroup
from rltk.learner.packing import RaggedBatch, minibatches
from rltk.learner.settings import LearnerSettings
from rltk.rollout import weight_file
from tests.integration.places import TINY

# Random weights, not trained ones: a trained model finds random tokens so unlikely that rounding is all one compares.
MODEL = Path(tempfile.mkdtemp(prefix="rltk-model-"))

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
    """The same training step in plain PyTorch and transformers: padded, one process, no micro-batches."""
    from transformers import AutoModelForCausalLM

    from rltk.algorithms import build_correction

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    objective = build_objective(s.algorithm, correction=build_correction(s.correction), **s.algorithm_options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=0)
    count, width = len(batch.reward), int(batch.lengths.max())
    ids, mask, mu = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width), torch.zeros(count, width)
    for i in range(count):
        part, n = batch.sequence(i), int(batch.lengths[i])
        ids[i, :n] = torch.from_numpy(batch.ids[part].astype(np.int64))
        mask[i, :n] = torch.from_numpy(batch.mask[part]).float()
        mu[i, :n] = torch.from_numpy(np.nan_to_num(batch.mu[part]))

    def logprobs(rows):
        logits = model(ids[rows]).logits[:, :-1] / s.temperature
        return logits.log_softmax(-1).gather(-1, ids[rows][:, 1:, None])[..., 0]

    known = torch.from_numpy(np.isfinite(batch.reward))
    group = torch.from_numpy(batch.group)
    advantage = objective.advantages(torch.from_numpy(np.nan_to_num(batch.reward)), group, known)
    with torch.no_grad():
        old = logprobs(torch.arange(count))
    losses = []
    for part in minibatches(np.flatnonzero(np.isfinite(batch.reward)), s.minibatches, SEED):
        rows = torch.from_numpy(part)
        tokens = TokenBatch(
            new=logprobs(rows), old=old[rows], mu=mu[rows, 1:], mask=mask[rows, 1:], advantage=advantage[rows],
            group=group[rows], ref=old[rows],
        )  # fmt: skip
        loss, _ = objective.loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return dict(model.named_parameters()), float(np.mean(losses))


@pytest.fixture(scope="module")
def expected(model_folder):
    return plain_step(batch(), settings())


def train(s, ranks, path):
    group = LearnerGroup(s, ranks, cpus=0.5, gpus=0, deadline=120, start_deadline=180)
    import ray

    try:
        ray.get(group.start(), timeout=180)
        result = group.train(batch(), SEED)
        group.publish(str(path), (0, 1))
        return result, weight_file.read(path)[1], group
    except BaseException:
        for rank in group.ranks:
            ray.kill(rank)
        raise


def check(stage, ranks, budget, expected, path):
    import ray

    result, weights, group = train(settings(stage, budget), ranks, path)
    for rank in group.ranks:
        ray.kill(rank)
    want, loss = expected
    assert result.metrics["loss"] == pytest.approx(loss, abs=2e-6)
    assert set(weights) == set(want)
    moved = max((want[name] - tensor).abs().max().item() for name, tensor in weights.items())
    assert moved < 2e-6, f"ZeRO-{stage}, {ranks} ranks: weights differ from plain PyTorch's by {moved}"
    assert [i for i, array in enumerate(result.new) if array is None] == [7]  # the unknown reward, and it alone
    lengths = batch().masked_lengths
    assert all(len(array) == lengths[i] for i, array in enumerate(result.old) if array is not None)


@pytest.mark.parametrize(("stage", "ranks", "budget"), MATRIX)
def test_a_step_equals_plain_pytorch(ray_cluster, expected, tmp_path, stage, ranks, budget):
    check(stage, ranks, budget, expected, tmp_path / "w")


@pytest.mark.full
@pytest.mark.parametrize(("stage", "ranks", "budget"), FULL)
def test_a_step_equals_plain_pytorch_on_the_rest_of_the_matrix(ray_cluster, expected, tmp_path, stage, ranks, budget):
    check(stage, ranks, budget, expected, tmp_path / "w")


@pytest.mark.parametrize(("before", "after"), [((1, 1), (3, 2)), pytest.param((3, 2), (0, 1), marks=pytest.mark.full)])
def test_a_checkpoint_loads_under_another_stage_and_number_of_ranks(ray_cluster, tmp_path, before, after):
    """Save after one step, go on; load elsewhere, go on: the same weights."""
    import ray

    one = train(settings(before[0]), before[1], tmp_path / "w")[2]
    one.save(str(tmp_path / "c.pt"))
    one.train(batch(seed=1), 5)
    one.publish(str(tmp_path / "one"), (0, 2))
    two = LearnerGroup(settings(after[0]), after[1], cpus=0.5, gpus=0, deadline=120, start_deadline=180)
    ray.get(two.start(), timeout=180)
    two.load(str(tmp_path / "c.pt"))
    two.train(batch(seed=1), 5)
    two.publish(str(tmp_path / "two"), (0, 2))
    want, found = weight_file.read(tmp_path / "one")[1], weight_file.read(tmp_path / "two")[1]
    for rank in (*one.ranks, *two.ranks):
        ray.kill(rank)
    moved = max(
        (want[name] - tensor).abs().max().item() for name, tensor in weight_file.read(tmp_path / "w")[1].items()
    )
    apart = max((want[name] - found[name]).abs().max().item() for name in want)
    assert moved > 1e-4 and apart < 2e-6, (moved, apart)
