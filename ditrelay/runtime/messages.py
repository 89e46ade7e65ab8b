"""Control-plane structs: commands (head -> worker), events (worker -> head), and the head's own events and actions.

The scheduler takes the events and returns the commands and actions, so what it decides is what goes over the wire.
Every time (``at``) is ``time.monotonic()`` in seconds, which all processes of a host share.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.preview_messages import Preview, Previewed, PreviewTaken
from ditrelay.runtime.request import Request
from ditrelay.runtime.start_messages import Restart, StartFailed

Stage = Literal["encode", "denoise", "decode"]


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


# ---------------------------------------------------------------- commands: head -> worker


class Encode(_Message, frozen=True, tag=True):
    """Run the encoders for ``request`` and keep the conditioning until ``Release`` or ``Drop``.

    No other message has the bytes of the request's picture: ``Expect`` has an empty one, ``Preview`` none.
    """

    rank: int
    request: Request


class Send(_Message, frozen=True, tag=True):
    """Send what this rank holds of ``request_id`` (conditioning or latents) to ``dst`` as transfer ``seq``.

    ``early``: it is launched, but the device may not have made it yet.
    """

    rank: int
    request_id: str
    dst: int
    generation: int
    seq: int
    early: bool = False


class Expect(_Message, frozen=True, tag=True):
    """Allocate for ``header`` and receive transfer ``seq`` from ``src``. Its send is under way, perhaps ``early``."""

    rank: int
    request: Request
    src: int
    generation: int
    seq: int
    header: PayloadHeader
    early: bool = False


class Denoise(_Message, frozen=True, tag=True):
    """Denoise ``request_id``, whose conditioning is here; keep the latents until ``Release`` or ``Drop``."""

    rank: int
    request_id: str


class Decode(_Message, frozen=True, tag=True):
    """Decode ``request_id``, whose latents are here, into a media file."""

    rank: int
    request_id: str


class Drop(_Message, frozen=True, tag=True):
    """Stop all work on ``request_id`` at the next safe point, free its tensors, then answer ``Dropped``."""

    rank: int
    request_id: str


class Release(_Message, frozen=True, tag=True):
    """Free what this rank still keeps of ``request_id`` (a copy kept for recovery). Not answered."""

    rank: int
    request_id: str


class OpenEdge(_Message, frozen=True, tag=True):
    """Make this rank's end of the directed edge ``src -> dst``; answer ``EdgeUp`` or ``EdgeFailed``."""

    rank: int
    src: int
    dst: int
    generation: int


class CloseEdge(_Message, frozen=True, tag=True):
    """Tear this rank's end of ``src -> dst`` down; pending transfers on it fail. Not answered."""

    rank: int
    src: int
    dst: int
    generation: int
    reason: str


class Shutdown(_Message, frozen=True, tag=True):
    """End the process."""

    rank: int


class Alive(_Message, frozen=True, tag=True):
    """The head goes on. Comes about once a second, to a worker that still starts too; not answered."""

    rank: int


Command = Encode | Send | Expect | Denoise | Decode | Preview | Drop | Release | OpenEdge | CloseEdge | Shutdown | Alive


# ---------------------------------------------------------------- events: worker -> head


class StageMemory(msgspec.Struct, frozen=True):
    """Bytes that a rank held: ``idle`` before a stage, ``peak`` at most while it ran. A GPU's, on a CPU resident."""

    idle: int
    peak: int


class WorkerUp(_Message, frozen=True, tag=True):
    """The worker's components are loaded; it takes commands. ``capacity``: bytes of memory there are, 0 if unknown."""

    rank: int
    pid: int
    at: float
    load_seconds: float = 0.0
    capacity: int = 0


class Heartbeat(_Message, frozen=True, tag=True):
    """Sent every second. Memory in bytes; ``pending`` are transfers in flight, ``kept`` bytes of retained payloads.

    ``device_total`` is the GPU's memory, 0 on a CPU.
    """

    rank: int
    at: float
    rss: int = 0
    device_total: int = 0
    device_allocated: int = 0
    device_peak: int = 0
    pending_sends: int = 0
    pending_recvs: int = 0
    kept: int = 0


class EdgeUp(_Message, frozen=True, tag=True):
    """This rank's end of the edge is connected."""

    rank: int
    src: int
    dst: int
    generation: int


class EdgeFailed(_Message, frozen=True, tag=True):
    """This rank's end of the edge could not be opened, or a transfer on it failed; the edge is unusable."""

    rank: int
    src: int
    dst: int
    generation: int
    reason: str
    request_id: str | None = None
    seq: int | None = None


class Started(_Message, frozen=True, tag=True):
    """A stage began to compute."""

    rank: int
    request_id: str
    stage: Stage
    at: float


