"""The overlap loop of one rank: commands come in, computing and transfers go on side by side, events go out.

What a rank holds of a request is a ``_Resident``. Several threads touch it: the control thread (``handle``), the lanes,
those that follow the lanes' devices, the media thread, and those of the edges that report a transfer's end.
``_lock`` guards the residents; one with ``holds`` above zero is in use (queued, computing, sending or receiving) and is
freed when the last hold is gone. A stage holds its resident until the device has done the stage, so memory never goes
back to an allocator while a stream may still touch it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch

from ditrelay.errors import CodecError, InvalidRequest, ReplicaBroken, TransferCorrupt, TransferError
from ditrelay.runtime.communication.transport import Work
from ditrelay.runtime.messages import (
    CloseEdge,
    Command,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Drop,
    Dropped,
    EdgeFailed,
    EdgeUp,
    Encode,
    Encoded,
    Expect,
    Launched,
    OpenEdge,
    Received,
    Release,
    Send,
    Sent,
    StageFailed,
    StageMemory,
    Started,
    TransferRejected,
    WorkerEvent,
)
from ditrelay.runtime.pipelines_core.executors.checkpoints import Checkpoints
from ditrelay.runtime.pipelines_core.executors.disaggregated_executor import DisaggregatedExecutor
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.pipelines_core.executors.memory_gauge import MemoryGauge
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import describe
from ditrelay.runtime.pipelines_core.executors.previews import PreviewTaker
from ditrelay.runtime.pipelines_core.executors.progress import Progress, Reached
from ditrelay.runtime.pipelines_core.executors.stage_run import Emit, StageRun, Watch, free_after
from ditrelay.runtime.pipelines_core.pipeline import Batch, Pipeline, StageCancelled
from ditrelay.runtime.topology import Edge, Role

logger = logging.getLogger(__name__)

DECODE_SECONDS = 0.02  # for the head to send a decode once it has heard of the denoise: a millisecond or two


@dataclass(eq=False)
class _Resident:
    batch: Batch
    holds: int = 0
    queued: bool = False
    ending: Literal["", "drop", "release"] = ""
    followed: threading.Event = field(default_factory=threading.Event)  # its decode is queued, or there will be none

    @property
    def request_id(self) -> str:
        return self.batch.batch_id


class OverlapLoop:
    """Carries out the head's commands on one rank, but for ``Preview``, which moves none of what a rank holds.

    Args:
        executor: this rank's transfers.
        pipeline: the stages of this rank's roles.
        lanes: the compute lane of each role; roles may share one.
        priority: which role goes first where roles share a lane (lower first).
        emit: takes an event to the head; thread-safe, never blocks for long.
        announce: report an encode when it is launched, where its device runs behind, so that its transfer is arranged
            by the time it is done.
        checkpoints: where denoises are kept in the middle; ``None``: one that is interrupted starts over.
        previews: takes those of this rank's denoises.
        gauge: what memory each stage took; ``None``: that is not reported.
        on_broken: called when the ranks of a replica are torn apart; ends the process.
    """

    def __init__(
        self,
        executor: DisaggregatedExecutor,
        pipeline: Pipeline,
        *,
        lanes: Mapping[Role, Lane],
        priority: Mapping[Role, int],
        emit: Emit,
        announce: bool = False,
        checkpoints: Checkpoints | None = None,
        previews: PreviewTaker | None = None,
        gauge: MemoryGauge | None = None,
        on_broken: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._executor = executor
        self._pipeline = pipeline
        self._lanes = lanes
        self._priority = priority
        self._emit = emit
        self._announces = announce
        self._checkpoints = checkpoints
        self._previews = previews
        self._gauge = gauge
        self._on_broken = on_broken
        self._broken = False
        self._rank = executor.rank
        self._lock = threading.Lock()
        self._residents: dict[str, _Resident] = {}
        self._media = ThreadPoolExecutor(1, thread_name_prefix="media")

    def handle(self, command: Command) -> None:
        """Start what the command asks for; returns without waiting for it (in lock-step mode: after the transfer)."""
        self.reap()
        match command:
            case Encode(request=request):
                self._enqueue(self._admit(Batch((request,))), "encode")
            case Denoise(request_id=request_id):
                self._enqueue(self._residents[request_id], "denoise")
            case Decode(request_id=request_id):
                self._enqueue(self._residents[request_id], "decode")
            case Send():
                self._send(command)
            case Expect():
                self._expect(command)
            case Drop(request_id=request_id):
                self._end(request_id, "drop")
            case Release(request_id=request_id):
                self._end(request_id, "release")
            case OpenEdge():
                threading.Thread(target=self._open_edge, args=(command,), daemon=True).start()
            case CloseEdge(src=src, dst=dst, generation=generation, reason=reason):
                self._executor.comm.close_edge(Edge(src, dst), generation, reason)

    def reap(self) -> None:
        """Let go of the transfers that are complete. Belongs, as the windows do, to the control thread."""
        self._executor.pending_sends.reap()
        self._executor.pending_recvs.reap()

    def kept_bytes(self) -> int:
        """Bytes of all payloads that this rank holds: to be sent, in flight, waiting, or kept for recovery."""
        with self._lock:
            payloads = [resident.batch.payload for resident in self._residents.values()]
        return sum(payload.header.nbytes for payload in payloads if payload)

    # ------------------------------------------------------------ residents

    def _admit(self, batch: Batch) -> _Resident:
        resident = _Resident(batch)
        with self._lock:
            self._residents[resident.request_id] = resident
        return resident

    def _end(self, request_id: str, how: Literal["drop", "release"]) -> None:
        with self._lock:
            resident = self._residents.get(request_id)
            if resident is None:
                if how == "drop":
                    self._emit(Dropped(self._rank, request_id))
                return
            resident.ending = how
            resident.followed.set()
            if resident.queued:  # its job finds it unclaimable and does nothing
                resident.queued = False
                resident.holds -= 1
            self._settle(resident)

    def _settle(self, resident: _Resident) -> None:
        """Free an ending resident that is no longer in use. Call with the lock held."""
        if resident.ending and resident.holds == 0:
            self._remove(resident)
            if resident.ending == "drop":
                self._emit(Dropped(self._rank, resident.request_id))

    def _remove(self, resident: _Resident) -> None:
        if self._residents.get(resident.request_id) is resident:
            del self._residents[resident.request_id]

    def _free(self, resident: _Resident) -> None:
        """The use of a dropped resident is over."""
        with self._lock:
            resident.holds -= 1
            self._settle(resident)

    def _release_hold(self, resident: _Resident, event: WorkerEvent, *, remove: bool = False) -> None:
        """One use of the resident is over; tell the head, unless the head has dropped the request meanwhile."""
        with self._lock:
            resident.holds -= 1
            if resident.ending != "drop":
                self._emit(event)
                if remove:
                    self._remove(resident)
            self._settle(resident)

    # ------------------------------------------------------------ computing

    def _enqueue(self, resident: _Resident, role: Role) -> None:
        with self._lock:
            resident.holds += 1
            resident.queued = True
        self._lanes[role].put(self._priority[role], lambda: self._compute(resident, role))
        if role == "decode":
            resident.followed.set()

    def _claim(self, resident: _Resident) -> bool:
        with self._lock:
            claimed, resident.queued = resident.queued, False
        return claimed

    def _compute(self, resident: _Resident, role: Role) -> None:
        """On the lane: launch a stage. What follows from it follows when the device has done it."""
        if self._broken or not self._claim(resident):
            return
        run = StageRun(role, (resident.batch.payload, resident.batch.state))
        progress = self._lanes[role].progress
        progress.then(lambda reached: self._began(resident, run, reached))
        kept = (self._checkpoints, self._previews) if role == "denoise" else ()
        request = resident.batch.requests[0]
        watch = Watch(self._rank, request, progress, self._emit, lambda: resident.ending == "drop", *kept)
        idle = self._gauge.begin() if self._gauge else 0
        try:
            self._pipeline.stage(role).run(resident.batch, watch)
            run.memory = StageMemory(idle, self._gauge.peak()) if self._gauge else None
            if role != "decode":
                run.header = self._executor.pack(resident.batch)
            if role == "encode" and self._announces:
                self._announce(resident, progress)
        except Exception as error:  # the place that turns a stage's exception into a failed request
            logger.debug("%s of request %s ended early", role, resident.request_id, exc_info=True)
            run.error = error
        progress.then(lambda reached: self._ended(resident, run, reached))
        if role == "denoise" and run.error is None and self._lanes.get("decode") is self._lanes[role]:
            self._keep_lane_for_decode(resident, run)

    def _keep_lane_for_decode(self, resident: _Resident, run: StageRun) -> None:
        """A denoise that is launched now would hold the finished picture up for as long as it takes itself."""
        while not resident.followed.wait(DECODE_SECONDS) and not run.at:
            pass  # the device still computes

    def _announce(self, resident: _Resident, progress: Progress) -> None:
        """A stage that raises has raised by now: from here on it can only fail with the whole device."""
        batch = resident.batch
        batch.ready = progress.mark()
        with self._lock:
            if batch.ready is not None and batch.payload is not None and not resident.ending:
                self._emit(Launched(self._rank, resident.request_id, batch.payload.header))

    def _began(self, resident: _Resident, run: StageRun, reached: Reached) -> None:
        run.began = reached.at
        if reached.error is None:
            self._emit(Started(self._rank, resident.request_id, run.role, reached.at))

    def _ended(self, resident: _Resident, run: StageRun, reached: Reached) -> None:
        """The device is done with all that the stage launched, so nothing uses its tensors any more."""
        run.at, run.inputs = reached.at, ()
        error, run.error = reached.error or run.error, None
        if error is None:
            self._succeed(resident, run)
        elif isinstance(error, StageCancelled):
            del error  # its traceback holds the stage's tensors
            self._free(resident)
        elif reached.error is not None or isinstance(error, ReplicaBroken | torch.AcceleratorError):
            # After an error of the device no call of this process works. The request is tried again elsewhere.
            self._broken = True
            self._on_broken(describe(error))
            return
        else:
            self._fail(resident, run, error)
        if run.role == "denoise" and self._checkpoints is not None:
            self._checkpoints.remove(resident.request_id)
        if run.role == "denoise" and self._previews is not None:
            self._previews.forget(resident.batch.requests[0])

    def _succeed(self, resident: _Resident, run: StageRun) -> None:
        if run.role == "decode":
            self._media.submit(self._make_media, resident, run)
            return
        assert run.header is not None
        done = Encoded if run.role == "encode" else Denoised
        rank, request_id = self._rank, resident.request_id
        self._release_hold(resident, done(rank, request_id, run.header, run.began, run.at, run.memory))

    def _make_media(self, resident: _Resident, run: StageRun) -> None:
        """On the media thread: the lane decodes the next request meanwhile."""
        try:
            self._pipeline.stage("decode").finish(resident.batch)
        except Exception as error:  # noqa: BLE001 - as in ``_compute``: whatever it was, its request fails
            self._fail(resident, run, error)
            return
        m, rank, request_id = resident.batch.media[0], self._rank, resident.request_id
        size, moments = (m.width, m.height, m.num_frames), (run.began, run.at)
        event = Decoded(rank, request_id, m.data, m.media_type, *size, *moments, run.memory)
        self._release_hold(resident, event, remove=True)

    def _fail(self, resident: _Resident, run: StageRun, error: Exception) -> None:
        request_id, invalid = resident.request_id, error if isinstance(error, InvalidRequest) else None
        no_memory = isinstance(error, torch.OutOfMemoryError)
        expected = invalid or no_memory
        logger.warning("%s of request %s failed", run.role, request_id, exc_info=None if expected else error)
        reason = invalid.reason if invalid else f"{run.role} failed: {describe(error)}"
        resident.batch.state, resident.batch.payload, resident.batch.frames = {}, None, ()
        if no_memory:
            free_after(error)
        param = invalid.param if invalid else None
        event = StageFailed(self._rank, request_id, run.role, reason, time.monotonic(), param, no_memory)
        self._release_hold(resident, event, remove=True)

    # ------------------------------------------------------------ transfers

    def _open_edge(self, command: OpenEdge) -> None:
        src, dst, generation = command.src, command.dst, command.generation
        try:
            self._executor.comm.open_edge(Edge(src, dst), generation)
        except TransferError as error:
            self._emit(EdgeFailed(self._rank, src, dst, generation, error.reason))
        else:
            self._emit(EdgeUp(self._rank, src, dst, generation))

    def _send(self, command: Send) -> None:
        executor, began = self._executor, time.monotonic()
        with self._lock:
            resident = self._residents.get(command.request_id)
            if resident:
                resident.holds += 1
        if resident is None:
            reason = f"nothing held of request {command.request_id}"
            self._emit(self._edge_event(command, self._rank, command.dst, reason))
            return
        batch, dst, seq = resident.batch, command.dst, command.seq
        try:
            if "encode" in executor.roles:
                work = executor._async_send_batch_to_dit(batch, dst, seq, early=command.early)[-1]
            else:
                work = executor._async_send_batch_to_non_dit(batch, dst, seq)[-1]
        except TransferError as error:
            self._release_hold(resident, self._edge_event(command, self._rank, command.dst, error.reason))
            return
        work.add_done_callback(lambda work: self._sent(command, resident, work, began))
        executor.keep_step(work)

    def _sent(self, command: Send, resident: _Resident, work: Work, began: float) -> None:
        rank, rid, dst = self._rank, resident.request_id, command.dst
        if work.error:
            self._release_hold(resident, self._edge_event(command, rank, dst, work.error.reason))
        else:
            logger.debug("Waited for send completion: batch_%s", rid)  # this thread, the edge's own, has
            sent = Sent(rank, rid, dst, command.generation, command.seq, began, time.monotonic())
            self._release_hold(resident, sent)

    def _expect(self, command: Expect) -> None:
        executor, began = self._executor, time.monotonic()
        resident = self._admit(Batch((command.request,), header=command.header))
        resident.holds += 1
        batch, src, seq = resident.batch, command.src, command.seq
        try:
            if "denoise" in executor.roles:
                _, (work,) = executor._async_recv_batch_from_non_dit(batch, src, seq, early=command.early)
            else:
                _, (work,) = executor._async_recv_batch_from_dit(batch, src, seq)
        except (TransferError, CodecError, RuntimeError) as error:  # RuntimeError: no memory to receive into
            event = self._edge_event(command, command.src, self._rank, describe(error))
            self._release_hold(resident, event, remove=True)
            return
        work.add_done_callback(lambda work: self._received(command, resident, work, began))
        executor.keep_step(work)

    def _received(self, command: Expect, resident: _Resident, work: Work, began: float) -> None:
        rank, rid, src = self._rank, resident.request_id, command.src
        generation, seq = command.generation, command.seq
        if work.error:
            failed = self._edge_event(command, src, rank, work.error.reason)
            self._release_hold(resident, failed, remove=True)
            return
        try:
            self._executor.unpack(resident.batch)
        except (TransferCorrupt, CodecError) as error:
            rejected = TransferRejected(rank, rid, src, generation, seq, describe(error))
            self._release_hold(resident, rejected, remove=True)
            return
        self._release_hold(resident, Received(rank, rid, src, generation, seq, began, time.monotonic()))

    def _edge_event(self, command: Send | Expect, src: int, dst: int, reason: str) -> EdgeFailed:
        request_id = command.request_id if isinstance(command, Send) else command.request.request_id
        return EdgeFailed(self._rank, src, dst, command.generation, reason, request_id, command.seq)
