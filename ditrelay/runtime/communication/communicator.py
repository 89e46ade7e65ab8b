"""A rank's transfers by direction: conditioning to the DiT ranks, latents back to the non-DiT ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from ditrelay.errors import TransferCorrupt, TransferError
from ditrelay.runtime.communication.transport import Early, Transport, Work, wait_all
from ditrelay.runtime.payloads import UNREADABLE, PayloadHeader
from ditrelay.runtime.topology import Edge, Role

_logger = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 16 << 20

Tensors = torch.Tensor | Sequence[torch.Tensor]


@dataclass
class _OpenEdge:
    """This rank's end of an edge. ``next_seq`` is used where the caller does not number the transfers itself."""

    generation: int
    transport: Transport
    next_seq: int = 0

    def number(self, seq: int | None) -> int:
        """``seq``, or the number after the last transfer's where it is left out."""
        number = self.next_seq if seq is None else seq
        self.next_seq = number + 1
        return number


class DisaggCommunicator:
    """All edges of one rank.

    The non-blocking methods take one tensor or several (one payload), return at once, and carry transfers of an edge
    out in the order of the calls. ``dst`` and ``src`` may be left out where the rank has exactly one edge of that
    direction; ``seq`` where both ends leave it out: transfers are then counted.

    Args:
        rank: this rank.
        roles_of: the roles of any rank.
        connect: makes this rank's end of an edge of a generation; blocks until the other end is made too.
        timeout: seconds that ``wait_work`` and the blocking methods wait at most where no other time is given.
        device: where in-band headers are put, the same as for the transports.
    """

    def __init__(
        self,
        rank: int,
        roles_of: Callable[[int], frozenset[Role]],
        connect: Callable[[Edge, int], Transport],
        timeout: float,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._rank = rank
        self._roles_of = roles_of
        self._connect = connect
        self._timeout = timeout
        self._device = device
        # Guarded by _lock: edges are opened and closed by other threads than those that transfer.
        self._lock = threading.Lock()
        self._edges: dict[Edge, _OpenEdge] = {}
        self._closed: dict[Edge, int] = {}

    # ------------------------------------------------------------ edges

    def open_edge(self, edge: Edge, generation: int) -> None:
        """Make this rank's end of ``edge``; an end of an older generation is closed.

        Raises:
            TransferError: the edge could not be made, or this generation was closed meanwhile.
        """
        transport = self._connect(edge, generation)
        with self._lock:
            stale = self._closed.get(edge, -1) >= generation
            old = None if stale else self._edges.pop(edge, None)
            if not stale:
                self._edges[edge] = _OpenEdge(generation, transport)
        if stale:
            transport.close("closed while it was opened")
            raise TransferError(str(edge), f"generation {generation} was closed while it was opened")
        if old is not None:
            old.transport.close(f"replaced by generation {generation}")
        _logger.debug("edge %s (generation %d) is open on rank %d", edge, generation, self._rank)

    def close_edge(self, edge: Edge, generation: int, reason: str) -> None:
        """Fail all transfers of this generation (and older ones) of ``edge`` with ``reason``."""
        with self._lock:
            self._closed[edge] = max(generation, self._closed.get(edge, -1))
            end = self._edges.get(edge)
            if end is None or end.generation > generation:
                return
            del self._edges[edge]
        end.transport.close(reason)
        _logger.debug("edge %s (generation %d) is closed on rank %d: %s", edge, generation, self._rank, reason)

    def close(self, reason: str = "the communicator was closed") -> None:
        """Close every edge."""
        with self._lock:
            open_now = [(edge, end.generation) for edge, end in self._edges.items()]
        for edge, generation in open_now:
            self.close_edge(edge, generation, reason)

    def generation(self, edge: Edge) -> int | None:
        """The generation of this rank's end of ``edge``; ``None`` where it is not open."""
        with self._lock:
            end = self._edges.get(edge)
        return None if end is None else end.generation

    # ------------------------------------------------------------ non-blocking transfers

    def isend_to_dit(
        self,
        tensors: Tensors,
        *,
        dst: int | None = None,
        seq: int | None = None,
        request_id: str | None = None,
        early: Early | None = None,
    ) -> Work:
        """Start to send conditioning to a DiT rank.

        Raises:
            TransferError: there is no such edge, or ``dst`` is left out and there are several.
        """
        return self._isend(self._edge("encode", "denoise", src=self._rank, dst=dst), tensors, seq, request_id, early)

    def irecv_from_non_dit(
        self,
        tensors: Tensors,
        *,
        src: int | None = None,
        seq: int | None = None,
        request_id: str | None = None,
        early: Early | None = None,
    ) -> Work:
        """Start to receive conditioning from a non-DiT rank. Raises as ``isend_to_dit``."""
        return self._irecv(self._edge("encode", "denoise", src=src, dst=self._rank), tensors, seq, request_id, early)

    def isend_to_non_dit(
        self, tensors: Tensors, *, dst: int | None = None, seq: int | None = None, request_id: str | None = None
    ) -> Work:
        """Start to send latents to a non-DiT rank. Raises as ``isend_to_dit``."""
        return self._isend(self._edge("denoise", "decode", src=self._rank, dst=dst), tensors, seq, request_id)

    def irecv_from_dit(
        self, tensors: Tensors, *, src: int | None = None, seq: int | None = None, request_id: str | None = None
    ) -> Work:
        """Start to receive latents from a DiT rank. Raises as ``isend_to_dit``."""
        return self._irecv(self._edge("denoise", "decode", src=src, dst=self._rank), tensors, seq, request_id)

    def wait_work(self, work: Work, timeout: float | None = None) -> None:
        """Block until ``work`` is complete. Raises as ``wait_all_works``."""
        self.wait_all_works([work], timeout)

    def wait_all_works(self, works: Sequence[Work], timeout: float | None = None) -> None:
        """Block until all are done, also where one fails: afterwards no tensor of theirs is in use.

        Raises:
            TransferTimeout: one is still under way; its transfer goes on and its tensors must be kept.
            TransferError: all are done and at least one failed.
        """
        wait_all(works, self._timeout if timeout is None else timeout)

    # ------------------------------------------------------------ blocking transfers

    def send_to_dit(self, tensors: Tensors, *, dst: int | None = None) -> None:
        """Send conditioning to a DiT rank and wait for it."""
        self.wait_work(self.isend_to_dit(tensors, dst=dst))

    def recv_from_non_dit(self, tensors: Tensors, *, src: int | None = None) -> None:
        """Receive conditioning from a non-DiT rank and wait for it."""
        self.wait_work(self.irecv_from_non_dit(tensors, src=src))

    def send_to_non_dit(self, tensors: Tensors, *, dst: int | None = None) -> None:
        """Send latents to a non-DiT rank and wait for it."""
        self.wait_work(self.isend_to_non_dit(tensors, dst=dst))

    def recv_from_dit(self, tensors: Tensors, *, src: int | None = None) -> None:
        """Receive latents from a DiT rank and wait for it."""
        self.wait_work(self.irecv_from_dit(tensors, src=src))

    # ------------------------------------------------------------ headers, where there is no head to carry them

    def isend_header(self, header: PayloadHeader, *, dst: int | None = None) -> list[Work]:
        """Start to send a header over the edge itself: its length, then its bytes (msgpack)."""
        encoded = bytearray(msgspec.msgpack.encode(header))
        length = torch.tensor([len(encoded)], dtype=torch.int64, device=self._device)
        body = torch.frombuffer(encoded, dtype=torch.uint8).to(self._device)
        edge = self._edge(src=self._rank, dst=dst)
        return [self._isend(edge, part, None, header.batch_id) for part in (length, body)]

    def recv_header(self, *, src: int | None = None) -> PayloadHeader:
        """Receive what ``isend_header`` sent.

        Raises:
            TransferCorrupt: it is no header.
        """
        edge = self._edge(src=src, dst=self._rank)
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.wait_work(self._irecv(edge, length, None, None))
        if not 0 < (size := int(length.item())) <= _MAX_HEADER_BYTES:
            raise TransferCorrupt(str(edge), f"a header of {size} bytes")
        body = torch.empty(size, dtype=torch.uint8, device=self._device)
        self.wait_work(self._irecv(edge, body, None, None))
        try:
            return msgspec.msgpack.decode(body.cpu().numpy().data, type=PayloadHeader)
        except UNREADABLE as error:
            raise TransferCorrupt(str(edge), f"no payload header: {error}") from error

    # ------------------------------------------------------------ inside

    def _edge(
        self, source: Role | None = None, target: Role | None = None, *, src: int | None = None, dst: int | None = None
    ) -> Edge:
        """The one open edge with these roles at its source and target, and these ranks; ``None`` stands for any."""
        with self._lock:
            found = [
                edge
                for edge in self._edges
                if src in (None, edge.src) and dst in (None, edge.dst)
                if source is None or source in self._roles_of(edge.src)
                if target is None or target in self._roles_of(edge.dst)
            ]
        if len(found) != 1:
            wanted = f"{'any' if src is None else src}->{'any' if dst is None else dst}"
            among = ", ".join(map(str, sorted(found))) or "none"
            reason = f"rank {self._rank} needs exactly one such open edge ({source} -> {target}), it has: {among}"
            raise TransferError(wanted, reason)
        return found[0]

    def _isend(
        self, edge: Edge, tensors: Tensors, seq: int | None, request_id: str | None, early: Early | None = None
    ) -> Work:
        with self._lock:  # numbering and queueing are one act, else two threads could swap their transfers
            end = self._end(edge)
            return end.transport.isend(_listed(tensors), seq=end.number(seq), request_id=request_id, early=early)

    def _irecv(
        self, edge: Edge, tensors: Tensors, seq: int | None, request_id: str | None, early: Early | None = None
    ) -> Work:
        with self._lock:
            end = self._end(edge)
            return end.transport.irecv(_listed(tensors), seq=end.number(seq), request_id=request_id, early=early)

    def _end(self, edge: Edge) -> _OpenEdge:
        end = self._edges.get(edge)
        if end is None:
            raise TransferError(str(edge), f"the edge is not open on rank {self._rank}")
        return end


def _listed(tensors: Tensors) -> Sequence[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors
