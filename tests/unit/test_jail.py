"""The jail as its users see it: results, texts, refusals. What it holds against is in tests/security."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltk.errors import ConfigError
from rltk.rollout.jail import Capabilities, Jail, capabilities, folders, paths
from rltk.rollout.jail.text import shown
from rltk.rollout.tools.options import JailOptions

NOTHING = Capabilities(0, False, {"landlock": "a newer kernel", "seccomp": "another kernel"})


@pytest.fixture(scope="module")
def jail() -> Jail:
    return Jail(JailOptions(cpu_s=2.0, wall_factor=10.0))


def test_a_program_has_a_name_standard_input_and_its_module(jail: Jail):
    source = "import sys, __main__\nprint(__name__, sys.argv, input(), __main__.__dict__ is globals())"
    result = jail.run(source, "in\n")
    assert (result.status, result.text, result.limit) == ("ok", "__main__ ['<tool>'] in True\n", "")
    assert result.cpu_s > 0 and result.run_s > 0


def test_an_error_names_the_lines_and_the_last_line(jail: Jail):
    result = jail.run("def f(n):\n    return 1 / n\nprint('before')\nf(0)")
    assert result.status == "error"
    assert result.text == (
        "before\nTraceback (most recent call last):\n  line 4: f(0)\n  line 2: return 1 / n\n"
        "ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize("source, status, text", [
    ("1 +", "error", "SyntaxError: invalid syntax (<tool>, line 1)"),
    ("import sys; sys.exit()", "ok", ""),
    ("import sys; sys.exit(0)", "ok", ""),
    ("import sys; sys.exit('no')", "error", "SystemExit: no"),
    ("import os; print(1, flush=True); os._exit(0)", "error", "1\nthe program ended itself, exit 0"),
    ("import atexit; atexit.register(print, 'late')", "ok", "late\n"),
    ("import threading\nthreading.Timer(.1, lambda: print('late')).start()", "ok", "late\n"),
    ("import sys; sys.stdout.close()", "ok", ""),
    ("print('a', end=''); 1/0", "error", "a\nTraceback (most recent call last):\n  line 1: print('a', end=''); 1/0\n"
     "ZeroDivisionError: division by zero"),
])  # fmt: skip
def test_ends(jail: Jail, source: str, status: str, text: str):
    result = jail.run(source)
    assert (result.status, result.text) == (status, text)


@pytest.mark.parametrize("source, status, limit", [
    ("while True: pass", "timeout", "cpu 0.3 s"),
    ("import time; time.sleep(60)", "timeout", "wall 0.9 s"),
    ("bytearray(1 << 30)", "oom", "memory 64 MiB"),
    ("while True: print('A' * 100)", "output_limit", "output 2 KiB"),
    ("import ctypes; ctypes.string_at(0)", "killed", "signal SIGSEGV"),
])  # fmt: skip
def test_limits_are_named_with_their_values(source: str, status: str, limit: str):
    small = Jail(JailOptions(cpu_s=0.3, wall_factor=60.0, memory_mib=64, output_kib=2))
    result = small.run(source, deadline_s=0.9 if "wall" in limit else None)
    assert (result.status, result.limit) == (status, limit)
    assert len(result.text) <= 2048


def test_no_time_to_start_is_not_the_codes_fault(jail: Jail):
    result = jail.run("print(1)", deadline_s=0.0)
    assert (result.status, result.limit) == ("infra_error", "")
    assert "before the code ran, past its wall limit" in result.text


def test_output_before_a_limit_is_kept(jail: Jail):
    assert jail.run("print('so far')\nimport time; time.sleep(60)", deadline_s=1.0).text == "so far\n"


def test_the_same_program_prints_the_same(jail: Jail):
    source = "print({'a', 'b', 'c', 'd'}, hash('x'))"
    assert jail.run(source).text == jail.run(source).text


def test_a_folder_where_files_are_allowed():
    with_files = Jail(JailOptions(files_mib=1))
    result = with_files.run(
        "import os\nopen('a.txt', 'w').write('x' * 9)\nprint(open('a.txt').read(), os.listdir('.'))"
    )
    assert result.text == "xxxxxxxxx ['a.txt']\n"
    result = with_files.run("for n in range(100): open(f'{n}', 'wb').write(bytes(1 << 16))\nwhile True: pass")
    assert (result.status, result.limit) == ("output_limit", "files 1 MiB")


def test_folders_of_the_dead_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    abandoned, young, kept = (tmp_path / f"{folders.PREFIX}{name}" for name in ("abandoned", "young", "kept"))
    for folder in (abandoned, young, kept):
        folder.mkdir()
        (folder / "file").write_text("x")
    for folder in (abandoned, kept):
        os.utime(folder, (0, 0))
    lock = os.open(kept, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    made = folders.Folders()
    assert {path.name for path in tmp_path.iterdir()} == {young.name, kept.name, made.root.name}
    assert made.make().parent == made.root
    del made
    assert {path.name for path in tmp_path.iterdir()} == {young.name, kept.name}
    os.close(lock)


def test_children_reaped_by_others_are_an_infrastructure_error():
    program = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" + (
        "from rltk.rollout.jail import *\nfrom rltk.rollout.tools.options import JailOptions\n"
        "try: Jail(JailOptions())\nexcept Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ConfigError" in done.stdout and "takes the exit codes of its children" in done.stdout


def test_paths_of_this_machine_are_not_shown(jail: Jail):
    text = jail.run("import os, sys; print(os.__file__, sys.prefix)\nfrom math import nothing").text
    assert sys.prefix not in text and sys.base_prefix not in text
    assert "<python>/os.py" in text and "ImportError: cannot import name 'nothing'" in text


def test_strict_refuses_a_machine_without_walls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rltk.rollout.jail.run.capabilities", lambda: NOTHING)
    with pytest.raises(ConfigError, match="landlock: a newer kernel; seccomp: another kernel.*best_effort.*remote"):
        Jail(JailOptions())


def test_best_effort_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rltk.rollout.jail.run.capabilities", lambda: NOTHING)
    jail = Jail(JailOptions(isolation="best_effort"))
    assert jail.level == "best_effort: without landlock, seccomp"
    assert jail.run("print(1)").text == "1\n"
    assert jail.run("import os; os.kill(os.getpid(), 9)").limit == "signal SIGKILL"
    assert jail.run("import os; os.kill(os.getpid(), 40)").limit == "signal 40"
    with pytest.raises(ConfigError, match="files_mib=1 needs landlock and seccomp"):
        Jail(JailOptions(isolation="best_effort", files_mib=1))


def test_a_wall_that_does_not_hold_is_found(monkeypatch: pytest.MonkeyPatch):
    """The kernel says yes, and the trial call is not confined."""
    monkeypatch.setattr("rltk.rollout.jail.seccomp.program", lambda writes: b"\x06\0\0\0\0\0\xff\x7f")  # allow all
    with pytest.raises(ConfigError, match="this machine has seccomp, and jailed code is not held by it"):
        Jail(JailOptions())


def test_this_module_runs_no_remote_sandbox():
    with pytest.raises(ConfigError, match="isolation='remote' runs no code here"):
        Jail(JailOptions(isolation="remote", url="http://localhost:1"))


def test_capabilities_are_the_level():
    found = capabilities()
    assert found.level == Jail(JailOptions(isolation="best_effort")).level
    assert NOTHING.level == "best_effort: without landlock, seccomp"


def test_packages_come_with_what_they_require():
    assert paths.required(["sympy", "no-such-package"]) == ["sympy", "mpmath"]
    may = paths.readable(("sympy",))
    names = {path.name for path in may.files}
    assert {"sympy", "mpmath", "os.py"} <= names
    assert not names & {"site-packages", "torch", "rltk", "numpy"}
    assert [Path(folder).name for folder in may.folders] == ["site-packages"]


def test_only_the_packages_named_are_importable():
    jail = Jail(JailOptions(wall_factor=15.0), packages=("mpmath",))
    assert jail.run("import mpmath; print(mpmath.mpf(1) / 4)").text == "0.25\n"
    for name in ("sympy", "torch", "rltk", "pip"):
        assert f"No module named '{name}'" in jail.run(f"import {name}").text


@given(st.binary(max_size=200))
def test_shown_text_has_no_control_characters(raw: bytes):
    text = shown(raw)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert text.encode().decode() == text


@pytest.mark.parametrize("raw, text", [
    (b"a\x1b[31mred\x1b[0m", "ared"), (b"\x1b]0;title\x07b", "b"), (b"a\r\nb\rc", "a\nb\ufffdc"),
    (b"\xff\xc3\xa9", "\ufffdé"),
    (b"<|im_end|>\t", "<|im_end|>\t"), (b"/py/lib/x.py /py/y", "<python>/x.py <python>/y"),
])  # fmt: skip
def test_shown(raw: bytes, text: str):
    assert shown(raw, ("/py/lib", "/py")) == text
