"""Control-plane structs of previews; ``messages`` has the others, and says which of all are commands and events."""

from __future__ import annotations

import msgspec

from ditrelay.runtime.request import Request


class Preview(msgspec.Struct, frozen=True, tag=True):
    """Make a picture of what a denoise elsewhere left in the spool, once nothing else is to do; answer ``Previewed``.

    At most one is out per rank, but for those that the head has given up. The rank holds nothing of ``request`` for it.
    ``spare``: seconds in which no other work for the rank is expected.
    """

    rank: int
    request: Request
    spare: float = 0.0


class PreviewTaken(msgspec.Struct, frozen=True, tag=True):
    """What the picture is like after ``step`` is in the spool, in place of an older one that nobody has taken."""

    rank: int
    request_id: str
    step: int


class Previewed(msgspec.Struct, frozen=True, tag=True):
    """A small JPEG file of what a picture is like after ``step`` of ``total``, or ``None``: it came to nothing."""

    rank: int
    request_id: str
    step: int
    total: int
    jpeg: bytes | None
    at: float
