"""From our settings to DeepSpeed's, in one place."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

from rltk.learner.settings import LearnerSettings


def deepspeed_config(settings: LearnerSettings) -> dict[str, Any]:
    """ZeRO 0-3, fp32 or bf16 with fp32 master weights. Batch sizes are ours, not DeepSpeed's: see `gradient_scale`."""
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.zero_stage == 3:
        # Small models must be partitioned too, or "ZeRO-3" quietly is ZeRO-0 for every tensor under the threshold.
        zero |= {"stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def gradient_scale(ranks: int, zero_stage: int, sequence_parallel: int = 1) -> float:
    """What a rank's share of the loss is multiplied by, so that the reduced gradient is the global batch's sum.

    DeepSpeed averages over ranks where we want a sum. ZeRO-3's reduce-scatter divides by data x sequence parallel, the
    other paths by data parallel only (0.19.8).
    """
    return float(ranks * sequence_parallel if zero_stage == 3 else ranks)


def learning_rate(settings: LearnerSettings, step: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine decay to 0.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    left = settings.total_steps - settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / max(1, left))
    return settings.lr * ((1.0 - done) if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


def join(rank: int, ranks: int, host: str, port: int, device: str) -> None:
    """Meet the other ranks: gloo on CPU, NCCL on GPUs (one visible device a rank)."""
    import deepspeed

    os.environ.update(
        MASTER_ADDR=host, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", LOCAL_SIZE="1"
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # An all-reduce through shared memory that DeepSpeed would compile first, for a minute. gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device == "gpu" else "gloo", verbose=False)


@contextlib.contextmanager
def partitioned_loading(config: dict[str, Any], enabled: bool) -> Iterator[None]:
    """ZeRO-3: while this lasts, transformers partitions a model as it loads it, so no rank ever holds all of it."""
    if not enabled:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    keep = HfDeepSpeedConfig(config)  # transformers holds it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep
