"""`python -m rltk.serve reward.genrm=tiny [host=127.0.0.1] [port=8000]`: a judge over HTTP, for programs outside a run.

Its replicas and their service as in a training run, behind Ray Serve (`pip install "ray[serve]"`). What can be posted
is told in `rltk.rewards.genrm.serve`. Runs until Ctrl-C. Nobody is asked for a key: keep it on 127.0.0.1, or behind a
proxy that asks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import signal
import socket
import sys

from rltk.cli import run_entry, wants_help
from rltk.compose import load
from rltk.errors import ConfigError
from rltk.genrm_checks import genrm_problems
from rltk.model_folder import resolve_model
from rltk.placement import place
from rltk.value_checks import value_problems

PLACE = {"host": "127.0.0.1", "port": "8000"}


def main(argv: list[str]) -> int:
    if wants_help(argv):
        print(__doc__)
        return 0
    place_of = PLACE | {key: value for key, _, value in (a.partition("=") for a in argv) if key in PLACE}
    config = resolve_model(load([argument for argument in argv if argument.partition("=")[0] not in PLACE]))
    if problems := [*value_problems(config), *genrm_problems(config)]:
        raise ConfigError("\n".join(problems))
    options = config.reward.genrm
    if not options.enabled:
        raise ConfigError("which judge? Write reward.genrm=tiny, a model's folder or id, or a server's address")
    if not place_of["port"].isdecimal() or not 0 < int(place_of["port"]) < 1 << 16:
        raise ConfigError(f"port = {place_of['port']!r} must be a number from 1 to 65535")
    _check_free(place_of["host"], int(place_of["port"]))
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("fastapi") is None:
        raise ConfigError('Ray Serve is not installed: pip install "ray[serve]" grpcio-reflection')

    from rltk import watch
    from rltk.cluster import connect
    from rltk.rewards.genrm import serve
    from rltk.roles import Roles, start_judges

    nobody = dataclasses.replace(config.rollout, engines=0, workers=0), dataclasses.replace(config.learner, ranks=0)
    placement = place(dataclasses.replace(config, rollout=nobody[0], learner=nobody[1]))
    with connect(config.cluster, placement):
        print("starting the judge ...", file=sys.stderr)
        roles = Roles()
        try:
            start_judges(roles.judges, config, placement)
            service = roles.judges.service
            ready = service.ready.remote()  # pyright: ignore[reportOptionalMemberAccess]
            version = watch.get(ready, "start", "rltk.serve", "genrm service", options.start_s, peek=[service])
            url = serve.start(service, options, place_of["host"], int(place_of["port"]))
            print(f"{version}\nPOST {url}/judge   GET {url}/health   Ctrl-C ends it", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.pause()
        except KeyboardInterrupt:
            pass
        finally:
            serve.stop()
            roles.stop()
    return 0


def _check_free(host: str, port: int) -> None:
    """Ray Serve would share a port with another one's front, and each get some of the questions."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be had: {error.strerror}; take another port=<number>") from None


if __name__ == "__main__":
    run_entry(main)
