"""Finished pictures kept in memory, to be fetched by address."""

from __future__ import annotations

import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredFile:
    """A file's bytes, its MIME type, when it expires on the store's clock, and whose it is."""

    content: bytes
    media_type: str
    expires: float
    client: str = ""


class FileStore:
    """Holds files under unguessable ids of its own making, bounded by count, bytes and age.

    Where there is no room, the oldest of the client that holds the most goes: no client's burst takes another's files.

    Args:
        max_files: files held at most.
        max_bytes: bytes held at most. The newest file stays even where it alone is larger.
        lifetime: seconds that a file is held at most.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        max_files: int = 1000,
        max_bytes: int = 256 << 20,
        lifetime: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lifetime = lifetime
        self.nbytes = 0
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._clock = clock
        self._files: OrderedDict[str, StoredFile] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._files)

    def add(self, content: bytes, media_type: str, client: str = "") -> str:
        """Keep a file and return its id: 32 characters that are safe in an address and hold 192 random bits."""
        self._drop_expired()
        file_id = secrets.token_urlsafe(24)
        self._files[file_id] = StoredFile(content, media_type, self._clock() + self.lifetime, client)
        self.nbytes += len(content)
        while len(self._files) > 1 and len(self._files) > self._max_files:
            self._drop(oldest_of_most({key: (file.client, 1) for key, file in self._files.items()}))
        while len(self._files) > 1 and self.nbytes > self._max_bytes:
            self._drop(oldest_of_most({key: (file.client, len(file.content)) for key, file in self._files.items()}))
        return file_id

    def get(self, file_id: str) -> StoredFile | None:
        """The file of that id, or ``None`` where there is none (any more)."""
        self._drop_expired()
        return self._files.get(file_id)

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._files and next(iter(self._files.values())).expires <= now:
            self._drop(next(iter(self._files)))

    def _drop(self, file_id: str) -> None:
        self.nbytes -= len(self._files.pop(file_id).content)


def oldest_of_most(held: Mapping[str, tuple[str, int]]) -> str:
    """What goes where there is no room: the oldest thing of the client that holds the most; the newest of all never.

    Args:
        held: whose each thing is and how much of it there is, the oldest first; two at least.
    """
    shares: Counter[str] = Counter()
    for client, amount in held.values():
        shares[client] += amount
    *older, _ = held
    clients = {held[key][0] for key in older}
    most = max(clients, key=lambda client: shares[client])
    return next(key for key in older if held[key][0] == most)
