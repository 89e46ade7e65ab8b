"""``python -m ditrelay`` = ``ditrelay``."""

from __future__ import annotations

import sys

from ditrelay.cli import main

if __name__ == "__main__":
    sys.exit(main())
