"""How far a job on the engine is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditrelay.runtime.request import RequestState

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncTicket
    from ditrelay.engine import Progress

_ENCODED, _DENOISED = 5, 90  # percent done after these stages
_AFTER_DENOISE = (
    RequestState.DENOISED,
    RequestState.TO_DECODER,
    RequestState.AT_DECODER,
    RequestState.DECODING,
    RequestState.DONE,
)


class JobNames:
    """Which job an engine's request is for: of the newest ``limit`` requests, the ended ones too."""

    def __init__(self, limit: int = 5000) -> None:
        self._limit = limit
        self._names: dict[str, str] = {}

    def note(self, request_id: str, job_id: str) -> None:
        self._names[request_id] = job_id
        if len(self._names) > self._limit:
            del self._names[next(iter(self._names))]

    def job_of(self, request_id: str) -> str | None:
        return self._names.get(request_id)


@dataclass
class Live:
    """A job on the engine.

    Attributes:
        stage: what is done for it now.
        step, total_steps: of the denoise.
        first: the first step that was told, and when (monotonic seconds): later steps measure the pace from there on.
            It is not always step 1: a denoise may go on at a checkpoint.
    """

    ticket: AsyncTicket | None = None
    stage: RequestState = RequestState.QUEUED
    step: int = 0
    total_steps: int = 0
    first: tuple[int, float] | None = None
    last_step: float = 0.0

    def observe(self, progress: Progress) -> None:
        if progress.preview is not None:  # it shows a step that is over
            return
        self.stage = progress.state
        if progress.state is not RequestState.DENOISING:
            self.step = self.total_steps if progress.state in _AFTER_DENOISE else 0  # done, or to be done (again)
            self.first = None
        elif progress.step:
            self.step, self.total_steps, self.last_step = progress.step, progress.total_steps, progress.at
            self.first = self.first or (self.step, self.last_step)

    @property
    def percent(self) -> int:
        if self.stage in (RequestState.QUEUED, RequestState.ENCODING):
            return 0
        if self.stage is RequestState.DENOISING and self.total_steps:
            return _ENCODED + (_DENOISED - _ENCODED) * self.step // self.total_steps
        return _DENOISED if self.stage in _AFTER_DENOISE else _ENCODED

    def seconds_left(self) -> float | None:
        """Of the denoise, by the pace of its steps; ``None`` before that is known."""
        if self.first is None or self.step <= self.first[0]:
            return None
        step, at = self.first
        return (self.last_step - at) / (self.step - step) * (self.total_steps - self.step)
