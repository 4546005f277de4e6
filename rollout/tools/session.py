"""A session by replay: the program that repeats a trajectory's successful blocks unseen, then runs the new one.

No process is kept between calls, so limits and crashes stay those of one call; the price is that earlier work is done
again and counts against the call's limits. Python's and numpy's global random generators start from the same seed every
time, or a repeated draw would differ; only the clock is not repeated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# The blocks share the program's own globals, and nothing of ours stays in them. Output of repeated blocks goes to
# /dev/null by descriptor, as a block may hold on to sys.stdout.
REPEAT = """
def __session__(space, blocks, seed):
    import os, sys
    del space["__session__"]
    if "random" in seed:
        import random
        random.seed(0)
    if "numpy" in seed:
        import numpy
        numpy.random.seed(0)
    kept = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    problem = None
    for number, block in enumerate(blocks, 1):
        try:
            exec(compile(block, "<block>", "exec"), space)
        except SystemExit:
            pass
        except BaseException as error:
            problem = "block %d of this session failed when it was repeated: %r" % (number, error)
            break
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()
        except Exception:
            pass
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for number, descriptor in enumerate(kept, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.close(null)
    if problem:
        raise RuntimeError(problem)
"""
TRACEBACK = "Traceback (most recent call last):\n"


def compose(history: Sequence[str], code: str) -> str:
    """`history`: the session's successful blocks, oldest first. What comes before `code` is one line."""
    text = "\n".join([*history, code])
    seed = [module for module in ("random", "numpy") if module in text and "random" in text]
    if not history and not seed:
        return "\n" + code
    repeat = f"{REPEAT}\n__session__(globals(), {list(history)!r}, {seed!r})"
    return f"exec({repeat!r})\n{code}"


def renumbered(text: str) -> str:
    """An error's text with the line numbers of the code as its author knows it: one less."""
    before, header, trace = text.rpartition(TRACEBACK)
    if not header:  # a syntax error has no traceback
        before, _, trace = text.rpartition("\n")
        before += "\n" if before else ""
    trace = re.sub(r"(?m)^  line 1: .*\n", "", trace)
    return before + header + re.sub(r"(?m)(^  line |\(<tool>, line )(\d+)", _one_less, trace)


def _one_less(match: re.Match[str]) -> str:
    return f"{match[1]}{int(match[2]) - 1}"
