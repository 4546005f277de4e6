"""python -m rltk.report runs/<name> [...]"""

from __future__ import annotations

import sys

from rltk.errors import ConfigError
from rltk.report import build


def main(folders: list[str]) -> int:
    if not folders:
        print("usage: python -m rltk.report runs/<name> [...]", file=sys.stderr)
        return 2
    try:
        for folder in folders:
            print(build(folder))
    except ConfigError as error:
        print(f"rltk: {error}", file=sys.stderr)
        return ConfigError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
