"""A request's ways back and out: set back by a lost unit or edge, failed, cancelled.

A request that ends while units hold something of it stays as a zombie: every holder is told to drop it, and what it
held there is struck when the holder answers or is lost, never before.
"""

from __future__ import annotations

import math
from operator import attrgetter

from ditrelay.runtime.messages import (
    CancelRequest,
    Drop,
    Dropped,
    Finish,
    Release,
    Stage,
    StageFailed,
    TransferRejected,
)
from ditrelay.runtime.request import RequestState
from ditrelay.runtime.scheduling.ledger import Ledger, at_worker, on_edge
from ditrelay.runtime.scheduling.state import STATES, EdgeState, Record, Station, UnitState

_DOING: dict[RequestState, str] = {
    RequestState.ENCODING: "it was encoded",
    RequestState.ENCODED: "its conditioning waited to be sent",
    RequestState.TO_DIT: "its conditioning was on the way",
    RequestState.AT_DIT: "it waited for its denoise",
    RequestState.DENOISING: "it was denoised",
    RequestState.DENOISED: "its latents waited to be sent",
    RequestState.TO_DECODER: "its latents were on the way",
    RequestState.AT_DECODER: "it waited for its decode",
    RequestState.DECODING: "it was decoded",
}
_ORDER = list(RequestState)
_RAN_OUT = "also with nothing else on its ranks; ask for less at a time, or give the server more memory per request"

# Seconds from a loss that a request may have caused until it is tried again: the first time, and later.
RETRY_DELAYS = (0.1, 1.0)


