"""What may take how long: deadlines of one length, and those of stages, which follow from what such stages took before.

A stage that hangs says nothing. How long a healthy one may say nothing depends on the model, the size and the device,
so it is measured: denoise from step to step, encode and decode as a whole. Much longer than lately is a hang.
``stage_timeout`` is the most for all, and the only limit for the first run of a shape in a process: that may compile,
so it is neither judged nor measured.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from ditrelay.runtime.messages import Stage
from ditrelay.runtime.scheduling.state import STATES, Record, SchedulerConfig, Station

K = TypeVar("K")

# This many times what it took lately is a hang.
HANG_FACTOR = 10.0

# Times that are kept of each size, and sizes.
RECENT_TIMES = 32
RECENT_SIZES = 64


class Watch(Generic[K]):
    """Deadlines of one length. They run out in the order in which they were started: a look costs what has run out."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._since: dict[K, float] = {}

    def start(self, key: K, now: float) -> None:
        """(Re)starts the deadline of ``key``."""
        self._since.pop(key, None)
        self._since[key] = now

    def stop(self, key: K) -> None:
        self._since.pop(key, None)

    def due(self, now: float) -> K | None:
        """Takes out one key whose time has run out."""
        for key, since in self._since.items():
            if now - since < self.timeout:
                return None
            del self._since[key]
            return key
        return None


class Pace:
    """How many seconds one kind of work took lately, by the size of the request (pixels in all frames)."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}

    def add(self, size: int, seconds: float) -> None:
        times = self._times.pop(size, None) or deque(maxlen=RECENT_TIMES)
        times.append(seconds)
        self._times[size] = times
        if len(self._times) > RECENT_SIZES:
            del self._times[next(iter(self._times))]

    def usual(self, size: int) -> float | None:
        """The longest of late. For a size that was not measured: of all sizes, in proportion where it is larger."""
        if size in self._times:
            return max(self._times[size])
        scaled = (max(times) * max(1.0, size / other) for other, times in self._times.items())
        return max(scaled, default=None)


class StageWatch:
    """The stages that workers have, and since when they said nothing of them.

    A stage's deadline counts from its last news; before it starts, from the last news of its whole unit.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._least = min(config.hang_timeout, config.stage_timeout)
        self._since: dict[Station, float] = {}
        self._paces: dict[Stage, Pace] = {stage: Pace() for stage in STATES}

    # ------------------------------------------------------------ what workers say

    def start(self, station: Station, now: float) -> None:
        self._since.pop(station, None)
        self._since[station] = now

    def stop(self, station: Station) -> None:
        self._since.pop(station, None)

    def news(self, station: Station, now: float) -> None:
        """The worker has said something of a stage at ``station``."""
        for other in station.unit.stations.values():
            if other.dispatched and (other is station or other.running is None):
                self.start(other, now)

    def began(self, record: Record, station: Station, now: float) -> None:
        record.began, record.step = now, 0
        self.news(station, now)

    def stepped(self, record: Record, station: Station, step: int, now: float) -> None:
        if record.began is not None and record.shape in station.shapes:
            self._paces[station.stage].add(record.size, now - self._since[station])
        record.step = step
        self.news(station, now)

    def ended(self, record: Record, station: Station, now: float) -> None:
        """The worker is done with that stage of it, in whatever way."""
        record.began = None
        self.news(station, now)

    def completed(self, record: Record, station: Station, now: float) -> None:
        """As ``ended``, and it has made what it should."""
        if record.began is not None and record.shape in station.shapes:
            since = self._since[station] if station.stage == "denoise" else record.began
            self._paces[station.stage].add(record.size, now - since)
        station.has_run(record.shape)
        self.ended(record, station, now)

    # ------------------------------------------------------------ who is late

    def due(self, now: float) -> Station | None:
        """Takes out one station that has said nothing for longer than its limit."""
        for station, since in self._since.items():
            if now - since < self._least:
                return None
            if now - since >= self.limit(station):
                del self._since[station]
                return station
        return None

    def limit(self, station: Station) -> float:
        """Seconds that ``station`` may say nothing. One that has not begun waits for what its unit computes."""
        if station.running is not None:
            return self._limit_of(station.running, station)
        others = [other for other in station.unit.stations.values() if other.running is not None]
        limits = [self._limit_of(other.running, other) for other in others if other.running is not None]
        return max(limits, default=self._unexplained(station))

    def _unexplained(self, station: Station) -> float:
        """Nothing at its unit has begun: the worker has not said so yet, or makes a preview, which takes no time."""
        return self._config.stage_timeout if station.unit.preview is None else self._least

    def usual(self, record: Record, station: Station) -> float | None:
        """Seconds that a part of such a stage took lately; ``None`` where nothing can be said yet."""
        return self._paces[station.stage].usual(record.size) if record.shape in station.shapes else None

    def _limit_of(self, record: Record, station: Station) -> float:
        config, usual = self._config, self.usual(record, station)
        if usual is None:
            return config.stage_timeout
        limit = max(config.hang_timeout, HANG_FACTOR * usual)
        if record.state.ended:  # it is over when its last transfer is, and of that nothing is said
            limit += config.transfer_timeout
        return min(limit, config.stage_timeout)
