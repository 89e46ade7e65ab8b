"""A pipeline is an ordered list of stages, each with the role that a rank needs to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ditrelay.runtime.payloads import Payload, PayloadHeader, State
from ditrelay.runtime.pipelines_core.media import Media
from ditrelay.runtime.request import Request
from ditrelay.runtime.topology import Role

if TYPE_CHECKING:
    import torch

    from ditrelay.models.adapter import Frames
    from ditrelay.runtime.pipelines_core.clips import ClipFile


class StageCancelled(Exception):
    """Raised out of a stage, between two steps, when nobody wants its result any more."""


@dataclass
class Batch:
    """Requests that pass the stages together (one, for now) and what the last stage left for the next.

    ``payload`` is the state in the form in which it crosses an edge; ``header`` alone announces one that is expected.
    ``ready``: the event behind the stage that makes the payload, where it was announced before that was done.
    ``frames``: the pixels of each request, not yet a file; ``clip``: a file that is being written.
    """

    requests: tuple[Request, ...]
    state: State = field(default_factory=dict)
    header: PayloadHeader | None = None
    payload: Payload | None = None
    ready: torch.cuda.Event | None = None
    frames: Sequence[Frames] = ()
    clip: ClipFile | None = None
    media: tuple[Media, ...] = ()

    @property
    def batch_id(self) -> str:
        return self.requests[0].request_id


class StageControl(Protocol):
    """How the caller watches a stage and stops it."""

    def before_step(self) -> None:
        """Called before every step; raises ``StageCancelled`` to stop."""
        ...

    def after_step(self, step: int, total: int) -> None:
        """Step ``step`` (1-based) of ``total`` is finished."""
        ...

    def checkpoint(self) -> State | None:
        """How far another process came with this stage; ``None``: begin with the first step."""
        ...

    def keep(self, step: int, capture: Callable[[], State]) -> None:
        """After ``step`` steps, and more to come: ``capture`` tells what another process needs to go on from here."""
        ...

    def show(self, step: int, total: int, estimate: Callable[[], State]) -> None:
        """After ``step`` of ``total`` steps, and more to come: ``estimate`` tells what they will make."""
        ...


class Uncontrolled:
    """A ``StageControl`` that neither watches, nor stops, nor keeps, nor shows."""

    def before_step(self) -> None: ...

    def after_step(self, step: int, total: int) -> None: ...

    def checkpoint(self) -> State | None: ...

    def keep(self, step: int, capture: Callable[[], State]) -> None: ...

    def show(self, step: int, total: int, estimate: Callable[[], State]) -> None: ...


class Stage(Protocol):
    """Takes a batch as the stage before left it and leaves it for the next."""

    @property
    def role(self) -> Role: ...

    def run(self, batch: Batch, control: StageControl) -> None:
        """The part that needs the lane. On a GPU it may return before the device has done what it launched."""
        ...

    def finish(self, batch: Batch) -> None:
        """The rest, for the CPU alone, once the device is done: on any thread, beside the lane's next stage."""
        ...


class Pipeline:
    """The stages of one model on one rank, in order; a rank holds those of its roles."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages

    def stage(self, role: Role) -> Stage:
        return next(stage for stage in self.stages if stage.role == role)
