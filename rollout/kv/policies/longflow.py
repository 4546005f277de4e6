"""LongFlow (arXiv 2603.11504): a static cache of `budget` slots; every step overwrites what contributed least."""

from __future__ import annotations

from rltk.rollout.kv.policies import snapkv


class LongFlow(snapkv.SnapKV):
    """The victim has the least sum over heads of attention x ||v||_1. A prompt over the budget goes through SnapKV."""

    mode = "longflow"
