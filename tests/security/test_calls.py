"""The parent's side: many calls at once, a parent that dies, nothing left open."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rltk.rollout.jail import Jail
from rltk.rollout.tools.options import JailOptions
from tests.security.arena import User, start, users

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def jail() -> Jail:
    return Jail(JailOptions(wall_factor=20.0))


def test_two_hundred_calls_at_once(jail: Jail):
    sources = [f"print({n} ** 2)" if n % 2 else f"print('so far'); raise ValueError({n})" for n in range(200)]
    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(jail.run, sources))
    assert [result.status for result in results] == ["error", "ok"] * 100
    assert [result.text for result in results[1::2]] == [f"{n * n}\n" for n in range(1, 200, 2)]
    assert all(f"ValueError: {n}" in results[n].text for n in range(0, 200, 2))


def test_calls_do_not_see_each_other(jail: Jail):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(jail.run, "import builtins, time\nbuiltins.left = 1; time.sleep(.3)")
        second = pool.submit(jail.run, "import builtins\nprint(hasattr(builtins, 'left'))")
    assert first.result().status == "ok"
    assert second.result().text == "False\n"


@pytest.mark.parametrize("user", users(), ids=lambda user: user.name)
@pytest.mark.parametrize("program", ["sleeps", "computes", "prints"])
def test_a_call_dies_with_its_parent(user: User, program: str, folder: Path):
    if user.problem:
        pytest.skip(user.problem)
    with start(user, folder, "tests.security.executor", program) as executor:
        assert executor.stdout is not None
        assert executor.stdout.readline() == "ready\n"
        children = _wait(lambda: _children(executor.pid))
        executor.kill()
        executor.wait()
        _wait(lambda: not any(_lives(child) for child in children))


def test_nothing_stays_open(jail: Jail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with_files = Jail(JailOptions(files_mib=1))
    before, children = os.listdir("/proc/self/fd"), set(_children(os.getpid()))  # those of other tests may live yet
    for source in ("print(1)", "1/0", "import os; os._exit(0)", "while True: print(1)", "open('a', 'w').write('x')"):
        for one in (jail, with_files):
            one.run(source)
    assert os.listdir("/proc/self/fd") == before
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[]]
    del with_files, one
    assert list(tmp_path.iterdir()) == []
    assert set(_children(os.getpid())) <= children


def test_a_jail_that_is_forgotten_gives_its_rules_back():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Jail(JailOptions())
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_file_descriptors_left_is_an_infrastructure_error(jail: Jail):
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        result = jail.run("print(1)")
    finally:
        for one in taken:
            os.close(one)
    assert result.status == "infra_error"
    assert jail.run("print(1)").text == "1\n"


def _children(parent: int) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = status.read_text().rsplit(")", 1)
        except OSError:
            continue
        if int(fields.split()[1]) == parent:
            found.append(status.parent.name)
    return found


def _lives(pid: str) -> bool:
    """A process that waits to be reaped, by whoever adopted it, does not."""
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _wait(condition):
    until = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value
