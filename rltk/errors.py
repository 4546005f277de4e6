"""Errors of rltk. Each message names the thing, the value and the fix."""


class RltkError(Exception):
    """Base of every error that rltk raises on purpose."""


class ConfigError(RltkError):
    """The run as asked for cannot start. Entry points print it without a traceback and exit with 2."""

    exit_code = 2


class DeadlineError(RltkError):
    """A named wait across processes passed its deadline (see `rltk.watch`)."""


class WeightMismatchError(RltkError):
    """An engine's weights are not the learner's: version, checksum or probe differ."""


class MismatchError(RltkError):
    """Data that must line up does not: lengths, log-probs, masks, prefixes."""


class InfrastructureError(RltkError):
    """Something outside the policy failed (a worker died, a judge is down). Never becomes a reward or a token."""
