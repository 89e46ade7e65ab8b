"""One simulated worker process: what it has of each request, and the stages that it computes.

It asserts what a real one relies on: a stage gets its input, nothing is dispatched twice, nothing is left over.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import structs

from ditrelay.runtime.messages import (
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Drop,
    Dropped,
    Encode,
    Encoded,
    Launched,
    Release,
    SchedulerEvent,
    Stage,
    StageFailed,
    Started,
    StepDone,
    WorkerUp,
)
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.preview_messages import Preview, Previewed, PreviewTaken
from ditrelay.runtime.request import Request, SamplingParams


def request(request_id: str, **params: object) -> Request:
    return Request(request_id=request_id, params=SamplingParams(prompt="a red apple", **params))  # type: ignore[arg-type]


def header(request_id: str, nbytes: int) -> PayloadHeader:
    return PayloadHeader(batch_id=request_id, request_ids=(request_id,), fields=(), tensors=(), nbytes=nbytes)


@dataclass
class Faults:
    """Chances per opportunity; all zero is a healthy fleet."""

    stage_fails: float = 0.0
    stage_hangs: float = 0.0
    transfer_fails: float = 0.0
    transfer_hangs: float = 0.0
    transfer_rejected: float = 0.0
    open_fails: float = 0.0


@dataclass
class World:
    """What all workers of one fleet share. ``launched``: the chance that an encode is announced before it is done;
    ``previews``: that a step leaves one."""

    random: random.Random
    payload_bytes: int
    launched: float = 0.0
    previews: float = 0.0
    faults: Faults = field(default_factory=Faults)

    def chance(self, chance: float) -> bool:
        return chance > 0 and self.random.random() < chance


@dataclass(eq=False)
class Wire:
    """One generation of one edge: what is posted at its two ends."""

    src: int
    dst: int
    generation: int
    sends: deque[tuple[int, Resident]] = field(default_factory=deque)
    expects: deque[tuple[int, Resident]] = field(default_factory=deque)
    posted: Counter[int] = field(default_factory=Counter)
    opened: set[int] = field(default_factory=set)
    broken: bool = False
    hung: bool = False

    @property
    def can_move(self) -> bool:
        """Whether a transfer on it may end now; the first holds up those behind it until its product is made."""
        if self.broken:
            return bool(self.sends or self.expects)
        return bool(self.sends and self.expects) and self.sends[0][1].here and not self.hung


@dataclass(eq=False)
class Resident:
    """What one worker has of one request."""

    request_id: str
    nbytes: int = 0
    wire: Wire | None = None  # over which its input came; None once a stage computes on it, and for a product
    here: bool = False  # a payload (input or product) is complete
    stage: Stage | None = None  # queued or running
    launched: bool | None = None  # whether its encode is announced; None: not decided
    transfers: int = 0
    dropped: bool = False

    @property
    def busy(self) -> bool:
        return self.transfers > 0 or self.stage is not None


@dataclass(eq=False)
class Worker:
    """One process. ``said`` is on its way to the head. Only leaders of units get commands."""

    rank: int
    world: World
    said: deque[SchedulerEvent]
    up: bool = False
    residents: dict[str, Resident] = field(default_factory=dict)
    lanes: dict[Stage, deque[Resident]] = field(default_factory=dict)
    running: dict[Stage, Resident] = field(default_factory=dict)
    hung: set[Stage] = field(default_factory=set)
    preview: Request | None = None

    def come_up(self) -> None:
        self.up = True
        self.said.append(WorkerUp(self.rank, 1, 0.0))

    def obey(self, command: Encode | Denoise | Decode | Preview | Drop | Release) -> None:
        match command:
            case Encode(request=wanted):
                assert wanted.request_id not in self.residents, f"{command}: something is left over"
                self._enqueue(self.admit(wanted.request_id), "encode")
            case Denoise(request_id=request_id):
                self._enqueue(self.residents[request_id], "denoise")
            case Decode(request_id=request_id):
                self._enqueue(self.residents[request_id], "decode")
            case Preview(request=wanted):
                assert self.preview is None, f"{command}: one is made already"
                self.preview = wanted
            case Drop(request_id=request_id):
                self._drop(request_id)
            case Release(request_id=request_id):
                resident = self.residents.pop(request_id, None)
                assert resident is None or resident.stage is None, f"{command}: its stage is under way"

    # ------------------------------------------------------------ residents

    def admit(self, request_id: str) -> Resident:
        self.residents[request_id] = resident = Resident(request_id)
        return resident

    def remove(self, resident: Resident) -> None:
        if self.residents.get(resident.request_id) is resident:
            del self.residents[resident.request_id]

    def settle(self, resident: Resident) -> None:
        """A dropped resident is freed, and the drop answered, once nothing uses it any more."""
        if resident.dropped and not resident.busy:
            self.remove(resident)
            self.said.append(Dropped(self.rank, resident.request_id))

    def _drop(self, request_id: str) -> None:
        resident = self.residents.get(request_id)
        if resident is None:
            self.said.append(Dropped(self.rank, request_id))
            return
        resident.dropped = True
        if resident.stage is not None and resident in self.lanes[resident.stage] and not resident.launched:
            self.lanes[resident.stage].remove(resident)
            resident.stage = None
        self.settle(resident)

    # ------------------------------------------------------------ computing

    def busy_stages(self) -> Iterator[Stage]:
        for stage, lane in self.lanes.items():
            if stage not in self.hung and (lane or stage in self.running):
                yield stage

    def _enqueue(self, resident: Resident, stage: Stage) -> None:
        assert stage == "encode" or resident.here, f"{stage} of {resident.request_id} has no input"
        assert resident.stage is None, f"{stage} of {resident.request_id} is dispatched twice"
        resident.stage = stage
        self.lanes.setdefault(stage, deque()).append(resident)

    def compute(self, stage: Stage) -> None:
        """The next bit of work on ``stage``: its start, a step, its end, or a fault."""
        resident, world = self.running.get(stage), self.world
        if stage == "encode" and self._launch_next():
            return
        if resident is None:
            self.running[stage] = resident = self.lanes[stage].popleft()
            resident.wire = None
            self.said.append(Started(self.rank, resident.request_id, stage, 0.0))
        elif resident.dropped:
            self._computed(resident)
        elif world.chance(world.faults.stage_hangs):
            self.hung.add(stage)
        elif world.chance(world.faults.stage_fails):
            self.remove(resident)
            failed = StageFailed(self.rank, resident.request_id, stage, "it raised", 0.0)
            self.said.append(structs.replace(failed, out_of_memory=world.chance(0.5)))
            self._computed(resident)
        elif stage == "denoise" and world.chance(0.3):
            self.said.append(StepDone(self.rank, resident.request_id, 1, 2, 0.0))
            if world.chance(world.previews):
                self.said.append(PreviewTaken(self.rank, resident.request_id, 1))
        else:
            self.said.append(self._product(resident, stage))
            self._computed(resident)

    def show(self) -> None:
        """Ends the preview, which has a picture or has come to nothing."""
        assert self.preview is not None
        self.said.append(
            Previewed(self.rank, self.preview.request_id, 1, 2, self.world.random.choice([b"", None]), 0.0)
        )
        self.preview = None

    def _launch_next(self) -> bool:
        """The lane's thread is ahead of its device: it may launch the encodes in their order, begun or not."""
        lane = [self.running["encode"]] if "encode" in self.running else []
        undecided = [r for r in (*lane, *self.lanes["encode"]) if r.launched is None and not r.dropped]
        if not undecided or self.world.chance(0.5):
            return False
        resident = undecided[0]
        resident.launched = self.world.chance(self.world.launched)
        if resident.launched:
            resident.nbytes = self._payload_bytes()
            self.said.append(Launched(self.rank, resident.request_id, header(resident.request_id, resident.nbytes)))
        return resident.launched

    def _payload_bytes(self) -> int:
        return self.world.random.randint(1, self.world.payload_bytes)

    def _product(self, resident: Resident, stage: Stage) -> SchedulerEvent:
        rank, request_id = self.rank, resident.request_id
        if stage == "decode":
            self.remove(resident)
            return Decoded(rank, request_id, b"", "image/png", 8, 8, 1, 0.0, 0.0)
        resident.nbytes = resident.nbytes if resident.launched else self._payload_bytes()
        resident.launched, resident.here = False, True
        made = Encoded if stage == "encode" else Denoised
        return made(rank, request_id, header(request_id, resident.nbytes), 0.0, 0.0)

    def _computed(self, resident: Resident) -> None:
        """An early send of what failed or was dropped goes out all the same: the receiver waits for it."""
        assert resident.stage is not None
        resident.here |= bool(resident.launched)
        del self.running[resident.stage]
        resident.stage = None
        self.settle(resident)
