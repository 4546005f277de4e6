"""DapQ for the prompt, then LongFlow for the response: `budget` slots hold both."""

from __future__ import annotations

from rltk.rollout.kv.policies import dapq


class DapQLongFlow(dapq.DapQ):
    mode = "longflow"
