"""Whether the run that a Config describes can start: every mistake that files and arithmetic can tell, before Ray.

`check` collects them all, each naming the keys, their values and the fix. No torch, no Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import rltk
from rltk.compose import PLUG
from rltk.config import Config
from rltk.devices import gpus
from rltk.errors import ConfigError
from rltk.genrm_checks import genrm_problems, genrm_warnings
from rltk.kv_checks import kv_problems, kv_refusal, kv_warnings
from rltk.kv_size import PROBE_TOKENS, cache_size, lengths, trajectory_tokens
from rltk.learner_checks import learner_problems
from rltk.model_folder import facts, folder_problems
from rltk.nearest import meant
from rltk.placement import place
from rltk.tool_checks import tool_problems, tool_warnings
from rltk.value_checks import get, value_problems


def check(config: Config, training: bool = True, writes: bool = True) -> list[str]:
    """Warnings, for a run that can start; ConfigError with every problem, for one that cannot.

    `config` has been through `resolve_model`. `training=False` leaves out what only training needs: batch arithmetic,
    the learner, the run folder. `writes=False`: no run folder will be made.
    """
    problems = [
        *value_problems(config),
        *folder_problems(config.model.path, config.model.chat_template),
        *_plugs(config),
        *_devices(config),
        *_tracker(config),
        *kv_problems(config),
        *tool_problems(config, training),
        *genrm_problems(config),
        *_sampling(config, training),
    ]
    if training:
        problems += [*_batch(config), *_ratio(config), *_precision(config)]
        problems += _run_folder(config) if writes else []
    if not problems:  # the model's files and the numbers are sound enough to be reckoned with
        problems += [*_sizes(config), *(learner_problems(config) if training else [])]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} things to fix", *(f"  - {problem}" for problem in problems)]))
    found = [kv_warnings(config, training), tool_warnings(config, training), genrm_warnings(config, training)]
    return [warning for warnings in (*found, _warnings(config) if training else []) for warning in warnings]


def run_dir(config: Config) -> Path:
    """The run's folder, absolute."""
    return (Path(config.output).expanduser() / config.name).resolve()


def corrections() -> list[str]:
    """Names that `correction` may take: the modules of algorithms/corrections, by file name: importing needs torch."""
    folder = Path(rltk.__file__).parent / "algorithms" / "corrections"
    return sorted(file.stem for file in folder.glob("*.py") if file.stem not in ("__init__", "correction"))


def _plugs(config: Config) -> Iterator[str]:
    """The user's own code: the path has the form module:attribute. Importing it is the entry point's."""
    plugs = {"algorithm": config.algorithm.path, "reward": config.reward.path, "task": config.task.target}
    for group, path in plugs.items():
        key = f"{group}.target" if group == "task" else f"{group}.path"
        custom = get(config, f"{group}.name") == "custom"
        if custom and not path:
            yield f"{group}=custom needs your code: write {group}=my_module:name (which sets {key})"
        elif path and not PLUG.fullmatch(path):
            yield f"{key} = {path!r} is not of the form module:attribute; write it as in my_module:name"
        elif path and not custom and group != "task":
            yield f"{key} = {path!r} has no effect with {group}={get(config, f'{group}.name')}; write {group}={path}"
    known = corrections()
    if config.correction not in known and not PLUG.fullmatch(config.correction):
        yield (
            f"correction = {config.correction!r} is not known{meant(config.correction, known)}: set it to one of "
            f"{', '.join(known)}, or to your own as module:Class"
        )


def _batch(config: Config) -> Iterator[str]:
    batch, minibatches = config.batch, config.algorithm.minibatches
    sequences = batch.prompts * batch.samples
    product = f"batch.prompts * batch.samples = {batch.prompts} * {batch.samples} = {sequences}"
    min_group = config.algorithm.options.get("min_group", 2)
    if isinstance(min_group, int) and batch.samples < min_group:
        yield (
            f"batch.samples = {batch.samples} is under algorithm.min_group = {min_group}: every group would be "
            f"dropped, as the baseline is its mean; set batch.samples={min_group} or more"
        )
    if minibatches >= 1 and sequences % minibatches:
        fits = [count for count in range(1, sequences + 1) if sequences % count == 0]
        near = min(fits, key=lambda count: (abs(count - minibatches), -count))
        yield (
            f"{product} sequences do not divide into algorithm.minibatches = {minibatches}; "
            f"set algorithm.minibatches={near}, or batch.prompts to a multiple of {minibatches}"
        )
    elif minibatches >= 1 and sequences // minibatches < config.learner.ranks:
        yield (
            f"{product} sequences in algorithm.minibatches = {minibatches} leave {sequences // minibatches} to each, "
            f"fewer than learner.ranks = {config.learner.ranks}; lower algorithm.minibatches or learner.ranks"
        )
    if config.learner.old == "detach" and minibatches > 1:
        yield (
            f"learner.old = 'detach' needs algorithm.minibatches = 1, not {minibatches}: after one optimizer step "
            "the detached log-probs are no longer the old ones; set learner.old=recompute or algorithm.minibatches=1"
        )


