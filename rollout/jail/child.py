"""Runs inside: gives up every right it can, then runs the source. call.py starts it: `python -P -s -S -B child.py FD`.

Standard library only, and as few imports as possible: each call pays for them.
"""

import ctypes
import marshal
import os
import resource
import sys

SOURCE = "<tool>"  # the file name in what the source raises
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SIGKILL = 9
RESTRICT_SELF = 446  # landlock_restrict_self
FRAMES, ERROR_CHARACTERS = 4, 2000  # of an error's traceback and message


class Packages:
    """Finds the modules that may be read, and no other: an optional import of another package fails as if it were not
    installed, rather than with PermissionError, which few packages expect.
    """

    def __init__(self, names, folders):
        self.names, self.folders = frozenset(names), folders
        self.finder = sys.meta_path[-1]  # importlib's PathFinder

    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, self.folders) if path is None and name in self.names else None


def confine(parent, limits, rules, filter):
    """From here on: the limits hold, no new rights, no file but those in `rules`, no system call but those in `filter`.

    Order matters: whatever a later step forbids must be done before it. Raises OSError where a step fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # should memory run out, this process goes first
            file.write("1000")
    except OSError:
        pass
    for which, value in limits:
        hardest = resource.getrlimit(which)[1]  # only root may go above it
        value = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(which, (value, value))
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capset(2), version 3, this process: root keeps its name only
    must(libc.capset(header, (ctypes.c_uint32 * 6)()))
    must(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    must(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if rules >= 0:
        must(libc.syscall(RESTRICT_SELF, rules, 0))
        os.close(rules)
    if filter:

        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

        must(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(Program(len(filter) // 8, filter)), 0, 0))


def run(source):
    """(how it ended, what to tell the model): ok | error | oom."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    try:
        code = compile(source, SOURCE, "exec", dont_inherit=True)
    except MemoryError:  # the parser's stack as well as memory
        return "error", "MemoryError: the source is too long or too deeply nested to compile"
    except BaseException as error:
        return "error", last_line(error)
    try:
        exec(code, module.__dict__)
    except MemoryError as error:
        return "oom", described(error, source)
    except SystemExit as error:
        return ("ok", "") if error.code in (None, 0) else ("error", last_line(error))
    except BaseException as error:
        return "error", described(error, source)
    return "ok", ""


def described(error, source):
    """The traceback, without this file's frames: line numbers and the lines."""
    lines = source.splitlines()
    numbers = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == SOURCE:
            numbers.append(trace.tb_lineno)
        trace = trace.tb_next
    frames = [f"  line {n}: {lines[n - 1].strip()[:100] if n <= len(lines) else ''}" for n in numbers[-FRAMES:]]
    return "\n".join(["Traceback (most recent call last):", *frames, last_line(error)])


def last_line(error):
    try:
        message = str(error)
    except BaseException:
        message = ""
    name = type(error).__name__
    return (f"{name}: {message}" if message else name)[:ERROR_CHARACTERS]


def main():
    job = int(sys.argv[1])
    with open(job, "rb") as file:
        source, parent, limits, rules, filter, record, names, folders = marshal.loads(file.read())
    sys.argv[:] = [SOURCE]
    sys.meta_path.append(Packages(names, folders))
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    sys.stderr.reconfigure(errors="replace")
    confine(parent, limits, rules, filter)
    write = os.write
    write(record, b"started\n")
    try:
        source = source.decode()
    except UnicodeDecodeError as error:
        ended, text = "error", f"SyntaxError: {error}"
    else:
        ended, text = run(source)
    write(record, f"{ended}\n{text}".encode(errors="replace"))


main()