class StepDone(_Message, frozen=True, tag=True):
    """Denoising step ``step`` (1-based) of ``total`` is finished."""

    rank: int
    request_id: str
    step: int
    total: int
    at: float


class Launched(_Message, frozen=True, tag=True):
    """The encode is given to the device, so its header is known; ``Encoded`` follows when the device has done it."""

    rank: int
    request_id: str
    header: PayloadHeader


class Encoded(_Message, frozen=True, tag=True):
    """The conditioning is ready to be sent; ``began`` to ``at`` is the compute span."""

    rank: int
    request_id: str
    header: PayloadHeader
    began: float
    at: float
    memory: StageMemory | None = None


class Denoised(_Message, frozen=True, tag=True):
    """The latents are ready to be sent."""

    rank: int
    request_id: str
    header: PayloadHeader
    began: float
    at: float
    memory: StageMemory | None = None


class Decoded(_Message, frozen=True, tag=True):
    """The media file is made. ``began`` to ``at`` is the compute span; the file is made after it, beside other work."""

    rank: int
    request_id: str
    media: bytes
    media_type: str
    width: int
    height: int
    num_frames: int
    began: float
    at: float
    memory: StageMemory | None = None


class Sent(_Message, frozen=True, tag=True):
    """The send is complete; the sender's buffer is free to be reused."""

    rank: int
    request_id: str
    dst: int
    generation: int
    seq: int
    began: float
    at: float


class Received(_Message, frozen=True, tag=True):
    """The payload is here and usable by the compute stream."""

    rank: int
    request_id: str
    src: int
    generation: int
    seq: int
    began: float
    at: float


class StageFailed(_Message, frozen=True, tag=True):
    """A stage raised. The worker goes on; it has freed the request's tensors.

    ``out_of_memory``: the device had none left, which may be different with fewer requests on it.
    """

    rank: int
    request_id: str
    stage: Stage
    reason: str
    at: float
    invalid_param: str | None = None
    out_of_memory: bool = False


class TransferRejected(_Message, frozen=True, tag=True):
    """A received payload failed its checks (checksum, schema). The edge is still usable; the request is not."""

    rank: int
    request_id: str
    src: int
    generation: int
    seq: int
    reason: str


class Dropped(_Message, frozen=True, tag=True):
    """Everything of the request is freed on this rank."""

    rank: int
    request_id: str


class WorkerFailed(_Message, frozen=True, tag=True):
    """The worker cannot go on and is about to exit; says why, since an exit code does not."""

    rank: int
    reason: str


class LogLine(_Message, frozen=True, tag=True):
    """One log record of a worker, logged again by the head under the same logger."""

    rank: int
    logger: str
    level: int
    text: str


FleetEvent = (
    WorkerUp
    | Heartbeat
    | EdgeUp
    | EdgeFailed
    | Started
    | StepDone
    | PreviewTaken
    | Previewed
    | Launched
    | Encoded
    | Denoised
    | Decoded
    | Sent
    | Received
    | StageFailed
    | TransferRejected
    | Dropped
)
WorkerEvent = FleetEvent | WorkerFailed | LogLine


# ---------------------------------------------------------------- the head's own events and actions (never on the wire)


class Submit(_Message, frozen=True, tag=True):
    """A client's request."""

    request: Request


class CancelRequest(_Message, frozen=True, tag=True):
    """End a request as cancelled, or as failed where ``reason`` says why (for instance a request timeout)."""

    request_id: str
    reason: str | None = None


class WorkerDown(_Message, frozen=True, tag=True):
    """A worker process ended or stopped answering."""

    rank: int
    reason: str


class Tick(_Message, frozen=True, tag=True):
    """Time passes; deadlines are looked at."""


class Spawn(_Message, frozen=True, tag=True):
    """Start the process of ``rank``."""

    rank: int


class Kill(_Message, frozen=True, tag=True):
    """Kill the process of ``rank``; the caller does not answer with ``WorkerDown`` for it."""

    rank: int
    reason: str


class Finish(_Message, frozen=True, tag=True):
    """The request ended: ``done``, ``failed`` (with a reason) or ``cancelled``. Exactly once per submitted request."""

    request_id: str
    outcome: Literal["done", "failed", "cancelled"]
    reason: str | None = None
    invalid_param: str | None = None


class Reject(_Message, frozen=True, tag=True):
    """The queue is full; the request was not accepted."""

    request_id: str
    limit: int


SchedulerEvent = Submit | CancelRequest | WorkerDown | StartFailed | Restart | Tick | FleetEvent
Action = Command | Spawn | Kill | Finish | Reject
