"""One stage of one request on a lane: what it reads, what became of it, and how it is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ditrelay.runtime.messages import StageMemory, StepDone, WorkerEvent
from ditrelay.runtime.payloads import PayloadHeader, State
from ditrelay.runtime.pipelines_core.executors.checkpoints import Checkpoints
from ditrelay.runtime.pipelines_core.executors.previews import PreviewTaker
from ditrelay.runtime.pipelines_core.executors.progress import Progress, Reached
from ditrelay.runtime.pipelines_core.pipeline import StageCancelled
from ditrelay.runtime.request import Request
from ditrelay.runtime.topology import Role

Emit = Callable[[WorkerEvent], None]


def free_after(error: BaseException | None) -> None:
    """Give back what a stage that ran out of memory held: what one request fragmented must not fail the next."""
    while error is not None:
        error.__traceback__ = None  # its frames hold the stage's tensors
        error = error.__context__
    torch.cuda.empty_cache()


@dataclass(eq=False)
class StageRun:
    """A stage that is launched. ``inputs`` is what the device may read until it is done with the stage."""

    role: Role
    inputs: tuple[object, ...]
    header: PayloadHeader | None = None
    error: Exception | None = None
    memory: StageMemory | None = None
    began: float = 0.0
    at: float = 0.0


@dataclass(frozen=True)
class Watch:
    """The ``StageControl`` of a stage: reports its steps, and stops it between two of them once it is ``unwanted``."""

    rank: int
    request: Request
    progress: Progress
    emit: Emit
    unwanted: Callable[[], bool]
    checkpoints: Checkpoints | None = None
    previews: PreviewTaker | None = None

    def before_step(self) -> None:
        self.progress.pace()
        if self.unwanted():
            raise StageCancelled

    def after_step(self, step: int, total: int) -> None:
        def report(reached: Reached) -> None:
            if reached.error is None:
                self.emit(StepDone(self.rank, self.request.request_id, step, total, reached.at))

        self.progress.then(report, step=True)

    def checkpoint(self) -> State | None:
        return None if self.checkpoints is None else self.checkpoints.read(self.request.request_id)

    def keep(self, step: int, capture: Callable[[], State]) -> None:
        if self.checkpoints is not None:
            self.checkpoints.keep(self.request.request_id, step, capture, self.progress)

    def show(self, step: int, total: int, estimate: Callable[[], State]) -> None:
        if self.previews is not None:
            self.previews.take(self.request, step, total, estimate, self.progress)
