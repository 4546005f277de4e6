"""Every attack, as every user: held, and nothing harmed. And where a wall is missing, harm is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.arena import User, attacked, users
from tests.security.attack import ATTACKS
from tests.security.table import BEGIN, END, PAGE

ORDINARY = users()[-1]
# What one wall holds by itself: the filter all but reading, Landlock the reading.
BY_SECCOMP = ("processes", "writing", "network")
BY_LANDLOCK = ("secrets",)
HANDLE = "secrets: a file by handle"  # the handle is given, and of no use without a right that only root has
# Harmful without walls, yet not to this machine.
HARMLESS = (
    "processes: fork", "processes: daemon in a new session", "other processes: slow the parent down",
    "secrets: a file beside it", "secrets: environment of the parent", "secrets: ~/.ssh", "writing: a file beside it",
    "network: TCP to this machine", "network: UDP", "network: Unix socket", "network: abstract Unix socket",
    "left behind in the kernel: memfd_create",
)  # fmt: skip


@pytest.mark.parametrize("user", users(), ids=lambda user: user.name)
def test_every_attack_is_held(user: User, folder: Path):
    if user.problem:
        pytest.skip(user.problem)
    came_to = attacked(user, folder, list(ATTACKS))
    assert len(came_to) == len(ATTACKS)
    assert {name: line["harm"] for name, line in came_to.items() if line["harm"]} == {}


@pytest.mark.skipif(bool(ORDINARY.problem), reason=ORDINARY.problem)
@pytest.mark.parametrize("walls, groups", [(["seccomp"], BY_SECCOMP), (["landlock"], BY_LANDLOCK)], ids=str)
def test_one_wall_alone_holds_its_own(walls: list[str], groups: tuple[str, ...], folder: Path):
    names = [name for name, attack in ATTACKS.items() if attack.group in groups and name != HANDLE]
    came_to = attacked(ORDINARY, folder, names, walls)
    assert {name: line["harm"] for name, line in came_to.items() if line["harm"]} == {}


@pytest.mark.skipif(bool(ORDINARY.problem), reason=ORDINARY.problem)
def test_without_walls_harm_is_seen(folder: Path):
    came_to = attacked(ORDINARY, folder, HARMLESS, walls=[])
    assert [name for name, line in came_to.items() if not line["harm"]] == []


def test_the_table_in_the_docs_has_every_attack_and_no_harm():
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    names = [line.split(" | held: ")[0].removeprefix("| ") for line in table.splitlines() if " | held: " in line]
    assert sorted(names) == sorted(attack.name for attack in ATTACKS.values()) and "HARM" not in table