class Recovery:
    """Takes the events that end a request or lose what it had; ``liveness`` says which units and edges are lost."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    # ------------------------------------------------------------ events

    def cancel(self, event: CancelRequest) -> None:
        record = self._ledger.records.get(event.request_id)
        if record is None or record.state.ended:
            return
        if event.reason is None:
            self.end(record, Finish(record.id, "cancelled"))
        else:
            self.fail(record, event.reason)

    def stage_failed(self, event: StageFailed) -> None:
        found = at_worker(self._ledger, event.rank, event.request_id, event.stage)
        if found is None:
            return
        record, station = found
        self._ledger.stages.ended(record, station, self._ledger.now)
        if record.state.ended:
            return
        if event.out_of_memory and not record.ran_out and record.promise is None:
            self._try_alone(record, station, event.reason)
            return
        reason = f"{event.reason} ({_RAN_OUT})" if event.out_of_memory else event.reason
        self.end(record, Finish(record.id, "failed", reason, event.invalid_param), freed=station.unit)

    def _try_alone(self, record: Record, station: Station, cause: str) -> None:
        """Once more, with nothing else on the unit (in lock-step nothing is), and with as little as can be later."""
        ledger, unit, doing = self._ledger, station.unit, _DOING[record.state]
        record.ran_out = True
        for edge in unit.edges:
            if edge.dst.unit is unit and edge.window > 1:
                ledger.resize(edge, 1)
        ledger.strike(record, unit)
        delay = RETRY_DELAYS[0] if ledger.config.lock_step else math.inf
        self._set_back(record, cause, doing, blamed=False, delay=delay)
        if delay == math.inf and not record.state.ended:
            ledger.claim_alone(record, station)

    def rejected(self, event: TransferRejected) -> None:
        """The receiver has freed its part; the source still has the payload."""
        record = on_edge(self._ledger, event)
        if record is None:
            return
        self._ledger.landed(record)
        if not record.state.ended:
            doing, promised = _DOING[record.state], record.promise is not None
            edge = f"{event.src}->{event.rank}"
            cause = f"transfer {edge} #{event.seq} was rejected ({event.reason})"
            self._ledger.strike(record, self._ledger.units[event.rank])
            if promised:
                self._go_on_unpromised(record, cause, blamed=True)
            else:
                self._set_back(record, cause, doing, blamed=True)

    def dropped(self, event: Dropped) -> None:
        record, unit = self._ledger.records.get(event.request_id), self._ledger.units.get(event.rank)
        if record is not None and unit is not None and unit in record.dropping:
            self._drop_answered(record, unit)

    def resume(self) -> None:
        """Whoever was set aside for a time, and that is over, goes on."""
        ledger = self._ledger
        due = [record for record, until in ledger.aside.items() if until <= ledger.now]
        # Backwards, as in ``unit_lost``.
        for record in sorted(due, key=attrgetter("number"), reverse=True):
            ledger.go_on(record)

    # ------------------------------------------------------------ ends

    def fail(self, record: Record, reason: str) -> None:
        self.end(record, Finish(record.id, "failed", reason))

    def end(self, record: Record, finish: Finish, freed: UnitState | None = None) -> None:
        """Ends a live request for the client, and for ``freed``, which has nothing of it any more."""
        ledger = self._ledger
        ledger.withdraw(record)
        ledger.move(record, RequestState(finish.outcome))
        ledger.finish(finish)
        if freed is not None:
            ledger.strike(record, freed)
        for unit in record.holders():
            record.dropping.add(unit)
            ledger.out.append(Drop(unit.leader, record.id))
        if record.dropping:
            ledger.drops.start(record, ledger.now)
        else:
            ledger.forget(record)

    def _drop_answered(self, record: Record, unit: UnitState) -> None:
        record.dropping.discard(unit)
        self._ledger.strike(record, unit)
        if not record.dropping:
            self._ledger.forget(record)

    # ------------------------------------------------------------ losses

    def unit_lost(self, unit: UnitState, cause: str, *, suspicious: bool = True) -> None:
        """All processes of ``unit`` are gone and its edges are closed.

        Args:
            suspicious: what it computed may be the reason.
        """
        # Backwards, so that the requests put at the front of the queue keep their order.
        for record in reversed(list(self._ledger.records.values())):
            if unit not in record.holders():
                continue
            if record.state.ended:
                self._ledger.landed(record)
                self._drop_answered(record, unit)
            else:
                self._holder_lost(record, unit, cause, suspicious)
        for record in tuple(unit.alone):
            self._ledger.leave_alone(record)
            self._ledger.go_on(record)

    def _holder_lost(self, record: Record, unit: UnitState, cause: str, suspicious: bool) -> None:
        """Only a request that was computed there may have caused the loss; for the others it is no attempt."""
        doing = _DOING[record.state]
        computed = record.at is not None and record.at.unit is unit and record.began is not None
        suspect = suspicious and computed
        promised = record.promise is not None and record.promise.target.unit is unit
        self._ledger.strike(record, unit)
        if promised:
            self._go_on_unpromised(record, cause, blamed=False)
        elif record.at is None or record.on_the_way:
            delay = RETRY_DELAYS[min(record.attempts, len(RETRY_DELAYS) - 1)] if suspect else 0.0
            self._set_back(record, cause, doing, blamed=suspect, delay=delay)
        # Else only the copy is lost: the payload is where it is needed.

    def edge_lost(self, edge: EdgeState, cause: str, blamed: str | None) -> None:
        """``edge`` is closed at both ends. What has arrived over it stays where it is, what is still encoded goes on.

        Args:
            blamed: the request whose transfer failed; for the others on the edge it is no attempt.
        """
        for record in reversed(list(self._ledger.records.values())):
            promise = record.promise
            if promise is not None and promise.edge is edge and not promise.received and not record.state.ended:
                self._release(record, edge.dst)
                self._go_on_unpromised(record, cause, blamed=record.id == blamed)
            if record.edge is not edge or not record.on_the_way:
                continue
            if record.state.ended:
                self._ledger.landed(record)
            else:
                self._set_back(record, cause, _DOING[record.state], blamed=record.id == blamed)

    def role_lost(self, stage: Stage, reason: str) -> None:
        """All units of ``stage`` were given up: whoever still needs it fails."""
        self._ledger.lost_roles.setdefault(stage, reason)
        for record in list(self._ledger.records.values()):
            if not record.state.ended and (hopeless := self._hopeless(record.state)) is not None:
                self.fail(record, hopeless)

    def role_found(self, stage: Stage) -> None:
        """A unit of ``stage`` is up again."""
        self._ledger.lost_roles.pop(stage, None)

    def _hopeless(self, state: RequestState) -> str | None:
        """Why a request in ``state`` can never be done: a stage that it still needs is lost."""
        for stage, reason in self._ledger.lost_roles.items():
            if _ORDER.index(state) < _ORDER.index(STATES[stage].made):
                return reason
        return None

    def _go_on_unpromised(self, record: Record, cause: str, *, blamed: bool) -> None:
        """Only the way is lost on which its conditioning was to go; when that is made, another is chosen."""
        assert record.at is not None
        self._ledger.reserve(record, record.at)
        record.attempts += blamed
        if record.attempts >= self._ledger.config.max_attempts:
            self.fail(record, f"{cause} while {_DOING[record.state]} ({record.attempts} attempts)")

    def _release(self, record: Record, target: Station) -> None:
        """The receiver may have it already (its ``Received`` crosses this), and must not keep it."""
        self._ledger.out.append(Release(target.leader, record.id))
        self._ledger.strike(record, target.unit)

    def _set_back(self, record: Record, cause: str, doing: str, *, blamed: bool, delay: float = 0.0) -> None:
        """To its payload where there still is one, else to the front of the queue; there it goes on after ``delay``."""
        ledger = self._ledger
        target = record.at if record.promise is None else record.promise.target
        if target is not None:
            self._release(record, target)
        record.attempts += blamed
        state = RequestState.QUEUED if record.source is None else record.source.states.made
        if (hopeless := self._hopeless(state)) is not None:
            self.fail(record, hopeless)
        elif record.attempts >= ledger.config.max_attempts:
            self.fail(record, f"{cause} while {doing} ({record.attempts} attempts)")
        else:
            ledger.set_back(record, ledger.now + delay)
