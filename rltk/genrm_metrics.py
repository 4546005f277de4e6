"""What a judge said about some trajectories, and how right it was where the rule knows. Pure numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rltk.trajectory import Trajectory


def genrm_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """{} where no judge was asked. Of the trajectories with a reward record:

    genrm/asked                share that the judge was asked about
    genrm/flawed               of its verdicts with a label, those that say "flawed"
    genrm/unknown              share of the questions without a verdict; genrm/unknown/<cause>: by cause
    genrm/replies              replies asked for a verdict: above 1, some could not be read
    genrm/seconds, genrm/seconds_p95   until a verdict, waiting included
    genrm/rule_flawed          share of flawed ones by the rule, of those asked about, where it has a label
    genrm/precision, genrm/recall, genrm/f1   of "flawed" against the rule's label; no verdict counts as "not flawed"
    """
    told = [t.reward.detail for t in trajectories if t.reward is not None and "genrm" in t.reward.detail]
    if not told:
        return {}
    verdicts: list[dict[str, Any]] = [detail["genrm"] for detail in told]
    labels = [v["flawed"] for v in verdicts if v["flawed"] is not None]
    causes = Counter(v["cause"] for v in verdicts if v["cause"])
    seconds, replies = [v["seconds"] for v in verdicts], [v["replies"] for v in verdicts if "replies" in v]
    figures: dict[str, Any] = {
        "asked": len(verdicts) / len(trajectories),
        "unknown": sum(causes.values()) / len(verdicts),
        **{f"unknown/{cause}": count / len(verdicts) for cause, count in causes.items()},
        "seconds": np.mean(seconds),
        "seconds_p95": np.percentile(seconds, 95),
    }
    figures |= {"flawed": np.mean(labels)} if labels else {}
    figures |= {"replies": np.mean(replies)} if replies else {}
    known = [(d["rule_flawed"], bool(d["genrm"]["flawed"])) for d in told if d.get("rule_flawed") is not None]
    figures |= _against(known) if labels else {}
    return {f"genrm/{name}": float(value) for name, value in figures.items()}


def _against(known: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Precision, recall and F1 of pairs (truth, said); absent where there is nothing to divide by."""
    if not known:
        return {}
    hits = sum(truth and said for truth, said in known)
    said, true = sum(said for _, said in known), sum(truth for truth, _ in known)
    figures = {"rule_flawed": true / len(known)}
    figures |= {"precision": hits / said} if said else {}
    figures |= {"recall": hits / true} if true else {}
    return figures | ({"f1": 2 * hits / (said + true)} if said + true else {})


def unjudged(trajectories: Sequence[Trajectory]) -> str:
    """A line for people about answers that count although the judge gave no verdict; "" where there are none."""
    rewards = [t.reward for t in trajectories if t.reward is not None and t.reward.value is not None]
    found = [r.detail["genrm"] for r in rewards if r.detail.get("genrm", {}).get("cause")]
    if not found:
        return ""
    why = f"{found[0]['cause']} {found[0].get('reason', '')}".strip()
    return f"{len(found)} answers count without a verdict of the judge, first: {why}"
