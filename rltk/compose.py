"""The command line to a Config: `load(["algorithm=grpo", "learner.lr=5e-5"])`.

  argv --rewrite--> group choices --Hydra composes conf/--> tree --settings--> tree --convert--> Config (frozen, typed)
                    settings --------------------------------^

Hydra composes the groups; the settings are checked and applied here, so that a wrong one is refused in our words: the
key, its value, the nearest known key. No torch, no Ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rltk.config import Config
from rltk.convert import convert, unknown_key
from rltk.errors import ConfigError
from rltk.nearest import meant
from rltk.secret import refuse_secrets

# <group>=module:attribute plugs the user's own code in; this is the key that takes it in the group's `custom` choice.
PLUGS = {"algorithm": "path", "task": "target", "reward": "path", "tools": "use"}
JUDGE = "reward.genrm"  # as it is typed; Hydra calls the group inside a group reward/genrm
PLUG = re.compile(r"[A-Za-z_][\w.]*(?<!\.py):[A-Za-z_][\w.]*")  # a module, not a file
# Mappings whose entries the receiver checks.
FREE_KEYS = ("correction_options", "task.options", f"{JUDGE}.judge_options")


def load(argv: list[str], aliases: Mapping[str, str] | None = None) -> Config:
    """The run that the command line `argv` asks for. Anything wrong in it is a ConfigError.

    `aliases` gives an entry point short names for keys, as {"samples": "evaluation.samples"}.
    """
    overrides = [_parse(argument) for argument in rewrite(argv, aliases or {})]
    known_groups = groups()
    choices: dict[str, str] = {}
    settings: list[tuple[str, Any]] = []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key in known_groups:
            choices[key] = _choice(key, value, known_groups[key])
        else:
            settings.append((key, value))
    try:
        tree, chosen = _compose(choices)
        _apply(tree, settings, chosen, known_groups)
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(_missing(str(error.full_key))) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"the configuration does not compose: {' '.join(str(error).split())}") from None
    assert isinstance(plain, dict)
    refuse_secrets(plain)
    config = convert(Config, {str(key): value for key, value in plain.items()})
    return replace(config, name=config.name or f"{config.task.name}-{config.algorithm.name}-s{config.seed}")


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and the choices in each, both sorted; a group inside another is called `reward/genrm`."""
    return dict(_groups_in(files("rltk.conf"), ""))


