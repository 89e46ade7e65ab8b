"""Refuses a request that is too large for the ranks' memory before it starts.

What a stage needs grows with the size of what it makes, in a way that only the model knows. So it is learned from the
stages that were computed, and a request that is larger than all of them is judged by the least that can be expected:

- In proportion to what the largest took beyond what its rank held before: a denoise by its pixels in all frames, a
  decode by those of one frame, since a VAE may pass over the frames one after the other.
- Along the line through the smallest and the largest, where these are far enough apart. Needs that grow faster than
  the size lie above it. An encode is judged by this alone: that of a text is the same for any size.

The lesser counts, and it must exceed the memory of every unit that could do the stage: a request that is refused never
shows that it would have fit, while one that runs out of memory only fails. Whoever comes nearer to the limit step by
step teaches more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.messages import Stage, StageMemory
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.topology import Topology, Unit, role_name

# The rest of a device's memory is its context's, its libraries' and lost between allocations.
USABLE = 0.95
# Bytes that a stage takes whatever the size (libraries' workspaces), or by chance: they don't grow.
FIXED_BYTES = 256 << 20
# Two sizes are far enough apart for a line where the smaller is at most this share of the larger.
FAR_APART = 0.5

# Units with the same roles and degrees need the same.
_Kind = tuple[frozenset[str], int, int, int, int]


class Shape(NamedTuple):
    """Pixels, and frames; and whether a picture is given, which takes memory of its own."""

    width: int
    height: int
    frames: int
    from_picture: bool = False

    @classmethod
    def of(cls, params: SamplingParams) -> Shape:
        return cls(params.width or 1, params.height or 1, params.num_frames or 1, params.image is not None)

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def work(self) -> int:
        """Pixels in all frames."""
        return self.pixels * self.frames

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames > 1 else "")


@dataclass
class Needs:
    """Bytes that one stage took on units of one kind, beyond what was held before it.

    Attributes:
        idle: the least that was held before it.
        largest: of the sizes computed, the one with the most work; ``most`` is the least that it took.
        smallest: the one with the least work; ``least`` is the most that it took.
    """

    idle: int
    largest: Shape
    most: int
    smallest: Shape
    least: int

    @classmethod
    def first(cls, shape: Shape, memory: StageMemory) -> Needs:
        took = memory.peak - memory.idle
        return cls(memory.idle, shape, took, shape, took)

    def add(self, shape: Shape, memory: StageMemory) -> None:
        took = memory.peak - memory.idle
        self.idle = min(self.idle, memory.idle)
        if shape.work >= self.largest.work:
            self.most = took if shape.work > self.largest.work else min(self.most, took)
            self.largest = shape
        if shape.work <= self.smallest.work:
            self.least = took if shape.work < self.smallest.work else max(self.least, took)
            self.smallest = shape

    def estimate(self, stage: Stage, shape: Shape) -> int:
        """The least that a rank must be expected to hold; 0 for a ``shape`` no larger than what was computed."""
        if shape.work <= self.largest.work:
            return 0
        growths = [*self._in_proportion(stage, shape), *self._along_the_line(shape)]
        return self.idle + self.most + round(min(growths, default=0.0))

    def _in_proportion(self, stage: Stage, shape: Shape) -> Iterator[float]:
        if stage == "denoise":
            ratio = shape.work / self.largest.work
        elif stage == "decode":
            ratio = shape.pixels / self.largest.pixels
        else:
            return
        yield max(0, self.most - FIXED_BYTES) * max(0.0, ratio - 1)

    def _along_the_line(self, shape: Shape) -> Iterator[float]:
        if self.smallest.work <= FAR_APART * self.largest.work:
            slope = (self.most - self.least - FIXED_BYTES) / (self.largest.work - self.smallest.work)
            yield max(0.0, slope) * (shape.work - self.largest.work)


@dataclass(frozen=True)
class _Excess:
    """A stage that does not fit: what it ``needs`` and what is there, in bytes, where it lacks least."""

    role: str
    needs: int
    capacity: int
    largest: Shape


class Admission:
    """Knows what memory the ranks have and what their stages took. May be used from any thread.

    Args:
        topology: the units.
        size_multiple, frame_multiple: which sizes and numbers of frames the model can make (see ``ModelCard``).
    """

    def __init__(self, topology: Topology, size_multiple: int = 1, frame_multiple: int = 1) -> None:
        self._topology = topology
        self._size_multiple = size_multiple
        self._frame_multiple = frame_multiple
        self._lock = threading.Lock()
        self._capacity: dict[int, int] = {}
        self._needs: dict[tuple[_Kind, Stage, bool], Needs] = {}

    def set_capacity(self, rank: int, capacity: int) -> None:
        """``rank`` has so many bytes of memory; 0: that is not known."""
        with self._lock:
            self._capacity[rank] = capacity

    def learn(self, rank: int, stage: Stage, params: SamplingParams, memory: StageMemory) -> None:
        """``rank`` has computed ``stage`` for ``params`` (resolved), which took ``memory``."""
        shape = Shape.of(params)
        key = (_kind(self._topology.unit_of(rank)), stage, _takes_picture(stage, shape))
        with self._lock:
            if needs := self._needs.get(key):
                needs.add(shape, memory)
            else:
                self._needs[key] = Needs.first(shape, memory)

    def check(self, params: SamplingParams) -> None:
        """Accept what may fit, and always what is no larger than what every stage has computed.

        Raises:
            InvalidRequest: ``params`` (resolved) can't fit; names what is larger than before, and says what fits.
        """
        shape = Shape.of(params)
        with self._lock:
            excess = self._excess(shape)
            if excess is None:
                return
            frames = shape.pixels <= excess.largest.pixels
            fitting = next((each for each in self._smaller(shape, frames=frames) if self._excess(each) is None), None)
        reason = f"too large for memory: {shape} needs about {_gib(excess.needs)} on a {excess.role} rank, which has "
        hint = f"; up to about {fitting} fits" if fitting else "; make it smaller"
        raise InvalidRequest("num_frames" if frames else "height", f"{reason}{_gib(excess.capacity)}{hint}")

    def _excess(self, shape: Shape) -> _Excess | None:
        """A stage that no unit has the memory for."""
        for stage, leaders in self._leaders():
            found = [self._excess_on(self._topology.unit_of(leader), stage, shape) for leader in leaders]
            lacking = [excess for excess in found if excess is not None]
            if lacking and len(lacking) == len(found):
                return min(lacking, key=lambda excess: excess.needs - excess.capacity)
        return None

    def _leaders(self) -> Iterator[tuple[Stage, tuple[int, ...]]]:
        yield "denoise", self._topology.replicas
        yield "decode", self._topology.decoders
        yield "encode", self._topology.encoders

    def _excess_on(self, unit: Unit, stage: Stage, shape: Shape) -> _Excess | None:
        needs = self._needs.get((_kind(unit), stage, _takes_picture(stage, shape)))
        capacity = min(self._capacity.get(rank, 0) for rank in unit.members)
        estimate = needs.estimate(stage, shape) if needs else 0
        if needs is None or not capacity or estimate <= USABLE * capacity:
            return None
        return _Excess(role_name(unit.roles), estimate, capacity, needs.largest)

    def _smaller(self, shape: Shape, *, frames: bool) -> Iterator[Shape]:
        """Fewer frames, or smaller sizes of about the same proportions: from ``shape`` down."""
        step = self._frame_multiple if frames else self._size_multiple
        if frames:
            yield from (shape._replace(frames=count) for count in range(shape.frames - step, 0, -step))
            return
        for width in range(shape.width - step, 0, -step):
            height = width * shape.height // shape.width // step * step
            if height:
                yield shape._replace(width=width, height=height)


def _takes_picture(stage: Stage, shape: Shape) -> bool:
    """What is done with a picture is learned apart: it is encoded beside the text, and the denoise may look at it."""
    return stage != "decode" and shape.from_picture


def _kind(unit: Unit) -> _Kind:
    return unit.roles, unit.sp, unit.ring, unit.tp, unit.cfg


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.3g} GiB"