def _ratio(config: Config) -> Iterator[str]:
    if config.ratio.reference == "mu" and config.correction != "none":
        yield (
            f"ratio.reference = 'mu' with correction = {config.correction!r} corrects for the sampler twice: the ratio "
            "is taken against it already; set correction=none or ratio.reference=old"
        )


def _precision(config: Config) -> Iterator[str]:
    if config.learner.zero_stage == 0 and config.learner.dtype == "bfloat16":
        yield (
            "learner.zero_stage = 0 with learner.dtype = 'bfloat16' would train without fp32 master weights (DeepSpeed "
            "keeps them from stage 1 on); set learner.zero_stage=1, which on one rank partitions nothing"
        )


def _sampling(config: Config, training: bool) -> Iterator[str]:
    """An evaluation samples as training does, by the same engine: it has no truncated sampling either."""
    if training:
        why = (
            "is refused in training: truncated sampling biases every ratio by the kept mass, as the learner's "
            "log-probs are of the whole distribution"
        )
    else:
        why = "is refused in an evaluation: it measures the whole distribution, which is what training learns"
    for key, off in (("top_p", 1.0), ("top_k", 0)):
        if (value := getattr(config.rollout, key)) != off:
            yield f"rollout.{key} = {value} {why}; set rollout.{key}={off}"


def _devices(config: Config) -> Iterator[str]:
    cluster, rollout, ranks = config.cluster, config.rollout, config.learner.ranks
    if cluster.name not in ("local", "existing"):
        yield f"cluster.name = {cluster.name!r} is not known: set cluster=local or cluster=existing"
    if cluster.name == "local" and cluster.address:
        yield f"cluster.address = {cluster.address!r} has no effect with cluster=local; add cluster=existing to join it"
    if cluster.name == "existing" and not (cluster.address or os.environ.get("RAY_ADDRESS")):
        yield "cluster=existing with no address: set cluster.address=<host:port>, or RAY_ADDRESS in the environment"
    if rollout.workers > rollout.engines:
        yield (
            f"rollout.workers = {rollout.workers} with rollout.engines = {rollout.engines}: an engine has one worker, "
            "as two would race for the order of its requests, so the others would idle; "
            f"set rollout.workers={rollout.engines}"
        )
    elsewhere = cluster.name == "existing"
    if cluster.device == "gpu" and not gpus() and not elsewhere:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
        yield f"cluster.device = 'gpu' but this machine shows no NVIDIA GPU{seen}; set cluster.device=cpu, or auto"
        return
    placement = place(config)
    share = rollout.gpu_memory_share
    if not 0 < share < 1:
        yield f"rollout.gpu_memory_share = {share} must be above 0 and under 1"
    elif placement.gpu_shared and placement.learner_memory_share <= 0 and not placement.judges_per_gpu:
        crowd = placement.engines_per_gpu
        yield (
            f"rollout.engines = {rollout.engines} on {placement.gpus} GPU(s) take {crowd} * rollout.gpu_memory_share = "
            f"{crowd} * {share} = {crowd * share:g} of a GPU's memory and leave the learner nothing; "
            f"lower rollout.gpu_memory_share to {0.5 / crowd:.2g}, or rollout.engines"
        )
    elif placement.gpu_shared and ranks > 1 and placement.rank_gpus <= 0.5:
        crowd = placement.engines_per_gpu
        yield (
            f"learner.ranks = {ranks} beside {crowd} engine(s) a GPU at rollout.gpu_memory_share = {share} have "
            f"{placement.rank_gpus:g} of a GPU each: two may land on one, and NCCL needs one a rank; "
            f"set rollout.gpu_memory_share={math.ceil(50 / crowd - 1) / 100:g} or less, or learner.ranks=1"
        )
    if placement.device == "gpu" and ranks > placement.gpus and not elsewhere:
        have = placement.gpus
        yield f"learner.ranks = {ranks} but {have} GPU(s) here: NCCL needs one a rank; set learner.ranks={have}"
    if placement.device == "cpu" and not rollout.enforce_eager:
        yield "rollout.enforce_eager = False means CUDA graphs, and the run is on a CPU; set rollout.enforce_eager=true"


