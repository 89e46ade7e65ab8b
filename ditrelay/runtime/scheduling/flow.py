"""A request's way forward: queue, encode, hop, denoise, hop, decode, done.

Both hops are one mechanism. Before a stage is dispatched, a credit for its product is *reserved* from the pool of its
unit. When the product is there, the destination is *chosen*: the least loaded unit with a free credit and room in
bytes. The credit is returned when the destination's stage *starts*. A product that finds no edge is held where it was
made and keeps its reservation. Two stages of one unit are joined by a local edge: same credits, nothing is sent.

A GPU's encode is *launched* long before it is done, and by then its header is known. If an edge is free at that moment,
the hop is *promised*: the credit is taken and both ranks are told at once, so that the bytes move as soon as the device
has made them, and nobody waits for the head. An edge carries its transfers out one after the other, so no ready product
must wait behind one that is still being made: an encode is promised only after those before it on its rank (the order
in which the device makes them) and never while a ready product is held, and a ready one takes no edge with a promise.
"""

from __future__ import annotations

from ditrelay.runtime.messages import (
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Encode,
    Encoded,
    Expect,
    Finish,
    Launched,
    Received,
    Reject,
    Release,
    Send,
    Stage,
    Started,
    StepDone,
    Submit,
)
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import RequestState, without_picture
from ditrelay.runtime.scheduling.ledger import Ledger, at_worker, on_edge
from ditrelay.runtime.scheduling.recovery import Recovery
from ditrelay.runtime.scheduling.state import NEXT, EdgeState, Record, Station, UnitState

# One stage runs at the worker and the next one is there already, so that the way to the head never idles it.
DISPATCH_DEPTH = 2


