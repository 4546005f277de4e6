"""What the mismatch of sampler and learner comes from: precision, cache, staleness; and saying when it is too much.

The sampler's policy differs from the learner's by three things at once. What can be told apart, by whom it concerns:

    precision   two programs, same weights, same attention     every token
    cache       attention over fewer or coarser keys           every token of an engine whose cache is not full
    staleness   older weights                                  tokens sampled under an older weight version
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rltk.config import Config
from rltk.metrics import TAIL_ALARM
from rltk.rollout.kv.options import KVOptions
from rltk.trajectory import Trajectory, Version


def by_cause(
    trajectories: Sequence[Trajectory],
    old: Sequence[np.ndarray | None],
    version: Version,
    kv: KVOptions,
    probe_mean: float,
) -> dict[str, float]:
    """Parts of mismatch/mean, the mean |mu - old| of a sampled token, which they sum to (in nats):

    mismatch/mean/precision   full cache: of the tokens sampled under `version`, where nothing else differs. Any other
                              cache: the weight probe's, which reads no cache, on sequences of its own
    mismatch/mean/cache       what tokens sampled under `version` have beyond that; 0 with a full cache. It may come out
                              slightly negative where nothing is evicted: the probe's sequences are other ones
    mismatch/mean/staleness   what all tokens have beyond those sampled under `version`; 0 where that is all of them

    `old` are the learner's log-probs, made with the weights `version`, as `rltk.metrics.LearnedArrays` has them;
    empty: not computed. Without a finite token sampled under `version` nothing can be told apart, and all are absent.
    """
    fresh, stale = [], []
    for trajectory, row in zip(trajectories, old, strict=bool(old)):
        if row is not None:
            gap = np.abs(trajectory.logprobs.astype(np.float64) - row)
            (fresh if trajectory.version == version else stale).append(gap[np.isfinite(gap)])
    current = np.concatenate([np.zeros(0), *fresh])
    if not current.size:
        return {}
    everything = np.concatenate([current, *stale])
    precision = float(current.mean()) if kv.name == "full" else probe_mean
    return {
        "mismatch/mean/precision": precision,
        "mismatch/mean/cache": float(current.mean()) - precision,
        "mismatch/mean/staleness": float(everything.mean() - current.mean()),
    }


class MismatchAlarm:
    """Speaks up when a 5th percentile of min(xi, 1/xi) is under `rltk.metrics.TAIL_ALARM`: once, until it recovers."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ringing = False

    def hear(self, row: dict[str, float]) -> str | None:
        """A line for people, at the first step of an alarm. `row`: a training step's metrics."""
        before, self.ringing = self.ringing, row.get("mismatch/alarm", 0.0) > 0
        if not self.ringing or before:
            return None
        tails = {name: value for name, value in row.items() if name.startswith("mismatch/tail_p05/")}
        worst = min(tails, key=lambda name: tails[name])
        return (
            "alarm: the sampler is another policy than the learner: the 5th percentile of min(xi, 1/xi), xi = old/mu, "
            f"is {tails[worst]:.2g} at positions {worst.rsplit('/', 1)[-1]}, under {TAIL_ALARM:g}. {self._fix()}"
        )

    def _fix(self) -> str:
        config = self.config
        if config.kv.name != "full":
            corrected = config.ratio.reference == "mu" or config.correction != "none"
            more = "" if corrected else ", or correct for it: ratio.reference=mu with ctpo or minpro, correction=sparse"
            return f"kv={config.kv.name} evicts what the learner attends to: raise kv.budget{more}."
        return "The cache is full: compare rollout.dtype with learner.dtype, and probe/mean with earlier steps."
