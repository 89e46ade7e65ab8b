"""Finished pictures kept in memory, to be fetched by address."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredFile:
    """A file's bytes, its MIME type, and when it expires on the store's clock."""

    content: bytes
    media_type: str
    expires: float


class FileStore:
    """Holds files under unguessable ids of its own making, bounded by count, bytes and age; the oldest go first.

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

    def add(self, content: bytes, media_type: str) -> str:
        """Keep a file and return its id: 32 characters that are safe in an address and hold 192 random bits."""
        file_id = secrets.token_urlsafe(24)
        self._files[file_id] = StoredFile(content, media_type, self._clock() + self.lifetime)
        self.nbytes += len(content)
        self._drop_expired()
        while len(self._files) > 1 and (len(self._files) > self._max_files or self.nbytes > self._max_bytes):
            self._drop_oldest()
        return file_id

    def get(self, file_id: str) -> StoredFile | None:
        """The file of that id, or ``None`` where there is none (any more)."""
        self._drop_expired()
        return self._files.get(file_id)

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._files and next(iter(self._files.values())).expires <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self.nbytes -= len(file.content)
