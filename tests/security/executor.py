"""A parent to kill: `python -m tests.security.executor SCRATCH PROGRAM` runs a program in the jail and waits for it."""

from __future__ import annotations

import sys

from rltk.rollout.jail import Jail
from rltk.rollout.tools.options import JailOptions

# Each first tries to outlive its parent: PR_SET_PDEATHSIG off, and every signal ignored.
STAY = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
"""
PROGRAMS = {
    "sleeps": "import time\ntime.sleep(3600)",
    "computes": "while True: pass",
    "prints": "import time\nwhile True:\n  try: print('x')\n  except OSError: pass\n  time.sleep(.001)",
}

jail = Jail(JailOptions(cpu_s=600.0, output_kib=2**20))
print("ready", flush=True)
jail.run(STAY + PROGRAMS[sys.argv[2]])
