"""Runs Python that nobody trusts: Landlock, seccomp and limits in a fresh interpreter. Standard library only.

    Jail(JailOptions()).run("print(2 ** 100)") -> ToolResult("ok", "1267650600228229401496703205376\\n", ...)

docs/security.md has the threats, the boundary, what every attack comes to, and what is not defended.
"""

from rltk.rollout.jail.capabilities import Capabilities, capabilities
from rltk.rollout.jail.run import Jail

__all__ = ["Capabilities", "Jail", "capabilities"]