def _groups_in(place: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    for folder in sorted((entry for entry in place.iterdir() if entry.is_dir()), key=lambda entry: entry.name):
        choices = sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if choices:
            yield f"{prefix}{folder.name}", choices
        yield from _groups_in(folder, f"{prefix}{folder.name}/")


def rewrite(argv: list[str], aliases: Mapping[str, str]) -> list[str]:
    """The short forms of the command line written out. All of them are here.

    algorithm=my_module:MyObjective -> algorithm=custom algorithm.path=my_module:MyObjective   (likewise task, reward)
    tools=my_module:search          -> tools=custom tools.use=[my_module:search]
    model=<folder or Hub id>        -> model=custom model.path=<it> model.name=<its last part>
    reward.genrm=<choice>           -> reward/genrm=<choice>
    reward.genrm=<folder or Hub id> -> reward/genrm=custom reward.genrm.model=<it>
    reward.genrm=http://host/v1     -> reward/genrm=server reward.genrm.url=<it>
    <alias>=value                   -> <key>=value
    """
    return [written for argument in argv for written in _written_out(argument, aliases)]


def _written_out(argument: str, aliases: Mapping[str, str]) -> Iterator[str]:
    key, equals, value = argument.partition("=")
    if equals and key in PLUGS and PLUG.fullmatch(value):
        plugged = f"[{value}]" if key == "tools" else value
        yield from (f"{key}=custom", f"{key}.{PLUGS[key]}={plugged}")
    elif equals and key == "model" and value.strip("'\"") and value not in groups()["model"]:
        path = value.strip("'\"")
        cached = re.search(r"models--[^/]+--([^/]+)/snapshots/", path)  # the last part is a commit there
        name = cached[1] if cached else path.rstrip("/").rsplit("/", 1)[-1] or "model"
        yield from ("model=custom", f"model.path={_quoted(path)}", f"model.name={_quoted(name)}")
    elif equals and key == JUDGE:
        yield from _judge_written_out(value.strip("'\""))
    elif equals and key in aliases:
        yield f"{aliases[key]}={value}"
    else:
        yield argument


def _judge_written_out(value: str) -> Iterator[str]:
    group = JUDGE.replace(".", "/")
    if value.startswith(("http://", "https://")):
        yield from (f"{group}=server", f"{JUDGE}.url={_quoted(value)}")
    elif "/" in value or value.startswith((".", "~")):
        yield from (f"{group}=custom", f"{JUDGE}.model={_quoted(value)}")
    else:
        yield f"{group}={value or 'none'}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _parse(argument: str) -> Override:
    if argument.startswith("-"):
        raise ConfigError(f"option {argument} is not known: settings are written key=value; --help lists them")
    if argument.startswith("~"):
        raise ConfigError(f"{argument}: a key cannot be removed; set it to another value, as in key=value")
    key, equals, value = argument.lstrip("+").partition("=")
    if not equals:
        raise ConfigError(f"{argument!r} is not of the form key=value; --help shows examples")
    refuse_secrets(value.strip("'\""), key)  # before any message that shows the value
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        fix = f"quote the value, as in '{key}={_quoted(value)}'" if re.fullmatch(r"[\w.]+", key) else "write key=value"
        raise ConfigError(f"{key} = {value!r} cannot be read: {fix}") from None
    if parsed.is_sweep_override():
        raise ConfigError(f"{key} = {value} asks for several runs; give one value a run (a list is written [a,b])")
    if parsed.package is not None:
        raise ConfigError(f"{argument}: {key} names a package with @; write {parsed.key_or_group}={value}")
    return parsed


def _choice(group: str, value: Any, choices: list[str]) -> str:
    """A group's choice that exists; the messages name the nearest one and the way to bring one's own."""
    if value is None and group == "experiment":
        return "null"
    if isinstance(value, str) and value in choices:
        return value
    if isinstance(value, Mapping):
        names = ", ".join(choices)
        raise ConfigError(f"{group} = {value!r}: {group} takes one of {names}; set a key as {group}.<key>=<value>")
    near = meant(str(value), choices)
    own = f"; your own: {group}=my_module:name, importable from here" if group in PLUGS else ""
    typed = group.replace("/", ".")
    own = f"; or {typed}=<folder, owner/name or http://host:8000/v1>" if typed == JUDGE else own
    if isinstance(value, list) and group == "tools":
        listed = f"[{','.join(map(str, value))}]"
        raise ConfigError(f"tools={listed}: several tools are tools=custom tools.use={listed}")
    shown = "null" if value is None else value
    raise ConfigError(f"{typed}={shown} is not known{near}. Choices: {', '.join(choices)}{own}")


def _compose(choices: dict[str, str]) -> tuple[DictConfig, dict[str, Any]]:
    """The tree of the chosen groups, and which choice every group ended with (an experiment may choose too)."""
    with initialize_config_module("rltk.conf", version_base=None):
        tree = compose("config", [f"{group}={choice}" for group, choice in choices.items()], return_hydra_config=True)
    chosen = {str(group): choice for group, choice in tree.hydra.runtime.choices.items()}
    with open_dict(tree):
        del tree["hydra"]
    OmegaConf.set_struct(tree, False)  # what is unknown is refused below, and by `convert`
    return tree, chosen


def _apply(
    tree: DictConfig, settings: list[tuple[str, Any]], chosen: dict[str, Any], known_groups: dict[str, list[str]]
) -> None:
    free = [*FREE_KEYS, *(group for group in PLUGS if chosen.get(group) == "custom")]
    judge = dict(settings).get(f"{JUDGE}.judge")
    if judge is not None and judge != OmegaConf.select(tree, f"{JUDGE}.judge"):
        OmegaConf.update(tree, f"{JUDGE}.judge_options", {}, merge=False)  # those were the other judge's
    known = list(_keys(tree))
    for key, value in settings:
        group = key.rpartition(".")[0]
        if key == f"{group}.name" and group.replace(".", "/") in known_groups and group != "model":
            raise ConfigError(f"{key} = {value!r}: {key} follows the group's choice; write {group}={value}")
        if key not in known and not any(key.startswith(f"{prefix}.") for prefix in free):
            raise unknown_key(key, value, [*known, *(name.replace("/", ".") for name in known_groups)])
        OmegaConf.update(tree, key, value, force_add=True)


def _keys(tree: DictConfig, where: str = "") -> Iterator[str]:
    """Every dotted key of the tree, mappings included. Values are not touched: they may be missing as yet."""
    for key in tree:
        path = f"{where}{key}"
        yield path
        node = tree._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _keys(node, f"{path}.")


def _missing(key: str) -> str:
    group, _, _ = key.partition(".")
    short = ""
    if key == "model.path":
        short = ", or write model=<folder or Hub id>"
    elif key == f"{group}.{PLUGS.get(group)}":
        short = f", or write {group}=my_module:name"
    return f"{key} has no value: set {key}=<value>{short}"
