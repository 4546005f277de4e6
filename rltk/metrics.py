"""What a training step says about itself: reward, lengths, ratios, and the mismatch of sampler and learner. Pure numpy.

A metric that has no data is absent; NaN never leaves. Names are stable: trackers, reports and tests read them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rltk.errors import MismatchError
from rltk.trajectory import Trajectory

QUANTILES = (5, 50, 95)
LARGEST_LOG = 80.0  # for k3 alone: one token at a log-ratio beyond it would hide every other behind an infinity
# Under it one token in twenty is off by more than a factor of 2, where IcePop and Sparse-RL begin to drop tokens.
TAIL_ALARM = 0.5
ALARM_TOKENS = 100  # a 5th percentile of fewer stands on less than five tokens, and is no reason to ring


@dataclass(frozen=True)
class LearnedArrays:
    """The learner's per-token values of one step, one array for each trajectory in the same order, over its sampled
    tokens only, float32 [length]; None for a trajectory that was not trained on (masked, dropped).

    `old`: log-probs before the step; `new`: when the trajectory's minibatch trained; `entropy`: in nats. An
    empty list says that the quantity was not computed. `reference`: what ratios are taken against, `old` or `mu`.
    """

    old: list[np.ndarray | None] = field(default_factory=list)
    new: list[np.ndarray | None] = field(default_factory=list)
    entropy: list[np.ndarray | None] = field(default_factory=list)
    reference: str = "old"


def step_metrics(
    trajectories: Sequence[Trajectory], learned: LearnedArrays | None = None, levels: Sequence[str] | None = None
) -> dict[str, float]:
    """All metrics of one step's scored trajectories. `levels`: the difficulty of each trajectory's problem.

    reward/mean, reward/std       over trajectories with a value
    reward/constant_groups        share of groups (of 2 valid samples or more) whose rewards are all equal: no signal
    accuracy, accuracy/<level>    share right, of those with a verdict
    flawed                        share of flawed ones among the right answers that somebody checked
    length/mean, length/max       sampled tokens; truncated: share that ended by length
    masked/share, masked/count    trajectories without a reward; masked/<cause> their share by cause ("timeout", ...);
                                  masked/length_q1..q4 their share in each quartile of length (a bias if they differ)
    entropy                       mean over tokens, in nats
    ratio/q05/1-16, ...           q05, q50, q95 of the log-ratio, new less the reference, by position among the sampled
                                  tokens
    mismatch/...                  see `mismatch`
    not_finite/old, ...           share of tokens whose value is NaN or infinite, where there are any; every other
                                  metric leaves them out
    """
    learned = learned or LearnedArrays()
    metrics = _rewards(trajectories) | _verdicts(trajectories, levels) | _lengths(trajectories) | _masked(trajectories)
    old, new, entropy = (_aligned(trajectories, learned, name) for name in ("old", "new", "entropy"))
    metrics |= _not_finite(old=old, new=new, entropy=entropy)
    entropies = _flat([e for e in entropy if e is not None])
    if entropies.size:
        metrics["entropy"] = entropies.mean()
    against = old if learned.reference == "old" else [t.logprobs for t in trajectories]
    metrics |= ratio_quantiles([n - a for n, a in zip(new, against, strict=True) if n is not None and a is not None])
    metrics |= mismatch([t.logprobs - o for t, o in zip(trajectories, old, strict=True) if o is not None])
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


def mismatch(differences: Sequence[np.ndarray], positions: int = 1000) -> dict[str, float]:
    """How far the sampler (mu) is from the learner at the same weights (old). `differences`: mu - old, arrays [n].

    mismatch/kl           KL(mu || old) a token by k3 of x = old - mu: mean of exp(x) - 1 - x, never negative
    mismatch/kl_k1        the same by k1: mean of mu - old; both are unbiased, so if they disagree the tail is heavy
    mismatch/kl_p05       5th percentile over tokens of mu - old: the tokens that the learner finds far likelier
    mismatch/tail_per_1k  tokens in a thousand with min(xi, 1/xi) < 0.5, xi = exp(old - mu)
    mismatch/tail_p05/1-1000, ...  5th percentile of min(xi, 1/xi) in each `positions` positions: 1 is no mismatch.
                          Collapse under a compressed cache shows here first, long before the mean moves
    mismatch/alarm        how many of these, of 100 tokens or more, are under TAIL_ALARM: 0 is no alarm
    mismatch/max          largest |mu - old|
    mismatch/mean         mean |mu - old|
    """
    x = -_flat(differences)
    if not x.size:
        return {}
    size = np.abs(x)
    metrics = {
        "mismatch/kl": float(np.mean(np.expm1(np.clip(x, -LARGEST_LOG, LARGEST_LOG)) - x)),
        "mismatch/kl_k1": float(np.mean(-x)),
        "mismatch/kl_p05": float(np.percentile(-x, 5)),
        "mismatch/tail_per_1k": float(1000 * np.mean(size > np.log(2.0))),
        "mismatch/alarm": 0.0,
        "mismatch/max": float(size.max()),
        "mismatch/mean": float(size.mean()),
    }
    for start in range(0, max(len(row) for row in differences), positions):
        values = np.abs(_flat([row[start : start + positions] for row in differences]))
        if values.size:
            tail = float(np.exp(-np.percentile(values, 95)))
            metrics[f"mismatch/tail_p05/{start + 1}-{start + positions}"] = tail
            metrics["mismatch/alarm"] += values.size >= ALARM_TOKENS and tail < TAIL_ALARM
    return metrics


def ratio_quantiles(log_ratios: Sequence[np.ndarray]) -> dict[str, float]:
    """Quantiles of log-ratios by position from 1: 1-16, 17-64, 65-256, ... `log_ratios`: arrays [n]."""
    metrics: dict[str, float] = {}
    longest = max((len(row) for row in log_ratios), default=0)
    start, end = 0, 16
    while start < longest:
        values = _flat([row[start:end] for row in log_ratios])
        for quantile in QUANTILES if values.size else ():
            metrics[f"ratio/q{quantile:02d}/{start + 1}-{end}"] = float(np.percentile(values, quantile))
        start, end = end, end * 4
    return metrics


def _rewards(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.reward is not None and trajectory.reward.value is not None:
            groups[trajectory.group_id].append(trajectory.reward.value)
    if not groups:
        return {}
    values = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups.values()])
    metrics = {"reward/mean": values.mean(), "reward/std": values.std()}
    comparable = [group for group in groups.values() if len(group) > 1]
    if comparable:
        metrics["reward/constant_groups"] = np.mean([min(group) == max(group) for group in comparable])
    return metrics


def _verdicts(trajectories: Sequence[Trajectory], levels: Sequence[str] | None) -> dict[str, float]:
    if levels is not None and len(levels) != len(trajectories):
        raise MismatchError(f"{len(levels)} levels for {len(trajectories)} trajectories")
    right: dict[str, list[bool]] = defaultdict(list)
    flawed: list[bool] = []
    for i, trajectory in enumerate(trajectories):
        reward = trajectory.reward
        if reward is None or reward.value is None or reward.correct is None:
            continue
        right["accuracy"].append(reward.correct)
        if levels is not None and levels[i]:
            right[f"accuracy/{levels[i]}"].append(reward.correct)
        if reward.correct and reward.flawed is not None:
            flawed.append(reward.flawed)
    metrics = {name: float(np.mean(verdicts)) for name, verdicts in right.items()}
    return metrics | ({"flawed": float(np.mean(flawed))} if flawed else {})


def _lengths(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    if not trajectories:
        return {}
    lengths = [trajectory.length for trajectory in trajectories]
    truncated = [trajectory.truncated for trajectory in trajectories]
    return {
        "length/mean": float(np.mean(lengths)),
        "length/max": float(max(lengths)),
        "truncated": float(np.mean(truncated)),
    }


def _masked(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    if not trajectories:
        return {}
    rewards = [trajectory.reward for trajectory in trajectories]
    masked = np.array([reward is None or reward.value is None for reward in rewards])
    metrics = {"masked/share": float(masked.mean()), "masked/count": float(masked.sum())}
    causes = Counter(
        "not_scored" if reward is None else str(reward.detail.get("cause", "other"))
        for reward in rewards
        if reward is None or reward.value is None
    )
    metrics |= {f"masked/{cause}": count / len(rewards) for cause, count in causes.items()}
    if len(trajectories) >= 4:
        by_length = np.argsort([trajectory.length for trajectory in trajectories], kind="stable")
        for i, quartile in enumerate(np.array_split(by_length, 4), start=1):
            metrics[f"masked/length_q{i}"] = float(masked[quartile].mean())
    return metrics


def _aligned(trajectories: Sequence[Trajectory], learned: LearnedArrays, name: str) -> list[np.ndarray | None]:
    """The arrays, what is not finite made NaN; all None where the quantity was not computed."""
    arrays = getattr(learned, name)
    if not arrays:
        return [None] * len(trajectories)
    if len(arrays) != len(trajectories):
        raise MismatchError(f"learned.{name} has {len(arrays)} arrays for {len(trajectories)} trajectories")
    for trajectory, array in zip(trajectories, arrays, strict=True):
        if array is not None and np.shape(array) != (trajectory.length,):
            raise MismatchError(
                f"learned.{name} of trajectory {trajectory.uid} has shape {np.shape(array)}; it sampled "
                f"{trajectory.length} tokens"
            )
    return [None if array is None else np.where(np.isfinite(array), array, np.nan) for array in arrays]


def _not_finite(**quantities: Sequence[np.ndarray | None]) -> dict[str, float]:
    shares = {}
    for name, rows in quantities.items():
        tokens = [row for row in rows if row is not None and row.size]
        bad = ~np.isfinite(np.concatenate(tokens)) if tokens else np.zeros(0, bool)
        if bad.any():
            shares[f"not_finite/{name}"] = float(bad.mean())
    return shares


def _flat(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The finite values in one float64 array [n]."""
    flat = np.concatenate([np.asarray(row, dtype=np.float64) for row in rows]) if rows else np.zeros(0)
    return flat[np.isfinite(flat)]
