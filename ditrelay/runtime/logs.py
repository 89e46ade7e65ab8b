"""Log lines of the head and of every worker: ``[LEVEL] message`` on stderr, never wrapped."""

from __future__ import annotations

import logging

LINE_FORMAT = "[%(levelname)s] %(message)s"


def configure(level: str) -> None:
    """Send this process's log lines to stderr, ditrelay's own from ``level`` up.

    Other libraries speak from ``warning`` up only. May be called again; the last call counts.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    chosen = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(chosen, logging.WARNING), format=LINE_FORMAT, force=True)
    logging.getLogger("ditrelay").setLevel(chosen)
