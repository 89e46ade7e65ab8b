"""Which units and edges are alive: spawns, restarts, edge generations, deadlines.

A unit is up when all of its members are. An edge opens when both of its units are up, under a new generation each time;
whatever an older generation still says is ignored. A unit that loses one member loses all, and is spawned again.
"""

from __future__ import annotations

from ditrelay.runtime.messages import (
    CloseEdge,
    EdgeFailed,
    EdgeUp,
    Finish,
    Heartbeat,
    Kill,
    OpenEdge,
    Spawn,
    WorkerDown,
    WorkerUp,
)
from ditrelay.runtime.scheduling.ledger import Ledger
from ditrelay.runtime.scheduling.previews import Previews
from ditrelay.runtime.scheduling.recovery import Recovery
from ditrelay.runtime.scheduling.state import EdgeState, Record, Station, UnitState, UnitStatus
from ditrelay.runtime.scheduling.watches import HANG_FACTOR, Watch
from ditrelay.runtime.start_messages import Restart, StartFailed

# An edge that fails more often than this without one transfer in between takes its destination down.
MAX_EDGE_FAILURES = 3

# Seconds. The first restart is at once; while no stage is finished, the delay doubles with every further one to this.
MAX_RESTART_DELAY = 60.0

# Seconds from a start that failed to the next try: soon, while it may be a shortage of a moment; each may cost a load.
START_DELAYS = (0.0, 1.0, 2.0)
SHORTAGE_SECONDS = 300.0
LATER_START_DELAY = 60.0

# Seconds from the death at which a unit is given up to the next try, the first time and later.
GIVEN_UP_DELAYS = (60.0, 120.0, 300.0)

# Shares of a unit's memory: above the first its windows shrink by one a heartbeat, below the second they grow again.
MEMORY_HIGH = 0.9
MEMORY_LOW = 0.8


