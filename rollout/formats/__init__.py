"""How models write tool calls, one way a file: python_block, retool, json; environment for runs that act by turns."""

from rltk.rollout.formats.format import Format, build_format, told

__all__ = ["Format", "build_format", "told"]