class Flow:
    """Takes the events of requests that go forward; ``pump`` starts whatever an event made possible."""

    def __init__(self, ledger: Ledger, recovery: Recovery) -> None:
        self._ledger = ledger
        self._recovery = recovery

    # ------------------------------------------------------------ events

    def submit(self, event: Submit) -> None:
        ledger, request = self._ledger, event.request
        assert request.request_id not in ledger.records, f"request id {request.request_id} is in use"
        if ledger.lost_roles:
            reason = next(iter(ledger.lost_roles.values()))
            ledger.finish(Finish(request.request_id, "failed", reason))
        elif len(ledger.queue) >= ledger.config.max_queue:
            ledger.out.append(Reject(request.request_id, ledger.config.max_queue))
        else:
            ledger.accept(request)

    def started(self, event: Started) -> None:
        found = at_worker(self._ledger, event.rank, event.request_id, event.stage)
        if found is not None:
            record, station = found
            self._ledger.stages.began(record, station, self._ledger.now)
            self._begin(record, station)

    def step_done(self, event: StepDone) -> None:
        found = at_worker(self._ledger, event.rank, event.request_id, "denoise")
        if found is not None:
            self._ledger.stages.stepped(*found, event.step, self._ledger.now)

    def launched(self, event: Launched) -> None:
        found = at_worker(self._ledger, event.rank, event.request_id, "encode")
        if found is None or not self._may_promise(*found):
            return
        record, station = found
        edge = self._free_edge(station, event.header.nbytes, early=True)
        if edge is not None:
            promise = self._ledger.promise(record, edge, event.header.nbytes)
            self._move(record, edge, promise.seq, event.header, early=True)

    def encoded(self, event: Encoded) -> None:
        self._made(event, "encode")

    def denoised(self, event: Denoised) -> None:
        self._made(event, "denoise")

    def decoded(self, event: Decoded) -> None:
        found = self._completed(event.rank, event.request_id, "decode")
        if found is not None:
            record, _ = found
            self._ledger.move(record, RequestState.DONE)
            self._ledger.finish(Finish(record.id, "done"))
            self._ledger.forget(record)

    def received(self, event: Received) -> None:
        record = on_edge(self._ledger, event)
        if record is None:
            return
        if record.promise is not None:  # the receiver's word was faster than the sender's
            record.promise.edge.failures = 0
            record.promise.received = True
            return
        assert record.edge is not None
        record.edge.failures = 0
        self._land(record)

    # ------------------------------------------------------------ stages

    def _begin(self, record: Record, station: Station) -> None:
        """The stage computes, so its input is out of the window. A zombie's credit comes back with ``Dropped`` only."""
        if record.edge is not None and not record.state.ended:
            self._ledger.return_credit(record)
            self._ledger.move(record, station.states.running)

    def _completed(self, rank: int, request_id: str, stage: Stage) -> tuple[Record, Station] | None:
        """Takes a live request off its station; the copy that its input was made from is not needed any more."""
        ledger = self._ledger
        found = at_worker(ledger, rank, request_id, stage)
        if found is None:
            return None
        record, station = found
        self._begin(record, station)
        ledger.stages.completed(record, station, ledger.now)
        station.unit.has_finished(stage)
        if record.state.ended:
            return None
        if record.alone is station:
            ledger.leave_alone(record)
        if record.source is not None:
            ledger.out.append(Release(record.source.leader, request_id))
            ledger.unkeep(record)
        ledger.unbind(record)
        return found

    def _made(self, event: Encoded | Denoised, stage: Stage) -> None:
        found = self._completed(event.rank, event.request_id, stage)
        if found is None:
            return
        record, station = found
        self._ledger.move(record, station.states.made)
        self._ledger.keep(record, station, event.header)
        limit = self._ledger.config.max_pending_bytes
        if record.promise is not None:
            self._redeem(record)
        elif record.nbytes > limit:
            reason = f"the payload made by {stage} has {record.nbytes} bytes, an edge takes {limit}"
            self._recovery.fail(record, f"{reason}; raise --max-pending-bytes")
        else:
            self._ledger.hold(record)

    # ------------------------------------------------------------ what became possible

    def pump(self) -> None:
        """Sends what is held and dispatches what waits, at every station where something changed."""
        ledger = self._ledger
        for unit in tuple(ledger.closed):
            self._start_alone(unit)
        while ledger.dirty:
            station, _ = ledger.dirty.popitem()
            if station.held:
                self._send_held(station)
            if station.stage == "encode":
                ledger.queue_dirty = True
            else:
                self._dispatch_waiting(station)
        if ledger.queue_dirty:
            ledger.queue_dirty = False
            self._dispatch_queued()

    def _dispatch_queued(self) -> None:
        queue = self._ledger.queue
        while queue and (station := self._free_encoder()) is not None:
            self._encode(queue.popleft(), station)

    def _encode(self, record: Record, station: Station) -> None:
        self._ledger.bind(record, station)
        self._ledger.move(record, station.states.arrived)
        self._ledger.dispatch(record, station)
        if self._ledger.config.lock_step:
            self._ledger.enter_home(record, station.unit)
        self._ledger.out.append(Encode(station.leader, record.request))

    def _free_encoder(self) -> Station | None:
        """The least loaded encoder with a free place and a credit for what it will make."""
        ledger = self._ledger
        for _, leader in ledger.boards["encode"].order:
            unit = ledger.units[leader]
            station = unit.stations["encode"]
            free = len(station.dispatched) < DISPATCH_DEPTH and not unit.bound and not unit.alone
            if free and unit.status == "up" and station.may_produce:
                return station
        return None

    def _dispatch_waiting(self, station: Station) -> None:
        command = Denoise if station.stage == "denoise" else Decode
        while station.waiting and len(station.dispatched) < DISPATCH_DEPTH and station.may_produce:
            record = station.waiting.popleft()
            self._ledger.dispatch(record, station)
            self._ledger.out.append(command(station.leader, record.id))

    def _start_alone(self, unit: UnitState) -> None:
        """Gives a unit that is rid of all others the request that ran out of memory there."""
        ledger, record = self._ledger, unit.alone[0]
        if record not in ledger.aside or not unit.is_quiet:
            return
        source = record.source
        edge = None if source is None else source.out.get(unit.leader)
        if source is not None and edge is not None:
            if edge.fits(record.nbytes):
                del ledger.aside[record]
                self._hand_over(record, source, edge)
        elif source is None and record.alone is not None and unit.makes_alone(record.alone.stage):
            if unit.stations["encode"].may_produce:
                del ledger.aside[record]
                self._encode(record, unit.stations["encode"])
        else:  # the way there leads over other units, which may wait for this one
            ledger.leave_alone(record)
            ledger.go_on(record)

    # ------------------------------------------------------------ the hop

    def _send_held(self, station: Station) -> None:
        """Oldest first. One that finds no edge stops those behind it: small payloads must not starve a large one."""
        for record in tuple(station.held):
            way_home = self._way_home(record, station)
            edge = way_home or self._free_edge(station, record.nbytes)
            if edge is not None and edge.fits(record.nbytes):
                station.held.remove(record)
                self._hand_over(record, station, edge)
            elif way_home is None:
                return

    def _way_home(self, record: Record, station: Station) -> EdgeState | None:
        """The one edge that ``record`` must take, if so: within its unit, or in lock-step back to its encoder's."""
        if station.local is not None or record.home is None or record.home.status != "up":
            return station.local
        return station.out.get(record.home.leader) if station.stage == "denoise" else None

    def _free_edge(self, station: Station, nbytes: int, *, early: bool = False) -> EdgeState | None:
        """The edge to the least loaded unit with a credit and room for it; only if ``early`` one that has a promise."""
        for _, leader in self._ledger.boards[NEXT[station.stage]].order:
            edge = station.out.get(leader)
            if edge is None or not edge.fits(nbytes) or edge.dst.unit.alone:
                continue
            if early or not edge.promised:
                return edge
        return None

    def _may_promise(self, record: Record, station: Station) -> bool:
        """See the module's docstring for why the order matters."""
        if self._ledger.config.lock_step or station.local is not None or station.held:
            return False
        if record.state.ended or record.promise is not None:
            return False
        before = station.dispatched[: station.dispatched.index(record)]
        return all(other.promise is not None or other.state.ended for other in before)

    def _redeem(self, record: Record) -> None:
        promise = self._ledger.redeem(record)
        self._ledger.move(record, promise.target.states.moving)
        if promise.received:
            self._land(record)

    def _hand_over(self, record: Record, station: Station, edge: EdgeState) -> None:
        ledger, target = self._ledger, edge.dst
        ledger.take_credit(record, edge)
        ledger.bind(record, target)
        ledger.move(record, target.states.moving)
        if edge.local:
            ledger.unkeep(record)
            self._arrive(record, target)
            return
        assert record.header is not None
        self._move(record, edge, ledger.depart(record, edge), record.header)

    def _move(self, record: Record, edge: EdgeState, seq: int, header: PayloadHeader, *, early: bool = False) -> None:
        src, dst, generation = edge.src.leader, edge.dst.leader, edge.generation
        self._ledger.out.append(Send(src, record.id, dst, generation, seq, early))
        request = without_picture(record.request)
        self._ledger.out.append(Expect(dst, request, src, generation, seq, header, early))

    def _land(self, record: Record) -> None:
        assert record.at is not None
        self._ledger.landed(record)
        if not record.state.ended:
            self._arrive(record, record.at)

    def _arrive(self, record: Record, station: Station) -> None:
        self._ledger.move(record, station.states.arrived)
        station.waiting.append(record)
        self._ledger.dirty[station] = None