class Liveness:
    """Owns the status of units and edges."""

    def __init__(self, ledger: Ledger, recovery: Recovery, previews: Previews) -> None:
        self._ledger = ledger
        self._recovery = recovery
        self._previews = previews
        self._unit_of = {rank: unit for unit in ledger.units.values() for rank in unit.unit.members}
        self._startups: Watch[UnitState] = Watch(ledger.config.startup_timeout)
        self._openings: Watch[EdgeState] = Watch(ledger.config.transfer_timeout)

    @property
    def ready(self) -> bool:
        ledger = self._ledger
        return ledger.up_edges == len(ledger.edges) and all(unit.status == "up" for unit in ledger.units.values())

    def status_of(self, rank: int) -> UnitStatus:
        return self._unit_of[rank].status

    # ------------------------------------------------------------ units

    def start(self) -> None:
        for unit in self._ledger.units.values():
            self._spawn(unit)

    def _spawn(self, unit: UnitState) -> None:
        unit.status = "starting"
        self._startups.start(unit, self._ledger.now)
        self._ledger.out.extend(Spawn(rank) for rank in unit.unit.members)

    def worker_up(self, event: WorkerUp) -> None:
        unit = self._unit_of[event.rank]
        if unit.status != "starting":
            return
        unit.members_up.add(event.rank)
        if len(unit.members_up) < len(unit.unit.members):
            return
        unit.status, unit.reason, unit.up_since = "up", None, self._ledger.now
        unit.failed_starts = 0
        self._startups.stop(unit)
        for stage in unit.stations:
            self._recovery.role_found(stage)
        self._ledger.dirty.update(dict.fromkeys(unit.stations.values()))
        for edge in unit.edges:
            if edge.src.unit.status == edge.dst.unit.status == "up":
                self._open(edge)

    def worker_down(self, event: WorkerDown) -> None:
        unit = self._unit_of[event.rank]
        if unit.status in ("starting", "up"):
            self._unit_down(unit, f"worker {event.rank} died ({event.reason})", dead=event.rank)

    def start_failed(self, event: StartFailed) -> None:
        unit = self._unit_of[event.rank]
        if unit.status == "starting":
            self._unit_down(unit, f"worker {event.rank} could not be started ({event.reason})", dead=event.rank)

    def restart(self, event: Restart) -> None:
        """At once, with all that was held against it forgotten; nor is what it computes held to be the reason."""
        unit = self._unit_of[event.rank]
        if unit.status in ("starting", "up"):
            self._take_down(unit, f"{unit.unit} was to be restarted", suspicious=False)
        unit.deaths.clear()
        unit.died_in.clear()
        unit.failed_starts = unit.given_up = 0
        unit.restarted += 1
        self._spawn(unit)

    def _kill(self, unit: UnitState, reason: str) -> None:
        self._unit_down(unit, f"{unit.unit} was killed: {reason}")

    def _unit_down(self, unit: UnitState, cause: str, dead: int | None = None) -> None:
        """Kills what is left of the unit, takes it out of service and plans its return."""
        started = unit.status == "up"
        if started:
            self._count_death(unit)
        self._take_down(unit, cause, dead=dead)
        if started:
            self._plan_restart(unit)
        else:
            self._plan_next_start(unit)
        if unit.status == "failed":
            self._lose_roles(unit, cause)

    def _take_down(self, unit: UnitState, cause: str, *, dead: int | None = None, suspicious: bool = True) -> None:
        ledger = self._ledger
        ledger.out.extend(Kill(rank, cause) for rank in unit.unit.members if rank != dead)
        self._startups.stop(unit)
        unit.members_up.clear()
        unit.memory.clear()
        for station in unit.stations.values():
            station.shapes.clear()
        unit.status, unit.reason = "down", cause
        for edge in unit.edges:
            edge.failures = 0
            self._close(edge, cause)
        self._previews.unit_lost(unit)
        self._recovery.unit_lost(unit, cause, suspicious=suspicious)

    def _count_death(self, unit: UnitState) -> None:
        """Time counts while it is up: a unit that takes a minute to start can crash in a loop, too."""
        unit.lived += self._ledger.now - unit.up_since
        while unit.deaths and unit.lived - unit.deaths[0] > self._ledger.config.restart_window:
            unit.deaths.popleft()
        if not unit.deaths:
            unit.died_in.clear()
        unit.deaths.append(unit.lived)
        unit.died_in.update(stage for stage, station in unit.stations.items() if station.running is not None)

    def _plan_restart(self, unit: UnitState) -> None:
        before = len(unit.deaths) - 1
        if before >= self._ledger.config.max_restarts:
            self._give_up(unit)
            return
        unit.given_up = 0
        self._respawn(unit, min(2.0 ** (before - 1), MAX_RESTART_DELAY) if before else 0.0)

    def _plan_next_start(self, unit: UnitState) -> None:
        """Starts fail for want of something, which may be there again at any time: they are tried for good."""
        if unit.given_up:
            self._give_up(unit)
            return
        if not unit.failed_starts:
            unit.failing_since = self._ledger.now
        is_short = self._ledger.now - unit.failing_since < SHORTAGE_SECONDS
        delay = START_DELAYS[min(unit.failed_starts, len(START_DELAYS) - 1)] if is_short else LATER_START_DELAY
        unit.failed_starts += 1
        self._respawn(unit, delay)

    def _give_up(self, unit: UnitState) -> None:
        """Nobody waits for it any more, but it is tried again: what ended it may be over."""
        unit.status = "failed"
        delay = GIVEN_UP_DELAYS[min(unit.given_up, len(GIVEN_UP_DELAYS) - 1)]
        unit.given_up += 1
        self._respawn(unit, delay)

    def _respawn(self, unit: UnitState, delay: float) -> None:
        unit.respawn_at = self._ledger.now + delay
        unit.restarted += 1

    def _lose_roles(self, unit: UnitState, cause: str) -> None:
        window = self._ledger.config.restart_window
        tries = f"the last of {len(unit.deaths)} deaths within {window:g} s without a finished stage"
        for stage in unit.stations:
            if all(other.status == "failed" for other in self._ledger.units.values() if stage in other.stations):
                self._recovery.role_lost(stage, f"no rank is left for {stage}: {cause}, {tries}")

    # ------------------------------------------------------------ edges

    def edge_up(self, event: EdgeUp) -> None:
        edge = self._ledger.edges.get((event.src, event.dst))
        if edge is None or edge.status != "opening" or edge.generation != event.generation:
            return
        edge.ends.add(event.rank)
        if len(edge.ends) == 2:
            self._openings.stop(edge)
            self._ledger.set_edge(edge, "up")

    def edge_failed(self, event: EdgeFailed) -> None:
        edge = self._ledger.edges.get((event.src, event.dst))
        if edge is not None and edge.status != "closed" and edge.generation == event.generation:
            self._fail_edge(edge, event.reason, blamed=event.request_id)

    def _open(self, edge: EdgeState) -> None:
        edge.generation += 1
        edge.next_seq = 0
        self._ledger.set_edge(edge, "opening")
        self._openings.start(edge, self._ledger.now)
        src, dst = edge.src.leader, edge.dst.leader
        self._ledger.out.extend(OpenEdge(rank, src, dst, edge.generation) for rank in (src, dst))

    def _close(self, edge: EdgeState, reason: str) -> None:
        if edge.status == "closed":
            return
        self._ledger.set_edge(edge, "closed")
        self._openings.stop(edge)
        edge.ends.clear()
        src, dst = edge.src.leader, edge.dst.leader
        for end in (edge.src, edge.dst):
            if end.unit.status == "up":
                self._ledger.out.append(CloseEdge(end.leader, src, dst, edge.generation, reason))

    def _fail_edge(self, edge: EdgeState, reason: str, blamed: str | None = None) -> None:
        """Closes it, sets back what was on the way, and opens it anew or gives its destination up."""
        edge.failures += 1
        failures = edge.failures
        cause = f"edge {edge} failed ({reason})"
        self._close(edge, cause)
        self._recovery.edge_lost(edge, cause, blamed)
        if failures > MAX_EDGE_FAILURES:
            self._kill(edge.dst.unit, f"edge {edge} failed {failures} times in a row, at last: {reason}")
        else:
            self._open(edge)

    # ------------------------------------------------------------ memory

    def heartbeat(self, event: Heartbeat) -> None:
        """Adaptive flow control: to a unit whose memory is nearly full go fewer payloads at a time, but never none."""
        unit = self._unit_of[event.rank]
        if unit.status != "up":
            return
        unit.memory[event.rank] = event.device_allocated / event.device_total if event.device_total else 0.0
        if event.rank != unit.leader:
            return
        used = max(unit.memory.values())
        change = -1 if used > MEMORY_HIGH else 1 if used < MEMORY_LOW else 0
        for edge in unit.edges:
            window = min(max(edge.window + change, 1), edge.full_window)
            if edge.dst.unit is unit and window != edge.window:
                self._ledger.resize(edge, window)

    # ------------------------------------------------------------ deadlines

    def tick(self) -> None:
        """Acts on every deadline that has passed."""
        ledger, now = self._ledger, self._ledger.now
        self._recovery.resume()
        for unit in ledger.units.values():
            if unit.status in ("down", "failed") and unit.respawn_at <= now:
                self._spawn(unit)
        while (unit_late := self._startups.due(now)) is not None:
            limit = ledger.config.startup_timeout
            self._kill(unit_late, f"it was not up {limit:g} s after its start (--startup-timeout)")
        while (edge := self._openings.due(now)) is not None:
            limit = ledger.config.transfer_timeout
            self._fail_edge(edge, f"it did not open within {limit:g} s (--dist-timeout)")
        while (moving := ledger.transfers.due(now)) is not None:
            self._transfer_late(moving)
        while (station := ledger.stages.due(now)) is not None:
            self._stage_hung(station)
        while (zombie := ledger.drops.due(now)) is not None:
            self._drop_late(zombie)
        self._previews.tick()

    def _transfer_late(self, record: Record) -> None:
        assert record.edge is not None
        limit = self._ledger.config.transfer_timeout
        what = f"transfer #{record.seq} of request {record.id}"
        reason = f"{what} did not arrive within {limit:g} s (--dist-timeout)"
        self._fail_edge(record.edge, reason, blamed=record.id)

    def _stage_hung(self, station: Station) -> None:
        """What is longer than all that is allowed fails its request; what is only unusual is tried again elsewhere."""
        unit, limit = station.unit, self._ledger.stages.limit(station)
        final = limit >= self._ledger.config.stage_timeout
        busy = [station, *unit.stations.values()]
        culprit = next((other.running for other in busy if other.running is not None), station.dispatched[0])
        assert culprit.at is not None
        after = f" (after step {culprit.step})" if culprit.step else ""
        if culprit.began is None and unit.preview is not None:
            after = f" (behind a preview of request {unit.preview.id})"
        what = f"the {culprit.at.stage} of request {culprit.id} on {unit.unit}{after}"
        allowed = "--stage-timeout" if final else self._explain(culprit, culprit.at)
        reason = f"{what} showed no progress for {limit:.3g} s ({allowed})"
        if final and not culprit.state.ended:
            self._recovery.end(culprit, Finish(culprit.id, "failed", reason), freed=unit)
        self._kill(unit, reason)

    def _explain(self, record: Record, station: Station) -> str:
        usual = self._ledger.stages.usual(record, station) or 0.0
        if HANG_FACTOR * usual < self._ledger.config.hang_timeout:
            return f"--dist-timeout; usual are {usual:.3g} s"
        return f"{HANG_FACTOR:g} times the usual {usual:.3g} s"

    def _drop_late(self, record: Record) -> None:
        """Workers that do not answer ``Drop`` cannot be trusted to be free."""
        for unit in sorted(record.dropping, key=lambda unit: unit.leader):
            if unit.status == "up":
                self._kill(unit, f"it did not drop request {record.id} within {self._ledger.drops.timeout:g} s")
