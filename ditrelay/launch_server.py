"""``python -m ditrelay.launch_server ARGS`` = ``ditrelay serve ARGS``."""

from __future__ import annotations

import sys

from ditrelay.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
