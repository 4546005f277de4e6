"""A learner's weights and optimizer state, as whole tensors: exported to engines, to Hugging Face, to checkpoints.

Checkpoints hold whole tensors by parameter name, not DeepSpeed's shards: a run may be resumed with another number of
ranks or another ZeRO stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rltk.errors import MismatchError
from rltk.learner.learner import Learner
from rltk.learner.packing import pack
from rltk.models.generation import savable
from rltk.rollout import weight_file
from rltk.trajectory import Version

MOMENTS = ("exp_avg", "exp_avg_sq")
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "spiece.model",
    "tekken.json",
)


def weights(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, whole tensor) of each parameter, gathered one by one. Every rank must run through it."""
    model: Any = learner.policy.model
    for name, parameter in model.named_parameters():  # a tied head shows up once, as the embedding
        yield name, _whole(parameter)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def publish(learner: Learner, path: str, version: Version) -> str:
    """Rank 0 writes the weight file; returns its checksum ("" on other ranks)."""
    if learner.rank == 0:
        return weight_file.write(Path(path), weights(learner), version)
    for _ in weights(learner):
        pass  # take part in the gathers
    return ""


def save_hugging_face(learner: Learner, folder: str) -> None:
    """A folder that transformers and vLLM load: weights, config, tokenizer. Collective."""
    gathered = {}
    for name, tensor in weights(learner):  # every rank takes part in the gathers, one keeps what they give
        if learner.rank == 0:
            gathered[name] = tensor.cpu().clone()
    if learner.rank == 0:
        model: Any = learner.policy.model
        model.generation_config = savable(model.generation_config)
        model.save_pretrained(folder, state_dict=gathered)
        source = Path(learner.settings.model)
        for pattern in (*TOKENIZER_FILES, "generation_config.json"):
            for file in source.glob(pattern):
                shutil.copy(file, folder)
    dist.barrier()


def save(learner: Learner, path: str) -> None:
    """fp32 weights, Adam moments, counters and torch's random state, to one file by rank 0. Collective."""
    state: dict[str, Any] = {"optimizer_steps": learner.optimizer_steps, "rng": torch.get_rng_state(), "parameters": {}}
    for name, parameter in learner.policy.model.named_parameters():
        full = _full_state(learner, parameter)
        if learner.rank == 0:
            state["parameters"][name] = {key: value.cpu() for key, value in full.items()}
    if learner.rank == 0:
        torch.save(state, path)
    dist.barrier()


def load(learner: Learner, path: str) -> None:
    """The inverse of `save`. Refuses a file of another model by parameter name. Collective."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = dict(learner.policy.model.named_parameters())
    if set(own) != set(state["parameters"]):
        odd = sorted(set(own) ^ set(state["parameters"]))[:3]
        raise MismatchError(f"checkpoint {path} is of another model: parameters differ, for example {odd}")
    if state["optimizer_steps"] and learner.optimizer_steps == 0:
        _create_moments(learner)
    for name, parameter in own.items():
        _restore(learner, parameter, state["parameters"][name], state["optimizer_steps"])
    learner.optimizer_steps = state["optimizer_steps"]
    torch.set_rng_state(state["rng"])


def _plain(learner: Learner) -> bool:
    """ZeRO-0 in fp32: the optimizer is torch's own, on the parameters themselves."""
    return learner.settings.zero_stage == 0 and learner.settings.dtype == "float32"


def _full_state(learner: Learner, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """{"weight": fp32, "exp_avg": ..., "exp_avg_sq": ...}, whole; no moments before the first optimizer step."""
    moments = MOMENTS if learner.optimizer_steps else ()
    if _plain(learner):
        found = {key: learner.engine.optimizer.state[parameter][key] for key in moments}
        return {"weight": parameter.detach(), **found}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {key: safe_get_full_optimizer_state(parameter, key) for key in moments}
    return {"weight": safe_get_full_fp32_param(parameter), **found}


def _create_moments(learner: Learner) -> None:
    """DeepSpeed makes Adam's moments in the first step: take one with zero gradient and rate, which moves nothing."""
    packed = pack([(np.asarray([0, 0]), np.asarray([False, True]))]).to(learner.device)
    loss = learner.engine(packed)["logprobs"].sum() * 0.0
    learner.engine.backward(loss, scale_wrt_gas=False)
    for group in learner.engine.optimizer.param_groups:
        group["lr"] = 0.0
    learner.engine.step()


def _restore(learner: Learner, parameter: nn.Parameter, saved: dict[str, torch.Tensor], steps: int) -> None:
    saved = {key: value.to(learner.device) for key, value in saved.items()}
    moments = MOMENTS if steps else ()
    if _plain(learner):
        parameter.data.copy_(saved["weight"])
        if steps:
            learner.engine.optimizer.state[parameter] = {
                "step": torch.tensor(float(steps)), **{key: saved[key].clone() for key in MOMENTS}
            }  # fmt: skip
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, saved["weight"])
    for key in moments:
        safe_set_full_optimizer_state(parameter, saved[key], key)
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(saved["weight"])
    else:
        parameter.data.copy_(saved["weight"])
    for state in learner.engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), float(steps))
