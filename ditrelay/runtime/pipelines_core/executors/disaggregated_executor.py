"""One rank's transfers: batches go out and come in without blocking the rank, within a bounded window.

``OverlapLoop`` (overlap.py) drives this under the head's scheduler. ``execute`` runs the same transfers without a head,
every rank calling it with the same batch (torchrun, tests).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ditrelay.runtime.communication.codec import allocate, decode_payload, encode_state, verify
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.pending import PendingTransfer, TransferWindow
from ditrelay.runtime.communication.transport import Early, Work
from ditrelay.runtime.payloads import Payload, PayloadHeader
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import STAGE_ERRORS, ExecutorOutput, describe
from ditrelay.runtime.pipelines_core.pipeline import Batch, Stage, Uncontrolled
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import Role, role_name

logger = logging.getLogger(__name__)

MEANWHILE_SECONDS = 0.5


class DisaggregatedExecutor:
    """Sends and receives batches for one rank.

    Args:
        server_args: window, byte budget, checksums, time-outs.
        rank: this rank.
        roles: its roles; they decide which directions exist.
        communicator: its edges.
        device: where received tensors are allocated.
        meanwhile: called again and again in a wait for a transfer of the head's, by the thread that waits.

    Attributes:
        max_pending_transfers: transfers that may be in flight per direction. Without a head, one more send waits for
            the oldest; under a head it does not, since the head's credits bound what it asks for.
        pending_sends, pending_recvs: the transfers in flight; they keep the tensors alive until completion.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        *,
        rank: int,
        roles: frozenset[Role],
        communicator: DisaggCommunicator,
        device: torch.device | None = None,
        peers: int = 1,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.server_args = server_args
        self.rank = rank
        self.roles = roles
        self.comm = communicator
        self.device = device or torch.device("cpu")
        self._meanwhile = meanwhile
        self.max_pending_transfers = server_args.max_pending_transfers
        limit = self.max_pending_transfers * peers
        self.pending_sends = TransferWindow(limit, server_args.max_pending_bytes * peers)
        self.pending_recvs = TransferWindow(limit, server_args.max_pending_bytes * peers)
        role, window = role_name(roles), self.max_pending_transfers
        logger.info("DisaggregatedExecutor initialized on rank %d with role %s, max_pending=%d", rank, role, window)

    # ------------------------------------------------------------ non-blocking transfers

    def _async_send_batch_to_dit(
        self, batch: Batch, dst: int | None = None, seq: int | None = None, *, early: bool = False
    ) -> list[Work]:
        """Start sending the conditioning; returns at once. Nothing may write to its tensors until completion.

        A payload that no head has announced (``batch.payload`` is not made yet) goes with its header in band.
        ``early``: the bytes go when ``batch.ready`` is complete, within the stage's own time limit.
        """
        isend = self.comm.isend_to_dit
        if early:
            isend = partial(isend, early=Early(self.server_args.stage_timeout, batch.ready))
        return self._send(batch, "to DiT", isend, dst, seq)

    def _async_send_batch_to_non_dit(self, batch: Batch, dst: int | None = None, seq: int | None = None) -> list[Work]:
        """Start sending the latents; returns at once."""
        return self._send(batch, "to Non-DiT", self.comm.isend_to_non_dit, dst, seq)

    def _async_recv_batch_from_non_dit(
        self, batch: Batch, src: int | None = None, seq: int | None = None, *, early: bool = False
    ) -> tuple[Batch, list[Work]]:
        """Start receiving the conditioning that ``batch.header`` announces (without one, the header comes in band).

        ``batch.payload`` holds the tensors at once; they are valid after the works completed. ``early``: the sender's
        stage may still be making them.
        """
        irecv = self.comm.irecv_from_non_dit
        if early:
            irecv = partial(irecv, early=Early(self.server_args.stage_timeout))
        return self._receive(batch, "from Non-DiT", irecv, src, seq)

    def _async_recv_batch_from_dit(
        self, batch: Batch, src: int | None = None, seq: int | None = None
    ) -> tuple[Batch, list[Work]]:
        """Start receiving the latents."""
        return self._receive(batch, "from DiT", self.comm.irecv_from_dit, src, seq)

    # ------------------------------------------------------------ blocking twins

    def _send_batch_to_dit(self, batch: Batch, dst: int | None = None, seq: int | None = None) -> None:
        """Send the conditioning and wait until it is sent."""
        self._await_sends(self._async_send_batch_to_dit(batch, dst, seq), batch)

    def _send_batch_to_non_dit(self, batch: Batch, dst: int | None = None, seq: int | None = None) -> None:
        """Send the latents and wait until they are sent."""
        self._await_sends(self._async_send_batch_to_non_dit(batch, dst, seq), batch)

    def _recv_batch_from_non_dit(self, batch: Batch, src: int | None = None, seq: int | None = None) -> Batch:
        """Receive the conditioning; the batch's state is ready on return."""
        return self._await_receives(*self._async_recv_batch_from_non_dit(batch, src, seq))

    def _recv_batch_from_dit(self, batch: Batch, src: int | None = None, seq: int | None = None) -> Batch:
        """Receive the latents; the batch's state is ready on return."""
        return self._await_receives(*self._async_recv_batch_from_dit(batch, src, seq))

    # ------------------------------------------------------------ the parts that both directions share

    def pack(self, batch: Batch) -> PayloadHeader:
        """Put the batch's state into the form that crosses an edge; its header goes ahead of the tensors."""
        ids = [request.request_id for request in batch.requests]
        checksum = self.server_args.verify_transfers
        batch.payload = encode_state(batch.state, batch_id=batch.batch_id, request_ids=ids, checksum=checksum)
        return batch.payload.header

    def unpack(self, batch: Batch) -> None:
        """Make the state of a received payload; raises ``TransferCorrupt`` where the checksum does not match."""
        assert batch.payload is not None
        verify(batch.payload)
        batch.state = decode_payload(batch.payload)

    def _send(
        self, batch: Batch, label: str, isend: Callable[..., Work], dst: int | None, seq: int | None
    ) -> list[Work]:
        announced = batch.payload is not None
        if not announced:
            self.pack(batch)
        payload = batch.payload
        assert payload is not None
        self.pending_sends.reap()
        if seq is None:
            self._make_room(payload.header.nbytes)
        works = [] if announced else self.comm.isend_header(payload.header, dst=dst)
        works.append(isend(payload.tensors, dst=dst, seq=seq, request_id=batch.batch_id))
        self.pending_sends.add(_pending(batch, works, payload))
        logger.debug("[Async Send %s] Initiated %s", label, _count(payload.header, "sends"))
        return works

    def _receive(
        self, batch: Batch, label: str, irecv: Callable[..., Work], src: int | None, seq: int | None
    ) -> tuple[Batch, list[Work]]:
        header = batch.header or self.comm.recv_header(src=src)
        payload = Payload(header, allocate(header, self.device))
        work = irecv(payload.tensors, src=src, seq=seq, request_id=batch.batch_id)
        batch.payload = payload
        self.pending_recvs.reap()
        self.pending_recvs.add(_pending(batch, [work], payload))
        logger.debug("[Async Recv %s] Initiated %s", label, _count(header, "recvs"))
        return batch, [work]

    def keep_step(self, work: Work) -> None:
        """In lock-step mode, wait until a transfer of the head's is over, well or not, ``dist_timeout`` at most."""
        if self.server_args.use_async_comm:
            return
        until = time.monotonic() + self.server_args.dist_timeout
        while not work.wait_done(MEANWHILE_SECONDS) and time.monotonic() < until:
            self._meanwhile()

    def _make_room(self, nbytes: int) -> None:
        """Without a head only: nobody hears from a thread that waits here, and the oldest may be another edge's."""
        while len(self.pending_sends) and not self.pending_sends.has_room(nbytes):
            oldest = self.pending_sends.oldest()
            oldest.wait(self.server_args.dist_timeout)
            logger.debug("Waited for send completion: batch_%s", oldest.batch_id)
            self.pending_sends.reap()

    def _await_sends(self, works: list[Work], batch: Batch) -> None:
        self.comm.wait_all_works(works, timeout=self.server_args.dist_timeout)
        logger.debug("Waited for send completion: batch_%s", batch.batch_id)
        self.pending_sends.reap()

    def _await_receives(self, batch: Batch, works: list[Work]) -> Batch:
        self.comm.wait_all_works(works, timeout=self.server_args.dist_timeout)
        self.pending_recvs.reap()
        self.unpack(batch)
        return batch

    # ------------------------------------------------------------ without a head

    def execute(self, stages: Sequence[Stage], batch: Batch, server_args: ServerArgs) -> ExecutorOutput:
        """Run this rank's part of ``batch``; every rank of the pair calls it with the same requests, in the same order.

        A rank whose last stage is not the decode returns an empty output.
        """
        try:
            with torch.no_grad():
                self._run_stages({stage.role: stage for stage in stages}, batch)
        except STAGE_ERRORS as error:
            return ExecutorOutput(error=describe(error))
        return ExecutorOutput(output=batch.media or None)

    def _run_stages(self, stages: dict[Role, Stage], batch: Batch) -> None:
        control = Uncontrolled()
        if encode := stages.get("encode"):
            encode.run(batch, control)
            self._async_send_batch_to_dit(batch)
        if denoise := stages.get("denoise"):
            self._recv_batch_from_non_dit(batch)
            denoise.run(batch, control)
            batch.payload = None
            self._async_send_batch_to_non_dit(batch)
        if decode := stages.get("decode"):
            batch.header = batch.payload = None
            self._recv_batch_from_dit(batch)
            decode.run(batch, control)
            decode.finish(batch)

    def drain(self) -> None:
        """Wait until nothing is in flight; raises ``TransferError`` for a transfer that failed or ran out of time."""
        for window in (self.pending_sends, self.pending_recvs):
            window.drain(self.server_args.dist_timeout)


def _pending(batch: Batch, works: list[Work], payload: Payload) -> PendingTransfer:
    tensors = {str(i): tensor for i, tensor in enumerate(payload.tensors)}
    return PendingTransfer(batch.batch_id, works, dict(tensors), payload.header.nbytes)


def _count(header: PayloadHeader, what: str) -> str:
    single = sum(field.kind == "tensor" for field in header.fields)
    lists = sum(field.kind == "tensors" for field in header.fields)
    return f"{len(header.tensors)} async {what} ({single} single tensors, {lists} tensor lists)"
