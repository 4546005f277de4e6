"""Whether the run's cache can work, and whether its samples can teach: told before Ray starts.

What holds for the cache itself, whoever uses it, is `rltk.rollout.kv.refuse`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from rltk.config import Config
from rltk.devices import device
from rltk.errors import ConfigError
from rltk.kv_size import block_tokens, context, lengths, most_kept, of_the_prompt
from rltk.nearest import meant
from rltk.rollout.kv import refuse
from rltk.rollout.kv.options import HEADS, policies

CORRECTS_ITSELF = ("minirl",)  # weighs every token by new/mu whatever the reference


def kv_problems(config: Config) -> Iterator[str]:
    """Values of `kv` that no run can have, each with the fix."""
    kv = config.kv
    if kv.name not in policies():
        yield f"kv={kv.name} is not known{meant(kv.name, policies())}: set it to one of {', '.join(policies())}"
    elif kv.compressed and kv.budget == 0:
        yield f"kv={kv.name} has no budget: set kv.budget=<slots to keep, in tokens, or a share under 1>"
    elif kv.compressed and kv.budget > 1 and kv.budget != math.floor(kv.budget):
        yield f"kv.budget = {kv.budget:g} is neither whole tokens nor a share under 1; set kv.budget={kv.budget:.0f}"
    elif not kv.compressed and kv.budget:
        yield (
            f"kv.budget = {kv.budget:g} has no effect with kv={kv.name}, which keeps every token; choose a policy "
            f"with it, as in kv=longflow kv.budget={kv.budget:g}, or leave it out"
        )
    if kv.name == "fp8" and device(config.cluster) == "cpu":
        yield "kv=fp8 is vLLM's 8-bit cache of a GPU, and the run is on a CPU; set kv=full"
    if kv.heads not in HEADS:
        yield f"kv.heads = {kv.heads!r} is not known{meant(kv.heads, HEADS)}: set it to one of {', '.join(HEADS)}"


def kv_refusal(config: Config) -> list[str]:
    """What a compressed cache cannot do at this run's lengths, or with its model, whose config.json is there."""
    try:
        refuse(
            config.kv, context(config), config.model.path,
            max_prompt=config.task.max_prompt_tokens, block_size=block_tokens(config),
        )  # fmt: skip
    except ConfigError as error:
        return [str(error)]
    return []


def kv_warnings(config: Config, training: bool) -> Iterator[str]:
    """What a run may do and its user should know."""
    kv = config.kv
    if not kv.compressed:
        return
    parts = lengths(config)
    if of_the_prompt(config) and len(parts) == 2:  # else a sampling goes on from all that there is, as its prompt
        del parts["task.max_response_tokens"]
    whole = sum(parts.values())
    what = f"{' + '.join(parts)} = {whole}"
    if most_kept(config) >= whole:
        yield f"kv.budget = {kv.budget:g} is not under {what}: nothing is ever compressed; lower it, or set kv=full"
    if kv.record:
        yield "kv.record = True costs memory and time in every decode step, and nothing in a run reads death times"
    corrected = config.ratio.reference == "mu" or config.correction != "none"
    if training and not corrected and config.algorithm.name not in CORRECTS_ITSELF:
        yield (
            f"kv={kv.name} with ratio.reference = 'old' and correction = 'none': the samples come from the policy that "
            "attends to what the cache keeps, and are learned from as if they were the learner's own, which may "
            "collapse. Correct for it: ratio.reference=mu (algorithm=ctpo or minpro), correction=sparse or prefix_min"
        )