def _tracker(config: Config) -> Iterator[str]:
    tracker = config.tracker
    if tracker.name == "wandb" and tracker.mode == "online" and not os.environ.get("WANDB_API_KEY"):
        yield "tracker.mode = 'online' but the environment has no WANDB_API_KEY; export it, or set tracker.mode=offline"


def _run_folder(config: Config) -> Iterator[str]:
    folder = run_dir(config)
    if folder.exists() and not folder.is_dir():
        yield f"run folder {folder} is a file; set another name=... or output=..."
    elif not folder.is_dir() or not any(folder.iterdir()):
        return
    elif config.resume == "never":
        yield (
            f"run folder {folder} exists (name = {config.name!r}, resume = 'never'); set resume=auto to go on, "
            "choose another name=..., or remove it"
        )
    elif not (folder / "manifest.json").is_file():
        yield (
            f"resume = 'auto' but run folder {folder} has no manifest.json: nothing to go on from; "
            "remove it or choose another name=..."
        )


def _sizes(config: Config) -> list[str]:
    """Lengths against the model's context and the CPU engine's cache."""
    parts, response = lengths(config), config.task.max_response_tokens
    longest = sum(parts.values())
    model = facts(Path(config.model.path))
    total = f"{' + '.join(parts)} = {' + '.join(map(str, parts.values()))} = {longest}"
    if model.context and longest + PROBE_TOKENS > model.context:
        room = model.context - PROBE_TOKENS - (longest - response)
        fix = f"lower task.max_response_tokens to {room}" if room > 0 else "lower task.max_prompt_tokens"
        fix += ", or tools.total_tokens" if config.tools.enabled else ""
        return [
            f"{total} tokens, and {PROBE_TOKENS} that the weight probe samples, are over the model's context of "
            f"{model.context} (max_position_embeddings in {Path(config.model.path) / 'config.json'}); {fix}, or choose "
            "another model"
        ]
    if refused := kv_refusal(config):
        return refused
    gib = cache_size(config).gib(sequences=1)
    if gib is not None and gib > config.rollout.kv_cache_gib and place(config).device == "cpu":
        return [
            f"{total} tokens need {gib:.3g} GiB of KV cache, over rollout.kv_cache_gib = "
            f"{config.rollout.kv_cache_gib:g}; set rollout.kv_cache_gib={gib * 1.1:.2g} or more"
        ]
    return []


def _warnings(config: Config) -> Iterator[str]:
    length = trajectory_tokens(config)
    if config.algorithm.minibatches == 1 and config.ratio.reference == "old":
        yield (
            f"algorithm.minibatches = 1 with ratio.reference = 'old': every ratio is 1, so {config.algorithm.name} is "
            "REINFORCE here and never clips; set algorithm.minibatches=4 or ratio.reference=mu for the method itself"
        )
    if config.learner.tokens_per_micro_batch < length:
        yield (
            f"learner.tokens_per_micro_batch = {config.learner.tokens_per_micro_batch} is under the longest sequence, "
            f"{length} tokens: a longer one gets a micro-batch of its own"
        )
    per_engine = math.ceil(config.batch.prompts * config.batch.samples / config.rollout.engines)
    running = min(config.rollout.max_sequences, per_engine)
    size = cache_size(config)
    gib, held = size.gib(running), size.held(config.rollout.kv_cache_gib)
    if place(config).device == "cpu" and gib is not None and gib > config.rollout.kv_cache_gib:
        short = f"{held} run at once and the rest wait" if config.kv.compressed else "some may be computed again"
        yield (
            f"rollout.kv_cache_gib = {config.rollout.kv_cache_gib:g} is under the {gib:.3g} GiB that {running} "
            f"sequences of full length take: {short}; set rollout.kv_cache_gib={math.ceil(100 * gib) / 100:g}"
        )
