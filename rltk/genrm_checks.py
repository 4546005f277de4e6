"""Whether the run's judge can judge: told before Ray starts. Each key's own range is `rltk.value_checks`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from rltk import gguf
from rltk.compose import JUDGE
from rltk.config import Config
from rltk.errors import ConfigError
from rltk.model_folder import PACKAGED, facts, folder_problems
from rltk.placement import place

LEAST_PROMPT = 64  # tokens: a prompt that fits in less asks nothing


def genrm_problems(config: Config) -> Iterator[str]:
    """What no run can have, each with the fix."""
    options = config.reward.genrm
    if not options.enabled:
        return
    if options.url:
        yield from _server(config)
    else:
        yield from folder_problems(options.model, options.chat_template, JUDGE)
        yield from _memory(config)
    yield from _judge(config)
    yield from _times(config)


def _memory(config: Config) -> Iterator[str]:
    options, at = config.reward.genrm, place(config)
    if not 0 < options.gpu_memory_share < 1:
        yield f"{JUDGE}.gpu_memory_share = {options.gpu_memory_share} must be above 0 and under 1"
    elif at.gpu_shared and at.learner_memory_share <= 0:
        share, judge_share = config.rollout.gpu_memory_share, options.gpu_memory_share
        taken = at.engines_per_gpu * share + at.judges_per_gpu * judge_share
        yield (
            f"{at.engines_per_gpu} engine(s) at rollout.gpu_memory_share = {share:g} and {at.judges_per_gpu} judge(s) "
            f"at {JUDGE}.gpu_memory_share = {judge_share:g} take {taken:g} of a GPU's memory and leave the learner "
            f"nothing; lower them to a sum of about 0.6, or {JUDGE}.replicas"
        )
    if at.device == "cpu" and not options.enforce_eager:
        yield f"{JUDGE}.enforce_eager = False means CUDA graphs, and this is a CPU; set {JUDGE}.enforce_eager=true"


def _server(config: Config) -> Iterator[str]:
    options = config.reward.genrm
    address = urlsplit(str(options.url))
    if address.scheme not in ("http", "https") or not address.hostname:
        yield f"{JUDGE}.url = {options.url!r} is no address: write it as http://<host>:<port>/v1"
    if not options.model:
        yield f"{JUDGE}.url needs the model's name there: set {JUDGE}.model=<name>"
    elif options.model.startswith((PACKAGED, gguf.SCHEME)):
        yield (
            f"{JUDGE}.url = {options.url!r} with {JUDGE}={options.name}, whose model is {options.model}: a server has "
            f"models of its own; write {JUDGE}={options.url} {JUDGE}.model=<name there>"
        )


def _judge(config: Config) -> Iterator[str]:
    """That it can be built, that it judges one response, and that prompt and reply fit its model."""
    from rltk.rewards.genrm.canary import load_canaries
    from rltk.rewards.genrm.judges import asked_when

    options = config.reward.genrm
    try:
        when = asked_when(options)
        load_canaries(options.canary_file, when)
    except ConfigError as error:
        words = str(error)
        yield words if JUDGE in words else f"{JUDGE}.judge = {options.judge!r}: {words}"
        return
    if options.on_failure != "mask" and when != "right":
        yield (
            f"{JUDGE}.on_failure = {options.on_failure!r} says what a right answer counts as that nobody could check, "
            f"and {JUDGE}.judge = {options.judge!r} is not asked about those; set {JUDGE}.on_failure=mask"
        )
    reply = options.judge_options.get("max_tokens", 0)
    if isinstance(reply, int) and reply + LEAST_PROMPT > options.context:
        yield (
            f"{JUDGE}.judge_options.max_tokens = {reply} leaves a prompt no room in {JUDGE}.context = "
            f"{options.context}; lower it, or raise {JUDGE}.context"
        )
    if not options.url and Path(options.model).is_dir():
        context = facts(Path(options.model)).context
        if context and options.context > context:
            yield (
                f"{JUDGE}.context = {options.context} is over the judge model's {context} positions "
                f"(max_position_embeddings); set {JUDGE}.context={context} or less"
            )


def _times(config: Config) -> Iterator[str]:
    options = config.reward.genrm
    if options.attempt_s > options.deadline_s:
        yield (
            f"{JUDGE}.attempt_s = {options.attempt_s:g} of one generation is over {JUDGE}.deadline_s = "
            f"{options.deadline_s:g} of the question: a replica that hangs would leave no time for another; "
            f"set {JUDGE}.attempt_s={options.deadline_s / 2:g}"
        )


def genrm_warnings(config: Config, training: bool) -> Iterator[str]:
    """What a run may do and its user should know."""
    options, algorithm = config.reward.genrm, config.algorithm.name
    if not options.enabled or not training:
        return
    if options.judge == "fapo" and algorithm != "fapo" and not config.algorithm.path:
        yield (
            f"{JUDGE}={options.name} labels right answers with a wrong step, and algorithm={algorithm} does not read "
            "the label: the judge is measured, nothing is learned from it; set algorithm=fapo for that"
        )
    if options.on_failure == "mask" and options.retries == 0:
        yield (
            f"{JUDGE}.retries = 0 with {JUDGE}.on_failure = 'mask': one replica's failure takes right answers out of "
            f"the batch; set {JUDGE}.retries=2"
        )
