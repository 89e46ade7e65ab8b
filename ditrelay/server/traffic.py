"""What the connections of all clients hold at the moment, and how often one was turned away."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

TURNED_AWAY = ("idle", "too_many", "header_timeout", "write_timeout", "unsent_bytes")
"""Why a connection was closed or refused."""


@dataclass
class Traffic:
    """Belongs to the event loop's thread.

    Attributes:
        limit: connections at a time; 0 where nobody counts them.
        connections: open ones.
        busy: those with a request that is not answered yet.
        unsent: bytes of answers that their clients have not taken yet.
        turned_away: connections that were closed or refused, by reason.
    """

    limit: int = 0
    connections: int = 0
    busy: int = 0
    unsent: int = 0
    turned_away: Counter[str] = field(default_factory=Counter)
