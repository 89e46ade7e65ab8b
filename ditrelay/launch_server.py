"""``python -m ditrelay.launch_server ARGS`` = ``ditrelay serve ARGS``."""

from __future__ import annotations

import sys

from ditrelay.__main__ import run


def main() -> int:
    from ditrelay.cli import main as ditrelay

    return ditrelay(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    run(main)
