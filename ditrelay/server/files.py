"""Finished pictures kept in memory, to be fetched by address."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
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
        self._files: dict[str, StoredFile] = {}  # oldest first
        self._shares = Shares()

    def __len__(self) -> int:
        return len(self._files)

    def add(self, content: bytes, media_type: str, client: str = "") -> str:
        """Keep a file and return its id: 32 characters that are safe in an address and hold 192 random bits."""
        self._drop_expired()
        file_id = secrets.token_urlsafe(24)
        self._files[file_id] = StoredFile(content, media_type, self._clock() + self.lifetime, client)
        self.nbytes += len(content)
        self._shares.add(file_id, client, len(content))
        while len(self._files) > 1 and len(self._files) > self._max_files:
            self._drop(self._shares.oldest_of_most_things())
        while len(self._files) > 1 and self.nbytes > self._max_bytes:
            self._drop(self._shares.oldest_of_most_bytes())
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
        self._shares.remove(file_id)


class Shares:
    """What each client holds. Says what goes where there is no room: the oldest thing of the client that holds the
    most; the newest of all never."""

    def __init__(self) -> None:
        self._things: dict[str, tuple[str, int]] = {}  # the client and the bytes of each, oldest first
        self._of: dict[str, dict[str, None]] = {}  # the things of each client, oldest first
        self._nbytes: Counter[str] = Counter()

    def add(self, key: str, client: str, nbytes: int = 0) -> None:
        self._things[key] = client, nbytes
        self._of.setdefault(client, {})[key] = None
        self._nbytes[client] += nbytes

    def remove(self, key: str) -> None:
        client, nbytes = self._things.pop(key)
        self._nbytes[client] -= nbytes
        del self._of[client][key]
        if not self._of[client]:
            del self._of[client], self._nbytes[client]

    def oldest_of_most_things(self) -> str:
        """At least two things must be there."""
        return self._oldest(lambda client: len(self._of[client]))

    def oldest_of_most_bytes(self) -> str:
        """At least two things must be there."""
        return self._oldest(lambda client: self._nbytes[client])

    def _oldest(self, amount: Callable[[str], int]) -> str:
        newest = next(reversed(self._things))
        clients = (client for client, keys in self._of.items() if next(iter(keys)) != newest)
        return next(iter(self._of[max(clients, key=amount)]))
