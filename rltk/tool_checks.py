"""Whether the run's tools and interventions can work together: told before Ray starts.

Each key's own range is `rltk.value_checks`; whether a chat template can show tools is `rltk.prompt_checks`.
"""

from __future__ import annotations

from collections.abc import Iterator

from rltk.config import Config
from rltk.errors import ConfigError

PYTHON_FORMATS = ("python_block", "retool")  # code and nothing else


def tool_problems(config: Config, training: bool) -> Iterator[str]:
    """What no run can have, each with the fix."""
    if config.tools.enabled:
        yield from _entries(config)
        yield from _limits(config)
        yield from _jail(config)
    elif config.tools.name != "none":
        yield f"tools={config.tools.name} with tools.use = []: name a tool, as in tools.use=[python], or set tools=none"
    yield from _attc(config, training)
    yield from _dtsr(config)


def tool_warnings(config: Config, training: bool) -> Iterator[str]:
    """What a run may do and its user should know."""
    temperature = config.rollout.temperature
    for name, options in (("attc", config.attc), ("dtsr", config.dtsr)):
        if training and options.mode == "rollout":
            yield (
                f"{name}.mode = 'rollout': its text enters the samples that are learned from (masked), so the model "
                f"learns to act where it stands; the paper uses it at inference alone, as {name}.mode=eval does"
            )
    if config.attc.mode != "off" and temperature != 1.0 and not (training and config.attc.mode == "rollout"):
        yield (
            f"attc.mode = {config.attc.mode!r} with rollout.temperature = {temperature:g}: log-probs are of "
            f"softmax(logits / T), so attc.threshold = {config.attc.threshold:g} is easier to reach the lower T is; "
            "the published threshold is for T = 1"
        )
    if config.dtsr.mode != "off" and config.dtsr.gap_tokens >= config.task.max_response_tokens:
        yield (
            f"dtsr.gap_tokens = {config.dtsr.gap_tokens} is not under task.max_response_tokens = "
            f"{config.task.max_response_tokens}: no thought is ever checked; lower it, or set dtsr.mode=off"
        )
    if config.tools.enabled and config.tools.jail.isolation == "best_effort":
        yield (
            "tools.jail.isolation = 'best_effort': code that the model writes runs with what protection this machine "
            "has, and the run says which; for anything else than a test set tools.jail.isolation=strict"
        )


def _entries(config: Config) -> Iterator[str]:
    """Names, signatures, and whether the format can write calls of them."""
    from rltk.rollout.tools import registry  # with an HTTP client, which a run without tools need not wait for

    tools = config.tools
    try:
        names = [signature.name for signature in registry.signatures(tools)]
        environment = registry.environment(tools)
    except ConfigError as error:
        yield str(error)
        return
    if tools.format in PYTHON_FORMATS and names != ["python"] and not environment:
        yield (
            f"tools.format = {tools.format!r} writes Python code and nothing else, and tools.use = "
            f"[{','.join(tools.use)}]; set tools.format=json, or tools.use=[python]"
        )
    if environment and config.attc.mode != "off":
        yield (
            f"attc.mode = {config.attc.mode!r} judges tool calls, and {names[0]} is an environment, whose turns are "
            "actions; set attc.mode=off"
        )
    if tools.session == "replay" and "python" not in names:
        yield "tools.session = 'replay' is python's, which tools.use does not name; set tools.session=stateless"


def _limits(config: Config) -> Iterator[str]:
    tools, jail = config.tools, config.tools.jail
    if tools.output_tokens > tools.total_tokens:
        yield (
            f"tools.output_tokens = {tools.output_tokens} of one result is over tools.total_tokens = "
            f"{tools.total_tokens} of all; raise tools.total_tokens (tools.max_calls * tools.output_tokens = "
            f"{tools.max_calls * tools.output_tokens} is never short), or lower tools.output_tokens"
        )
    if tools.call_deadline_s > tools.deadline_s:
        yield (
            f"tools.call_deadline_s = {tools.call_deadline_s:g} of one call is over tools.deadline_s = "
            f"{tools.deadline_s:g} of the trajectory; raise tools.deadline_s or lower tools.call_deadline_s"
        )
    wall = jail.cpu_s * jail.wall_factor
    if "python" in tools.use and wall >= tools.call_deadline_s:
        yield (
            f"tools.jail.cpu_s * tools.jail.wall_factor = {jail.cpu_s:g} * {jail.wall_factor:g} = {wall:g} s of wall "
            f"time is not under tools.call_deadline_s = {tools.call_deadline_s:g}: a slow program would count as a "
            "failure of the machine; raise tools.call_deadline_s"
        )
    if tools.deadline_s >= config.deadlines.rollout:
        yield (
            f"tools.deadline_s = {tools.deadline_s:g} is not under deadlines.rollout = {config.deadlines.rollout:g}: "
            "one slow trajectory would end the run; raise deadlines.rollout or lower tools.deadline_s"
        )


def _jail(config: Config) -> Iterator[str]:
    jail = config.tools.jail
    if jail.isolation == "remote" and not jail.url:
        yield "tools.jail.isolation = 'remote' needs a sandbox server: set tools.jail.url=http://<host>:<port>"
    elif jail.url and jail.isolation != "remote":
        yield (
            f"tools.jail.url = {jail.url!r} has no effect with tools.jail.isolation = {jail.isolation!r}; "
            "set tools.jail.isolation=remote, or leave it out"
        )
    elif jail.url and not jail.url.startswith(("http://", "https://")):
        yield f"tools.jail.url = {jail.url!r} is no address: write it as http://<host>:<port>"


def _attc(config: Config, training: bool) -> Iterator[str]:
    attc, temperature = config.attc, config.rollout.temperature
    if attc.mode != "off" and not config.tools.enabled:
        yield f"attc.mode = {attc.mode!r} judges tool calls, and the run has tools=none; set tools=... or attc.mode=off"
    if training and attc.mode == "rollout" and temperature != 1.0:
        yield (
            f"attc.mode = 'rollout' needs rollout.temperature = 1, not {temperature:g}: the confidence is of the "
            "sampler's log-probs, which are of softmax(logits / T); set rollout.temperature=1, or attc.mode=eval"
        )


def _dtsr(config: Config) -> Iterator[str]:
    dtsr = config.dtsr
    if dtsr.mode == "off":
        return
    if not dtsr.signals or not all(signal.strip() for signal in dtsr.signals):
        yield f"dtsr.signals = {dtsr.signals}: name the words that a thought turns on itself with, as in [Wait]"
    if dtsr.opens and not dtsr.closes:
        yield f"dtsr.opens = {dtsr.opens!r} without dtsr.closes: set dtsr.closes=</think>, or dtsr.opens='' for neither"
