"""`python -m tests.security.table`: every attack as every user; what came of it goes into docs/security.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.security.arena import arena, attacked, users
from tests.security.attack import ATTACKS

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- attacks: written by python -m tests.security.table -->", "<!-- end of attacks -->"
Lines = dict[str, dict[str, Any]]  # attack -> what it came to


def all_attacks() -> dict[str, Lines]:
    """{user: what each attack came to}, of the users that can be had here."""
    with arena() as folder:
        return {user.name: attacked(user, folder, list(ATTACKS)) for user in users() if not user.problem}


def held(came_to: dict[str, Lines]) -> list[str]:
    """The attacks that harmed nothing, whoever ran them."""
    return [name for name in ATTACKS if not any(lines[name]["harm"] for lines in came_to.values())]


def table(came_to: dict[str, Lines]) -> str:
    """Markdown, a part for each group of attacks."""
    parts = [f"{len(held(came_to))} of {len(ATTACKS)} attacks were held, each as {' and as '.join(came_to)}."]
    for group in dict.fromkeys(attack.group for attack in ATTACKS.values()):
        parts += ["", f"| {group} | {' | '.join(came_to)} |", "|---" * (1 + len(came_to)) + "|"]
        for name, attack in ATTACKS.items():
            if attack.group == group:
                cells = " | ".join(_cell(lines[name]) for lines in came_to.values())
                parts.append(f"| {attack.name} | {cells} |")
    return "\n".join(parts)


def _cell(line: dict[str, Any]) -> str:
    ended = f"{line['status']} ({line['limit']})" if line["limit"] else line["status"]
    return f"HARM: {'; '.join(line['harm'])}" if line["harm"] else f"held: {ended}"


def main() -> int:
    came_to = all_attacks()
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(came_to)}\n{END}{after}")
    open_ones = sorted(set(ATTACKS) - set(held(came_to)))
    print(f"{PAGE}: {len(ATTACKS)} attacks as {', '.join(came_to)}; not held: {', '.join(open_ones) or 'none'}")
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
