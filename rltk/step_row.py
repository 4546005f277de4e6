"""The row that a training step leaves in metrics.jsonl."""

from __future__ import annotations

from rltk.causes import by_cause
from rltk.gathering import Gathered
from rltk.genrm_metrics import genrm_figures
from rltk.learner.settings import TrainResult
from rltk.ledger import Ledger
from rltk.metrics import LearnedArrays, step_metrics
from rltk.rollout.kv.options import KVOptions
from rltk.sync.shared_memory import Published
from rltk.tool_metrics import tool_figures


def step_row(
    gathered: Gathered,
    learned: TrainResult,
    published: Published,
    ledger: Ledger,
    kv: KVOptions,
    busy: float,
    times: dict[str, float],
) -> dict[str, float]:
    """`kv`: the engines' cache. `busy`: seconds of the step inside vLLM. `times`: the step's time ledger, closed.

    Beside the learner's own metrics and those of `rltk.metrics.step_metrics`, over everything that was sampled:

    mismatch/mean/<cause>      see `rltk.causes.by_cause`
    tools/..., attc/..., dtsr/...   see `rltk.tool_metrics.tool_figures`
    genrm/...                  see `rltk.genrm_metrics.genrm_figures`
    probe/max, probe/mean      log-prob differences of engine and learner at the weights that the step made
    weight_version             the step whose weights these are
    failed                     samples that could not be used
    refill/rounds              times that new prompts stood in for groups that were not admitted
    refill/not_admitted        share of the groups that were not
    dropped/<reason>           samples of the run so far, by reason
    time/<stage>, time/step    seconds; the stages and time/other sum to time/step
    overhead                   share of the step that was spent neither in vLLM nor in DeepSpeed
    tokens_per_s/rollout, tokens_per_s/learner
    """
    trajectories = gathered.sampled
    records = [gathered.records[t.group_id] for t in trajectories]
    arrays = _arrays(gathered, learned)
    row = step_metrics(trajectories, arrays, [r.level for r in records]) | _with_deviations(learned.metrics)
    row |= tool_figures(trajectories, records) | genrm_figures(trajectories)
    sampled_with = (published.version[0], published.version[1] - 1)  # `published` are the weights the step made
    row |= by_cause(trajectories, arrays.old, sampled_with, kv, published.probe.mean)
    row |= {"probe/max": published.probe.largest, "probe/mean": published.probe.mean}
    row |= {"weight_version": float(published.version[1]), "failed": float(len(gathered.failed))}
    row |= {"refill/rounds": float(gathered.refills), "refill/not_admitted": gathered.refused_share}
    row |= {f"dropped/{reason}": float(count) for reason, count in ledger.dropped.items()}
    row |= times
    row["overhead"] = max(0.0, 1.0 - (busy + learned.seconds["deepspeed"]) / times["time/step"])
    row["tokens_per_s/rollout"] = sum(t.length for t in trajectories) / max(times["time/generate"], 1e-9)
    row["tokens_per_s/learner"] = learned.tokens / max(times["time/train"] + times["time/logprobs"], 1e-9)
    return row


def _arrays(gathered: Gathered, learned: TrainResult) -> LearnedArrays:
    """One entry for each sampled trajectory: the learner never saw those that were not admitted."""
    unseen = [None] * len(gathered.refused)
    old, new, entropy = ([*rows, *unseen] if rows else [] for rows in (learned.old, learned.new, learned.entropy))
    return LearnedArrays(old, new, entropy, learned.reference)


def _with_deviations(metrics: dict[str, float]) -> dict[str, float]:
    """Means of squares, which add up over micro-batches and ranks, as standard deviations."""
    row = dict(metrics)
    for name in ("log_rho", "log_ratio"):
        if f"{name}/square" in row:
            row[f"{name}/sd"] = max(0.0, row.pop(f"{name}/square") - row[f"{name}/mean"] ** 2) ** 0.5
    return row
