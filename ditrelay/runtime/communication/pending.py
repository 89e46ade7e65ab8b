"""Transfers that are under way, and how many of them there may be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from ditrelay.errors import TransferError
from ditrelay.runtime.communication.transport import Work, wait_all, wait_until_done


@dataclass
class PendingTransfer:
    """The works of one batch, and its tensors, which must live (and stay as they are) until the works are done."""

    batch_id: str
    works: list[Work]
    tensors: dict[str, torch.Tensor | list[torch.Tensor]]
    nbytes: int = 0

    def done(self) -> bool:
        """True once every work is complete or failed."""
        return all(work.done() for work in self.works)

    @property
    def error(self) -> TransferError | None:
        """The first work's error, if any failed."""
        return next((work.error for work in self.works if work.error is not None), None)

    def wait(self, timeout: float | None = None) -> None:
        """Block until every work is done, ``timeout`` seconds at most.

        Raises:
            TransferTimeout: something is still under way; the tensors must be kept.
            TransferError: nothing is under way any more and at least one work failed.
        """
        wait_all(self.works, timeout)


class TransferWindow:
    """The transfers under way from (or to) one rank, bounded by number and bytes. Belongs to one thread.

    It never blocks by itself: ask ``has_room`` before ``add``, and ``reap`` what is finished.
    """

    def __init__(self, max_transfers: int, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pending: deque[PendingTransfer] = deque()
        self.resize(max_transfers)

    def __len__(self) -> int:
        return len(self._pending)

    def __repr__(self) -> str:
        return f"<TransferWindow {len(self)}/{self.max_transfers} transfers, {self.nbytes}/{self._max_bytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all transfers in the window."""
        return sum(pending.nbytes for pending in self._pending)

    def resize(self, max_transfers: int) -> None:
        """Change the limit; what is in the window stays in it.

        Raises:
            ValueError: ``max_transfers`` is below 1.
        """
        if max_transfers < 1:
            raise ValueError(f"max_transfers is {max_transfers}; at least one transfer must fit")
        self.max_transfers = max_transfers

    def has_room(self, nbytes: int) -> bool:
        """Whether one more transfer of ``nbytes`` keeps both limits."""
        return len(self) < self.max_transfers and self.nbytes + nbytes <= self._max_bytes

    def add(self, pending: PendingTransfer) -> None:
        self._pending.append(pending)

    def oldest(self) -> PendingTransfer:
        """The transfer that was added first; the window must not be empty."""
        return self._pending[0]

    def reap(self) -> list[PendingTransfer]:
        """Take out what is done, in the order it was added. A failed one is among them: look at its ``error``."""
        finished = [pending for pending in self._pending if pending.done()]
        self._pending = deque(pending for pending in self._pending if not pending.done())
        return finished

    def drain(self, timeout: float | None = None) -> list[PendingTransfer]:
        """Wait until everything is done, then take it out as ``reap`` does.

        Raises:
            TransferTimeout: something is still under way after ``timeout`` seconds; all stays in the window.
        """
        wait_until_done((work for pending in self._pending for work in pending.works), timeout)
        return self.reap()
