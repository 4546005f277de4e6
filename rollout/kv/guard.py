"""Stops an engine whose processes have not loaded the plugin: importing this module is the check.

vLLM resolves `worker_extension_cls` in every worker. A platform that does not know the backend `CUSTOM` would pass over
it and run a full cache in silence; a plugin that was not loaded cannot object, so this does.
"""

from __future__ import annotations

from rltk.errors import ConfigError
from rltk.rollout.kv import plugin

if not plugin.registered:
    raise ConfigError(
        "this process asks for a compressed KV cache and has not loaded the vLLM plugin rltk_kv: the cache would be "
        "full. Fix: `pip install` the package (an entry point in vllm.general_plugins), and name rltk_kv in "
        "VLLM_PLUGINS if that is set."
    )


class PluginLoaded:
    """An empty worker extension."""
